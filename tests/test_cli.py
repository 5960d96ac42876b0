"The command line: settings from everywhere, runs that are stopped, folders that are not ours."

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import types
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from PIL import Image
from published import assert_near, assert_trained_alike
from safetensors.torch import load_file
from transformers.utils import logging

import causal_story.cli as cli
from causal_story import logs
from causal_story.arldm import arldm_state
from causal_story.cli import VERBS, main, parse, settings_of
from causal_story.data import StoriesInMemory, StoryDataset
from causal_story.drawing import DrawnStories, claim_folder, draw_batches, draw_folder, draw_stories
from causal_story.full_scale import write_tiny_folders
from causal_story.logs import MetricsLog, read_metrics, start_run
from causal_story.miniature import STAGES, stage_configs
from causal_story.pipeline import CausalStoryPipeline, story_generator
from causal_story.raw import (
    convert_flintstones,
    convert_folder,
    readable_kinds,
    write_flintstones_raw,
    write_folder,
    write_pororo_raw,
)
from causal_story.recipes import Recipe
from causal_story.session import StorySession
from causal_story.storage import shipped_weights
from causal_story.storyworld import make_stories
from causal_story.training import TrainingConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_folder(dict(train=make_stories(2), test=make_stories(2, "test")), folder / "raw", size=64)
    return convert_folder(folder / "raw", folder / "stories.h5", progress=False)


@pytest.fixture(autouse=True)
def no_bars():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def run(*words) -> int:
    "The command, given anything that has a text."
    return main([str(word) for word in words])


def complaint(capsys) -> str:
    "All of standard error, which must be one line, apart from progress bars."
    lines = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()
    own = [line for line in lines if line.startswith("causal-story ")]
    assert len(own) == 1 and lines[-1] == own[0], lines
    return own[0]


# ---------------------------------------------------------------- words, flags, files


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example_and_every_default(verb, capsys):
    assert run(verb, "--help") == 0
    text = capsys.readouterr().out
    plain = " ".join(text.split())
    assert text.startswith(f"usage: causal-story {verb} ") and "show this help" in text
    assert f"example:\n  causal-story {verb} " in text and "--config" in text
    assert max(map(len, text.splitlines())) <= 100
    for name, setting in settings_of(verb).items():
        assert f"--{name.replace('_', '-')} " in plain and setting.about in plain, name
        if setting.default not in (MISSING, None, ()):
            assert f"default {cli._text_of(setting.default)})" in plain, name


@pytest.mark.parametrize("verb", VERBS)
def test_the_examples_in_the_help_are_understood(verb):
    words = VERBS[verb].example.split()
    assert words[:2] == ["causal-story", verb]
    parse(verb, words[2:])


def test_defaults_and_texts_are_those_of_the_dataclasses():
    "No second copy: `train` says of a setting what its dataclass says."
    settings = settings_of("train")
    for one in fields(TrainingConfig):
        assert settings[one.name].default == one.default
    for name in ("width", "method", "timestep_shift", "frames_a_story"):
        assert settings[name].default is None  # the named recipe's
    assert {f.name for f in fields(Recipe)} - set(settings) == {"scheduler_options"}
    assert parse("train", ["b", "d", "o"])["config"] == TrainingConfig()


TRAIN = ("train", "miniature", "{1}", "{0}/out")
WRONG = [
    (["pretrain", "{0}/base", "--steps", "unet=3"], "unet=3"),
    (["pretrain", "{0}/base", "--steps", "decoder=0"], "decoder=0"),
    (["pretrain", "{0}/base", "--start", "{0}/nowhere"], "nowhere"),
    (["pretrain", "{0}/base", "--start", "miniature", "--steps", "captions=3"], "captions"),
    (["sample", "miniature", "{1}", "--guidance-interval", "0.5"], "expected 2 numbers"),
    (["sample", "miniature", "{1}", "--guidance-interval", "0.5", "0.2"], "0 <= start < stop <= 1"),
    (["train", "{0}/nowhere", "{1}", "{0}/out"], "nowhere"),
    (["train", "miniature", "{0}/nowhere.h5", "{0}/out"], "nowhere.h5"),
    (["train", "miniature", "{1}"], "OUT is missing"),
    ([*TRAIN, "--steps", "many"], "--steps many: expected a whole number"),
    ([*TRAIN, "--steps", "2.5"], "--steps 2.5: expected a whole number"),
    ([*TRAIN, "--steps", "true"], "--steps true: expected a whole number"),
    ([*TRAIN, "--steps", "0"], "steps must be at least 1"),
    ([*TRAIN, "--steps"], "--steps needs a whole number"),
    ([*TRAIN, "--steps", "null"], "leave it out to get the default, 750"),
    ([*TRAIN, "--half=3"], "--half 3: expected true or false"),
    ([*TRAIN, "--betas", "0.9"], "expected 2 numbers"),
    ([*TRAIN, "--bach-size", "3"], "did you mean --batch-size?"),
    ([*TRAIN, "--bach_size=3"], "did you mean --batch-size?"),
    ([*TRAIN, "one-more"], "'one-more' is one word too many"),
    ([*TRAIN, "steps=3"], "so --steps=3"),
    (["train", "miniature", "{1}", "out=x"], "so --out=x"),
    ([*TRAIN, "--policy", "lokal"], "lokal"),
    ([*TRAIN, "--recipe", "arldm"], "ar-ldm"),
    ([*TRAIN, "--method", "magic"], "method must be one of"),
    ([*TRAIN, "--dataset", "smurfs"], "pororo, flintstones"),
    ([*TRAIN, "--config", "{0}/nowhere.yaml"], "nowhere.yaml"),
    (["trian", "miniature", "{1}", "{0}/out"], "'train'"),
    (["train", "nobody/nothing", "{1}", "{0}/out"], "as a folder on this computer"),
    (["sample", "{0}/nowhere", "{1}"], "nowhere"),
    (["sample", "miniature", "{1}", "--checkpoint", "{0}/theirs.ckpt"], "--checkpoint"),
    (["sample", "miniature", "{1}", "--words", "zib"], "does not know the word 'zib'"),
    (["sample", "nobody/nothing", "{1}"], "give model as a folder on this computer"),
    (["sample", "miniature", "{0}/nowhere.h5"], "nowhere.h5"),
    (["sample", "miniature", "{1}", "--task", "guessing"], "expected one of visualization"),
    (["sample", "miniature", "{1}", "--scheduler", "fastest"], "choose one of ddim"),
    (["sample", "miniature", "{1}", "--page", "spiral"], "expected one of grid, strip, column"),
    (["sample", "miniature", "{1}", "--page", "grid", "--folder", "{0}/d"], "ask for one"),
    (["sample", "miniature", "{1}", "--out", "{0}/story.jpg"], "saved as .png or .pdf"),
    (["sample", "miniature", "{1}", "--frame-size", "100"], "frame_size=100: a multiple of"),
    (["sample", "miniature", "{1}", "--story", "2"], "no story 2; split 'test' has 0 to 1"),
    (["evaluate", "{0}/nowhere", "{1}"], "nowhere"),
    (["evaluate", "{0}", "{1}"], "holds no drawn story"),
    (["evaluate", "miniature", "{1}", "--stories", "0"], "--stories must be at least 1"),
    (["evaluate", "miniature", "{1}", "--stories", "-1"], "--stories must be at least 1"),
    (["cache", "{0}/nowhere", "{1}"], "nowhere"),
    (["prepare", "folder", "{0}/nowhere", "{0}/out.h5"], "nowhere"),
    (["prepare", "folders", "{0}", "{0}/out.h5"], "expected one of flintstones, pororo, folder"),
    (["prepare", "folder", "{0}", "{0}/out.h5", "--size", "0"], "--size must be at least 1"),
    (["prepare", "folder", "{0}", "{1}"], "is there already"),
    (["experiment", "{0}/out", "--arms", "best"], "'best' is none of"),
    (["experiment", "{0}/out", "--views", "dreamt"], "'dreamt' is none of"),
]


