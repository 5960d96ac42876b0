"What a reader of `experiments` and `effects` need not see: runs that go on, old runs."

import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers.utils import logging

import causal_story.experiments as experiments
from causal_story.causal_mask import HistoryPolicy, frame_mask
from causal_story.data import StoriesInMemory
from causal_story.drawing import draw_stories
from causal_story.effects import attention_mass, causal_effect, look_hits, story_relevance
from causal_story.experiments import (
    load_runs,
    run_arm,
    run_experiment,
    run_policy,
    run_rows,
    seeds_and_stories,
    tuning_cost,
)
from causal_story.features import open_cache
from causal_story.loading import BASE_PARTS
from causal_story.model import trained_by_part
from causal_story.pipeline import CausalStoryPipeline
from causal_story.reader import FrameReader, scarf_consistency, score_facts
from causal_story.recipes import RECIPES, find_recipe
from causal_story.storage import fingerprint, load_part, shipped_weights
from causal_story.storyworld import make_stories
from causal_story.training import TrainingConfig
from causal_story.tuning import tune

FEW = TrainingConfig(steps=2, batch_size=2, warmup_steps=1, ema_decay=0.5, checkpoint_every=1)
TRAIN = make_stories(2, seed=2)


@pytest.fixture(autouse=True)
def no_bars():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def pipe(as_if_tuned):
    return as_if_tuned()


@pytest.fixture(scope="module")
def records():
    return StoriesInMemory(make_stories(3, "val", seed=2)).records


@pytest.fixture(scope="module")
def reader():
    return FrameReader.from_pretrained("miniature")


def base_part(name):
    return load_part(BASE_PARTS[name], shipped_weights("base") / name)


# ---------------------------------------------------------------- weights


def test_shipped_weights_fit_in_forty_megabytes():
    folder = shipped_weights("base").parent
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 40e6
    assert sum(path.stat().st_size for path in shipped_weights("reader").rglob("*")) < 4e6
    assert all((shipped_weights("base") / part).is_dir() for part in BASE_PARTS)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "history_encoder"])
@pytest.mark.parametrize("damage", ["missing", "cut", "lacks a tensor", "of another shape"])
def test_damaged_weights_are_named(tmp_path, part, damage):
    base_part(part).save_pretrained(tmp_path / part)
    path = next((tmp_path / part).glob("*.safetensors"))
    tensors = load_file(path)
    name = max(tensors, key=lambda name: tensors[name].numel())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "lacks a tensor":
        save_file({k: v for k, v in tensors.items() if k != name}, path, {"format": "pt"})
    else:
        save_file(tensors | {name: tensors[name][:-1].clone()}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=part):
        load_part(BASE_PARTS[part], tmp_path / part)


def test_a_name_that_is_neither_folder_nor_hub_id_reaches_for_nothing():
    for name in ("nowhere", "./nowhere/deep/er", "C:/models"):
        with pytest.raises(FileNotFoundError, match="no folder"):
            CausalStoryPipeline.from_pretrained(name)


def test_the_shipped_pipeline_is_the_base_and_what_was_tuned():
    pipe = CausalStoryPipeline.from_pretrained("miniature")
    for name in ("vae", "unet", "text_encoder"):
        for one, two in zip(getattr(pipe, name).parameters(), base_part(name).parameters()):
            assert torch.equal(one, two)
    for part in (pipe.unet, pipe.adapters, pipe.story_context, pipe.history_encoder):
        assert all(p.dtype == torch.float32 for p in part.parameters())
    assert max(b.up.weight.abs().max() for b in pipe.adapters.bottlenecks.values()) > 0


# ---------------------------------------------------------------- drawing and looking


def test_a_story_does_not_depend_on_its_batch(records):
    "In double precision, where the rounding of another batch stays far below a level of 255."
    pipe = CausalStoryPipeline.from_pretrained("miniature").to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    whole = draw_stories(pipe, records, batch_size=3, progress=False, num_inference_steps=2)
    parts = draw_stories(pipe, records, batch_size=2, progress=False, num_inference_steps=2)
    for a, b in zip(whole, parts):
        for x, y in zip(a, b):
            assert np.abs(np.asarray(x, int) - np.asarray(y, int)).max() <= 1


