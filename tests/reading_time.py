"""How long the course takes to read.

python tests/reading_time.py       minutes of every notebook, and of the course

150 words a minute, 10 lines of code a minute, half a minute a picture. Cells marked `#| hide` or
`#| echo: false` do not count.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "nbs" / "site"))
import pages  # noqa: E402

WORDS, LINES, PICTURES = 150, 10, 2  # a minute
COURSE = 600  # minutes, at most
LESSON = 75


def is_lesson(
    path: Path,  # notebook
) -> bool:
    "The course is nbs/NN_*.ipynb."
    return path.parent == pages.NOTEBOOKS and path.name[0].isdigit()


def lessons() -> list[Path]:
    "The notebooks of the course, in reading order."
    return [path for path in pages.reading_order() if is_lesson(path)]


def count(
    cell: dict,
) -> tuple[int, int, int]:  # words, lines of code, pictures
    "What there is to read in one cell."
    told = pages.directives(cell["source"])
    if "hide" in told or told.get("echo") == "false":
        return 0, 0, 0
    if cell["cell_type"] == "markdown":
        text = re.sub(r"\]\([^)]*\)", "]", cell["source"])
        pictures = len(re.findall(r"!\[|<img\b", pages.prose(cell["source"])))
        return len(re.findall(r"\w[^\s]*", text)), 0, pictures
    lines = [line for line in cell["source"].splitlines() if not line.startswith("#|")]
    outputs = [output.get("data", {}) for output in cell.get("outputs", [])]
    pictures = sum(any(kind.startswith("image") for kind in data) for data in outputs)
    return 0, sum(bool(line.strip()) for line in lines), pictures


def minutes(
    path: Path,  # notebook
) -> float:
    "How long a notebook takes to read."
    counts = [count(cell) for cell in pages.read_cells(path)]
    words, lines, pictures = map(sum, zip(*counts))
    return words / WORDS + lines / LINES + pictures / PICTURES


if __name__ == "__main__":
    for notebook in pages.reading_order():
        part = "" if is_lesson(notebook) else "   not of the course"
        name = notebook.relative_to(pages.NOTEBOOKS)
        print(f"{minutes(notebook):6.0f} min  {name}{part}")
    print(f"{sum(map(minutes, lessons())):6.0f} min  the course")
