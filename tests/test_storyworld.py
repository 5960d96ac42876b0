"""storyworld: the truth recomputed by a second program, determinism across processes, properties over random scenes."""

import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
from functools import cache

import PIL
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from PIL import Image, ImageChops

from causal_story.storyworld import (
    ACTIONS,
    CHARACTERS,
    LOOKS,
    PAIR,
    PRONOUNS,
    PROPS,
    SCARF_COLOURS,
    SCARVES,
    SETTINGS,
    SOLO,
    SPLITS,
    Actor,
    Fact,
    Scene,
    Story,
    colour_pixels,
    contact_sheet,
    describe,
    draw_truth,
    held_out,
    make_stories,
    make_story,
    random_scene,
    render,
)

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
splits, lengths, seeds = st.sampled_from(SPLITS), st.integers(3, 16), st.integers(0, 10**9)


# ---------------------------------------------------------------- the truth, read from captions and scenes by a second program


def words_of(caption: str) -> list[str]:
    return re.findall(r"[a-z]+", caption.lower())


def read_caption(caption: str, scene: Scene, seen: set) -> tuple[set, set, set]:
    "What a caption states, who moves and who takes another prop; read from its words alone. `seen`: who was shown before."
    words, names = words_of(caption), [actor.name for actor in scene.actors]
    stated, moved, picked = set(), set(), set()
    if set(words) & set(SETTINGS):
        stated.add(("setting", None))
        if (
            "meanwhile" not in words or "goes" in words
        ):  # "Meanwhile at home he jumps": he was there
            moved |= {name for name in names if name in seen}
    stated |= {("character", name) for name in CHARACTERS if name.lower() in words}
    speaker = names[0]  # only the first-named of a pair is ever introduced
    if set(words) & set(PROPS):
        stated.add(("prop", speaker))
        picked |= {speaker} & seen
    if set(words) & set(SCARVES):
        stated.add(("scarf", speaker))
    if "joins" in words:
        subject = words[words.index("joins") - 1]
        if subject not in (
            "he",
            "she",
            *(name.lower() for name in names),
        ):  # "Pip, wearing a red scarf, joins her"
            subject = next(word for word in words if word in {name.lower() for name in names})
        moved |= {name for name in names if subject in (name.lower(), PRONOUNS[name])}
    return stated, moved, picked


def facts_by_brute_force(story: Story) -> list[Fact]:
    "Every fact, from captions and scenes: frame j tells it if it shows the actor and nothing changed in frames j+1 … i."
    seen, read = set(), []
    for caption, scene in zip(story.captions, story.scenes):
        read.append(read_caption(caption, scene, seen))
        seen |= {actor.name for actor in scene.actors}

    def tells(j, i, name, kind):
        if not any(actor.name == name for actor in story.scenes[j].actors):
            return False
        return not any(name in read[k][kind] for k in range(j + 1, i + 1)) if kind else True

    facts = []
    for i, scene in enumerate(story.scenes):
        asked = [("setting", None, None, scene.setting)]
        for index, actor in enumerate(scene.actors):
            asked += [
                (
                    attribute,
                    index,
                    actor.name,
                    getattr(actor, "name" if attribute == "character" else attribute),
                )
                for attribute in ("character", "prop", "scarf", "action")
            ]
        for attribute, index, name, value in asked:
            stated = attribute == "action" or (attribute, name) in read[i][0]
            kind = {"setting": 1, "prop": 2}.get(attribute, 0)
            who = [actor.name for actor in scene.actors] if name is None else [name]
            sources = (
                ()
                if stated
                else tuple(j for j in range(i) if any(tells(j, i, person, kind) for person in who))
            )
            said = any((attribute, name) in read[j][0] for j in sources)
            facts.append(Fact(i, attribute, index, value, stated, sources, said))
    return facts


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("n_frames", (*range(3, 10), 12, 16))
def test_truth_equals_brute_force(split, n_frames):
    for story in make_stories(150, split, seed=11, n_frames=n_frames):
        assert story.facts == facts_by_brute_force(story), story.captions


def test_brute_force_notices_a_wrong_source():
    story = make_story(954)
    wrong = next(k for k, fact in enumerate(story.facts) if len(fact.sources) > 1)
    fact = story.facts[wrong]
    story.facts[wrong] = Fact(
        fact.frame,
        fact.attribute,
        fact.actor,
        fact.value,
        fact.stated,
        fact.sources[:-1],
        fact.said,
    )
    assert story.facts != facts_by_brute_force(story)


