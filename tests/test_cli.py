"What 14_command_line need not show: settings from everywhere, runs that are stopped, folders"

"that are not ours, judges that are handed in."

import json
import os
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from causal_story.presets import full_scale_pipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel
from transformers.utils import logging

import causal_story.cli as cli
from causal_story.arldm import arldm_state
from causal_story.cli import main
from causal_story.data import StoryDataset
from causal_story.diffusion import sample_generator
from causal_story.drawing import DrawnStories, draw_folder
from causal_story.full_scale import write_tiny_folders
from causal_story.logs import read_metrics
from causal_story.miniature import stage_configs
from causal_story.raw import (
    convert_flintstones,
    convert_folder,
    write_flintstones_raw,
    write_folder,
)
from causal_story.storyworld import make_stories
from causal_story.words import tiny_tokenizers

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")
VERBS = ("prepare", "pretrain", "cache", "train", "sample", "evaluate", "experiment", "demo")


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


def said(capsys) -> str:
    "The last line of standard error."
    return capsys.readouterr().err.strip().splitlines()[-1]


# ---------------------------------------------------------------- words, flags, files


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "show this help" in text and len(text.splitlines()) > 5
    assert f"example:\n  causal-story {verb} " in text and "KEY=VALUE" in text


@pytest.mark.parametrize("verb", VERBS)
def test_the_examples_in_the_help_are_understood(verb):
    example = cli._VERBS[verb][2].split()
    assert example[:2] == ["causal-story", verb]
    cli._read_words(cli._parsers()[1][verb], example[2:])


@pytest.mark.parametrize(
    "words, named",
    [
        (["pretrain", "{0}/base", "--steps", "unet=3"], "unet=3"),
        (["pretrain", "{0}/base", "--steps", "decoder=0"], "decoder=0"),
        (["pretrain", "{0}/base", "--start", "{0}/nowhere"], "nowhere"),
        (["pretrain", "{0}/base", "--start", "miniature", "--steps", "captions=3"], "captions"),
        (["sample", "miniature", "{1}", "--guidance-interval", "0.5"], "expected 2 arguments"),
        (
            [
                "sample",
                "miniature",
                "{1}",
                "--guidance-interval",
                "0.5",
                "0.2",
                "--folder",
                "{0}/drawn",
            ],
            "0 <= start < stop <= 1",
        ),
        (["train", "{0}/nowhere", "{1}", "{0}/out"], "nowhere"),
        (["train", "miniature", "{0}/nowhere.h5", "{0}/out"], "nowhere.h5"),
        (["train", "miniature", "{1}"], "OUT is missing"),
        (["train", "miniature", "{1}", "{0}/out", "--steps", "many"], "invalid int value: 'many'"),
        (
            ["train", "miniature", "{1}", "{0}/out", "--bach-size", "3"],
            "did you mean --batch-size?",
        ),
        (["train", "miniature", "{1}", "{0}/out", "one-more"], "unrecognized arguments: one-more"),
        (["trian", "miniature", "{1}", "{0}/out"], "'train'"),
        (
            ["train", "miniature", "{1}", "{0}/out", "steps=many"],
            "steps='many': expected a whole number",
        ),
        (
            ["train", "miniature", "{1}", "{0}/out", "steps=2.5"],
            "steps=2.5: expected a whole number",
        ),
        (["train", "miniature", "{1}", "{0}/out", "half=3"], "half=3: expected true or false"),
        (["train", "miniature", "{1}", "{0}/out", "betas=[0.9]"], "expected a list of 2"),
        (
            ["train", "miniature", "{1}", "{0}/out", "policy=lokal"],
            "choose one of none, full, local, weighted",
        ),
        (
            ["train", "miniature", "{1}", "{0}/out", "steps=null"],
            "leave it out to get the default, 750",
        ),
        (["train", "miniature", "{1}", "{0}/out", "bach_size=3"], "did you mean 'batch_size'?"),
        (["train", "miniature", "{1}", "{0}/out", "--config", "{0}/nowhere.yaml"], "nowhere.yaml"),
        (
            [
                "train",
                "nobody/nothing",
                "{1}",
                "{0}/out",
                "--preset",
                "ar-ldm",
                "blip=nobody/nothing",
            ],
            "as a folder on this computer",
        ),
        (
            ["train", "miniature", "{1}", "{0}/out", "--preset", "ar-ldm", "width=3"],
            "--width belongs to the preset ar-ldm",
        ),
        (
            ["train", "miniature", "{1}", "{0}/out", "half=true"],
            "--half is for full size: say --preset too",
        ),
        (["train", "{0}/nowhere", "{1}", "{0}/out"], "say --preset causal-story"),
        (["sample", "{0}/nowhere", "{1}"], "nowhere"),
        (
            ["sample", "miniature", "{1}", "--checkpoint", "{0}/arldm.ckpt"],
            "--checkpoint is for full size",
        ),
        (["sample", "nobody/nothing", "{1}"], "give model as a folder on this computer"),
        (["sample", "miniature", "{0}/nowhere.h5"], "nowhere.h5"),
        (
            ["sample", "miniature", "{1}", "--story", "2"],
            "there is no story 2; split 'test' has 0 to 1",
        ),
        (["evaluate", "{0}/nowhere", "{1}"], "nowhere"),
        (["evaluate", "{0}", "{1}"], "holds no drawn story"),
        (["cache", "{0}/nowhere", "{1}", "blip={0}"], "cannot be read as a Blip"),
        (["prepare", "folder", "{0}/nowhere", "{0}/out.h5"], "nowhere"),
        (["prepare", "folder", "{0}", "{1}"], "is there already"),
    ],
)
def test_wrong_requests_are_one_line_that_names_what_is_wrong(words, named, data, tmp_path, capsys):
    before = data.read_bytes()
    assert main([word.format(tmp_path, data) for word in words]) == 1
    line = said(capsys)
    assert line.startswith(f"causal-story {words[0]}:") and named in line
    assert not list(tmp_path.iterdir()) and data.read_bytes() == before


