"""cartoon: scenes and attributes, drawing at every size, and what a picture must show."""

import hashlib
import itertools
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import PIL
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from PIL import Image, ImageChops

from causal_story import cartoon
from causal_story.captions import SOLO
from causal_story.cartoon import (
    ACTIONS,
    ATTRIBUTES,
    CHARACTERS,
    LOOKS,
    POSES,
    PROPS,
    SCARF_COLOURS,
    SCARVES,
    SETTINGS,
    SPLITS,
    Actor,
    Scene,
    colour_pixels,
    contact_sheet,
    draw_truth,
    held_out,
    random_scene,
    render,
)
from causal_story.storyworld import make_stories, make_story

actors = st.builds(
    Actor,
    st.sampled_from(CHARACTERS),
    st.sampled_from(ACTIONS),
    st.sampled_from(PROPS),
    st.sampled_from(SCARVES),
)
scenes = st.builds(
    Scene,
    st.sampled_from(SETTINGS),
    st.lists(actors, min_size=1, max_size=2, unique_by=lambda a: a.name).map(tuple),
)
splits, seeds = st.sampled_from(SPLITS), st.integers(0, 10**9)


# ---------------------------------------------------------------- attributes, scenes, splits


def test_attributes_are_declared_once():
    "A field of `Actor` for each entry; every entry knows its words, and what is drawn is drawn."
    assert {field.name for field in fields(Actor)} == {"name", *ATTRIBUTES}
    for attribute in ATTRIBUTES.values():
        assert attribute.changes in ("never", "sometimes", "every frame")
        assert attribute.coin in ("character", "story")
        words = [attribute.words(value) for value in attribute.values]
        assert len({tuple(sorted(fields)) for fields in words}) == 1, "one set of fields"
        assert any("{" + field + "}" in t for field in words[0] for t in SOLO["train"])
        assert attribute.worn or attribute.held or attribute.values == tuple(POSES)


GLASSES = """
def _wear_glasses(pen, look, glasses):
    for side in (-1, 1):
        pen.ellipse(side * 0.1, _HEAD, 0.08, 0.05 if glasses == "flat" else 0.08, INK)


def _glasses_words(glasses):
    return dict(glasses=f"{glasses} glasses")


"""
CHECK = """
import random
from causal_story.captions import describe
from causal_story.cartoon import draw_truth, random_scene, render
from causal_story.storyworld import make_stories
stories = [story for n in (5, 12) for story in make_stories(20, seed=1, n_frames=n)]
facts = [fact for story in stories for fact in story.facts if fact.attribute == "glasses"]
assert any(fact.sources for fact in facts) and any(fact.stated for fact in facts)
assert "glasses" in " ".join(caption for story in stories for caption in story.captions)
scene = random_scene(random.Random(0))
texts = [describe(scene, random.Random(seed)) for seed in range(50)]
assert any(scene.actors[0].glasses in text for text in texts)
draw_truth(stories[0], 64)
print(len(facts))
"""


def test_a_new_attribute_touches_few_places(tmp_path):
    "Drawing, words, entry, field and templates; facts and stories follow by themselves."
    package = tmp_path / "causal_story"
    package.mkdir()
    source = Path(cartoon.__file__).parent
    (package / "__init__.py").write_text("")
    for name in ("cartoon", "captions", "narrator", "storyworld"):
        text = (source / f"{name}.py").read_text(encoding="utf-8")
        if name == "cartoon":
            entry = 'glasses=Attribute(("round", "flat", "dark", "big"), _glasses_words,'
            entry += ' changes="never", worn=_wear_glasses),\n    '
            text = text.replace("ATTRIBUTES = dict(", GLASSES + "ATTRIBUTES = dict(\n    " + entry)
            text = text.replace("    scarf: str\n", "    scarf: str\n    glasses: str\n")
        if name == "captions":
            text = re.sub(r"((?:in|wearing) {scarf(1?)}\])", r"\1[, with {glasses\2}]", text)
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_every_value_of_an_attribute_looks_different(attribute):
    pictures = set()
    for value in ATTRIBUTES[attribute].values:
        actor = Actor(**GOOD | {attribute: value})
        pictures.add(render(Scene("home", (actor,)), 64, seed=1).tobytes())
    assert len(pictures) == len(ATTRIBUTES[attribute].values)


