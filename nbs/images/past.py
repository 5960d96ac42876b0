"""Draws past.png: what the data hand over for one frame. Run it: python nbs/images/past.py"""

import textwrap
from pathlib import Path

from matplotlib.patches import FancyBboxPatch
from PIL import Image

from causal_story.figures import StoryPage
from causal_story.storyworld import make_story

PANEL, STEP = 1.5, 1.75  # inches
TO_DRAW = 3  # the frame to draw
BLUE, ORANGE, GREY = "#4a7fb5", "#d9822b", "#9a9a9a"


def box(page, left, width, colour):
    "A rounded box behind what belongs together."
    place = FancyBboxPatch(
        (left / page.width, 0.08 / page.height),
        width / page.width,
        (page.height - 0.16) / page.height,
        boxstyle="round,pad=0,rounding_size=0.02",
        mutation_aspect=page.width / page.height,
        facecolor=colour,
        alpha=0.13,
        edgecolor="none",
        transform=page.figure.transFigure,
        zorder=-1,
    )
    page.figure.add_artist(place)


story = make_story(seed=5)
captions = [text.replace("Pip", "Zib").replace("Kiki", "Mo") for text in story.captions]
page = StoryPage(5 * STEP + 0.1, 3.3)
middle = dict(ha="center", va="center")
box(page, 0.08, TO_DRAW * STEP - 0.06, BLUE)
box(page, 0.08 + TO_DRAW * STEP, STEP - 0.06, ORANGE)
for k, (frame, caption) in enumerate(zip(story.frames(size=192), captions)):
    left, centre = 0.18 + k * STEP, 0.18 + k * STEP + PANEL / 2
    colour = BLUE if k < TO_DRAW else ORANGE if k == TO_DRAW else GREY
    page.text(centre, 3.08, f"frame {k}", color=colour, **middle)
    if k == TO_DRAW:
        frame = Image.blend(frame, Image.new("RGB", frame.size, "white"), 0.75)
        page.text(centre, 2.15, "?", fontsize=64, color=ORANGE, zorder=5, **middle)
    if k <= TO_DRAW:
        page.frame(left, 1.42, PANEL, frame)
    else:
        page.text(centre, 2.15, "later", color=GREY, **middle)
    words = "\n".join(textwrap.wrap(caption, 22))
    grey = GREY if k > TO_DRAW else "#333333"
    page.text(centre, 1.3, words, ha="center", va="top", color=grey)
words = "the history: (frame, caption) pairs"
page.text(0.05 + TO_DRAW * STEP / 2, 0.28, words, color=BLUE, weight="bold", fontsize=10, **middle)
words = "the caption,\nthe frame to draw"
page.text(
    0.05 + (TO_DRAW + 0.5) * STEP, 0.36, words, color=ORANGE, weight="bold", fontsize=10, **middle
)
page.figure.savefig(Path(__file__).with_name("past.png"), dpi=120, facecolor="white")
