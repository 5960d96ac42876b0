"""The frame reader: its targets, its loss, what it reads, and verdicts on facts by readers that say
what we want.
"""

import numpy
import pytest
import torch
from torch import nn

from causal_story.cartoon import CHARACTERS
from causal_story.reader import (
    OPTIONS,
    FrameReader,
    fact_rows,
    frames_tensor,
    read_frames,
    read_stories,
    reader_accuracy,
    reader_loss,
    scarf_consistency,
    scene_targets,
    score_facts,
)
from causal_story.storyworld import make_stories

STORIES = make_stories(6, split="val", seed=3)
TRUTHS = [story.truth() for story in STORIES]
DRAWN = [story.frames(size=16) for story in STORIES]


class Oracle:
    "Stands for a reader: answers from a list of scenes, frame after frame."

    device = torch.device("cpu")

    def __init__(self, scenes, absent=()):  # `absent`: characters it never sees
        self.targets, self.absent, self.at = scene_targets(scenes), absent, 0

    def __call__(self, frames):
        part = slice(self.at, self.at + len(frames))
        self.at += len(frames)
        logits = {
            name: nn.functional.one_hot(t[part].clamp(min=0).long(), 5).float()
            for name, t in self.targets.items()
        }
        logits["presence"] = self.targets["presence"][part] - 0.5
        for name in self.absent:
            logits["presence"][:, CHARACTERS.index(name)] = -1
        return logits


def scenes_of(stories, start=0):
    return [scene for story in stories for scene in story.scenes[start:]]


# ---------------------------------------------------------------- the reader


def test_targets_are_the_same_from_scenes_and_from_truth():
    for a, b in zip(
        scene_targets(STORIES[0].scenes).values(), scene_targets(TRUTHS[0]["scenes"]).values()
    ):
        assert torch.equal(a, b)


def test_targets_have_an_answer_exactly_where_somebody_is():
    targets = scene_targets(scenes_of(STORIES))
    for name in OPTIONS:
        assert torch.equal(targets[name] >= 0, targets["presence"] > 0)


def test_loss_ignores_what_an_absent_character_wears():
    model = FrameReader(width=16)
    batch = dict(frames=frames_tensor(STORIES[0].frames(64)), **scene_targets(STORIES[0].scenes))
    loss = reader_loss(model, batch)
    logits = model(batch["frames"])
    for name in OPTIONS:
        logits[name] = torch.where(
            (batch["presence"] > 0)[..., None], logits[name], torch.randn_like(logits[name])
        )
    torch.testing.assert_close(reader_loss(lambda frames: logits, batch), loss)


def test_reader_round_trip(tmp_path):
    reader = FrameReader(width=16).eval()
    reader.save_pretrained(tmp_path)
    again = FrameReader.from_pretrained(tmp_path)
    frames = frames_tensor(STORIES[0].frames(64))
    for a, b in zip(reader(frames).values(), again(frames).values()):
        assert torch.equal(a, b)


def test_reading_does_not_depend_on_the_batch_size():
    reader = FrameReader(width=16).eval()
    one, many = (read_frames(reader, STORIES[0].frames(64), batch_size=size) for size in (1, 64))
    for name in one:
        assert numpy.array_equal(one[name], many[name])


def test_perfect_reader_is_perfect_and_a_blind_spot_shows():
    scenes = scenes_of(STORIES)
    frames = torch.zeros(len(scenes), 3, 8, 8)
    assert set(reader_accuracy(Oracle(scenes), frames, scenes).values()) == {1.0}
    shown = {actor.name for scene in scenes for actor in scene.actors}
    accuracy = reader_accuracy(Oracle(scenes, absent=[min(shown)]), frames, scenes)
    assert accuracy["character"] < 1 and accuracy["scarf"] == 1


@pytest.mark.parametrize("bad", [torch.zeros(3, 8, 8), torch.zeros(2, 1, 8, 8)])
def test_frames_of_another_shape_are_refused(bad):
    with pytest.raises(ValueError, match="N, 3, H, W"):
        frames_tensor(bad)


def test_frames_of_another_type_are_refused():
    with pytest.raises(TypeError, match="frames"):
        frames_tensor([])
    with pytest.raises(TypeError, match="frames"):
        frames_tensor(["a.png"])


# ---------------------------------------------------------------- facts


