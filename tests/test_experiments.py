"What a reader of 06_pipeline and 10_does_it_help need not see: weights that do not fit, runs"

"that go on, hostile requests."

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers.utils import logging

import causal_story.experiments as experiments
from causal_story.causal_mask import frame_mask
from causal_story.drawing import draw_stories
from causal_story.effects import attention_mass, causal_effect, look_hits
from causal_story.experiments import (
    ARMS,
    run_arm,
    run_rows,
    seeds_and_stories,
    story_cache,
    story_records,
    tune_arm,
)
from causal_story.loading import BASE_PARTS
from causal_story.pipeline import CausalStoryPipeline, load_base, story_pipeline
from causal_story.reader import FrameReader, scarf_consistency, score_facts
from causal_story.storage import fingerprint, load_part, shipped_weights
from causal_story.storyworld import make_stories
from causal_story.training import TrainingConfig, cached_batches

FEW = TrainingConfig(steps=2, batch_size=2, warmup_steps=1, ema_decay=0.5, checkpoint_every=1)


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
    return story_records(make_stories(3, "val", seed=2))


# ---------------------------------------------------------------- weights


def test_shipped_weights_fit_in_forty_megabytes():
    folder = shipped_weights("base").parent
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 40e6
    assert sum(path.stat().st_size for path in shipped_weights("reader").rglob("*")) < 4e6
    assert all((shipped_weights("base") / part).is_dir() for part in BASE_PARTS)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "history_encoder"])
@pytest.mark.parametrize("damage", ["missing", "cut", "lacks a tensor", "of another shape"])
def test_damaged_weights_are_named(tmp_path, part, damage):
    load_base("miniature")[part].save_pretrained(tmp_path / part)
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
    pipe, base = CausalStoryPipeline.from_pretrained("miniature"), load_base("miniature")
    for part in ("vae", "unet", "text_encoder"):
        for a, b in zip(getattr(pipe, part).parameters(), base[part].parameters()):
            assert torch.equal(a, b)
    assert all(
        p.dtype == torch.float32
        for part in (pipe.unet, pipe.adapters, pipe.story_context, pipe.history_encoder)
        for p in part.parameters()
    )
    assert max(b.up.weight.abs().max() for b in pipe.adapters.bottlenecks.values()) > 0


# ---------------------------------------------------------------- drawing and looking


def test_a_story_does_not_depend_on_its_batch(records):
    """In double precision, where the rounding of a batch of another size stays far below a level of
    255."""
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
    mass = attention_mass(pipe, records, task, "local", 2, timesteps=(500,))
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


def test_runs_are_written_once_and_not_repeated(tmp_path, records, monkeypatch):
    cache = story_cache(story_pipeline("miniature"), records, progress=False)
    reader = FrameReader.from_pretrained("miniature")
    arguments = dict(
        folder=tmp_path,
        base="miniature",
        cache=cache,
        stories=dict(n=2, split="val", seed=2),
        reader=reader,
        config=FEW,
        views=("true",),
        progress=False,
    )
    first = run_arm("full", 3, **arguments)
    assert (
        first["config"]["seed"] == 3
        and first["trained"]["unet"] == 0
        and first["trained"]["adapters"] > 0
    )
    monkeypatch.setattr(experiments, "tune_arm", None)
    assert run_arm("full", 3, **arguments) == json.loads(json.dumps(first))
    with pytest.raises(ValueError, match="causal-story"):
        run_arm("best", 3, **arguments)
    assert not list(tmp_path.glob("*.tmp"))
    rows = run_rows(first, "true")
    assert rows and "".join(str(int(row["correct"])) for row in rows) == first["correct"]["true"]
    with pytest.raises(ValueError, match="other stories"):
        run_rows(first | dict(stories=dict(n=3, split="val", seed=2)), "true")
    with pytest.raises(ValueError, match="other stories"):
        run_rows(first | dict(world="0" * 16), "true")  # as many facts, but others


