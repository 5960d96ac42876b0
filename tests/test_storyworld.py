"""storyworld: the truth recomputed by a second program, long stories, determinism."""

import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
from functools import cache

import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from causal_story.captions import describe
from causal_story.cartoon import (
    ACTIONS,
    CHARACTERS,
    PRONOUNS,
    PROPS,
    SCARVES,
    SETTINGS,
    SPLITS,
    Scene,
    held_out,
    random_scene,
)
from causal_story.narrator import Fact, Story
from causal_story.storyworld import make_stories, make_story

splits, lengths, seeds = st.sampled_from(SPLITS), st.integers(3, 16), st.integers(0, 10**9)


@cache
def stories_of(split: str, n_frames: int) -> list[Story]:
    "The same 150 stories for every test that needs some."
    return make_stories(150, split, seed=11, n_frames=n_frames)


# ---------------------------------------------------------------- the truth, by a second program


def words_of(caption: str) -> list[str]:
    return re.findall(r"[a-z]+", caption.lower())


def read_caption(caption: str, scene: Scene, known: set) -> tuple[set, set, set]:
    """What a caption states, who moves and who takes another prop; read from its words alone.

    `known`: who was shown before."""
    words, names = words_of(caption), [actor.name for actor in scene.actors]
    stated, moved, picked = set(), set(), set()
    if set(words) & set(SETTINGS):
        stated.add(("setting", None))
        if (
            "meanwhile" not in words or "goes" in words
        ):  # "Meanwhile at home he jumps": he was there
            moved |= {name for name in names if name in known}
    stated |= {("character", name) for name in CHARACTERS if name.lower() in words}
    speaker = names[0]  # only the first-named of a pair is ever introduced
    if set(words) & set(PROPS):
        stated.add(("prop", speaker))
        picked |= {speaker} & known
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
    """Every fact, from captions and scenes.

    Frame j tells it if it shows the actor and nothing changed in frames j+1 … i."""
    known, read = set(), []
    for caption, scene in zip(story.captions, story.scenes):
        read.append(read_caption(caption, scene, known))
        known |= {actor.name for actor in scene.actors}

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


def name_of(story: Story, fact: Fact) -> str:
    "The character that a fact is about."
    return story.scenes[fact.frame].actors[fact.actor].name


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("n_frames", (3, 5, 6, 8, 9, 12, 16))
def test_truth_equals_brute_force(split, n_frames):
    for story in stories_of(split, n_frames):
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
@pytest.mark.parametrize("n_frames", (8, 16))
def test_actions_are_told_left_to_right(split, n_frames):
    for story in stories_of(split, n_frames):
        for caption, scene in zip(story.captions, story.scenes):
            words = words_of(caption)
            verbs = [action for word in words for action in ACTIONS if word in VERBS[action]]
            actions = [actor.action for actor in scene.actors]
            assert verbs == actions or verbs == actions[:1] and len(set(actions)) == 1, caption


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("n_frames", (8, 16))
def test_a_story_changes_only_what_its_captions_say(split, n_frames):
    for story in stories_of(split, n_frames):
        last, known = {}, set()
        for caption, scene in zip(story.captions, story.scenes):
            _, moved, picked = read_caption(caption, scene, known)
            for actor in scene.actors:
                now = scene.setting, actor.prop, actor.scarf
                before = last.get(actor.name, now)
                assert before[2] == now[2]
                assert (before[1] != now[1]) == (actor.name in picked and actor.name in last), (
                    caption
                )
                assert before[0] == now[0] or actor.name in moved, caption
                last[actor.name] = now
            known |= {actor.name for actor in scene.actors}
        if n_frames <= 8:
            assert len({PRONOUNS[name] for name in last}) == len(last), (
                "he and she must not be ambiguous"
            )


def test_scarves_are_said_in_half_of_the_stories_at_the_first_appearance():
    stories = make_stories(1000, seed=14)
    mention = [
        any(fact.attribute == "scarf" and fact.stated for fact in story.facts) for story in stories
    ]
    assert 0.45 < sum(mention) / len(stories) < 0.55
    for story, mentions_scarves in zip(stories, mention):
        known = set()
        for fact in (fact for fact in story.facts if fact.attribute == "scarf"):
            name = name_of(story, fact)
            assert fact.stated == (mentions_scarves and name not in known)
            known.add(name)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("n_frames", (5, 8, 16))
def test_the_previous_frame_is_often_not_enough(split, n_frames):
    facts = history_only(split, n_frames)
    assert sum(fact.frame - max(fact.sources) >= 2 for fact in facts) / len(facts) >= 0.35


# ---------------------------------------------------------------- long stories

long_lengths = st.integers(9, 16)


@given(seeds, splits, long_lengths)
@effort(max_examples=100)
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
@effort(max_examples=100)
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
@effort(max_examples=100)
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
    for story in stories_of(split, n_frames):
        names = {actor.name for scene in story.scenes for actor in scene.actors}
        assert 2 <= len(names) <= 4
        pronouns = [PRONOUNS[name] for name in names]
        assert max(pronouns.count("he"), pronouns.count("she")) <= 2
        scarves = {actor.name: actor.scarf for scene in story.scenes for actor in scene.actors}
        assert len(set(scarves.values())) == len(names), "nobody wears another one's scarf"


