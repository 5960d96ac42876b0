"""Build the site: the notebooks as a book, and the reference read off the modules.

python nbs/site/build.py [folder]     into _docs/ unless a folder is named; open its html/index.html

It needs the extra [docs]. Warnings are errors. No notebook is run: their saved outputs are shown.
"""

import argparse
import shutil
import sys
import time
from configparser import ConfigParser
from pathlib import Path

from api import module_page, read_module
from pages import (
    HEADING,
    NOTEBOOKS,
    PROJECT_PAGES,
    ROOT,
    code_for_the_site,
    markdown_of,
    notebook_for_the_site,
    read_cells,
    reading_order,
    text_for_the_site,
)


def shown_cells(
    path: Path,  # notebook
) -> set[str]:  # ids
    "The code cells that a reader of the site sees."
    cells = [cell for cell in read_cells(path) if cell["cell_type"] == "code"]
    return {cell["id"] for cell in cells if code_for_the_site(cell)}


def write_sources(
    sources: Path,  # made anew
):
    "Write all that Sphinx reads: notebooks, pictures, the reference, the project's own pages."
    if sources.exists():
        shutil.rmtree(sources)
    shutil.copytree(
        NOTEBOOKS,
        sources,
        ignore=shutil.ignore_patterns("*.ipynb", "*.py", "site", "results", ".*"),
    )
    notebooks = reading_order()
    modules = [
        read_module(path)
        for path in sorted((ROOT / "causal_story").glob("*.py"))
        if path.name[0] != "_"
    ]
    exported = {cell[2] for module in modules for cell in module.cells}
    shown = set().union(*[shown_cells(path) for path in notebooks])
    names = {path: path.relative_to(NOTEBOOKS).as_posix() for path in notebooks}
    titles = {name: HEADING.findall(markdown_of(path))[0] for path, name in names.items()}
    for path, name in names.items():
        homes = [module.name for module in modules if name in {cell[1] for cell in module.cells}]
        notebook_for_the_site(path, sources, exported, homes)
    (sources / "api").mkdir()
    for module in modules:
        page = module_page(module, shown & exported, titles, git_url())
        (sources / "api" / f"{module.name}.md").write_text(page, encoding="utf-8")
    (sources / "api" / "index.md").write_text(module_list(modules), encoding="utf-8")
    for name in PROJECT_PAGES:
        if (ROOT / name).exists():
            text = text_for_the_site(markdown_of(ROOT / name), ROOT / name, sources)
            (sources / name).write_text(text, encoding="utf-8")


def module_list(
    modules: list,  # of api.Module
) -> str:  # Markdown
    "The first page of the reference."
    lines = ["# Modules", "", "Every public name, read off the code. One module a notebook.", ""]
    lines += ["```{toctree}", ":maxdepth: 1", "", *[module.name for module in modules], "```", ""]
    return "\n".join(lines)


def git_url() -> str:
    "Where the code can be read in public, or nothing."
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    settings = parser["DEFAULT"]
    return f"{settings['git_url']}/blob/{settings['branch']}" if settings["git_url"] else ""


def claim(
    folder: Path,  # parts of it are deleted and made anew
):
    "Mark a folder as the site's. Ends the program for one that holds anything else."
    mark = folder / ".causal-story-site"
    if folder.exists() and any(folder.iterdir()) and not mark.exists():
        sys.exit(f"{folder} holds what is not of this site: delete it, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()


def main(
    arguments: list[str],
) -> int:  # exit status
    "Write the sources and let Sphinx build them."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "_docs")
    folder = parser.parse_args(arguments).folder.resolve()
    claim(folder)
    start = time.perf_counter()
    write_sources(folder / "sources")
    from sphinx.cmd.build import main as sphinx_build

    html = folder / "html"
    if html.exists():
        shutil.rmtree(html)
    options = ["-W", "--keep-going", "-q", "-j", "auto", "-b", "html"]
    places = ["-c", str(Path(__file__).parent), "-d", str(folder / "doctrees")]
    status = sphinx_build([*options, *places, str(folder / "sources"), str(html)])
    pages = len(list(html.rglob("*.html"))) if html.exists() else 0
    print(f"{pages} pages in {time.perf_counter() - start:.0f} s: {html / 'index.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
