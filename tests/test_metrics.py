"""Intervals that hang together by stories, Wilson's interval, and the Fréchet distance."""

import warnings

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_story.metrics import (
    bootstrap_means,
    frechet_distance,
    mean_interval,
    paired_difference,
    summarise,
    wilson_interval,
)

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


def test_wilson_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    for right, n in ((0, 1), (3, 7), (24, 24), (50, 200)):
        theirs = stats.binomtest(right, n).proportion_ci(method="wilson")
        assert wilson_interval(right, n) == pytest.approx((theirs.low, theirs.high), abs=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 500), st.floats(0, 1))
def test_wilson_holds_the_share_and_is_symmetric(n, share):
    right = round(share * n)
    low, high = wilson_interval(right, n)
    assert 0 <= low < high <= 1
    assert low - 1e-12 <= right / n <= high + 1e-12
    mirrored = wilson_interval(n - right, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize("verdict", [True, False])
def test_an_interval_of_verdicts_that_all_agree_counts_stories_not_facts(verdict):
    stories = numpy.repeat(numpy.arange(24), 10).tolist()
    assert mean_interval([verdict] * 240, stories) == wilson_interval(24 * verdict, 24)
    (line,) = summarise([dict(story=story, correct=verdict) for story in stories])
    assert line["high"] - line["low"] > 0.1 and line["n"] == 240 and line["stories"] == 24


def test_values_that_are_no_verdicts_are_bootstrapped():
    assert mean_interval([31.5] * 20, list(range(20))) == (31.5, 31.5)


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


def test_frechet_distance_says_when_there_are_too_few_frames():
    features = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="12 frames are too few for 12 features"):
        frechet_distance(features, features)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert frechet_distance(features[:, :11], features[:, :11]) < 1e-6
