"""Calling the pipeline as one calls diffusers': what people try first."""

import inspect
import json
import re
import warnings
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from published import single_file, small
from safetensors.torch import load_file, save_file
from test_pipeline import CAPTIONS, STORIES, make_pipe

import causal_story.cli as cli
from causal_story.checks import INSTEAD
from causal_story.pipeline import CausalStoryPipeline
from causal_story.raw import convert_folder, write_folder
from causal_story.storage import warn_once
from causal_story.unet import attach_adapters

TWO = CAPTIONS[0][:2]
PICTURES = STORIES[0].frames(64)
FAST = dict(num_inference_steps=2, output_type="latent")


@pytest.fixture(scope="module")
def pipe():
    return make_pipe()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def tell(pipe, prompt=TWO, **options):
    "Clean latents of a story of two frames."
    return pipe(prompt, **FAST | dict(generator=seeded(1)) | options).frames


# ---------------------------------------------------------------- pictures


def kinds(folder) -> dict:
    "One picture in every form."
    picture = PICTURES[0]
    array = np.asarray(picture)
    picture.save(folder / "picture.png")
    on_its_side = picture.rotate(90)  # a camera that was held upright
    exif = Image.Exif()
    exif[0x112] = 6
    on_its_side.save(folder / "photo.png", exif=exif)
    wide = Image.new("RGB", (96, 64))
    wide.paste(picture, (16, 0))
    return {
        "PIL": picture,
        "RGBA": picture.convert("RGBA"),
        "path": folder / "picture.png",
        "text": str(folder / "picture.png"),
        "a photo": Image.open(folder / "photo.png"),
        "wide": wide,
        "uint8 array": array,
        "array": array / 255,
        "tensor": torch.from_numpy(array / 255).permute(2, 0, 1).float(),
        "-1 to 1": torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1),
        "half": torch.from_numpy(array.copy()).permute(2, 0, 1),
    }


@pytest.mark.parametrize("name", ["source_image", "history_frames", "kept_frames"])
def test_any_kind_of_picture_is_the_same_picture(pipe, name, tmp_path, monkeypatch):
    shown = []

    def noting(request):
        shown.append([request.source_images, request.history_frames, request.kept_frames])
        raise KeyboardInterrupt

    monkeypatch.setattr(pipe, "_draw", noting)
    more = dict(task="continuation", source_caption="A.") if name == "source_image" else {}
    for kind, picture in kinds(tmp_path).items():
        value = {"source_image": picture, "history_frames": [picture, picture]}
        with pytest.raises(KeyboardInterrupt), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tell(pipe, **more, **{name: value.get(name, [picture])}, output_type="pil")
        rows = [rows for rows in shown.pop() if rows]
        for read in rows[0][0]:
            assert read.mode == "RGB" and read.size == (64, 64), kind
            np.testing.assert_array_equal(np.asarray(read), np.asarray(PICTURES[0]), kind)


def test_grey_palette_and_deep_pictures_are_read(pipe):
    deep = Image.fromarray(np.full((64, 64), 40000, np.uint16))
    for picture in (PICTURES[0].convert("P"), PICTURES[0].convert("L"), deep):
        tell(pipe, task="continuation", source_image=picture, source_caption="A.")


def test_what_came_out_goes_in_again(pipe):
    for form in ("np", "pt"):
        frames = pipe(TWO, generator=seeded(1), num_inference_steps=2, output_type=form).frames
        again = tell(pipe, history_frames=frames)
        assert torch.equal(again, tell(pipe))
        pipe(TWO, num_inference_steps=1, kept_frames=frames[0, :1], output_type=form)


def test_a_crop_is_said_once(pipe):
    warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for width in (80, 90):
            wide = np.zeros((64, width, 3), np.uint8)
            tell(pipe, history_frames=[wide, wide])
    assert len([w for w in said if "history_frames is not square" in str(w.message)]) == 1


