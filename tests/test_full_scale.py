"""Full scale: published layouts, foreign folders, several processes, runs that are killed."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from published import assert_trained_alike, copied, small, taught
from safetensors.torch import load_file, save_file

from causal_story.data import StoryDataset, count_tiles
from causal_story.drawing import DrawnStories, draw_folder, story_folder
from causal_story.features import StoryBatches
from causal_story.pipeline import CausalStoryPipeline
from causal_story.recipes import find_recipe
from causal_story.training import TrainingConfig, list_checkpoints, load_checkpoint
from causal_story.tuning import prepare_tuning, tune

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = "diffusion_pytorch_model.safetensors"


# ---------------------------------------------------------------- published layouts


@pytest.mark.parametrize("argument", ["base", "blip"])
def test_a_hub_id_without_network_fails_at_once_and_names_the_folder(world, argument):
    sources = dict(base=world.sd, blip=world.blip) | {argument: "nobody/weights"}
    start = time.perf_counter()
    said = f"{argument}='nobody/weights'.*give {argument} as a folder"
    with pytest.raises(FileNotFoundError, match=said):
        CausalStoryPipeline.from_base(**sources)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(world, tmp_path, part):
    broken = copied(world.sd, tmp_path / "sd")
    shutil.rmtree(broken / part)
    with pytest.raises(FileNotFoundError, match=f"{part} is missing"):
        CausalStoryPipeline.from_base(broken, "ar-ldm", blip=world.blip, image_size=32)


def with_old_attention(name: str) -> str:
    "A name in the autoencoder as years ago."
    if "attentions" not in name:
        return name
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, past in old.items():
        name = name.replace(new, past)
    return name


def test_old_names_of_weights_are_understood(world, tmp_path):
    """Published folders are years old: another name of the autoencoder's attention, position
    numbers that nobody needs."""
    old = copied(world.sd, tmp_path / "sd")
    path = old / "vae" / WEIGHTS
    weights = {with_old_attention(name): value for name, value in load_file(path).items()}
    assert any("query" in name for name in weights)
    save_file(weights, path, metadata={"format": "pt"})

    path = old / "text_encoder" / "model.safetensors"
    prefix = "text_model."
    weights = {prefix + n.removeprefix(prefix): value for n, value in load_file(path).items()}
    weights[prefix + "embeddings.position_ids"] = torch.arange(24)[None]
    save_file(weights, path, metadata={"format": "pt"})

    mine, theirs = small(world), small(world._replace(sd=old))
    for part in ("vae", "text_encoder"):
        pairs = (getattr(pipe, part).parameters() for pipe in (mine, theirs))
        for one, other in zip(*pairs, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_weights_that_do_not_fit_are_refused_by_name(world, tmp_path, change):
    broken = copied(world.sd, tmp_path / "sd")
    path = broken / "unet" / WEIGHTS
    weights = load_file(path)
    if change == "missing":
        del weights["conv_in.weight"]
    else:
        weights["conv_in.weight"] = torch.zeros(32, 9, 3, 3)
    save_file(weights, path, metadata={"format": "pt"})
    said = "(?s)unet cannot be read as a UNet2DConditionModel.*conv_in"
    with pytest.raises(ValueError, match=said):
        small(world._replace(sd=broken), "ar-ldm")


def test_a_folder_of_the_other_kind_is_refused(world):
    with pytest.raises(ValueError, match="BlipForImageTextRetrieval|missing"):
        small(world._replace(blip=world.sd / "unet"))
    with pytest.raises(FileNotFoundError, match="vae is missing"):
        small(world._replace(sd=world.blip))


def position_table(text_encoder) -> torch.Tensor:
    inner = getattr(text_encoder, "text_model", text_encoder)
    return inner.embeddings.position_embedding.weight


def test_new_words_and_long_captions(world):
    pipe = taught(world, "flintstones")
    assert pipe.max_length == 91
    for tokenizer in (pipe.tokenizer, pipe.history_tokenizer):

        def ids(text):
            return tokenizer(text, add_special_tokens=False).input_ids

        assert len(ids("Fred")) == 1 and ids("Fred") == ids("fred") == ids("Fred's")[:1]
        assert ids("dino")[0] not in ids("dinosaur")
    before = load_file(world.sd / "text_encoder" / "model.safetensors")
    before = next(value for name, value in before.items() if "position_embedding" in name)
    table = position_table(pipe.text_encoder)
    assert len(table) == 91 and torch.equal(table[:20], before[:20])
    assert torch.allclose(table[-1], before[-1])
    encoders = pipe.text_encoder, pipe.history_encoder
    for encoder, tokenizer in zip(encoders, (pipe.tokenizer, pipe.history_tokenizer)):
        assert len(encoder.get_input_embeddings().weight) == len(tokenizer)


BLIP_TEXT, BLIP_VISION = "history_encoder.text", "history_encoder.vision"
MOVING = {
    "causal-story": {"adapters", "story_context", BLIP_TEXT, "text_encoder"},
    "released": {"unet", "story_context", BLIP_TEXT, "text_encoder"},
    "ar-ldm": {"unet", "story_context", BLIP_TEXT, BLIP_VISION, "text_encoder"},
}


@pytest.mark.parametrize("name", MOVING)
def test_recipes_train_what_they_name(world, name):
    model = prepare_tuning(small(world, name), find_recipe(name, "full")).model

    def part(parameter):
        return ".".join(parameter.split(".")[: 2 if parameter.startswith("history") else 1])

    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {part(parameter) for parameter in trained} == MOVING[name]
    if name != "ar-ldm":
        words = [parameter for parameter in trained if parameter.startswith("text_encoder")]
        assert all("token_embedding" in parameter for parameter in words)


def test_an_unknown_recipe_is_refused_with_the_names_there_are(world):
    with pytest.raises(ValueError, match="choose one of"):
        small(world, "arldm")
    with pytest.raises(ValueError, match="choose one of"):
        find_recipe("causal-story", "tiny")


@pytest.mark.parametrize("words", [(), ("milo",)], ids=["no new words", "new words"])
def test_what_was_tuned_comes_back_on_the_same_base(world, tmp_path, words):
    "Pictures of another size than BLIP's own, BLIP frozen: its interpolated table is made anew."
    recipe = replace(find_recipe("causal-story", "full"), parts=("story_context",))
    pipe = small(world, recipe, words=words)
    pipe.save_pretrained(tmp_path, only_tuned=True)
    with pytest.raises(ValueError, match="not its base: name it"):
        CausalStoryPipeline.from_pretrained(tmp_path)
    loaded = CausalStoryPipeline.from_pretrained(tmp_path, base=world.sd, blip=world.blip)
    assert loaded.size == "full" and loaded.max_length == 24
    assert loaded.tokenizer.get_vocab() == pipe.tokenizer.get_vocab()
    for name, part in pipe.model.state_dict().items():
        assert torch.equal(part, loaded.model.state_dict()[name]), name


# ---------------------------------------------------------------- drawing, shared out


@pytest.mark.parametrize("task", ["visualization", "continuation"])
def test_every_story_is_drawn_once_and_alike_by_whom_it_is(world, tmp_path, task):
    pipe, dataset = small(world), StoryDataset(world.data, "train")
    pipe.set_progress_bar_config(disable=True)

    def draw(name, batch_size=1, **options):
        options |= dict(batch_size=batch_size, num_inference_steps=1, progress=False)
        return draw_folder(pipe, dataset, tmp_path / name, task, **options)

    shares = [draw("two", process=process, n_processes=2) for process in (1, 0)]
    assert sorted(sum(shares, [])) == draw("one") == list(range(6)) and draw("two") == []
    given = int(task == "continuation")
    for index in range(6):
        n_frames = 5 if index < 3 else 3
        one, two = (story_folder(tmp_path / name, index) for name in ("one", "two"))
        pictures = sorted(path.name for path in one.glob("*.png"))
        assert pictures == [f"frame-{k}.png" for k in range(given, n_frames)]
        for path in one.iterdir():
            assert path.read_bytes() == (two / path.name).read_bytes()
        for picture in pictures:
            assert count_tiles(Image.open(one / picture)) == 1
        record = dataset.story(index, tile=0)
        assert len(DrawnStories(tmp_path / "one").frames(index, record, task)) == len(pictures)

    # several at once: sums in another order, so a colour may tip over to the next
    assert draw("batches", batch_size=4) == list(range(6))
    for index in range(6):
        name = f"frame-{given}.png"
        one, other = (story_folder(tmp_path / way, index) / name for way in ("one", "batches"))
        one, other = (np.asarray(Image.open(path), int) for path in (one, other))
        assert np.abs(one - other).max() <= 1


# ---------------------------------------------------------------- several processes, kill -9

TRAIN = """
import json, os, sys
import torch
torch.set_num_threads(1)
from causal_story import training
from causal_story.pipeline import CausalStoryPipeline
from causal_story.tuning import tune

