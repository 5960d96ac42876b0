"""Story files and raw folders for the tests, and small helpers.

They are made by hand from the description of the layouts and not by the project's own writers, so
that a mistake shared by writer and reader would show.
"""

import io
import json
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from causal_story.story_file import convert_stories

ORANGE, TEAL = (255, 128, 0), (0, 128, 128)


def picture(
    story: int, frame: int, tile: int, size: int = 128
) -> np.ndarray:  # (size, size, 3) uint8, RGB
    "Orange, with a teal square whose place tells frame and tile and whose green tells the story."
    array = np.full((size, size, 3), ORANGE, dtype=np.uint8)
    unit = size // 8
    array[frame * unit : (frame + 1) * unit, tile * unit : (tile + 1) * unit] = (
        TEAL[0],
        100 + story,
        TEAL[2],
    )
    return array


def strip(story: int, frame: int, tiles: int = 5) -> np.ndarray:
    return np.concatenate([picture(story, frame, tile) for tile in range(tiles)])


def png(array: np.ndarray) -> np.ndarray:  # uint8, 1-D
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return np.frombuffer(buffer.getvalue(), np.uint8)


def caption(story: int, frame: int) -> str:
    return f"Story {story}, frame {frame}."


def captions(story: int) -> list[str]:
    return [caption(story, frame) for frame in range(5)]


class ToyStory:
    "The least that can be written: captions, truth() and frames(size=, take=)."

    def __init__(self, number: int, n: int = 5):
        self.number, self.captions = number, [caption(number, frame) for frame in range(n)]

    def truth(self):
        return {"number": self.number}

    def frames(self, size=64, take=0):
        return [
            Image.fromarray(picture(self.number, frame, take, size))
            for frame in range(len(self.captions))
        ]


class Words:
    "A toy tokenizer, called like one of transformers: a token a word, a start and an end token."

    def __call__(self, texts, padding, truncation, max_length, return_tensors):
        assert (padding, truncation, return_tensors) == ("max_length", True, "pt")
        rows = [
            [1, *(3 + len(word) for word in text.split())][: max_length - 1] + [2] for text in texts
        ]
        return {
            "input_ids": torch.tensor([row + [0] * (max_length - len(row)) for row in rows]),
            "attention_mask": torch.tensor(
                [[1] * len(row) + [0] * (max_length - len(row)) for row in rows]
            ),
        }


# ---------------------------------------------------------------- files as others have them


@pytest.fixture
def version1(tmp_path) -> Path:
    "A file of the released converters: arrays, text joined by '|', exchanged colours."
    path = tmp_path / "version1.h5"
    with h5py.File(path, "w") as file:
        for split, numbers in (("train", [0, 1, 2]), ("val", [3]), ("test", [4, 5])):
            group = file.create_group(split)
            for frame in range(5):
                column = group.create_dataset(
                    f"image{frame}", (len(numbers),), dtype=h5py.vlen_dtype(np.dtype("uint8"))
                )
                for row, number in enumerate(numbers):
                    column[row] = png(strip(number, frame)[:, :, [2, 1, 0]])
            text = group.create_dataset(
                "text", (len(numbers),), dtype=h5py.string_dtype(encoding="utf-8")
            )
            for row, number in enumerate(numbers):
                text[row] = "|".join(captions(number))
    return path


@pytest.fixture
def flintstones(tmp_path) -> Path:
    "A raw FlintstonesSV folder. Story 9 comes before story 0; clip 'short' has three followings."
    raw = tmp_path / "flintstones"
    (raw / "video_frames_sampled").mkdir(parents=True)

    def name(story, frame):
        return f"s_0{story}_e_01_shot_{frame:06d}"

    followings = {
        name(story, 0): [name(story, frame) for frame in range(1, 5)] for story in (9, 0, 1, 2)
    }
    followings |= {"short": [name(0, 1), name(0, 2), name(0, 3)], name(0, 1): []}
    splits = {
        "train": [name(9, 0), "short", name(0, 1), name(0, 0), "not in the cache"],
        "val": [name(1, 0)],
        "test": [name(2, 0)],
    }
    notes = [
        {"globalID": name(story, frame), "description": caption(story, frame), "characters": []}
        for story in (9, 0, 1, 2)
        for frame in range(5)
    ]
    notes[0]["description"] = " Fred sits.\nHe\t| talks. "
    for story in (9, 0, 1, 2):
        for frame in range(5):
            clip = np.stack([picture(story, frame, tile) for tile in range(5)])
            np.save(raw / "video_frames_sampled" / f"{name(story, frame)}.npy", clip)
    (raw / "train-val-test_split.json").write_text(json.dumps(splits))
    (raw / "flintstones_annotations_v1-0.json").write_text(json.dumps(notes))
    (raw / "following_cache4.pkl").write_bytes(pickle.dumps(followings, protocol=2))
    return raw


def pororo_folder(raw: Path, form: str) -> Path:
    "A raw PororoSV folder, its paths as bytes ('S'), text that looks like bytes ('U'), or objects."
    raw.mkdir()

    def path(story, frame):
        return f"Pororo_ENGLISH1_1/ep{story}/{frame + 1}.png"

    for story in range(6):
        (raw / path(story, 0)).parent.mkdir(parents=True)
        for frame in range(5):
            Image.fromarray(strip(story, frame)).save(raw / path(story, frame))
    write = {
        "S": lambda text: text.encode(),
        "U": lambda text: str(text.encode()),
        "O": lambda text: text.encode(),
    }[form]
    kind = object if form == "O" else None
    np.save(
        raw / "img_cache4.npy", np.array([write(path(story, 0)) for story in range(6)], dtype=kind)
    )
    rows = [[write(path(story, frame)) for frame in range(1, 5)] for story in range(6)]
    np.save(raw / "following_cache4.npy", np.array(rows, dtype=kind))
    descriptions = {
        path(story, frame)[:-4]: [caption(story, frame), "a second description"]
        for story in range(6)
        for frame in range(5)
    }
    np.save(raw / "descriptions.npy", np.array(descriptions, dtype=object))
    ids = np.empty(3, dtype=object)
    ids[:] = [np.array([5, 0, 3]), np.array([4]), np.array([2, 1])]
    np.save(raw / "train_seen_unseen_ids.npy", ids)
    return raw


@pytest.fixture
def pororo(tmp_path) -> Path:
    return pororo_folder(tmp_path / "pororo", "S")


def assert_story(record, number: int, tile: int = 0):
    "The story's captions and its pictures, in true colours."
    assert record.captions == captions(number)
    for frame, drawn in enumerate(record.frames):
        assert (drawn.mode, drawn.size) == ("RGB", (128, 128))
        np.testing.assert_array_equal(np.asarray(drawn), picture(number, frame, tile))


def assert_nothing_left(folder: Path, *names: str):
    "Only these files are there: no half file under any name."
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


@pytest.fixture
def made(tmp_path) -> Path:
    "Version 2, four stories of 5, 5, 3 and 1 frames, five tiles."
    stories = [ToyStory(0), ToyStory(1), ToyStory(2, n=3), ToyStory(3, n=1)]
    return convert_stories(
        {"train": stories, "test": [ToyStory(9)]},
        tmp_path / "made.h5",
        size=128,
        tiles=5,
        progress=False,
    )
