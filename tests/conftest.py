"""What every test gets: no network, repeatable hypothesis runs, a table of notebook times."""

import os
import socket
from pathlib import Path

import pytest
from hypothesis import settings

# pytest -n: each worker gets its share of the cores. This must stand before torch is imported.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ["OMP_NUM_THREADS"] = str(max(1, (CORES or 1) // WORKERS))

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MPLBACKEND"] = "Agg"

from story_samples import flintstones, made, pororo, version1  # noqa: E402, F401

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")

connect = socket.socket.connect


def connect_locally(self, address):
    "Refuse every connection that leaves this computer: nothing here may need the network."
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in (
        "127.0.0.1",
        "::1",
        "localhost",
    ):
        raise OSError(f"a test tried to reach the network: {address}")
    return connect(self, address)


socket.socket.connect = connect_locally


@pytest.fixture(scope="session")
def root() -> Path:
    "The folder that holds settings.ini."
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def as_if_tuned():
    "A function that makes a pipeline whose context layer and adapters do something, untuned."
    import torch

    from causal_story.pipeline import CausalStoryPipeline

    def make(recipe="causal-story", **settings):
        pipe = CausalStoryPipeline.from_base("miniature", recipe)
        pipe.register_to_config(**settings)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        parts = [pipe.story_context.projection, pipe.story_context.relevance_head.query]
        parts += [bottleneck.up for bottleneck in pipe.adapters.bottlenecks.values()]
        with torch.no_grad():
            for part in parts:
                part.weight.normal_(std=0.05, generator=generator)
        return pipe

    return make


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Tiny folders of the published layouts, and a data set."
    from published import make_world

    return make_world(tmp_path_factory.mktemp("full_scale"))


def pytest_terminal_summary(terminalreporter):
    "Print how long each notebook took."
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
    ]
    times = {
        name: seconds
        for report in reports
        if getattr(report, "when", "") == "call"
        for name, seconds in report.user_properties
        if name.endswith(".ipynb")
    }
    if not times:
        return
    terminalreporter.section("notebook times")
    for name, seconds in sorted(times.items()):
        slow = "   over a minute" if seconds > 60 else ""
        terminalreporter.write_line(f"{seconds:6.1f} s  {name}{slow}")
