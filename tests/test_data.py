"""The dataset and its batches: colours, tiles, workers, tasks."""

import os
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from story_samples import ORANGE, ToyStory, Words, assert_story, picture
from torch.utils.data import DataLoader

from causal_story.data import (
    CLIP_IMAGE_MEAN,
    CLIP_IMAGE_STD,
    StoriesInMemory,
    StoryCollator,
    StoryDataset,
    StoryRecord,
    choose_tile,
    pixels,
    split_task,
)


def test_version1_is_read_in_true_colours(version1):
    for split, numbers in (("train", [0, 1, 2]), ("val", [3]), ("test", [4, 5])):
        dataset = StoryDataset(version1, split)
        assert (dataset.schema, len(dataset)) == (1, len(numbers))
        for row, number in enumerate(numbers):
            assert_story(dataset.story(row, tile=3), number, tile=3)
    assert dataset.story(1).truth is None and dataset.story(1).id == "test/1"


# ---------------------------------------------------------------- tiles


def test_golden_tiles():
    "Runs are compared across versions of this library, so these numbers must stay."
    assert [[choose_tile(5, 0, epoch, 7, frame) for frame in range(5)] for epoch in range(3)] == [
        [0, 4, 2, 2, 1],
        [0, 3, 2, 2, 4],
        [1, 1, 2, 3, 1],
    ]


@given(n=st.integers(1, 9), numbers=st.tuples(*[st.integers(0, 10**6)] * 4))
def test_tile_exists_and_depends_on_its_arguments_only(n, numbers):
    assert 0 <= choose_tile(n, *numbers) < n and choose_tile(n, *numbers) == choose_tile(
        n, *numbers
    )


def test_training_draws_tiles_and_evaluation_does_not(made):
    def expected(seed, epoch, index):
        tiles = [choose_tile(5, seed, epoch, index, frame) for frame in range(5)]
        return [picture(index, frame, tile) for frame, tile in enumerate(tiles)]

    training = StoryDataset(made, "train", seed=3)
    for epoch in (0, 1, 5):
        training.set_epoch(epoch)
        np.testing.assert_array_equal(
            [np.asarray(frame) for frame in training[1]["frames"]], expected(3, epoch, 1)
        )
        np.testing.assert_array_equal(
            [np.asarray(frame) for frame in training[-3]["frames"]], expected(3, epoch, 1)
        )
    assert_story(training.story(0, tile=2), 0, tile=2)
    for dataset in (StoryDataset(made, "test"), StoryDataset(made, "train", train=False)):
        dataset.set_epoch(4)
        assert [
            np.asarray(frame)[0, 20].tolist() == list(ORANGE) for frame in dataset[0]["frames"]
        ] == [True] * 5
        np.testing.assert_array_equal(
            np.asarray(dataset[0]["frames"][1]), picture(9 if dataset.split == "test" else 0, 1, 0)
        )


# ---------------------------------------------------------------- several processes


def as_bytes(items: list) -> list:
    return [[frame.tobytes() for frame in item["frames"]] for item in items]


def test_dataset_can_be_pickled_while_open(made):
    dataset = StoryDataset(made, seed=2)
    dataset.set_epoch(6)
    first = dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.source._file is None and copy.epoch == 6
    assert as_bytes([copy[0]]) == as_bytes([first])
    dataset.close()
    dataset.close()
    assert as_bytes([dataset[0]]) == as_bytes([first])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_worker_opens_its_own_file(made):
    dataset = StoryDataset(made)
    parent = as_bytes(list(dataset))
    handle = dataset.source._file
    loaded = [
        item
        for batch in DataLoader(
            dataset, batch_size=2, num_workers=2, collate_fn=list, multiprocessing_context="fork"
        )
        for item in batch
    ]
    assert as_bytes(loaded) == parent
    assert dataset.source._file is handle and as_bytes([dataset[1]]) == parent[1:2]


def test_spawned_workers_that_live_on_hear_of_the_epoch(made):
    dataset = StoryDataset(made, seed=1)
    dataset[0]
    collate = StoryCollator(Words(), Words(), frame_size=16, history_size=8, max_length=3)
    loader = DataLoader(
        dataset,
        batch_size=2,
        num_workers=2,
        collate_fn=collate,
        multiprocessing_context="spawn",
        persistent_workers=True,
    )
    pictures = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = [
                StoryCollator(Words(), Words(), frame_size=16, history_size=8, max_length=3)(
                    [dataset[k], dataset[k + 1]]
                )
                for k in (0, 2)
            ]
        for found, right in zip(loader, expected, strict=True):
            assert found["ids"] == right["ids"]
            torch.testing.assert_close(found["frames"], right["frames"], rtol=0, atol=0)
            pictures.append(found["frames"])
    assert not torch.equal(pictures[0], pictures[2]), "the second epoch drew other tiles"


