"""Draws adapter.png, the block that opens the lesson on the U-Net:  python nbs/images/adapter.py"""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import Circle, FancyBboxPatch, Polygon
from PIL import Image

GREY = ("#e8ebf0", "#69758a")  # frozen: face, edge
GREEN = ("#d3efe6", "#009e73")  # trains
BLUE = ("#d6e9f5", "#0072b2")  # the caption
ORANGE = ("#fbe3d1", "#d55e00")  # the past, visible
WHITE = ("white", "#bbbbbb")  # hidden
LINE = "#444444"


def box(ax, x, y, width, height, text, colours=GREY):
    "A rounded box around (x, y)."
    face, edge = colours
    ax.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=.02,rounding_size=.12",
            fc=face,
            ec=edge,
            lw=1.5,
        )
    )
    ax.text(x, y, text, ha="center", va="center", fontsize=11, color="black")


def arrow(ax, start, end):
    "A straight arrow."
    style = dict(arrowstyle="-|>", color=LINE, lw=1.4, shrinkA=0, shrinkB=0)
    ax.annotate("", end, start, arrowprops=style)


def note(ax, x, y, text, colour=LINE, **options):
    "A remark in small letters."
    ax.text(x, y, text, fontsize=10, color=colour, **options)


def transformer_block(ax):
    "Upper row: the second half of a Spatial Transformer block, with its residual."
    ax.plot([0.75, 0.75, 6.6, 6.6], [2.6, 3.7, 3.7, 2.82], color=LINE, lw=1.4)
    note(ax, 3.7, 3.8, "residual: the hidden states pass by unchanged", ha="center")
    steps = [(0.2, 1.0), (1.8, 2.3), (4.1, 4.65), (5.75, 6.4), (6.8, 7.25), (8.05, 8.5), (9.3, 9.9)]
    for start, end in steps:
        arrow(ax, (start, 2.6), (end, 2.6))
    box(ax, 1.4, 2.6, 0.8, 0.8, "Norm")
    box(ax, 3.2, 2.6, 1.8, 1.0, "Local causal\nattention")
    box(ax, 5.2, 2.6, 1.1, 0.8, "Adapter", GREEN)
    box(ax, 7.65, 2.6, 0.8, 0.8, "Norm")
    box(ax, 8.9, 2.6, 0.8, 0.8, "MLP")
    ax.add_patch(Circle((6.6, 2.6), 0.2, fc="white", ec=LINE, lw=1.4))
    ax.text(6.6, 2.59, "+", ha="center", va="center", fontsize=15)
    note(ax, 0.05, 2.78, "pixels")


def context(ax):
    "Lower left: what frame 2 may read."
    arrow(ax, (3.2, 1.35), (3.2, 2.08))
    blocks = [("caption", BLUE), ("history 0", ORANGE), ("history 1", ORANGE)]
    blocks.append(("history 2", WHITE))
    for k, (label, colours) in enumerate(blocks):
        box(ax, 1.3 + 1.27 * k, 1.0, 1.1, 0.5, label, colours)
    note(ax, 3.2, 0.42, "context of frame 2; M hides what does not lie before it", ha="center")


def bottleneck(ax):
    "Lower right: the adapter from near."
    for x in (5.7, 4.7):
        ax.plot([x, 9.9 if x > 5 else 6.6], [2.15, 1.4], color=GREEN[1], lw=1, ls=":")
    for left, right, first, last in ((7.0, 7.7, 0.55, 0.25), (8.7, 9.4, 0.25, 0.55)):
        corners = [(left, 0.8 - first), (right, 0.8 - last)]
        corners += [(right, 0.8 + last), (left, 0.8 + first)]
        ax.add_patch(Polygon(corners, fc=GREEN[0], ec=GREEN[1], lw=1.5))
    box(ax, 8.2, 0.8, 0.66, 0.5, "GELU", ("white", GREEN[1]))
    for x, label in ((7.35, "down"), (9.05, "up")):
        ax.text(x, 0.8, label, ha="center", va="center", fontsize=10)
    ax.plot([6.6, 6.98], [0.8, 0.8], color=GREEN[1], lw=1.4)
    ax.plot([6.75, 6.75, 9.7, 9.7], [0.8, 0.1, 0.1, 0.66], color=GREEN[1], lw=1.4)
    ax.plot([9.4, 9.95], [0.8, 0.8], color=GREEN[1], lw=1.4)
    ax.add_patch(Circle((9.7, 0.8), 0.14, fc="white", ec=GREEN[1], lw=1.4, zorder=3))
    ax.text(9.7, 0.79, "+", ha="center", va="center", fontsize=11, zorder=4)
    note(ax, 8.2, -0.18, "up starts at 0: at first nothing changes", "#00795a", ha="center")


def main():
    figure, ax = plt.subplots(figsize=(10, 4.3))
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.99)
    transformer_block(ax)
    context(ax)
    bottleneck(ax)
    ax.set(xlim=(0, 10), ylim=(-0.3, 4.1))
    ax.axis("off")
    path = Path(__file__).with_name("adapter.png")
    figure.savefig(path, dpi=110)
    Image.open(path).convert("RGB").quantize(128).save(path)


if __name__ == "__main__":
    main()
