"""Draws data.png: folder, file, story, batch. Run it: python nbs/images/data.py"""

import textwrap
from pathlib import Path

from matplotlib.patches import Ellipse, FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image, ImageOps

from causal_story.figures import StoryPage
from causal_story.storyworld import make_story

INK, GREY, BLUE, ORANGE = "#333333", "#8a8a8a", "#4a7fb5", "#d9822b"
STOPS = ("1  a folder", "2  one file", "3  a story", "4  a batch")
LEFT = (0.1, 2.45, 4.35, 7.15)  # inches, of each stop
WIDE = (1.95, 1.5, 2.4, 2.95)
page = StoryPage(10.2, 3.75)


def place(left, bottom, wide, high, picture):
    "A picture of any shape, as it is."
    axis = page.figure.add_axes(
        [left / page.width, bottom / page.height, wide / page.width, high / page.height]
    )
    axis.imshow(picture, aspect="auto")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_color("#c9c9c9")


def shape(kind, at, *sizes, **style):
    "A matplotlib patch, placed and sized in inches."
    top = page.figure.add_axes([0, 0, 1, 1], zorder=style.pop("below", -1))
    top.set(xlim=(0, page.width), ylim=(0, page.height))
    top.axis("off")
    top.add_patch(kind(at, *sizes, **style))


story = make_story(seed=5)
captions = [text.replace("Pip", "Zib").replace("Kiki", "Mo") for text in story.captions]
wide = [frame.crop((0, 40, 200, 190)) for frame in story.frames(size=200)]
square = [ImageOps.fit(frame, (150, 150)) for frame in wide]
others = [make_story(seed, n_frames=3).frames(size=200) for seed in (12, 13)]
others = [[ImageOps.fit(f.crop((0, 40, 200, 190)), (150, 150)) for f in row] for row in others]
grey = Image.new("RGB", (150, 150), "#bbbbbb")

for name, left, room in zip(STOPS, LEFT, WIDE):
    page.text(left + room / 2, 3.55, name, ha="center", fontsize=12, weight="bold")
for left, room, following in zip(LEFT, WIDE, LEFT[1:]):
    ends = (left + room + 0.08, 2.05), (following - 0.1, 2.05)
    shape(FancyArrowPatch, *ends, arrowstyle="-|>", mutation_scale=16, color=INK)

# 1: pictures and a text file
style = dict(boxstyle="round,pad=0.04", facecolor="#f6efe0", edgecolor="#cdbb94")
shape(FancyBboxPatch, (LEFT[0], 0.74), WIDE[0], 2.5, **style)
shape(FancyBboxPatch, (LEFT[0], 3.2), 0.7, 0.13, below=-2, **style)
for k, frame in enumerate(wide):
    x, y = LEFT[0] + 0.1 + 0.93 * (k % 2), 2.5 - 0.8 * (k // 2)
    place(x, y, 0.82, 0.615, frame)
    page.text(x + 0.41, y - 0.04, f"forest_{k}.png", ha="center", va="top", fontsize=7)
shape(Rectangle, (LEFT[0] + 1.12, 0.9), 0.65, 0.615, facecolor="white", edgecolor=GREY)
for row in range(5):
    at = (LEFT[0] + 1.19, 0.99 + 0.1 * row)
    shape(Rectangle, at, 0.5 - 0.09 * (row % 3), 0.03, facecolor=GREY)
page.text(LEFT[0] + 1.45, 0.86, "stories.jsonl", ha="center", va="top", fontsize=7)

# 2: one file that holds every story
x, room = LEFT[1], WIDE[1]
body = dict(facecolor="#e7edf4", edgecolor=BLUE, linewidth=1.2)
shape(Ellipse, (x + room / 2, 0.95), room, 0.3, below=-3, **body)
shape(Rectangle, (x, 0.95), room, 2.15, below=-2, facecolor=body["facecolor"], edgecolor="none")
for side in (x, x + room):
    shape(Rectangle, (side, 0.95), 0, 2.15, below=-1, edgecolor=BLUE, linewidth=1.2)
shape(Ellipse, (x + room / 2, 3.1), room, 0.3, **body)
rows = [("train/00000000", square), ("train/00000001", others[0]), ("test/00000000", others[1])]
for row, (name, frames) in enumerate(rows):
    page.text(x + 0.12, 2.72 - 0.62 * row, name, fontsize=7.5)
    for k, frame in enumerate(frames):
        place(x + 0.12 + 0.26 * k, 2.42 - 0.62 * row, 0.23, 0.23, frame)

# 3: one story, decoded
for k, (frame, caption) in enumerate(zip(square, captions)):
    y = 2.82 - 0.54 * k
    page.frame(LEFT[2], y, 0.48, frame)
    words = "\n".join(textwrap.wrap(caption, 33))
    page.text(LEFT[2] + 0.58, y + 0.24, words, va="center", fontsize=7.5)

# 4: tensors; the second story is shorter and was filled up
x = LEFT[3]
page.text(x, 3.17, "caption_ids, S numbers per caption", fontsize=8, color=ORANGE)
page.text(x, 2.58, "frames, V per story", fontsize=8, color=ORANGE)
page.text(x, 1.58, "history_frames, F per story", fontsize=8, color=BLUE)
filled = [*others[0], grey, grey]
for b, row in enumerate((square, filled)):
    for k, frame in enumerate(row):
        place(x + 0.56 * k, 1.14 - 0.4 * b, 0.36, 0.36, frame)
        if k:
            place(x + 0.56 * k, 2.14 - 0.4 * b, 0.36, 0.36, frame)
            for token in range(6):
                full = token < (2 if frame is grey else 6 - (2 * k + b) % 4)
                at = (x + 0.56 * k + 0.065 * token, 2.97 - 0.13 * b)
                colour = ORANGE if full else "#f0e0cf"
                shape(Rectangle, at, 0.05, 0.09, facecolor=colour)

notes = (
    "pictures of any size,\na line of text per story",
    "any story can be\nread alone",
    "N captions, N pictures\nin true colours",
    "tensors; what a short story\nlacks is grey",
)
for note, left, room in zip(notes, LEFT, WIDE):
    page.text(left + room / 2, 0.5, note, ha="center", va="top", color=GREY)
page.figure.savefig(Path(__file__).with_name("data.png"), dpi=120, facecolor="white")
