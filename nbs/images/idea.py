"""Draws idea.png, the picture at the top of the README:  python nbs/images/idea.py

The weights are chosen by hand to show the idea; the notebooks measure real ones.
"""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch

from causal_story.cartoon import Actor, Scene, render

CAPTIONS = [
    "Milo is at the beach\nholding a ball.",
    "Meanwhile Kiki sleeps\nat home holding a book.",
    "She waves.",
    "He jumps.",
]
SCENES = [
    Scene("beach", (Actor("Milo", "waves", "ball", "red"),)),
    Scene("home", (Actor("Kiki", "sleeps", "book", "yellow"),)),
    Scene("home", (Actor("Kiki", "waves", "book", "yellow"),)),
    Scene("beach", (Actor("Milo", "jumps", "ball", "red"),)),
]
STEP = 1.35  # from one frame's left edge to the next, in frame widths
ROWS = [
    (
        "AR-LDM",
        "every earlier frame\nis equally visible",
        "#7d838d",
        {2: [0.35, 0.35], 3: [0.35, 0.35, 0.35]},
    ),
    (
        "Causal-Story",
        "what matters for this\ncaption weighs more",
        "#d1495b",
        {2: [0.06, 0.94], 3: [0.88, 0.06, 0.06]},
    ),
]


def draw_arrow(axis, source, target, weight, colour):
    "One arrow over the frames; arrows of one frame are nested, so that they do not cross."
    start, end = (
        source * STEP + 0.62 - 0.09 * (target - source),
        target * STEP + 0.28 + 0.13 * (target - source),
    )
    axis.add_patch(
        FancyArrowPatch(
            (start, 1.03),
            (end, 1.03),
            connectionstyle=f"arc3,rad={-0.46 + 0.06 * (target - source)}",
            color=colour,
            arrowstyle=f"-|>,head_length={4 + 5 * weight},head_width={2 + 3 * weight}",
            linewidth=1 + 5 * weight,
            alpha=0.35 + 0.65 * weight,
            shrinkA=0,
            shrinkB=0,
            zorder=weight,
        )
    )


def draw_row(axis, name, claim, colour, weights):
    "The four frames, with arrows from the earlier frames to the one that is drawn."
    for k, (caption, scene) in enumerate(zip(CAPTIONS, SCENES)):
        axis.imshow(render(scene, size=256, seed=k), extent=(k * STEP, k * STEP + 1, 0, 1))
        axis.text(
            k * STEP + 0.5, -0.08, caption, ha="center", va="top", fontsize=11.5, linespacing=1.25
        )
    for target, row in weights.items():
        for source, weight in enumerate(row):
            draw_arrow(axis, source, target, weight, colour)
    axis.text(-0.16, 0.6, name, ha="right", fontsize=15, fontweight="bold", color=colour)
    axis.text(-0.16, 0.5, claim, ha="right", va="top", fontsize=11.5, linespacing=1.3)
    axis.set(xlim=(-1.6, 5.15), ylim=(-0.42, 1.72), aspect="equal")
    axis.axis("off")


figure, axes = plt.subplots(2, 1, figsize=(10, 6.6), dpi=110, layout="constrained")
for axis, row in zip(axes, ROWS):
    draw_row(axis, *row)
figure.savefig(Path(__file__).with_name("idea.png"), facecolor="white", metadata={"Software": None})