@pytest.mark.parametrize("task", ["visualization", "continuation"])
@pytest.mark.parametrize(
    "policy, window",
    [("none", None), ("full", None), ("local", 1), ("weighted", None), ("weighted", 2)],
)
def test_only_visible_blocks_have_an_effect(pipe, records, task, policy, window):
    effect = causal_effect(
        pipe,
        records[0],
        records[1],
        task=task,
        history_policy=policy,
        window=window,
        num_inference_steps=2,
    )["effect"]
    visible = frame_mask(policy, 5 - (task == "continuation"), task, window)
    assert effect.shape == visible.shape
    assert (effect[~visible] < 1e-3).all() and (
        effect[visible] > 1e-3
    ).all()  # versions share a batch: rounding


def test_frame_and_caption_each_have_an_effect(pipe, records):
    for change in ("frame", "caption"):
        assert (
            causal_effect(pipe, records[0], records[1], change, num_inference_steps=2)["effect"][
                1, 0
            ]
            > 0
        )
    with pytest.raises(ValueError, match="picture"):
        causal_effect(pipe, records[0], records[1], "picture")


@pytest.mark.parametrize("task", ["visualization", "continuation"])
def test_attention_mass_lies_on_visible_blocks(pipe, records, task):
    mass = attention_mass(pipe, records, task, HistoryPolicy("local", 2), timesteps=(500,))
    visible = frame_mask("local", 5 - (task == "continuation"), task, 2)
    assert mass.shape[1:] == visible.shape
    assert (mass[:, ~visible] < 1e-6).all() and (mass[:, visible] > 0).all()


@given(seed=st.integers(0, 10**6))
def test_a_look_at_a_telling_frame_is_a_hit_in_both_tasks(seed):
    truth = make_stories(1, seed=seed)[0].truth()
    for task, given_frames in (("visualization", 0), ("continuation", 1)):
        for attribute in ("prop", "scarf"):
            weights = np.zeros((5 - given_frames, 5))
            facts = [
                f
                for f in truth["facts"]
                if f["attribute"] == attribute
                and not f["stated"]
                and f["sources"]
                and f["frame"] >= 2
            ]
            for fact in facts:
                weights[fact["frame"] - given_frames, fact["sources"][-1]] += 1
            alone = {f["frame"] for f in facts if sum(g["frame"] == f["frame"] for g in facts) == 1}
            rows = [
                row
                for row in look_hits([weights], [truth], task)
                if row["attribute"] == attribute and row["frame"] in alone
            ]
            assert len(rows) == len(alone) and all(row["correct"] for row in rows)


# ---------------------------------------------------------------- runs


def arm(name, folder, reader, config=FEW, seed=0, n=1, **options):
    "A run of `name`, quickly."
    stories = dict(n=n, split="val", seed=2)
    changes = dict(num_inference_steps=4)  # of 20, to save time
    options = dict(views=(), progress=False, changes=changes) | options
    return run_arm(name, seed, folder, TRAIN, stories, reader, config, **options)


def as_json(record) -> dict:
    return json.loads(json.dumps(record))


def test_runs_are_written_once_and_not_repeated(tmp_path, reader, monkeypatch):
    options = dict(seed=3, n=2, views=("true",))
    first = arm("full", tmp_path, reader, **options)
    assert first["config"]["seed"] == 3
    assert first["trained"]["unet"] == 0 and first["trained"]["adapters"] > 0
    monkeypatch.setattr(experiments, "tune", None)
    assert arm("full", tmp_path, reader, **options) == as_json(first)
    with pytest.raises(ValueError, match="causal-story"):
        arm("best", tmp_path, reader)
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*.part*"))
    rows = run_rows(first, "true")
    assert rows and "".join(str(int(row["correct"])) for row in rows) == first["correct"]["true"]
    with pytest.raises(ValueError, match="other stories"):
        run_rows(first | dict(stories=dict(n=3, split="val", seed=2)), "true")
    with pytest.raises(ValueError, match="other stories"):
        run_rows(first | dict(world="0" * 16), "true")  # as many facts, but others
    nameless = {key: value for key, value in first.items() if key not in ("arm", "seed")}
    with pytest.raises(ValueError, match="this was scored on other stories"):
        run_rows(nameless | dict(world="0" * 16), "true")


