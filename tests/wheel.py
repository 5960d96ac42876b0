"""Build what a package index would get, and look at it.

python tests/wheel.py              wheel and source archive: contents, metadata, the index's page
python tests/wheel.py --install    also install it into an empty environment and run the demo there
                                   (minutes, gigabytes, and the package index: PyTorch comes along)

It needs setuptools; the page is checked with twine if twine is installed.
"""

import argparse
import email
import email.message
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from configparser import ConfigParser, SectionProxy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.py", "settings.ini", "constraints.txt", "MANIFEST.in", "LICENSE", "README.md")
SOURCES += ("CHANGELOG.md", "CITATION.cff", "causal_story")
BUILD = (
    "import runpy, sys\n"
    "sys.argv = ['setup.py', '--quiet', 'sdist', '--dist-dir', 'dist', 'bdist_wheel', '--dist-dir',"
    " 'dist']\n"
    "runpy.run_path('setup.py', run_name='__main__')\n"
)


def read_settings() -> SectionProxy:
    "settings.ini, as setup.py reads it."
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def call(
    *command,  # program and arguments
    folder: Path,  # to run it in
    **environment: str,  # beside what is set
) -> str:  # what it printed
    "Run a program. Raises RuntimeError with its words if it fails."
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=os.environ | environment,
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        words = (done.stdout + "\n" + done.stderr)[-4000:]  # progress bars are long
        raise RuntimeError(f"{command[0]} ended with status {done.returncode}:\n{words}")
    return done.stdout + done.stderr


def build(
    folder: Path,  # empty; a copy of the sources and both archives are written here
) -> tuple[Path, Path]:  # wheel, source archive
    "Build from a copy, without the network and without leaving anything in the repository."
    copy = folder / "sources"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            hidden = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(ROOT / name, copy / name, ignore=hidden)
        else:
            shutil.copy(ROOT / name, copy)
    for name in ("nbs", "tests"):  # would a file of these come along?
        (copy / name).mkdir()
        (copy / name / "test_stray.py").write_text("stray = True\n")
    call(sys.executable, "-c", BUILD, folder=copy)
    wheel, archive = next((copy / "dist").glob("*.whl")), next((copy / "dist").glob("*.tar.gz"))
    return wheel, archive


def wanted_files() -> set[str]:
    "The package's own files: modules and shipped weights."
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "causal_story").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name[0] != "."
    }


def check_contents(
    wheel: Path,
    archive: Path,
) -> list[str]:  # faults
    "Modules and weights are in, byte for byte; notebooks, tests and results are not."
    faults, wanted = [], wanted_files()
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        faults += [f"the wheel lacks {name}" for name in sorted(wanted - names)]
        faults += [f"the wheel should not hold {name}" for name in sorted(names - wanted)]
        for name in sorted(names & wanted):
            if file.read(name) != (ROOT / name).read_bytes():
                faults.append(f"the wheel's {name} differs")
    with tarfile.open(archive) as file:
        names = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    needed = {name for name in SOURCES if name != "causal_story"} | wanted
    faults += [f"the source archive lacks {name}" for name in sorted(needed - names)]
    strays = [name for name in names if name.startswith(("nbs", "tests"))]
    faults += [f"the source archive should not hold {name}" for name in sorted(strays)]
    return faults


def read_metadata(
    wheel: Path,
) -> tuple[email.message.Message, str]:  # METADATA, entry_points.txt
    "What the wheel says about itself."
    with zipfile.ZipFile(wheel) as file:
        folder = next(name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(file.read(folder))
        entries = file.read(folder.replace("METADATA", "entry_points.txt")).decode()
    return metadata, entries


def plain(
    requirement: str,  # 'torch>=2.6; extra == "dev"'
) -> str:  # 'torch>=2.6'
    "A requirement without its condition, written in one way."
    name, rules = re.fullmatch(r"([\w.-]+)([^;]*).*", requirement.strip()).groups()
    sorted_rules = ",".join(sorted(rules.replace(" ", "").split(",")))
    return re.sub(r"[-_.]+", "-", name).lower() + sorted_rules


def check_metadata(
    wheel: Path,
) -> list[str]:  # faults
    "Name, version, licence, requirements and commands are those of settings.ini."
    settings, faults = read_settings(), []
    metadata, entries = read_metadata(wheel)
    expected = {
        "Name": settings["lib_name"],
        "Version": settings["version"],
        "Summary": settings["description"],
        "Requires-Python": f">={settings['min_python']}",
        "License": "Apache-2.0",
        "Description-Content-Type": "text/markdown",
    }
    for name, value in expected.items():
        if metadata[name] != value:
            faults.append(f"{name} is {metadata[name]!r}, not {value!r}")
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    if {plain(line) for line in required} != {plain(i) for i in settings["requirements"].split()}:
        faults.append(f"requirements are {required}")
    if set(metadata.get_all("Provides-Extra", [])) != {"dev", "docs"}:
        faults.append(f"extras are {metadata.get_all('Provides-Extra')}")
    for line in settings["console_scripts"].split("\n"):
        if " = ".join(line.split("=")) not in entries:
            faults.append(f"no command {line}")
    if "# Causal-Story" not in metadata.get_payload():
        faults.append("the README is not the description")
    return faults


def check_page(
    wheel: Path,
    archive: Path,
) -> list[str]:  # faults
    "Would a package index show the description?"
    if importlib.util.find_spec("twine") is None:
        print("twine is not installed: the page was not checked")
        return []
    try:
        call(sys.executable, "-m", "twine", "check", "--strict", wheel, archive, folder=ROOT)
    except RuntimeError as error:
        return [str(error)]
    return []


def install_and_run(
    wheel: Path,
    folder: Path,  # empty
) -> list[str]:  # faults
    "Install the wheel where nothing else is, and run the demo without the repository and network."
    venv.create(folder / "environment", with_pip=True)
    programs = folder / "environment" / ("Scripts" if os.name == "nt" else "bin")
    pins = ROOT / "constraints.txt"
    call(programs / "python", "-m", "pip", "install", "-c", pins, wheel, folder=folder)
    clean = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    report = call(programs / "causal-story", "demo", "--steps", "20", folder=folder, **clean)
    print("\n".join(line for line in report.splitlines() if "|" not in line))  # no progress bars
    where = call(
        programs / "python",
        "-c",
        "import causal_story as c; print(c.__file__)",
        folder=folder,
        **clean,
    )
    faults = [] if (folder / "story.png").exists() else ["the demo drew no story.png"]
    if str(folder) not in where:
        faults.append(f"the demo ran from {where}, not from the wheel")
    return faults


def main(
    arguments: list[str],
) -> int:  # exit status
    "Build, look, and say what is wrong."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--install", action="store_true", help="try it in an empty environment")
    install = parser.parse_args(arguments).install
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        wheel, archive = build(folder)
        faults = check_contents(wheel, archive) + check_metadata(wheel) + check_page(wheel, archive)
        if install:
            (folder / "empty").mkdir()
            faults += install_and_run(wheel, folder / "empty")
        size = wheel.stat().st_size / 1e6
        print(f"{wheel.name}: {size:.1f} MB, {len(wanted_files())} files of the package")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
