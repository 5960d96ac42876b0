"""The repository as a whole: notebooks, modules and README in step; nothing that belongs to one machine; packaging."""

import ast
import configparser
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from nbformat import validate
from readme import make_readme

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
MODULES = sorted(
    path for path in (ROOT / "causal_story").glob("*.py") if not path.name.startswith("_")
)
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
each_module = pytest.mark.parametrize("path", MODULES, ids=[path.stem for path in MODULES])

IMPORT_NAMES = {
    "PIL": "pillow",
    "yaml": "pyyaml",
}  # where the name to import is not the name to install
AT_TOP_ONLY_IN = {  # imports that some readers cannot or need not have: at the top of these modules only
    "matplotlib": {"experiments", "explorer"},
    "ipywidgets": {"explorer"},
    "accelerate": {"training", "miniature"},
}
LARGEST_NOTEBOOK = 900_000  # bytes of a notebook before a reader has to wait for it


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


# ---------------------------------------------------------------- notebooks, modules and README in step


@pytest.fixture(scope="module")
def remade(tmp_path_factory) -> Path:
    "A copy of the project in which notebooks were cleaned and all modules exported anew from them."
    copy = tmp_path_factory.mktemp("remade")
    (copy / "nbs").mkdir()
    (copy / "causal_story").mkdir()
    for path in NOTEBOOKS:
        shutil.copy(path, copy / "nbs")
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
    assert path.read_bytes() == (remade / "nbs" / path.name).read_bytes(), (
        f"run nbdev_clean --fname nbs/{path.name}"
    )


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
    missing = (
        {path.name for path in NOTEBOOKS}
        - {"index.ipynb"}
        - {Path(link).name for link in readme_links()}
    )
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
        assert any("image/png" in output.get("data", {}) for output in outputs(path)), (
            "not one picture"
        )


@each_notebook
def test_notebook_explains_itself(path):
    prose = sum(cell["cell_type"] == "markdown" for cell in read_cells(path))
    lengths = [
        sum(
            bool(line.strip())
            for line in "".join(cell["source"]).splitlines()
            if not line.startswith("#|")
        )
        for cell in code_cells(path)
    ]
    code, median = len(lengths), statistics.median(lengths or [0])
    assert 2 * prose >= code, f"{prose} prose cells for {code} code cells: at least one to two"
    assert median <= 8, f"the median code cell has {median} lines; about 6 are enough"


def test_notebook_numbers_are_unique():
    numbers = [path.name.split("_")[0] for path in NOTEBOOKS if path.name[0].isdigit()]
    assert len(numbers) == len(set(numbers))


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


def notebook_number(module: str) -> str:
    "The number of the notebook that a module comes from."
    text = (ROOT / "causal_story" / f"{module}.py").read_text(encoding="utf-8")
    return re.search(r"File to edit: \.\./nbs/(\w+?)_", text).group(1)


@each_module
def test_modules_import_only_earlier_ones(path):
    used = {
        name.split(".")[1]
        for name in imported(ast.parse(path.read_text(encoding="utf-8")))
        if name.startswith("causal_story.")
    }
    later = {
        name for name in used - {path.stem} if notebook_number(name) > notebook_number(path.stem)
    }
    assert not later, f"{path.stem} comes before these in the course"


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
    assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^\n]*", source))


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
    "The files that git knows; without git (an unpacked archive), all files that are not hidden or generated."
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
        ".gitignore",
        "LICENSE",
        "MANIFEST.in",
        "constraints.txt",
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
        for item in (settings["requirements"] + " " + settings["dev_requirements"]).split()
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


def test_built_package_holds_modules_and_weights(tmp_path):
    for name in ("setup.py", "settings.ini", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "causal_story").mkdir()
    for path in (ROOT / "causal_story").glob("*.py"):
        shutil.copy(path, tmp_path / "causal_story")
    weights = tmp_path / "causal_story" / "weights" / "unet"
    weights.mkdir(parents=True)
    for path in (weights / "model.safetensors", weights.parent / "model_index.json"):
        path.write_text("stands for a file that we ship")
    code = (
        "import sys, runpy\n"
        "sys.argv = ['setup.py', '--quiet', 'build_py', '--build-lib', 'built']\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
        "assert 'pkg_resources' not in sys.modules\n"
    )
    done = python_call(code, tmp_path)
    assert done.returncode == 0, done.stderr
    built = {
        path.relative_to(tmp_path / "built").as_posix()
        for path in (tmp_path / "built").rglob("*")
        if path.is_file()
    }
    assert {f"causal_story/{path.name}" for path in (ROOT / "causal_story").glob("*.py")} <= built
    assert {
        "causal_story/weights/model_index.json",
        "causal_story/weights/unet/model.safetensors",
    } <= built