def test_a_run_keeps_every_verdict(tmp_path, reader, monkeypatch):
    save = CausalStoryPipeline.save_pretrained

    def save_exactly(self, folder, only_tuned=False, half=False, **options):
        return save(self, folder, only_tuned=only_tuned, half=False, **options)

    monkeypatch.setattr(CausalStoryPipeline, "save_pretrained", save_exactly)
    views = tuple(experiments.VIEWS)
    weighted = arm("weighted", tmp_path, reader, n=2, views=views)
    kinds = {"true", "drawn", "continued", "stays", "looks"}
    assert set(weighted["correct"]) == kinds
    full = arm("full", tmp_path, reader, n=2, views=("drawn",))
    assert set(full["correct"]) == {"drawn", "stays"}  # it weighs nothing, so it looks nowhere
    stories = make_stories(2, "val", seed=2)
    pipe = CausalStoryPipeline.from_pretrained(tmp_path / "tuned" / "weighted-0")
    pipe.set_progress_bar_config(disable=True)
    records = StoriesInMemory(stories).records
    truths = [story.truth() for story in stories]
    quiet = dict(progress=False)
    continued = draw_stories(pipe, records, "continuation", **quiet)
    expected = dict(
        continued=score_facts(reader, continued, truths, "continuation"),
        stays=scarf_consistency(reader, draw_stories(pipe, records, **quiet), truths),
        looks=look_hits(story_relevance(pipe, records), truths),
    )
    for kind, rows in expected.items():
        found = run_rows(weighted, kind)
        keys = set(found[0]) & set(rows[0]) - {"correct", "seen", "read"}
        assert keys >= {"story", "frame"}
        for one, two in zip(rows, found, strict=True):
            assert {key: one[key] for key in keys} == {key: two[key] for key in keys}
            assert bool(one["correct"]) == two["correct"], kind
    files = (tmp_path / "tuned" / "weighted-0").rglob("*")
    sizes = [path.stat().st_size for path in files if path.is_file()]
    assert weighted["stored_mb"] == round(sum(sizes) / 1e6, 2)


def test_relevance_without_drawing_is_that_of_drawing(pipe, records):
    drawn = pipe(
        [r.captions for r in records],
        history_frames=[r.frames for r in records],
        num_inference_steps=1,
        generator=[torch.Generator().manual_seed(k) for k in range(len(records))],
    )
    assert_close(
        story_relevance(pipe, records, batch_size=2),
        drawn.relevance,
        atol=1e-5,
        rtol=1e-4,
    )
    with pytest.raises(ValueError, match="weighs nothing"):
        story_relevance(CausalStoryPipeline.from_base("miniature", "full"), records)


def test_hits_and_their_chance_know_the_mask():
    "A second program, fact by fact; weights that differ, so that the largest visible one is known."
    weights, found = np.random.default_rng(0).random((1, 5, 5)), []
    for seed in range(12):
        truth = make_stories(1, "val", seed=seed)[0].truth()
        rows = {
            window: look_hits(
                weights,
                [truth],
                visible=None if window is None else frame_mask("local", 5, "visualization", window),
            )
            for window in (None, 2)
        }
        for window, got in rows.items():
            expected = []
            for fact in truth["facts"]:
                seen = list(range(max(0, fact["frame"] - (window or 9)), fact["frame"]))
                telling = [b for b in seen if b in fact["sources"]]
                if fact["stated"] or len(seen) < 2 or not telling:
                    continue
                expected.append(
                    (
                        fact["frame"],
                        fact["attribute"],
                        max(seen, key=lambda b: weights[0][fact["frame"]][b]) in telling,
                        len(telling) / len(seen),
                    )
                )
            assert [
                (row["frame"], row["attribute"], row["correct"], row["chance"]) for row in got
            ] == expected
        found.append([len(rows[None]), len(rows[2]), sum(row["correct"] for row in rows[2])])
    free, narrow, hits = np.sum(found, 0)
    assert free > narrow > hits > 0  # some sources lie outside the window, some weights miss


EXPECTED_INSIDE = dict(adapter={"adapters"}, attention={"unet"}, lora={"adapters", "unet"})
EXPECTED_INSIDE |= dict(full={"unet"}, none=set())


