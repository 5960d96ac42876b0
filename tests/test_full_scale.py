"""Full scale: published layouts, foreign checkpoints, feature caches, several processes, runs that are killed."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from causal_story import presets
from causal_story.data import StoryDataset, count_tiles
from causal_story.arldm import arldm_name, arldm_state, import_arldm_checkpoint, read_lightning
from causal_story.costs import saved_bytes
from causal_story.drawing import draw_stories
from causal_story.features import (
    FeatureCache,
    StoryBatches,
    cache_path,
    cache_settings,
    scan_stories,
    write_cache,
)
from causal_story.full_scale import write_tiny_folders
from causal_story.presets import (
    FULL_SCALE,
    find_preset,
    full_scale_pipeline,
    prepare_preset,
    shared_loss,
    story_collator,
    train_full_scale,
)
from causal_story.raw import convert_folder, write_folder
from causal_story.storyworld import make_stories
from causal_story.training import (
    TrainingConfig,
    list_checkpoints,
    load_checkpoint,
    make_accelerator,
)
from causal_story.words import STORY_DATA

ROOT = Path(__file__).resolve().parent.parent
World = namedtuple("World", "folder sd blip data")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    "Tiny folders of the published layouts, and a data set with stories of three and of five frames."
    folder = tmp_path_factory.mktemp("full_scale")
    stories = [*make_stories(3, seed=1), *make_stories(3, seed=2, n_frames=3)]
    sd, blip = write_tiny_folders(
        folder / "tiny",
        [caption for story in stories for caption in story.captions]
        + ["dinosaur talks to friends"],
    )
    write_folder(dict(train=stories), folder / "raw", size=64)
    return World(
        folder, sd, blip, convert_folder(folder / "raw", folder / "stories.h5", progress=False)
    )


def small(world, preset="causal-story", **options):
    return full_scale_pipeline(
        preset,
        world.sd,
        world.blip,
        image_size=32,
        **(dict(max_length=24, words=["milo"]) | options),
    )


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


# ---------------------------------------------------------------- published layouts


@pytest.mark.parametrize("argument", ["stable_diffusion", "blip"])
def test_a_hub_id_without_network_fails_at_once_and_names_the_folder(world, argument):
    start, sources = (
        time.perf_counter(),
        dict(stable_diffusion=world.sd, blip=world.blip) | {argument: "nobody/weights"},
    )
    with pytest.raises(
        FileNotFoundError, match=f"{argument}='nobody/weights'.*give {argument} as a folder"
    ):
        full_scale_pipeline(**sources)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(world, tmp_path, part):
    broken = copied(world.sd, tmp_path / "sd")
    shutil.rmtree(broken / part)
    with pytest.raises(FileNotFoundError, match=f"{part} is missing"):
        full_scale_pipeline("ar-ldm", broken, world.blip, image_size=32)


def test_old_names_of_weights_are_understood(world, tmp_path):
    "Published folders are years old: another name of the autoencoder's attention, position numbers that nobody needs."
    old = copied(world.sd, tmp_path / "sd")
    path = old / "vae" / "diffusion_pytorch_model.safetensors"
    names = dict(to_q="query", to_k="key", to_v="value")
    weights = {}
    for name, value in load_file(path).items():
        if "attentions" in name:
            name = name.replace("to_out.0", "proj_attn")
            for new, past in names.items():
                name = name.replace(new, past)
        weights[name] = value
    assert any("query" in name for name in weights)
    save_file(weights, path, metadata={"format": "pt"})
    path = old / "text_encoder" / "model.safetensors"
    weights = {
        name if name.startswith("text_model.") else f"text_model.{name}": value
        for name, value in load_file(path).items()
    }
    save_file(
        weights | {"text_model.embeddings.position_ids": torch.arange(24)[None]},
        path,
        metadata={"format": "pt"},
    )
    mine, theirs = (
        small(world),
        full_scale_pipeline(
            "causal-story", old, world.blip, words=["milo"], max_length=24, image_size=32
        ),
    )
    for part in ("vae", "text_encoder"):
        for a, b in zip(
            getattr(mine, part).parameters(), getattr(theirs, part).parameters(), strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_weights_that_do_not_fit_are_refused_by_name(world, tmp_path, change):
    broken = copied(world.sd, tmp_path / "sd")
    path = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    if change == "missing":
        del weights["conv_in.weight"]
    else:
        weights["conv_in.weight"] = torch.zeros(32, 9, 3, 3)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="(?s)unet cannot be read as a UNet2DConditionModel.*conv_in"
    ):
        full_scale_pipeline("ar-ldm", broken, world.blip, image_size=32)


def test_a_folder_of_the_other_kind_is_refused(world):
    with pytest.raises(ValueError, match="BlipForImageTextRetrieval|missing"):
        full_scale_pipeline("causal-story", world.sd, world.sd / "unet", image_size=32)
    with pytest.raises(FileNotFoundError, match="vae is missing"):
        full_scale_pipeline("causal-story", world.blip, world.blip, image_size=32)


def test_new_words_and_long_captions(world):
    pipe = small(world, dataset="flintstones", words=(), max_length=None)
    assert pipe.max_length == 91
    for tokenizer in (pipe.tokenizer, pipe.history_tokenizer):
        one = lambda text: tokenizer(text, add_special_tokens=False).input_ids
        assert len(one("Fred")) == 1 and one("Fred") == one("fred") == one("Fred's")[:1]
        assert one("dino")[0] not in one("dinosaur")
    table = (
        pipe.text_encoder.embeddings.position_embedding.weight
        if hasattr(pipe.text_encoder, "embeddings")
        else pipe.text_encoder.text_model.embeddings.position_embedding.weight
    )
    before = load_file(world.sd / "text_encoder" / "model.safetensors")
    before = next(value for name, value in before.items() if "position_embedding" in name)
    assert (
        len(table) == 91
        and torch.equal(table[:20], before[:20])
        and torch.allclose(table[-1], before[-1])
    )
    for encoder, tokenizer in (
        (pipe.text_encoder, pipe.tokenizer),
        (pipe.history_encoder, pipe.history_tokenizer),
    ):
        assert len(encoder.get_input_embeddings().weight) == len(tokenizer)


def test_presets_train_what_they_name(world):
    for name in FULL_SCALE:
        model = prepare_preset(small(world, name).as_model(), name)
        moving = {
            n.split(".")[0] if not n.startswith("history") else ".".join(n.split(".")[:2])
            for n, p in model.named_parameters()
            if p.requires_grad
        }
        expected = dict(
            [
                (
                    "causal-story",
                    {"adapters", "story_context", "history_encoder.text", "text_encoder"},
                ),
                ("released", {"unet", "story_context", "history_encoder.text", "text_encoder"}),
                (
                    "ar-ldm",
                    {
                        "unet",
                        "story_context",
                        "history_encoder.text",
                        "history_encoder.vision",
                        "text_encoder",
                    },
                ),
            ]
        )[name]
        assert moving == expected
        words = [n for n, p in model.text_encoder.named_parameters() if p.requires_grad]
        assert name == "ar-ldm" or all("token_embedding" in n for n in words)
    with pytest.raises(ValueError, match="choose one of"):
        find_preset("arldm")


# ---------------------------------------------------------------- AR-LDM's checkpoints


@pytest.fixture(scope="module")
def arldm(world):
    "A pipeline of the preset ar-ldm with random weights, and its state under AR-LDM's names."
    pipe = small(world, "ar-ldm", dataset="pororo", words=(), max_length=None)
    torch.manual_seed(7)
    with torch.no_grad():
        for part in (
            pipe.unet,
            pipe.vae,
            pipe.text_encoder,
            pipe.history_encoder,
            pipe.story_context,
        ):
            for p in part.parameters():
                p.normal_(std=0.1)
    return pipe, arldm_state(pipe)


def fresh_arldm(world):
    return small(world, "ar-ldm", dataset="pororo", words=(), max_length=None)


def test_everything_arrives_and_the_rest_is_reported(world, arldm, tmp_path):
    torch.save(
        dict(state_dict=arldm[1], epoch=3, loops={}, optimizer_states=[]), tmp_path / "a.ckpt"
    )
    mine = fresh_arldm(world)
    report = import_arldm_checkpoint(tmp_path / "a.ckpt", mine, "pororo")
    assert (
        set(report.unused) == {"clip_text_null_token", "blip_image_null_token"}
        and not report.missing
        and not report.wrong_shape
    )
    assert [name for name, _ in report.partly] == ["time_embeddings.weight"]
    assert len(report.used) + 3 == len(arldm[1])
    for part in ("unet", "vae", "text_encoder", "history_encoder"):
        for a, b in zip(
            getattr(mine, part).parameters(), getattr(arldm[0], part).parameters(), strict=True
        ):
            assert torch.equal(a, b)


def test_names_of_ar_ldm_hit_every_weight(arldm):
    "Written out by hand: names as AR-LDM's modules have them."
    mine = {f"history_encoder.{name}" for name in arldm[0].history_encoder.state_dict()}
    for theirs in (
        "visual_encoder.cls_token",
        "visual_encoder.pos_embed",
        "visual_encoder.patch_embed.proj.weight",
        "visual_encoder.blocks.0.norm1.weight",
        "visual_encoder.blocks.0.attn.qkv.weight",
        "visual_encoder.blocks.0.attn.proj.bias",
        "visual_encoder.blocks.0.norm2.bias",
        "visual_encoder.blocks.0.mlp.fc1.weight",
        "visual_encoder.norm.weight",
        "text_encoder.embeddings.word_embeddings.weight",
        "text_encoder.encoder.layer.0.attention.self.query.weight",
        "text_encoder.encoder.layer.0.crossattention.output.dense.bias",
    ):
        assert arldm_name("mm_encoder." + theirs) in mine, theirs


def test_word_rows_go_to_their_words(world, arldm, tmp_path):
    "Words that the checkpoint's tokenizer knew already had no row of their own; the others come in the order of the list."
    state, pipe = dict(arldm[1]), fresh_arldm(world)
    key = "mm_encoder.text_encoder.embeddings.word_embeddings.weight"
    torch.save(dict(state_dict=state | {key: state[key][:-2]}), tmp_path / "short.ckpt")
    before = pipe.history_encoder.get_input_embeddings().weight.clone()
    report = import_arldm_checkpoint(tmp_path / "short.ckpt", pipe, "pororo")
    assert key in dict(report.partly) and "do not fit the new words" in dict(report.partly)[key]
    after = pipe.history_encoder.get_input_embeddings().weight
    n_base = len(pipe.history_tokenizer) - sum(
        word in pipe.history_tokenizer.get_added_vocab() for word in STORY_DATA["pororo"]["words"]
    )
    assert torch.equal(after[:n_base], state[key][:n_base]) and torch.equal(
        after[n_base:], before[n_base:]
    )


@pytest.mark.parametrize("fault", ["shape", "missing"])
def test_what_does_not_fit_changes_nothing(world, arldm, tmp_path, fault):
    state, pipe = dict(arldm[1]), fresh_arldm(world)
    if fault == "shape":
        state["unet.conv_in.weight"] = torch.zeros(1, 2, 3, 3)
    else:
        del state["unet.conv_in.weight"]
    torch.save(state, tmp_path / "a.ckpt")  # a plain dictionary of weights is read as well
    before = pipe.unet.conv_in.weight.clone(), pipe.unet.conv_out.weight.clone()
    with pytest.raises(ValueError, match="(?s)nothing was changed.*unet.conv_in.weight"):
        import_arldm_checkpoint(tmp_path / "a.ckpt", pipe, "pororo")
    assert torch.equal(pipe.unet.conv_out.weight, before[1])
    import_arldm_checkpoint(tmp_path / "a.ckpt", pipe, "pororo", strict=False)
    assert torch.equal(pipe.unet.conv_in.weight, before[0]) and not torch.equal(
        pipe.unet.conv_out.weight, before[1]
    )


class Touch:
    "A pickle that would make a file."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save(
        dict(state_dict=dict(a=torch.zeros(1)), hyper_parameters=Touch(tmp_path / "ran")),
        tmp_path / "evil.ckpt",
    )
    with pytest.raises(ValueError, match="refused, because opening it would run code"):
        read_lightning(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_checkpoints(world, tmp_path):
    (tmp_path / "half.ckpt").write_bytes(b"PK\x03\x04 half a file")
    torch.save(dict(epoch=3), tmp_path / "empty.ckpt")
    torch.save(dict(state_dict={"backbone.weight": torch.zeros(2)}), tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="half.ckpt: damaged"):
        read_lightning(tmp_path / "half.ckpt")
    with pytest.raises(ValueError, match="no weights"):
        read_lightning(tmp_path / "empty.ckpt")
    with pytest.raises(ValueError, match="not one of its 1 weights"):
        import_arldm_checkpoint(tmp_path / "other.ckpt", fresh_arldm(world))
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        read_lightning(tmp_path / "none.ckpt")


# ---------------------------------------------------------------- the feature cache


def parts_of_training(world, **options):
    pipe = small(world, **options)
    return (
        prepare_preset(pipe.as_model()).eval(),
        StoryDataset(world.data, "train"),
        story_collator(pipe),
    )


def test_batches_from_the_cache_are_those_from_pictures(world, tmp_path):
    "Stories of three and five frames in one batch, both tasks, the loss of every step."
    model, dataset, collator = parts_of_training(world)
    model.text_encoder.requires_grad_(False)
    settings = cache_settings(model, dataset, collator)
    cache = FeatureCache(
        write_cache(
            tmp_path / "c.h5", model, dataset, collator, settings, batch_size=4, progress=False
        ),
        settings,
    )
    assert {"latent_mean", "latent_std", "image_features", "caption_states"} <= set(cache.file)
    config = TrainingConfig(batch_size=3)
    loss = shared_loss(make_accelerator(config), "weighted", None, True)
    with torch.no_grad():
        for step in range(4):
            kept, fresh = (
                StoryBatches(dataset, collator, config, cache=source)(step)
                for source in (cache, None)
            )
            torch.testing.assert_close(
                loss(model, kept, step), loss(model, fresh, step), rtol=1e-5, atol=0
            )
            assert "frames" not in kept[1] and kept[1]["latent_mean"].shape[2:] == (4, 8, 8)


def test_a_picture_is_kept_once(world, tmp_path):
    stories = make_stories(2, seed=5)
    write_folder(dict(train=[*stories, *stories]), tmp_path / "raw", size=64)
    dataset = StoryDataset(
        convert_folder(tmp_path / "raw", tmp_path / "twice.h5", progress=False), "train"
    )
    contents = scan_stories(dataset, progress=False)
    assert len(dataset) == 4 and contents.n_tiles == len(contents.pictures) <= 10


def test_other_weights_have_another_cache_and_a_foreign_one_is_refused(world, tmp_path):
    model, dataset, collator = parts_of_training(world)
    settings = cache_settings(model, dataset, collator)
    path = write_cache(tmp_path / "c.h5", model, dataset, collator, settings, progress=False)
    with torch.no_grad():
        model.vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-7
    changed = cache_settings(model, dataset, collator)
    assert cache_path(world.data, changed) != cache_path(world.data, settings)
    with pytest.raises(ValueError, match="other vae"):
        FeatureCache(path, changed)
    with pytest.raises(ValueError, match="made from other data"):
        FeatureCache(path).picture(b"?")
    with pytest.raises(ValueError, match="not a cache"):
        FeatureCache(world.data)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut short"):
        FeatureCache(path, settings)


def test_too_little_disk_is_said_before_anything_starts(world, tmp_path, monkeypatch):
    model, dataset, collator = parts_of_training(world)
    monkeypatch.setattr(
        presets.shutil,
        "disk_usage",
        lambda folder: namedtuple("usage", "total used free")(10, 9, 1000),
    )
    monkeypatch.setattr(model.vae, "encode", None)
    with pytest.raises(OSError, match="only 0.00 GB are free. Nothing was started"):
        write_cache(
            tmp_path / "c.h5",
            model,
            dataset,
            collator,
            cache_settings(model, dataset, collator),
            progress=False,
        )
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_no_cache(world, tmp_path, monkeypatch):
    model, dataset, collator = parts_of_training(world)
    settings = cache_settings(model, dataset, collator)
    rows, calls = presets._tile_rows, []

    def fails(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rows(*arguments)

    monkeypatch.setattr(presets, "_tile_rows", fails)
    with pytest.raises(KeyboardInterrupt):
        write_cache(
            tmp_path / "c.h5", model, dataset, collator, settings, batch_size=4, progress=False
        )
    assert not list(tmp_path.iterdir())


def test_nothing_is_kept_of_an_autoencoder_that_trains(world):
    model, dataset, collator = parts_of_training(world)
    model.vae.requires_grad_(True)
    with pytest.raises(ValueError, match="autoencoder trains"):
        cache_settings(model, dataset, collator)


# ---------------------------------------------------------------- drawing, shared out


@pytest.mark.parametrize("task", ["visualization", "continuation"])
def test_every_story_is_drawn_once_and_alike_by_whom_it_is(world, tmp_path, task):
    pipe, dataset = small(world), StoryDataset(world.data, "train")
    pipe.set_progress_bar_config(disable=True)
    draw = lambda name, **options: draw_stories(
        pipe, dataset, tmp_path / name, task, num_inference_steps=1, progress=False, **options
    )
    shares = [draw("two", process=p, n_processes=2) for p in (1, 0)]
    assert sorted(sum(shares, [])) == draw("one") == list(range(6)) and draw("two") == []
    for index in range(6):
        one, two = (tmp_path / name / f"{index:08d}.png" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
        assert count_tiles(Image.open(one)) == (5 if index < 3 else 3) - (task == "continuation")


# ---------------------------------------------------------------- several processes, kill -9

TRAIN = """
import json, os, sys
import torch
torch.set_num_threads(1)
from causal_story import training
from causal_story.presets import full_scale_pipeline, train_full_scale