def history_only(split: str, n_frames: int) -> list[Fact]:
    "Facts that only the past tells."
    return [fact for story in stories_of(split, n_frames) for fact in story.facts if fact.sources]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("n_frames", (12, 16))
def test_every_number_of_frames_that_do_not_tell_occurs(split, n_frames):
    "Of k earlier frames one at least tells a fact, so that at length n up to n - 2 do not."
    counts = [0] * (n_frames - 1)
    for fact in history_only(split, n_frames):
        counts[fact.frame - len(fact.sources)] += 1
    assert min(counts) >= 25, counts


@pytest.mark.parametrize("split", SPLITS)
def test_sources_lie_far_back(split):
    facts = history_only(split, 16)
    nearest = [fact.frame - max(fact.sources) for fact in facts]
    oldest = [fact.frame - min(fact.sources) for fact in facts]
    assert max(oldest) == 15 and max(nearest) >= 12
    assert sum(distance >= 10 for distance in oldest) / len(facts) > 0.2
    assert sum(distance >= 10 for distance in nearest) >= 100


@pytest.mark.parametrize("split", SPLITS)
def test_frames_that_do_not_tell_come_in_runs(split):
    longest = []
    for fact in history_only(split, 16):
        tells = [k in fact.sources for k in range(fact.frame)]
        runs = [len(list(run)) for telling, run in itertools.groupby(tells) if not telling]
        longest.append(max(runs, default=0))
    assert sum(run >= 3 for run in longest) / len(longest) > 0.5


def test_long_stories_need_no_new_words():
    "So that a model tuned on five frames can read them."
    rng = random.Random(4)
    known = {word for story in make_stories(1000) for c in story.captions for word in words_of(c)}
    known |= {w for _ in range(1000) for w in words_of(describe(random_scene(rng), rng))}
    for split in SPLITS:
        for story in stories_of(split, 16):
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


@cache
def all_captions(split: str) -> list[str]:
    rng = random.Random(4)
    captions = [describe(random_scene(rng, split), rng, split) for _ in range(1000)]
    for n_frames in (3, 5, 8):
        for story in make_stories(300, split, seed=16, n_frames=n_frames):
            captions += story.captions
    return captions


def test_test_words_are_training_words():
    known = {word for caption in all_captions("train") for word in words_of(caption)}
    new = {word for caption in all_captions("test") for word in words_of(caption)} - known
    assert not new
    assert len(known) < 200


def test_test_sentences_are_mostly_new():
    known = set(all_captions("train"))
    test = all_captions("test")
    assert sum(caption in known for caption in test) / len(test) < 0.05


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_well_formed(split):
    for caption in all_captions(split):
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
    printed = {
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
    assert len(printed) == 1


def test_stories_are_those_the_weights_were_trained_on():
    """A changed grammar, order of choices or rule makes shipped weights and published scores
    worthless: change this number only together with them."""
    stories = [
        make_story(seed, split, n) for split in SPLITS for n in (3, 5, 8) for seed in range(30)
    ]
    text = json.dumps([[story.captions, story.truth()] for story in stories])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "3f7e195b61d7f445"


GOLDEN = {  # up to eight frames: recorded before longer stories could be told
    3: "f0b1993f4d8fb798",
    4: "845aa24ed16e2a60",
    5: "ade1486b9ff563d3",
    6: "922245ddb591fe08",
    7: "797dd2304247e621",
    8: "d475017ce5c5ea57",
    9: "483919dc10243c2f",
    12: "4b3339f9a9998950",
    16: "99c3d95bf922371d",
}


@pytest.mark.parametrize("n_frames", GOLDEN)
def test_stories_stay_byte_for_byte(n_frames):
    stories = [
        story
        for split in SPLITS
        for seed in (0, 77)
        for story in make_stories({5: 100, 12: 20, 16: 20}.get(n_frames, 40), split, seed, n_frames)
    ]
    text = json.dumps([[story.captions, story.truth()] for story in stories])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == GOLDEN[n_frames]


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


def test_stories_of_mixed_lengths_have_them_in_turn():
    stories = make_stories(12, seed=3, n_frames=(3, 12))
    assert [len(story.captions) for story in stories] == [*range(3, 13), 3, 4]
    assert stories[9] == make_story(3_000_009, n_frames=12)
    assert stories[:5] == make_stories(5, seed=3, n_frames=[3, 12])
    for wrong in ((12, 3), (5, 5), (3, 5, 8), (4,)):
        with pytest.raises(ValueError, match="give the shortest and the longest"):
            make_stories(2, n_frames=wrong)
    with pytest.raises(ValueError, match="n_frames"):
        make_stories(20, n_frames=(3, 17))


def test_frames_and_takes():
    story = make_story(3)
    assert [frame.size for frame in story.frames(32)] == [(32, 32)] * 5
    one, other = story.frames(64), story.frames(64, take=1)
    assert all(a.tobytes() != b.tobytes() for a, b in zip(one, other))
    assert [a.tobytes() for a in one] == [a.tobytes() for a in story.frames(64, take=0)]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: make_story(0, "dev"), "split is 'dev'; allowed: train, val, test"),
        (lambda: make_story(0, n_frames=2), "n_frames is 2"),
        (lambda: make_story(0, n_frames=17), "n_frames is 17"),
        (lambda: Story.from_truth({"version": 2}), "version 2"),
        (lambda: Story.from_truth({"version": 1, "seed": 0, "scenes": []}), "no 'facts'"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