@pytest.mark.parametrize("words, named", WRONG)
def test_wrong_requests_are_one_line_that_names_what_is_wrong(words, named, data, tmp_path, capsys):
    before = data.read_bytes()
    assert run(*(word.format(tmp_path, data) for word in words)) == 1
    line = complaint(capsys)
    assert line.startswith(f"causal-story {words[0]}:") and named in line
    assert not list(tmp_path.iterdir()) and data.read_bytes() == before


@pytest.mark.parametrize(
    "text, named",
    [
        ("steps: [1\nseed: 2", "line 2: not YAML"),
        ("- steps", "key: value"),
        ("stepps: 3", "did you mean steps?"),
        ("seed: true", "seed=true: expected a whole number"),
        ("steps: null", "leave it out to get the default, 750"),
        ("out: null", "expected text"),
        ("train: {model: x}", "run.yaml, train: there is no setting 'model'"),
        ("train: 3", "there is no setting 'train'"),
    ],
)
def test_a_bad_file_of_settings_is_named(text, named, data, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    out = [] if "out:" in text else [tmp_path / "out"]
    assert run("train", "miniature", data, *out, "--config", path) == 1
    line = complaint(capsys)
    assert named in line and "run.yaml" in line and not (tmp_path / "out").exists()


def read(*words) -> dict:
    "All settings of `train`, flat."
    found = parse("train", [str(word) for word in words])
    groups = [found.pop(name) for name in ("config", "changes", "model")]
    for group in groups:
        found |= {key: value for key, value in asdict(group).items() if value is not None}
    return found


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "base: b\ndata: d.h5\nout: o\nsteps: 7\nlearning-rate: 5e-4\nseed: 3\n"
        "words: [milo, kiki]\nhalf: true\nwindow: null\n"
    )
    found = read("--config", path, "--steps=8", "--seed", 4, "--words", "otto")
    expected = dict(base="b", data="d.h5", out="o", steps=8, seed=4, learning_rate=5e-4)
    expected |= dict(words=("otto",), half=True, batch_size=8, betas=(0.9, 0.99))
    assert found.items() >= expected.items() and "window" not in found
    assert read("x", "--steps=2", "y", "--config", path)["data"] == "y"


def test_one_file_serves_several_verbs(data, tmp_path):
    path = tmp_path / "all.yaml"
    shared = dict(base="miniature", data=str(data), steps=7, seed=3)
    own = dict(train=dict(out="tuned", seed=5), sample=dict(pipeline="tuned", out="x.png"))
    path.write_text(yaml.safe_dump(shared | own))
    found = read("--config", path)  # what stands under the verb wins
    expected = dict(steps=7, seed=5, out="tuned", base="miniature")
    assert found.items() >= expected.items()
    found = parse("sample", ["--config", str(path), "--seed=9"])  # steps, base are not for it
    assert (found["drawing"].seed, found["out"], found["pipeline"]) == (9, "x.png", "tuned")


def test_the_file_of_the_lesson_is_understood(root, tmp_path):
    "The YAML that a reader is told to write, read by the two verbs that are told to read it."
    notebook = json.loads((root / "nbs" / "library" / "full_scale.ipynb").read_text())
    texts = ["".join(cell["source"]) for cell in notebook["cells"]]
    [text] = [text for text in texts if "# pororo.yaml" in text]
    path = tmp_path / "pororo.yaml"
    path.write_text(text.split("```yaml\n")[1].split("```")[0])
    found = read("--config", path)
    expected = dict(data="pororo.h5", dataset="pororo", half=True, out="tuned", steps=60_000)
    expected |= dict(mixed_precision="bf16", gradient_checkpointing=True)
    assert found.items() >= expected.items()
    found = parse("cache", ["--config", str(path)])
    assert found["half"] and found["data"] == "pororo.h5" and found["model"].dataset == "pororo"


@pytest.mark.parametrize(
    "words",
    [
        "b d o --steps 2",
        "--steps 2 b d o",
        "b --steps 2 d o",
        "--half b d o --steps=2",
        "--out o b d --steps 2",
        "b --betas 0.8 0.9 d o --steps 2",
    ],
)
def test_flags_stand_where_one_likes(words):
    expected = dict(base="b", data="d", out="o", steps=2)
    assert read(*words.split()).items() >= expected.items()


def test_values_may_look_like_other_things():
    found = read("b", "./d=e.h5", "o")
    assert found["data"] == "./d=e.h5"
    assert read("b", "--blip", "a=b", "d", "o")["blip"] == "a=b"
    assert read("7", "1e5", "true")["out"] == "true"
    found = read("b", "d", "o", "--words", "milo", "O'Neil, kiki", "--half", "--seed", "2")
    assert found["words"] == ("milo", "O'Neil, kiki") and found["half"] and found["seed"] == 2
    found = parse("pretrain", "base --steps decoder=2 history=3 --seed 4 --half true".split())
    assert found == dict(out="base", steps=("decoder=2", "history=3"), seed=4, half=True)


# ---------------------------------------------------------------- a run

FEW = ("--batch-size=2", "--steps=4", "--warmup-steps=1", "--checkpoint-every=2")


def weights(folder):
    return {
        path.parent.name: load_file(path)
        for part in ("adapters", "story_context", "history_encoder")
        for path in (folder / part).glob("*.safetensors")
    }


def test_stopped_looked_at_and_continued_equals_left_alone(data, tmp_path, monkeypatch):
    assert run("train", "miniature", data, tmp_path / "alone", *FEW) == 0
    write = MetricsLog.__call__

    def stop(log, step, loss, model):
        write(log, step, loss, model)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(MetricsLog, "__call__", stop)
    looking = ("--sample-every=1", "--sample-steps=1")
    assert run("train", "miniature", data, tmp_path / "stopped", *FEW, *looking) == 130
    monkeypatch.setattr(MetricsLog, "__call__", write)
    folder = tmp_path / "stopped" / "run"
    assert [row["step"] for row in read_metrics(folder / "metrics.csv")] == [1, 2, 3]
    assert run("train", "--config", folder / "settings.yaml") == 0
    rows = read_metrics(folder / "metrics.csv")
    others = read_metrics(tmp_path / "alone" / "run" / "metrics.csv")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["loss"] for row in rows] == [row["loss"] for row in others]
    pictures = [f"step-{k:08d}.png" for k in (1, 2, 3, 4)]
    assert sorted(path.name for path in (folder / "samples").iterdir()) == pictures
    one = weights(tmp_path / "alone")
    two = weights(tmp_path / "stopped")
    assert len(one) == 3
    for part in one:
        assert all(torch.equal(value, two[part][name]) for name, value in one[part].items())
    versions = yaml.safe_load((folder / "versions.yaml").read_text())[-1]
    packages = {"python", "torch", "diffusers", "transformers", "causal_story"}
    assert set(versions) == packages


