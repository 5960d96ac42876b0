"""Data: the four layouts written by hand, hostile and damaged files, interrupted conversions, workers, batches."""
import io
import json
import pickle
import signal
import subprocess
import sys
import warnings

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from causal_story.data import (CLIP_IMAGE_MEAN, CLIP_IMAGE_STD, RawStory, RefusedPickle, StoryCollator, StoryDataset, choose_tile, compact,
                               convert_flintstones, convert_folder, convert_pororo, load_npy, load_pickle, show_story, split_task, write_hdf5)

COLOURS = [(255, 128, 0), (0, 200, 40), (10, 20, 230), (250, 250, 10), (120, 0, 120)]  # of frames 0 to 4: red and blue differ


def tiles_of(colour, size=8, tiles=5)->np.ndarray:
    "(tiles, size, size, 3): a clip whose tile t is a little darker than tile t-1; one corner pixel is white."
    clip = np.stack([np.full((size, size, 3), colour, dtype=np.uint8) // (1 + t) for t in range(tiles)])
    clip[:, 0, 0] = 255
    return clip


def png(array)->bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def colours_of(frames)->list:
    "The colour in the middle of each frame."
    return [frame.getpixel((frame.width // 2, frame.height // 2)) for frame in frames]


class WordTokenizer:
    "Called like a transformers tokenizer: 1, then one number a word, padded with 0."
    def __call__(self, texts, padding, truncation, max_length, return_tensors):
        rows = [[1, *(10 + len(word) for word in text.split())][:max_length] for text in texts]
        ids = torch.tensor([row + [0] * (max_length - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


# ---------------------------------------------------------------- the layouts, byte for byte

CAPTIONS = ["Fred | Barney sit.", "He\ntalks.", "Wilma\tcooks.", "", "Dino  sleeps. "]
CLEANED = ["Fred | Barney sit.", "He talks.", "Wilma cooks.", "", "Dino sleeps."]


@pytest.fixture
def flintstones(tmp_path):
    "Two training stories in an order of their own, one for test, and a clip with three followings, which starts none."
    raw = tmp_path / "flintstones"
    (raw / "video_frames_sampled").mkdir(parents=True)
    names = {start: [f"{start}_{k}" for k in range(5)] for start in ("z", "a", "t")}
    splits = {"train": ["z_0", "z_1", "a_0"], "val": [], "test": ["t_0"]}
    followings = {row[0]: row[1:] for row in names.values()} | {"z_1": ["z_2", "z_3", "z_4"]}
    notes = [{"globalID": name, "description": CAPTIONS[k], "setting": "Bedrock"} for row in names.values() for k, name in enumerate(row)]
    (raw / "train-val-test_split.json").write_text(json.dumps(splits))
    (raw / "following_cache4.pkl").write_bytes(pickle.dumps(followings, protocol=2))
    (raw / "flintstones_annotations_v1-0.json").write_text(json.dumps(notes))
    for row in names.values():
        for k, name in enumerate(row):
            np.save(raw / "video_frames_sampled" / f"{name}.npy", tiles_of(COLOURS[k]))
    return raw


@pytest.fixture
def pororo(tmp_path):
    "Three stories; paths as bytes, and (the second) as bytes that spell b'...'; ids unsorted."
    raw = tmp_path / "pororo"
    descriptions, firsts, followings = {}, [], []
    for s in range(3):
        (raw / f"ep{s}").mkdir(parents=True)
        paths = [f"ep{s}/{k}.png" for k in range(5)]
        for k, path in enumerate(paths):
            (raw / path).write_bytes(png(tiles_of(COLOURS[k]).reshape(-1, 8, 3)))
            descriptions[path[:-4]] = [f"story {s} frame {k}", "another annotator"]
        spelled = [f"b'{path}'" if s == 1 else path for path in paths]
        firsts.append(spelled[0].encode())
        followings.append([path.encode() for path in spelled[1:]])
    ids = np.empty(3, dtype=object)
    ids[:] = [np.array([2, 0]), np.array([1]), np.array([], dtype=int)]
    for name, array in (("img_cache4", np.array(firsts)), ("following_cache4", np.array(followings)),
                        ("descriptions", np.array(descriptions, dtype=object)), ("train_seen_unseen_ids", ids)):
        np.save(raw / f"{name}.npy", array)
    return raw


@pytest.fixture
def folder(tmp_path):
    "Five frames, then three, then one."
    raw = tmp_path / "folder"
    (raw / "img").mkdir(parents=True)
    lines = []
    for n in (5, 3, 1):
        for k in range(n):
            (raw / f"img/{n}_{k}.png").write_bytes(png(tiles_of(COLOURS[k], tiles=1)[0]))
        lines.append(json.dumps({"id": f"of {n}", "frames": [f"img/{n}_{k}.png" for k in range(n)], "captions": CAPTIONS[:n]}))
    (raw / "stories.jsonl").write_text("\n".join(lines) + "\n")
    return raw


@pytest.fixture
def version1(tmp_path):
    "As the released scripts write it: no attributes, long arrays, text joined by '|', red and blue exchanged."
    path = tmp_path / "version1.h5"
    with h5py.File(path, "w") as file:
        for split, rows in {"train": 2, "val": 1, "test": 1}.items():
            group = file.create_group(split)
            for k in range(5):
                images = group.create_dataset(f"image{k}", (rows,), dtype=h5py.vlen_dtype(np.uint8))
                for row in range(rows):
                    images[row] = np.frombuffer(png(tiles_of(COLOURS[k][::-1]).reshape(-1, 8, 3)), dtype=np.uint8)
            group.create_dataset("text", data=["one|two||four|fünf"] * rows, dtype=h5py.string_dtype("utf-8"))
    return path


@pytest.fixture
def stories(folder, tmp_path):
    "An HDF5 file with the three stories of `folder`."
    return convert_folder(folder, tmp_path / "stories.h5", progress=False)


def test_flintstones(flintstones, tmp_path):
    path = convert_flintstones(flintstones, tmp_path / "out.h5", progress=False)
    dataset = StoryDataset(path, "train", train=False)
    assert [item["id"] for item in dataset] == ["z_0", "a_0"], "split order is kept, three followings make no story"
    assert dataset[0]["captions"] == CLEANED
    assert colours_of(dataset[0]["frames"]) == COLOURS
    assert dataset[0]["frames"][0].getpixel((0, 0)) == (255, 255, 255)
    assert len(StoryDataset(path, "val")) == 0 and len(StoryDataset(path, "test")) == 1
    assert dataset[0]["truth"] is None


def test_pororo(pororo, tmp_path):
    path = convert_pororo(pororo, tmp_path / "out.h5", progress=False)
    train, val = StoryDataset(path, "train", train=False), StoryDataset(path, "val")
    assert [item["id"] for item in train] == ["ep0/0", "ep2/0"], "ids are sorted"
    assert val[0]["captions"] == [f"story 1 frame {k}" for k in range(5)]
    assert colours_of(val[0]["frames"]) == COLOURS
    assert train.tile_counts(0) == [5] * 5


def test_version_1_shows_true_colours(version1):
    dataset = StoryDataset(version1, "val")
    assert dataset.schema == 1
    assert colours_of(dataset[0]["frames"]) == COLOURS
    assert dataset[0]["captions"] == ["one", "two", "", "four", "fünf"]
    assert colours_of(dataset.story(0, tile=1).frames) == [tuple(c // 2 for c in colour) for colour in COLOURS]


def test_version_1_caption_with_a_bar_is_named(version1):
    with h5py.File(version1, "a") as file:
        file["val/text"][0] = "one|two|three|four|five|six"
    with pytest.raises(ValueError, match=r"val/0.*'\|'.*6 captions for 5 frames"):
        StoryDataset(version1, "val")[0]


def test_version_2_keeps_bars_and_empty_captions(stories):
    with h5py.File(stories) as file:
        assert dict(file.attrs) == {"schema": 2, "colour": "rgb"}
        assert json.loads(file["train/00000000/captions"].asstr()[()]) == CLEANED
    assert [item["captions"] for item in StoryDataset(stories)] == [CLEANED, CLEANED[:3], CLEANED[:1]]


def test_folder_takes_what_people_have(tmp_path):
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (300, 100), (200, 10, 10)).save(tmp_path / "mine/wide.jpg")
    Image.new("RGBA", (10, 20), (0, 0, 0, 0)).save(tmp_path / "mine/clear.png")
    line = {"split": "my-own", "frames": ["wide.jpg", "clear.png"], "captions": ["ä", "b"]}
    (tmp_path / "mine/stories.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(line).encode() + b"\n\n")
    record = StoryDataset(convert_folder(tmp_path / "mine", tmp_path / "out.h5", progress=False, size=64), "my-own").story(0)
    assert [frame.size for frame in record.frames] == [(64, 64), (10, 10)]
    assert colours_of(record.frames)[1] == (255, 255, 255), "transparent becomes white"


# ---------------------------------------------------------------- hostile files

HOSTILE = {  # by the name that has to be refused
    "os.system": b"cos\nsystem\n(S'touch MARK'\ntR.",
    "posix.system": b"\x80\x02cposix\nsystem\nX\x0a\x00\x00\x00touch MARK\x85R.",
    "builtins.eval": b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x12open('MARK', 'w')  \x85R.",
    "__builtin__.eval": b"c__builtin__\neval\n(S'open(\"MARK\", \"w\")'\ntR.",
    "builtins.getattr": b"cbuiltins\ngetattr\n(cbuiltins\ndict\nS'fromkeys'\ntR.",
    "numpy.load": b"cnumpy\nload\n(S'MARK'\ntR.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickle_is_refused_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pkl").write_bytes(HOSTILE[name])
    with pytest.raises(RefusedPickle, match=rf"bad\.pkl.*{name.replace('.', '[.]')}"):
        load_pickle(tmp_path / "bad.pkl")
    assert not (tmp_path / "MARK").exists()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_npy_is_refused_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open(tmp_path / "bad.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        file.write(HOSTILE[name])
    with pytest.raises(RefusedPickle, match=rf"bad\.npy.*{name.replace('.', '[.]')}"):
        load_npy(tmp_path / "bad.npy")
    assert not (tmp_path / "MARK").exists()


def test_hostile_index_file_stops_the_conversion(flintstones, tmp_path):
    (flintstones / "following_cache4.pkl").write_bytes(HOSTILE["os.system"])
    with pytest.raises(RefusedPickle, match=r"following_cache4\.pkl.*os\.system"):
        convert_flintstones(flintstones, tmp_path / "out.h5", progress=False)
    assert not (tmp_path / "out.h5").exists()


def test_array_that_claims_more_than_it_brings(tmp_path):
    dump = pickle.dumps(np.array(["a"], dtype=object), protocol=2)
    claimed = dump.replace(b"K\x01K\x01\x85", b"K\x01M\xe8\x03\x85")
    assert claimed != dump
    (tmp_path / "bad.pkl").write_bytes(claimed)
    with pytest.raises(RefusedPickle, match="1000"):
        load_pickle(tmp_path / "bad.pkl")


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"plain text", pickle.dumps(list(range(300)))[:-40]], ids=["empty", "header", "text", "cut"])
def test_damaged_pickle_is_a_value_error(content, tmp_path):
    (tmp_path / "bad.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.pkl"):
        load_pickle(tmp_path / "bad.pkl")


PLAIN = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
                     lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner), max_leaves=12)


@given(value=PLAIN, protocol=st.integers(0, 5))
def test_plain_data_passes(value, protocol, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "plain.pkl"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    assert load_pickle(path) == value


@pytest.mark.parametrize("array", [np.arange(6, dtype=">i4").reshape(2, 3), np.array([b"ab", b"c"]), np.array(["ä", None, 3], dtype=object), np.array(2.5)])
@pytest.mark.parametrize("protocol", range(6))
def test_arrays_pass(array, protocol, tmp_path):
    (tmp_path / "array.pkl").write_bytes(pickle.dumps(array, protocol=protocol))
    found = load_pickle(tmp_path / "array.pkl")
    assert found.dtype.newbyteorder("=") == array.dtype.newbyteorder("=") and found.tolist() == array.tolist()


# ---------------------------------------------------------------- conversions that fail

def left_behind(folder)->list:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def test_failure_in_the_middle_leaves_nothing(flintstones, tmp_path):
    (flintstones / "video_frames_sampled/a_3.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"a_3\.npy"):
        convert_flintstones(flintstones, tmp_path / "out.h5", progress=False)
    assert left_behind(tmp_path) == []


def test_failure_in_the_middle_keeps_an_earlier_file(pororo, tmp_path):
    good = convert_pororo(pororo, tmp_path / "out.h5", progress=False).read_bytes()
    (pororo / "ep2/4.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    with pytest.raises(ValueError, match=r"ep2/4\.png.*does not decode"):
        convert_pororo(pororo, tmp_path / "out.h5", progress=False)
    assert (tmp_path / "out.h5").read_bytes() == good
    assert left_behind(tmp_path) == ["out.h5"]


IN_A_PROCESS = """
import os, resource, sys
from PIL import Image
from causal_story.data import RawStory, write_hdf5
def read_story(split, key):
    if key == 2 and sys.argv[2] == "kill": os.kill(os.getpid(), 9)
    return RawStory(str(key), ["a"], [Image.effect_noise((200, 200), 90)])
if sys.argv[2] == "full": resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try: write_hdf5({"train": [0, 1, 2, 3]}, read_story, sys.argv[1], progress=False)
except OSError as error: print("refused:", error)
"""


def in_a_process(out, what)->subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", IN_A_PROCESS, str(out), what], capture_output=True, text=True, timeout=120)


def test_killed_conversion_keeps_an_earlier_file(stories):
    good = stories.read_bytes()
    assert in_a_process(stories, "kill").returncode == -signal.SIGKILL
    assert stories.read_bytes() == good
    assert len(StoryDataset(stories)) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of a file as Linux does")
def test_disk_that_is_full(tmp_path):
    done = in_a_process(tmp_path / "out.h5", "full")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused:") and "out.h5" in done.stdout
    assert left_behind(tmp_path) == []


def test_nothing_to_write(tmp_path):
    with pytest.raises(ValueError, match="no story"):
        write_hdf5({"train": []}, None, tmp_path / "out.h5", progress=False)


@pytest.mark.parametrize("captions, frames, message", [(["a"], 2, "1 captions for 2 frames"), ([], 0, "no frame")])
def test_story_whose_parts_do_not_pair_up(captions, frames, message, tmp_path):
    story = RawStory("odd", captions, [Image.new("RGB", (4, 4))] * frames)
    with pytest.raises(ValueError, match=f"odd.*{message}"):
        write_hdf5({"train": [0]}, lambda split, key: story, tmp_path / "out.h5", progress=False)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("name", ["train-val-test_split.json", "following_cache4.pkl", "flintstones_annotations_v1-0.json"])
def test_missing_index_file_is_named(name, flintstones, tmp_path):
    (flintstones / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {name}"):
        convert_flintstones(flintstones, tmp_path / "out.h5", progress=False)


def test_clip_of_a_wrong_shape_is_named(flintstones, tmp_path):
    np.save(flintstones / "video_frames_sampled/z_2.npy", np.zeros((5, 8, 9, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"z_2\.npy.*\(5, 8, 9, 3\)"):
        convert_flintstones(flintstones, tmp_path / "out.h5", progress=False)


@pytest.mark.parametrize("line, error, message", [
    ("{", ValueError, "JSON"),
    ("[1]", ValueError, "an object"),
    ('{"frames": "img/5_0.png", "captions": ["a"]}', ValueError, '"frames" must be a list'),
    ('{"frames": [], "captions": []}', ValueError, "at least one frame"),
    ('{"frames": ["img/5_0.png"], "captions": ["a", "b"]}', ValueError, "2 captions for 1 frames"),
    ('{"frames": ["img/no.png"], "captions": ["a"]}', FileNotFoundError, "img/no.png"),
    ('{"frames": ["img/5_0.png"], "captions": ["a"], "split": "a/b"}', ValueError, '"split"'),
    ('{"frames": ["img/5_0.png"], "captions": ["a"], "id": "of 5"}', ValueError, "line 1 already"),
])
def test_bad_line_is_named(line, error, message, folder, tmp_path):
    with open(folder / "stories.jsonl", "a") as lines:
        lines.write(line + "\n")
    with pytest.raises(error, match=f"line 4.*{message}"):
        convert_folder(folder, tmp_path / "out.h5", progress=False)


# ---------------------------------------------------------------- reading

@pytest.mark.parametrize("keep", [0, 7, 0.3, 0.9])
def test_cut_short_file_is_named(keep, stories):
    content = stories.read_bytes()
    stories.write_bytes(content[:int(keep if keep >= 1 else keep * len(content))])
    with pytest.raises(ValueError, match=r"stories\.h5: cut short"):
        StoryDataset(stories)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.h5"):
        StoryDataset(tmp_path / "none.h5")


def test_image_that_does_not_decode_is_named(stories):
    with h5py.File(stories, "a") as file:
        blob = file["train/00000001/image2"][()]
        blob[40:] = 0
        file["train/00000001/image2"][...] = blob
    dataset = StoryDataset(stories)
    assert dataset[0]["id"] == "of 5"
    with pytest.raises(ValueError, match=r"stories\.h5: story 'of 3', image2 does not decode"):
        dataset[1]


def test_unknown_names_are_refused(stories):
    with pytest.raises(ValueError, match="no split 'dev'; it has 'train'"):
        StoryDataset(stories, "dev")
    for make in (lambda: StoryDataset(stories, task="drawing"), lambda: StoryCollator(None, None, task="drawing"), lambda: split_task(["a"], [1], "drawing")):
        with pytest.raises(ValueError, match="task='drawing'"):
            make()


def test_too_few_frames_for_a_continuation(stories):
    dataset = StoryDataset(stories, task="continuation")
    assert len(dataset[1]["frames"]) == 3
    with pytest.raises(ValueError, match=r"'of 1' has 1 frame.*continuation needs at least 2"):
        dataset[2]
    assert len(StoryDataset(stories)[2]["frames"]) == 1, "one frame can be visualized"


def test_other_files_are_refused(stories, tmp_path):
    with h5py.File(stories, "a") as file:
        file.attrs["schema"] = 3
    with pytest.raises(ValueError, match="schema 3"):
        StoryDataset(stories)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["numbers"] = [1, 2]
    with pytest.raises(ValueError, match=r"other\.h5.*not one with stories"):
        StoryDataset(tmp_path / "other.h5")


def test_index_and_tile_out_of_range(version1):
    dataset = StoryDataset(version1, "train")
    assert dataset[-1]["index"] == 1
    with pytest.raises(IndexError, match="no story 2"):
        dataset[2]
    with pytest.raises(ValueError, match="tile=5.*tiles 0 to 4"):
        dataset.story(0, tile=5)


def test_tiles_follow_the_rule(version1):
    tile_of = lambda colour, k: next(t for t in range(5) if tuple(c // (1 + t) for c in COLOURS[k]) == colour)
    dataset = StoryDataset(version1, "train", seed=3)
    for epoch in (0, 1, 2):
        dataset.set_epoch(epoch)
        for index in (0, 1):
            found = [tile_of(colour, k) for k, colour in enumerate(colours_of(dataset[index]["frames"]))]
            assert found == [choose_tile(5, 3, epoch, index, k) for k in range(5)]
    assert colours_of(StoryDataset(version1, "val")[0]["frames"]) == COLOURS, "tile 0 when evaluating"


def test_choose_tile_never_changes():
    "A resumed run must see what the first one saw: these numbers may not change from one release to the next."
    assert [choose_tile(5, 0, 0, 0, k) for k in range(8)] == [2, 4, 2, 3, 3, 4, 0, 1]


# ---------------------------------------------------------------- batches

@pytest.mark.parametrize("task, V", [("visualization", 5), ("continuation", 4)])
def test_batch(task, V, version1):
    dataset = StoryDataset(version1, "train", task, train=False)
    batch = StoryCollator(WordTokenizer(), WordTokenizer(), 16, 12, 7, task)([dataset[1], dataset[0]])
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    assert shapes == {"frames": ((2, V, 3, 16, 16), torch.float32), "history_frames": ((2, 5, 3, 12, 12), torch.float32),
                      "caption_ids": ((2, V, 7), torch.int64), "caption_mask": ((2, V, 7), torch.bool),
                      "history_ids": ((2, 5, 7), torch.int64), "history_mask": ((2, 5, 7), torch.bool),
                      "frame_valid": ((2, V), torch.bool), "history_valid": ((2, 5), torch.bool), "index": ((2,), torch.int64)}
    assert batch["index"].tolist() == [1, 0] and batch["ids"] == ["train/1", "train/0"] and batch["truth"] == [None, None]
    assert batch["captions"] == [["one", "two", "", "four", "fünf"]] * 2
    middle = torch.tensor(COLOURS[5 - V:]) / 255
    torch.testing.assert_close(batch["frames"][0, :, :, 12, 12], 2 * middle - 1)
    expected = (torch.tensor(COLOURS) / 255 - torch.tensor(CLIP_IMAGE_MEAN)) / torch.tensor(CLIP_IMAGE_STD)
    torch.testing.assert_close(batch["history_frames"][0, :, :, 9, 9], expected)
    assert batch["history_mask"].sum(2)[0].tolist() == [2, 2, 1, 2, 2], "an empty caption keeps its first token only"
    assert torch.equal(batch["caption_ids"], batch["history_ids"][:, 5 - V:])


def test_stories_of_different_lengths(stories):
    dataset = StoryDataset(stories)
    batch = StoryCollator(WordTokenizer(), WordTokenizer(), 8, 8, 6)([dataset[1], dataset[0], dataset[2]])
    assert batch["frame_valid"].tolist() == batch["history_valid"].tolist() == [[True] * n + [False] * (5 - n) for n in (3, 5, 1)]
    assert (batch["frames"][~batch["frame_valid"]] == 0).all() and (batch["frames"][batch["frame_valid"]] != 0).flatten(1).any(1).all()
    assert len(batch["captions"][0]) == 3


def test_caption_too_long_warns_once(stories):
    item = {**StoryDataset(stories)[1], "captions": ["short", "one two three four five six seven", "a b c d e f g h"]}
    collate = StoryCollator(WordTokenizer(), WordTokenizer(), 8, 8, 6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batches = [collate([item]) for _ in range(3)]
    assert len(caught) == 1
    assert "'of 3'" in str(caught[0].message) and "has 8 tokens" in str(caught[0].message) and "max_length=6" in str(caught[0].message)
    assert batches[2]["caption_ids"].shape == (1, 3, 6) and batches[2]["caption_mask"][0, 1].all()


def test_caption_that_just_fits_does_not_warn(stories):
    item = {**StoryDataset(stories)[2], "captions": ["one two three four five"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = StoryCollator(WordTokenizer(), WordTokenizer(), 8, 8, 6)([item])
    assert batch["caption_mask"].all()


def test_spawned_workers(version1):
    "Workers that start from nothing and live on: same batches as without, and they hear of a new epoch."
    dataset = StoryDataset(version1, "train", seed=3)
    dataset[0]  # the file is open here when the dataset goes to the worker
    collate = StoryCollator(WordTokenizer(), WordTokenizer(), 8, 8, 6)
    loader = DataLoader(dataset, batch_size=2, collate_fn=collate, num_workers=1, multiprocessing_context="spawn", persistent_workers=True)
    seen = []
    for epoch in (0, 5):
        dataset.set_epoch(epoch)
        batch = next(iter(loader))
        assert torch.equal(batch["frames"], collate([dataset[0], dataset[1]])["frames"])
        seen.append(batch["frames"])
    assert not torch.equal(*seen)


@given(n=st.integers(1, 9), task=st.sampled_from(["visualization", "continuation"]))
def test_history_block_of_a_frame(n, task):
    captions, frames = [f"c{k}" for k in range(n)], list(range(n))
    given_frames = int(task == "continuation")
    if n == given_frames:
        with pytest.raises(ValueError, match="at least 2"):
            split_task(captions, frames, task)
        return
    layout = split_task(captions, frames, task)
    assert len(layout.history_frames) == len(layout.frames) + given_frames == n
    assert all(layout.history_frames[i + given_frames] == frame for i, frame in enumerate(layout.frames))
    assert [int(caption[1:]) for caption in layout.captions] == layout.frames


# ---------------------------------------------------------------- pictures

def test_show_story():
    with pytest.raises(ValueError, match="at least one frame"):
        show_story([])
    figure = show_story(rows=[("truth", [Image.new("RGB", (8, 8))] * 2), ("drawn", [None])], captions=["a", "b"], given=1)
    assert compact(figure, colours=16).mode == "P"