@pytest.mark.parametrize("task", ["visualization", "continuation"])
def test_facts_know_how_many_share_their_frame(task):
    truths = [story.truth() for story in STORIES]
    rows = fact_rows(truths, task)
    seen = {(row["story"], row["frame"]): row["characters"] for row in rows}
    assert seen == {
        (n, k): len(scene.actors)
        for n, story in enumerate(STORIES)
        for k, scene in enumerate(story.scenes)
        if k >= (task == "continuation")
    }
    assert set(seen.values()) == {1, 2}


def test_an_oracle_gets_every_fact_right():
    rows = score_facts(Oracle(scenes_of(STORIES)), DRAWN, TRUTHS)
    assert all(row["correct"] for row in rows)
    assert len(rows) == sum(len(story.facts) for story in STORIES)


def test_rows_carry_what_the_truth_says():
    rows = iter(score_facts(Oracle(scenes_of(STORIES)), DRAWN, TRUTHS))
    for story in STORIES:
        for fact, row in zip(story.facts, rows):
            assert (row["frame"], row["attribute"], row["actor"], row["value"]) == (
                fact.frame,
                fact.attribute,
                fact.actor,
                fact.value,
            )
            assert row["history_only"] == (not fact.stated and fact.sources != ())
            assert row["nearest"] == (
                min(fact.frame - k for k in fact.sources) if fact.sources else None
            )


def test_in_continuation_drawn_frame_k_is_story_frame_k_plus_1():
    drawn = [frames[1:] for frames in DRAWN]
    rows = score_facts(Oracle(scenes_of(STORIES, start=1)), drawn, TRUTHS, "continuation")
    assert all(row["correct"] for row in rows)
    assert min(row["frame"] for row in rows) == 1
    shifted = score_facts(
        Oracle([scene for story in STORIES for scene in story.scenes[:-1]]),
        drawn,
        TRUTHS,
        "continuation",
    )
    assert not all(row["correct"] for row in shifted)


def test_a_missing_character_is_a_missing_character_and_nothing_else():
    name = STORIES[0].scenes[0].actors[0].name
    wrong = [
        row
        for row in score_facts(Oracle(scenes_of(STORIES), absent=[name]), DRAWN, TRUTHS)
        if not row["correct"]
    ]
    assert {row["attribute"] for row in wrong} == {"character"} and {
        row["name"] for row in wrong
    } == {name}


@pytest.mark.parametrize(
    "drawn,truths,task,says",
    [
        (DRAWN, TRUTHS[:-1], "visualization", "6 drawn stories but 5 truths"),
        (DRAWN, TRUTHS, "continuation", "story 0: 5 drawn frames"),
        (DRAWN, TRUTHS, "drawing", "task"),
        (DRAWN[:1], [None], "visualization", "no truth"),
    ],
)
def test_frames_that_do_not_fit_are_refused(drawn, truths, task, says):
    for judge in (score_facts, scarf_consistency, read_stories):
        with pytest.raises(ValueError, match=says):
            judge(Oracle(scenes_of(STORIES)), drawn, truths, task)


def test_figures_are_the_map_where_a_character_is():
    reader = FrameReader(width=16).eval()
    feature_map = torch.zeros(1, 16, 8, 8)
    feature_map[0, :, 2, 5] = torch.arange(16.0)
    with torch.no_grad():
        reader.where.weight.zero_()
        reader.where.weight[3, 15] = 10  # character 3 is where feature 15 is large
        figures = reader.figures(feature_map)
    torch.testing.assert_close(figures[0, 3], torch.arange(16.0))
    torch.testing.assert_close(figures[0, 0], torch.arange(16.0) / 64)


def test_scarves_of_a_true_story_are_consistent_and_an_exchanged_frame_is_not():
    rows = scarf_consistency(Oracle(scenes_of(STORIES)), DRAWN, TRUTHS)
    assert rows and all(row["correct"] and row["seen"] for row in rows)
    assert all(row["nearest"] >= 1 for row in rows)
    exchanged = [
        scene
        for k in range(len(STORIES))
        for scene in (*STORIES[k].scenes[:-1], STORIES[k - 1].scenes[-1])
    ]
    assert not all(row["correct"] for row in scarf_consistency(Oracle(exchanged), DRAWN, TRUTHS))