def test_a_run_says_all_its_settings_and_is_not_continued_under_others(
    data, tmp_path, capsys, monkeypatch
):
    "settings.yaml holds defaults too, is understood again, and is checked."
    monkeypatch.setattr(cli, "tune", lambda *arguments, **options: None)
    out = tmp_path / "out"
    asked = ("--steps=3", "--policy", "local", "--window=2", "--parts", "story_context")
    assert run("train", "miniature", data, out, *asked, "--betas", "0.8", "0.9") == 0
    path = out / "run" / "settings.yaml"
    kept = yaml.safe_load(path.read_text())
    assert set(kept) == set(settings_of("train")) and kept["learning_rate"] == 1e-3
    expected = dict(steps=3, policy="local", window=2, parts=("story_context",), betas=(0.8, 0.9))
    assert read("--config", path).items() >= expected.items()
    text = path.read_bytes()
    assert run("train", "--config", path) == 0
    assert run("train", "--config", path, "--sample-every=2") == 0  # may change
    text = path.read_bytes()
    capsys.readouterr()
    assert run("train", "--config", path, "--steps=4") == 1
    line = complaint(capsys)
    assert "steps was 3, now 4" in line and path.read_bytes() == text
    assert line.endswith(f"causal-story train {out} {data} NEW_FOLDER")  # what to do instead
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    assert run("train", "miniature", data, tmp_path / "mine") == 1
    assert "name another folder" in complaint(capsys)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_other_versions_are_written_down_when_a_run_goes_on(tmp_path, monkeypatch):
    start_run(tmp_path, dict(steps=3))
    monkeypatch.setattr(logs, "package_versions", lambda: dict(torch="9"))
    for _ in range(2):
        start_run(tmp_path, dict(steps=3))
    rows = yaml.safe_load((tmp_path / "versions.yaml").read_text())
    assert [row["torch"] for row in rows] == [torch.__version__, "9"]


def test_metrics_survive_a_cut_line_and_reach_tensorboard(tmp_path, monkeypatch):
    calls = []

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append(purge_step)

        def add_scalar(self, name, value, step):
            calls.append((name, step))

        def close(self):
            calls.append("closed")

    board = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    (tmp_path / "metrics.csv").write_text(
        "step,loss,learning_rate,seconds\n1,0.5,1e-3,2.0\n2,0.4,1e-3,3.0\n3,0.3,1e-"
    )
    log = MetricsLog(tmp_path, TrainingConfig(learning_rate=1e-3))
    log(2, 0.25, None)
    log.close()
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.5), (2, 0.4), (3, 0.25)]
    assert rows[-1]["seconds"] >= 3
    assert calls == [3, ("loss", 3), ("learning_rate", 3), "closed"]


# ---------------------------------------------------------------- drawing


@pytest.mark.parametrize("task", ["visualization", "continuation"])
def test_every_door_draws_the_same_picture(task, data, tmp_path, monkeypatch):
    "The pipeline, `sample`, `sample --folder` and the explorer's session: one rule for the noise."
    pipe = CausalStoryPipeline.from_pretrained("miniature")
    pipe.set_progress_bar_config(disable=True)
    given = int(task == "continuation")
    record = StoryDataset(data, "test").story(0)
    source = {}
    if given:
        source = dict(source_image=record.frames[0], source_caption=record.captions[0])
    call = pipe(
        record.captions[given:],
        task,
        generator=story_generator(7, 0),
        num_inference_steps=3,
        **source,
    ).frames[0]

    shown = []
    monkeypatch.setattr(logs, "show_story", lambda rows, **_: shown.extend(rows) or _no_figure())
    flags = ("--task", task, "--seed", 7, "--num-inference-steps", 3)
    assert run("sample", "miniature", data, *flags, "--out", tmp_path / "a.png") == 0
    [(_, _), (_, frames)] = shown
    folder = tmp_path / "drawn"
    assert run("sample", "miniature", data, *flags, "--folder", folder) == 0
    image = record.frames[0] if given else None
    settings = dict(task=task, seed=7, num_inference_steps=3)
    session = StorySession(pipe, record.captions, image, **settings)
    assert session.draw()
    doors = dict(
        sample=frames[given:],
        folder=DrawnStories(folder).frames(0, record, task),
        session=session.pictures[given:],
    )
    for name, other in doors.items():
        for one, two in zip(call, other, strict=True):
            difference = np.abs(np.asarray(one, int) - np.asarray(two, int)).max()
            assert difference <= 1, name


def _no_figure():
    from matplotlib.figure import Figure

    return Figure()


def test_sampling_options_reach_the_pipeline(data, monkeypatch, capsys):
    calls = {}

    class Pipe:
        def __call__(self, captions, **options):
            calls.update(options)
            raise ValueError("that will do")

    monkeypatch.setattr(cli, "load_model", lambda *_: Pipe())
    words = "--num-inference-steps 3 --guidance-scale 1.5 --guidance-interval 0 0.5"
    words += " --policy local --window 2 --task continuation"
    assert run("sample", "miniature", data, *words.split()) == 1
    assert "that will do" in complaint(capsys)
    expected = dict(num_inference_steps=3, guidance_scale=1.5, history_policy="local", window=2)
    expected |= dict(task="continuation", guidance_interval=(0, 0.5))
    assert calls.items() >= expected.items()
    assert calls["source_image"][0].size == (64, 64)
    [generator] = calls["generator"]
    assert generator.initial_seed() == story_generator(0, 0).initial_seed()


class Copyist:
    "Draws the truth, and notes which generators it was given."

    def __init__(self, dataset):
        records = map(dataset.story, range(len(dataset)))
        self.frames = {tuple(record.captions): record.frames for record in records}
        self.states = {}

    def __call__(self, stories, task, generator, source_image=None, source_caption=None):
        whole = stories
        if source_caption is not None:
            whole = [[first, *rest] for first, rest in zip(source_caption, stories)]
        self.states |= {story[0]: g.initial_seed() for story, g in zip(whole, generator)}
        frames = [
            self.frames[tuple(story)][len(story) - len(rest) :]
            for story, rest in zip(whole, stories)
        ]
        return types.SimpleNamespace(frames=frames)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    "Five stories of two lengths."
    folder = tmp_path_factory.mktemp("mixed")
    stories = [make_stories(1, "test", seed=k, n_frames=3 + 2 * (k % 2))[0] for k in range(5)]
    write_folder(dict(test=stories), folder / "raw", size=64)
    path = convert_folder(folder / "raw", folder / "stories.h5", progress=False)
    return StoryDataset(path, "test")


