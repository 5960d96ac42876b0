"What a reader of 06_pipeline need not see: exactness of the fast loop for every task and setting, and where guidance is computed."

import json
import math
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.utils import logging as diffusers_logging
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import causal_story.pipeline as pipeline
from causal_story.encoders import (
    StoryContext,
    tiny_history_encoder,
    tiny_text_encoder,
)
from causal_story.metrics import FrameReader
from causal_story.miniature import pretraining_schedule
from causal_story.model import tiny_vae
from causal_story.pipeline import (
    CausalStoryPipeline,
    check_interval,
    guide,
    guided_steps,
    use_scheduler,
)
from causal_story.storyworld import make_stories
from causal_story.unet import UNetAdapters, cross_attention_sites, tiny_unet
from causal_story.words import tiny_tokenizers

STEPS = 4
STORIES = make_stories(2, seed=4)
CAPTIONS = [story.captions[:3] for story in STORIES]
SCHEDULE = dict(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    prediction_type="v_prediction",
)


def make_pipe(adapters=True, scheduler=DDIMScheduler, **settings):
    torch.manual_seed(0)
    tokenizer, history_tokenizer = tiny_tokenizers(
        [caption for story in STORIES for caption in story.captions], max_length=24
    )
    unet = tiny_unet(block_channels=(32, 64))
    bottlenecks = UNetAdapters.for_unet(unet, 8) if adapters else None
    pipe = CausalStoryPipeline(
        tiny_vae(),
        tiny_text_encoder(tokenizer),
        tokenizer,
        unet,
        scheduler(**SCHEDULE),
        tiny_history_encoder(history_tokenizer),
        history_tokenizer,
        StoryContext(128, context_layers=1, relevance=True),
        bottlenecks,
        history_policy="weighted",
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        **settings,
    )
    with torch.no_grad():
        for part in (pipe.adapters, pipe.story_context):
            if part is not None:
                for p in part.parameters():
                    p.add_(0.05 * torch.randn(p.shape))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return make_pipe()


def draw(pipe, task="visualization", **options):
    source = (
        dict(
            source_image=[s.frames(64)[0] for s in STORIES],
            source_caption=[s.captions[0] for s in STORIES],
        )
        if task == "continuation"
        else {}
    )
    seeds = [torch.Generator().manual_seed(n) for n in (1, 2)]
    return pipe(
        CAPTIONS, task=task, generator=seeds, output_type="latent", **source, **options
    ).frames


@pytest.fixture
def rows(pipe, monkeypatch):
    "How many rows each U-Net call got."
    seen, forward = [], pipe.unet.forward
    monkeypatch.setattr(
        pipe.unet,
        "forward",
        lambda sample, *a, **k: seen.append(len(sample)) or forward(sample, *a, **k),
    )
    return seen


# ---------------------------------------------------------------- keys and values once a frame


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("adapters", [True, False], ids=["adapters", "no adapters"])
@pytest.mark.parametrize("task", ["visualization", "continuation"])
def test_remembered_keys_and_values_change_no_bit(task, adapters, scheduler, monkeypatch):
    pipe = make_pipe(adapters, scheduler)
    fast = draw(pipe, task)
    assert not any("forward" in vars(module) for module in pipe.unet.modules())
    monkeypatch.setattr(pipeline, "cached_context", lambda unet: nullcontext())
    assert torch.equal(draw(pipe, task), fast)