@pytest.mark.parametrize("wrong", [7, b"x", np.zeros((64, 64, 5)), np.full((4, 4), np.nan), [[7]]])
def test_what_is_no_picture_is_named(pipe, wrong):
    with pytest.raises(ValueError, match="source_image"):
        tell(pipe, task="continuation", source_image=wrong, source_caption="A.")


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "wrong",
    [dict(num_inference_steps=value) for value in (0, -1, 1.5, "20", True, 2000)]
    + [dict(guidance_scale=value) for value in (float("nan"), "7", float("inf"), [2])]
    + [dict(generator=value) for value in (0, "0", [0], [seeded(1), seeded(2)])],
    ids=lambda wrong: re.sub("object at 0x[0-9a-f]+", "", str(wrong)),  # the same in every worker
)
def test_a_wrong_argument_is_named_before_anything_is_computed(pipe, wrong, monkeypatch):
    [(name, value)] = wrong.items()
    monkeypatch.setattr(pipe, "_draw", lambda request: pytest.fail("it was drawn"))
    with pytest.raises(ValueError, match=name):
        tell(pipe, **wrong)


def test_captions_are_any_sequence_of_strings(pipe):
    plain = tell(pipe)
    for prompt in (tuple(TWO), np.array(TWO), np.array(TWO, object), np.array([TWO])):
        assert torch.equal(tell(pipe, prompt), plain)
    for wrong in ([1, 2], [TWO, 3], [], [[]], "A.", None, {"A.": 1}, 7, [b"A."]):
        with pytest.raises(ValueError, match="prompt"):
            tell(pipe, wrong)


# ---------------------------------------------------------------- several given frames


def test_several_given_frames_are_earlier_frames(pipe):
    "A story that goes on from two frames is the end of a story that keeps them."
    captions = STORIES[0].captions[:4]
    request = dict(num_inference_steps=2, history_policy="full", output_type="pt")
    whole = pipe(captions, kept_frames=PICTURES[:2], generator=seeded(1), **request).frames[0]
    noise = torch.randn(4, 8, 8, 8, generator=seeded(1))

    def shift(shape, n_stories, generator, device):
        return noise[None, 2:]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("causal_story.pipeline.story_noise", shift)
        rest = pipe(
            captions[2:],
            "continuation",
            source_image=PICTURES[:2],
            source_caption=captions[:2],
            **request,
        ).frames[0]
    torch.testing.assert_close(whole[2:], rest, atol=2 / 255, rtol=0)


def test_given_frames_of_several_stories(pipe):
    "The same alone and together; all are seen, also outside a window; the table of times ends."
    one = dict(task="continuation", history_policy="local", window=1)
    given = [story.frames(64)[:3] for story in STORIES]
    told = [story.captions[:3] for story in STORIES]
    prompts = [story.captions[3:5] for story in STORIES]
    generators = [seeded(1), seeded(2)]
    both = tell(pipe, prompts, source_image=given, source_caption=told, generator=generators, **one)
    alone = tell(
        pipe, prompts[1], source_image=given[1], source_caption=told[1], generator=seeded(2), **one
    )
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=1e-4)
    other = [[*given[1][::-1]]]
    moved = tell(
        pipe, prompts[1], source_image=other, source_caption=told[1], generator=seeded(2), **one
    )
    assert (moved - alone).abs()[0, 1].max() > 1e-4
    with pytest.raises(ValueError, match="at most 9 frames"):
        tell(pipe, TWO, source_image=PICTURES[:1] * 8, source_caption=["A."] * 8, **one)
    with pytest.raises(ValueError, match="source_image"):
        tell(pipe, prompts, source_image=[given[0], given[1][:2]], source_caption=told, **one)


# ---------------------------------------------------------------- schedulers


def on(pipe, scheduler, **options):
    "The same parts with another scheduler."
    return CausalStoryPipeline(
        **pipe.components | dict(scheduler=scheduler.from_config(pipe.scheduler.config, **options)),
        **pipe.settings,
    )


