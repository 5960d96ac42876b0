"""Tiny folders of the published layouts, and a data set, for the tests at full size."""

import re
import shutil
from collections import namedtuple
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from causal_story.data import StoryDataset
from causal_story.full_scale import write_tiny_folders
from causal_story.pipeline import CausalStoryPipeline
from causal_story.raw import convert_folder, write_folder
from causal_story.recipes import find_recipe
from causal_story.storyworld import make_stories
from causal_story.training import list_checkpoints, load_checkpoint
from causal_story.tuning import prepare_tuning
from causal_story.words import story_words

World = namedtuple("World", "folder sd blip data")


def make_world(folder: Path) -> World:
    "Folders of Stable Diffusion and BLIP, and stories of three and of five frames."
    stories = [*make_stories(3, seed=1), *make_stories(3, seed=2, n_frames=3)]
    captions = [caption for story in stories for caption in story.captions]
    sd, blip = write_tiny_folders(folder / "tiny", captions + ["dinosaur talks to friends"])
    write_folder(dict(train=stories), folder / "raw", size=64)
    data = convert_folder(folder / "raw", folder / "stories.h5", progress=False)
    return World(folder, sd, blip, data)


def small(world, recipe="causal-story", **options) -> CausalStoryPipeline:
    "A pipeline on the tiny folders; they count as full size."
    options = dict(words=["milo"], max_length=24, image_size=32) | options
    return CausalStoryPipeline.from_base(world.sd, recipe, blip=world.blip, **options)


def taught(world, dataset, recipe="causal-story") -> CausalStoryPipeline:
    "A pipeline that has learned the words of a published data set."
    words, max_length = story_words(dataset)
    return small(world, recipe, words=words, max_length=max_length)


def parts_of_training(world, recipe="causal-story"):
    "A model set to train, its data and its collator."
    pipe = prepare_tuning(small(world, recipe), find_recipe(recipe, "full"))
    return pipe.model.eval(), StoryDataset(world.data, "train"), pipe.collator()


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def single_file(sd: Path, out: Path) -> Path:
    "A tiny Stable Diffusion as one .safetensors, under the names that the published files have."
    inside = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    outside = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.resnets.1": "middle_block.2",
    }
    for i in range(2):  # two levels of one layer (down) and two (up)
        outside[f"down_blocks.{i}.resnets.0"] = f"input_blocks.{2 * i + 1}.0"
        outside[f"down_blocks.{i}.attentions.0"] = f"input_blocks.{2 * i + 1}.1"
        outside[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{2 * i + 2}.0.op"
        for j in range(2):
            outside[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{2 * i + j}.0"
            outside[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{2 * i + j}.1"
        outside[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{2 * i + 1}.2.conv"
    weights = {}
    for name, value in load_file(sd / "unet" / "diffusion_pytorch_model.safetensors").items():
        start = next(key for key in outside if name.startswith(key + "."))
        rest = name.removeprefix(start)
        if "resnets" in start:
            part = next(key for key in inside if rest.startswith(f".{key}."))
            rest = rest.replace(part, inside[part])
        weights[f"model.diffusion_model.{outside[start]}{rest}"] = value
    for name, value in load_file(sd / "vae" / "diffusion_pytorch_model.safetensors").items():
        name = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{3 - int(match[1])}", name)
        name = name.replace("down_blocks.", "down.").replace("mid_block.resnets.", "mid.block_")
        name = name.replace("mid.block_1", "mid.block_2").replace("mid.block_0", "mid.block_1")
        name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("resnets", "block")
        name = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if "attn_1" in name:
            name = name.replace("group_norm", "norm").replace("to_out.0", "proj_out")
            name = re.sub(r"to_([qkv])", r"\1", name)
            value = value[..., None, None] if value.ndim == 2 else value  # convolutions of 1x1
        weights[f"first_stage_model.{name}"] = value
    for name, value in load_file(sd / "text_encoder" / "model.safetensors").items():
        name = name if name.startswith("text_model.") else f"text_model.{name}"
        weights[f"cond_stage_model.transformer.{name}"] = value
    save_file({name: value.contiguous() for name, value in weights.items()}, out)
    return out


def assert_trained_alike(one: Path, two: Path):
    """Two runs have seen the same gradients, and their weights went the same way.

    Adam's moments are compared, tensor by tensor, to 1e-4 of their size or 1e-6 of them all: they
    follow the gradients smoothly. Its weights do not. Where a gradient is zero but for rounding
    (softmax ignores the bias of a key), Adam makes a whole step of that rounding, whose direction
    depends on the order of the sums and so on the processor. Weights are compared as one vector.
    """
    (one, _), (two, _) = (load_checkpoint(list_checkpoints(run)[-1]) for run in (one, two))
    assert one.keys() == two.keys()
    for ending in ("/exp_avg", "/exp_avg_sq"):
        names = [name for name in one if name.endswith(ending)]
        total = torch.stack([one[name].norm() for name in names]).norm()
        assert names and total > 0
        for name in names:
            apart, size = (one[name] - two[name]).norm(), one[name].norm()
            assert apart <= 1e-4 * max(size, 1e-2 * total), (name, float(apart), float(size))
    for kind in ("model/", "ema/"):
        names = [name for name in one if name.startswith(kind)]
        assert_near([one[name] for name in names], [two[name] for name in names])


def assert_near(ones, others):
    "All these tensors together, as one vector each."
    one, other = (torch.cat([tensor.flatten() for tensor in each]) for each in (ones, others))
    assert (one - other).norm() <= 1e-5 * one.norm()
