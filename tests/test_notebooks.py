"""Every notebook, run from top to bottom by nbdev_test.

Each gets a process of its own, because nbdev_test reuses its workers and what one notebook does to
the environment would leak into the next.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TIME_LIMIT = 600  # seconds until a notebook counts as hung; it should take less than 60
NBDEV_TEST = [
    sys.executable,
    "-c",
    "import sys; from nbdev.test import nbdev_test; nbdev_test(sys.argv[1], do_print=True)",
]
NOTEBOOKS = sorted(
    path
    for path in (ROOT / "nbs").rglob("*.ipynb")
    if not any(part[0] in "._" for part in path.relative_to(ROOT).parts)
)


def run_notebook(
    path: Path,  # notebook to run
) -> tuple[bool, str, float]:  # passed, what nbdev_test printed, seconds
    "Run one notebook in a fresh process, without network; its threads are those of this process."
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    environment.pop("MPLBACKEND", None)
    start = time.perf_counter()
    with subprocess.Popen(
        [*NBDEV_TEST, str(path)],
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            said, _ = process.communicate(timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired:
            stop(process)
            said = process.communicate()[0] + f"\nstopped after {TIME_LIMIT} s"
        except BaseException:  # an interrupted test run leaves no notebook behind
            stop(process)
            raise
    started = [line for line in said.splitlines() if line.startswith("Starting ")]
    passed = process.returncode == 0 and "Success." in said and started == [f"Starting {path}"]
    return passed, said, time.perf_counter() - start


def stop(process: subprocess.Popen):
    "End a notebook's process and those that it started (data workers)."
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_notebook(path, record_property):
    passed, said, seconds = run_notebook(path)
    record_property(path.name, seconds)
    assert passed, f"nbdev_test on {path.name}:\n{said}"


def test_there_are_notebooks():
    assert NOTEBOOKS, "no notebook found under nbs/"
