"""README.md is nbs/index.ipynb, turned into Markdown.

python tests/readme.py           write README.md
python tests/readme.py --check   exit with status 1 if README.md is not what the notebook gives
"""

import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "nbs" / "site"))
from pages import is_outside, slug  # noqa: E402

HEADER = (
    "<!-- Written from nbs/index.ipynb by tests/readme.py: change the notebook, not this file. -->"
)
LINK = re.compile(r"""(\]\(|src=["']|href=["'])([^)"'\s]+)""")
FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)


def from_root(
    match: re.Match,  # a link as it stands in a notebook of nbs/
) -> str:  # the same link, seen from the top level
    "Turn a link that is relative to nbs/ into one that is relative to the top level."
    opening, target = match.groups()
    if target.startswith("#"):  # GitHub's headings have small letters, JupyterLab's keep capitals
        return opening + "#" + slug(target[1:])
    if is_outside(target) or target.startswith("/"):
        return match.group()
    return opening + posixpath.normpath(posixpath.join("nbs", target))


def make_readme(notebook_path: Path = ROOT / "nbs" / "index.ipynb") -> str:  # Markdown text
    "The README: the index's prose, visible code and text outputs; pictures as linked files."
    notebook = nbformat.read(notebook_path, as_version=4)
    notebook.cells = [
        cell for cell in notebook.cells if not re.match(r"#\|\s*(hide|default_exp)\b", cell.source)
    ]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = re.sub(r"(?m)^#\|.*\n?", "", cell.source)
            cell.outputs = [
                output
                for output in cell.outputs
                if not any(kind.startswith("image") for kind in output.get("data", {}))
            ]
    exporter = MarkdownExporter()
    text, _ = exporter.from_notebook_node(notebook)
    parts = FENCE.split(text)
    parts[::2] = [LINK.sub(from_root, part) for part in parts[::2]]
    text = re.sub(r"[ \t]+$", "", "".join(parts), flags=re.MULTILINE)
    return HEADER + "\n\n" + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def main(arguments: list[str]) -> int:  # exit status
    "Write README.md, or compare it with the notebook."
    readme = ROOT / "README.md"
    text = make_readme()
    if "--check" not in arguments:
        readme.write_text(text, encoding="utf-8", newline="\n")
        return 0
    if readme.exists() and readme.read_text(encoding="utf-8") == text:
        return 0
    print("README.md and nbs/index.ipynb are out of step: run  python tests/readme.py")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