@given(seeds, splits, st.sampled_from((None, 1, 2)))
@effort(max_examples=150)
def test_random_scenes_obey_their_split(seed, split, n_actors):
    scene = random_scene(random.Random(seed), split, n_actors)
    assert held_out(scene) == (split == "test")
    assert n_actors is None or len(scene.actors) == n_actors


# ---------------------------------------------------------------- drawing


@pytest.mark.skipif(PIL.__version__ != "13.0.0", reason="another Pillow may round differently")
def test_pictures_stay_byte_for_byte():
    frames = [
        frame
        for split in SPLITS
        for story in make_stories(6, split, seed=3)
        for take in (0, 1)
        for frame in story.frames(64, take)
    ]
    digest = hashlib.sha256(b"".join(frame.tobytes() for frame in frames)).hexdigest()
    assert digest[:16] == "00077c607f6fb638"


def test_drawings_are_those_the_weights_were_trained_on():
    """Coarse, so that another Pillow may round differently: mean colour of the four quarters of
    12 pictures."""
    rng, colours = random.Random(6), []
    for _ in range(12):
        small = render(random_scene(rng), 64, rng.randrange(1000)).resize(
            (2, 2), Image.Resampling.BOX
        )
        colours += list(small.tobytes())
    golden = """
        219 188 192 236 189 160 182 161 144 184 141 137
        134 201 211 178 220 224 184 168 149 185 177 148
        205 177 178 223 190 168 190 152 144 177 144 144
        69 61 126 99 103 145 135 123 160 142 135 147
        69 61 126 84 92 149 147 122 147 142 121 163
        190 205 234 184 198 229 174 174 195 166 155 173
        221 205 204 241 199 171 196 153 132 183 139 125
        192 203 230 184 198 229 184 185 190 166 152 162
        70 61 127 85 93 149 146 126 151 147 131 137
        189 204 234 186 194 223 191 169 165 185 193 204
        187 197 219 182 197 229 175 192 192 166 162 180
        189 204 233 180 193 223 174 178 196 170 168 184
    """
    golden = [int(number) for number in golden.split()]
    assert max(abs(a - b) for a, b in zip(colours, golden, strict=True)) <= 2


@given(scenes, st.integers(16, 130), seeds)
@effort(max_examples=40)
def test_every_scene_can_be_drawn_at_every_size(scene, size, seed):
    picture = render(scene, size, seed)
    assert picture.size == (size, size) and picture.mode == "RGB"
    assert picture.tobytes() == render(scene, size, seed).tobytes()


def test_drawing_leaves_the_cached_background_alone():
    empty = Scene("snow", (Actor("Pip", "sleeps", "ball", "red"),))
    first = render(empty, 48, 3).tobytes()
    render(Scene("snow", (Actor("Bruno", "jumps", "umbrella", "blue"),)), 48, 3)
    assert render(empty, 48, 3).tobytes() == first


@pytest.mark.parametrize("size", (64, 128))
def test_jitter_is_modest(size):
    "Where the figure differs from its place moves by at most 2 of 64 pixels to each side."
    scene, left = Scene("moon", (Actor("Milo", "waves", "ball", "red"),)), []
    for seed in range(60):
        picture = render(scene, size, seed)
        columns = [
            x
            for x in range(size)
            if colour_pixels(picture.crop((x, 0, x + 1, size)), SCARF_COLOURS["red"], 60)
        ]
        left.append(min(columns))
    assert 0 < max(left) - min(left) <= 4.5 * size / 64


def changed_columns(one: Image.Image, other: Image.Image) -> tuple[int, int]:
    """First and one past the last column that differs visibly.

    (Shrinking lets colours ring a little further.)"""
    left, _, right, _ = (
        ImageChops.difference(one, other)
        .convert("L")
        .point(lambda value: 255 * (value > 12))
        .getbbox()
    )
    return left, right


