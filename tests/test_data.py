"""Story files: layouts written literally, hostile and damaged files, interrupted runs, workers, batches.

The raw folders and the version 1 file below are made by hand from the description of the layouts and not by the
project's own writers, so that a mistake shared by writer and reader would show.
"""

import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from causal_story.data import (
    CLIP_IMAGE_MEAN,
    CLIP_IMAGE_STD,
    PlainUnpickler,
    RawStory,
    RefusedPickle,
    StoryCollator,
    StoryDataset,
    atomic_path,
    choose_tile,
    compact,
    convert_flintstones,
    convert_folder,
    convert_pororo,
    convert_stories,
    load_npy,
    load_pickle,
    pixels,
    show_story,
    split_task,
    write_flintstones_raw,
    write_folder,
    write_hdf5,
    write_pororo_raw,
)

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
    "A toy tokenizer with the calling convention of transformers: one token a word, a start and an end token."

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
    "A file of the released converters: flat arrays, text joined by '|', red and blue exchanged, no attributes."
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
    "A raw FlintstonesSV folder. Story 9 has four followings but comes before story 0; clip 'short' has three."
    raw = tmp_path / "flintstones"
    (raw / "video_frames_sampled").mkdir(parents=True)
    name = lambda story, frame: f"s_0{story}_e_01_shot_{frame:06d}"
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
    "A raw PororoSV folder, its paths as numpy bytes ('S'), as text that looks like bytes ('U'), or as objects ('O')."
    raw.mkdir()
    path = lambda story, frame: f"Pororo_ENGLISH1_1/ep{story}/{frame + 1}.png"
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


def test_version1_is_read_in_true_colours(version1):
    for split, numbers in (("train", [0, 1, 2]), ("val", [3]), ("test", [4, 5])):
        dataset = StoryDataset(version1, split)
        assert (dataset.schema, len(dataset)) == (1, len(numbers))
        for row, number in enumerate(numbers):
            assert_story(dataset.story(row, tile=3), number, tile=3)
    assert dataset.story(1).truth is None and dataset.story(1).id == "test/1"


def test_flintstones_keeps_split_order_and_only_whole_stories(flintstones, tmp_path):
    convert_flintstones(flintstones, tmp_path / "f.h5", progress=False)
    train = StoryDataset(tmp_path / "f.h5", "train")
    assert [train.story(k).id[:4] for k in range(len(train))] == ["s_09", "s_00"]
    assert train.story(0).captions[0] == "Fred sits. He | talks."
    assert_story(train.story(1, tile=4), 0, tile=4)
    assert_story(StoryDataset(tmp_path / "f.h5", "val").story(0), 1)
    assert_story(StoryDataset(tmp_path / "f.h5", "test").story(0), 2)


@pytest.mark.parametrize("form", ["S", "U", "O"])
def test_pororo_sorts_ids_and_takes_the_first_description(form, tmp_path):
    convert_pororo(pororo_folder(tmp_path / "raw", form), tmp_path / "p.h5", progress=False)
    found = {split: StoryDataset(tmp_path / "p.h5", split) for split in ("train", "val", "test")}
    for split, numbers in (("train", [0, 3, 5]), ("val", [4]), ("test", [1, 2])):
        assert len(found[split]) == len(numbers)
        for row, number in enumerate(numbers):
            assert_story(found[split].story(row, tile=1), number, tile=1)
    assert found["val"].story(0).id == "Pororo_ENGLISH1_1/ep4/1"


def test_a_file_knows_where_its_stories_came_from(flintstones, pororo, tmp_path):
    convert_flintstones(flintstones, tmp_path / "f.h5", progress=False)
    convert_pororo(pororo, tmp_path / "p.h5", progress=False)
    convert_stories({"train": [ToyStory(1)]}, tmp_path / "w.h5", progress=False)
    assert [StoryDataset(tmp_path / f"{name}.h5", "train").kind for name in "fpw"] == [
        "flintstones",
        "pororo",
        "",
    ]
    with h5py.File(tmp_path / "w.h5", "r+") as file:
        del file.attrs["kind"]  # written before there was such a mark
    assert StoryDataset(tmp_path / "w.h5", "train").kind == ""


def test_a_folder_of_the_other_layout_is_recognised(flintstones, pororo, tmp_path):
    with pytest.raises(FileNotFoundError, match="It looks like a PororoSV folder"):
        convert_flintstones(pororo, tmp_path / "out.h5")
    with pytest.raises(FileNotFoundError, match="It looks like a FlintstonesSV folder"):
        convert_pororo(flintstones, tmp_path / "out.h5")
    with pytest.raises(FileNotFoundError, match="It looks like a PororoSV folder"):
        convert_folder(pororo, tmp_path / "out.h5")
    assert not (tmp_path / "out.h5").exists()


def test_pororo_ids_of_equal_length(pororo, tmp_path):
    np.save(pororo / "train_seen_unseen_ids.npy", np.array([[1, 0], [3, 2], [5, 4]]))
    convert_pororo(pororo, tmp_path / "p.h5", progress=False)
    assert_story(StoryDataset(tmp_path / "p.h5", "test").story(1), 5)


