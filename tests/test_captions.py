"""captions: templates that say what they were asked to say, in words that training knows."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from causal_story.captions import PAIR, SOLO, describe
from causal_story.cartoon import (
    ACTIONS,
    CHARACTERS,
    PRONOUNS,
    PROPS,
    SCARVES,
    SETTINGS,
    SPLITS,
    Actor,
    Scene,
    random_scene,
)

splits, seeds = st.sampled_from(SPLITS), st.integers(0, 10**9)
VERBS = {
    action: {action, action[:-1], action[:-1] + "ing", action[:-2] + "ing"} for action in ACTIONS
}


def words_of(caption: str) -> list[str]:
    return re.findall(r"[a-z]+", caption.lower())


@given(seeds, splits, st.sets(st.sampled_from(("setting", "prop", "scarf"))))
@effort(max_examples=300)
def test_descriptions_tell_what_was_asked_and_nothing_else(seed, split, say):
    rng = random.Random(seed)
    scene = random_scene(rng, split)
    words = words_of(describe(scene, rng, split, tuple(say)))
    expected = {actor.name.lower() for actor in scene.actors}
    expected |= {scene.setting} if "setting" in say else set()
    expected |= {
        getattr(actor, attribute) for attribute in say - {"setting"} for actor in scene.actors
    }
    values = {*SETTINGS, *PROPS, *SCARVES, *(name.lower() for name in CHARACTERS)}
    assert set(words) & values == expected
    assert all(set(words) & VERBS[actor.action] for actor in scene.actors)
    assert len(words) <= 28


def test_a_description_takes_wordings_of_ones_own():
    scene = Scene("moon", (Actor("Luna", "waves", "book", "red"),))
    own = ("{name}[, in {scarf},] {does}[ {place}].",)
    assert (
        describe(scene, random.Random(0), templates=own)
        == "Luna, in a red scarf, waves on the moon."
    )
    assert describe(scene, random.Random(0), "test", (), templates=own) == "Luna waves."
    with pytest.raises(ValueError, match="no template can do with the fields"):
        describe(
            scene, random.Random(0), say=("setting",), templates=("{name} {does} with {prop}.",)
        )


def test_training_and_held_out_wordings_share_words_but_none_is_the_same():
    for templates in (SOLO, PAIR):
        plain = {
            split: {re.sub(r"[\[\]]", "", template) for template in templates[split]}
            for split in ("train", "test")
        }
        assert len(plain["train"]) == len(templates["train"]) and len(plain["test"]) == len(
            templates["test"]
        )
        assert not plain["train"] & plain["test"]
        words = {
            split: {
                word
                for template in texts
                for word in re.findall(r"[a-z]+", re.sub(r"{\w+}", "", template).lower())
            }
            for split, texts in plain.items()
        }
        assert words["test"] <= words["train"] | {"a"}


def test_a_description_of_two_binds_each_attribute_to_its_actor():
    rng = random.Random(3)
    for k in range(600):
        split, scene = SPLITS[k % 3], random_scene(rng, SPLITS[k % 3], 2)
        one, two = scene.actors
        if one.prop == two.prop or one.scarf == two.scarf or one.action == two.action:
            continue
        words = words_of(describe(scene, rng, split))
        both = words[:3:2] == [
            one.name.lower(),
            two.name.lower(),
        ]  # "Milo and Kiki are …", "Milo joins Kiki …"
        start = words.index(
            f"{PRONOUNS[two.name]}"
            if both and words.count(two.name.lower()) == 1
            else two.name.lower(),
            3 if both else 0,
        )
        for attribute in (one.prop, one.scarf):
            assert words.index(attribute) < start, words
        for attribute in (two.prop, two.scarf):
            assert words.index(attribute) > start, words


@pytest.mark.parametrize(
    "options, message", [({"split": "dev"}, "split is 'dev'"), ({"say": ("hat",)}, "say is 'hat'")]
)
def test_bad_arguments_are_named(options, message):
    scene = Scene("beach", (Actor("Milo", "waves", "ball", "red"),))
    with pytest.raises(ValueError, match=message):
        describe(scene, random.Random(0), **options)
