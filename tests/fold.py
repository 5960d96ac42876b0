"""Folds what a reader need not see, in every notebook: `python tests/fold.py`.

A cell that the site leaves out (`#| hide`) or shows without its code (`#| echo: false`) is folded
in Jupyter as well; a click unfolds it. tests/test_repository.py asks that none is out of step.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDED = re.compile(r"^#\|\s*(hide|echo:\s*false)\s*$", re.MULTILINE)


def folded(
    notebook: dict,  # as JSON has it; changed in place
) -> dict:  # the same
    "Fold the code of every cell that asks for it, and unfold all others."
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        cell["metadata"].pop("jupyter", None)
        if FOLDED.search("".join(cell["source"])):
            cell["metadata"]["jupyter"] = {"source_hidden": True}
    return notebook


def notebooks() -> list:  # paths
    "Every notebook of the course and the library."
    paths = (ROOT / "nbs").rglob("*.ipynb")
    return sorted(p for p in paths if not any(part[0] in "._" for part in p.parts[-3:]))


def as_text(notebook: dict) -> str:
    "A notebook as nbdev writes it."
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


if __name__ == "__main__":
    for path in notebooks():
        text = as_text(folded(json.loads(path.read_text(encoding="utf-8"))))
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
            print("folded", path.relative_to(ROOT))
