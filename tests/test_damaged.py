"""A few hundred damaged files, the same ones in every run: each is read, or refused by its name.

Bytes are cut, flipped, zeroed, doubled and exchanged; JSON and pickles are also changed inside, so
that they still parse. Whatever comes of it is a story, or a ValueError or FileNotFoundError that
names the file: nothing else, and no half-written file.
"""

import json
import os
import pickle
import random
import shutil
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from story_samples import ToyStory

from causal_story.data import StoryDataset
from causal_story.raw import (
    LAYOUTS,
    convert,
    load_npy,
    load_pickle,
    write_flintstones_raw,
    write_folder,
    write_pororo_raw,
    write_version1,
)
from causal_story.storage import load_part, read_json, shipped_weights
from causal_story.story_file import convert_stories, open_image

CASES = int(os.environ.get("DAMAGED_CASES", 12))  # of each file; 45 make 3,105 in all
STORIES = {"train": [ToyStory(0), ToyStory(1)], "val": [ToyStory(2)], "test": [ToyStory(3)]}

# ---------------------------------------------------------------- whole folders of every layout


def write_storystream(out: Path):
    out.mkdir()
    lines = []
    for story in STORIES["train"]:
        names = [f"{story.number}_{k}.jpg" for k in range(5)]
        for name, frame in zip(names, story.frames(size=16)):
            frame.save(out / name)
        order = list(range(5))
        lines.append(dict(id=0, images=names, captions=story.captions, orders=order))
    (out / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))


