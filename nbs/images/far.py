"""Draws far.png, the story that opens the lesson on the causal mask:  python nbs/images/far.py"""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch
from PIL import Image

from causal_story.cartoon import Actor, Scene, render

CAPTIONS = [
    "Kiki is in the forest\nwith a ball. She waves.",
    "Meanwhile Bruno sleeps\non the moon with a book.",
    "Then she sleeps.",
    "Meanwhile he waves.",
    "She jumps.",
]
STORY = [
    ("forest", "Kiki", "waves"),
    ("moon", "Bruno", "sleeps"),
    ("forest", "Kiki", "sleeps"),
    ("moon", "Bruno", "waves"),
    ("forest", "Kiki", "jumps"),
]
THINGS = dict(Kiki=("ball", "red"), Bruno=("book", "green"))
SOURCES = {2: [0], 3: [1], 4: [0, 2]}  # frame -> the earlier frames in which its answers stand
TEAL = "#2a9d8f"
INK = "#264653"


def arrow(figure, axes, source, frame):
    "From the middle of one frame's upper edge to that of a later one."
    start, end = (sum(axes[i].get_position().intervalx) / 2 for i in (source, frame))
    figure.add_artist(
        FancyArrowPatch(
            (start + 0.012, 0.7),
            (end - 0.012, 0.7),
            connectionstyle=f"arc3,rad={-0.35 + 0.045 * (frame - source)}",
            arrowstyle="-|>",
            mutation_scale=15,
            color=TEAL,
            linewidth=2.2,
            transform=figure.transFigure,
        )
    )


def main():
    figure, axes = plt.subplots(1, 5, figsize=(11, 3.5))
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.18, top=0.69, wspace=0.06)
    for i, (setting, name, action) in enumerate(STORY):
        scene = Scene(setting, (Actor(name, action, *THINGS[name]),))
        axes[i].imshow(render(scene, size=192, seed=i), interpolation="nearest")
        axes[i].set(xticks=[], yticks=[])
        axes[i].set_xlabel(CAPTIONS[i], fontsize=10.5, color=INK)
        axes[i].spines[:].set_visible(False)
        figure.text(
            axes[i].get_position().x0 + 0.005,
            0.625,
            f" {i} ",
            color="white",
            fontsize=11,
            fontweight="bold",
            bbox=dict(facecolor=INK, edgecolor="none", boxstyle="round,pad=.15"),
        )
    for frame, sources in SOURCES.items():
        for source in sources:
            arrow(figure, axes, source, frame)
    figure.text(
        0.5,
        0.01,
        "an arrow leads from a frame that has the answer to the frame that needs it",
        fontsize=10.5,
        color=TEAL,
        ha="center",
    )
    path = Path(__file__).with_name("far.png")
    figure.savefig(path, dpi=110)
    Image.open(path).convert("RGB").quantize(256).save(path)


if __name__ == "__main__":
    main()
