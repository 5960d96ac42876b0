"""What the prose promises: links lead somewhere, commands exist, lessons are short and complete."""

import ast
import contextlib
import functools
import importlib.util
import io
import re
import shlex
import sys
from pathlib import Path

import pytest
from reading_time import COURSE, LESSON, count, lessons, minutes

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "nbs" / "site"))
import pages  # noqa: E402

NOTEBOOKS = pages.reading_order()
TEXTS = NOTEBOOKS + [
    ROOT / name for name in ("README.md", *pages.PROJECT_PAGES) if (ROOT / name).exists()
]


def name_of(path: Path) -> str:
    "A short name for a test."
    return path.relative_to(ROOT).as_posix()


each_text = pytest.mark.parametrize("path", TEXTS, ids=[name_of(path) for path in TEXTS])
each_lesson = pytest.mark.parametrize("path", lessons(), ids=[path.stem for path in lessons()])


# ---------------------------------------------------------------- links


@each_text
def test_links_and_anchors_lead_somewhere(path):
    dead = []
    for link in pages.links(pages.markdown_of(path)):
        if pages.is_outside(link):
            if not re.match(r"https://[\w.-]+\.\w+(/|$)|mailto:|data:", link):
                dead.append(link)
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or not target.is_relative_to(ROOT):
            dead.append(link)
        elif anchor and target.suffix in (".ipynb", ".md"):
            places = pages.anchors(pages.markdown_of(target))
            if anchor not in places and pages.slug(anchor) not in places:
                dead.append(link)
    assert not dead, "no such file, or no such heading in it"


@each_text
def test_a_link_that_names_a_number_leads_to_that_notebook(path):
    text = pages.prose(pages.markdown_of(path))
    wrong = []
    for words, target in re.findall(r"\[([^\[\]]*)\]\(([^)\s]+)\)", text):
        told = re.match(r"(?:[Nn]otebook |[Ll]esson )?(\d\d)\b(?!\.)", words)
        number = re.match(r"(\d\d)_", Path(target.split("#")[0]).name)
        if told and number and told.group(1) != number.group(1):
            wrong.append((words, target))
    assert not wrong


# ---------------------------------------------------------------- commands

BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)
SHELLS = ("", "bash", "sh", "shell", "console", "cmd", "powershell")
SPAN = re.compile(r"`([^`\n]+)`")
PROGRAM = re.compile(r"(?:\S*[/\\])?(causal-story|nbdev_\w+|python3?|py|voila|jupyter|ruff)$")
TREES = ("nbs/", "tests/", ".ci/", "causal_story/")


def command_lines(text: str) -> list[str]:
    "The commands of a text: in blocks, and in code spans that hold more than a program's name."
    found = [block for language, block in BLOCK.findall(text) if language in SHELLS]
    blocks = [block.replace("\\\n", " ") for block in found]
    lines = [part for block in blocks for line in block.splitlines() for part in line.split("&&")]
    spans = [span for span in SPAN.findall(pages.FENCE.sub("", text)) if " " in span.strip()]
    return [line.strip().removeprefix("$ ") for line in lines + spans]


def commands(text: str) -> list[list[str]]:
    "The commands whose program we know, as lists of words, from that program on."
    found = []
    for line in command_lines(text):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a line of prose with an apostrophe
            continue
        for number, word in enumerate(words):
            if match := PROGRAM.match(word):
                found.append([match.group(1), *words[number + 1 :]])
                break
            if number == 0 and word not in ("accelerate", "bash", "!"):
                break
    return found


@functools.cache
def flags_of(verb: str) -> frozenset[str] | None:  # None: there is no such verb
    "The flags of `causal-story VERB`, read off its help, whatever library reads the command line."
    from causal_story.cli import main

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
        try:
            main([verb, "--help"] if verb else ["--help"])
        except SystemExit as leaving:
            if leaving.code:
                return None
    if not re.search(rf"usage:[^\n]*\b{verb}\b", shown.getvalue()):
        return None  # the help of something else
    return frozenset(flag.replace("_", "-") for flag in re.findall(r"--[\w-]+", shown.getvalue()))


def faults_of(words: list[str]) -> list[str]:
    "What is wrong with a `causal-story` command. Capital words stand for something."
    verb = words[0] if words and not words[0].startswith("-") else ""
    if verb.isupper():
        return []
    known = flags_of(verb)
    if known is None:
        return [f"there is no verb {verb}"]
    flags = [word.split("=")[0].replace("_", "-") for word in words if word.startswith("--")]
    keys = [re.match(r"([a-z]\w*)=", word) for word in words[1:]]
    flags += ["--" + key.group(1).replace("_", "-") for key in keys if key]
    unknown = [flag for flag in flags if flag not in known and flag not in ("--help", "--FLAG")]
    return [f"{verb} has no {flag}" for flag in unknown]


@each_text
def test_commands_exist(path):
    faults = []
    for program, *words in commands(pages.markdown_of(path)):
        if program == "causal-story":
            faults += faults_of(words)
        elif program.startswith("nbdev_") and importlib.util.find_spec("nbdev"):
            from importlib.metadata import entry_points

            if not entry_points(group="console_scripts", name=program):
                faults.append(f"there is no {program}")
        files = [word for word in words if word.startswith(TREES) and not re.search(r"[*{<]", word)]
        faults += [f"there is no {word}" for word in files if not (ROOT / word).exists()]
    assert not faults