def write_imagefolder(out: Path):
    out.mkdir()
    lines = []
    for story in STORIES["train"]:
        for k, frame in enumerate(story.frames(size=16)):
            name = f"{story.number}_{k}.png"
            frame.save(out / name)
            place = dict(story=f"s{story.number}", position=k)
            lines.append(dict(file_name=name, text=story.captions[k], **place))
    (out / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


def write_storygptv(out: Path):
    write_flintstones_raw(STORIES, out, size=16, tiles=1)
    (out / "video_frames_sampled").rename(out / "video_frames_sampled_4x")
    (out / "train-val-test_split.json").rename(out / "split.json")
    followings = pickle.loads((out / "following_cache4.pkl").read_bytes())
    (out / "following_cache4.pkl").unlink()
    three = {name: ids[:3] for name, ids in followings.items()}
    (out / "following_cache3.pkl").write_bytes(pickle.dumps(three))
    notes = json.loads((out / "flintstones_annotations_v1-0.json").read_text())
    for note in notes:
        note["characters"] = [dict(entityLabel="Fred ")]
    (out / "flintstones_annotations_v1-0.json").write_text(json.dumps(notes))
    cleaned = {note["globalID"]: dict(caption=note["description"]) for note in notes}
    (out / "cleaned_annotations.json").write_text(json.dumps(cleaned))


def write_labelled_pororo(out: Path):
    write_pororo_raw(STORIES, out, size=16, tiles=1)
    pictures = load_npy(out / "descriptions.npy").item()
    labels = {name: np.array([1, 0, 0, 0, 0, 0, 0, 0, 1]) for name in pictures}
    np.save(out / "labels.npy", np.array(labels, dtype=object))


def write_vist(out: Path):
    write_version1(STORIES, out, size=16, tiles=1)
    with h5py.File(out, "r+") as file:
        for group in file.values():
            group.move("text", "sis")
            group["dii"] = group["sis"][()]


WRITERS = dict(
    flintstones=lambda out: write_flintstones_raw(STORIES, out, size=16, tiles=1),
    pororo=write_labelled_pororo,
    folder=lambda out: write_folder(STORIES, out, size=16),
    imagefolder=write_imagefolder,
    storygptv=write_storygptv,
    storystream=write_storystream,
    vist=write_vist,
)
TARGETS = dict(  # the files that are damaged
    flintstones=(
        "train-val-test_split.json",
        "following_cache4.pkl",
        "flintstones_annotations_v1-0.json",
        "truth.jsonl",
        "video_frames_sampled/train_00001_shot_2.npy",
    ),
    pororo=(
        "descriptions.npy",
        "img_cache4.npy",
        "following_cache4.npy",
        "train_seen_unseen_ids.npy",
        "labels.npy",
        "train_00001/3.png",
    ),
    folder=("stories.jsonl", "img/train_00001_2.png"),
    imagefolder=("metadata.jsonl", "1_2.png"),
    storygptv=("split.json", "following_cache3.pkl", "cleaned_annotations.json"),
    storystream=("train.jsonl", "1_2.jpg"),
    vist=("",),
)

# ---------------------------------------------------------------- damage


def cut(data, rng):
    return data[: rng.randrange(len(data))]


def flip(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice((1, 3, 20))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def zero(data, rng):
    start = rng.randrange(len(data))
    length = rng.randrange(1, 1 + len(data) // 2)
    return data[:start] + bytes(min(length, len(data) - start)) + data[start + length :]


def insert(data, rng):
    place = rng.randrange(len(data))
    return data[:place] + rng.randbytes(rng.randrange(1, 60)) + data[place:]


def double(data, rng):
    start, end = sorted(rng.sample(range(len(data) + 1), 2))
    return data[:end] + data[start:]


def noise(data, rng):
    return rng.randbytes(rng.choice((0, 1, 100, 5000)))


def other_kind(data, rng):
    return rng.choice((b"null", b"[]", b"{}", b"7", b'"a"', b"\xff\xfe[", b"\x80\x04N.", b"<html>"))


ODD = (None, True, -1, 0, 10**30, 1.5, "", "x" * 5000, "\x00", "\ud800", [], {}, [[]], {"a": 1})


def change_inside(value, rng, depth=0):
    "The same nest of lists and dicts with one thing in it exchanged, left out or doubled."
    if not isinstance(value, (list, tuple, dict)) or not value or rng.random() < 0.15 * depth:
        return rng.choice(ODD)
    if isinstance(value, dict):
        key = rng.choice(list(value))
        if rng.random() < 0.2:
            return {name: one for name, one in value.items() if name != key}
        return value | {key: change_inside(value[key], rng, depth + 1)}
    place = rng.randrange(len(value))
    if rng.random() < 0.2:
        return [*value[:place], *value[place + 1 :]]
    return [*value[:place], change_inside(value[place], rng, depth + 1), *value[place + 1 :]]


def change_meaning(path: Path, rng):
    "The damaged content of a file that still parses, or None where there is nothing to parse."
    if path.suffix == ".json":
        return json.dumps(change_inside(json.loads(path.read_bytes()), rng)).encode()
    if path.suffix == ".jsonl":
        lines = path.read_text(encoding="utf-8").strip().split("\n")
        number = rng.randrange(len(lines))
        lines[number] = json.dumps(change_inside(json.loads(lines[number]), rng))
        return "\n".join(lines).encode()
    if path.suffix == ".pkl":
        return pickle.dumps(change_inside(load_pickle(path), rng))
    return None


DAMAGES = (cut, flip, zero, insert, double, noise, other_kind)


def damage(path: Path, rng):
    "Damages a file in one of these ways."
    content = change_meaning(path, rng) if rng.random() < 0.4 else None
    if content is None:
        content = rng.choice(DAMAGES)(path.read_bytes(), rng)
    path.write_bytes(content)


# ---------------------------------------------------------------- the campaign


def outcome(read, named: str) -> str:
    "What came of reading: 'read', 'refused', or what was wrong with the refusal."
    try:
        read()
    except (ValueError, FileNotFoundError) as error:
        return "refused" if named in str(error) else f"does not name the file: {error!r}"
    except BaseException as error:
        return f"wrong kind of error: {error!r}"
    return "read"


def read_everything(path, splits=None):
    "All stories of a file, decoded; None: of every split that it has."
    if splits is None:
        with h5py.File(path) as file:
            splits = list(file)
    for split in splits:
        dataset = StoryDataset(path, split)
        for index in range(len(dataset)):
            dataset.story(index)
        dataset.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    "One whole folder of each layout."
    folders = {}
    for kind, write in WRITERS.items():
        folders[kind] = tmp_path_factory.mktemp("whole") / kind
        write(folders[kind])
    return folders


def test_the_campaign_knows_every_layout():
    "A layout that is read is damaged here too; ContextualStory's is read by PororoSV's reader."
    readable = {kind for kind, layout in LAYOUTS.items() if layout.read}
    assert readable - set(WRITERS) == {"contextualstory"} and set(TARGETS) == set(WRITERS)


@pytest.mark.parametrize("kind", WRITERS)
def test_whole_folders_are_read(kind, whole, tmp_path):
    "Else the tests below would show nothing."
    convert(whole[kind], tmp_path / "out.h5", progress=False)
    read_everything(tmp_path / "out.h5", ["train"])


@pytest.mark.parametrize(
    "kind, name", [(kind, name) for kind, names in TARGETS.items() for name in names]
)
def test_damaged_raw_data(kind, name, whole, tmp_path):
    raw, out, wrong, outcomes = tmp_path / "raw", tmp_path / "out.h5", [], []
    copy = shutil.copytree if whole[kind].is_dir() else shutil.copy
    copy(whole[kind], raw)
    path = raw / name if name else raw
    good = path.read_bytes()

    def read(keep_going):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            convert(raw, out, kind, progress=False, keep_going=keep_going)
            read_everything(out)

    for case in range(CASES):
        keep_going = case % 3 == 2
        path.write_bytes(good)
        damage(path, random.Random(f"{kind}/{name}/{case}"))
        result = outcome(lambda: read(keep_going), str(raw))
        outcomes.append(result)
        left = {one.name for one in tmp_path.iterdir()} - {"raw", "out.h5", "out.h5.left_out.json"}
        if result not in ("read", "refused") or left:
            wrong.append((case, keep_going, result, left))
        for made in tmp_path.glob("out.h5*"):
            made.unlink()
    assert not wrong, "\n".join(map(str, wrong))
    assert "refused" in outcomes, "no case did any damage"


@pytest.mark.parametrize("version", [1, 2])
def test_damaged_story_files(version, tmp_path):
    path, copy = tmp_path / "whole.h5", tmp_path / "damaged.h5"
    if version == 1:
        write_version1(STORIES, path, size=16, tiles=2)
    else:
        convert_stories(STORIES, path, size=16, tiles=2, progress=False)
    wrong, outcomes = [], set()
    for case in range(10 * CASES):
        shutil.copy(path, copy)
        damage(copy, random.Random(f"{version}/{case}"))
        result = outcome(lambda: read_everything(copy, ["train", "test"]), str(copy))
        outcomes.add(result)
        if result not in ("read", "refused"):
            wrong.append((case, result))
    assert not wrong, "\n".join(map(str, wrong))
    assert outcomes == {"read", "refused"}


def a_picture(path):
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(path)


READERS = dict(
    json=(lambda path: path.write_text('{"a": [1, {"b": "c"}]}'), lambda path: read_json(path)),
    pkl=(lambda path: path.write_bytes(pickle.dumps({"a": ["b", 1.5]})), load_pickle),
    npy=(lambda path: np.save(path, np.array({"a": [1]}, dtype=object)), load_npy),
    png=(a_picture, lambda path: open_image(path, str(path))),
    jpg=(a_picture, lambda path: open_image(path.read_bytes(), str(path))),
    gif=(a_picture, lambda path: open_image(path, str(path))),
    tiff=(a_picture, lambda path: open_image(path, str(path))),
    webp=(a_picture, lambda path: open_image(path, str(path))),
)


@pytest.mark.parametrize("kind", READERS)
def test_damaged_single_files(kind, tmp_path):
    write, read = READERS[kind]
    wrong = []
    for case in range(3 * CASES):
        path = tmp_path / f"{case}.{kind}"
        write(path)
        damage(path, random.Random(f"{kind}/{case}"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = outcome(lambda: read(path), str(path))
        if result not in ("read", "refused"):
            wrong.append((case, result))
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("part", ["tokenizer", "history_tokenizer", "scheduler", "text_encoder"])
def test_damaged_parts_of_a_model(part, tmp_path):
    from diffusers import DDPMScheduler
    from transformers import BertTokenizer, CLIPTextModel, CLIPTokenizer

    kinds = dict(
        tokenizer=CLIPTokenizer,
        history_tokenizer=BertTokenizer,
        scheduler=DDPMScheduler,
        text_encoder=CLIPTextModel,
    )
    source, wrong = shipped_weights("base") / part, []
    files = sorted(path.name for path in source.iterdir())
    for case in range(CASES):
        rng, folder = random.Random(f"{part}/{case}"), tmp_path / str(case)
        shutil.copytree(source, folder)
        damage(folder / rng.choice(files), rng)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = outcome(lambda: load_part(kinds[part], folder), str(folder))
        if result not in ("read", "refused"):
            wrong.append((case, result))
        shutil.rmtree(folder)
    assert not wrong, "\n".join(map(str, wrong))