@pytest.mark.parametrize(
    "text, named",
    [
        ("steps: [1\nseed: 2", "line 2: not YAML"),
        ("- steps", "key: value"),
        ("stepps: 3", "did you mean 'steps'?"),
        ("seed: true", "seed=True: expected a whole number"),
    ],
)
def test_a_bad_file_of_settings_is_named(text, named, data, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text)
    assert (
        main(
            [
                "train",
                "miniature",
                str(data),
                str(tmp_path / "out"),
                "--config",
                str(tmp_path / "run.yaml"),
            ]
        )
        == 1
    )
    line = said(capsys)
    assert named in line and "run.yaml" in line and not (tmp_path / "out").exists()


def read(*words):
    return vars(cli._read_words(cli._parsers()[1]["train"], [str(word) for word in words]))


def test_words_and_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "base: b\ndata: d.h5\nout: o\nsteps: 7\nlearning-rate: 5e-4\nseed: 3\nwords: [milo, "
        "kiki]\nhalf: true\n"
    )
    a = read("--config", path, "steps=8", "--seed", 4, "words=[otto]")
    assert (
        a["base"],
        a["data"],
        a["out"],
        a["steps"],
        a["seed"],
        a["learning_rate"],
        a["words"],
        a["half"],
    ) == ("b", "d.h5", "o", 8, 4, 5e-4, ["otto"], True)
    assert a["batch_size"] == 8 and a["betas"] == [0.9, 0.99]
    assert read("x", "steps=2", "y", "--config", path, "z")["data"] == "y"


def test_one_file_serves_several_verbs(data, tmp_path, capsys):
    path, verbs = tmp_path / "all.yaml", cli._parsers()[1]
    path.write_text(
        yaml.safe_dump(
            dict(
                base="miniature",
                data=str(data),
                steps=7,
                seed=3,
                train=dict(out="tuned", seed=5),
                sample=dict(model="tuned", out="x.png"),
            )
        )
    )
    a = vars(cli._read_words(verbs["train"], ["--config", str(path)]))
    assert (a["steps"], a["seed"], a["out"], a["base"]) == (
        7,
        5,
        "tuned",
        "miniature",
    )  # what stands under the verb wins
    b = vars(cli._read_words(verbs["sample"], ["--config", str(path), "seed=9"]))
    assert (b["seed"], b["out"], b["model"]) == (
        9,
        "x.png",
        "tuned",
    )  # steps and base are not for it
    for text, named in (
        ("stepps: 1", "did you mean"),
        ("train: {model: x}", "all.yaml, train: there is no setting 'model'"),
        ("train: 3", "there is no setting 'train'"),
    ):
        path.write_text(text)
        assert main(
            ["train", "miniature", str(data), str(tmp_path / "out"), "--config", str(path)]
        ) == 1 and named in said(capsys)


