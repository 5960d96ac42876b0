"""Every notebook, run from top to bottom by nbdev_test.

Each gets a process of its own, because nbdev_test reuses its workers and what one notebook does to
the environment would leak into the next.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TIME_LIMIT = 600  # seconds until a notebook counts as hung; it should take less than 60
FORKS = "forkserver" in multiprocessing.get_all_start_methods()  # Windows cannot
NOTEBOOKS = sorted(
    path
    for path in (ROOT / "nbs").rglob("*.ipynb")
    if not any(part[0] in "._" for part in path.relative_to(ROOT).parts)
)


def processes():
    """Where processes come from: copies of one that has imported the library already, since that
    takes longer than many a notebook; without forks, new ones."""
    context = multiprocessing.get_context("forkserver" if FORKS else "spawn")
    if FORKS:
        context.set_forkserver_preload(["causal_story.pipeline", "nbdev.test"])
    return context


def run_here(path: str, said: str):
    "In a process of its own: run a notebook, what it prints goes into a file."
    if hasattr(os, "setsid"):
        os.setsid()  # with all that it starts
    multiprocessing.set_start_method(None, force=True)  # what it starts, as a notebook would
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    os.environ.pop("MPLBACKEND", None)
    os.chdir(ROOT)
    log = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    sys.stdin, sys.stdout, sys.stderr = (
        open(k, mode, encoding="utf-8", errors="replace", closefd=False)
        for k, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    from nbdev.test import nbdev_test

    nbdev_test(path, do_print=True)


def run_notebook(
    path: Path,  # notebook to run
    folder: Path,  # for what it prints
) -> tuple[bool, str, float]:  # passed, what nbdev_test printed, seconds
    "Run one notebook in a fresh process, without network; its threads are those of this process."
    start = time.perf_counter()
    log = folder / "said.txt"
    process = processes().Process(target=run_here, args=(str(path), str(log)))
    process.start()
    try:
        process.join(TIME_LIMIT)
    finally:  # an interrupted test run leaves no notebook behind
        hung = process.is_alive()
        if hung:
            stop(process)
    said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    if hung:
        said += f"\nstopped after {TIME_LIMIT} s"
    started = [line for line in said.splitlines() if line.startswith("Starting ")]
    passed = process.exitcode == 0 and "Success." in said and started == [f"Starting {path}"]
    return passed, said, time.perf_counter() - start


def stop(process):
    "End a notebook's process and those that it started (data workers)."
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.join()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_notebook(path, record_property, tmp_path):
    passed, said, seconds = run_notebook(path, tmp_path)
    record_property(path.name, seconds)
    assert passed, f"nbdev_test on {path.name}:\n{said}"


def test_there_are_notebooks():
    assert NOTEBOOKS, "no notebook found under nbs/"
