"""The repository as a whole: all in step, nothing that belongs to one machine, packaging."""

import ast
import configparser
import graphlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fold
import pytest
import wheel
import yaml
from nbformat import validate
from reading_time import is_lesson, lessons
from readme import make_readme

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "nbs" / "site"))
import pages  # noqa: E402

NOTEBOOKS = pages.reading_order()
MODULES = sorted(
    path for path in (ROOT / "causal_story").glob("*.py") if not path.name.startswith("_")
)
NAMES = [path.relative_to(ROOT / "nbs").with_suffix("").as_posix() for path in NOTEBOOKS]
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
each_lesson = pytest.mark.parametrize("path", lessons(), ids=[path.stem for path in lessons()])
each_module = pytest.mark.parametrize("path", MODULES, ids=[path.stem for path in MODULES])

IMPORT_NAMES = {
    "PIL": "pillow",
    "yaml": "pyyaml",
}  # where the name to import is not the name to install
AT_TOP_ONLY_IN = {  # imports that not every reader needs: at the top of these modules only
    "matplotlib": {"experiments", "explorer"},
    "ipywidgets": {"explorer"},
    "accelerate": {"training", "miniature"},
}
LARGEST_NOTEBOOK = 600_000  # bytes of a notebook before a reader has to wait for it
LONGEST_LINE = 100  # columns that a laptop shows without scrolling sideways


def read_settings() -> configparser.SectionProxy:
    "settings.ini, as setup.py reads it."
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def read_cells(
    path: Path,  # notebook
) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def code_cells(path: Path) -> list[dict]:
    "The code cells that hold code."
    return [
        cell
        for cell in read_cells(path)
        if cell["cell_type"] == "code" and "".join(cell["source"]).strip()
    ]


def outputs(path: Path) -> list[dict]:
    return [output for cell in code_cells(path) for output in cell["outputs"]]


def python_call(code: str, folder: Path, **environment) -> subprocess.CompletedProcess:
    "Run Python code in a fresh process in `folder`."
    clean = {name: value for name, value in os.environ.items() if name != "IN_TEST"} | environment
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=clean,
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )


# ---------------------------------------------------------------- notebooks, modules, README


@pytest.fixture(scope="module")
def remade(tmp_path_factory) -> Path:
    "A copy of the project in which notebooks were cleaned and all modules exported anew from them."
    copy = tmp_path_factory.mktemp("remade")
    (copy / "causal_story").mkdir()
    for path in NOTEBOOKS:
        place = copy / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    shutil.copy(ROOT / "settings.ini", copy)
    shutil.copy(ROOT / "causal_story" / "__init__.py", copy / "causal_story")
    done = python_call(
        "from nbdev.clean import nbdev_clean; from nbdev.doclinks import nbdev_export\n"
        "nbdev_clean(); nbdev_export()",
        copy,
    )
    assert done.returncode == 0, done.stderr
    return copy


def test_every_module_is_what_its_notebook_exports(remade):
    exported = {
        path.name: path.read_text(encoding="utf-8")
        for path in (remade / "causal_story").glob("*.py")
    }
    present = {
        path.name: path.read_text(encoding="utf-8") for path in (ROOT / "causal_story").glob("*.py")
    }
    assert sorted(present) == sorted(exported), (
        "modules without a notebook, or notebooks not exported: run nbdev_export"
    )
    edited = [name for name in sorted(present) if present[name] != exported[name]]
    assert not edited, (
        f"{edited} are not what the notebooks export: change the notebook, then run nbdev_export"
    )


@each_notebook
def test_notebook_is_clean(path, remade):
    name = path.relative_to(ROOT)
    assert path.read_bytes() == (remade / name).read_bytes(), f"run nbdev_clean --fname {name}"


def test_readme_is_made_from_its_notebook():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == make_readme(), "change nbs/index.ipynb, then run: python tests/readme.py"


# ---------------------------------------------------------------- README


def readme_links() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(
        r"""(?:\]\(|src=["']|href=["'])([^)"'#\s]+)""", re.sub(r"(?ms)^```.*?^```", "", text)
    )
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def test_readme_links_lead_somewhere():
    missing = [link for link in readme_links() if not (ROOT / link).exists()]
    assert not missing


