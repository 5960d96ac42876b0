"""Draws path.png, the way of lesson 14: from stories on disk to drawn stories and a score."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

steps = [
    ("stories\non disk", "#f2efe9"),
    ("one file", "#f2efe9"),
    ("frozen base", "#dfe7ee"),
    ("tuned adapters\nand context", "#f6d9bf"),
    ("drawn stories", "#d8ebe6"),
    ("did it use\nits history?", "#d8ebe6"),
]
fig, ax = plt.subplots(figsize=(9, 1.5), dpi=110)
for k, (text, colour) in enumerate(steps):
    style = dict(boxstyle="round,pad=0.05", fc=colour, ec="#555555")
    box = FancyBboxPatch((1.5 * k, 0), 1.15, 0.8, **style)
    ax.add_patch(box)
    ax.text(1.5 * k + 0.575, 0.4, text, ha="center", va="center", fontsize=10)
    if k:
        ends = (1.5 * k - 0.28, 0.4), (1.5 * k - 0.06, 0.4)
        ax.add_patch(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=12, color="#555555"))
ax.set(xlim=(-0.15, 8.85), ylim=(-0.15, 0.95))
ax.axis("off")
fig.tight_layout(pad=0.2)
fig.savefig(Path(__file__).parent / "path.png")