def names_in(folder) -> list:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("task", ["visualization", "continuation"])
def test_processes_share_a_drawing_that_does_not_depend_on_them(mixed, tmp_path, task):
    one = Copyist(mixed)
    two = Copyist(mixed)
    quiet = dict(progress=False)
    drawn = draw_folder(one, mixed, tmp_path / "one", task, batch_size=4, **quiet)
    assert drawn == [0, 1, 2, 3, 4]
    (tmp_path / "two" / ".00000001.partial").mkdir(parents=True)  # a killed process was here
    shares = [
        draw_folder(
            two, mixed, tmp_path / "two", task, batch_size=2, process=p, n_processes=2, **quiet
        )
        for p in (0, 1)
    ]
    assert shares == [[0, 2, 4], [1, 3]] and one.states == two.states
    assert draw_folder(two, mixed, tmp_path / "two", task, **quiet) == []
    assert names_in(tmp_path / "one") == names_in(tmp_path / "two")
    drawn = DrawnStories(tmp_path / "two")
    first = int(task == "continuation")
    for k in range(5):
        record = mixed.story(k)
        found = [frame.tobytes() for frame in drawn.frames(k, record, task)]
        assert found == [frame.tobytes() for frame in record.frames[first:]]
        assert (tmp_path / "two" / f"{k:08d}" / f"frame-{len(record.frames) - 1}.png").exists()


DECIDED = dict(
    prompt=["Milo sings."],
    generator=None,
    source_image=None,
    source_caption=None,
    history_frames=None,
    history_captions=None,
    kept_frames=None,
    num_images_per_prompt=2,
    return_dict=False,
    steps=3,  # no argument of the call
    num_steps=3,
)


@pytest.mark.parametrize("name", [*DECIDED, "index"])
def test_what_the_data_set_decides_cannot_be_asked_for(name, mixed, tmp_path):
    "Before, draw_stories(index=[0]) drew story 0 and ended in a KeyError."
    options = {name: DECIDED.get(name, [0])}
    pipe = Copyist(mixed)
    calls = dict(
        stories=lambda: draw_stories(pipe, mixed, progress=False, **options),
        batches=lambda: list(draw_batches(pipe, mixed, **options)),
        folder=lambda: draw_folder(pipe, mixed, tmp_path / "drawn", progress=False, **options),
        nothing=lambda: draw_folder(
            pipe, mixed, tmp_path / "drawn", progress=False, **dict(index=[]) | options
        ),
    )
    if name == "index":
        calls = dict(stories=calls["stories"])  # the others take one
    for call in calls.values():
        with pytest.raises(TypeError, match=name):
            call()
    assert not pipe.states and not (tmp_path / "drawn").exists()


def test_a_folder_holds_pictures_after_one_given_frame(mixed, tmp_path):
    pipe = Copyist(mixed)
    for options in (dict(n_given=2), dict(output_type="np")):
        with pytest.raises(TypeError, match="cannot be chosen"):
            draw_folder(pipe, mixed, tmp_path, "continuation", **options)
    assert not pipe.states


