"""Other people's layouts: read as they are meant, hostile and damaged files, every variant."""

import io
import json
import os
import pickle
import re
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from story_samples import (
    ORANGE,
    ToyStory,
    assert_nothing_left,
    assert_story,
    captions,
    picture,
    png,
    pororo_folder,
    strip,
)

from causal_story.data import StoryDataset
from causal_story.raw import (
    PlainUnpickler,
    RefusedPickle,
    convert_flintstones,
    convert_folder,
    convert_pororo,
    load_npy,
    load_pickle,
    write_flintstones_raw,
    write_folder,
    write_pororo_raw,
)
from causal_story.story_file import RawStory, convert_stories


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
        marks = {"schema": 2, "colour": "rgb", "kind": "pororo", "characters": "[]"}
        assert dict(file.attrs) == marks and list(file) == ["test", "train", "val"]
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
    "no dtype": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
    b"K\x00\x85U\x01b\x87R(K\x01K\x01\x85N\x89U\x01xtb.",
    "scalar of objects": b"\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n"
    b"U\x02O8K\x00K\x01\x87RU\x08xxxxxxxx\x86R.",
    "buffer of objects": b"\x80\x02cnumpy.core.numeric\n_frombuffer\n(U\x08xxxxxxxx"
    b"cnumpy\ndtype\nU\x02O8K\x00K\x01\x87RK\x01\x85U\x01CtR.",
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
    "BUILD with a state of attributes must not reach what later files are read with."
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
        FileNotFoundError, match=rf"lacks {file}.*: a (Flintstones|Pororo)SV folder holds .*, "
    ):
        convert(raw, tmp_path / "out.h5")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert(tmp_path / "nowhere", tmp_path / "out.h5")
    assert not (tmp_path / "out.h5").exists()


def test_flintstones_with_a_broken_clip(flintstones, tmp_path):
    clip = flintstones / "video_frames_sampled" / "s_01_e_01_shot_000002.npy"

    def convert():
        convert_flintstones(flintstones, tmp_path / "out.h5", progress=False)

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

    def convert():
        convert_pororo(pororo, tmp_path / "out.h5", progress=False)

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
    Image.fromarray(np.zeros((100, 128, 3), np.uint8)).save(pororo / "Pororo_ENGLISH1_1/ep1/3.png")
    with pytest.raises(ValueError, match="ep1/1.*image2.*128x100"):
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