world, run = sys.argv[1:3]
config = training.TrainingConfig(**json.loads(sys.argv[3]))
save = training.save_checkpoint
def noted(*arguments):
    open(f"{run}.writer-{os.environ.get('RANK', 0)}", "w").close()
    return save(*arguments)
training.save_checkpoint = noted

def train(**options):
    pipe = full_scale_pipeline("causal-story", f"{world}/tiny/stable-diffusion", f"{world}/tiny/blip", image_size=32, words=["milo"], max_length=24)
    return train_full_scale(pipe, f"{world}/stories.h5", config, folder=run, progress=False, **options)
"""


def python(world, code: str, run: Path, config: dict, *launcher, **environment):
    script = run.with_suffix(".py")
    script.write_text(TRAIN + textwrap.dedent(code))
    environment = (
        os.environ
        | dict(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", PYTHONPATH=str(ROOT))
        | environment
    )
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(world.folder), str(run), json.dumps(config)],
        env=environment,
        cwd=run.parent,
        text=True,
        capture_output=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr


SETTINGS = dict(batch_size=4, learning_rate=1e-3, warmup_steps=2, ema_decay=0.9)


def test_two_processes_train_like_one(world, tmp_path):
    "The same global batches, stories of unequal length, two accumulation steps; two processes connected by gloo."
    settings = SETTINGS | dict(steps=5, gradient_accumulation_steps=2, checkpoint_every=5)
    one = train_full_scale(
        small(world), world.data, TrainingConfig(**settings), tmp_path / "one", progress=False
    )
    python(
        world,
        "train()",
        tmp_path / "two",
        settings,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    )
    tensors, record = load_checkpoint(list_checkpoints(tmp_path / "two")[-1])
    torch.testing.assert_close(
        torch.tensor(record["losses"]), torch.tensor(one.losses), rtol=1e-5, atol=0
    )
    alone, _ = load_checkpoint(list_checkpoints(tmp_path / "one")[-1])
    assert tensors.keys() == alone.keys()
    for name in alone:
        if name.startswith(("model/", "ema/")):
            torch.testing.assert_close(tensors[name], alone[name], rtol=1e-3, atol=1e-5)
    assert sorted(path.name for path in tmp_path.glob("*.writer-*")) == ["two.writer-0"]
    with pytest.raises(ValueError, match="multiple of 4"):
        StoryBatches(
            StoryDataset(world.data, "train"),
            story_collator(small(world)),
            TrainingConfig(batch_size=6, gradient_accumulation_steps=2),
            n_processes=2,
        )


def test_mixed_precision_trains_nearly_the_same(world, tmp_path):
    settings = SETTINGS | dict(steps=3, batch_size=2, checkpoint_every=3)
    whole = train_full_scale(small(world), world.data, TrainingConfig(**settings), progress=False)
    python(
        world, "train()", tmp_path / "short", settings | dict(mixed_precision="bf16")
    )  # accelerate allows one precision a process
    tensors, record = load_checkpoint(list_checkpoints(tmp_path / "short")[-1])
    assert whole.losses != record["losses"]
    torch.testing.assert_close(
        torch.tensor(record["losses"]), torch.tensor(whole.losses), rtol=0.02, atol=0
    )
    assert {value.dtype for name, value in tensors.items() if name.startswith("model/")} == {
        torch.float32
    }  # only activations are short


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are a Unix matter")
def test_a_full_disk_leaves_the_checkpoint_before_it_whole(world, tmp_path):
    "A limit on the size of a file fails in the same place as a full disk."
    settings = SETTINGS | dict(batch_size=2, steps=3, checkpoint_every=1, keep_checkpoints=1)
    python(
        world,
        """
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        def full(step, loss, model):
            if step == 1: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        try: train(callbacks=[full])
        except Exception as error: print(type(error).__name__, error)
        else: raise SystemExit("nothing went wrong")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert [path.name for path in training.list_checkpoints(run)] == ["step-00000001"]
        assert not [name for name in os.listdir(run) if name.startswith(".")], os.listdir(run)
        train()
        run = run + "-whole"
        train()
        """,
        tmp_path / "run",
        settings,
    )
    (stopped, _), (whole, _) = (
        load_checkpoint(list_checkpoints(tmp_path / name)[-1]) for name in ("run", "run-whole")
    )
    assert stopped.keys() == whole.keys() and all(
        torch.equal(stopped[name], whole[name]) for name in whole
    )


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
            for _ in range(steps): os.read(read, 1)
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            for folder in training.list_checkpoints(run): training.load_checkpoint(folder)
        assert training.list_checkpoints(run) and not os.path.exists(f"{run}/step-00000012"), "killed too late to show anything"
        train()
        run = run + "-whole"
        train()
        """,
        tmp_path / "run",
        settings,
    )
    (killed, said), (whole, told) = (
        load_checkpoint(list_checkpoints(tmp_path / name)[-1]) for name in ("run", "run-whole")
    )
    assert said["step"] == told["step"] == 12 and said["losses"] == told["losses"]
    assert killed.keys() == whole.keys() and {name.split("/")[0] for name in whole} == {
        "model",
        "optimizer",
        "ema",
    }
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == [
        "step-00000011",
        "step-00000012",
    ]


# ---------------------------------------------------------------- estimates


def test_counted_memory_is_what_the_profiler_sees(world):
    unet = prepare_preset(small(world).as_model()).unet
    latents, context = torch.randn(5, 4, 8, 8), torch.randn(5, 120, 32, requires_grad=True)

    def forward():
        return unet(latents, torch.full((5,), 500), context).sample

    with torch.profiler.profile(profile_memory=True) as profiled:
        held_by = forward()
    held = sum(event.self_cpu_memory_usage for event in profiled.key_averages()) + 4 * (
        latents.numel() + context.numel()
    )
    assert held_by.requires_grad and saved_bytes(forward, [unet]) == pytest.approx(held, rel=0.02)