def two_processes(folder, words):
    "The command as two processes on the CPU, connected by gloo."
    environment = os.environ | dict(
        OMP_NUM_THREADS="1",
        ACCELERATE_USE_CPU="true",
        PYTHONPATH=str(Path(cli.__file__).parent.parent),
    )
    (folder / "command.py").write_text(
        "import sys\nfrom causal_story.cli import main\nsys.exit(main())\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc_per_node", "2", "command.py"]
    done = subprocess.run(
        [*torchrun, *map(str, words)],
        env=environment,
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_two_real_processes_share_a_folder(data, tmp_path):
    words = ["sample", "miniature", data, "--folder", "drawn"]
    words += ["--num-inference-steps=1", "--batch-size=1"]
    done = two_processes(tmp_path, words)
    assert done.stdout.count("wrote 2 stories to drawn") == 1 and done.stderr.count("1/1") >= 2
    names = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert names == ["00000000", "00000001", "drawn.json"]


def test_accelerate_launches_the_command(data, tmp_path):
    "The line that people with GPUs are told to type, with one process."
    bin = Path(sys.executable).parent
    if not (bin / "accelerate").exists() or not (bin / "causal-story").exists():
        pytest.skip("the commands are not installed beside this Python")
    environment = os.environ | dict(
        OMP_NUM_THREADS="1", PATH=f"{bin}{os.pathsep}{os.environ['PATH']}"
    )
    line = "accelerate launch --num_processes 1 --no_python causal-story train miniature".split()
    line += [str(data), str(tmp_path / "tuned"), "--steps=1", "--batch-size=2"]
    done = subprocess.run(
        line,
        env=environment,
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "tuned" / "model_index.json").exists(), done.stdout


def test_a_drawing_with_guided_steps_is_continued(data, tmp_path):
    words = ["sample", "miniature", data, "--folder", tmp_path / "drawn"]
    words += ["--guidance-interval", "0", "0.5", "--num-inference-steps", "1"]
    assert run(*words, "--story", "0") == 0
    assert run(*words) == 0
    names = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert names == ["00000000", "00000001", "drawn.json"]


def test_a_folder_holds_one_drawing(tmp_path):
    claim_folder(tmp_path / "drawn", dict(seed=0, task="visualization"))
    claim_folder(tmp_path / "drawn", dict(seed=0, task="visualization"))
    with pytest.raises(ValueError, match="seed was 0, now 1"):
        claim_folder(tmp_path / "drawn", dict(seed=1, task="visualization"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(FileExistsError, match="holds no drawn stories"):
        claim_folder(tmp_path / "mine", dict(seed=0))


def moved(folder, part="story_context"):
    "The model in a folder, as if it had been tuned again: one of its weights is another."
    pipe = CausalStoryPipeline.from_pretrained(folder)
    with torch.no_grad():
        next(getattr(pipe, part).parameters()).add_(0.5)
    shutil.rmtree(folder)
    pipe.save_pretrained(folder, only_tuned=True)


@pytest.fixture
def tuned(tmp_path):
    folder = tmp_path / "tuned"
    CausalStoryPipeline.from_pretrained("miniature").save_pretrained(folder, only_tuned=True)
    return folder


def sample_words(tuned, data, out, *more):
    return ["sample", tuned, data, "--folder", out, "--num-inference-steps", "1", *more]


@pytest.mark.parametrize("only_one", [True, False])
def test_a_folder_is_not_continued_by_a_model_that_was_tuned_again(
    only_one, tuned, data, tmp_path, capsys
):
    "Interrupted or finished: the name of a model says nothing about what it draws today."
    out = tmp_path / "drawn"
    words = sample_words(tuned, data, out)
    assert run(*words, *(["--story", "0"] if only_one else [])) == 0
    moved(tuned)
    before = {name: (out / name).read_bytes() for name in names_in(out)}
    capsys.readouterr()
    assert run(*words) == 1
    line = complaint(capsys)
    assert "weights was" in line and "name another folder, delete this one" in line
    assert {name: (out / name).read_bytes() for name in names_in(out)} == before
    assert run("evaluate", *words[1:]) == 1 and "weights was" in complaint(capsys)


def test_a_folder_is_not_continued_with_another_setting_of_the_model(tuned, data, tmp_path, capsys):
    out = tmp_path / "drawn"
    assert run(*sample_words(tuned, data, out, "--story", "0")) == 0
    pipe = CausalStoryPipeline.from_pretrained(tuned)
    pipe.register_to_config(guidance_scale=7.0)
    shutil.rmtree(tuned)
    pipe.save_pretrained(tuned, only_tuned=True)
    capsys.readouterr()
    assert run(*sample_words(tuned, data, out)) == 1
    assert "guidance_scale was 2.0, now 7.0" in complaint(capsys)


def test_a_folder_is_not_continued_with_fewer_stories(mixed, tmp_path):
    quiet = dict(progress=False)
    draw_folder(Copyist(mixed), mixed, tmp_path, **quiet)
    fewer = StoriesInMemory([mixed.story(k) for k in range(4)])
    with pytest.raises(ValueError, match="other captions than story 4 of the data set"):
        draw_folder(Copyist(fewer), fewer, tmp_path, **quiet)
    more = StoriesInMemory([*map(mixed.story, range(5)), mixed.story(0)])
    assert draw_folder(Copyist(more), more, tmp_path, **quiet) == [5]


def test_an_untuned_base_draws_alike_in_two_calls(data, tmp_path):
    "Its new layers follow from the seed: the folder is continued."
    for story in ("0", "1"):
        words = sample_words(shipped_weights("base"), data, tmp_path / "drawn")
        assert run(*words, "--story", story) == 0


@pytest.mark.parametrize("lost", ["what_draws", "given"])
def test_a_folder_from_before_is_continued_as_it_was(lost, tuned, data, tmp_path):
    out = tmp_path / "drawn"
    words = sample_words(tuned, data, out, "--task", "continuation")
    assert run(*words, "--story", "0") == 0
    path = out / ("drawn.json" if lost == "what_draws" else "00000000/story.json")
    record = json.loads(path.read_text())
    del record[lost]
    path.write_text(json.dumps(record))
    if lost == "what_draws":
        moved(tuned)
    assert run(*words) == 0 and len(DrawnStories(out).paths) == 2


def other_data(path, change):
    "A data set of the same name in which something else is told or shown."
    with h5py.File(path, "r+") as file:
        change(file["test/00000000"])


def tell_another_story(group):
    captions = json.loads(group["captions"].asstr()[()])
    del group["captions"]
    group["captions"] = json.dumps(["Milo sings.", *captions[1:]])


def show_another_frame(group):
    picture = group["image1"][()]
    del group["image0"]
    group["image0"] = picture


@pytest.mark.parametrize(
    "task, change, named",
    [
        ("visualization", tell_another_story, "other captions"),
        ("continuation", tell_another_story, "other captions"),
        ("continuation", show_another_frame, "another given frame"),
        ("visualization", show_another_frame, None),  # nobody looks at it
    ],
)
def test_a_folder_is_not_continued_with_other_stories(task, change, named, data, tmp_path, capsys):
    mine = Path(shutil.copy(data, tmp_path / "mine.h5"))
    words = sample_words("miniature", mine, tmp_path / "drawn", "--task", task)
    assert run(*words) == 0
    other_data(mine, change)
    capsys.readouterr()
    if named is None:
        assert run(*words) == 0
        return
    assert run(*words) == 1
    line = complaint(capsys)
    assert named in line and "00000000" in line and "name another folder, or delete" in line


# ---------------------------------------------------------------- data and bases


def test_damaged_stories_are_refused_or_left_out_by_command(tmp_path, capsys):
    raw = write_folder(dict(train=make_stories(2)), tmp_path / "raw", size=32) or tmp_path / "raw"
    next((tmp_path / "raw").rglob("*.png")).write_bytes(b"no picture")
    words = ["prepare", "folder", raw, tmp_path / "stories.h5"]
    assert run(*words) == 1 and ".png" in complaint(capsys)
    capsys.readouterr()
    assert run(*words, "--keep-going") == cli.STORIES_LEFT_OUT == 3
    printed = capsys.readouterr()
    assert "stories left out: 1, " in printed.out and "left_out.json says why" in printed.out
    assert "UserWarning" not in printed.err
    assert len(StoryDataset(tmp_path / "stories.h5", "train")) == 1


def own_folder(folder: Path) -> Path:
    "Somebody's comics: wide pictures, names that no miniature knows, no split."
    folder.mkdir()
    lines = []
    for name in ("kitchen", "long"):
        rest = " They dance." * 20 if name == "long" else ""
        captions = ["Zib is in the kitchen.", "Mo finds Zib." + rest]
        frames = [f"{name}_{k}.png" for k in range(2)]
        for number, frame in enumerate(frames):
            Image.new("RGB", (40, 30), (90 * number, 80, 160)).save(folder / frame)
        lines.append(json.dumps(dict(id=name, frames=frames, captions=captions)))
    (folder / "stories.jsonl").write_text("\n".join(lines))
    return folder


def test_the_way_of_an_own_folder_is_told_step_by_step(tmp_path, capsys):
    "Every command names the next one, with a split that there is; what is lost on the way is said."
    out = tmp_path / "my.h5"
    with pytest.warns(UserWarning, match=r"40x30 pixels, is not square.*\(and in 1 more stories\)"):
        assert run("prepare", "folder", own_folder(tmp_path / "mine"), out) == 0
    printed = capsys.readouterr().out
    assert (
        f"wrote {out}, stories: 2 in 'train'; next: causal-story train miniature {out}" in printed
    )
    words = ["train", "miniature", out, tmp_path / "tuned", "--words", "zib", "mo"]
    with pytest.warns(UserWarning) as caught:
        assert run(*words, "--steps=1", "--batch-size=2") == 0
    told = [str(warning.message) for warning in caught]
    assert any("story 'long'" in text and "is cut to" in text for text in told), told
    unknown = next(text for text in told if "--words" in text)
    assert "kitchen" in unknown and "zib" not in unknown
    tuned = CausalStoryPipeline.from_pretrained(tmp_path / "tuned")
    assert tuned.max_length == CausalStoryPipeline.from_base("miniature").max_length
    assert {"zib", "mo"} <= set(tuned.tokenizer.get_vocab())
    following = capsys.readouterr().out.split("next: causal-story ")[1].split()
    assert following[-2:] == ["--split", "train"]
    picture = tmp_path / "story.png"
    assert run(*following, "--out", picture, "--num-inference-steps=1") == 0 and picture.exists()


def test_several_faults_are_several_lines(tmp_path, capsys):
    raw = own_folder(tmp_path / "mine")
    (raw / "stories.jsonl").write_text("no JSON\n{}\n[]\n")
    assert run("prepare", "folder", raw, tmp_path / "my.h5") == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-4].startswith("causal-story prepare: 3 of 3 stories cannot be read")
    for number, line in enumerate(lines[-3:], start=1):
        assert line.startswith("- ") and f"line {number}" in line


def test_layouts_sizes_and_captions_are_chosen_by_command(tmp_path, capsys):
    write_folder(dict(train=make_stories(1)), tmp_path / "raw", size=64)
    out = tmp_path / "small.h5"
    assert run("prepare", "folder", tmp_path / "raw", out, "--size", "32") == 0
    assert StoryDataset(out, "train").story(0).frames[0].size == (32, 32)
    write_pororo_raw(dict(train=make_stories(1)), tmp_path / "pororo", size=16, tiles=1)
    words = ["prepare", "pororo", tmp_path / "pororo", tmp_path / "pororo.h5"]
    assert run(*words, "--size", "8") == 1 and "without an option 'size'" in complaint(capsys)
    (tmp_path / "pororo" / "descriptions.npy").rename(tmp_path / "pororo" / "retold.npy")
    (tmp_path / "pororo" / "descriptions.npy").write_bytes(b"")
    assert run(*words, "--captions", "retold.npy") == 0
    capsys.readouterr()
    assert run("prepare", "--help") == 0
    assert set(readable_kinds()) <= set(re.findall(r"\w+", capsys.readouterr().out))


def test_comic_pages_are_drawn_by_command(data, tmp_path):
    out = tmp_path / "page.pdf"
    words = ["sample", "miniature", data, "--num-inference-steps", "1", "--out", out]
    assert run(*words, "--page", "grid", "--story", "0", "1", "--task", "continuation") == 0
    pages = sorted(tmp_path.iterdir())
    assert [path.name for path in pages] == ["page-0.pdf", "page-1.pdf"]
    assert run(*words) == 0
    assert all(path.read_bytes().startswith(b"%PDF") for path in (out, *pages))


def test_a_base_is_made_by_command(data, tmp_path, monkeypatch, capsys):
    "The verb from nothing to a base that `train` takes; one step a stage."
    one = dict.fromkeys(STAGES, 1)
    few = {stage: replace(config, batch_size=2) for stage, config in stage_configs(one).items()}
    frames = {stage: 4 for stage in STAGES if stage != "captions"}
    quick = dict(steps=one, frames=frames, stories=1, corpus=40, configs=few)
    monkeypatch.setitem(cli.PRESETS, "quick", quick)
    base = tmp_path / "base"
    assert run("pretrain", base, "--steps", "decoder=2", "--seed", "3") == 0
    record = json.loads((base / "pretraining.json").read_text())
    steps = {stage: config["steps"] for stage, config in record["configs"].items()}
    assert record["seed"] == 3 and (steps["decoder"], steps["text_to_image"]) == (2, 1)
    assert run("train", base, data, tmp_path / "tuned", "--steps=1", "--batch-size=2") == 0
    capsys.readouterr()
    assert run("pretrain", base) == 1 and "already holds weights" in complaint(capsys)


def test_a_base_goes_on_with_the_seed_after_its_own(tmp_path, monkeypatch):
    calls = []

    def note(out, start, **settings):
        calls.append((start, settings["seed"], settings["steps"]))

    monkeypatch.setattr(cli, "continue_pretraining", note)
    begin = ("pretrain", tmp_path / "base", "--start", "miniature")
    assert run(*begin, "--steps", "decoder=7") == 0
    assert run(*begin, "--seed", "4") == 0
    assert calls == [("miniature", 1, dict(decoder=7)), ("miniature", 5, cli.SECOND["steps"])]


# ---------------------------------------------------------------- judging


@pytest.fixture(scope="module")
def truth(mixed, tmp_path_factory):
    "The truth as another program may leave it: no drawn.json, names of its own."
    folder = tmp_path_factory.mktemp("truth")
    for k in range(5):
        (folder / str(k)).mkdir()
        for n, frame in enumerate(mixed.story(k).frames):
            frame.save(folder / str(k) / f"{n}.png")
    return folder


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    "A TorchScript file such as a user might hand in."
    torch.manual_seed(0)
    pool = torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 5)
    )
    path = tmp_path_factory.mktemp("judges") / "network.pt"
    torch.jit.trace(pool.eval(), torch.zeros(1, 3, 299, 299)).save(str(path))
    return path


