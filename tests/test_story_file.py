"""One HDF5 file: interrupted and full disks, damaged trees, stories that cannot be right."""

import json
import re
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from story_samples import ToyStory, assert_nothing_left, assert_story, captions, png, strip

from causal_story import story_file
from causal_story.data import StoryDataset
from causal_story.raw import write_version1
from causal_story.story_file import (
    Fault,
    RawStory,
    StoryFile,
    convert_stories,
    left_out,
    report_path,
    write_hdf5,
)

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


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background run ignores it
sys.path.insert(0, {tests!r})
from story_samples import ToyStory
from causal_story.story_file import convert_stories
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
from story_samples import ToyStory
from causal_story.story_file import convert_stories
for limit in ({limits}):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    stories = {{"train": [ToyStory(k) for k in range(60)]}}
    try: convert_stories(stories, {out!r}, size=128, tiles=5, progress=False)
    except OSError as error: print(limit, error.errno, error)
    else: print(limit, "was written")
print("alive")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are a Unix matter")
def test_full_disk_is_an_error_and_not_a_crash(tmp_path):
    "A limit on a file's size fails where a full disk does; HDF5 alone crashes the process."
    convert_stories({"train": [ToyStory(1)]}, tmp_path / "out.h5", progress=False)
    before = (tmp_path / "out.h5").read_bytes()
    code = FULL.format(
        tests=str(Path(__file__).parent),
        out=str(tmp_path / "out.h5"),
        limits="0, 100, 2048, 5000, 20000, 50000, 60000, 80000, 100001",
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    *lines, last = done.stdout.splitlines()
    assert (done.returncode, last, len(lines)) == (0, "alive", 9), done.stdout + done.stderr
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
    with pytest.raises(ValueError, match=r"made\.h5.*0 to 4, not tile=5"):
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


def test_what_only_looks_like_a_heap_is_no_damage(tmp_path):
    blob = b"GCOL" + bytes([1, 0, 0, 0]) + b"\xff" * 40
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["train/0"] = np.frombuffer(blob * 3, np.uint8)
    story_file.open_stories(tmp_path / "a.h5").close()


@pytest.mark.parametrize("first", [0, story_file.FIRST_BYTES])
def test_a_hole_in_a_heap_is_an_error_and_no_endless_loop(first, version1, monkeypatch):
    "HDF5 follows a size of zero for ever; it is found on opening, or before a story is read."
    monkeypatch.setattr(story_file, "FIRST_BYTES", first)
    data = bytearray(version1.read_bytes())
    place = data.index(b"GCOL")
    while place >= 0:
        data[place + 16 : place + 48] = bytes(32)
        place = data.find(b"GCOL", place + 4)
    version1.write_bytes(data)
    with pytest.raises(ValueError, match=r"version1\.h5.*has a hole"):
        StoryDataset(version1)[0]


def test_version_1_as_our_own_writer_makes_it(version1, tmp_path):
    write_version1({"train": [ToyStory(k) for k in (0, 1, 2)]}, tmp_path / "ours.h5")
    ours, theirs = StoryFile(tmp_path / "ours.h5", "train"), StoryFile(version1, "train")
    assert [ours.stored(k) for k in range(3)] == [theirs.stored(k) for k in range(3)]
    assert ours.schema == theirs.schema == 1 and ours.characters == ()


def test_a_damaged_report_names_itself(tmp_path):
    report_path(tmp_path / "a.h5").write_text("[{")
    with pytest.raises(ValueError, match=r"a\.h5\.left_out\.json"):
        left_out(tmp_path / "a.h5")


@pytest.mark.parametrize("name", ["", "a\x00b", "a\nb", "\ud83d", 7, None])
def test_names_that_no_file_can_hold_are_refused(name, tmp_path):
    story = RawStory(name, ["x"], [Image.new("RGB", (8, 8))])
    if name == "":
        write_hdf5({"train": [0]}, lambda *_: story, tmp_path / "a.h5", progress=False)
        assert StoryDataset(tmp_path / "a.h5").story(0).id == ""
        return
    with pytest.raises(ValueError, match="its id must be text without control signs"):
        write_hdf5({"train": [0]}, lambda *_: story, tmp_path / "a.h5", progress=False)
    assert_nothing_left(tmp_path)


def test_strips_of_version_1_are_rounded_down_with_one_warning(version1):
    with h5py.File(version1, "r+") as file:
        whole = strip(1, 2)[:, :, ::-1]
        file["train/image2"][1] = png(np.concatenate([whole, whole[:20]]))
    dataset = StoryDataset(version1)
    with pytest.warns(UserWarning, match="no whole number of tiles high") as caught:
        for _ in range(3):
            assert_story(dataset.story(1, tile=4), 1, tile=4)
    assert len(caught) == 1


# ---------------------------------------------------------------- errors of every kind


class OwnError(ValueError):
    "An error that takes more than a text, like many of libraries."

    def __init__(self, text, place):
        super().__init__(f"{text} at {place}")


def decode():
    b"caf\xe9".decode("utf-8")


def encode():
    "\ud800".encode("utf-8")


def read_no_json():
    json.loads("{")


def raise_own():
    raise OwnError("nothing", 3)


def open_nothing():
    open("/nowhere/at/all")


def add_to_text():
    return 1 + "one"


@pytest.mark.parametrize("source", ["raw", ""])
@pytest.mark.parametrize(
    "fail, kind",
    [
        (decode, ValueError),
        (encode, ValueError),
        (read_no_json, ValueError),
        (raise_own, ValueError),
        (open_nothing, FileNotFoundError),
        (add_to_text, TypeError),
    ],
)
def test_whatever_a_reader_raises_names_story_and_source(fail, kind, source, tmp_path):
    def read_story(split, key):
        return fail() if key == "bad" else RawStory(key, ["x"], [Image.new("RGB", (8, 8))])

    out = tmp_path / "out.h5"
    keys = dict(train=["good", "bad"])
    with pytest.raises(kind, match="raw.*'bad'" if source else "'bad'"):
        write_hdf5(keys, read_story, out, progress=False, source=source)
    assert not out.exists()
    with pytest.warns(UserWarning, match="1 stories were left out"):
        write_hdf5(keys, read_story, out, progress=False, keep_going=True, source=source)
    [row] = left_out(out)
    assert row["story"] == "bad" and f"{source}: story 'bad'".lstrip(": ") in row["reason"]
    with pytest.raises(kind, match="2 of 2 stories cannot be read"):
        write_hdf5(dict(train=["bad", "bad"]), read_story, out, progress=False, source=source)


def test_faults_that_a_reader_found_itself_are_told_whatever_their_kind(tmp_path):
    "A fault that was found while looking for the keys is any error that a story can cause."
    faults = []
    for fail in (decode, raise_own):
        try:
            fail()
        except ValueError as error:
            faults.append(Fault("train", "bad", error))
    for some in (faults[:1], faults):
        with pytest.raises(ValueError, match="codec can't decode"):
            write_hdf5({}, None, tmp_path / "out.h5", progress=False, faults=some)