def test_the_file_of_notebook_11_is_understood(tmp_path):
    "The YAML that a reader is told to write, read by the two verbs that are told to read it."
    cells = json.loads((Path(__file__).parent.parent / "nbs" / "11_full_scale.ipynb").read_text())[
        "cells"
    ]
    [text] = [
        "".join(cell["source"]) for cell in cells if "# pororo.yaml" in "".join(cell["source"])
    ]
    (tmp_path / "pororo.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    for verb, word in (
        ("cache", {}),
        (
            "train",
            dict(steps=60_000, out="tuned", mixed_precision="bf16", gradient_checkpointing=True),
        ),
    ):
        a = vars(
            cli._read_words(cli._parsers()[1][verb], ["--config", str(tmp_path / "pororo.yaml")])
        )
        assert (
            a.items()
            >= (
                dict(preset="causal-story", data="pororo.h5", dataset="pororo", half=True) | word
            ).items()
        )


def test_flags_stand_where_one_likes():
    for words in (
        ["b", "d", "o", "--steps", 2],
        ["--steps", 2, "b", "d", "o"],
        ["b", "--steps", 2, "d", "o"],
        ["b", "d", "o", "steps=2"],
        ["steps=2", "out=o", "b", "d"],
    ):
        a = read(*words)
        assert (a["base"], a["data"], a["out"], a["steps"]) == ("b", "d", "o", 2)
    assert read("b", "./d=e.h5", "o")["data"] == "./d=e.h5"
    assert read("b", "--blip", "a=b", "d", "o")["blip"] == "a=b"
    a = read("b", "d", "o", "--words", "milo", "kiki", "steps=3", "--half", "seed=2")
    assert (a["words"], a["steps"], a["half"], a["seed"]) == (["milo", "kiki"], 3, True, 2)
    a = cli._read_words(
        cli._parsers()[1]["pretrain"],
        ["base", "--steps", "decoder=2", "history=3", "--seed", "4", "half=true"],
    )
    assert (a.out, a.steps, a.seed, a.half) == ("base", ["decoder=2", "history=3"], 4, True)


def test_a_run_says_what_settings_it_had_in_words_that_are_understood(tmp_path):
    a = read("b", "d.h5", "o", "--window", 2, "words=[milo]", "betas=[0.8, 0.9]", "ema_decay=0")
    settings = {name: value for name, value in a.items() if name not in ("run", "config")}
    cli.start_run(tmp_path, settings)
    again = read("--config", tmp_path / "settings.yaml")
    assert {name: again[name] for name in settings} == settings


# ---------------------------------------------------------------- a run

TRAIN = ["batch_size=2", "steps=4", "warmup_steps=1", "checkpoint_every=2"]


def weights(folder):
    return {
        path.parent.name: load_file(path)
        for part in ("adapters", "story_context", "history_encoder")
        for path in (folder / part).glob("*.safetensors")
    }


def test_stopped_looked_at_and_continued_equals_left_alone(data, tmp_path, monkeypatch):
    alone, stopped = str(tmp_path / "alone"), str(tmp_path / "stopped")
    assert main(["train", "miniature", str(data), alone, *TRAIN]) == 0
    write = cli.MetricsLog.__call__

    def stop(log, step, loss, model):
        write(log, step, loss, model)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(cli.MetricsLog, "__call__", stop)
    words = ["train", "miniature", str(data), stopped, *TRAIN, "sample_every=1", "sample_steps=1"]
    assert main(words) == 130
    monkeypatch.setattr(cli.MetricsLog, "__call__", write)
    run = tmp_path / "stopped" / "run"
    assert [row["step"] for row in read_metrics(run / "metrics.csv")] == [1, 2, 3]
    assert main(["train", "--config", str(run / "settings.yaml")]) == 0
    rows, others = (
        read_metrics(tmp_path / name / "run" / "metrics.csv") for name in ("stopped", "alone")
    )
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and [row["loss"] for row in rows] == [
        row["loss"] for row in others
    ]
    assert sorted(path.name for path in (run / "samples").iterdir()) == [
        f"step-{k:08d}.png" for k in (1, 2, 3, 4)
    ]
    a, b = weights(tmp_path / "alone"), weights(tmp_path / "stopped")
    assert len(a) == 3 and all(
        torch.equal(value, b[part][name]) for part in a for name, value in a[part].items()
    )
    assert set(yaml.safe_load((run / "versions.yaml").read_text())[-1]) == {
        "python",
        "torch",
        "diffusers",
        "transformers",
        "causal_story",
    }