def test_readme_lists_every_notebook():
    present = {path.relative_to(ROOT).as_posix() for path in NOTEBOOKS}
    missing = present - {"nbs/index.ipynb"} - set(readme_links())
    assert not missing, "nbs/index.ipynb has no link to these"


@pytest.mark.parametrize("start", ["python3 -m venv .venv ", "python3 -m venv .venv-test "])
def test_readme_has_each_command_once_on_one_line(start):
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    commands = [line for line in lines if line.startswith(start)]
    assert len(commands) == 1
    assert commands[0].count(" && ") == 2 and not commands[0].endswith("\\")


# ---------------------------------------------------------------- notebooks as a reader meets them


@each_notebook
def test_notebook_is_valid_and_not_too_large(path):
    validate(json.loads(path.read_text(encoding="utf-8")))
    assert path.stat().st_size <= LARGEST_NOTEBOOK
    names = [cell["id"] for cell in read_cells(path)]
    assert len(names) == len(set(names)), "two cells share an id"


@each_notebook
def test_saved_outputs_are_results(path):
    kinds = {output["output_type"] for output in outputs(path)}
    assert "error" not in kinds, "a saved output is an error"
    noise = [output["text"] for output in outputs(path) if output.get("name") == "stderr"]
    assert not noise, "warnings, logs or progress bars in the saved outputs"
    widgets = [
        output
        for output in outputs(path)
        if any("widget" in kind for kind in output.get("data", {}))
    ]
    assert not widgets, "widget state says nothing to somebody who reads without running"


@each_notebook
def test_notebook_was_run(path):
    if len(code_cells(path)) > 5:
        assert outputs(path), "no saved output at all"


@each_lesson
def test_lesson_has_pictures(path):
    assert any("image/png" in output.get("data", {}) for output in outputs(path)), "not one picture"


@each_notebook
def test_notebook_explains_itself(path):
    prose = sum(cell["cell_type"] == "markdown" for cell in read_cells(path))
    code = len(code_cells(path))
    assert 2 * prose >= code, f"{prose} prose cells for {code} code cells: at least one to two"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_headings_go_down_one_step_at_a_time(path):
    "What the site's generator warns of, and a warning stops its build."
    levels = [
        len(marks) for marks in re.findall(r"(?m)^(#+) ", pages.prose(pages.markdown_of(path)))
    ]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:]))


def test_lessons_are_numbered_in_reading_order():
    numbers = [int(path.name[:2]) for path in lessons()]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


@each_notebook
def test_notebook_stands_in_a_part(path):
    "The course has numbers, the library is a folder; anything else has no place in the menu."
    in_library = path.parent == ROOT / "nbs" / "library"
    assert is_lesson(path) or in_library or path == ROOT / "nbs" / "index.ipynb"


# ---------------------------------------------------------------- modules


def imported(tree: ast.AST) -> set[str]:
    "Full names of the modules that the code imports; our own as causal_story.name."
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("causal_story." + (node.module or "") if node.level else node.module)
    return names


def at_top(tree: ast.Module) -> ast.Module:
    "The statements that run when the module is imported."
    return ast.Module(
        [node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))], []
    )


@each_module
def test_heavy_imports_only_where_needed(path):
    names = {
        name.split(".")[0] for name in imported(at_top(ast.parse(path.read_text(encoding="utf-8"))))
    }
    for heavy, allowed in AT_TOP_ONLY_IN.items():
        assert heavy not in names or path.stem in allowed, (
            f"import {heavy} inside the function that needs it"
        )


@each_module
def test_third_party_imports_are_requirements(path):
    settings = read_settings()
    required = {
        re.split(r"[<>=!~\[]", item)[0].lower().replace("-", "_")
        for item in settings["requirements"].split()
    }
    names = {name.split(".")[0] for name in imported(ast.parse(path.read_text(encoding="utf-8")))}
    third_party = names - set(sys.stdlib_module_names) - {"causal_story"}
    missing = {
        name
        for name in third_party
        if IMPORT_NAMES.get(name, name).lower().replace("-", "_") not in required
    }
    assert not missing, "add these to requirements in settings.ini"


def home_of(path: Path) -> Path:
    "The notebook that a module comes from."
    text = path.read_text(encoding="utf-8")
    name = re.search(r"File to edit: (?:\.\./)*nbs/(\S+\.ipynb)", text).group(1)
    return ROOT / "nbs" / name