# ---------------------------------------------------------------- batches


def item(number: int, n: int = 5, words: int = 0, size: int = 32) -> dict:
    story = ToyStory(number, n)
    return {
        "id": f"story-{number}",
        "index": number,
        "captions": ["word " * words if words else text for text in story.captions],
        "frames": story.frames(size=size),
        "truth": story.truth(),
    }


@pytest.mark.parametrize("task, given", [("visualization", 0), ("continuation", 1)])
def test_batch_of_both_tasks(task, given):
    items = [item(0), item(1, n=3), item(2, n=8)]
    batch = StoryCollator(
        Words(), Words(), frame_size=32, history_size=16, max_length=7, task=task
    )(items)
    V, F = 8 - given, 8
    assert {
        name: tuple(value.shape) for name, value in batch.items() if torch.is_tensor(value)
    } == {
        "frames": (3, V, 3, 32, 32),
        "caption_ids": (3, V, 7),
        "caption_mask": (3, V, 7),
        "frame_valid": (3, V),
        "index": (3,),
        "history_frames": (3, F, 3, 16, 16),
        "history_ids": (3, F, 7),
        "history_mask": (3, F, 7),
        "history_valid": (3, F),
    }
    assert {
        name: batch[name].dtype
        for name in ("caption_mask", "history_mask", "frame_valid", "history_valid")
    } == dict.fromkeys(("caption_mask", "history_mask", "frame_valid", "history_valid"), torch.bool)
    assert batch["frame_valid"].sum(1).tolist() == [5 - given, 3 - given, 8 - given]
    assert batch["history_valid"].sum(1).tolist() == [5, 3, 8]
    assert batch["frame_valid"][1].tolist() == [True] * (3 - given) + [False] * 5
    assert batch["index"].tolist() == [0, 1, 2] and batch["ids"] == [
        "story-0",
        "story-1",
        "story-2",
    ]
    assert batch["captions"] == [one["captions"] for one in items] and batch["truth"][2] == {
        "number": 2
    }
    for b, one in enumerate(items):
        for i in range(len(one["frames"]) - given):
            expected = (
                torch.from_numpy(np.asarray(one["frames"][i + given]).copy()).permute(2, 0, 1)
                / 127.5
                - 1
            )
            torch.testing.assert_close(batch["frames"][b, i], expected, atol=1e-6, rtol=0)
            assert batch["caption_ids"][b, i].equal(batch["history_ids"][b, i + given])
        small = (
            torch.from_numpy(
                np.asarray(one["frames"][2].resize((16, 16), Image.BICUBIC)).copy()
            ).permute(2, 0, 1)
            / 255
        )
        right = (small - torch.tensor(CLIP_IMAGE_MEAN)[:, None, None]) / torch.tensor(
            CLIP_IMAGE_STD
        )[:, None, None]
        torch.testing.assert_close(batch["history_frames"][b, 2], right, atol=1e-6, rtol=0)


def test_filled_up_places_are_empty_captions_and_zeros():
    batch = StoryCollator(Words(), Words(), max_length=6)([item(0), item(1, n=3)])
    assert batch["caption_mask"][1, 3:].sum(-1).tolist() == [
        2,
        2,
    ]  # start and end: no row is masked completely
    assert (
        batch["frames"][1, 3:].abs().max() == 0 and batch["history_frames"][1, 3:].abs().max() == 0
    )


def test_normalisation_is_an_argument():
    batch = StoryCollator(
        Words(), Words(), history_size=32, image_mean=(0, 0, 0), image_std=(1, 1, 1)
    )([item(0)])
    assert batch["history_frames"].min() == 0 and batch["history_frames"].max() == 1


def test_pixels_is_exact_at_the_same_size():
    array = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    torch.testing.assert_close(
        pixels([Image.fromarray(array)], 20)[0],
        torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1,
        atol=1e-6,
        rtol=0,
    )