def test_a_run_is_not_continued_under_other_settings_and_other_folders_are_left_alone(
    data, tmp_path, capsys
):
    run = tmp_path / "out" / "run"
    cli.start_run(run, dict(steps=3, out="o"))
    kept = (run / "settings.yaml").read_bytes()
    with pytest.raises(ValueError, match="steps was 3, now 4"):
        cli.start_run(run, dict(steps=4, out="o"))
    assert (run / "settings.yaml").read_bytes() == kept
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    assert main(["train", "miniature", str(data), str(tmp_path / "mine")]) == 1
    assert "name another folder" in said(capsys)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_other_versions_are_written_down_when_a_run_goes_on(tmp_path, monkeypatch):
    cli.start_run(tmp_path, dict(steps=3))
    monkeypatch.setattr(cli, "package_versions", lambda: dict(torch="9"))
    for _ in range(2):
        cli.start_run(tmp_path, dict(steps=3))
    assert [row["torch"] for row in yaml.safe_load((tmp_path / "versions.yaml").read_text())] == [
        torch.__version__,
        "9",
    ]


def test_metrics_survive_a_cut_line_and_reach_tensorboard(tmp_path, monkeypatch):
    seen = []

    class Writer:
        def __init__(self, folder, purge_step):
            seen.append(purge_step)

        def add_scalar(self, name, value, step):
            seen.append((name, step))

        def close(self):
            seen.append("closed")

    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer)
    )
    (tmp_path / "metrics.csv").write_text(
        "step,loss,learning_rate,seconds\n1,0.5,1e-3,2.0\n2,0.4,1e-3,3.0\n3,0.3,1e-"
    )
    log = cli.MetricsLog(tmp_path, cli.TrainingConfig())
    log(2, 0.25, None)
    log.close()
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.5), (2, 0.4), (3, 0.25)] and rows[
        -1
    ]["seconds"] >= 3
    assert seen == [3, ("loss", 3), ("learning_rate", 3), "closed"]


# ---------------------------------------------------------------- drawing


def test_sampling_options_reach_the_pipeline(data, tmp_path, monkeypatch):
    seen = {}

    class Pipe:
        scheduler = None

        def __call__(self, captions, **options):
            assert (
                options["generator"].initial_seed() == sample_generator(0, "draw", 0).initial_seed()
            )
            seen.update(options)
            raise ValueError("that will do")

    monkeypatch.setattr(cli, "load_pipeline", lambda folder: Pipe())
    words = [
        "sample",
        "miniature",
        data,
        "--num-inference-steps",
        3,
        "--guidance-scale",
        1.5,
        "--guidance-interval",
        0,
        0.5,
        "--policy",
        "local",
        "--window",
        2,
        "--task",
        "continuation",
    ]
    assert main([str(word) for word in words]) == 1
    assert (
        seen["num_inference_steps"],
        seen["guidance_scale"],
        seen["history_policy"],
        seen["window"],
        seen["task"],
    ) == (3, 1.5, "local", 2, "continuation")
    assert seen["guidance_interval"] == [0, 0.5]
    assert seen["source_image"].size == (64, 64)


class Copyist:
    "Draws the truth, and notes which generators it was given."

    def __init__(self, dataset):
        self.told, self.states = (
            {tuple(s.captions): s.frames for s in map(dataset.story, range(len(dataset)))},
            {},
        )

    def __call__(self, stories, task, generator, source_image=None, source_caption=None):
        whole = (
            stories
            if source_caption is None
            else [[first, *rest] for first, rest in zip(source_caption, stories)]
        )
        self.states |= {story[0]: g.initial_seed() for story, g in zip(whole, generator)}
        return types.SimpleNamespace(
            frames=[
                self.told[tuple(story)][len(story) - len(rest) :]
                for story, rest in zip(whole, stories)
            ]
        )


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    "Five stories of two lengths."
    folder = tmp_path_factory.mktemp("mixed")
    stories = [make_stories(1, "test", seed=k, n_frames=3 + 2 * (k % 2))[0] for k in range(5)]
    write_folder(dict(test=stories), folder / "raw", size=64)
    return StoryDataset(
        convert_folder(folder / "raw", folder / "stories.h5", progress=False), "test"
    )