def test_version2_as_described(pororo, tmp_path):
    convert_pororo(pororo, tmp_path / "p.h5", progress=False)
    with h5py.File(tmp_path / "p.h5") as file:
        assert dict(file.attrs) == {"schema": 2, "colour": "rgb", "kind": "pororo"} and list(
            file
        ) == ["test", "train", "val"]
        story = file["val/00000000"]
        assert sorted(story) == ["captions", *(f"image{frame}" for frame in range(5))]
        assert json.loads(story["captions"].asstr()[()]) == captions(4)
        assert story["image2"].dtype == np.uint8 and story["image2"].ndim == 1
        np.testing.assert_array_equal(
            np.asarray(Image.open(io.BytesIO(story["image2"][()].tobytes()))), strip(4, 2)
        )


@pytest.mark.parametrize(
    "write, convert, tiles",
    [
        (write_flintstones_raw, convert_flintstones, 5),
        (write_pororo_raw, convert_pororo, 5),
        (write_folder, convert_folder, 1),
    ],
)
def test_our_writers_round_trip_at_128(write, convert, tiles, tmp_path):
    stories = {"train": [ToyStory(k) for k in range(3)], "val": [], "test": [ToyStory(7)]}
    write(stories, tmp_path / "raw")
    convert(tmp_path / "raw", tmp_path / "out.h5", progress=False)
    for split in ("train", "test"):
        dataset = StoryDataset(tmp_path / "out.h5", split)
        assert len(dataset) == len(stories[split])
        for row, story in enumerate(stories[split]):
            assert dataset.tile_counts(row) == [tiles] * 5
            assert_story(dataset.story(row, tile=tiles - 1), story.number, tile=tiles - 1)
            assert dataset.story(row).truth == {"number": story.number}


@pytest.mark.parametrize("write", [write_flintstones_raw, write_pororo_raw])
def test_raw_writers_refuse_what_the_layout_cannot_hold(write, tmp_path):
    with pytest.raises(ValueError, match="4 captions.*5 frames"):
        write({"train": [ToyStory(0, n=4)]}, tmp_path / "a")
    with pytest.raises(ValueError, match="'dev'"):
        write({"dev": [ToyStory(0)]}, tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        write({"train": [ToyStory(0)]}, tmp_path / "c")
    assert_nothing_left(tmp_path / "c", "thesis.tex")


# ---------------------------------------------------------------- pickles, genuine and hostile

PYTHON2_DESCRIPTIONS = (
    b"\x93NUMPY\x01\x00\x46\x00"
    + b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(69)
    + b"\n"
    b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01)"
    b"cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb\x89"
    b"]}(U\x03a/1](U\x05HelloU\x06caf\xe9s!eX\x03\x00\x00\x00b/2](X\x02\x00\x00\x00\xc3\xa9eUa".replace(
        b"eUa", b"eua"
    )
    + b"tb."
)
PYTHON2_IDS = (
    b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85"
    b"cnumpy\ndtype\nU\x02i8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    b"U\x10\xc8\x00\x00\x00\x00\x00\x00\x00\xff\xff\xff\xff\xff\xff\xff\xfftb."
)


def test_pickles_written_by_python2_are_read(tmp_path):
    (tmp_path / "d.npy").write_bytes(PYTHON2_DESCRIPTIONS)
    assert load_npy(tmp_path / "d.npy").item() == {"a/1": ["Hello", "caf\xe9s!"], "b/2": ["\xe9"]}
    (tmp_path / "i.pkl").write_bytes(PYTHON2_IDS)
    assert load_pickle(tmp_path / "i.pkl").tolist() == [200, -1]


PLAIN = [
    None,
    True,
    3,
    10**30,
    2.5,
    1 + 2j,
    "text",
    b"bytes",
    b"",
    bytearray(b"x"),
    [1, [2]],
    (1,),
    {"a": {"b": []}},
    {1, 2},
    frozenset({1}),
    np.arange(6).reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.array([b"x", b"yz"]),
    np.array(["é", "ab"]),
    np.array([True]),
    np.array([], dtype=np.float32),
    np.array([1, 2], dtype=">i4"),
    np.array([{"a": 1}, [2], "x"], dtype=object),
    np.array({"a": [1]}, dtype=object),
    np.int64(4),
    np.float32(0.5),
    np.bool_(True),
    np.str_("s"),
    np.bytes_(b"s"),
]


def same(one, other) -> bool:
    if isinstance(one, np.ndarray):
        return (
            isinstance(other, np.ndarray)
            and one.dtype.newbyteorder("=") == other.dtype.newbyteorder("=")
            and one.shape == other.shape
            and (one == other).all()
        )
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_is_read_in_every_protocol(protocol):
    for value in PLAIN:
        assert same(value, PlainUnpickler(io.BytesIO(pickle.dumps(value, protocol))).load()), repr(
            value
        )
        [nested] = PlainUnpickler(io.BytesIO(pickle.dumps([value], protocol))).load()
        assert same(value, nested), repr(value)


