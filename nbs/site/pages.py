"""What is read off the tree: notebooks, their order, their headings; and the site's pages of them.

Nothing here needs Sphinx, so the tests use it too.
"""

import ast
import hashlib
import json
import posixpath
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

NOTEBOOKS = Path(__file__).resolve().parent.parent  # the folder nbs/
ROOT = NOTEBOOKS.parent
PARTS = {"": "The course", "library": "The library"}  # folder below nbs/ -> its title in the menu
PROJECT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
FENCE = re.compile(r"(^(`{3,}|~{3,}).*?^\2[`~]*[ \t]*$)", re.MULTILINE | re.DOTALL)
DIAGRAM = re.compile(r"```mermaid[ \t]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)", re.DOTALL)
LINK = re.compile(r"""(\]\(\s*<?|(?:src|href)=["'])([^)"'\s>]+)""")
HEADING = re.compile(r"^#{1,6}[ \t]+(.+?)[ \t#]*$", re.MULTILINE)
NAMED_ANCHOR = re.compile(r"""<\w+[^>]*\b(?:id|name)=["']([^"']+)["']""")
DIRECTIVE = re.compile(r"^#\|[ \t]*([\w-]+)[ \t:]*(.*?)[ \t]*$", re.MULTILINE)


# ---------------------------------------------------------------- reading notebooks


def read_cells(
    path: Path,  # notebook
) -> list[dict]:  # its cells; "source" is one string
    "The cells of a notebook."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def directives(
    source: str,  # a code cell
) -> dict[str, str]:  # "#| echo: false" -> {"echo": "false"}
    "What a cell's first lines tell nbdev."
    return dict(DIRECTIVE.findall(source))


def prose(
    text: str,  # Markdown
) -> str:  # the same without its code
    "Markdown without fenced blocks and code spans: where links and headings are looked for."
    return CODE_SPAN.sub("", FENCE.sub("", text))


def links(
    text: str,  # Markdown
) -> list[str]:  # targets, in the order of the text
    "Where the links and pictures of a text lead."
    return [target for _, target in LINK.findall(prose(text))]


def is_outside(
    target: str,  # of a link
) -> bool:
    "True for a link that leaves the repository: it has a scheme, or names a host."
    return bool(re.match(r"[a-zA-Z][\w+.-]*:|//", target))


def slug(
    heading: str,  # or an anchor, as JupyterLab or GitHub writes it
) -> str:  # letters, digits, "_" and "-"; small letters
    "The name of a heading in a link. JupyterLab keeps capitals, GitHub does not: take both."
    text = re.sub(r"[^\w\- ]", "", unquote(heading).strip().lower())
    return text.replace(" ", "-")


def anchors(
    text: str,  # Markdown
) -> set[str]:  # slugs of its headings, and names given by <a id="...">
    "What a link to a place in this text may name."
    headings = HEADING.findall(FENCE.sub("", text))
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {slug(heading) for heading in plain} | set(NAMED_ANCHOR.findall(prose(text)))


def markdown_of(
    path: Path,  # notebook or Markdown file
) -> str:  # all of its prose
    "The text of a page."
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = [cell["source"] for cell in read_cells(path) if cell["cell_type"] == "markdown"]
    return "\n\n".join(cells)


def reading_order() -> list[Path]:
    "Every notebook below nbs/: the index, then as the index links them, then the others by name."
    present = [
        path
        for path in sorted(NOTEBOOKS.rglob("*.ipynb"))
        if not any(part[0] in "._" for part in path.relative_to(NOTEBOOKS).parts)
    ]
    index = NOTEBOOKS / "index.ipynb"
    linked = [NOTEBOOKS / target.split("#")[0] for target in links(markdown_of(index))]
    first = [path for path in dict.fromkeys([index, *linked]) if path in present]
    return first + [path for path in present if path not in first]


def parts() -> dict[str, list[Path]]:
    "The notebooks of every part, in reading order, by the part's title."
    found = {title: [] for title in PARTS.values()}
    for path in reading_order():
        folder = path.parent.relative_to(NOTEBOOKS).as_posix().strip(".")
        title = PARTS.get(folder, folder.replace("_", " ").capitalize())
        if path.name != "index.ipynb":
            found.setdefault(title, []).append(path)
    return {title: paths for title, paths in found.items() if paths}


# ---------------------------------------------------------------- writing the site's pages


def place_of(
    path: Path,  # a file of the repository
) -> str | None:  # its place below the site's sources; None if the site has no page for it
    "Where the site has what a link leads to."
    if path.is_relative_to(NOTEBOOKS):
        return path.relative_to(NOTEBOOKS).as_posix()
    name = path.relative_to(ROOT).as_posix()
    if name == "README.md":
        return "index.ipynb"
    if path.parent == ROOT / "causal_story" and path.suffix == ".py":
        return f"api/{path.stem}.md"
    return name if name in PROJECT_PAGES else f"files/{name}"