@pytest.mark.parametrize("task", ["visualization", "continuation"])
def test_processes_share_a_drawing_that_does_not_depend_on_them(mixed, tmp_path, task):
    one, two = Copyist(mixed), Copyist(mixed)
    assert draw_folder(one, mixed, tmp_path / "one", task, batch_size=4) == [0, 1, 2, 3, 4]
    (tmp_path / "two" / ".00000001.partial").mkdir(parents=True)  # a killed process was here
    shares = [
        draw_folder(two, mixed, tmp_path / "two", task, batch_size=2, process=p, n_processes=2)
        for p in (0, 1)
    ]
    assert shares == [[0, 2, 4], [1, 3]] and one.states == two.states
    assert draw_folder(two, mixed, tmp_path / "two", task) == []
    names = lambda folder: sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
    )
    assert names(tmp_path / "one") == names(tmp_path / "two")
    drawn, first = DrawnStories(tmp_path / "two"), int(task == "continuation")
    for k in range(5):
        record = mixed.story(k)
        assert [frame.tobytes() for frame in drawn.frames(k, record, task)] == [
            frame.tobytes() for frame in record.frames[first:]
        ]
        assert (tmp_path / "two" / f"{k:08d}" / f"frame-{len(record.frames) - 1}.png").exists()


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
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            "command.py",
            *map(str, words),
        ],
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
    done = two_processes(
        tmp_path,
        ["sample", "miniature", data, "--folder", "drawn", "num_inference_steps=1", "batch_size=1"],
    )
    assert done.stdout.count("wrote 2 stories to drawn") == 1 and done.stderr.count("1/1") >= 2
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == [
        "00000000",
        "00000001",
        "drawn.json",
    ]


def test_accelerate_launches_the_command(data, tmp_path):
    "The line that notebook 14 tells people with GPUs to type, with one process."
    bin = Path(sys.executable).parent
    if not (bin / "accelerate").exists() or not (bin / "causal-story").exists():
        pytest.skip("the commands are not installed beside this Python")
    environment = os.environ | dict(
        OMP_NUM_THREADS="1", PATH=f"{bin}{os.pathsep}{os.environ['PATH']}"
    )
    line = [
        "accelerate",
        "launch",
        "--num_processes",
        "1",
        "--no_python",
        "causal-story",
        "train",
        "miniature",
        str(data),
        str(tmp_path / "tuned"),
        "steps=1",
        "batch_size=2",
    ]
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
    words = [
        "sample",
        "miniature",
        str(data),
        "--folder",
        str(tmp_path / "drawn"),
        "--guidance-interval",
        "0",
        "0.5",
        "--num-inference-steps",
        "1",
    ]
    assert main([*words, "--story", "0"]) == 0 and main(words) == 0
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == [
        "00000000",
        "00000001",
        "drawn.json",
    ]


def test_a_base_is_made_by_command(data, tmp_path, monkeypatch, capsys):
    "The verb from nothing to a base that `train` takes; one step a stage."
    few = {
        stage: replace(config, batch_size=2)
        for stage, config in stage_configs(dict.fromkeys(cli.STAGES, 1)).items()
    }
    monkeypatch.setitem(
        cli.PRESETS,
        "quick",
        dict(
            steps=dict.fromkeys(cli.STAGES, 1),
            frames={stage: 4 for stage in cli.STAGES if stage != "captions"},
            stories=1,
            corpus=40,
            configs=few,
        ),
    )
    assert main(["pretrain", str(tmp_path / "base"), "--steps", "decoder=2", "--seed", "3"]) == 0
    record = json.loads((tmp_path / "base" / "pretraining.json").read_text())
    assert (
        record["seed"] == 3
        and record["configs"]["decoder"]["steps"] == 2
        and record["configs"]["text_to_image"]["steps"] == 1
    )
    assert (
        main(
            [
                "train",
                str(tmp_path / "base"),
                str(data),
                str(tmp_path / "tuned"),
                "steps=1",
                "batch_size=2",
            ]
        )
        == 0
    )
    assert main(["pretrain", str(tmp_path / "base")]) == 1 and "already holds weights" in said(
        capsys
    )


def test_a_base_goes_on_with_the_seed_after_its_own(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        cli,
        "continue_pretraining",
        lambda out, start, **settings: calls.append((start, settings["seed"], settings["steps"])),
    )
    assert (
        main(["pretrain", str(tmp_path / "base"), "--start", "miniature", "--steps", "decoder=7"])
        == 0
    )
    assert main(["pretrain", str(tmp_path / "base"), "--start", "miniature", "--seed", "4"]) == 0
    assert calls == [("miniature", 1, dict(decoder=7)), ("miniature", 5, cli.SECOND["steps"])]