@pytest.mark.parametrize("name", RECIPES)
def test_every_arm_trains_what_it_names(records, name):
    recipe = find_recipe(name)
    pipe = CausalStoryPipeline.from_base("miniature", recipe)
    pipe.set_progress_bar_config(disable=True)
    result = tune(pipe, TRAIN, recipe, FEW, progress=False)
    trained = {part for part, (n, _) in trained_by_part(pipe.model).items() if n}
    outside = {"story_context"} | ({"history_encoder"} if "history_text" in recipe.parts else set())
    assert trained >= outside and trained - outside <= EXPECTED_INSIDE[recipe.method]
    assert bool(trained - outside) == (recipe.method != "none") and len(result.losses) == 2
    drawn = draw_stories(pipe, records[:1], progress=False, num_inference_steps=1)
    assert len(drawn[0]) == 5 and pipe.history_policy == recipe.policy


@pytest.mark.parametrize("name", ["weighted", "full-tuning", "lora"])
def test_a_run_leaves_a_model_that_can_be_loaded(tmp_path, reader, records, name):
    arm(name, tmp_path, reader)
    tuned = CausalStoryPipeline.from_pretrained(tmp_path / "tuned" / f"{name}-0")
    base = CausalStoryPipeline.from_base("miniature", name)
    moved = fingerprint(tuned.unet) != fingerprint(base.unet)
    assert moved == (name != "weighted")
    drawn = draw_stories(tuned, records[:1], progress=False, num_inference_steps=1)
    assert len(drawn[0]) == 5 and tuned.history_policy == find_recipe(name).policy


def test_a_run_with_other_settings_is_not_taken_for_this_one(tmp_path, reader, monkeypatch):
    first = arm("full", tmp_path, reader)
    monkeypatch.setattr(experiments, "tune", None)
    assert arm("full", tmp_path, reader) == as_json(first)
    path = tmp_path / "full-0.json"
    with pytest.raises(ValueError, match=r"other config \(steps\)"):
        arm("full", tmp_path, reader, replace(FEW, steps=3))
    with pytest.raises(ValueError, match="other frames_a_story"):
        arm("full", tmp_path, reader, changes=dict(frames_a_story=2))
    with pytest.raises(ValueError, match="other first"):
        arm("full", tmp_path, reader, first=dict(n_frames=3, steps=1))
    for key, other in (("base", "another"), ("world", "0" * 16), ("train_stories", 9)):
        path.write_text(json.dumps(first | {key: other}))
        with pytest.raises(ValueError, match=f"other {key}"):
            arm("full", tmp_path, reader)


def test_a_finished_run_can_be_asked_for_more_views(tmp_path, reader, monkeypatch):
    "It draws these only, with the same model, and keeps the others; it does not train again."
    both = arm("weighted", tmp_path / "both", reader, n=2, views=("true", "continued"))
    first = arm("weighted", tmp_path / "one", reader, n=2, views=("true",))
    drawn = []

    def draw(pipe, records, task, true_history, progress):
        drawn.append((task, true_history))
        return draw_stories(pipe, records, task, true_history, progress=progress)

    monkeypatch.setattr(experiments, "draw_stories", draw)
    then = arm("weighted", tmp_path / "one", reader, n=2, views=("true", "continued"))
    assert drawn == [("continuation", False)]
    assert then["correct"] == both["correct"] and then["last_loss"] == first["last_loss"]
    assert then["correct"]["true"] == first["correct"]["true"]
    assert {k: v for k, v in then.items() if k != "correct"} == {
        k: v for k, v in as_json(first).items() if k != "correct"
    }  # machine and minutes are those of the training
    path = tmp_path / "one" / "weighted-0.json"
    path.write_text(json.dumps({k: v for k, v in then.items() if k != "world"}))
    with pytest.raises(ValueError, match="has no 'drawn', and does not say which world"):
        arm("weighted", tmp_path / "one", reader, n=2, views=("drawn",))
    path.write_text(json.dumps(then))
    shutil.rmtree(next((tmp_path / "one" / "runs").glob("*/step-00000002")))
    with pytest.raises(ValueError, match="has no 'drawn', and its model .* was deleted"):
        arm("weighted", tmp_path / "one", reader, n=2, views=("drawn",))
    assert arm("weighted", tmp_path / "one", reader, n=2, views=("true",)) == as_json(then)
    for views in ("true", ("true", "dreamt")):
        with pytest.raises(ValueError, match="is none of true, drawn, continued"):
            arm("weighted", tmp_path / "two", reader, views=views)