def test_both_names_of_numpy_are_read():
    new = pickle.dumps(np.arange(4), 4)
    assert b"numpy._core.multiarray" in new
    old = pickle.dumps(np.arange(4), 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    for data in (new, old):
        assert PlainUnpickler(io.BytesIO(data)).load().tolist() == [0, 1, 2, 3]


class Call:
    "Pickles as a call."

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class State:
    "Pickles as an object that gets a state."

    def __init__(self, base, arguments, state):
        self.parts = base, arguments, state

    def __reduce__(self):
        return self.parts


def hostile_pickles(mark: str) -> dict[str, bytes]:
    "Each would leave the file `mark`, or worse, if it were unpickled the ordinary way."
    command = f"echo owned > {mark}"
    write = f"open({mark!r}, 'w').write('owned')"
    objects = {
        "os.system": Call(os.system, command),
        "eval": Call(eval, write),
        "exec": Call(exec, write),
        "subprocess": Call(subprocess.check_output, command, None),
        "open": Call(open, mark, "w"),
        "getattr": Call(getattr, "x", "upper"),
        "import": Call(__import__, "antigravity"),
        "path": Path(mark),
        "nested": {"s_01": ["s_02", {"deep": (1, [Call(os.system, command)])}]},
        "key": {Call(eval, "'x'"): 1},
        "in an array": np.array([1, Call(os.system, command)], dtype=object),
        "array class": Call(np.ndarray, (4,), "O", b"x" * 32),
        "other codec": Call(__import__("_codecs").encode, "x", "rot13"),
        "structured dtype": np.zeros(2, dtype=[("a", "i4"), ("b", "O")]),
        "memmap": Call(np.memmap, mark, "u1", "w+", 0, (4,)),
        "load": Call(np.load, mark),
        "date": __import__("datetime").date(2024, 1, 1),
        "our own class": RawStory("a", [], []),
    }
    raw = {
        "protocol 0": f"cos\nsystem\n(S'{command}'\ntR.".encode(),
        "inst": f"(S'{command}'\nios\nsystem\n.".encode(),
        "dotted": b"\x80\x04\x8c\x0bcollections\x8c\x12OrderedDict.__init__\x93.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"Pmy name\n.",
        "class as data": b"\x80\x02cos\nsystem\n.",
    }
    return {name: pickle.dumps(value) for name, value in objects.items()} | raw


@pytest.mark.parametrize("name", hostile_pickles("mark"))
def test_hostile_pickle_is_refused(name, tmp_path):
    data, mark = hostile_pickles(str(tmp_path / "mark"))[name], tmp_path / "mark"
    (tmp_path / "hostile.pkl").write_bytes(data)
    with pytest.raises(ValueError, match=r"hostile\.pkl") as caught:
        load_pickle(tmp_path / "hostile.pkl")
    header = (
        np.lib.format.magic(1, 0)
        + b"\x46\x00"
        + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(69)
        + b"\n"
    )
    (tmp_path / "hostile.npy").write_bytes(header + data)
    with pytest.raises(ValueError, match=r"hostile\.npy"):
        load_npy(tmp_path / "hostile.npy")
    assert not mark.exists()
    if name in ("os.system", "nested", "in an array", "protocol 0", "inst"):
        assert isinstance(caught.value, RefusedPickle) and re.search(
            r"(posix|nt|os)\.system", str(caught.value)
        )


def test_hostile_pickles_are_hostile(tmp_path):
    "The test above would be empty if these did nothing when unpickled the ordinary way."
    for name in ("os.system", "eval", "nested", "in an array", "protocol 0", "inst"):
        pickle.loads(hostile_pickles(str(tmp_path / "mark"))[name])
        assert (tmp_path / "mark").exists(), name
        (tmp_path / "mark").unlink()


def array_pickle(shape: bytes, letter: bytes, raw: bytes, structure: bytes = b"NNN") -> bytes:
    "An array's pickle in which sizes and content need not agree."
    return (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        + shape
        + b"cnumpy\ndtype\nU\x02"
        + letter
        + b"K\x00K\x01\x87R(K\x03U\x01|"
        + structure
        + b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + raw
        + b"tb."
    )


LYING_ARRAYS = {
    "objects beyond the list": array_pickle(
        b"M\xe8\x03\x85", b"O8", b"]K\x01a"
    ),  # 1000 promised, 1 brought: numpy reads on
    "too few bytes": array_pickle(b"M\xe8\x03\x85", b"i8", b"U\x08xxxxxxxx"),
    "negative shape": array_pickle(b"J\xff\xff\xff\xff\x85", b"i8", b"U\x00"),
    "fields outside": array_pickle(b"K\x01\x85", b"V8", b"U\x08xxxxxxxx"),
    "dtype with fields": array_pickle(b"K\x01\x85", b"i8", b"U\x08xxxxxxxx", b"NU\x01a\x85}"),
    "not a tuple": array_pickle(b"K\x01", b"i8", b"U\x08xxxxxxxx"),
    "no dtype": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x01\x85N\x89U\x01xtb.",
    "scalar of objects": b"\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nU\x02O8K\x00K\x01\x87RU\x08xxxxxxxx\x86R.",
    "buffer of objects": b"\x80\x02cnumpy.core.numeric\n_frombuffer\n(U\x08xxxxxxxxcnumpy\ndtype\nU\x02O8K\x00K\x01\x87RK\x01\x85U\x01CtR.",
    "cut short": pickle.dumps({"a": [1, 2, 3]})[:-4],
    "empty": b"",
    "not a pickle": b"GIF89a",
    "text": b"hello world\n",
}


@pytest.mark.parametrize("name", LYING_ARRAYS)
def test_damaged_or_lying_pickle_is_an_error(name, tmp_path):
    "Unpickled the ordinary way, the first of these crashes the process."
    (tmp_path / "lying.pkl").write_bytes(LYING_ARRAYS[name])
    with pytest.raises(ValueError, match=r"lying\.pkl"):
        load_pickle(tmp_path / "lying.pkl")


def test_array_pickle_itself_is_right():
    "The lying arrays above differ from this honest one only in what they lie about."
    assert PlainUnpickler(
        io.BytesIO(array_pickle(b"K\x01\x85", b"O8", b"]K\x01a"))
    ).load().tolist() == [1]


def test_a_pickle_cannot_change_the_gate():
    "BUILD with a state of attributes must not reach the classes and functions that later files are read with."
    for target in (
        b"cnumpy\ndtype\n",
        b"cnumpy.core.multiarray\n_reconstruct\n",
        b"cnumpy\nndarray\n",
        b"ccollections\nOrderedDict\n",
    ):
        for state in (b"}U\x0c__setstate__K\x01s", b"N}U\x0c__setstate__K\x01s\x86"):
            with pytest.raises(Exception):
                PlainUnpickler(io.BytesIO(b"\x80\x02" + target + state + b"b.")).load()
    assert PlainUnpickler(io.BytesIO(pickle.dumps(np.arange(3)))).load().tolist() == [0, 1, 2]


NESTED = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(value=NESTED, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_any_plain_data_is_read(value, protocol):
    assert PlainUnpickler(io.BytesIO(pickle.dumps(value, protocol))).load() == value


@settings(max_examples=60)
@given(st.binary(max_size=60))
def test_random_bytes_never_do_anything_but_fail_or_load(data):
    try:
        PlainUnpickler(io.BytesIO(b"\x80\x02" + data)).load()
    except Exception:
        pass


def test_npy_that_lies_about_its_shape(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}, 2], dtype=object))
    data = (tmp_path / "a.npy").read_bytes()
    assert b"(2,)" in data
    (tmp_path / "a.npy").write_bytes(data.replace(b"(2,)", b"(9,)"))
    with pytest.raises(ValueError, match=r"a\.npy.*shape \(9,\)"):
        load_npy(tmp_path / "a.npy")


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"hello", b"\x93NUMPY\x09\x00xxxx"])
def test_damaged_npy_is_an_error(content, tmp_path):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npy"):
        load_npy(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.arange(100))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"a\.npy"):
        load_npy(tmp_path / "a.npy")