def test_scores_are_written_with_all_that_they_depend_on(mixed, truth, network, tmp_path, capsys):
    out = tmp_path / "scores.json"
    words = ["evaluate", truth, mixed.path, "--classifier", network, "--inception", network]
    words += ["--out", out]
    assert run(*words) == 0
    assert "5 of 5 stories of split 'test'" in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert {line["n"] for line in record["scores"] if line["metric"] == "frechet"} == {19}
    for line in record["scores"]:
        if line["metric"] == "frechet" or "your classifier" in line["name"]:
            assert min(line["value"], abs(1 - line["value"])) < 1e-3, line
    facts = [line for line in record["scores"] if "facts" in line["name"]]
    assert facts and facts[0]["value"] > 0.95
    assert record["reference_tile"] == 0 and record["versions"]["torch"] == torch.__version__
    assert run(*words) == 1 and "is there already" in complaint(capsys)


def test_scores_are_written_before_they_are_printed(mixed, truth, tmp_path, monkeypatch, capsys):
    "A console that cannot print a letter must not cost an hour of judging."

    def fail(scores):
        raise UnicodeEncodeError("ascii", "é", 0, 1, "no such letter")

    monkeypatch.setattr(cli, "print_scores", fail)
    assert run("evaluate", truth, mixed.path, "--out", tmp_path / "scores.json") == 1
    assert json.loads((tmp_path / "scores.json").read_text())["scores"]


def test_a_console_that_knows_no_accents_prints_the_scores(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    monkeypatch.setattr(cli, "_overview", lambda: "Fréchet")
    assert run("--help") == 0
    sys.stdout.flush()
    assert raw.getvalue().split() == [b"Fr?chet"]


def test_two_processes_judge_like_one(mixed, truth, network, tmp_path):
    drawn = shutil.copytree(truth, tmp_path / "drawn")
    for name in ("0.png", "1.png"):  # not quite the truth: a distance of 0 would hide a lot
        shutil.copy(truth / "1" / name, drawn / "0" / name)
    words = ["evaluate", drawn, mixed.path, "--classifier", network, "--inception", network]
    assert run(*words, "--out", tmp_path / "one.json") == 0
    done = two_processes(tmp_path, [*words, "--out", "two.json"])
    assert done.stdout.count("5 of 5 stories") == 1
    one, two = (
        json.loads((tmp_path / name).read_text())["scores"] for name in ("one.json", "two.json")
    )
    assert [line["name"] for line in one] == [line["name"] for line in two]
    assert [line["n"] for line in one] == [line["n"] for line in two]
    values = [line["value"] for line in one]
    assert [line["value"] for line in two] == pytest.approx(values, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda folder: (folder / "1" / "2.png").unlink(), "story 1, visualization, has 5 frames"),
        (lambda folder: (folder / "0" / "0.png").write_bytes(b"no"), "0.png"),
        (
            lambda folder: Image.new("RGB", (64, 32)).save(folder / "0" / "0.png"),
            "frames are square",
        ),
        (
            lambda folder: (folder / "0" / "story.json").write_text('{"captions": ["Hm."]}'),
            "other captions",
        ),
        (lambda folder: (folder / "drawn.json").write_text('{"task": '), "drawn.json"),
        (
            lambda folder: (folder / "drawn.json").write_text('{"split": "val"}'),
            "there is no split 'val'",
        ),
        (lambda folder: (folder / "7").mkdir(), "there is no story 7"),
    ],
)
def test_stories_that_do_not_fit_are_named(mixed, truth, tmp_path, damage, named, capsys):
    drawn = shutil.copytree(truth, tmp_path / "drawn")
    damage(drawn)
    assert run("evaluate", drawn, mixed.path, "--out", tmp_path / "scores.json") == 1
    assert named in complaint(capsys) and not (tmp_path / "scores.json").exists()