def test_more_views_of_a_run_that_began_with_short_stories(tmp_path, monkeypatch):
    "The first part is not trained again, and the model is the same."
    few = dict(arms=("weighted",), seeds=(0,), steps=1, batch_size=2, train_stories=2)
    few |= dict(stories=1, split="val", n_frames=4, first_frames=3, first_steps=1, progress=False)
    [both] = run_experiment(tmp_path / "both", views=("true", "continued"), **few)
    run_experiment(tmp_path / "one", views=("true",), **few)
    shutil.rmtree(next((tmp_path / "one" / "runs").glob("*-first")))
    [then] = run_experiment(tmp_path / "one", views=("true", "continued"), **few)
    assert then["correct"] == both["correct"]
    assert not list((tmp_path / "one" / "runs").glob("*-first"))


# ---------------------------------------------------------------- runs of version 0.1.0


def results(root):
    return root / "nbs" / "results"


def test_committed_runs_are_read(root):
    "Every file of results: its policy, its verdicts, the stories that it was scored on."
    folders = {path.parent for path in results(root).rglob("*-[0-9].json")}
    assert len(folders) >= 6
    for folder in folders:
        for arm_name, runs in load_runs(folder).items():
            assert run_policy(runs[0]) == find_recipe(arm_name).policy
            rows = run_rows(runs[0], "true")
            assert sum(row["history_only"] for row in rows) > 100
    gap = experiments.compare_arms(load_runs(results(root) / "arms"), "weighted", "full")
    assert (round(gap["mean"], 3), gap["seeds"]) == (0.015, 5)


@pytest.mark.parametrize("name", ["weighted", "full"])
def test_a_finished_run_of_0_1_0_is_the_run_that_is_asked_for(root, tmp_path, name, monkeypatch):
    "What was asked for then is accepted; anything else is named. Nothing is trained."
    shutil.copy(results(root) / f"{name}-0.json", tmp_path)
    kept = json.loads((tmp_path / f"{name}-0.json").read_text())
    monkeypatch.setattr(experiments, "tune", None)
    monkeypatch.setattr(
        experiments,
        "make_stories",
        lambda n, *args, **options: (
            make_stories(n, *args, **options) if args or "split" in options else [None] * n
        ),
    )
    asked = dict(arms=(name,), seeds=(0,), steps=3000, train_stories=2400)
    assert run_experiment(tmp_path, **asked) == [kept]
    for change, named in (
        (dict(steps=2000), "config"),
        (dict(batch_size=4), "config"),
        (dict(train_stories=1200), "train_stories"),
        (dict(stories=20), "stories"),
        (dict(split="val"), "stories"),
        (dict(frames_a_story=2), "frames_a_story"),
    ):
        with pytest.raises(ValueError, match=f"was run with other .*{named}"):
            run_experiment(tmp_path, **asked | change)
    with pytest.raises(ValueError, match="arms: 'best' is none of"):
        run_experiment(tmp_path, arms=("best",))


def test_longer_stories_get_a_longer_time_table(tmp_path):
    few = dict(arms=("weighted",), seeds=(0,), steps=1, batch_size=2, train_stories=2)
    few |= dict(stories=1, split="val", views=("true",), progress=False)
    few |= dict(n_frames=11, frames_a_story=3, first_frames=3, first_steps=1)
    [record] = run_experiment(tmp_path, **few)
    settings = record["settings"]
    assert record["first"] == dict(n_frames=3, steps=1)
    assert len(list((tmp_path / "runs").glob("weighted-0-*-first"))) == 1
    assert settings["n_times"] == 11 and settings["frames_a_story"] == 3
    assert record["stories"]["n_frames"] == 11
    assert max(row["frame"] for row in run_rows(record)) == 10
    pipe = CausalStoryPipeline.from_pretrained(tmp_path / "tuned" / "weighted-0")
    assert pipe.story_context.config.n_times == 11
    begun = CausalStoryPipeline.from_pretrained(tmp_path / "tuned" / "weighted-0-first")
    assert begun.story_context.config.n_times == 3


