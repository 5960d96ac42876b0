"""Draws storyworld.png, the question that opens the lesson: python nbs/images/storyworld.py"""

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt

from causal_story.storyworld import make_story

story = make_story(954)
figure, axes = plt.subplots(1, 5, figsize=(10, 2.75), layout="constrained")
for k, (ax, picture, caption) in enumerate(zip(axes, story.frames(190), story.captions)):
    ax.set(xticks=[], yticks=[])
    ax.set_title(f"frame {k}", fontsize=10, color="#777")
    ax.set_xlabel(textwrap.fill(caption, 25), fontsize=10.5)
    if k < 4:
        ax.imshow(picture)
        ax.spines[:].set_visible(False)
    else:
        ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", facecolor="#f4f1fa")
        ax.text(0.5, 0.5, "?", fontsize=56, ha="center", va="center", color="#4a3f6b")
figure.savefig(Path(__file__).with_suffix(".png"), dpi=100)