@pytest.mark.parametrize(
    "words, named",
    [
        (["--inception", "{0}/nowhere.pt"], "nowhere.pt"),
        (["--classifier", "{0}/bad.pt"], "bad.pt"),
        (["--clip", "{0}"], "CLIPModel"),
        (["--reader", "none"], "nothing to judge with"),
    ],
)
def test_judges_that_cannot_judge_are_named(mixed, truth, tmp_path, words, named, capsys):
    (tmp_path / "bad.pt").write_bytes(b"no network")
    assert run("evaluate", truth, mixed.path, *(word.format(tmp_path) for word in words)) == 1
    assert named in complaint(capsys)


def test_a_truth_of_ones_own_is_no_truth_of_the_world(truth, mixed, network, tmp_path, capsys):
    "A user may note anything as the truth of a story: facts are then left out of the scores."
    raw = tmp_path / "raw"
    raw.mkdir()
    lines = []
    for number in range(len(mixed)):
        record = mixed.story(number)
        names = [f"{number}_{k}.png" for k in range(len(record.frames))]
        for name, frame in zip(names, record.frames, strict=True):
            frame.save(raw / name)
        line = dict(split="test", captions=record.captions, frames=names, truth=dict(note="mine"))
        lines.append(json.dumps(line))
    (raw / "stories.jsonl").write_text("\n".join(lines))
    file = convert_folder(raw, tmp_path / "mine.h5", progress=False)
    assert run("evaluate", truth, file) == 1 and "nothing to judge with" in complaint(capsys)
    out = tmp_path / "scores.json"
    assert run("evaluate", truth, file, "--classifier", network, "--out", out) == 0
    metrics = {line["metric"] for line in json.loads(out.read_text())["scores"]}
    assert metrics == {"f1", "frame", "count"}


def test_a_model_draws_and_is_judged(data, tmp_path, capsys):
    words = ["evaluate", "miniature", data, "--stories=1", "--task=continuation"]
    words += ["--num-inference-steps=1", "--folder", tmp_path / "drawn"]
    assert run(*words) == 0
    first = capsys.readouterr().out
    assert "1 of 2 stories of split 'test', continuation" in first and "facts drawn right" in first
    assert run("evaluate", tmp_path / "drawn", data) == 0  # the folder knows its task
    again = capsys.readouterr().out

    def facts(text):
        return [line for line in text.splitlines() if "facts" in line]

    assert facts(first) == facts(again)
    assert run("evaluate", tmp_path / "drawn", data, "--task=visualization") == 1
    assert "was drawn with task 'continuation'" in complaint(capsys)


# ---------------------------------------------------------------- full size


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "Tiny folders in the published layouts, and a FlintstonesSV file."
    folder = tmp_path_factory.mktemp("published")
    captions = [caption for story in make_stories(2) for caption in story.captions]
    sd, blip = write_tiny_folders(folder, captions)
    splits = dict(train=make_stories(2), val=make_stories(1, "val"), test=make_stories(1, "test"))
    write_flintstones_raw(splits, folder / "raw", size=32, tiles=2)
    return sd, blip, convert_flintstones(folder / "raw", folder / "flintstones.h5", progress=False)


TINY = ("--image-size=32", "--max-length=24")


def test_full_size_trains_from_the_cache_that_the_command_made(published, data, tmp_path):
    sd, blip, _ = published
    mine = shutil.copy(data, tmp_path / "mine.h5")
    full = ("--blip", blip, *TINY)
    assert run("cache", sd, mine, *full) == 0
    [made] = tmp_path.glob("*.features.h5")
    written = made.stat().st_mtime_ns
    out = tmp_path / "out"
    assert run("train", sd, mine, out, *full, "--steps=1", "--batch-size=2") == 0
    assert list(tmp_path.glob("*.features.h5")) == [made] and made.stat().st_mtime_ns == written
    kept = yaml.safe_load((out / "run" / "settings.yaml").read_text())
    assert kept["learning_rate"] == 1e-4 and kept["method"] is None
    assert run("train", "--config", out / "run" / "settings.yaml") == 0  # nothing is left to do


def test_words_of_another_data_set_are_refused(published, tmp_path, capsys):
    sd, blip, file = published
    for verb, out in (("cache", []), ("train", [tmp_path / "out"])):
        assert run(verb, sd, file, *out, "--blip", blip, "--dataset=pororo") == 1
        assert "holds flintstones stories, and dataset says pororo" in complaint(capsys)
    assert not (tmp_path / "out").exists()


def test_training_goes_on_from_a_checkpoint_of_ar_ldm(published, data, tmp_path, capsys):
    sd, blip, _ = published
    tiny = dict(blip=blip, image_size=32, max_length=24)
    theirs = CausalStoryPipeline.from_base(sd, "ar-ldm", **tiny)
    frozen = dict(
        unet=lambda pipe: pipe.unet,
        text=lambda pipe: pipe.text_encoder,
        vision=lambda pipe: pipe.history_encoder.vision,
    )
    with torch.no_grad():
        for part in frozen.values():
            for parameter in part(theirs).parameters():
                parameter.normal_(std=0.1)
    torch.save(dict(state_dict=arldm_state(theirs)), tmp_path / "theirs.ckpt")
    full = ["--blip", blip, *TINY, "--checkpoint", tmp_path / "theirs.ckpt"]
    mine = shutil.copy(data, tmp_path / "mine.h5")
    assert run("cache", sd, mine, *full) == 0
    assert "0 of another shape, 0 missing" in capsys.readouterr().out
    [made] = tmp_path.glob("*.features.h5")
    out = tmp_path / "out"
    assert run("train", sd, mine, out, "--steps=1", "--batch-size=2", *full) == 0
    assert "0 of another shape, 0 missing" in capsys.readouterr().out
    assert list(tmp_path.glob("*.features.h5")) == [made]  # the cache was found
    tuned = CausalStoryPipeline.from_pretrained(out)
    for part in frozen.values():
        for name, value in part(theirs).state_dict().items():
            assert torch.equal(part(tuned).state_dict()[name], value), name  # as they came
    full[-1] = tmp_path / "nowhere.ckpt"
    assert run("train", sd, mine, tmp_path / "other", *full) == 1
    assert "nowhere.ckpt" in complaint(capsys) and not (tmp_path / "other").exists()


def test_two_processes_train_by_command_like_one(data, tmp_path):
    words = ["--steps=3", "--batch-size=2", "--checkpoint-every=3"]
    words += ["--sample-every=3", "--sample-steps=1"]
    assert run("train", "miniature", data, tmp_path / "one", *words) == 0
    two_processes(tmp_path, ["train", "miniature", data, tmp_path / "two", *words])
    one, two = tmp_path / "one", tmp_path / "two"
    losses = [
        [row["loss"] for row in read_metrics(folder / "run" / "metrics.csv")]
        for folder in (one, two)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4, abs=1e-5)
    assert_trained_alike(one / "run", two / "run")
    mine, theirs = weights(one), weights(two)
    assert mine.keys() == theirs.keys() and all(mine.values())
    for part, tensors in mine.items():
        assert tensors.keys() == theirs[part].keys()
        assert_near(tensors.values(), [theirs[part][name] for name in tensors])
    assert (two / "model_index.json").exists()
    assert len(list((two / "run" / "samples").glob("*.png"))) == 1