def test_a_run_keeps_every_verdict(tmp_path, records, monkeypatch):
    save_tuned = CausalStoryPipeline.save_tuned
    monkeypatch.setattr(
        CausalStoryPipeline,
        "save_tuned",
        lambda self, folder, base=None: save_tuned(self, folder, half=False, base=base),
    )
    cache, reader = (
        story_cache(story_pipeline("miniature"), records[:2], progress=False),
        FrameReader.from_pretrained("miniature"),
    )
    run = lambda name: run_arm(
        name,
        0,
        tmp_path,
        "miniature",
        cache,
        dict(n=2, split="val", seed=2),
        reader,
        FEW,
        progress=False,
    )
    weighted, full = run("weighted"), run("full")
    assert set(weighted["correct"]) == {"true", "drawn", "continued", "stays", "looks"} and set(
        full["correct"]
    ) == set(weighted["correct"]) - {"looks"}
    stories = make_stories(2, "val", seed=2)
    pipe = CausalStoryPipeline.from_tuned(tmp_path / "tuned" / "weighted-0")
    pipe.set_progress_bar_config(disable=True)
    told, truths = story_records(stories), [story.truth() for story in stories]
    expected = dict(
        continued=score_facts(
            reader, draw_stories(pipe, told, "continuation", progress=False), truths, "continuation"
        ),
        stays=scarf_consistency(reader, draw_stories(pipe, told, progress=False), truths),
        looks=look_hits(experiments.story_relevance(pipe, told), truths),
    )
    for kind, rows in expected.items():
        found = run_rows(weighted, kind)
        keys = set(found[0]) - {"correct", "seen"}
        assert [{key: row[key] for key in keys} for row in rows] == [
            {key: row[key] for key in keys} for row in found
        ]
        assert [bool(row["correct"]) for row in rows] == [row["correct"] for row in found], kind
    files = [
        path.stat().st_size
        for path in (tmp_path / "tuned" / "weighted-0").rglob("*")
        if path.is_file()
    ]
    assert weighted["stored_mb"] == round(sum(files) / 1e6, 2)


def test_relevance_without_drawing_is_that_of_drawing(pipe, records):
    drawn = pipe(
        [r.captions for r in records],
        history_frames=[r.frames for r in records],
        num_inference_steps=1,
        generator=[torch.Generator().manual_seed(k) for k in range(len(records))],
    )
    assert_close(
        experiments.story_relevance(pipe, records, batch_size=2),
        drawn.relevance,
        atol=1e-5,
        rtol=1e-4,
    )
    with pytest.raises(ValueError, match="weighs nothing"):
        experiments.story_relevance(story_pipeline("miniature", history_policy="full"), records)


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


@pytest.mark.parametrize("name", sorted(ARMS))
def test_every_arm_trains_what_it_names(records, name):
    cache = story_cache(story_pipeline("miniature"), records, progress=False)
    pipe, result, counts = tune_arm(ARMS[name], "miniature", cache, FEW, progress=False)
    trained, arm = {part for part, (n, _) in counts.items() if n}, ARMS[name]
    expected = {"story_context"} | ({"history_encoder"} if "history_text" in arm.parts else set())
    expected |= {"adapter": {"adapters"}, "none": set()}.get(arm.method, {"unet"})
    assert trained == expected and len(result.losses) == 2
    assert len(draw_stories(pipe, records[:1], progress=False, num_inference_steps=1)[0]) == 5


@pytest.mark.parametrize("name", ["weighted", "attention", "lora", "full-tuning"])
def test_every_tuning_method_is_stored_and_comes_back(tmp_path, records, name):
    base, cache = (
        fingerprint(load_base("miniature")["unet"]),
        story_cache(story_pipeline("miniature"), records[:2], progress=False),
    )
    pipe, _, _ = tune_arm(ARMS[name], "miniature", cache, FEW, progress=False)
    pipe.save_tuned(tmp_path / "tuned", half=False, base=None if name == "weighted" else base)
    back = CausalStoryPipeline.from_tuned(tmp_path / "tuned")
    assert (
        (fingerprint(back.unet) != base)
        == (tmp_path / "tuned" / "unet").exists()
        == (name != "weighted")
    )
    assert not any("lora" in key for key in back.unet.state_dict())
    task, batch = cached_batches(cache, FEW)(
        0
    )  # with true history: a drawn frame is rounded to bytes before it is read, and a last bit may tip over
    noisy, times = (
        torch.randn(batch["latent_mean"].shape, generator=torch.Generator().manual_seed(0)),
        torch.full(batch["frame_valid"].shape, 500),
    )
    with torch.no_grad():
        predicted = [
            p.as_model().eval()(batch, noisy, times, p.config.history_policy, task=task)[0]
            for p in (pipe, back)
        ]
    assert_close(*predicted, atol=1e-4, rtol=1e-4)
    drawn = [
        p(
            [records[0].captions[:1]],
            generator=[torch.Generator().manual_seed(0)],
            output_type="latent",
            num_inference_steps=2,
        ).frames
        for p in (pipe, back)
    ]
    assert_close(*drawn, atol=1e-4, rtol=1e-4)
    back.save_tuned(
        tmp_path / "again", half=False
    )  # a moved U-Net stays a moved one, without being told
    assert fingerprint(CausalStoryPipeline.from_tuned(tmp_path / "again").unet) == fingerprint(
        back.unet
    )


