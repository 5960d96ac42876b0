"""Metrics: the frame reader's targets, fact scores on readers that say what we want, intervals, Fréchet distances."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from causal_story.cartoon import CHARACTERS
from causal_story.metrics import (
    OPTIONS,
    FrameReader,
    bootstrap_means,
    character_f1,
    fact_rows,
    frame_accuracy,
    frames_tensor,
    frechet_distance,
    frechet_inception_distance,
    frechet_reader_distance,
    paired_difference,
    protocol_frames,
    read_frames,
    reader_accuracy,
    reader_loss,
    scarf_consistency,
    scene_targets,
    score_facts,
    summarise,
    train_reader,
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


def test_training_is_determined_by_its_seed_and_leaves_the_global_generator_alone():
    frames = ((frames_tensor(STORIES[0].frames(64)) + 1) * 127.5).round().to(torch.uint8)
    state = torch.get_rng_state()
    readers = [
        train_reader(frames, STORIES[0].scenes, steps=2, seed=seed, progress=False, batch_size=2)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(state, torch.get_rng_state())
    weights = [torch.cat([p.flatten() for p in reader.parameters()]) for reader in readers]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not readers[0].training


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
    with pytest.raises(ValueError, match=says):
        score_facts(Oracle(scenes_of(STORIES)), drawn, truths, task)


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


# ---------------------------------------------------------------- intervals

ROWS = [
    dict(story=story, frame=k, attribute="scarf", actor=0, correct=story % 3 > 0)
    for story in range(30)
    for k in range(1 + story % 2)
]


def test_summary_counts_and_brackets():
    (line,) = summarise(ROWS)
    assert (line["n"], line["stories"]) == (45, 30)
    assert line["low"] < line["accuracy"] < line["high"]
    assert line["accuracy"] == pytest.approx(sum(row["correct"] for row in ROWS) / 45)
    assert summarise(ROWS) == [line]


def test_groups_add_up():
    groups = summarise(ROWS, by=("frame",))
    assert [group["frame"] for group in groups] == [0, 1]
    assert sum(group["n"] for group in groups) == len(ROWS)


def test_bad_tables_are_refused():
    with pytest.raises(ValueError, match="rows"):
        summarise([])
    with pytest.raises(ValueError, match="colour"):
        summarise(ROWS, by="colour")
    with pytest.raises(ValueError, match="same facts"):
        paired_difference(ROWS, ROWS[1:])
    with pytest.raises(ValueError, match="same facts"):
        paired_difference(ROWS, ROWS[::-1])


def test_bootstrap_has_the_standard_error_of_cluster_means():
    values = numpy.random.default_rng(0).normal(size=200)
    means = bootstrap_means(
        numpy.repeat(values, 4), numpy.repeat(numpy.arange(200), 4), resamples=4000
    )
    assert means.std() == pytest.approx(values.std() / 200**0.5, rel=0.06)


def test_pairing_removes_what_is_hard_for_both():
    better = [row | dict(correct=True) if row["story"] == 0 else row for row in ROWS]
    difference = paired_difference(better, ROWS)
    single = summarise(ROWS)[0]
    assert difference["difference"] == pytest.approx(1 / 45)
    assert difference["high"] - difference["low"] < (single["high"] - single["low"]) / 2
    assert paired_difference(ROWS, ROWS)["high"] == 0


# ---------------------------------------------------------------- characters


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10**6))
def test_f1_agrees_with_counting(n, seed):
    predicted, actual = numpy.random.default_rng(seed).integers(0, 2, size=(2, n, 6))
    hits = sum(int(p and a) for p, a in zip(predicted.flat, actual.flat))
    misses = sum(int(p != a) for p, a in zip(predicted.flat, actual.flat))
    expected = 2 * hits / (2 * hits + misses) if hits + misses else 1
    assert character_f1(predicted, actual) == pytest.approx(expected)
    assert (
        frame_accuracy(predicted, actual)
        == sum(list(p) == list(a) for p, a in zip(predicted, actual)) / n
    )


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="one shape"):
        character_f1(numpy.zeros((3, 6)), numpy.zeros((1, 6)))


# ---------------------------------------------------------------- Fréchet distances


def test_frechet_distance_agrees_with_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    generator = numpy.random.default_rng(0)
    a, b = (
        generator.normal(size=(60, 5)) @ generator.normal(size=(5, 5)) + generator.normal(size=5)
        for _ in range(2)
    )
    root = linalg.sqrtm(numpy.cov(a.T) @ numpy.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + numpy.trace(
        numpy.cov(a.T) + numpy.cov(b.T) - 2 * root
    )
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(
        expected, rel=1e-6
    )


def test_frechet_distance_is_symmetric_and_zero_on_itself():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(30, 4, generator=generator), 1 + torch.randn(40, 4, generator=generator)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    assert abs(frechet_distance(a, a)) < 1e-6


def test_frechet_distance_refuses_what_has_no_covariance():
    with pytest.raises(ValueError, match="features"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="features"):
        frechet_distance(torch.zeros(4, 2), torch.zeros(4, 3))


class Mean(nn.Module):
    "Features: the three colour means."

    def forward(self, x):
        return x.mean((2, 3))


def test_protocols():
    frames = frames_tensor(STORIES[0].frames(128))
    arldm, standard = protocol_frames(frames, "arldm"), protocol_frames(frames, "standard")
    assert arldm.shape == standard.shape == (5, 3, 299, 299)
    smoothness = lambda x: (x[..., 1:] - x[..., :-1]).abs().max()
    assert smoothness(arldm) < smoothness(standard)
    with pytest.raises(ValueError, match="protocol"):
        protocol_frames(frames, "fid")


def test_inception_from_a_file_and_in_its_own_range(tmp_path):
    real, drawn = STORIES[0].frames(32), STORIES[1].frames(32)
    torch.jit.script(Mean()).save(tmp_path / "inception.pt")
    by_module = frechet_inception_distance(real, drawn, Mean())
    assert frechet_inception_distance(real, drawn, tmp_path / "inception.pt") == pytest.approx(
        by_module
    )
    assert frechet_inception_distance(real, drawn, Mean(), value_range=(0, 255)) == pytest.approx(
        by_module * 127.5**2, rel=1e-4
    )
    with pytest.raises(FileNotFoundError, match="missing.pt"):
        frechet_inception_distance(real, drawn, tmp_path / "missing.pt")


def test_reader_distance_does_not_see_the_order_of_frames():
    reader = FrameReader(width=16).eval()
    frames = [frame for story in STORIES for frame in story.frames(64)]
    assert abs(frechet_reader_distance(reader, frames, frames[::-1])) < 1e-4
    assert frechet_reader_distance(reader, frames, frames[:5]) > 1e-3
