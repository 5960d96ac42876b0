"""Draws pretraining.png, captions drawn by the base at several steps of its pre-training:

    python nbs/images/pretraining.py CHECKPOINTS

CHECKPOINTS is a folder of step-XXXXXXXX.safetensors, copies of the text_to_image checkpoints of a
run of `causal-story pretrain`.
The autoencoder, the tokenizer and the last row are those that come with the package.
"""

import random
import sys
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
from PIL import Image
from safetensors.torch import load_file

from causal_story.captions import describe
from causal_story.cartoon import random_scene, render
from causal_story.miniature import draw_captions
from causal_story.pipeline import CausalStoryPipeline


def averaged(pipe, path):
    "Put the moving average of a checkpoint into the pipeline."
    tensors = {
        name[4:]: value for name, value in load_file(path).items() if name.startswith("ema/")
    }
    state = {name.removeprefix("unet."): value for name, value in tensors.items()}
    pipe.unet.load_state_dict(state, strict=False)
    return pipe


def main(folder):
    pipe, rng = CausalStoryPipeline.from_base("miniature"), random.Random(5)
    pipe.set_progress_bar_config(disable=True)
    scenes = [random_scene(rng, "test") for _ in range(6)]
    captions = [describe(scene, rng, "test") for scene in scenes]
    paths = sorted(Path(folder).glob("*.safetensors"))
    rows = [("truth", [render(scene, 64) for scene in scenes])]
    last = ("as shipped", draw_captions(pipe, captions))
    rows += [
        (f"{int(path.stem.split('-')[-1]):,} steps", draw_captions(averaged(pipe, path), captions))
        for path in paths
    ] + [last]
    figure, axes = plt.subplots(len(rows), 6, figsize=(7.5, 1.28 * len(rows) + 0.4))
    for row, (name, frames) in zip(axes, rows):
        for ax, frame in zip(row, frames):
            ax.imshow(frame)
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=9)
    for ax, caption in zip(axes[0], captions):
        ax.set_title(fill(caption, 22), fontsize=6.5)
    figure.tight_layout(pad=0.3)
    path = Path(__file__).with_name("pretraining.png")
    figure.savefig(path, dpi=110)
    Image.open(path).convert("RGB").quantize(256).save(path)


if __name__ == "__main__":
    main(sys.argv[1])
