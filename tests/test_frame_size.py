"""Another resolution: through base, cache, training, drawing, storing, costs and command line."""

import pytest
import torch
from PIL import Image
from published import small

from causal_story.cli import main
from causal_story.costs import full_size_parts
from causal_story.data import StoryDataset
from causal_story.features import cache_settings
from causal_story.pipeline import CausalStoryPipeline
from causal_story.recipes import find_recipe
from causal_story.storage import read_json
from causal_story.training import TrainingConfig
from causal_story.tuning import prepare_tuning, tune

STEPS = TrainingConfig(steps=1, batch_size=1, warmup_steps=1, checkpoint_every=0)


def sizes(pipe) -> set:
    "Of the frames that a pipeline draws."
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(["Milo waves.", "He jumps."], num_inference_steps=1).frames[0]
    return {frame.size for frame in frames}


@pytest.mark.parametrize("size", [32, 48])
def test_a_size_goes_through_training_drawing_and_storing(world, tmp_path, size):
    pipe = small(world, frame_size=size)
    tune(pipe, world.data, config=STEPS, progress=False)
    assert pipe.frame_size == size and sizes(pipe) == {(size, size)}
    pipe.save_pretrained(tmp_path / "whole")
    pipe.save_pretrained(tmp_path / "tuned", only_tuned=True)
    for again in (
        CausalStoryPipeline.from_pretrained(tmp_path / "whole"),
        CausalStoryPipeline.from_pretrained(tmp_path / "tuned", base=world.sd, blip=world.blip),
    ):
        assert again.frame_size == size and sizes(again) == {(size, size)}


def test_caches_of_two_sizes_are_two(world):
    dataset = StoryDataset(world.data, "train")
    found = []
    for size in (32, 64):
        pipe = small(world, frame_size=size)
        prepare_tuning(pipe, find_recipe(size="full"))
        found.append(cache_settings(pipe.model, dataset, pipe.collator()))
    assert {key for key in found[0] if found[0][key] != found[1][key]} == {"frame_size"}


@pytest.mark.parametrize("size", [0, -16, 8, 40, 64.0, "64", True])
def test_a_size_that_cannot_be_halved_is_refused(world, size):
    with pytest.raises(ValueError, match="frame_size=.*multiple of 16 pixels"):
        small(world, frame_size=size)


def test_full_size_takes_multiples_of_64():
    sides = {n: full_size_parts(frame_size=n)["unet"].config.sample_size for n in (256, 384, 512)}
    assert sides == {256: 32, 384: 48, 512: 64}
    with pytest.raises(ValueError, match="a multiple of 64 pixels"):
        full_size_parts(frame_size=300)


def test_what_a_size_costs_is_what_a_model_of_that_size_does(world):
    "The U-Net of a pipeline reads latents of the size that the counts are made for."
    pipe, seen = small(world, frame_size=32), []
    pipe.unet.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[-1]))
    sizes(pipe)
    assert set(seen) == {pipe.unet.config.sample_size} == {4}


def test_an_old_record_has_the_size_of_its_base(root):
    folder = root / "nbs" / "results" / "6000_steps" / "weighted-0"
    assert "frame_size" not in read_json(folder / "tuned.json", dict)
    assert CausalStoryPipeline.from_pretrained(folder).frame_size == 64


def test_the_command_line_takes_a_size(world, tmp_path, capsys):
    model = ["--blip", str(world.blip), "--image-size", "32", "--frame-size", "32"]
    settings = ["--steps", "1", "--batch-size", "1", "--warmup-steps", "1"]
    out = str(tmp_path / "tuned")
    assert main(["cache", str(world.sd), str(world.data), *model]) == 0
    assert main(["train", str(world.sd), str(world.data), out, *settings, *model]) == 0
    drawn = ["--split", "train", "--num-inference-steps", "1", "--folder"]
    assert main(["sample", out, str(world.data), *drawn, str(tmp_path / "as_trained")]) == 0
    larger = [*drawn, str(tmp_path / "larger"), "--frame-size", "48"]
    assert main(["sample", out, str(world.data), *larger, "--story", "0"]) == 0
    assert read_json(tmp_path / "larger" / "drawn.json")["frame_size"] == 48
    pictures = {}
    for name in ("as_trained", "larger"):
        first = next((tmp_path / name).rglob("*.png"))
        pictures[name] = Image.open(first).size
    assert pictures == {"as_trained": (32, 32), "larger": (48, 48)}
    capsys.readouterr()
    assert main(["sample", out, str(world.data), "--frame-size", "40", *drawn, out + "x"]) == 1
    assert "a multiple of 16 pixels" in capsys.readouterr().err


def test_the_same_weights_draw_the_same_at_their_own_size(world):
    "Asking for the size that a base has changes nothing."
    generator = torch.Generator()
    drawn = []
    for options in ({}, dict(frame_size=64)):
        pipe = small(world, **options)
        pipe.set_progress_bar_config(disable=True)
        call = dict(num_inference_steps=1, output_type="pt", generator=generator.manual_seed(0))
        drawn.append(pipe(["Milo waves."], **call).frames)
    assert torch.equal(*drawn)