@pytest.mark.parametrize(
    "file, convert",
    [
        ("following_cache4.pkl", "flintstones"),
        ("descriptions.npy", "pororo"),
        ("train_seen_unseen_ids.npy", "pororo"),
    ],
)
def test_converters_refuse_hostile_folders(file, convert, request, tmp_path):
    raw, mark = request.getfixturevalue(convert), tmp_path / "mark"
    np.save(
        tmp_path / "h.npy", np.array([Call(os.system, f"echo owned > {mark}")] * 3, dtype=object)
    )
    hostile = (
        (tmp_path / "h.npy").read_bytes()
        if file.endswith("npy")
        else pickle.dumps({"a": Call(os.system, f"echo owned > {mark}")})
    )
    (raw / file).write_bytes(hostile)
    with pytest.raises(RefusedPickle, match=rf"{file}.*system"):
        {"flintstones": convert_flintstones, "pororo": convert_pororo}[convert](
            raw, tmp_path / "out.h5", progress=False
        )
    assert not mark.exists() and not (tmp_path / "out.h5").exists()


# ---------------------------------------------------------------- bad raw folders


@pytest.mark.parametrize(
    "layout, file",
    [
        *(
            ("flintstones", file)
            for file in (
                "train-val-test_split.json",
                "following_cache4.pkl",
                "flintstones_annotations_v1-0.json",
                "video_frames_sampled",
            )
        ),
        *(
            ("pororo", file)
            for file in (
                "descriptions.npy",
                "img_cache4.npy",
                "following_cache4.npy",
                "train_seen_unseen_ids.npy",
            )
        ),
    ],
)
def test_raw_folder_without_a_file(layout, file, request, tmp_path):
    raw, convert = (
        request.getfixturevalue(layout),
        {"flintstones": convert_flintstones, "pororo": convert_pororo}[layout],
    )
    (raw / file).rename(raw / "elsewhere")
    with pytest.raises(
        FileNotFoundError, match=rf"lacks {file}: a (Flintstones|Pororo)SV folder holds .*, "
    ):
        convert(raw, tmp_path / "out.h5")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert(tmp_path / "nowhere", tmp_path / "out.h5")
    assert not (tmp_path / "out.h5").exists()


