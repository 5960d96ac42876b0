"""Draws path.png, the way of lesson 14: folder, file, base, tuning, drawn story, score.

Run it: python nbs/images/path.py. The frames are those of the lesson: story 0 of its test split,
drawn by the base without its past and continued by the shipped model. The score is the shipped
model's, too.
"""

import textwrap
from pathlib import Path

from matplotlib.patches import Ellipse, FancyArrowPatch, FancyBboxPatch, Rectangle

from causal_story.data import StoriesInMemory
from causal_story.drawing import draw_stories
from causal_story.figures import StoryPage
from causal_story.pipeline import CausalStoryPipeline
from causal_story.storyworld import make_stories

INK, GREY, BLUE, GREEN, TEAL = "#333333", "#8a8a8a", "#4a7fb5", "#009e73", "#2a9d8f"
WIDE, STEP, LOW, HIGH = 1.5, 1.78, 0.62, 1.5  # inches: a box, the way to the next, its place
ASKED = 3  # the frame that base and tuned model are compared on
SCORES = {  # lesson 14, section 4
    "with its history": 0.85,
    "its first repeated": 0.60,
    "history hidden": 0.24,
}
TITLES = ("a folder", "one file", "the base", "tuning", "a drawn story", "a score")
NOTES = (
    "pictures,\na line per story",
    "every story\nin it",
    "who is she? It\nmakes her up",
    "base frozen,\ngreen learns",
    "she is Zaza,\nas before",
    "facts only the history\ntells, drawn right",
)

story = make_stories(6, "test", seed=1)[0]
record = StoriesInMemory([story]).records
base, shipped = (
    CausalStoryPipeline.from_base("miniature"),
    CausalStoryPipeline.from_pretrained("miniature"),
)
for pipe in (base, shipped):
    pipe.set_progress_bar_config(disable=True)
alone = dict(history_policy="none", num_inference_steps=10, progress=False)
invented = draw_stories(base, record, **alone)[0]
continued = draw_stories(shipped, record, "continuation", progress=False)[0]
drawn = [record[0].frames[0], *continued]
page = StoryPage(5 * STEP + WIDE + 0.2, 2.75)


def shape(kind, at, *sizes, below=-1, **style):
    "A matplotlib patch, placed and sized in inches."
    axis = page.figure.add_axes([0, 0, 1, 1], zorder=below)
    axis.set(xlim=(0, page.width), ylim=(0, page.height))
    axis.axis("off")
    axis.add_patch(kind(at, *sizes, **style))


for k, (title, note) in enumerate(zip(TITLES, NOTES)):
    left, middle = 0.1 + STEP * k, 0.1 + STEP * k + WIDE / 2
    page.text(middle, 2.5, title, ha="center", fontsize=11, weight="bold")
    page.text(middle, 0.5, note, ha="center", va="top", color=GREY)
    if k:
        ends = (left - 0.25, LOW + HIGH / 2), (left - 0.04, LOW + HIGH / 2)
        shape(FancyArrowPatch, *ends, arrowstyle="-|>", mutation_scale=14, color=INK)

# a folder
style = dict(boxstyle="round,pad=0.03", facecolor="#f6efe0", edgecolor="#cdbb94")
shape(FancyBboxPatch, (0.13, LOW + 0.03), WIDE - 0.06, HIGH - 0.06, **style)
shape(FancyBboxPatch, (0.13, LOW + HIGH - 0.06), 0.5, 0.13, below=-2, **style)
places = [(0.2 + 0.46 * (k % 3), LOW + 0.8 - 0.62 * (k // 3)) for k in range(6)]
for at, frame in zip(places, record[0].frames):
    page.frame(*at, 0.4, frame)
shape(Rectangle, (places[5][0] + 0.03, places[5][1]), 0.34, 0.42, facecolor="white", edgecolor=GREY)
for row in range(4):
    at = (places[5][0] + 0.08, places[5][1] + 0.07 + 0.08 * row)
    shape(Rectangle, at, 0.24 - 0.05 * (row % 2), 0.025, facecolor=GREY)

# one file
left = 0.1 + STEP
body = dict(facecolor="#e7edf4", edgecolor=BLUE, linewidth=1.2)
shape(Ellipse, (left + WIDE / 2, LOW + 0.12), WIDE, 0.24, below=-3, **body)
flat = dict(facecolor=body["facecolor"], edgecolor="none")
shape(Rectangle, (left, LOW + 0.12), WIDE, HIGH - 0.24, below=-2, **flat)
for side in (left, left + WIDE):
    shape(Rectangle, (side, LOW + 0.12), 0, HIGH - 0.24, edgecolor=BLUE, linewidth=1.2)
shape(Ellipse, (left + WIDE / 2, LOW + HIGH - 0.12), WIDE, 0.24, **body)
rows = [record[0].frames, *(s.frames(64) for s in make_stories(3))]
for row, frames in enumerate(rows):
    for k, frame in enumerate(frames):
        page.frame(left + 0.1 + 0.265 * k, LOW + 0.94 - 0.28 * row, 0.23, frame)

# the base, and the same frame after tuning
caption = f"“{story.captions[ASKED]}”"
for k, frames, size in ((2, invented, 1.15), (4, drawn, 0.92)):
    left = 0.1 + STEP * k + (WIDE - size) / 2
    page.text(left + size / 2, LOW + HIGH - 0.12, caption, ha="center", fontsize=8.5)
    page.frame(left, LOW + HIGH - 0.22 - size, size, frames[ASKED])
for k, frame in enumerate(drawn):
    page.frame(0.1 + STEP * 4 + 0.02 + 0.295 * k, LOW, 0.27, frame)

# tuning: a frozen U-Net with adapters, and what reads the past
left = 0.1 + STEP * 3
heights = (1.0, 0.7, 0.45, 0.7, 1.0)
for k, high in enumerate(heights):
    at = (left + 0.06 + 0.29 * k, LOW + 0.95 - high / 2)
    shape(Rectangle, at, 0.2, high, facecolor="#d3dbe3", edgecolor=GREY, linewidth=0.8)
    at = (at[0] + 0.045, LOW + 0.9)
    shape(Rectangle, at, 0.11, 0.11, below=0, facecolor=GREEN, edgecolor="none")
reads = dict(boxstyle="round,pad=0.02", facecolor=GREEN, edgecolor="none")
shape(FancyBboxPatch, (left + 0.08, LOW + 0.05), WIDE - 0.16, 0.24, **reads)
style = dict(ha="center", va="center", color="white", weight="bold", fontsize=8.5)
page.text(left + WIDE / 2, LOW + 0.17, "reads the past", **style)

# the score
left = 0.1 + STEP * 5
for k, (name, share) in enumerate(SCORES.items()):
    x, colour = left + 0.03 + 0.51 * k, (TEAL, "#c9c9c9", "#c9c9c9")[k]
    shape(Rectangle, (x, LOW + 0.32), 0.42, 1.3 * share, facecolor=colour)
    page.text(x + 0.21, LOW + 0.36 + 1.3 * share, f"{share:.2f}", ha="center", fontsize=10)
    page.text(x + 0.21, LOW + 0.27, textwrap.fill(name, 9), ha="center", va="top", fontsize=7)
page.figure.savefig(Path(__file__).with_name("path.png"), dpi=120, facecolor="white")
