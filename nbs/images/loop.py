"""Draws the picture of the drawing loop (lesson 08):

    python nbs/images/loop.py

The frames are drawn by the model that comes with the package: seed 1, 12 steps. The noise that is
shown is the noise that they were made of: three of its twelve channels. It writes loop.png.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as MplPath
from PIL import Image

from causal_story.pipeline import CausalStoryPipeline

INK, GREY, BLUE, ORANGE = "#333333", "#8a8f98", "#0072b2", "#d55e00"  # as in model.py
CAPTIONS = [
    "Milo waves at the beach, holding a ball.",
    "Meanwhile Kiki sleeps at home.",
    "He jumps.",
]
WORDS = [
    "Milo waves at the\nbeach, holding a ball.",
    "Meanwhile Kiki\nsleeps at home.",
    "He jumps.",
]
LEFT, STEP, SIDE = 6, 30, 15  # of a column, to the next one, of a frame


def noise_pictures(
    seed: int,  # of the story
) -> list:  # V PIL images
    "Three channels of each frame's noise as colours."
    noise = torch.randn(3, 12, 8, 8, generator=torch.Generator().manual_seed(seed))
    colours = (noise[:, :3].clamp(-2, 2) / 4 + 0.5).mul(255).byte().permute(0, 2, 3, 1)
    return [Image.fromarray(picture.numpy()) for picture in colours]


def place(ax, picture, x, y, side, resample=Image.LANCZOS):
    "A picture with a thin border."
    picture = picture.resize((256, 256), resample)
    ax.imshow(picture, extent=(x, x + side, y, y + side), aspect="equal", zorder=2)
    ax.add_patch(plt.Rectangle((x, y), side, side, fill=False, edgecolor="#c9c9c9", zorder=3))


def arrow(ax, start, end, colour, bend=0.0, width=1.6):
    "From one point to another."
    shape = dict(arrowstyle="-|>", mutation_scale=13, connectionstyle=f"arc3,rad={bend}")
    ax.add_patch(FancyArrowPatch(start, end, color=colour, linewidth=width, zorder=4, **shape))


def draw(path):
    "The loop, one column a frame."
    pipe = CausalStoryPipeline.from_pretrained("miniature")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    frames = pipe(CAPTIONS, generator=generator, num_inference_steps=12).frames[0]
    figure, ax = plt.subplots(figsize=(8.4, 4.5), dpi=100)
    figure.subplots_adjust(0, 0, 1, 1)
    ax.axis("off")
    for k, (words, noise) in enumerate(zip(WORDS, noise_pictures(1))):
        x = LEFT + k * STEP
        middle = x + SIDE / 2
        ax.text(middle, 44.5, words, ha="center", va="center", color=BLUE, fontsize=10)
        place(ax, noise, x, 35, 6, Image.NEAREST)
        ax.text(x + 3, 34.3, "noise", ha="center", va="top", color=GREY, fontsize=8)
        box = FancyBboxPatch((x, 22), SIDE, 5, boxstyle="round,pad=0.4", fc="#eef0f2", ec=GREY)
        ax.add_patch(box)
        ax.text(middle, 24.5, "12 guided steps", ha="center", va="center", color=INK, fontsize=9)
        arrow(ax, (x + 3, 32.3), (x + 3, 27.6), GREY)
        arrow(ax, (x + 11, 42), (x + 11, 27.6), BLUE)
        arrow(ax, (middle, 21.4), (middle, 17.6), INK)
        place(ax, frames[k], x, 2, SIDE)
        ax.text(middle, 0.8, f"frame {k}", ha="center", va="top", color=INK, fontsize=9)
    ends = [LEFT + SIDE + 0.5, LEFT + STEP + SIDE + 0.5]
    arrow(ax, (ends[0], 11), (LEFT + STEP - 0.7, 24.5), ORANGE, -0.2, 2.2)
    arrow(ax, (ends[1], 11), (LEFT + 2 * STEP - 0.7, 23.6), ORANGE, -0.2, 2.2)
    corners = [(ends[0], 14), (22, 37), (52, 31), (LEFT + 2 * STEP - 0.7, 26)]
    curve = MplPath(
        corners, [MplPath.MOVETO, *[MplPath.CURVE4] * 3]
    )  # above box 1, below its noise
    style = dict(arrowstyle="-|>", mutation_scale=13, color=ORANGE, linewidth=2.2, fill=False)
    ax.add_patch(FancyArrowPatch(path=curve, zorder=4, **style))
    for k in range(2):
        style = dict(ha="center", va="center", color=ORANGE, fontsize=9)
        ax.text(ends[k] + 7.5, 8.5, "BLIP reads picture\nand caption", **style)
    ax.set(xlim=(0, 84), ylim=(-2, 47.5))
    figure.savefig(path)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    draw(Path(__file__).with_name("loop.png"))