def test_flintstones_with_a_broken_clip(flintstones, tmp_path):
    clip = flintstones / "video_frames_sampled" / "s_01_e_01_shot_000002.npy"
    convert = lambda: convert_flintstones(flintstones, tmp_path / "out.h5", progress=False)
    np.save(clip, np.zeros((5, 128, 64, 3), np.uint8))
    with pytest.raises(ValueError, match=clip.name):
        convert()
    clip.write_bytes(clip.read_bytes()[:1000])
    with pytest.raises(ValueError, match=clip.name):
        convert()
    clip.unlink()
    with pytest.raises(FileNotFoundError, match=clip.name):
        convert()
    assert_nothing_left(tmp_path, "flintstones")


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("train-val-test_split.json", "[1", "JSON"),
        ("train-val-test_split.json", '{"train": []}', "val"),
        ("flintstones_annotations_v1-0.json", '[{"globalID": 1}]', "description"),
        ("flintstones_annotations_v1-0.json", "[]", "no description of 's_0"),
    ],
)
def test_flintstones_with_a_wrong_index(file, content, message, flintstones, tmp_path):
    (flintstones / file).write_text(content)
    with pytest.raises(ValueError, match=rf"{file}.*{message}"):
        convert_flintstones(flintstones, tmp_path / "out.h5", progress=False)


def test_pororo_with_wrong_parts(pororo, tmp_path):
    convert = lambda: convert_pororo(pororo, tmp_path / "out.h5", progress=False)
    np.save(pororo / "train_seen_unseen_ids.npy", np.array([[0], [1], [17]]))
    with pytest.raises(ValueError, match="do not belong together"):
        convert()
    np.save(pororo / "train_seen_unseen_ids.npy", np.array([[0], [-1], [2]]))
    with pytest.raises(ValueError, match="do not belong together"):
        convert()
    np.save(pororo / "train_seen_unseen_ids.npy", np.array([[0], [1]]))
    with pytest.raises(ValueError, match="three arrays"):
        convert()
    np.save(pororo / "train_seen_unseen_ids.npy", np.array([[0], [1], [2]]))
    (pororo / "Pororo_ENGLISH1_1/ep1/3.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="ep1/3.png.*does not decode"):
        convert()
    Image.fromarray(np.zeros((300, 128, 3), np.uint8)).save(pororo / "Pororo_ENGLISH1_1/ep1/3.png")
    with pytest.raises(ValueError, match="ep1/1.*image2.*128x300"):
        convert()
    (pororo / "Pororo_ENGLISH1_1/ep1/3.png").unlink()
    with pytest.raises(FileNotFoundError, match="ep1/3.png"):
        convert()
    np.save(pororo / "descriptions.npy", np.array({}, dtype=object))
    with pytest.raises(ValueError, match="no description of"):
        convert()
    assert_nothing_left(tmp_path, "pororo")


# ---------------------------------------------------------------- own folder


def own_folder(raw: Path, *lines) -> Path:
    raw.mkdir(exist_ok=True)
    for name, size in (("a.png", (300, 200)), ("b.jpg", (40, 90)), ("c.png", (64, 64))):
        Image.new("RGB", size, ORANGE).save(raw / name)
    (raw / "stories.jsonl").write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines),
        encoding="utf-8",
    )
    return raw


GOOD = {"id": "good", "frames": ["a.png", "b.jpg", "c.png"], "captions": ["One | two.", "", "É\nh"]}


def test_own_folder_takes_any_picture(tmp_path):
    raw = own_folder(
        tmp_path / "raw",
        GOOD,
        "",
        {"split": "holdout-1", "frames": ["c.png"], "captions": ["x"], "truth": {"a": [1]}},
    )
    clear = np.zeros((50, 50, 4), np.uint8)
    clear[:25] = (10, 20, 30, 255)
    Image.fromarray(clear).save(raw / "c.png")
    (raw / "stories.jsonl").write_text(
        (raw / "stories.jsonl").read_text(encoding="utf-8"), encoding="utf-8-sig"
    )  # as Windows' editor saves it
    convert_folder(raw, tmp_path / "out.h5", progress=False, size=100)
    record = StoryDataset(tmp_path / "out.h5", "train").story(0)
    assert (record.id, record.captions, record.truth) == ("good", ["One | two.", "", "É h"], None)
    assert [frame.size for frame in record.frames] == [(100, 100), (40, 40), (50, 50)]
    assert np.asarray(record.frames[2])[[0, 49], 0].tolist() == [[10, 20, 30], [255, 255, 255]]
    other = StoryDataset(tmp_path / "out.h5", "holdout-1").story(0)
    assert (other.id, other.truth) == ("line_3", {"a": [1]})