def own_imports(path: Path) -> set[str]:
    "Our own modules that a module imports, also inside its functions."
    names = imported(ast.parse(path.read_text(encoding="utf-8")))
    return {name.split(".")[1] for name in names if name.startswith("causal_story.")} - {path.stem}


def test_imports_run_one_way():
    try:
        tuple(graphlib.TopologicalSorter({p.stem: own_imports(p) for p in MODULES}).static_order())
    except graphlib.CycleError as error:
        pytest.fail("these modules import each other: " + " <- ".join(error.args[1]))


@each_module
def test_a_lesson_imports_only_earlier_lessons(path):
    order = {notebook: number for number, notebook in enumerate(lessons())}
    here = order.get(home_of(path))
    if here is None:
        return  # a room of the library: it may use any lesson, see the test above
    homes = {home_of(ROOT / "causal_story" / f"{name}.py") for name in own_imports(path)}
    later = [home.stem for home in homes if order.get(home, -1) > here]
    assert not later, f"{path.stem} comes before these in the course"


def private_names(tree: ast.Module) -> set[str]:
    "Names with one leading underscore that a module defines: functions, values, attributes."
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return {name for name in names if re.match(r"_[a-zA-Z]", name)}


@each_module
def test_private_names_stay_private(path):
    trees = {module: ast.parse(module.read_text(encoding="utf-8")) for module in MODULES}
    others = set().union(*[private_names(tree) for module, tree in trees.items() if module != path])
    foreign = others - private_names(trees[path])
    used = set()
    for node in ast.walk(trees[path]):
        if isinstance(node, ast.Attribute) and node.attr in foreign:
            used.add(node.attr)
        if isinstance(node, ast.ImportFrom) and (node.level or "causal_story" in node.module):
            used |= {alias.name for alias in node.names if alias.name.startswith("_")}
    assert not used, "these belong to another module"


@each_module
def test_no_line_is_too_long(path):
    "What nbdev writes by itself (the list of names, the notebook's sentence) cannot be broken."
    lines = path.read_text(encoding="utf-8").splitlines()
    first_cell = next(n for n, line in enumerate(lines) if line.startswith("# %% ../"))
    long = [
        number + 1
        for number, line in enumerate(lines)
        if number >= first_cell and len(line) > LONGEST_LINE and not re.search(r"\S{80}", line)
    ]
    assert not long, "lines; change the notebook"


@each_module
def test_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    definitions = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    methods = [
        method
        for node in definitions
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        for method in node.body
        if isinstance(method, ast.FunctionDef) and len(method.body) > 1
    ]
    bare = [
        node.name
        for node in definitions + methods
        if not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert not bare, (
        "public functions, classes, and methods of more than one statement, without a docstring"
    )


@each_module
def test_no_file_is_unpickled_with_code_execution(path):
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"pickle\.loads?\(|allow_pickle=True|weights_only=False", source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert "weights_only=True" in ast.unparse(node), f"line {node.lineno}"


def test_modules_import_without_network():
    names = [path.stem for path in MODULES]
    code = (
        "import socket, importlib\n"
        "def refuse(*arguments): raise OSError('an import reached for the network')\n"
        "socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse\n"
        f"for name in {names}: importlib.import_module('causal_story.' + name)\n"
    )
    done = python_call(code, ROOT, HF_HUB_OFFLINE="0")
    assert done.returncode == 0, done.stderr
    assert not done.stdout and not done.stderr, "importing should say nothing"


# ---------------------------------------------------------------- what is in the repository


def tracked() -> list[Path]:
    "The files that git knows; without git (an unpacked archive), those not hidden or generated."
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0 and done.stdout:
        return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).exists()]
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file()
        and not any(
            part.startswith(".") or part.endswith(".egg-info")
            for part in path.relative_to(ROOT).parts
        )
    ]


def readable(path: Path) -> str:
    "A tracked file's text; pictures inside notebooks left out; empty for a binary file."
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return ""
    return re.sub(r'"image/\w+": "[^"]*"', "", text) if path.suffix == ".ipynb" else text


@pytest.mark.parametrize(
    "pattern",
    [
        r"/(?:work|root|tmp|var/folders)/\w",
        r"/(?:home|Users)/\w+/",
        r"[A-Z]:\\\\?Users",
        r"py(?:pi\.org|thonhosted)|download\.py(?:torch)|--(?:extra-)?index-url|--find-(?:links)",
    ],
    ids=["machine path", "home folder", "Windows home", "package index"],
)
def test_nothing_belongs_to_one_machine(pattern):
    found = {
        str(path.relative_to(ROOT)): match.group()
        for path in tracked()
        if (match := re.search(pattern, readable(path)))
    }
    assert not found