# ---------------------------------------------------------------- what is said at the end


def test_an_experiment_ends_with_its_table(tmp_path, capsys):
    few = ["--steps=1", "--batch-size=2", "--train-stories=4", "--stories=1", "--split=val"]
    words = ["experiment", tmp_path, "--arms", "weighted", "--seeds", "3", *few]
    assert run(*words, "--views", "true", "continued") == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("weighted") and "seed 3" in last
    assert "true history" in last and "continued history" in last
    record = json.loads((tmp_path / "weighted-3.json").read_text())
    assert record["config"]["batch_size"] == 2
    assert list(record["correct"]) == ["true", "continued", "looks"]
    assert run(*words, "--views", "true", "drawn") == 0  # what it has not drawn yet is added
    record = json.loads((tmp_path / "weighted-3.json").read_text())
    assert set(record["correct"]) == {"true", "continued", "looks", "drawn", "stays"}
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "weighted-3.json").write_text(json.dumps(record | dict(correct={})))
    assert run(*words, "--views", "true") == 1
    assert "has no 'true'" in complaint(capsys)


def test_a_pipeline_that_was_not_written_to_the_end_is_named(data, tmp_path, capsys):
    CausalStoryPipeline.from_pretrained("miniature").save_pretrained(tmp_path / "tuned")
    (tmp_path / "tuned" / "model_index.json").unlink()  # killed while it was being replaced
    assert run("sample", tmp_path / "tuned", data) == 1
    assert "not written to the end" in complaint(capsys)
    assert run("train", tmp_path / "tuned", data, tmp_path / "out") == 1
    complaint(capsys)
    assert not (tmp_path / "out").exists()


def test_what_only_was_tuned_can_be_tuned_further_and_drawn(data, tmp_path):
    few = ("--steps=1", "--batch-size=2")
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("train", "miniature", data, first, *few, "--method=lora", "--only-tuned") == 0
    assert (first / "tuned.json").exists() and not (first / "unet").exists()
    assert run("train", first, data, second, *few, "--method=lora") == 0
    picture = tmp_path / "story.png"
    assert run("sample", second, data, "--num-inference-steps=1", "--out", picture) == 0
    assert picture.exists()


@pytest.fixture(scope="module")
def own_base(tmp_path_factory):
    "A base of somebody's own: the shipped one, with other weights in its U-Net."
    folder = shutil.copytree(shipped_weights("base"), tmp_path_factory.mktemp("own") / "base")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    with torch.no_grad():
        next(unet.parameters()).add_(0.01)
    unet.save_pretrained(folder / "unet")
    return folder


def test_what_only_was_tuned_on_an_own_base_is_used_by_every_verb(own_base, data, tmp_path, capsys):
    "Its record names no folder of this computer, so the base is named by hand."
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    few = ("--steps=1", "--batch-size=2", "--only-tuned")
    assert run("train", own_base, data, first, *few) == 0
    told = capsys.readouterr().out
    assert f"causal-story sample {first} {data} --base {own_base}" in told
    once = ("--num-inference-steps=1",)
    assert run("sample", first, data, *once) == 1
    assert "unet differs" in (line := complaint(capsys)) and "--base FOLDER" in line
    picture = tmp_path / "story.png"
    named = ("--base", own_base)
    assert run("sample", first, data, *once, "--out", picture, *named) == 0 and picture.exists()
    assert run("sample", first, data, *once, "--folder", tmp_path / "drawn", *named) == 0
    assert run("evaluate", first, data, *once, "--stories=1", *named) == 0
    assert run("sample", first, data, *once, "--base", "miniature") == 1
    assert "another base than miniature" in (line := complaint(capsys)) and "FOLDER" not in line

    assert run("train", first, data, second, *few) == 1
    assert f"--tuned {first}" in complaint(capsys) and not second.exists()
    mine = shutil.copy(data, tmp_path / "mine.h5")
    assert run("cache", own_base, mine, "--tuned", first) == 0
    assert run("train", own_base, mine, second, *few, "--tuned", first) == 0
    assert f"{second} {mine} --base {own_base}" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.features.h5"))) == 1
    before, after = weights(first), weights(second)
    assert before.keys() == after.keys()
    near = [
        (value - before[part][name]).abs().max()
        for part in after
        for name, value in after[part].items()
    ]
    assert 0 < max(near) < 0.1  # it went on from there
    assert run("sample", second, data, *once, "--out", picture, *named) == 0
    assert run("train", own_base, data, third, *few, "--tuned", own_base) == 1
    assert "is no pipeline that `train` saved" in complaint(capsys) and not third.exists()


def test_a_file_of_settings_names_the_base_for_training_and_drawing(own_base, data, tmp_path):
    path = tmp_path / "all.yaml"
    shared = dict(base=str(own_base), data=str(data), only_tuned=True, steps=1, batch_size=2)
    shared |= dict(out=str(tmp_path / "tuned"), num_inference_steps=1)
    own = dict(sample=dict(pipeline=str(tmp_path / "tuned"), out=str(tmp_path / "story.png")))
    path.write_text(yaml.safe_dump(shared | own))
    assert run("train", "--config", path) == 0 and run("sample", "--config", path) == 0
    whole = tmp_path / "whole"
    assert run("sample", "miniature", data, "--config", path) == 0  # a whole one needs no base
    CausalStoryPipeline.from_pretrained("miniature").save_pretrained(whole)
    path.write_text(yaml.safe_dump(shared | dict(base=str(whole)) | own))
    tuned = tmp_path / "further"
    assert run("train", "--config", path, "--out", tuned) == 0  # base: what training went on from
    assert run("sample", tuned, "--config", path) == 0


def test_full_size_that_only_was_tuned_is_given_base_and_blip(published, data, tmp_path, capsys):
    sd, blip, _ = published
    mine, out = shutil.copy(data, tmp_path / "mine.h5"), tmp_path / "tuned"
    full = ("--blip", blip)
    words = ["train", sd, mine, out, *full, *TINY, "--steps=1", "--batch-size=2", "--only-tuned"]
    assert run(*words) == 0
    following = capsys.readouterr().out.split("next: causal-story ")[1].split()
    assert following[-4:] == ["--base", str(sd), "--blip", str(blip)]
    picture = tmp_path / "story.png"
    assert run(*following, "--num-inference-steps=1", "--out", picture) == 0 and picture.exists()
    assert run("sample", out, mine) == 1 and "--base FOLDER" in complaint(capsys)


def test_help_and_version_need_no_verb():
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert run("--help") == 0 and run("--version") == 0 and run() == 0
    assert all(verb in text.getvalue() for verb in VERBS)


def test_the_module_is_the_command():
    words = [sys.executable, "-m", "causal_story.cli"]
    done = subprocess.run([*words, "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and re.fullmatch(r"\d+\.\d+\.\d+\n", done.stdout)
    done = subprocess.run([*words, "smaple"], capture_output=True, text=True)
    assert done.returncode == 1 and "did you mean 'sample'" in done.stderr