@pytest.mark.parametrize("name", CHARACTERS)
@pytest.mark.parametrize("action", ACTIONS)
def test_two_actors_keep_to_their_halves(name, action):
    "Changing one actor never changes the picture deep inside the other one's half."
    others = [other for other in CHARACTERS if other != name]
    for prop in PROPS:
        for seed in range(2):
            here = Actor(name, action, prop, "red")
            on_left, on_right = (
                [render(Scene("home", pair), 64, seed) for pair in pairs]
                for pairs in (
                    [(here, Actor(other, "sleeps", "ball", "blue")) for other in others[:2]],
                    [(Actor(other, "jumps", "umbrella", "blue"), here) for other in others[:2]],
                )
            )
            changed = changed_columns(*on_left)
            assert changed[0] >= 29, "the right actor reaches into the left half"
            changed = changed_columns(*on_right)
            assert changed[1] <= 35, "the left actor reaches into the right half"


@pytest.mark.parametrize("name", CHARACTERS)
def test_the_scarf_can_be_read_from_the_picture(name):
    "The right colour gains most pixels over the same picture with another scarf."
    for k, (action, prop) in enumerate(itertools.product(ACTIONS, PROPS)):
        casts = {scarf: (Actor(name, action, prop, scarf),) for scarf in SCARVES}
        pictures = {
            scarf: render(Scene(SETTINGS[k % 5], cast), 64, 1) for scarf, cast in casts.items()
        }
        for scarf, picture in pictures.items():
            others = [
                colour_pixels(other, SCARF_COLOURS[scarf])
                for key, other in pictures.items()
                if key != scarf
            ]
            assert colour_pixels(picture, SCARF_COLOURS[scarf]) >= max(others) + 20


def test_nothing_on_a_character_has_a_scarf_colour():
    for look in LOOKS.values():
        for colour in (look.fur, look.light):
            assert all(
                sum(abs(a - b) for a, b in zip(colour, scarf)) > 110
                for scarf in SCARF_COLOURS.values()
            )


def test_a_jump_is_in_the_air():
    for name in CHARACTERS:
        tops = {}
        for action in ACTIONS:
            picture = render(Scene("home", (Actor(name, action, "ball", "blue"),)), 64, 0)
            tops[action] = min(
                y
                for y in range(64)
                if colour_pixels(picture.crop((0, y, 64, y + 1)), SCARF_COLOURS["blue"], 60)
            )
        assert tops["jumps"] + 5 <= min(tops["waves"], tops["sleeps"])


def test_drawing_is_fast():
    "Far below what is usual (several hundred a second), so that only a real slip fails."
    rng = random.Random(0)
    drawn = [random_scene(rng) for _ in range(60)]
    for seed, scene in enumerate(drawn):
        render(scene, 64, seed)
    start = time.process_time()
    for seed, scene in enumerate(drawn):
        render(scene, 64, seed)
    assert 60 / (time.process_time() - start) > 100


def test_pictures_for_the_reader():
    frame = render(random_scene(random.Random(0)), 32)
    assert contact_sheet([frame] * 5, columns=3, scale=2, gap=1).size == (3 * 65 - 1, 2 * 65 - 1)
    assert contact_sheet([frame], columns=6).size == (32, 32)
    for n_frames in (3, 8, 16):
        picture = draw_truth(make_story(1, n_frames=n_frames), size=64)
        assert min(picture.size) > 150


# ---------------------------------------------------------------- bad input

GOOD = dict(name="Milo", action="waves", prop="ball", scarf="red")


@pytest.mark.parametrize("field", GOOD)
@pytest.mark.parametrize("value", ["nobody", "", None, 3, ["ball"]])
def test_unknown_values_are_named(field, value):
    with pytest.raises(ValueError, match=rf"Actor\.{field} is .*allowed: \w+, "):
        Actor(**GOOD | {field: value})


@pytest.mark.parametrize(
    "cast, error",
    [
        ((), ValueError),
        ((Actor(**GOOD),) * 2, ValueError),
        (("Milo",), TypeError),
        (tuple(Actor(**GOOD | {"name": name}) for name in CHARACTERS[:3]), ValueError),
    ],
)
def test_a_scene_has_one_or_two_different_actors(cast, error):
    with pytest.raises(error, match="Scene.actors"):
        Scene("beach", cast)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Scene("park", (Actor(**GOOD),)), "Scene.setting is 'park'; allowed: beach"),
        (lambda: random_scene(random.Random(0), "dev"), "split is 'dev'"),
        (lambda: random_scene(random.Random(0), n_actors=3), "n_actors is 3"),
        (lambda: render(Scene("beach", (Actor(**GOOD),)), size=15), "size is 15"),
        (lambda: contact_sheet([]), "images is empty"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