VERBS = {
    action: {action, action[:-1], action[:-1] + "ing", action[:-2] + "ing"} for action in ACTIONS
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("n_frames", (8, 14))
def test_actions_are_told_left_to_right(split, n_frames):
    for story in make_stories(200, split, seed=12, n_frames=n_frames):
        for caption, scene in zip(story.captions, story.scenes):
            told = [
                action for word in words_of(caption) for action in ACTIONS if word in VERBS[action]
            ]
            actions = [actor.action for actor in scene.actors]
            assert told == actions or told == actions[:1] and len(set(actions)) == 1, caption


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("n_frames", (8, 14))
def test_a_story_changes_only_what_its_captions_say(split, n_frames):
    for story in make_stories(200, split, seed=13, n_frames=n_frames):
        last, seen = {}, set()
        for caption, scene in zip(story.captions, story.scenes):
            _, moved, picked = read_caption(caption, scene, seen)
            for actor in scene.actors:
                now = scene.setting, actor.prop, actor.scarf
                before = last.get(actor.name, now)
                assert before[2] == now[2]
                assert (before[1] != now[1]) == (actor.name in picked and actor.name in last), (
                    caption
                )
                assert before[0] == now[0] or actor.name in moved, caption
                last[actor.name] = now
            seen |= {actor.name for actor in scene.actors}
        if n_frames <= 8:
            assert len({PRONOUNS[name] for name in last}) == len(last), (
                "he and she must not be ambiguous"
            )


def test_scarves_are_said_in_half_of_the_stories_at_the_first_appearance():
    stories = make_stories(1000, seed=14)
    said = [
        any(fact.attribute == "scarf" and fact.stated for fact in story.facts) for story in stories
    ]
    assert 0.45 < sum(said) / len(said) < 0.55
    for story, told in zip(stories, said):
        seen = set()
        for fact in (fact for fact in story.facts if fact.attribute == "scarf"):
            name = story.scenes[fact.frame].actors[fact.actor].name
            assert fact.stated == (told and name not in seen)
            seen.add(name)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("n_frames", (5, 8))
def test_the_previous_frame_is_often_not_enough(split, n_frames):
    facts = [
        fact
        for story in make_stories(400, split, seed=15, n_frames=n_frames)
        for fact in story.facts
        if fact.sources
    ]
    assert sum(fact.frame - max(fact.sources) >= 2 for fact in facts) / len(facts) >= 0.35


# ---------------------------------------------------------------- long stories

long_lengths = st.integers(9, 16)


def name_of(story: Story, fact: Fact) -> str:
    return story.scenes[fact.frame].actors[fact.actor].name


@given(seeds, splits, long_lengths)
@effort(max_examples=200)
def test_each_source_really_shows_what_it_tells(seed, split, n_frames):
    story = make_story(seed, split, n_frames)
    for fact in story.facts:
        assert not (fact.stated and fact.sources)
        for source in fact.sources:
            assert source < fact.frame
            scene = story.scenes[source]
            if fact.attribute == "setting":
                assert scene.setting == fact.value
                continue
            field = "name" if fact.attribute == "character" else fact.attribute
            (actor,) = [a for a in scene.actors if a.name == name_of(story, fact)]
            assert getattr(actor, field) == fact.value


@given(seeds, splits, long_lengths)
@effort(max_examples=200)
def test_a_reader_always_knows_who_is_meant(seed, split, n_frames):
    """A pronoun means the only one who has it so far, or the one of the frame before, or the only
    one who was ever seen at the place that the caption names."""
    story = make_story(seed, split, n_frames)
    for fact in story.facts:
        if fact.attribute != "character" or fact.stated:
            continue
        earlier = story.scenes[: fact.frame]
        rivals = {
            actor.name
            for scene in earlier
            for actor in scene.actors
            if PRONOUNS[actor.name] == PRONOUNS[fact.value] and actor.name != fact.value
        }
        meanwhile = "meanwhile" in words_of(story.captions[fact.frame])
        before = {actor.name for actor in earlier[-1].actors}
        place = story.scenes[fact.frame].setting
        at_place = {a.name for scene in earlier if scene.setting == place for a in scene.actors}
        all_places = {
            scene.setting for scene in earlier for a in scene.actors if a.name == fact.value
        }
        assert (
            not rivals
            or (not meanwhile and fact.value in before and not rivals & before)
            or (
                place in words_of(story.captions[fact.frame])
                and all_places == {place}
                and not rivals & at_place
            )
            or "they" in words_of(story.captions[fact.frame])
        ), story.captions[: fact.frame + 1]


@given(seeds, splits, long_lengths)
@effort(max_examples=200)
def test_they_are_the_only_pair_or_the_one_of_the_frame_before(seed, split, n_frames):
    story = make_story(seed, split, n_frames)
    casts = [{actor.name for actor in scene.actors} for scene in story.scenes]
    for k, (caption, cast) in enumerate(zip(story.captions, casts)):
        words = words_of(caption)
        if "they" in words and not {name.lower() for name in cast} & set(words):
            pairs = {frozenset(c) for c in casts[:k] if len(c) == 2}
            at_place = {
                frozenset(c)
                for c, scene in zip(casts[:k], story.scenes)
                if len(c) == 2 and scene.setting == story.scenes[k].setting
            }
            assert (
                pairs == {frozenset(cast)}
                or casts[k - 1] == cast
                or (story.scenes[k].setting in words and at_place == {frozenset(cast)})
            ), story.captions[: k + 1]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("n_frames", (9, 12, 16))
def test_long_stories_have_two_or_three_threads(split, n_frames):
    for story in make_stories(200, split, seed=18, n_frames=n_frames):
        names = {actor.name for scene in story.scenes for actor in scene.actors}
        assert 2 <= len(names) <= 4
        pronouns = [PRONOUNS[name] for name in names]
        assert max(pronouns.count("he"), pronouns.count("she")) <= 2
        scarves = {actor.name: actor.scarf for scene in story.scenes for actor in scene.actors}
        assert len(set(scarves.values())) == len(names), "nobody wears another one's scarf"


def history_only(n_frames: int, split: str, n: int = 400) -> list[Fact]:
    stories = make_stories(n, split, seed=19, n_frames=n_frames)
    return [fact for story in stories for fact in story.facts if fact.sources]


@pytest.mark.parametrize("split", SPLITS)
def test_every_number_of_frames_that_do_not_tell_occurs(split):
    "Of k earlier frames one at least tells a fact, so that at length n up to n - 2 do not."
    for n_frames, fewest in ((12, 100), (16, 80)):
        facts = history_only(n_frames, split)
        counts = [0] * (n_frames - 1)
        for fact in facts:
            counts[fact.frame - len(fact.sources)] += 1
        assert min(counts) >= fewest, counts


@pytest.mark.parametrize("split", SPLITS)
def test_sources_lie_far_back(split):
    facts = history_only(16, split)
    assert max(fact.frame - max(fact.sources) for fact in facts) >= 14
    assert sum(fact.frame - min(fact.sources) >= 10 for fact in facts) / len(facts) > 0.2
    far = [fact for fact in facts if fact.frame - max(fact.sources) >= 10]
    assert len(far) >= 300, "the nearest source is ten frames back or more"
    assert sum(fact.frame - max(fact.sources) >= 2 for fact in facts) / len(facts) >= 0.35


@pytest.mark.parametrize("split", SPLITS)
def test_frames_that_do_not_tell_come_in_runs(split):
    runs = []
    for fact in history_only(16, split, 100):
        tells = [k in fact.sources for k in range(fact.frame)]
        runs.append(
            max((len(list(g)) for told, g in itertools.groupby(tells) if not told), default=0)
        )
    assert sum(run >= 3 for run in runs) / len(runs) > 0.5


def test_long_stories_need_no_new_words():
    "So that a model tuned on five frames can read them."
    rng = random.Random(4)
    known = {word for story in make_stories(1000) for c in story.captions for word in words_of(c)}
    known |= {w for _ in range(1000) for w in words_of(describe(random_scene(rng), rng))}
    for split in SPLITS:
        for story in make_stories(200, split, n_frames=16):
            for caption in story.captions:
                assert not set(words_of(caption)) - known, caption
                assert len(words_of(caption)) <= 24


# ---------------------------------------------------------------- splits and words


@given(seeds, splits, lengths)
@effort(max_examples=150)
def test_held_out_combinations_stay_in_the_test_split(seed, split, n_frames):
    story = make_story(seed, split, n_frames)
    assert len(story.scenes) == len(story.captions) == n_frames
    assert any(map(held_out, story.scenes)) == (split == "test")


@given(seeds, splits, st.sampled_from((None, 1, 2)))
@effort(max_examples=150)
def test_random_scenes_obey_their_split(seed, split, n_actors):
    scene = random_scene(random.Random(seed), split, n_actors)
    assert held_out(scene) == (split == "test")
    assert n_actors is None or len(scene.actors) == n_actors


@given(seeds, splits, st.sets(st.sampled_from(("setting", "prop", "scarf"))))
@effort(max_examples=300)
def test_descriptions_tell_what_was_asked_and_nothing_else(seed, split, say):
    rng = random.Random(seed)
    scene = random_scene(rng, split)
    words = words_of(describe(scene, rng, split, tuple(say)))
    told = {actor.name.lower() for actor in scene.actors}
    told |= {scene.setting} if "setting" in say else set()
    told |= {getattr(actor, attribute) for attribute in say - {"setting"} for actor in scene.actors}
    values = {*SETTINGS, *PROPS, *SCARVES, *(name.lower() for name in CHARACTERS)}
    assert set(words) & values == told
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
        said = {
            split: {
                word
                for template in texts
                for word in re.findall(r"[a-z]+", re.sub(r"{\w+}", "", template).lower())
            }
            for split, texts in plain.items()
        }
        assert said["test"] <= said["train"] | {"a"}


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


@cache
def all_captions(split: str, n: int) -> list[str]:
    rng = random.Random(4)
    stories = [
        story
        for n_frames in (3, 5, 8)
        for story in make_stories(n, split, seed=16, n_frames=n_frames)
    ]
    return [caption for story in stories for caption in story.captions] + [
        describe(random_scene(rng, split), rng, split) for _ in range(n)
    ]


def test_test_words_are_training_words():
    known = {word for caption in all_captions("train", 1000) for word in words_of(caption)}
    new = {word for caption in all_captions("test", 1000) for word in words_of(caption)} - known
    assert not new
    assert len(known) < 200


def test_test_sentences_are_mostly_new():
    known, test = set(all_captions("train", 1000)), all_captions("test", 1000)
    assert sum(caption in known for caption in test) / len(test) < 0.05


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_well_formed(split):
    for caption in all_captions(split, 300):
        assert re.fullmatch(r"(?:[A-Z][A-Za-z]*(?:,? [A-Za-z]+)*\.(?: |$))+", caption), caption
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  |\[|\]|[{}]", caption), caption


# ---------------------------------------------------------------- the same everywhere

FINGERPRINT = """
import hashlib, json
from causal_story.storyworld import make_stories
stories = make_stories(20, "test", seed=5, n_frames=6)
print(hashlib.sha256(json.dumps([[s.captions, s.truth()] for s in stories]).encode()).hexdigest())
print(hashlib.sha256(b"".join(f.tobytes() for f in stories[0].frames(32))).hexdigest())
"""


def test_same_story_in_every_process(tmp_path):
    told = {
        subprocess.run(
            [sys.executable, "-c", FINGERPRINT],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "4711")
    }
    assert len(told) == 1


def test_stories_are_those_the_weights_were_trained_on():
    """A changed grammar, order of choices or rule makes shipped weights and published scores worthless: change this number
    only together with them."""
    stories = [
        make_story(seed, split, n) for split in SPLITS for n in (3, 5, 8) for seed in range(30)
    ]
    told = json.dumps([[story.captions, story.truth()] for story in stories])
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "3f7e195b61d7f445"


GOLDEN = {  # recorded before stories of more than eight frames could be told
    3: "f0b1993f4d8fb798",
    4: "845aa24ed16e2a60",
    5: "ade1486b9ff563d3",
    6: "922245ddb591fe08",
    7: "797dd2304247e621",
    8: "d475017ce5c5ea57",
}


@pytest.mark.parametrize("n_frames", GOLDEN)
def test_stories_of_up_to_eight_frames_stay_byte_for_byte(n_frames):
    stories = [
        story
        for split in SPLITS
        for seed in (0, 77)
        for story in make_stories(100 if n_frames == 5 else 40, split, seed, n_frames)
    ]
    told = json.dumps([[story.captions, story.truth()] for story in stories])
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == GOLDEN[n_frames]


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
    "Coarse, so that another Pillow may round differently: mean colour of the four quarters of 12 pictures."
    rng, colours = random.Random(6), []
    for _ in range(12):
        small = render(random_scene(rng), 64, rng.randrange(1000)).resize(
            (2, 2), Image.Resampling.BOX
        )
        colours += list(small.tobytes())
    golden = [
        219,
        188,
        192,
        236,
        189,
        160,
        182,
        161,
        144,
        184,
        141,
        137,
        134,
        201,
        211,
        178,
        220,
        224,
        184,
        168,
        149,
        185,
        177,
        148,
        205,
        177,
        178,
        223,
        190,
        168,
        190,
        152,
        144,
        177,
        144,
        144,
        69,
        61,
        126,
        99,
        103,
        145,
        135,
        123,
        160,
        142,
        135,
        147,
        69,
        61,
        126,
        84,
        92,
        149,
        147,
        122,
        147,
        142,
        121,
        163,
        190,
        205,
        234,
        184,
        198,
        229,
        174,
        174,
        195,
        166,
        155,
        173,
        221,
        205,
        204,
        241,
        199,
        171,
        196,
        153,
        132,
        183,
        139,
        125,
        192,
        203,
        230,
        184,
        198,
        229,
        184,
        185,
        190,
        166,
        152,
        162,
        70,
        61,
        127,
        85,
        93,
        149,
        146,
        126,
        151,
        147,
        131,
        137,
        189,
        204,
        234,
        186,
        194,
        223,
        191,
        169,
        165,
        185,
        193,
        204,
        187,
        197,
        219,
        182,
        197,
        229,
        175,
        192,
        192,
        166,
        162,
        180,
        189,
        204,
        233,
        180,
        193,
        223,
        174,
        178,
        196,
        170,
        168,
        184,
    ]
    assert max(abs(a - b) for a, b in zip(colours, golden, strict=True)) <= 2


@given(seeds, splits, lengths)
@effort(max_examples=60)
def test_truth_survives_json(seed, split, n_frames):
    story = make_story(seed, split, n_frames)
    again = Story.from_truth(json.loads(json.dumps(story.truth())), story.captions)
    assert again == story
    assert again.truth() == story.truth()


def test_stories_of_other_seeds_differ():
    assert len({tuple(story.captions) for story in make_stories(300)}) > 290
    assert make_stories(3, seed=1)[2] == make_story(1_000_002)
    assert make_story(1, "train").captions != make_story(1, "val").captions


# ---------------------------------------------------------------- drawing


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
    "First and one past the last column that differs visibly (shrinking lets colours ring a little further)."
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
    "Of the four scarf colours the right one gains most pixels over the same picture with another scarf."
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
    some = [random_scene(rng) for _ in range(60)]
    for seed, scene in enumerate(some):
        render(scene, 64, seed)
    start = time.process_time()
    for seed, scene in enumerate(some):
        render(scene, 64, seed)
    assert 60 / (time.process_time() - start) > 100


def test_frames_and_takes():
    story = make_story(3)
    assert [frame.size for frame in story.frames(32)] == [(32, 32)] * 5
    one, other = story.frames(64), story.frames(64, take=1)
    assert all(a.tobytes() != b.tobytes() for a, b in zip(one, other))
    assert [a.tobytes() for a in one] == [a.tobytes() for a in story.frames(64, take=0)]


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
        (lambda: make_story(0, "dev"), "split is 'dev'; allowed: train, val, test"),
        (lambda: make_story(0, n_frames=2), "n_frames is 2"),
        (lambda: make_story(0, n_frames=17), "n_frames is 17"),
        (lambda: random_scene(random.Random(0), "dev"), "split is 'dev'"),
        (lambda: random_scene(random.Random(0), n_actors=3), "n_actors is 3"),
        (
            lambda: describe(Scene("beach", (Actor(**GOOD),)), random.Random(0), "dev"),
            "split is 'dev'",
        ),
        (
            lambda: describe(Scene("beach", (Actor(**GOOD),)), random.Random(0), say=("hat",)),
            "say is 'hat'",
        ),
        (lambda: render(Scene("beach", (Actor(**GOOD),)), size=15), "size is 15"),
        (lambda: contact_sheet([]), "images is empty"),
        (lambda: Story.from_truth({"version": 2}), "version 2"),
        (lambda: Story.from_truth({"version": 1, "seed": 0, "scenes": []}), "no 'facts'"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