def test_a_folder_holds_one_drawing(tmp_path):
    cli.claim_folder(tmp_path / "drawn", dict(seed=0, task="visualization"))
    cli.claim_folder(tmp_path / "drawn", dict(seed=0, task="visualization"))
    with pytest.raises(ValueError, match="seed was 0, now 1"):
        cli.claim_folder(tmp_path / "drawn", dict(seed=1, task="visualization"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(FileExistsError, match="holds no drawn stories"):
        cli.claim_folder(tmp_path / "mine", dict(seed=0))


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
def judges(mixed, tmp_path_factory):
    "Networks that a user might hand in: a classifier, features, CLIP."
    folder = tmp_path_factory.mktemp("judges")
    torch.manual_seed(0)
    pool = torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 5)
    )
    torch.jit.trace(pool.eval(), torch.zeros(1, 3, 299, 299)).save(str(folder / "network.pt"))
    tokenizer, _ = tiny_tokenizers(
        [caption for k in range(5) for caption in mixed.story(k).captions], max_length=24
    )
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    text = dict(
        shape,
        vocab_size=len(tokenizer),
        max_position_embeddings=24,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    CLIPModel(
        CLIPConfig(
            text_config=text,
            vision_config=dict(shape, image_size=32, patch_size=8),
            projection_dim=16,
        )
    ).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    return folder


def test_the_truth_is_judged_perfect_by_every_judge(mixed, truth, judges, tmp_path, capsys):
    words = [
        "evaluate",
        truth,
        mixed.path,
        "--classifier",
        judges / "network.pt",
        "--inception",
        judges / "network.pt",
        "--clip",
        judges / "clip",
        "--out",
        tmp_path / "scores.json",
    ]
    assert main([str(word) for word in words]) == 0
    assert "5 of 5 stories of split 'test'" in capsys.readouterr().out
    record = json.loads((tmp_path / "scores.json").read_text())
    scores = {line["name"]: line for line in record["scores"]}
    assert {line["n"] for line in scores.values() if line["metric"] in ("frame", "frechet")} == {19}
    perfect = [
        line["value"]
        for line in scores.values()
        if line["metric"] == "frechet" or "your classifier" in line["name"]
    ]
    assert len(perfect) == 7 and all(min(value, abs(1 - value)) < 1e-3 for value in perfect)
    assert scores["facts drawn right (frame reader)"]["value"] > 0.95 and {
        "Fréchet distance (Inception, AR-LDM's FID protocol over 64 pixels)",
        "Fréchet distance (Inception, standard FID protocol)",
    } <= set(scores)
    assert record["reference_tile"] == 0 and record["versions"]["torch"] == torch.__version__
    assert main([str(word) for word in words]) == 1 and "is there already" in said(capsys)


def test_two_processes_judge_like_one(mixed, truth, judges, tmp_path, capsys):
    drawn = shutil.copytree(truth, tmp_path / "drawn")
    for name in ("0.png", "1.png"):  # not quite the truth: a distance of 0 would hide a lot
        shutil.copy(truth / "1" / name, drawn / "0" / name)
    words = [
        "evaluate",
        drawn,
        mixed.path,
        "--classifier",
        judges / "network.pt",
        "--inception",
        judges / "network.pt",
        "--clip",
        judges / "clip",
    ]
    assert main([*map(str, words), "--out", str(tmp_path / "one.json")]) == 0
    done = two_processes(tmp_path, [*words, "--out", "two.json"])
    assert done.stdout.count("5 of 5 stories") == 1
    one, two = (
        json.loads((tmp_path / name).read_text())["scores"] for name in ("one.json", "two.json")
    )
    assert [line["name"] for line in one] == [line["name"] for line in two] and [
        line["n"] for line in one
    ] == [line["n"] for line in two]
    assert [line["value"] for line in two] == pytest.approx(
        [line["value"] for line in one], rel=1e-4, abs=1e-4
    )


@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda folder: (folder / "1" / "2.png").unlink(), "story 1, visualization, has 5 frames"),
        (
            lambda folder: (folder / "0" / "0.png").write_bytes(b"no picture"),
            "0.png: cannot be read",
        ),
        (
            lambda folder: Image.new("RGB", (64, 32)).save(folder / "0" / "0.png"),
            "frames are square",
        ),
        (
            lambda folder: (folder / "0" / "story.json").write_text(
                '{"captions": ["Somebody else."]}'
            ),
            "other captions",
        ),
        (
            lambda folder: (folder / "drawn.json").write_text('{"task": '),
            "drawn.json: not a whole JSON file",
        ),
        (
            lambda folder: (folder / "drawn.json").write_text('{"split": "val"}'),
            "there is no split 'val'",
        ),
        (lambda folder: (folder / "7").mkdir(), "there is no story 7"),
    ],
)
def test_stories_that_do_not_fit_are_named(mixed, truth, tmp_path, damage, named, capsys):
    shutil.copytree(truth, tmp_path / "drawn")
    damage(tmp_path / "drawn")
    assert (
        main(
            [
                "evaluate",
                str(tmp_path / "drawn"),
                mixed.path,
                "--out",
                str(tmp_path / "scores.json"),
            ]
        )
        == 1
    )
    assert named in said(capsys) and not (tmp_path / "scores.json").exists()