@pytest.mark.parametrize("name", ["weighted", "full-tuning"])
def test_a_run_leaves_a_model_that_can_be_loaded(tmp_path, records, name):
    cache = story_cache(story_pipeline("miniature"), records[:2], progress=False)
    run_arm(
        name,
        0,
        tmp_path,
        "miniature",
        cache,
        dict(n=1, split="val", seed=1),
        FrameReader.from_pretrained("miniature"),
        FEW,
        views=(),
        progress=False,
    )
    back = CausalStoryPipeline.from_tuned(tmp_path / "tuned" / f"{name}-0")
    assert (fingerprint(back.unet) != fingerprint(load_base("miniature")["unet"])) == (
        name == "full-tuning"
    )


def test_a_run_with_other_settings_is_not_taken_for_this_one(tmp_path, records):
    cache, reader = (
        story_cache(story_pipeline("miniature"), records[:2], progress=False),
        FrameReader.from_pretrained("miniature"),
    )
    run = lambda config: run_arm(
        "full",
        0,
        tmp_path,
        "miniature",
        cache,
        dict(n=1, split="val", seed=1),
        reader,
        config,
        views=(),
        progress=False,
    )
    first = run(FEW)
    assert run(FEW) == json.loads(json.dumps(first))
    with pytest.raises(ValueError, match="other config"):
        run(TrainingConfig(steps=3, batch_size=2, warmup_steps=1))
    path = tmp_path / "full-0.json"
    path.write_text(json.dumps(first | dict(base="another")))
    with pytest.raises(ValueError, match="other base"):
        run(FEW)
    path.write_text(json.dumps(first | dict(world="0" * 16)))
    with pytest.raises(ValueError, match="other world"):
        run(FEW)
    path.write_text(json.dumps(first))  # drawn with no view at all, and now some are asked for
    with pytest.raises(ValueError, match="no 'continued'"):
        run_arm(
            "full",
            0,
            tmp_path,
            "miniature",
            cache,
            dict(n=1, split="val", seed=1),
            reader,
            FEW,
            progress=False,
        )


def test_runs_on_different_bases_are_not_compared(tmp_path):
    for name, base in (("full-0", "a"), ("weighted-0", "a"), ("weighted-1", "b")):
        (tmp_path / f"{name}.json").write_text(
            json.dumps(dict(arm=name[:-2], seed=int(name[-1]), base=base))
        )
    with pytest.raises(ValueError, match="2 different bases"):
        experiments.load_runs(tmp_path)
    (tmp_path / "weighted-1.json").unlink()
    assert {
        arm: [r["seed"] for r in records]
        for arm, records in experiments.load_runs(tmp_path).items()
    } == dict(full=[0], weighted=[0])


def test_cost_is_measured_in_a_process_of_its_own():
    cost = experiments.tuning_cost("only-adapters-and-layer", stories=2, batch_size=1, steps=3)
    assert set(cost["trained"]) == {"adapters", "story_context"} and cost["seconds_a_step"] > 0
    blip = sum(
        p.numel() for p in load_base("miniature")["history_encoder"].parameters()
    )  # stored whole
    assert cost["stored_mb"] == pytest.approx(
        (sum(cost["trained"].values()) + blip) * 2 / 1e6, rel=0.03
    ) and (cost["peak_mb"] is None or 100 < cost["peak_mb"] < 20_000)
    with pytest.raises(ValueError, match="no arm 'best'"):
        experiments.tuning_cost("best")
    with pytest.raises(RuntimeError, match="nowhere"):
        experiments.tuning_cost("full", base="nowhere", stories=2)


@pytest.mark.parametrize("reconstructed", [True, False])
def test_reconstructed_history_is_another_one(records, reconstructed):
    pipe = story_pipeline("miniature")
    plain = story_cache(pipe, records, reconstructed=False, progress=False)
    other = story_cache(pipe, records, reconstructed=reconstructed, progress=False)
    assert torch.equal(plain["image_features"], other["image_features"]) != reconstructed
    assert torch.equal(plain["latent_mean"], other["latent_mean"])


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
    told = seeds_and_stories(runs, resamples=200)
    assert told["low"] <= told["mean"] <= told["high"] and (
        told["seeds"],
        told["stories"],
        told["n"],
    ) == (3, 8, 16)


def test_runs_over_other_facts_are_refused():
    row = dict(story=0, frame=0, attribute="prop", correct=True)
    with pytest.raises(ValueError, match="same facts"):
        seeds_and_stories([[row], [row | dict(frame=1)]])
    with pytest.raises(ValueError, match="at least one"):
        seeds_and_stories([])