def test_no_large_files():
    large = [path.name for path in tracked() if path.stat().st_size > 16_000_000]
    assert not large


def test_top_level_is_as_promised():
    allowed = {
        "nbs",
        "causal_story",
        "settings.ini",
        "setup.py",
        "tests",
        "README.md",
        ".ci",
        ".gitattributes",
        ".github",
        ".gitignore",
        ".pre-commit-config.yaml",
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "LICENSE",
        "MANIFEST.in",
        "constraints.txt",
        "ruff.toml",
    }
    assert {path.relative_to(ROOT).parts[0] for path in tracked()} <= allowed


# ---------------------------------------------------------------- packaging


def test_everything_required_is_pinned():
    settings = read_settings()
    pins = [
        line.strip()
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), (
        "plain name==version lines only, no local builds"
    )
    pinned = {pin.split("==")[0].lower().replace("-", "_") for pin in pins}
    required = {
        re.split(r"[<>=!~\[]", item)[0].lower().replace("-", "_")
        for kind in ("requirements", "dev_requirements", "docs_requirements")
        for item in settings[kind].split()
    }
    assert required <= pinned


def test_console_script_exists():
    for line in read_settings()["console_scripts"].split("\n"):
        module, function = line.split("=")[1].strip().split(":")
        path = ROOT / (module.replace(".", "/") + ".py")
        names = {
            node.name
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef)
        }
        assert function in names


def test_wheel_and_source_archive(tmp_path):
    "Weights and modules are in, notebooks are not, and the metadata are those of settings.ini."
    built, archive = wheel.build(tmp_path)
    assert not wheel.check_contents(built, archive)
    assert not wheel.check_metadata(built)
    assert not wheel.check_page(built, archive)


# ---------------------------------------------------------------- what introduces the repository


def test_versions_agree():
    version = read_settings()["version"]
    assert f'"{version}"' in (ROOT / "causal_story" / "__init__.py").read_text(encoding="utf-8")
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"(?m)^## (\S+)", changelog).group(1) == version


def test_citation_is_complete():
    "What version 1.2.0 of the format requires, of this work and of the paper."
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= set(citation)
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors", "year"} <= set(paper) and len(paper["authors"]) == 5


def pins() -> dict[str, str]:
    "The versions of constraints.txt."
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_hooks_use_the_pinned_tools():
    configuration = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repo in configuration["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in configuration["repos"]} == {"local"}
    assert {hook["id"] for hook in hooks} >= {"ruff-format", "ruff-check", "nbdev-clean"}
    for hook in hooks:
        for name, version in (tool.split("==") for tool in hook["additional_dependencies"]):
            assert pins()[name] == version, f"{hook['id']}: {name}"


def steps_of(workflow: str) -> tuple[str, dict]:  # all that it runs, and the whole file
    "Read a workflow."
    path = ROOT / ".github" / "workflows" / workflow
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    steps = [step for job in content["jobs"].values() for step in job["steps"]]
    return "\n".join(step.get("run", "") for step in steps), content


def test_workflow_does_what_ci_does():
    run, content = steps_of("test.yml")
    systems = content["jobs"]["test"]["strategy"]["matrix"]["os"]
    assert {name.split("-")[0] for name in systems} == {"ubuntu", "macos", "windows"}
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    steps = re.findall(r"-m ruff [a-z]+|nbdev\.\w+ import \w+|tests/readme\.py", ci)
    assert len(set(steps)) >= 5
    for step in [*steps, "-m pytest -n auto tests", "git diff --exit-code"]:
        assert step in run, f"test.yml does not run {step}"


def test_workflow_builds_the_site():
    run, _ = steps_of("site.yml")
    assert "python nbs/site/build.py" in run and "pytest tests/test_site.py" in run


@each_notebook
def test_what_is_hidden_is_folded_in_jupyter(path):
    "Run `python tests/fold.py` if this fails."
    assert path.read_text(encoding="utf-8") == fold.as_text(
        fold.folded(json.loads(path.read_text(encoding="utf-8")))
    )