def test_a_tuned_model_goes_on_with_stories_of_mixed_lengths(tmp_path, root):
    few = dict(arms=("weighted",), seeds=(0,), steps=1, batch_size=2, train_stories=8)
    few |= dict(stories=1, split="val", views=("true",), progress=False, frames_a_story=2)
    start = str(results(root) / "6000_steps" / "weighted-0")
    few |= dict(start=start, train_frames=(3, 10))
    [record] = run_experiment(tmp_path, **few)
    began = CausalStoryPipeline.from_pretrained(start).story_context
    assert record["start"] == dict(model=start, fingerprint=fingerprint(began))
    assert record["train_frames"] == [3, 10] and record["first"] is None
    assert "n_frames" not in record["stories"]  # five, as ever
    pipe = CausalStoryPipeline.from_pretrained(tmp_path / "tuned" / "weighted-0")
    assert pipe.story_context.config.n_times == 10 > began.config.n_times
    moved = pipe.story_context.projection.weight - began.projection.weight
    assert 0 < moved.abs().max() < 0.01  # one step from that model, not from nothing
    assert run_experiment(tmp_path, **few) == [as_json(record)]
    with pytest.raises(ValueError, match="other .*train_frames"):
        run_experiment(tmp_path, **few | dict(train_frames=(4, 10)))
    with pytest.raises(ValueError, match="other .*start"):
        run_experiment(tmp_path, **few | dict(start=None))
    with pytest.raises(ValueError, match="first_frames=3, .*weighted-0: choose one"):
        run_experiment(tmp_path, **few | dict(first_frames=3))
    with pytest.raises(FileNotFoundError, match="there is no folder nowhere"):
        run_experiment(tmp_path / "other", **few | dict(start="nowhere"))


@pytest.mark.parametrize("first", [0, 1, 5, 6])
def test_what_a_run_begins_with_is_shorter_and_checked_first(tmp_path, first, monkeypatch):
    monkeypatch.setattr(experiments, "tune", None)
    with pytest.raises(ValueError, match=f"first_frames={first}: .*fewer than n_frames=5"):
        run_experiment(tmp_path, n_frames=5, first_frames=first)
    assert not list(tmp_path.iterdir())


def test_runs_on_different_bases_are_not_compared(tmp_path):
    for name, base in (("full-0", "a"), ("weighted-0", "a"), ("weighted-1", "b")):
        (tmp_path / f"{name}.json").write_text(
            json.dumps(dict(arm=name[:-2], seed=int(name[-1]), base=base))
        )
    with pytest.raises(ValueError, match="different base"):
        load_runs(tmp_path)
    (tmp_path / "weighted-1.json").unlink()
    runs = load_runs(tmp_path)
    seeds = {name: [record["seed"] for record in found] for name, found in runs.items()}
    assert seeds == dict(full=[0], weighted=[0])
    (tmp_path / "shipped-0.json").write_text(json.dumps(dict(stories={}, correct={})))
    with pytest.raises(ValueError, match="shipped-0.json is no run of an experiment"):
        load_runs(tmp_path)


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("weighted-1", dict(config=dict(steps=9, seed=1)), "of weighted with different config"),
        ("weighted-1", dict(settings=dict(width=8)), "of weighted with different settings"),
        ("weighted-1", dict(first=dict(n_frames=5)), "of weighted with different first"),
        ("weighted-1", dict(train_stories=3), "of weighted with different train_stories"),
        ("full-0", dict(stories=dict(n=9)), "runs with different stories"),
        ("full-0", dict(config=dict(steps=9, seed=0)), None),  # equal minutes, not equal steps
        ("weighted-1", dict(config=dict(steps=1, seed=1, older=True)), None),
    ],
)
def test_runs_that_were_not_made_alike_are_not_pooled(tmp_path, name, change, said):
    for run in ("full-0", "weighted-0", "weighted-1"):
        arm, seed = run.split("-")
        record = dict(arm=arm, seed=int(seed), base="a", stories=dict(n=2), world="w", first=None)
        record |= dict(
            train_stories=2, settings=dict(width=4), config=dict(steps=1, seed=int(seed))
        )
        record |= change if run == name else {}
        (tmp_path / f"{run}.json").write_text(json.dumps(record))
    if said is None:
        assert {arm: len(runs) for arm, runs in load_runs(tmp_path).items()} == dict(
            full=1, weighted=2
        )
    else:
        with pytest.raises(ValueError, match=said):
            load_runs(tmp_path)