def test_own_folder_turns_pictures_upright(tmp_path):
    raw = own_folder(tmp_path / "raw", {"frames": ["p.jpg"], "captions": [""]})
    half = np.zeros((80, 80, 3), np.uint8)
    half[:40] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(half).save(raw / "p.jpg", exif=exif)
    convert_folder(raw, tmp_path / "out.h5", progress=False)
    [frame] = StoryDataset(tmp_path / "out.h5", "train").story(0).frames
    assert np.asarray(frame)[5].mean() < 20 and np.asarray(frame)[75].mean() > 235


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"frames": [', "JSON"),
        ("[1]", "object"),
        ({"captions": ["x"]}, "frames"),
        ({"frames": "a.png", "captions": ["x"]}, "list of strings"),
        ({"frames": ["a.png"], "captions": [3]}, "captions"),
        ({"frames": [], "captions": []}, "at least one frame"),
        ({"frames": ["a.png", "c.png"], "captions": ["x"]}, "1 captions for 2 frames"),
        ({"frames": ["a.png"], "captions": ["x"], "id": 7}, '"id"'),
        ({"frames": ["a.png"], "captions": ["x"], "split": "a/b"}, '"split"'),
        ({"frames": ["a.png"], "captions": ["x"], "id": "good"}, "line 1 already"),
        ({"frames": ["bad.png"], "captions": ["x"]}, "bad.png does not decode"),
    ],
)
def test_own_folder_errors_name_the_line(line, message, tmp_path):
    raw = own_folder(tmp_path / "raw", GOOD, "", line)
    (raw / "bad.png").write_bytes(png(picture(0, 0, 0))[:60].tobytes())
    with pytest.raises(ValueError, match=rf"stories\.jsonl, line 3: .*{message}"):
        convert_folder(raw, tmp_path / "out.h5", progress=False)
    assert_nothing_left(tmp_path, "raw")


def test_own_folder_without_picture_or_index(tmp_path):
    raw = own_folder(tmp_path / "raw", GOOD, {"frames": ["z.png"], "captions": ["x"]})
    with pytest.raises(FileNotFoundError, match=r"line 2: .*'z\.png'"):
        convert_folder(raw, tmp_path / "out.h5", progress=False)
    (raw / "stories.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no story"):
        convert_folder(raw, tmp_path / "out.h5", progress=False)
    (raw / "stories.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="lacks stories.jsonl"):
        convert_folder(raw, tmp_path / "out.h5", progress=False)


# ---------------------------------------------------------------- conversions that do not end well


class Fails(ToyStory):
    def __init__(self, error):
        super().__init__(0)
        self.error = error

    def frames(self, size=64, take=0):
        raise self.error


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(1), ValueError("bad"), MemoryError(), OSError("disk")]
)
def test_failed_conversion_keeps_the_good_file(error, tmp_path):
    out = convert_stories({"train": [ToyStory(1)]}, tmp_path / "out.h5", progress=False)
    before = out.read_bytes()
    with pytest.raises(type(error)):
        convert_stories({"train": [ToyStory(2), Fails(error)]}, out, progress=False)
    assert out.read_bytes() == before
    assert_nothing_left(tmp_path, "out.h5")


def test_new_conversion_replaces_the_good_file(tmp_path):
    for number in (1, 2):
        convert_stories(
            {"train": [ToyStory(number)]}, tmp_path / "deep" / "out.h5", size=128, progress=False
        )
    assert_story(StoryDataset(tmp_path / "deep" / "out.h5").story(0), 2)
    assert_nothing_left(tmp_path / "deep", "out.h5")
    with pytest.raises(ValueError, match="is a folder"):
        convert_stories({"train": [ToyStory(1)]}, tmp_path / "deep", progress=False)