def test_commands_are_found_and_their_faults_too():
    text = (
        "`.venv/bin/causal-story nosuchverb x`, `causal-story` alone, `python tests/nothere.py`\n\n"
        "```bash\nHELLO there\naccelerate launch --no_python causal-story demo --nosuchflag 3 \\\n"
        "    --help  # it's said\npip install x && .venv/bin/python nbs/site/build.py\n```\n"
    )
    found = commands(text)
    assert ["causal-story", "nosuchverb", "x"] in found and ["python", "tests/nothere.py"] in found
    assert ["causal-story", "demo", "--nosuchflag", "3", "--help"] in found
    assert ["python", "nbs/site/build.py"] in found and len(found) == 4
    assert faults_of(["nosuchverb", "x"]) == ["there is no verb nosuchverb"]
    assert faults_of(["demo", "--nosuchflag"]) == ["demo has no --nosuchflag"]
    assert faults_of(["VERB", "--help"]) == faults_of(["--help"]) == []


# ---------------------------------------------------------------- names in CONTRIBUTING.md


def module_names(name: str) -> set[str]:
    "The names at the top of a module, by reading it."
    tree = ast.parse((ROOT / "causal_story" / f"{name}.py").read_text(encoding="utf-8"))
    names = set()
    for node in tree.body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
        names |= {node.name} if hasattr(node, "name") else set()
    return names


def test_tables_that_contributors_are_sent_to_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tables = set(re.findall(r"`(\w+)\.([A-Z][A-Z_]+)`", text))
    assert len(tables) >= 5
    missing = [
        f"{module}.{table}"
        for module, table in sorted(tables)
        if not (ROOT / "causal_story" / f"{module}.py").exists()
        or table not in module_names(module)
    ]
    assert not missing


# ---------------------------------------------------------------- lessons


@pytest.mark.parametrize(
    "cell, wanted",
    [
        ("Three [plain words](a.md) here", (4, 0, 0)),
        ("![A picture](a.png)", (2, 0, 1)),
        ("#| exports\n\nx = 1\n# why\n", (0, 2, 1)),
        ("#| hide\nx = 1", (0, 0, 0)),
        ("#| echo: false\nx = 1", (0, 0, 0)),
    ],
)
def test_reading_time_counts_what_is_read(cell, wanted):
    kind = "code" if "x = 1" in cell else "markdown"
    outputs = [{"data": {"image/png": ""}}, {"text": "printed"}]
    assert count({"cell_type": kind, "source": cell, "outputs": outputs}) == wanted


@each_lesson
def test_a_lesson_is_short(path):
    assert minutes(path) <= LESSON, "minutes of reading; python tests/reading_time.py shows all"


def test_the_course_can_be_finished():
    assert sum(map(minutes, lessons())) <= COURSE, "minutes; see python tests/reading_time.py"


def headings(path: Path) -> list[str]:
    return pages.HEADING.findall(pages.FENCE.sub("", pages.markdown_of(path)))


@each_lesson
def test_a_lesson_opens_with_title_sentence_and_picture(path):
    cells = pages.read_cells(path)
    first = next(cell["source"] for cell in cells if cell["cell_type"] == "markdown")
    assert re.match(r"# \S.*\n\s*\n?> \S", first), "# Title, then > one sentence"
    for cell in cells:
        pictures = re.search(r"!\[|<img\b|```mermaid|\|\s*:?-{3}", cell["source"])
        drawn = any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
        if (cell["cell_type"] == "markdown" and pictures) or drawn:
            return
        told = pages.directives(cell["source"])
        silent = {"hide", "default_exp", "echo", "export"} & set(told)
        imports = re.match(r"(#\|.*\n)*(import|from) ", cell["source"])
        assert cell["cell_type"] == "markdown" or silent or imports, "a picture before any code"


@each_lesson
def test_a_lesson_ends_as_promised(path):
    found = [heading.lower() for heading in headings(path)]
    wanted = ("what we learned", "where this differs", "five questions", "exercises")
    missing = [words for words in wanted if not any(words in heading for heading in found)]
    assert not missing, "headings"


EFFORT = re.compile(r"(?i)about (?:(?:\d+|[a-z-]+) minutes|half an hour|an hour)")


@each_lesson
def test_exercises_have_an_effort_and_an_answer(path):
    text = pages.markdown_of(path)
    at = re.search(r"(?im)^#+ .*exercises.*$", text)
    assert at, "no exercises"
    exercises = text[at.end() :]
    assert len(EFFORT.findall(exercises)) >= 3, "each with its effort: (about 10 minutes)"
    assert exercises.count("<summary>") >= 3, "each with a folded answer"
    assert exercises.count("<details") == exercises.count("</details>") >= 3


def unread(text: str) -> list[str]:
    "Markdown that stays as it is typed: in the lines that begin with <details>, up to a blank one."
    blocks = re.findall(r"(?m)^[ \t]*<details.*(?:\n[ \t]*\S.*)*", pages.FENCE.sub("", text))
    return [block.strip()[:80] for block in blocks if re.search(r"`|\*\*|\$|\]\(", block)]


@each_text
def test_folded_answers_are_read_as_markdown(path):
    assert not unread(pages.markdown_of(path)), "put a blank line after </summary>"


def test_folded_answers_without_a_blank_line_are_found():
    assert not unread("<details><summary>A</summary>\n\n`x` and **y**\n\n</details>")
    assert not unread("1. Why?\n\n   <details><summary>A</summary>Plain words.</details>")
    assert unread("1. Why?\n\n   <details><summary>A</summary>As `x` says.</details>")