STOCHASTIC = {
    "ddpm": (diffusers.DDPMScheduler, {}),
    "ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "ancestral2": (diffusers.KDPM2AncestralDiscreteScheduler, {}),
    "sde": (diffusers.DPMSolverMultistepScheduler, dict(algorithm_type="sde-dpmsolver++")),
    "lcm": (diffusers.LCMScheduler, {}),
    "sa": (diffusers.SASolverScheduler, {}),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_same_seed_gives_the_same_picture_alone_and_in_a_batch(pipe, name):
    kind, options = STOCHASTIC[name]
    other = on(pipe, kind, clip_sample=False, **options)
    other.set_progress_bar_config(disable=True)
    both = tell(other, [c[:2] for c in CAPTIONS], generator=[seeded(1), seeded(2)])
    again = tell(other, CAPTIONS[1][:2], generator=seeded(2))
    torch.testing.assert_close(both[1:], again, atol=1e-3, rtol=1e-3)
    assert torch.equal(again, tell(other, CAPTIONS[1][:2], generator=seeded(2)))


def test_a_kept_frame_changes_no_noise_of_a_later_one(pipe):
    other = on(pipe, diffusers.DDPMScheduler, clip_sample=False)
    other.set_progress_bar_config(disable=True)
    fast = dict(num_inference_steps=2, generator=seeded(1))
    whole = other(TWO, **fast).frames[0]
    rest = other(TWO, kept_frames=whole[:1], **fast | dict(generator=seeded(1))).frames[0]
    difference = np.asarray(whole[1], int) - np.asarray(rest[1], int)
    assert abs(difference).max() <= 1


@pytest.mark.parametrize(
    "name",
    ["Heun", "LMS", "DEISMultistep", "KDPM2", "DPMSolverSinglestep", "UniPCMultistep", "TCD"],
)
def test_schedulers_of_many_kinds_draw(pipe, name):
    name = name if hasattr(diffusers, f"{name}Scheduler") else f"{name}Discrete"
    other = on(pipe, getattr(diffusers, f"{name}Scheduler"))
    other.set_progress_bar_config(disable=True)
    assert tell(other).isfinite().all()


@pytest.mark.parametrize(
    "name",
    ["FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "EDMEuler", "EDMDPMSolverMultistep"]
    + ["DDIMInverse", "RePaint", "IPNDM", "CMStochasticIterative"],
)
def test_a_scheduler_that_cannot_work_is_refused(name):
    pipe = make_pipe()
    pipe.scheduler = getattr(diffusers, f"{name}Scheduler")()
    with pytest.raises(ValueError, match=f"{name}.*ddim, ddpm, dpm, euler"):
        tell(pipe)


# ---------------------------------------------------------------- as in StableDiffusionPipeline


def test_a_negative_prompt_takes_the_place_of_the_empty_caption(pipe):
    plain = tell(pipe)
    torch.testing.assert_close(tell(pipe, negative_prompt=""), plain)
    one = tell(pipe, negative_prompt="Kiki sleeps.")
    assert (one - plain).abs().amax((0, 2, 3, 4)).min() > 1e-4
    assert torch.equal(one, tell(pipe, negative_prompt=["Kiki sleeps."] * 2))
    second = tell(pipe, negative_prompt=["", "Kiki sleeps."])
    torch.testing.assert_close(second[0, 0], plain[0, 0])
    assert (second[0, 1] - plain[0, 1]).abs().max() > 1e-4
    unguided = dict(guidance_scale=1)
    assert torch.equal(tell(pipe, **unguided), tell(pipe, negative_prompt="A.", **unguided))
    for wrong in (["A."] * 3, [["A."]], 7, [1, 2]):
        with pytest.raises(ValueError, match="negative_prompt"):
            tell(pipe, negative_prompt=wrong)


def test_several_tellings_of_one_story(pipe):
    generators = [seeded(1), seeded(2)]
    both = tell(pipe, num_images_per_prompt=2, generator=generators, negative_prompt="Night.")
    assert both.shape[:2] == (2, 2)
    alone = tell(pipe, generator=seeded(2), negative_prompt="Night.")
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=1e-4)
    assert not torch.equal(*tell(pipe, num_images_per_prompt=2))
    for wrong in (0, 1.5, "2"):
        with pytest.raises(ValueError, match="num_images_per_prompt"):
            tell(pipe, num_images_per_prompt=wrong)


def test_only_the_size_that_the_unet_was_made_for(pipe):
    assert torch.equal(tell(pipe, height=64, width=64), tell(pipe))
    for wrong in (dict(height=128), dict(width=32), dict(height="64")):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            tell(pipe, **wrong)


def test_steps_by_name(pipe):
    other = on(pipe, diffusers.EulerDiscreteScheduler)
    other.set_progress_bar_config(disable=True)
    usual = tell(other)
    assert torch.equal(tell(other, timesteps=other.scheduler.timesteps.tolist()), usual)
    sigmas = other.scheduler.sigmas[:-1].tolist()
    torch.testing.assert_close(tell(other, sigmas=sigmas), usual, atol=0.1, rtol=0)
    with pytest.raises(ValueError, match="sigmas"):
        tell(pipe, sigmas=sigmas)  # DDIM takes none
    for wrong in ([1, 900], [], "fast"):
        with pytest.raises(ValueError, match="timesteps"):
            tell(other, timesteps=wrong)


def test_eta_is_the_noise_of_ddim(pipe):
    assert torch.equal(tell(pipe, eta=0.0), tell(pipe))
    noisy = tell(pipe, eta=1.0)
    assert not torch.equal(noisy, tell(pipe))
    assert torch.equal(noisy, tell(pipe, eta=1.0))
    with pytest.raises(ValueError, match="eta.*ddim"):
        tell(on(pipe, diffusers.EulerDiscreteScheduler), eta=1.0)
    with pytest.raises(ValueError, match="eta"):
        tell(pipe, eta=2)


def test_a_callback_gets_the_tensors_that_it_names(pipe):
    names = []

    def note(pipe, step, t, state):
        names.append(sorted(state))

    both = ["latents", "prediction"]
    tell(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=both)
    tell(pipe, callback_on_step_end=note)
    assert names == [["frame", *both]] * 4 + [["frame", "latents"]] * 4
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs.*prompt_embeds"):
        tell(pipe, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    with pytest.raises(ValueError, match="guidance_interval"):
        tell(pipe, callback_on_step_end=diffusers.callbacks.SDCFGCutoffCallback())


def test_a_story_can_be_stopped(pipe):
    def stop(pipe, step, t, state):
        pipe._interrupt = state["frame"] == 1

    story = pipe(
        CAPTIONS, generator=[seeded(1), seeded(2)], callback_on_step_end=stop, num_inference_steps=3
    )
    assert [len(frames) for frames in story.frames] == [2, 2]
    assert pipe.interrupt
    whole = pipe(CAPTIONS, generator=[seeded(1), seeded(2)], num_inference_steps=3)
    assert [len(frames) for frames in whole.frames] == [3, 3]
    assert np.array_equal(story.frames[0][0], whole.frames[0][0])
    assert not np.array_equal(story.frames[0][1], whole.frames[0][1])


# ---------------------------------------------------------------- captions


def test_a_caption_that_is_too_long_is_named_once(pipe):
    warn_once.cache_clear()
    long = "Milo jumps at the beach. " * 5 + "Kiki reads."
    texts = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            tell(pipe, ["Milo jumps.", long])
        texts += [str(w.message) for w in said if "tokens" in str(w.message)]
    [text] = texts
    assert repr(long) in text
    assert "kiki reads" in text.split("is cut to 24")[1]


def test_half_a_letter_is_no_error(pipe):
    assert tell(pipe, ["Milo \ud83d jumps.", "A."]).isfinite().all()


# ---------------------------------------------------------------- loading, moving, compiling


def said_by_diffusers(caplog) -> list:
    return [record.getMessage() for record in caplog.records if record.name.startswith("diffusers")]


def test_precision_variant_and_device(tmp_path, caplog):
    diffusers.utils.logging.enable_propagation()
    caplog.set_level("WARNING")
    options = dict(variant="fp16", device_map="cpu", use_safetensors=True)
    pipe = CausalStoryPipeline.from_pretrained("miniature", torch_dtype=torch.bfloat16, **options)
    assert {pipe.unet.dtype, pipe.adapters.dtype, pipe.vae.dtype} == {torch.bfloat16}
    by_part = dict(unet=torch.bfloat16, default=torch.float32)
    pipe = CausalStoryPipeline.from_pretrained("miniature", torch_dtype=by_part)
    assert [pipe.unet.dtype, pipe.vae.dtype] == [torch.bfloat16, torch.float32]

    whole = make_pipe()
    whole.save_pretrained(tmp_path / "whole", variant="fp16")
    options = dict(variant="fp16", device_map="cpu")
    again = CausalStoryPipeline.from_pretrained(tmp_path / "whole", dtype=torch.float32, **options)
    torch.testing.assert_close(tell(again), tell(whole), atol=1e-4, rtol=1e-4)
    whole.to(torch.bfloat16)
    assert tell(whole).dtype == torch.bfloat16
    diffusers.utils.logging.disable_propagation()
    assert not [text for text in said_by_diffusers(caplog) if "float32" in text]


def test_half_precision_draws_the_same_story():
    "The shipped model in bfloat16: the same picture, a little rougher; no noise."
    pipes = [
        CausalStoryPipeline.from_pretrained("miniature", torch_dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    frames = []
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        drawn = pipe(TWO[:1], generator=seeded(1), num_inference_steps=4, output_type="np").frames
        frames.append(drawn)
    assert np.abs(frames[0] - frames[1]).mean() < 0.03


@pytest.mark.parametrize("way", ["torch.compile", "unet.compile"])
def test_a_compiled_unet_draws_the_same(way, tmp_path):
    "Tracing the U-Net takes half a minute: one frame, one step."
    pipe = make_pipe()
    once = dict(num_inference_steps=1, guidance_scale=1, prompt=TWO[:1])
    plain = tell(pipe, **once)
    if way == "unet.compile":
        pipe.unet.compile(backend="eager")
    else:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    torch.testing.assert_close(tell(pipe, **once), plain)
    pipe.save_pretrained(tmp_path)
    again = CausalStoryPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(tell(again, **once), plain)


def test_nobody_takes_the_adapters_away_in_silence():
    for take in (
        lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
        lambda pipe: pipe.unet.fuse_qkv_projections(),
        lambda pipe: pipe.unet.set_attention_slice("auto"),
    ):
        pipe = make_pipe()
        plain = tell(pipe)
        take(pipe)
        with pytest.raises(ValueError, match="set_attn_processor.*attach_adapters"):
            tell(pipe)
        if getattr(pipe.unet, "original_attn_processors", None):
            pipe.unet.unfuse_qkv_projections()
        attach_adapters(pipe.unet, pipe.adapters)
        torch.testing.assert_close(tell(pipe), plain)


# ---------------------------------------------------------------- what others have trained


def lora_file(pipe, folder, kind) -> str:
    """A small file of a real layout, with everything that the published ones hold.

    "kohya": as Civitai's styles and characters have it, U-Net and text encoder, with alphas. "lcm":
    as LCM-LoRA, the U-Net's convolutions too. "peft": as diffusers' training scripts write it."""
    ends = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
    if kind == "lcm":
        ends += ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
        ends += ("time_emb_proj",)
    words = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    parts = [("unet", "lora_unet_", pipe.unet, ends)]
    if kind != "lcm":
        parts.append(("text_encoder.text_model", "lora_te_text_model_", pipe.text_encoder, words))
    weights, generator = {}, seeded(0)
    for part, prefix, module, ends in parts:
        for site, layer in module.named_modules():
            if not site.endswith(ends) or not hasattr(layer, "weight"):
                continue
            n_out, *n_in = layer.weight.shape
            down = torch.randn(4, *n_in, generator=generator) * 0.1
            up = torch.randn(n_out, 4, *[1] * (len(n_in) - 1), generator=generator) * 0.1
            if kind == "peft":
                weights[f"{part}.{site}.lora_A.weight"] = down
                weights[f"{part}.{site}.lora_B.weight"] = up
            else:
                name = prefix + site.replace(".", "_")
                weights |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
                weights[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(weights, folder / f"{kind}.safetensors")
    return f"{kind}.safetensors"


@pytest.fixture(scope="module")
def plain(as_if_tuned):
    "Latents of the shipped base with adapters that do something."
    return tell(as_if_tuned())


@pytest.mark.parametrize("kind", ["kohya", "lcm", "peft"])
def test_a_lora_works_beside_the_adapters_and_comes_back(as_if_tuned, plain, tmp_path, kind):
    pipe = as_if_tuned()
    pipe.load_lora_weights(tmp_path, weight_name=lora_file(pipe, tmp_path, kind), adapter_name="a")
    full = tell(pipe)
    assert (full - plain).abs().max() > 1e-2
    pipe.set_adapters("a", 0.5)
    half = tell(pipe)
    assert (full - half).abs().max() > 1e-3
    for only_tuned in (False, True):
        pipe.save_pretrained(tmp_path / "stored", only_tuned=only_tuned)
        again = CausalStoryPipeline.from_pretrained(tmp_path / "stored")
        again.set_progress_bar_config(disable=True)
        torch.testing.assert_close(tell(again), half, atol=2e-3, rtol=1e-3)
        assert again.get_active_adapters() == (["a"] if only_tuned else [])
    assert not (tmp_path / "stored" / "unet").exists()  # the base, the LoRA and our adapters
    again.unload_lora_weights()
    torch.testing.assert_close(tell(again), plain, atol=1e-4, rtol=1e-4)


def test_a_lora_that_is_weaker_in_some_layers_comes_back_so(as_if_tuned, tmp_path):
    pipe = as_if_tuned()
    pipe.load_lora_weights(
        tmp_path, weight_name=lora_file(pipe, tmp_path, "peft"), adapter_name="a"
    )
    whole = tell(pipe)
    pipe.set_adapters("a", dict(unet=dict(down=0.9, mid=0.9, up=0.1)))
    weaker = tell(pipe)
    assert (whole - weaker).abs().max() > 1e-2
    pipe.save_pretrained(tmp_path / "stored", only_tuned=True)
    again = CausalStoryPipeline.from_pretrained(tmp_path / "stored")
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(tell(again), weaker, atol=2e-3, rtol=1e-3)


def test_a_lora_that_is_switched_off_is_not_stored(as_if_tuned, plain, tmp_path):
    pipe = as_if_tuned()
    file = lora_file(pipe, tmp_path, "kohya")
    pipe.load_lora_weights(tmp_path, weight_name=file, adapter_name="a")
    pipe.disable_lora()
    torch.testing.assert_close(tell(pipe), plain, atol=1e-4, rtol=1e-4)
    pipe.save_pretrained(tmp_path / "stored")
    again = CausalStoryPipeline.from_pretrained(tmp_path / "stored")
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(tell(again), plain, atol=1e-4, rtol=1e-4)


def test_lcm_lora_draws_in_four_steps_without_guidance(as_if_tuned, tmp_path):
    pipe = as_if_tuned()
    pipe.load_lora_weights(tmp_path, weight_name=lora_file(pipe, tmp_path, "lcm"))
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    request = dict(num_inference_steps=4, guidance_scale=1)
    both = tell(pipe, [c[:2] for c in CAPTIONS], generator=[seeded(1), seeded(2)], **request)
    alone = tell(pipe, CAPTIONS[1][:2], generator=seeded(2), **request)
    torch.testing.assert_close(both[1:], alone, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["diffusers", "automatic1111", "several tokens"])
def test_a_textual_inversion_is_a_word_and_comes_back(as_if_tuned, tmp_path, kind):
    pipe = as_if_tuned()
    width = pipe.text_encoder.config.hidden_size
    rows = torch.randn(2 if kind == "several tokens" else 1, width, generator=seeded(0))
    if kind == "automatic1111":
        path = tmp_path / "hat.pt"
        about = dict(string_to_token={"*": 265}, name="hat", step=1, sd_checkpoint=None)
        torch.save(about | dict(string_to_param={"*": rows}, sd_checkpoint_name=None), path)
        pipe.load_textual_inversion(path, token="<hat>")
    elif kind == "diffusers":
        save_file({"<hat>": rows[0]}, tmp_path / "hat.safetensors")
        pipe.load_textual_inversion(tmp_path / "hat.safetensors")
    else:
        save_file({"emb_params": rows}, tmp_path / "hat.safetensors")
        pipe.load_textual_inversion(tmp_path / "hat.safetensors", token="<hat>")
    [ids], _ = pipe.tokens(pipe.tokenizer, [["Milo wears a <hat>."]])
    states = pipe.text_encoder.get_input_embeddings().weight[ids[0]]
    assert sum(bool((states == row).all(-1).any()) for row in rows) == len(rows)
    story = ["Milo wears a <hat>.", "He jumps."]
    drawn = tell(pipe, story)
    for only_tuned in (False, True):
        pipe.save_pretrained(tmp_path / "stored", only_tuned=only_tuned)
        again = CausalStoryPipeline.from_pretrained(tmp_path / "stored")
        again.set_progress_bar_config(disable=True)
        torch.testing.assert_close(tell(again, story), drawn, atol=2e-3, rtol=1e-3)


def test_sample_starts_from_several_frames(tmp_path, monkeypatch):
    write_folder(dict(test=STORIES[:1]), tmp_path / "raw", size=64)
    data = convert_folder(tmp_path / "raw", tmp_path / "stories.h5", progress=False)
    calls = []

    class Pipe:
        def __call__(self, prompt, **options):
            calls.append((prompt, options["source_caption"], len(options["source_image"][0])))
            return SimpleNamespace(frames=[PICTURES[:2]])

    monkeypatch.setattr(cli, "load_model", lambda *_: Pipe())
    words = ["sample", "miniature", str(data), "--task", "continuation", "--given"]
    assert cli.main([*words, "3", "--out", str(tmp_path / "a.png")]) == 0
    captions = STORIES[0].captions
    assert calls == [([captions[3:]], [captions[:3]], 3)]
    assert cli.main([*words, "5"]) == 1
    assert cli.main([*words, "2", "--folder", str(tmp_path / "b")]) == 1


def test_a_single_file_is_a_base(world, tmp_path):
    "The published layout of one file, with the configuration of a folder: the same parts."
    path = single_file(world.sd, tmp_path / "v1-5.safetensors")
    options = dict(config=world.sd)
    pipe, other = (
        small(world),
        CausalStoryPipeline.from_base(
            path, blip=world.blip, words=["milo"], max_length=24, image_size=32, config=world.sd
        ),
    )
    prints = "fingerprints"
    assert other.config.base[prints] == pipe.config.base[prints]
    other.set_progress_bar_config(disable=True)
    once = dict(num_inference_steps=1, generator=seeded(1), output_type="latent")
    drawn = other(["milo jumps."], **once).frames
    other.save_pretrained(tmp_path / "tuned", only_tuned=True)
    again = CausalStoryPipeline.from_pretrained(
        tmp_path / "tuned", base=path, blip=world.blip, **options
    )
    once["generator"] = seeded(1)
    torch.testing.assert_close(again(["milo jumps."], **once).frames, drawn)

    weights = load_file(path)
    weights.pop("model.diffusion_model.out.2.weight")
    save_file(weights, path)
    with pytest.raises(ValueError, match="v1-5.safetensors"):
        CausalStoryPipeline.from_base(path, blip=world.blip, **options)


# ------------------------------------------------ what a user of diffusers types first


def test_images_are_all_frames_in_a_row():
    pipe = make_pipe()
    two = [TWO, TWO[::-1]]
    found = pipe(two, num_inference_steps=1, generator=seeded(0))
    assert found.images == [*found.frames[0], *found.frames[1]]
    found = pipe(two, num_inference_steps=1, output_type="pt")
    assert found.images.shape == (4, 3, 64, 64)


def test_arguments_of_other_pipelines_are_answered():
    pipe = make_pipe()
    for name, hint in (
        ("seed", "generator="),
        ("image", "source_image"),
        ("strength", "kept_frames"),
        ("latents", "generator"),
        ("callback", "callback_on_step_end"),
        ("cross_attention_kwargs", "set_adapters"),
        ("nonsense", "help"),
    ):
        with pytest.raises(TypeError, match=f"'{name}'.*{hint}"):
            pipe(TWO, **{name: 1})
    assert set(INSTEAD).isdisjoint(inspect.signature(pipe.__call__).parameters)
    given = dict(source_image=Image.new("RGB", (64, 64)), source_caption="Milo waves.")
    for name in given:
        with pytest.raises(ValueError, match="task='continuation'"):
            pipe(TWO, **{name: given[name]})
    with pytest.raises(ValueError, match="one string"):
        pipe("Milo waves.")


def test_methods_of_other_pipelines_are_answered(monkeypatch):
    pipe = make_pipe()
    for name, hint in (("encode_prompt", "read_captions"), ("load_ip_adapter", "source_image")):
        assert not hasattr(pipe, name)
        with pytest.raises(AttributeError, match=f"there is no {name} here: write .*{hint}"):
            getattr(pipe, name)
    with pytest.raises(AttributeError, match="nonsense"):
        pipe.nonsense
    asked = []
    monkeypatch.setattr(CausalStoryPipeline, "from_base", lambda *a, **k: asked.append((a, k)))
    CausalStoryPipeline.from_single_file("v1-5.safetensors", seed=1)
    assert asked == [(("v1-5.safetensors",), dict(seed=1))]


def test_what_saves_memory_elsewhere_changes_nothing():
    pipe = make_pipe()
    plain = tell(pipe)
    with pytest.warns(UserWarning, match="attention slicing changes nothing"):
        pipe.enable_attention_slicing()
    torch.testing.assert_close(tell(pipe), plain)
    with pytest.warns(UserWarning, match="xformers changes nothing"):
        pipe.set_use_memory_efficient_attention_xformers(True)
    pipe.disable_attention_slicing()
    torch.testing.assert_close(tell(pipe), plain)


def test_a_callback_ends_guidance_as_in_diffusers():
    pipe = make_pipe()
    once = dict(num_inference_steps=4, output_type="latent")
    seen = []

    def stop(pipe, step, timestep, tensors):
        seen.append((pipe.guidance_scale, pipe.num_timesteps))
        pipe._guidance_scale = 0.0
        return tensors

    def draw(**more):
        return pipe(TWO, generator=seeded(0), **once, **more).frames

    stopped = draw(guidance_scale=5.0, callback_on_step_end=stop)
    assert seen[0] == (5.0, 4) and set(seen[1:]) == {(0.0, 4)}
    assert not torch.equal(stopped, draw(guidance_scale=5.0))
    alone = draw(guidance_scale=1.0)
    assert torch.equal(alone, draw(guidance_scale=0.0)) and not torch.equal(stopped, alone)


def test_pipelines_of_other_kinds_and_options_of_the_hub(tmp_path):
    pipe = make_pipe()
    same = CausalStoryPipeline.from_pipe(pipe)
    torch.testing.assert_close(tell(same), tell(pipe))
    index = dict(_class_name="StableDiffusionPipeline", unet=["diffusers", "UNet2DConditionModel"])
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="StableDiffusionPipeline.*from_base"):
        CausalStoryPipeline.from_pretrained(tmp_path)
    options = dict(cache_dir=tmp_path, revision="main", token=None, safety_checker=None)
    CausalStoryPipeline.from_pretrained("miniature", **options)
    for wrong in ("auto", "float16"):
        with pytest.raises(ValueError, match="torch.float16"):
            CausalStoryPipeline.from_pretrained("miniature", torch_dtype=wrong)