def test_atomic_path_with_two_writers(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a") as partial:
        partial.write_text("half")
        assert partial.parent == tmp_path and partial.name != "a"
        1 / 0
    assert_nothing_left(tmp_path)


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background hands down that it be ignored
sys.path.insert(0, {tests!r})
from test_data import ToyStory
from causal_story.data import convert_stories
class Slow(ToyStory):
    def frames(self, size=64, take=0):
        print("writing", flush=True)
        time.sleep(60)
convert_stories({{"train": [ToyStory(0), ToyStory(1), Slow(2)]}}, {out!r}, progress=False)
"""


@pytest.mark.parametrize(
    "how", [signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM, signal.SIGINT]
)
def test_killed_conversion_leaves_no_file_under_the_final_name(how, tmp_path):
    code = SLOW.format(tests=str(Path(__file__).parent), out=str(tmp_path / "out.h5"))
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout.readline() == "writing\n"
        during = [path.name for path in tmp_path.iterdir()]
        process.send_signal(how)
        assert process.wait(30) != 0
    assert len(during) == 1 and during[0].endswith(".partial")
    assert not (tmp_path / "out.h5").exists()
    if how == signal.SIGINT:
        assert_nothing_left(tmp_path)


FULL = """
import resource, sys
sys.path.insert(0, {tests!r})
from test_data import ToyStory
from causal_story.data import convert_stories
for limit in ({limits}):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try: convert_stories({{"train": [ToyStory(k) for k in range(60)]}}, {out!r}, size=128, tiles=5, progress=False)
    except OSError as error: print(limit, error.errno, error)
    else: print(limit, "was written")
print("alive")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are a Unix matter")
def test_full_disk_is_an_error_and_not_a_crash(tmp_path):
    "A limit on the size of a file fails in the same place as a full disk; HDF5 left alone with it crashes the process."
    convert_stories({"train": [ToyStory(1)]}, tmp_path / "out.h5", progress=False)
    before = (tmp_path / "out.h5").read_bytes()
    code = FULL.format(
        tests=str(Path(__file__).parent),
        out=str(tmp_path / "out.h5"),
        limits="0, 100, 2048, 5000, 20000, 50000, 100001",
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    *lines, last = done.stdout.splitlines()
    assert (done.returncode, last, len(lines)) == (0, "alive", 7), done.stdout + done.stderr
    assert all(re.search(r"out\.h5 could not be written", line) for line in lines), done.stdout
    assert not done.stderr
    assert (tmp_path / "out.h5").read_bytes() == before
    assert_nothing_left(tmp_path, "out.h5")


def test_one_story_in_memory_at_a_time(tmp_path):
    alive, most = [], 0

    def read_story(split, key):
        nonlocal most
        story = RawStory(str(key), [""], [Image.new("RGB", (8, 8))])
        alive.append(weakref.ref(story))
        most = max(most, sum(one() is not None for one in alive))
        return story

    write_hdf5({"train": range(20)}, read_story, tmp_path / "out.h5", progress=False)
    assert most <= 2 and len(StoryDataset(tmp_path / "out.h5")) == 20


def test_progress_bar_is_shown_or_not(tmp_path, capfd):
    convert_stories({"train": [ToyStory(1)]}, tmp_path / "out.h5", progress=False)
    assert capfd.readouterr() == ("", "")
    convert_stories({"train": [ToyStory(1)]}, tmp_path / "out.h5")
    assert "1/1" in capfd.readouterr().err


# ---------------------------------------------------------------- reading


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


def test_missing_truncated_or_foreign_file(made, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.h5.*convert_"):
        StoryDataset(tmp_path / "nowhere.h5")
    with pytest.raises(FileNotFoundError):
        StoryDataset(tmp_path)
    data = made.read_bytes()
    for size in (0, 10, 1000, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.h5").write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"cut\.h5"):
            StoryDataset(tmp_path / "cut.h5")
    (tmp_path / "text.h5").write_text("hello " * 1000)
    with pytest.raises(ValueError, match=r"text\.h5.*not an HDF5"):
        StoryDataset(tmp_path / "text.h5")


def test_damaged_middle_names_the_story(made):
    with h5py.File(made, "r+") as file:
        del file["train/00000001/captions"]
        file["train/00000001/captions"] = "{not json"
        del file["train/00000002/captions"]
    dataset = StoryDataset(made)
    assert dataset.story(0).captions == captions(0)
    for index in (1, 2):
        with pytest.raises(
            ValueError, match=rf"made\.h5: story {index} of split 'train' cannot be read"
        ):
            dataset.story(index)


def test_wrong_schema(made, tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["weights"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"other\.h5.*not one with stories"):
        StoryDataset(tmp_path / "other.h5")
    with h5py.File(made, "r+") as file:
        file.attrs["schema"] = 3
    with pytest.raises(ValueError, match=r"made\.h5.*schema 3"):
        StoryDataset(made)
    with h5py.File(made, "r+") as file:
        file.attrs.update(schema=2, colour="bgr")
    with pytest.raises(ValueError, match=r"made\.h5.*bgr"):
        StoryDataset(made)


def test_unknown_split_task_index_and_tile(made, version1):
    with pytest.raises(ValueError, match="'dev'.*'test', 'train'"):
        StoryDataset(made, "dev")
    with pytest.raises(ValueError, match="'dev'.*'test', 'train', 'val'"):
        StoryDataset(version1, "dev")
    with pytest.raises(ValueError, match="'drawing'.*visualization.*continuation"):
        StoryDataset(made, task="drawing")
    dataset = StoryDataset(made)
    for index in (4, -5):
        with pytest.raises(IndexError, match=r"made\.h5"):
            dataset.story(index)
    with pytest.raises(ValueError, match="tile=5.*0 to 4"):
        dataset.story(0, tile=5)
    assert [item["index"] for item in dataset] == [0, 1, 2, 3] and dataset[-1]["index"] == 3


def test_story_too_short_for_its_task(made):
    dataset = StoryDataset(made, task="continuation")
    assert len(dataset[2]["frames"]) == 3
    with pytest.raises(
        ValueError,
        match=r"made\.h5: story 'train_00003' has 1 frame.*continuation needs at least 2",
    ):
        dataset[3]
    assert len(StoryDataset(made)[3]["frames"]) == 1


def test_story_without_frames_or_with_wrong_captions(made):
    with h5py.File(made, "r+") as file:
        for k in range(5):
            del file[f"train/00000000/image{k}"]
        del file["train/00000001/image4"]
        file["train/00000003/captions"][()] = "[]"
    dataset = StoryDataset(made)
    with pytest.raises(ValueError, match="'train_00000' has 5 captions for 0 frames"):
        dataset[0]
    with pytest.raises(ValueError, match="'train_00001' has 5 captions for 4 frames"):
        dataset[1]
    with pytest.raises(ValueError, match="'train_00003' has 0 captions for 1 frames"):
        dataset[3]


def test_frames_must_be_numbered_without_gap(made):
    with h5py.File(made, "r+") as file:
        file.move("train/00000000/image2", "train/00000000/image7")
    with pytest.raises(ValueError, match="story 0 of split 'train' cannot be read"):
        StoryDataset(made)[0]


def test_image_that_does_not_decode(made):
    with h5py.File(made, "r+") as file:
        good = file["train/00000000/image2"][()]
        for index, blob in enumerate(
            (np.zeros(0, np.uint8), good[: len(good) // 2], np.frombuffer(b"hello", np.uint8))
        ):
            name = f"train/0000000{index}/image{2 if index < 2 else 1}"
            del file[name]
            file[name] = blob
    dataset = StoryDataset(made)
    for index, image in ((0, 2), (1, 2), (2, 1)):
        with pytest.raises(
            ValueError, match=rf"story 'train_0000{index}', image{image} does not decode"
        ):
            dataset[index]


def test_bar_inside_a_version1_caption_is_explained(version1):
    with h5py.File(version1, "r+") as file:
        file["train/text"][1] = "a|b|c|d|e|f"
    with pytest.raises(
        ValueError, match=r"story 'train/1' \(a '\|' inside.*6 captions for 5 frames"
    ):
        StoryDataset(version1)[1]


def test_version1_with_arrays_of_different_length(version1):
    with h5py.File(version1, "r+") as file:
        del file["train/text"]
        file["train"].create_dataset("text", data=["a|b|c|d|e"], dtype=h5py.string_dtype())
    with pytest.raises(
        ValueError, match=r"version1\.h5, split 'train': the arrays differ in length"
    ):
        StoryDataset(version1)


@settings(max_examples=25)
@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=6))
def test_captions_come_back_letter_by_letter(texts, tmp_path_factory):
    story = ToyStory(0, n=len(texts))
    story.captions = texts
    path = convert_stories(
        {"train": [story]}, tmp_path_factory.mktemp("h") / "a.h5", size=8, progress=False
    )
    dataset = StoryDataset(path)
    assert dataset.story(0).captions == texts
    dataset.close()


def test_captions_that_are_not_text(tmp_path):
    story = ToyStory(0)
    story.captions = ["a", "b", None, "d", "e"]
    with pytest.raises(TypeError, match="'train_00000', caption 2: text expected, not NoneType"):
        convert_stories({"train": [story]}, tmp_path / "a.h5", progress=False)
    story.captions, story.frames = ["a"], ToyStory(0).frames
    with pytest.raises(ValueError, match="'train_00000' has 1 captions for 5 frames"):
        convert_stories({"train": [story]}, tmp_path / "a.h5", progress=False)
    story.frames = lambda size, take: []
    with pytest.raises(ValueError, match="'train_00000' has no frame"):
        convert_stories({"train": [story]}, tmp_path / "a.h5", progress=False)
    with pytest.raises(ValueError, match="no story"):
        convert_stories({"train": []}, tmp_path / "a.h5", progress=False)
    assert_nothing_left(tmp_path)


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
    expected = lambda seed, epoch, index: [
        picture(index, frame, choose_tile(5, seed, epoch, index, frame)) for frame in range(5)
    ]
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
    assert copy._file is None and copy.epoch == 6
    assert as_bytes([copy[0]]) == as_bytes([first])
    dataset.close()
    dataset.close()
    assert as_bytes([dataset[0]]) == as_bytes([first])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_worker_opens_its_own_file(made):
    dataset = StoryDataset(made)
    parent = as_bytes(list(dataset))
    handle = dataset._file
    loaded = [
        item
        for batch in DataLoader(
            dataset, batch_size=2, num_workers=2, collate_fn=list, multiprocessing_context="fork"
        )
        for item in batch
    ]
    assert as_bytes(loaded) == parent
    assert dataset._file is handle and as_bytes([dataset[1]]) == parent[1:2]


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


# ---------------------------------------------------------------- pictures of stories


def test_show_story_makes_a_picture(tmp_path):
    story = ToyStory(0)
    rows = [("truth", story.frames()), ("drawn", [None, *story.frames()[1:]])]
    for figure in (
        show_story(story.frames(), story.captions, title="A title", given=1),
        show_story(rows=rows, captions=story.captions),
        show_story([np.asarray(frame) for frame in story.frames()]),
    ):
        shown = compact(figure, colours=32)
        assert shown.mode == "P" and shown.width > 900 and shown.height > 190
        assert np.abs(np.asarray(shown.convert("RGB")).astype(int) - ORANGE).sum(-1).min() < 20
    for nothing in ({}, {"frames": []}, {"rows": []}):
        with pytest.raises(ValueError, match="at least one frame"):
            show_story(**nothing)