def test_one_warning_for_captions_that_are_too_long():
    collate = StoryCollator(Words(), Words(), max_length=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collate([item(0, words=6), item(1, n=2)])  # exactly 8 tokens: nothing is lost
    with pytest.warns(
        UserWarning, match=r"story 'story-3': .* 22 tokens .* max_length=8"
    ) as caught:
        for _ in range(3):
            batch = collate([item(2), item(3, words=20), item(4, words=30)])
    assert len(caught) == 1 and batch["caption_ids"].shape == (3, 5, 8)
    assert batch["caption_mask"][1].all()


def test_collator_errors_name_the_story():
    with pytest.raises(ValueError, match="'drawing'"):
        StoryCollator(Words(), Words(), task="drawing")
    with pytest.raises(
        ValueError, match="story 'story-1' has 1 frame.*continuation needs at least 2"
    ):
        StoryCollator(Words(), Words(), task="continuation")([item(0), item(1, n=1)])
    broken = item(2)
    broken["captions"] = broken["captions"][:3]
    with pytest.raises(ValueError, match="story 'story-2' has 3 captions for 5 frames"):
        StoryCollator(Words(), Words())([broken])


@given(
    n=st.integers(0, 9),
    m=st.integers(0, 9),
    task=st.sampled_from(["visualization", "continuation"]),
)
def test_layout_of_any_story(n, m, task):
    given_frames = 1 if task == "continuation" else 0
    captions, frames = [f"c{k}" for k in range(n)], [f"x{k}" for k in range(m)]
    if n != m or m <= given_frames:
        with pytest.raises(ValueError):
            split_task(captions, frames, task)
        return
    layout = split_task(captions, frames, task)
    assert len(layout.frames) + given_frames == len(layout.history_frames) == n
    for i in range(len(layout.frames)):
        assert (
            layout.frames[i] == layout.history_frames[i + given_frames]
            and layout.captions[i] == layout.history_captions[i + given_frames]
        )


# ---------------------------------------------------------------- stories in memory


def test_stories_in_memory_read_like_a_file(made):
    file = StoryDataset(made, "test")
    memory = StoriesInMemory([ToyStory(9)], size=128)
    one, other = memory[0], file[0]
    assert one.keys() == other.keys() and one["captions"] == other["captions"]
    assert one["truth"] == other["truth"] and as_bytes([one]) == as_bytes([other])
    assert memory.stored(0).captions == file.stored(0).captions
    assert (memory.schema, memory.train, memory.seed, memory.epoch) == (2, False, 0, 0)
    assert memory.tile_counts(0) == [1] * 5 and len(memory) == 1 and memory.characters == ()
    memory.set_epoch(3)
    assert as_bytes([memory[-1]]) == as_bytes([other]) and memory[-1]["index"] == 0
    memory.close()
    again = StoriesInMemory([file.story(0)])
    assert as_bytes([again[0]]) == as_bytes([other]) and again.story(0).id == file.story(0).id
    with pytest.raises(IndexError, match="stories in memory: there is no story 1"):
        memory[1]
    with pytest.raises(ValueError, match="tiles 0 to 0, not tile=1"):
        memory.story(0, tile=1)


def test_stories_in_memory_are_checked():
    frame = Image.new("RGB", (16, 16))
    with pytest.raises(TypeError, match="memory_00001 is a str"):
        StoriesInMemory([ToyStory(0), "a story"])
    with pytest.raises(TypeError, match="story 'a', frame 0: a PIL image is expected"):
        StoriesInMemory([StoryRecord("a", ["x"], [np.zeros((4, 4, 3), np.uint8)])])
    with pytest.raises(ValueError, match="story 'a' has 2 captions for 1 frames"):
        StoriesInMemory([StoryRecord("a", ["x", "y"], [frame])])
    with pytest.raises(ValueError, match="16x10 pixels"):
        StoriesInMemory([StoryRecord("a", ["x"], [frame.crop((0, 0, 16, 10))])])
    with pytest.raises(ValueError, match="'drawing'"):
        StoriesInMemory([ToyStory(0)], task="drawing")
    one = StoriesInMemory([StoryRecord("a", ["x"], [frame.convert("RGBA")])], task="continuation")
    with pytest.raises(ValueError, match="continuation needs at least 2"):
        one[0]
    assert len(StoriesInMemory([])) == 0


def test_stories_in_memory_can_be_sent_to_workers():
    memory = StoriesInMemory([ToyStory(k) for k in range(4)])
    copy = pickle.loads(pickle.dumps(memory))
    assert as_bytes(list(copy)) == as_bytes(list(memory))


def test_half_letters_reach_no_tokenizer():
    class Strict(Words):
        def __call__(self, texts, **options):
            [text.encode("utf-8") for text in texts]  # as tokenizers in Rust do
            return super().__call__(texts, **options)

    broken = item(0) | {"captions": ["a \ud83d b", "\udc00", "c", "d", "e"]}
    batch = StoryCollator(Strict(), Strict(), max_length=8)([broken])
    assert batch["caption_ids"].shape == (1, 5, 8)
    assert batch["captions"][0] == broken["captions"]
