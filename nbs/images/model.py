"""Draws the picture of the whole model, and its "you are here" versions:

    python nbs/images/model.py

Our own drawing of what the paper's figure and abstract say; the shares of relevance are chosen by
hand. It writes model.png, and for every entry of PLACES a model-HERE.png, in which the parts of one
lesson stay bright and the others fade.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from PIL import Image

from causal_story.cartoon import Actor, Scene, render

INK = "#333333"
GREY = "#8a8f98"
BLUE = "#0072b2"  # the caption's way
ORANGE = "#d55e00"  # the past's way
GREEN = "#009e73"  # what is trained
PALE = {BLUE: "#d6e9f5", ORANGE: "#fbe3d1", GREEN: "#d3efe6", GREY: "#eef0f2", INK: "#ffffff"}

PAST = [
    (
        "Milo is at the beach\nholding a ball.",
        Scene("beach", (Actor("Milo", "waves", "ball", "red"),)),
    ),
    (
        "Meanwhile Kiki sleeps\nat home with a book.",
        Scene("home", (Actor("Kiki", "sleeps", "book", "yellow"),)),
    ),
    ("She waves.", Scene("home", (Actor("Kiki", "waves", "book", "yellow"),))),
]
NEW = ("He jumps.", Scene("beach", (Actor("Milo", "jumps", "ball", "red"),)))
RELEVANCE = (0.88, 0.06, 0.06)  # chosen by hand, to show the idea
ROWS = (31, 21, 11)  # heights of the three earlier pairs
TOP = 49  # height of the caption to draw

PLACES = {  # lesson -> the parts that stay bright, and where its flag stands
    "encoders": ({"inputs", "encoders", "tokens", "layer", "relevance"}, (27.6, 41)),
    "mask": ({"mask", "relevance"}, (57.4, 52)),
    "unet": ({"unet", "site"}, (72, 58.3)),
    "model": ({"encoders", "tokens", "layer", "mask", "relevance", "unet", "site"}, (38, 54.5)),
    "pipeline": ({"loop", "frames", "inputs"}, (82.6, 52)),
}


class Drawing:
    "One version of the picture; `bright` names the parts that do not fade, None: all."

    def __init__(self, bright=None):
        self.bright = bright
        self.figure, self.ax = plt.subplots(figsize=(9, 6.2), dpi=100)
        self.figure.subplots_adjust(0, 0, 1, 1)
        self.ax.set(xlim=(0, 90), ylim=(-2, 60))
        self.ax.axis("off")

    def alpha(self, part):
        return 1.0 if part == "legend" or self.bright is None or part in self.bright else 0.22

    def text(self, part, x, y, words, size=9.5, colour=INK, **style):
        style = dict(ha="center", va="center", linespacing=1.2) | style
        self.ax.text(x, y, words, fontsize=size, color=colour, alpha=self.alpha(part), **style)

    def box(self, part, x, y, width, height, colour=GREY, dashed=False, fill=None):
        "A rounded box with its lower left corner at (x, y)."
        self.ax.add_patch(
            FancyBboxPatch(
                (x, y),
                width,
                height,
                boxstyle="round,pad=0,rounding_size=0.9",
                facecolor=fill or PALE[colour],
                edgecolor=colour,
                linewidth=1.5,
                linestyle=(0, (4, 2)) if dashed else "-",
                alpha=self.alpha(part),
            )
        )

    def arrow(self, part, start, end, colour=INK, width=1.6, bend=0.0, head=True):
        self.ax.add_patch(
            FancyArrowPatch(
                start,
                end,
                arrowstyle="-|>,head_length=5,head_width=2.6" if head else "-",
                connectionstyle=f"arc3,rad={bend}",
                linewidth=width,
                color=colour,
                alpha=self.alpha(part),
                shrinkA=0,
                shrinkB=0,
                capstyle="round" if not head else "butt",
            )
        )

    def line(self, part, points, colour=INK, width=1.6):
        "A bent line that ends in an arrow."
        xs, ys = zip(*points[:-1])
        self.ax.plot(
            xs, ys, color=colour, lw=width, alpha=self.alpha(part), solid_joinstyle="round"
        )
        self.arrow(part, points[-2], points[-1], colour, width)

    def picture(self, part, pixels, x, y, side):
        "A square picture with its lower left corner at (x, y)."
        self.ax.imshow(
            pixels,
            extent=(x, x + side, y, y + side),
            alpha=self.alpha(part),
            aspect="auto",
            interpolation="antialiased",
        )
        self.ax.add_patch(
            Rectangle((x, y), side, side, fill=False, edgecolor=INK, lw=0.8, alpha=self.alpha(part))
        )

    def tokens(self, y, colour, n=4):
        "A block of tokens, as small squares."
        for k in range(n):
            self.ax.add_patch(
                Rectangle(
                    (36.2 + 1.9 * k, y - 0.9),
                    1.6,
                    1.8,
                    facecolor=PALE[colour],
                    edgecolor=colour,
                    lw=1.2,
                    alpha=self.alpha("tokens"),
                )
            )

    def flag(self, x, y):
        "You are here."
        self.ax.text(
            x,
            y,
            "you are here",
            ha="center",
            va="center",
            fontsize=11,
            fontweight="bold",
            color="white",
            bbox=dict(boxstyle="round,pad=0.35", facecolor=INK, edgecolor="none"),
            zorder=9,
        )


def draw_inputs(d):
    d.text("inputs", 11, 55, "the caption to draw", 10, BLUE, fontweight="bold")
    d.box("inputs", 2, TOP - 3.5, 18, 7, BLUE)
    d.text("inputs", 11, TOP, NEW[0], 11)
    d.text("inputs", 11.5, 38.4, "the past, drawn so far", 10, ORANGE, fontweight="bold")
    for y, (caption, scene) in zip(ROWS, PAST):
        d.picture("inputs", render(scene, 192, seed=1), 1.2, y - 4, 8)
        d.text("inputs", 9.9, y, caption.replace(" ", " "), 7.6, ha="left")


def draw_encoders(d):
    d.arrow("encoders", (20, TOP), (24, TOP), BLUE)
    d.box("encoders", 24, TOP - 3.5, 9, 7)
    d.text("encoders", 28.5, TOP + 0.9, "CLIP", 11, fontweight="bold")
    d.text("encoders", 28.5, TOP - 1.6, "reads it", 8.5)
    d.arrow("tokens", (33, TOP), (35.7, TOP), BLUE)
    d.tokens(TOP, BLUE)
    d.text("encoders", 28.5, ROWS[0] + 5.5, "BLIP", 11, fontweight="bold")
    height = ROWS[0] - ROWS[-1] + 8
    d.box("encoders", 24, ROWS[-1] - 4, 4.2, height)
    d.box("encoders", 28.8, ROWS[-1] - 4, 4.2, height, GREEN)
    d.text("encoders", 26.1, ROWS[1], "looks at each picture", 9.5, rotation=90)
    d.text("encoders", 30.9, ROWS[1], "reads it with its caption", 9.5, rotation=90)
    for k, y in enumerate(ROWS):
        d.arrow("encoders", (22.4, y), (24, y), ORANGE)
        d.arrow("tokens", (33, y), (35.7, y), ORANGE)
        d.tokens(y, ORANGE)
    d.text("tokens", 39.9, 40, "context:\ncaption, then\none block a frame", 8.5)


def draw_layer(d):
    d.box("layer", 46, ROWS[-1] - 4, 4.4, TOP - ROWS[-1] + 7.5, GREEN, dashed=True)
    d.text("layer", 48.2, 30, "context layer: tokens read each other", 9.5, rotation=90)
    for y, colour in ((TOP, BLUE), *((y, ORANGE) for y in ROWS)):
        d.arrow("layer", (43.9, y), (46, y), colour)


def draw_mask(d):
    d.text("mask", 57.4, 46.6, "causal mask", 10, fontweight="bold")
    side = 1.6
    left, top = 54.2, 43.6
    for row in range(4):
        for column in range(4):
            sees = column < row
            d.ax.add_patch(
                Rectangle(
                    (left + side * column, top - side * (row + 1)),
                    side,
                    side,
                    facecolor=(ORANGE if row == 3 else "#f0b48a") if sees else "#ffffff",
                    edgecolor=GREY,
                    lw=0.8,
                    alpha=d.alpha("mask"),
                )
            )
    d.text("mask", 57.4, 44.7, "nobody looks ahead", 7.6)
    d.arrow("mask", (53.8, 40.4), (50.8, 40.4), INK, 1.1)
    d.arrow("mask", (61, 40.4), (65.8, 40.4), INK, 1.1)


def draw_relevance(d):
    d.text("relevance", 57.4, ROWS[0] + 3.2, "relevance", 10, fontweight="bold")
    for y, share in zip(ROWS, RELEVANCE):
        d.arrow("relevance", (50.4, y), (52.6, y), ORANGE)
        d.box("relevance", 52.8, y - 1.2, 9.2, 2.4, GREEN, dashed=True, fill="#ffffff")
        d.ax.add_patch(
            Rectangle(
                (53, y - 1),
                8.8 * share,
                2,
                facecolor=GREEN,
                edgecolor="none",
                alpha=d.alpha("relevance"),
            )
        )
        d.arrow("relevance", (62.2, y), (66, 36.5 - (31 - y) * 0.4), ORANGE, 0.8 + 3.4 * share)
    d.text("relevance", 57.4, ROWS[1] - 4.6, "how much does\neach one matter?", 7.6)


def draw_unet(d):
    d.arrow("unet", (50.4, TOP), (66, TOP), BLUE)
    for x, height in zip((66, 68.5, 71, 73.5, 76), (24, 17, 10, 17, 24)):
        d.box("unet", x, 39 - height / 2, 2, height)
    d.text("unet", 72, 55.2, "U-Net", 11, fontweight="bold")
    d.text("unet", 72, 52.8, "frozen", 8.5)


def draw_site(d):
    "The zoom: what the paper adds at every cross-attention."
    alpha = d.alpha("site")
    d.ax.add_patch(
        Polygon(
            [(73.5, 32), (75.5, 32), (88.2, 18.1), (63.8, 18.1)],
            color=PALE[GREY],
            alpha=alpha,
            zorder=0,
        )
    )
    d.box("site", 63.5, 3, 25, 15.2, GREY, fill="#ffffff")
    d.arrow("site", (64.2, 10.8), (65.4, 10.8))
    d.box("site", 65.4, 8, 7.8, 5.6)
    d.text("site", 69.3, 10.8, "cross-\nattention", 8.5)
    d.box("site", 75.2, 8, 7, 5.6, GREEN)
    d.text("site", 78.7, 10.8, "adapter", 9, fontweight="bold")
    d.arrow("site", (73.2, 10.8), (75.2, 10.8))
    d.arrow("site", (82.2, 10.8), (84.1, 10.8))
    d.ax.add_patch(
        Circle((85.4, 10.8), 1.25, facecolor="#ffffff", edgecolor=INK, lw=1.4, alpha=alpha)
    )
    d.text("site", 85.4, 10.75, "+", 12)
    d.line("site", [(64.2, 10.8), (64.2, 15.4), (85.4, 15.4), (85.4, 12.1)])
    d.text("site", 75, 16.7, "residual", 8)
    d.text("site", 76, 5.4, "wherever the U-Net reads the context", 8)


def draw_frames(d):
    d.picture("frames", render(NEW[1], 192, seed=1), 81, 38, 8)
    d.text("frames", 85, 47.6, "the frame", 9)
    noise = np.random.default_rng(0).integers(60, 255, (16, 16, 3)).astype(np.uint8)
    d.picture("frames", noise, 81, 24.5, 8)
    d.text("frames", 85, 34, "noise", 9)
    d.arrow("frames", (81, 29.5), (78.2, 31))
    d.arrow("frames", (78.2, 42), (80.8, 42))


def draw_loop(d):
    d.line(
        "loop",
        [(89, 42), (89.5, 42), (89.5, 0), (5.2, 0), (5.2, 6.6)],
        ORANGE,
        2.2,
    )
    d.text("loop", 24.5, 1.7, "what was drawn becomes the past of the next frame", 10, ORANGE)


def draw_legend(d):
    for y, words, colour, dashed in (
        (5.2, "frozen", GREY, False),
        (3.2, "trained", GREEN, False),
        (1.2, "trained, our reading of the abstract", GREEN, True),
    ):
        d.box("legend", 45.2, y - 0.8, 2.2, 1.6, colour, dashed)
        d.text("legend", 48.1, y, words, 7.6, ha="left")


def draw(name=None):
    bright, flag = PLACES[name] if name else (None, None)
    d = Drawing(bright)
    for part in (
        draw_inputs,
        draw_encoders,
        draw_layer,
        draw_mask,
        draw_relevance,
        draw_unet,
        draw_site,
        draw_frames,
        draw_loop,
        draw_legend,
    ):
        part(d)
    if flag:
        d.flag(*flag)
    path = Path(__file__).with_name(f"model-{name}.png" if name else "model.png")
    d.figure.savefig(path, facecolor="white")
    plt.close(d.figure)
    picture = Image.open(path).convert("RGB")
    picture.quantize(255, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path)
    return path


if __name__ == "__main__":
    for name in (None, *PLACES):
        path = draw(name)
        print(path.name, path.stat().st_size)