@pytest.mark.parametrize(
    "words, named",
    [
        (["--inception", "{0}/nowhere.pt"], "nowhere.pt"),
        (["--classifier", "{0}/bad.pt"], "not a TorchScript file"),
        (["--clip", "{0}"], "CLIPModel"),
        (["--reader", "none"], "nothing to judge with"),
    ],
)
def test_judges_that_cannot_judge_are_named(mixed, truth, tmp_path, words, named, capsys):
    (tmp_path / "bad.pt").write_bytes(b"no network")
    assert (
        main(["evaluate", str(truth), mixed.path, *(word.format(tmp_path) for word in words)]) == 1
    )
    assert named in said(capsys)


@pytest.mark.parametrize("n", [0, -1])
def test_no_stories_are_not_judged(data, n, capsys):
    assert main(
        ["evaluate", "miniature", str(data), f"stories={n}"]
    ) == 1 and "--stories must be at least 1" in said(capsys)


def test_a_model_draws_and_is_judged(data, tmp_path, capsys):
    words = [
        "evaluate",
        "miniature",
        str(data),
        "stories=1",
        "task=continuation",
        "num_inference_steps=1",
        f"folder={tmp_path / 'drawn'}",
    ]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "1 of 2 stories of split 'test', continuation" in out and "facts drawn right" in out
    assert main(["evaluate", str(tmp_path / "drawn"), str(data)]) == 0  # the folder knows its task
    assert [line for line in capsys.readouterr().out.splitlines() if "facts" in line] == [
        line for line in out.splitlines() if "facts" in line
    ]


# ---------------------------------------------------------------- full size


def test_presets_train_from_the_cache_that_the_command_made(data, tmp_path, capsys):
    sd, blip = write_tiny_folders(
        tmp_path / "published", [caption for story in make_stories(2) for caption in story.captions]
    )
    tiny = ["preset=ar-ldm", f"blip={blip}", "image_size=32", "max_length=24"]
    assert main(
        ["sample", str(sd), str(data)]
    ) == 1 and "--preset causal-story makes one of it" in said(capsys)
    tiny[0] = "preset=causal-story"
    assert main(["cache", str(sd), str(data), *tiny]) == 0
    caches = list(data.parent.glob("*.features.h5"))
    made = caches[0].stat().st_mtime_ns
    assert (
        main(["train", str(sd), str(data), str(tmp_path / "out"), *tiny, "steps=1", "batch_size=2"])
        == 0
    )
    assert (
        list(data.parent.glob("*.features.h5")) == caches and caches[0].stat().st_mtime_ns == made
    )
    kept = yaml.safe_load((tmp_path / "out" / "run" / "settings.yaml").read_text())
    assert (
        kept["learning_rate"] == 1e-4
        and kept["method"] is None
        and kept["preset"] == "causal-story"
    )
    assert (
        main(["train", "--config", str(tmp_path / "out" / "run" / "settings.yaml")]) == 0
    )  # nothing is left to do


# ---------------------------------------------------------------- full size


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "Tiny folders in the published layouts, and a FlintstonesSV file."
    folder = tmp_path_factory.mktemp("published")
    sd, blip = write_tiny_folders(
        folder, [caption for story in make_stories(2) for caption in story.captions]
    )
    write_flintstones_raw(
        dict(train=make_stories(2), val=make_stories(1, "val"), test=make_stories(1, "test")),
        folder / "raw",
        size=32,
        tiles=2,
    )
    return sd, blip, convert_flintstones(folder / "raw", folder / "flintstones.h5", progress=False)


def test_words_of_another_data_set_are_refused(published, tmp_path, capsys):
    sd, blip, file = published
    for verb, out in (("cache", []), ("train", [tmp_path / "out"])):
        assert (
            main(
                [
                    str(word)
                    for word in (
                        verb,
                        sd,
                        file,
                        *out,
                        "--preset",
                        "causal-story",
                        f"blip={blip}",
                        "dataset=pororo",
                    )
                ]
            )
            == 1
        )
        assert "holds flintstones stories, and --dataset says pororo" in said(capsys)
    assert not (tmp_path / "out").exists()