def link_for_the_site(
    target: str,  # a link as it stands in the repository
    page: Path,  # the file it stands in
    sources: Path,  # where the site's sources are being written
) -> str:  # the same link, as it stands in the site's sources
    "Follow a page to where the site has it. A file that is no page is copied along."
    if is_outside(target):
        return target
    name, _, anchor = target.partition("#")
    anchor = f"#{slug(anchor)}" if anchor else ""
    if not name:
        return anchor
    path = (page.parent / unquote(name)).resolve()
    if not path.is_file() or not path.is_relative_to(ROOT):
        return target  # dead: the build will say so
    place = place_of(path)
    if not (sources / place).exists() and not place.startswith("api/"):
        if path.suffix not in (".ipynb", ".md"):
            (sources / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, sources / place)
    return posixpath.relpath(place, posixpath.dirname(place_of(page)) or ".") + anchor


def draw(
    diagram: str,  # Mermaid, as JupyterLab and GitHub draw it
    page: Path,  # the file it stands in
    sources: Path,  # where the site's sources are being written
) -> str:  # Markdown
    "Draw a diagram as a picture, so that the site needs no script for it."
    from mermaidx import render

    name = f"diagrams/{hashlib.sha256(diagram.encode()).hexdigest()[:12]}.svg"
    (sources / "diagrams").mkdir(exist_ok=True)
    (sources / name).write_text(render(diagram).svg(), encoding="utf-8")
    labels = ", ".join(re.findall(r'"([^"]+)"', diagram))
    words = re.sub(r"<[^>]*>|[\[\]]", " ", labels)
    return (
        f"![Diagram: {words}]({posixpath.relpath(name, posixpath.dirname(place_of(page)) or '.')})"
    )


def text_for_the_site(
    text: str,  # Markdown of a page
    page: Path,  # the file it comes from
    sources: Path,  # where the site's sources are being written
) -> str:  # with links that hold there
    "Rewrite the links of a text, and leave its code alone."
    code = []

    def keep(match: re.Match) -> str:
        "Put a piece of code aside; a diagram is drawn."
        diagram = DIAGRAM.match(match.group())
        code.append(draw(diagram.group(1), page, sources) if diagram else match.group())
        return f"\0{len(code) - 1}\0"

    def follow(match: re.Match) -> str:
        "Rewrite one link."
        return match.group(1) + link_for_the_site(match.group(2), page, sources)

    text = LINK.sub(follow, CODE_SPAN.sub(keep, FENCE.sub(keep, text)))
    while "\0" in text:
        text = re.sub("\0(\\d+)\0", lambda match: code[int(match.group(1))], text)
    return text


def defined_in(
    source: str,  # a code cell
) -> list[str]:  # names
    "The public functions and classes that a cell defines."
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a cell with a line of IPython
        return []
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node.name for node in tree.body if isinstance(node, kinds) and node.name[0] != "_"]


def folded_title(
    source: str,  # a code cell
) -> str:
    "What a reader sees of a folded cell."
    if names := defined_in(source):
        return "Code: " + ", ".join(names)
    first = source.split("\n", 1)[0]
    return "Imports" if first.startswith(("import ", "from ")) else "Code: " + first[:60]


def code_for_the_site(
    cell: dict,  # a code cell
) -> dict | None:  # None: the reader does not see it
    "A cell as the site shows it: plumbing is folded, hidden cells are left out."
    told = directives(cell["source"])
    source = re.sub(r"(?m)^#\|(?![ \t]*slow\b).*\n?", "", cell["source"]).strip("\n")
    if "hide" in told or not source:
        return None
    metadata = {}
    if told.get("echo") == "false":
        metadata = {"tags": ["remove-input"]}
    elif "export" in told or "exporti" in told:
        prompt = dict.fromkeys(["code_prompt_show", "code_prompt_hide"], folded_title(source))
        metadata = {"tags": ["hide-input"], "mystnb": prompt}
    return cell | {"source": source, "metadata": metadata}


def notebook_for_the_site(
    path: Path,  # notebook
    sources: Path,  # where the site's sources are being written
    exported: set[str],  # ids of the cells that a module holds
    modules: list[str],  # modules that this notebook defines
):
    "Write a notebook as the site shows it: with an anchor before each exported cell."
    cells = []
    for cell in read_cells(path):
        if cell["cell_type"] == "markdown":
            cells.append(cell | {"source": text_for_the_site(cell["source"], path, sources)})
        elif cell["cell_type"] == "code" and (shown := code_for_the_site(cell)):
            if cell["id"] in exported:
                cells.append(markdown_cell(f"(cell-{cell['id']})="))
            cells.append(shown)
    up = "../" * (len(path.relative_to(NOTEBOOKS).parts) - 1)
    for module in modules:
        cells.append(markdown_cell(f"---\n\nReference: [{module}]({up}api/{module}.md)"))
    if path.name == "index.ipynb":
        cells.append(markdown_cell(menu()))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    place = sources / place_of(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(notebook), encoding="utf-8")


def markdown_cell(
    text: str,  # Markdown
) -> dict:
    "A cell that the site adds."
    name = hashlib.sha256(text.encode()).hexdigest()[:8]
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": text}


def menu() -> str:
    "The site's tables of contents, one for each part."
    entries = {
        title: [path.relative_to(NOTEBOOKS).with_suffix("").as_posix() for path in paths]
        for title, paths in parts().items()
    }
    entries["Reference"] = ["api/index"]
    names = [Path(name).stem for name in PROJECT_PAGES if (ROOT / name).exists()]
    entries["The project"] = names
    trees = [
        "\n".join(["```{toctree}", ":hidden:", f":caption: {title}", "", *pages, "```"])
        for title, pages in entries.items()
    ]
    return "\n\n".join(trees)