world, run = sys.argv[1:3]
config = training.TrainingConfig(**json.loads(sys.argv[3]))
save = training.save_checkpoint

def noted(*arguments):
    open(f"{run}.writer-{os.environ.get('RANK', 0)}", "w").close()
    return save(*arguments)

training.save_checkpoint = noted

def train(**options):
    pipe = CausalStoryPipeline.from_base(
        f"{world}/tiny/stable-diffusion", blip=f"{world}/tiny/blip", image_size=32,
        words=["milo"], max_length=24,
    )
    options |= dict(config=config, folder=run, progress=False)
    return tune(pipe, f"{world}/stories.h5", **options)
"""


def python(world, code: str, run: Path, config: dict, *launcher):
    "Run `code` after `TRAIN` in a process of its own, or in several."
    script = run.with_suffix(".py")
    script.write_text(TRAIN + textwrap.dedent(code))
    alone = dict(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", PYTHONPATH=str(ROOT))
    arguments = [str(script), str(world.folder), str(run), json.dumps(config)]
    done = subprocess.run(
        [sys.executable, *launcher, *arguments],
        env=os.environ | alone,
        cwd=run.parent,
        text=True,
        capture_output=True,
        timeout=900,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def newest(run: Path):
    "(tensors, record) of a run's last checkpoint."
    return load_checkpoint(list_checkpoints(run)[-1])


def same_bits(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


SETTINGS = dict(batch_size=4, learning_rate=1e-3, warmup_steps=2, ema_decay=0.9)


def test_two_processes_train_like_one(world, tmp_path):
    """The same global batches, stories of unequal length, two accumulation steps; two processes
    connected by gloo."""
    settings = SETTINGS | dict(steps=5, gradient_accumulation_steps=2, checkpoint_every=5)
    options = dict(config=TrainingConfig(**settings), folder=tmp_path / "one", progress=False)
    alone = tune(small(world), world.data, **options)
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"
    python(world, "train()", tmp_path / "two", settings, *launcher)
    _, record = newest(tmp_path / "two")
    losses = torch.tensor(record["losses"])
    torch.testing.assert_close(losses, torch.tensor(alone.losses), rtol=1e-5, atol=0)
    assert_trained_alike(tmp_path / "one", tmp_path / "two")
    assert sorted(path.name for path in tmp_path.glob("*.writer-*")) == ["two.writer-0"]


def test_a_batch_that_cannot_be_shared_is_refused(world):
    config = TrainingConfig(batch_size=6, gradient_accumulation_steps=2)
    dataset = StoryDataset(world.data, "train")
    with pytest.raises(ValueError, match="multiple of 4"):
        StoryBatches(dataset, small(world).collator(), config, n_processes=2)


def test_checkpointing_computes_again_and_changes_nothing(world):
    settings = TrainingConfig(**SETTINGS | dict(steps=2, batch_size=2, checkpoint_every=0))
    options = dict(config=settings, progress=False)
    found = []
    for checkpointing in (False, True):
        pipe = small(world)
        result = tune(pipe, world.data, gradient_checkpointing=checkpointing, **options)
        found.append(torch.tensor(result.losses))
        assert not pipe.unet.is_gradient_checkpointing
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


def test_mixed_precision_trains_nearly_the_same(world, tmp_path):
    settings = SETTINGS | dict(steps=3, batch_size=2, checkpoint_every=3)
    whole = tune(small(world), world.data, config=TrainingConfig(**settings), progress=False)
    # accelerate allows one precision a process
    python(world, "train()", tmp_path / "short", settings | dict(mixed_precision="bf16"))
    tensors, record = newest(tmp_path / "short")
    assert whole.losses != record["losses"]
    losses = torch.tensor(record["losses"])
    torch.testing.assert_close(losses, torch.tensor(whole.losses), rtol=0.02, atol=0)
    kinds = {value.dtype for name, value in tensors.items() if name.startswith("model/")}
    assert kinds == {torch.float32}  # only activations are short


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are a Unix matter")
def test_a_full_disk_leaves_the_checkpoint_before_it_whole(world, tmp_path):
    "A limit on the size of a file fails in the same place as a full disk."
    settings = SETTINGS | dict(batch_size=2, steps=3, checkpoint_every=1, keep_checkpoints=1)
    python(
        world,
        """
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        unlimited = resource.RLIM_INFINITY

        def full(step, loss, model):
            if step == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, unlimited))

        try:
            train(callbacks=[full])
        except Exception as error:
            print(type(error).__name__, error)
        else:
            raise SystemExit("nothing went wrong")
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
        assert [path.name for path in training.list_checkpoints(run)] == ["step-00000001"]
        assert not [name for name in os.listdir(run) if name.startswith(".")], os.listdir(run)
        train()
        run = run + "-whole"
        train()
        """,
        tmp_path / "run",
        settings,
    )
    stopped, _ = newest(tmp_path / "run")
    whole, _ = newest(tmp_path / "run-whole")
    assert same_bits(stopped, whole)


def test_a_killed_run_ends_with_the_same_bits(world, tmp_path):
    "kill -9 at random moments of steps and of writing, then the same command again."
    settings = SETTINGS | dict(batch_size=2, steps=12, checkpoint_every=1, keep_checkpoints=2)
    python(
        world,
        """
        import random, signal, time
        chance = random.Random(4)
        for attempt in range(3):
            steps, delay = chance.randint(1, 3), chance.random() * 0.2
            read, write = os.pipe()
            child = os.fork()
            if child == 0:
                train(callbacks=[lambda *_: os.write(write, b".")])
                os._exit(0)
            for _ in range(steps):
                os.read(read, 1)
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            for folder in training.list_checkpoints(run):
                training.load_checkpoint(folder)
        done = os.path.exists(f"{run}/step-00000012")
        assert training.list_checkpoints(run) and not done, "killed too late to show anything"
        train()
        run = run + "-whole"
        train()
        """,
        tmp_path / "run",
        settings,
    )
    killed, record = newest(tmp_path / "run")
    whole, expected = newest(tmp_path / "run-whole")
    assert record["step"] == expected["step"] == 12 and record["losses"] == expected["losses"]
    assert {name.split("/")[0] for name in whole} == {"model", "optimizer", "ema"}
    assert same_bits(killed, whole)
    kept = [path.name for path in list_checkpoints(tmp_path / "run")]
    assert kept == ["step-00000011", "step-00000012"]