def test_training_goes_on_from_a_checkpoint_of_ar_ldm(published, data, tmp_path, capsys):
    sd, blip, _ = published
    theirs = full_scale_pipeline("ar-ldm", sd, blip, image_size=32, max_length=24)
    with torch.no_grad():
        for part in (theirs.unet, theirs.text_encoder, theirs.history_encoder.vision):
            for p in part.parameters():
                p.normal_(std=0.1)
    torch.save(dict(state_dict=arldm_state(theirs)), tmp_path / "theirs.ckpt")
    full, mine = (
        [
            "--preset",
            "causal-story",
            f"blip={blip}",
            "image_size=32",
            "max_length=24",
            "--checkpoint",
            tmp_path / "theirs.ckpt",
        ],
        Path(shutil.copy(data, tmp_path / "mine.h5")),
    )
    assert main([str(word) for word in ["cache", sd, mine, *full]]) == 0
    assert (
        "0 of another shape, 0 missing" in capsys.readouterr().out
        and len(made := list(tmp_path.glob("*.features.h5"))) == 1
    )
    words = ["train", sd, mine, tmp_path / "out", "steps=1", "batch_size=2"]
    assert main([str(word) for word in [*words, *full]]) == 0
    assert (
        "0 of another shape, 0 missing" in capsys.readouterr().out
        and list(tmp_path.glob("*.features.h5")) == made
    )  # the cache was found
    out = cli.load_pipeline(tmp_path / "out")
    for part in (
        lambda pipe: pipe.unet,
        lambda pipe: pipe.text_encoder,
        lambda pipe: pipe.history_encoder.vision,
    ):
        for name, value in part(theirs).state_dict().items():
            assert torch.equal(part(out).state_dict()[name], value), name  # frozen, so as they came
    assert (
        main(
            [
                str(word)
                for word in [
                    *words[:3],
                    tmp_path / "other",
                    *words[4:],
                    *full[:-1],
                    tmp_path / "nowhere.ckpt",
                ]
            ]
        )
        == 1
    )
    assert "nowhere.ckpt" in said(capsys) and not (tmp_path / "other").exists()


def test_two_processes_train_by_command_like_one(data, tmp_path):
    words = ["steps=3", "batch_size=2", "checkpoint_every=3", "sample_every=3", "sample_steps=1"]
    assert main(["train", "miniature", str(data), str(tmp_path / "one"), *words]) == 0
    two_processes(tmp_path, ["train", "miniature", data, tmp_path / "two", *words])
    for kind in ("losses", "weights"):
        if kind == "losses":
            a, b = (
                [row["loss"] for row in read_metrics(tmp_path / name / "run" / "metrics.csv")]
                for name in ("one", "two")
            )
        else:
            a, b = (
                [
                    tensor
                    for _, part in sorted(weights(tmp_path / name).items())
                    for tensor in part.values()
                ]
                for name in ("one", "two")
            )
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "two" / "model_index.json").exists() and len(
        list((tmp_path / "two" / "run" / "samples").glob("*.png"))
    ) == 1


# ---------------------------------------------------------------- what a finished command must
# still say


def test_an_experiment_ends_with_its_table(tmp_path, capsys):
    assert (
        main(
            [
                "experiment",
                str(tmp_path),
                "--arms",
                "weighted",
                "--seeds",
                "0",
                "--steps",
                "1",
                "--train-stories",
                "8",
                "--stories",
                "1",
                "--split",
                "val",
            ]
        )
        == 0
    )
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("weighted") and all(f"{view} history" in last for view in cli.VIEWS)
    few = [
        "experiment",
        str(tmp_path / "few"),
        "--arms",
        "none",
        "--seeds",
        "3",
        "--steps",
        "1",
        "--batch-size",
        "2",
        "--train-stories",
        "4",
        "--stories",
        "1",
        "--split",
        "val",
        "--views",
        "true",
    ]
    assert main(few) == 0
    record = json.loads((tmp_path / "few" / "none-3.json").read_text())
    assert record["config"]["batch_size"] == 2 and list(record["correct"]) == ["true"]
    assert main([*few[:-1], "true", "drawn"]) == 1 and "no 'drawn'" in said(
        capsys
    )  # that run never drew with its own history


def test_a_tuned_pipeline_is_not_taken_for_a_base(published, data, tmp_path, capsys):
    cli.load_pipeline("miniature").save_whole(tmp_path / "tuned")
    assert main(["sample", str(tmp_path / "tuned"), str(data), "--preset", "causal-story"]) == 1
    assert "is a tuned pipeline and --preset causal-story would make an untuned one" in said(capsys)
    (tmp_path / "tuned" / "model_index.json").unlink()  # killed while it was being replaced
    assert main(
        ["sample", str(tmp_path / "tuned"), str(data)]
    ) == 1 and "not written to the end" in said(capsys)