@pytest.mark.parametrize("interval, contexts", [((0, 1), 1), ((0.5, 1), 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_context_is_projected_once_a_frame(interval, contexts, dtype, monkeypatch):
    pipe = make_pipe()
    pipe.unet.to(dtype)  # its context comes in float32
    groups, calls = [], []
    made = pipeline.CausalStoryModel.predict

    def predict(model, noisy, timesteps, conditioning, *a):
        groups.extend(
            tokens for _, tokens, _, _ in conditioning
        )  # kept alive, so that no two share an id
        return made(model, noisy, timesteps, conditioning, *a)

    monkeypatch.setattr(pipeline.CausalStoryModel, "predict", predict)
    for attn in cross_attention_sites(pipe.unet).values():
        for layer in (attn.to_k, attn.to_v):
            forward = layer.forward
            monkeypatch.setattr(
                layer, "forward", lambda x, forward=forward: calls.append(id(x)) or forward(x)
            )
    draw(pipe, guidance_interval=interval)
    n_layers, different = (
        2 * len(cross_attention_sites(pipe.unet)),
        len({id(tokens) for tokens in groups}),
    )
    assert len(CAPTIONS[0]) * contexts <= different < len(groups)
    assert len(calls) == n_layers * different


def test_an_interrupted_story_leaves_the_unet_as_it_was(pipe):
    def stop(pipe, step, t, state):
        raise KeyError("enough")

    with pytest.raises(KeyError):
        draw(pipe, callback_on_step_end=stop)
    assert not any("forward" in vars(module) for module in pipe.unet.modules())


# ---------------------------------------------------------------- guidance on part of the steps


@given(edges=st.lists(st.floats(0, 1), min_size=1, max_size=4, unique=True), n=st.integers(1, 300))
def test_intervals_that_touch_share_no_step_and_leave_none_out(edges, n):
    edges = sorted({0.0, *edges, 1.0})
    parts = [guided_steps(pair, n) for pair in zip(edges, edges[1:])]
    assert [sum(step) for step in zip(*parts)] == [1] * n


def test_the_whole_interval_is_the_plain_loop(pipe):
    def plain_loop(self, model, latents, told, empty, steps, scale, interval, frame, bar, callback):
        self.scheduler.set_timesteps(steps)
        latents, both = (
            latents * self.scheduler.init_noise_sigma,
            pipeline._stack(empty, told, len(latents)),
        )
        for t in self.scheduler.timesteps:
            twice = self.scheduler.scale_model_input(latents, t).repeat(2, 1, 1, 1)
            prediction = model.predict(twice[:, None], t.expand(len(twice), 1), both)[:, 0]
            latents = self.scheduler.step(
                guide(*prediction.chunk(2), scale), t, latents
            ).prev_sample
        return latents

    plain = type("PlainPipeline", (CausalStoryPipeline,), dict(_denoise=plain_loop))(
        **pipe.components, history_policy="weighted", num_inference_steps=STEPS, guidance_scale=3.0
    )
    plain.set_progress_bar_config(disable=True)
    for task in ("visualization", "continuation"):
        expected = draw(plain, task)
        assert torch.equal(draw(pipe, task), expected) and torch.equal(
            draw(pipe, task, guidance_interval=(0, 1)), expected
        )


@pytest.mark.parametrize("interval", [(0, 0.5), (0.25, 0.75), (0.5, 1)])
def test_part_of_the_steps_equals_two_separate_questions(pipe, interval):
    def by_hand(self, model, latents, told, empty, steps, scale, interval, frame, bar, callback):
        self.scheduler.set_timesteps(steps)
        empty = pipeline._stack(empty, told, len(latents))
        latents = latents * self.scheduler.init_noise_sigma
        for step, t in enumerate(self.scheduler.timesteps):
            ask = lambda context, rows: model.predict(
                torch.cat([latents] * rows)[:, None],
                t.expand(rows * len(latents), 1),
                context,
                False,
            )[:, 0]
            v = ask(told, 1)
            if interval[0] * steps <= step < interval[1] * steps:
                v_empty = ask(empty, 2)[: len(latents)]
                v = v_empty + scale * (v - v_empty)
            latents = self.scheduler.step(v, t, latents).prev_sample
        return latents

    slow = type("ByHand", (CausalStoryPipeline,), dict(_denoise=by_hand))(
        **pipe.components, history_policy="weighted", num_inference_steps=STEPS, guidance_scale=3.0
    )
    slow.set_progress_bar_config(disable=True)
    found = draw(pipe, guidance_interval=interval)
    torch.testing.assert_close(found, draw(slow, guidance_interval=interval), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, draw(pipe), atol=1e-3)


def test_outside_the_interval_half_as_many_rows_go_in(pipe, rows):
    def per_step(**options):
        steps = []

        def after(pipe, step, t, state):
            steps.append(sum(rows))
            rows.clear()

        draw(pipe, callback_on_step_end=after, **options)
        return steps

    B, V = len(CAPTIONS), len(CAPTIONS[0])
    assert per_step() == [2 * B] * STEPS * V
    assert per_step(guidance_interval=(0.25, 0.75)) == [B, 2 * B, 2 * B, B] * V
    assert per_step(guidance_scale=1.0, guidance_interval=(0.25, 0.75)) == [B] * STEPS * V


def test_an_interval_without_a_step_is_no_guidance(pipe):
    assert torch.equal(draw(pipe, guidance_interval=(0, 0.01)), draw(pipe, guidance_scale=1.0))


BAD = [
    (0.6, 0.2),
    (0.5, 0.5),
    (-0.1, 1),
    (0, 1.01),
    (0, math.nan),
    (0, math.inf),
    (0,),
    (0, 0.5, 1),
    0.5,
    "01",
    ("0", "1"),
    (None, 1),
    {0: 0, 1: 1},
]


@pytest.mark.parametrize("interval", BAD, ids=str)
def test_a_bad_interval_is_refused_before_any_computing(pipe, interval, monkeypatch):
    def never(*a, **k):
        raise AssertionError("computed something")

    monkeypatch.setattr(pipe.text_encoder, "forward", never)
    monkeypatch.setattr(pipe.unet, "forward", never)
    with pytest.raises(ValueError, match="guidance_interval=.* 0 <= start < stop <= 1"):
        draw(pipe, guidance_interval=interval)
    with pytest.raises(ValueError, match="guidance_interval"):
        make_pipe(guidance_interval=interval)


def test_numbers_of_other_kinds_are_numbers():
    import numpy as np

    assert check_interval([np.float32(0.25), np.int64(1)]) == (0.25, 1.0)


def test_the_interval_is_stored_and_loading_says_nothing(tmp_path, caplog):
    pipe = make_pipe(guidance_interval=[0.25, 0.75])
    pipe.save_pretrained(tmp_path)
    diffusers_logging.enable_propagation()
    try:
        loaded = CausalStoryPipeline.from_pretrained(tmp_path)
    finally:
        diffusers_logging.disable_propagation()
    assert not [record for record in caplog.records if "interval" in record.getMessage()]
    loaded.set_progress_bar_config(disable=True)
    assert tuple(loaded.config.guidance_interval) == (0.25, 0.75)
    drawn = draw(loaded)
    assert torch.equal(drawn, draw(loaded, guidance_interval=(0.25, 0.75)))
    for name in ("unet", "vae", "text_encoder", "history_encoder", "story_context", "adapters"):
        one, other = (getattr(p, name).state_dict() for p in (loaded, pipe))
        assert one.keys() == other.keys() and all(
            torch.equal(one[key], other[key]) for key in one
        ), name
    assert_close(
        drawn, draw(pipe), atol=1e-5, rtol=1e-5
    )  # the same weights elsewhere in memory: the last bit rounds otherwise on some machines
    assert (drawn - draw(loaded, guidance_interval=(0.0, 1.0))).abs().max() > 1e-2


def test_tuned_parts_store_it_and_older_ones_guide_everywhere(tmp_path):
    pipe = pipeline.story_pipeline("miniature")
    pipe.register_to_config(guidance_interval=(0.0, 0.5))
    pipe.save_tuned(tmp_path / "tuned")
    assert CausalStoryPipeline.from_tuned(tmp_path / "tuned").config.guidance_interval == (0.0, 0.5)
    record = json.loads((tmp_path / "tuned" / "tuned.json").read_text())
    del record["guidance_interval"]
    (tmp_path / "tuned" / "tuned.json").write_text(json.dumps(record))
    assert CausalStoryPipeline.from_tuned(tmp_path / "tuned").config.guidance_interval == (0.0, 1.0)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_no_scheduler_clips_latents(name):
    "Schedulers for pixels clip to [-1, 1] unless told not to; latents of unit spread would be ruined."
    for stored in (pretraining_schedule(), DDPMScheduler()):
        pipe = use_scheduler(SimpleNamespace(scheduler=stored), name)
        assert not pipe.scheduler.config.clip_sample


# ---------------------------------------------------------------- stored models are whole, or refused


def spoil(folder):
    "Take the largest tensor out of a part's weights."
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    del tensors[max(tensors, key=lambda name: tensors[name].numel())]
    save_file(tensors, path, {"format": "pt"})


def test_a_tuned_model_comes_back_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "tuned"
    for part in ("adapters", "story_context", "history_encoder"):
        pipeline.story_pipeline("miniature").save_tuned(folder)
        shutil.rmtree(folder / part)
        with pytest.raises(FileNotFoundError, match=f"{part} is missing"):
            CausalStoryPipeline.from_tuned(folder)
        pipeline.story_pipeline("miniature").save_tuned(folder)
        spoil(folder / part)
        with pytest.raises(ValueError, match=f"{part} cannot be read"):
            CausalStoryPipeline.from_tuned(folder)
    pipeline.story_pipeline("miniature").save_tuned(folder)
    (folder / "tuned.json").write_text((folder / "tuned.json").read_text()[:40])
    with pytest.raises(ValueError, match="tuned.json is not a whole JSON file"):
        CausalStoryPipeline.from_tuned(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_another_base_is_refused_whichever_part_differs(tmp_path, part):
    pipe = pipeline.story_pipeline("miniature")
    with torch.no_grad():
        next(getattr(pipe, part).parameters()).add_(1)
    pipe.save_tuned(tmp_path / "tuned")
    with pytest.raises(ValueError, match=f"another base than miniature: {part} differs"):
        CausalStoryPipeline.from_tuned(tmp_path / "tuned")


@pytest.mark.parametrize(
    "part", ["unet", "vae", "text_encoder", "history_encoder", "story_context", "adapters"]
)
def test_a_stored_pipeline_that_lacks_a_tensor_is_refused(tmp_path, part):
    pipeline.story_pipeline("miniature").save_pretrained(tmp_path)
    spoil(tmp_path / part)
    with pytest.raises(ValueError, match=f"{part} cannot be read"):
        CausalStoryPipeline.from_pretrained(tmp_path)


def test_a_stored_pipeline_takes_a_dtype(tmp_path):
    pipeline.story_pipeline("miniature").save_pretrained(tmp_path)
    for word in ("torch_dtype", "dtype"):
        half = CausalStoryPipeline.from_pretrained(tmp_path, **{word: torch.bfloat16})
        assert {
            getattr(half, name).dtype
            for name in ("unet", "vae", "history_encoder", "story_context", "adapters")
        } == {torch.bfloat16}


def test_the_table_of_contents_decides_what_is_loaded(tmp_path):
    pipeline.story_pipeline("miniature", adapter_width=0).save_pretrained(tmp_path)
    pipeline.story_pipeline("miniature").adapters.save_pretrained(
        tmp_path / "adapters"
    )  # left behind by somebody else
    assert CausalStoryPipeline.from_pretrained(tmp_path).adapters is None
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="model_index.json is damaged"):
        CausalStoryPipeline.from_pretrained(tmp_path)


def test_a_stored_reader_that_lacks_a_tensor_is_refused(tmp_path):
    FrameReader.from_pretrained("miniature").save_pretrained(tmp_path / "reader")
    assert not FrameReader.from_pretrained(tmp_path / "reader").training
    spoil(tmp_path / "reader")
    with pytest.raises(ValueError, match="reader cannot be read"):
        FrameReader.from_pretrained(tmp_path / "reader")


# ---------------------------------------------------------------- offloading


@pytest.mark.parametrize("task", ["visualization", "continuation"])
def test_offloading_wakes_every_part_before_it_works(as_if_tuned, monkeypatch, task):
    "diffusers moves a part to the accelerator when it is called and away when the next one is. On a CPU nothing moves, but who is awake can be followed."
    from accelerate.hooks import CpuOffload

    pipe, awake, asleep = as_if_tuned(), set(), []
    pipe.set_progress_bar_config(disable=True)
    request = dict(generator=torch.Generator().manual_seed(0), num_inference_steps=2, task=task)
    story = [f"Milo waves {place}." for place in ("at home", "on the moon", "in the snow")]
    if task == "continuation":
        request |= dict(
            source_image=Image.new("RGB", (64, 64), "green"),
            source_caption="Milo jumps at the beach.",
        )
    before = pipe(story, **request, output_type="latent").frames
    wake, sleep = CpuOffload.pre_forward, CpuOffload.init_hook
    monkeypatch.setattr(
        CpuOffload,
        "pre_forward",
        lambda self, module, *a, **k: (wake(self, module, *a, **k), awake.add(id(module)))[0],
    )
    monkeypatch.setattr(
        CpuOffload,
        "init_hook",
        lambda self, module: (awake.discard(id(module)), sleep(self, module))[1],
    )
    pipe.enable_model_cpu_offload(device="cpu")
    monkeypatch.setattr(
        CausalStoryPipeline, "device", property(lambda self: torch.device("meta"))
    )  # where weights rest is no place to compute
    parts = {
        name: getattr(pipe, name)
        for name in ("vae", "unet", "text_encoder", "history_encoder", "story_context")
    }
    for name, part in parts.items():
        for leaf in part.modules():
            if not list(leaf.children()):
                leaf.register_forward_pre_hook(
                    lambda *_, name=name, part=part: (
                        asleep.append(name) if id(part) not in awake else None
                    )
                )
    request["generator"] = torch.Generator().manual_seed(0)
    after = pipe(story, **request, output_type="latent").frames
    assert not asleep, f"worked while away from the accelerator: {sorted(set(asleep))}"
    assert not awake  # the last one is sent away as well
    assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_an_older_pipeline_is_replaced_only_by_a_whole_one(tmp_path, monkeypatch):
    pipe = pipeline.story_pipeline("miniature")
    (tmp_path / "out" / "run").mkdir(parents=True)
    pipe.save_whole(tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    def fails(folder, *_, **__):
        (Path(folder) / "unet").mkdir(parents=True)
        raise OSError("no space left on device")

    monkeypatch.setattr(pipe, "save_pretrained", fails)
    with pytest.raises(OSError, match="no space"):
        pipe.save_whole(tmp_path / "out")
    assert {
        path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()
    } == before and (tmp_path / "out" / "run").is_dir()
    monkeypatch.undo()
    move, moved = os.replace, []

    def stuck(source, target):
        if len(moved) == 3:
            raise OSError(13, "in use")
        moved.append(move(source, target))

    monkeypatch.setattr(pipeline.os, "replace", stuck)
    with pytest.raises(
        OSError,
        match="could not be replaced .in use.; the parts that were not moved are in .*tmp-pipeline",
    ):
        pipe.save_whole(tmp_path / "out")
    assert not (tmp_path / "out" / "model_index.json").exists()
    parts = {path.parent.name for path in (tmp_path / "out").rglob("*.safetensors")}
    assert parts == {
        path.parent.name for path in before if path.suffix == ".safetensors"
    }  # here or aside, none is lost
    monkeypatch.undo()
    with torch.no_grad():
        pipe.unet.conv_in.bias.add_(1)
    pipe.save_whole(tmp_path / "out")
    assert torch.equal(
        CausalStoryPipeline.from_pretrained(tmp_path / "out").unet.conv_in.bias,
        pipe.unet.conv_in.bias,
    )
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