def test_intervals_of_little_are_numbers():
    assert experiments.over_seeds([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)
    rows = [dict(story=k, frame=k + 1, sources=[0], correct=k == 1, name=None) for k in range(3)]
    for row in rows:
        row |= dict(attribute="setting")
    found = experiments.seeds_and_stories_slope([rows])
    assert found["low"] <= found["mean"] <= found["high"]


def test_a_model_is_judged_on_stories_of_several_lengths(root, tmp_path, monkeypatch):
    shown = []

    def true_ones(pipe, records, *_, **__):
        shown.append([len(record.frames) for record in records])
        return [record.frames for record in records]

    monkeypatch.setattr(experiments, "draw_stories", true_ones)
    stories = dict(n=12, split="test", seed=1, n_frames=(3, 11))
    thorough = results(root) / "6000_steps" / "weighted-0"  # its table has nine rows
    record = experiments.run_again(thorough, tmp_path / "a.json", stories, progress=False)
    assert min(shown[0]) == 3 and max(shown[0]) == 11
    rows = run_rows(record, "looks")
    assert len(rows) == len(record["correct"]["looks"]) and max(r["frame"] for r in rows) == 10
    assert all(row["correct"] for row in run_rows(record, "true") if row["stated"])


def test_relevance_of_several_lengths_is_that_of_each(pipe):
    records = StoriesInMemory(make_stories(6, "val", seed=2, n_frames=(3, 6))).records
    together = story_relevance(pipe, records, batch_size=2)
    for record, found in zip(records, together):
        n = len(record.frames)
        assert_close(found[:n, :n], story_relevance(pipe, [record])[0], atol=1e-5, rtol=1e-4)
        assert not found[n:].any() and not found[:, n:].any()


def test_cost_is_measured_in_a_process_of_its_own():
    cost = tuning_cost("only-adapters-and-layer", stories=2, batch_size=1, steps=3)
    assert set(cost["trained"]) == {"adapters", "story_context"} and cost["seconds_a_step"] > 0
    assert cost["peak_mb"] is None or 100 < cost["peak_mb"] < 20_000
    trained = sum(cost["trained"].values()) * 2 / 1e6
    assert cost["stored_mb"] > 0.97 * trained
    with pytest.raises(ValueError, match="choose one of"):
        tuning_cost("best")
    with pytest.raises(RuntimeError, match="nowhere"):
        tuning_cost("full", base="nowhere", stories=2)


@pytest.mark.parametrize("reconstructed", [True, False])
def test_reconstructed_history_is_another_one(records, reconstructed):
    pipe = CausalStoryPipeline.from_base("miniature")
    options = dict(progress=False)
    stories = StoriesInMemory(records)
    model = pipe.model.requires_grad_(False)
    plain = open_cache(model, stories, pipe.collator(), reconstructed=False, **options)
    other = open_cache(model, stories, pipe.collator(), reconstructed=reconstructed, **options)
    rows = [0, 1, 2]
    same = torch.equal(plain.rows("image_features", rows), other.rows("image_features", rows))
    assert same != reconstructed
    assert torch.equal(plain.rows("latent_mean", rows), other.rows("latent_mean", rows))


@given(seed=st.integers(0, 1000))
def test_interval_of_seeds_and_stories_holds_the_mean(seed):
    rng = random.Random(seed)
    runs = [
        [
            dict(story=s, frame=f, attribute="prop", correct=rng.random() < 0.6)
            for s in range(8)
            for f in range(rng.randint(2, 2))
        ]
        for _ in range(3)
    ]
    found = seeds_and_stories(runs, resamples=200)
    assert found["low"] <= found["mean"] <= found["high"]
    assert (found["seeds"], found["stories"], found["n"]) == (3, 8, 16)


def test_runs_over_other_facts_are_refused():
    row = dict(story=0, frame=0, attribute="prop", correct=True)
    with pytest.raises(ValueError, match="same facts"):
        seeds_and_stories([[row], [row | dict(frame=1)]])
    with pytest.raises(ValueError, match="at least one"):
        seeds_and_stories([])
