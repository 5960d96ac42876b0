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
    caption,
    captions,
    picture,
    png,
    pororo_folder,
    strip,
)

from causal_story.data import StoryDataset
from causal_story.raw import (
    LAYOUTS,
    Layout,
    PlainUnpickler,
    RawData,
    RefusedPickle,
    _split_of,
    convert,
    convert_flintstones,
    convert_folder,
    convert_pororo,
    load_npy,
    load_pickle,
    readable_kinds,
    write_flintstones_raw,
    write_folder,
    write_pororo_raw,
)
from causal_story.story_file import RawStory, convert_stories, count_stories, left_out, open_image


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


# ---------------------------------------------------------------- damaged clips: stop, or go on


def damage_clips(raw: Path, *numbers: int) -> list[str]:
    "Cuts one clip of each story short; the names of these stories."
    for number in numbers:
        clip = raw / "video_frames_sampled" / f"s_0{number}_e_01_shot_000002.npy"
        clip.write_bytes(clip.read_bytes()[:500])
    return [f"s_0{number}_e_01_shot_000000" for number in numbers]


def test_all_faults_are_named_in_one_pass(flintstones, tmp_path):
    damage_clips(flintstones, 9, 1)
    with pytest.raises(ValueError) as caught:
        convert_flintstones(flintstones, tmp_path / "out.h5", progress=False)
    message = str(caught.value)
    assert message.startswith("2 of 4 stories cannot be read (keep_going=True (--keep-going)")
    assert "s_09_e_01_shot_000002.npy" in message and "s_01_e_01_shot_000002.npy" in message
    assert_nothing_left(tmp_path, "flintstones")


def test_going_on_leaves_out_bad_stories_and_reports_them(flintstones, tmp_path):
    bad = damage_clips(flintstones, 9, 1)
    with pytest.warns(UserWarning, match=r"2 stories were left out of .*out\.h5.*left_out\.json"):
        out = convert(flintstones, tmp_path / "out.h5", progress=False, keep_going=True)
    report = left_out(out)
    assert [(row["split"], row["story"]) for row in report] == [("train", bad[0]), ("val", bad[1])]
    assert all("shot_000002.npy" in row["reason"] for row in report)
    train = StoryDataset(out, "train")
    assert len(train) == 1 and len(StoryDataset(out, "val")) == 0
    assert_story(train.story(0, tile=0), 0)
    assert_story(StoryDataset(out, "test").story(0), 2)
    for number in (9, 1):
        clips = flintstones / "video_frames_sampled"
        np.save(
            clips / f"s_0{number}_e_01_shot_000002.npy",
            np.stack([picture(number, 2, tile) for tile in range(5)]),
        )
    convert(flintstones, out, progress=False, keep_going=True)
    assert left_out(out) == [] and len(StoryDataset(out, "train")) == 2
    assert_nothing_left(tmp_path, "flintstones", "out.h5")


def test_going_on_with_nothing_left_is_an_error(flintstones, tmp_path):
    damage_clips(flintstones, 9, 0, 1, 2)
    with pytest.raises(ValueError, match="4 of 4 stories cannot be read"):
        convert(flintstones, tmp_path / "out.h5", progress=False, keep_going=True)
    assert_nothing_left(tmp_path, "flintstones")


def test_twenty_faults_are_named_and_the_others_counted(tmp_path):
    lines = [{"frames": [f"{k}.png"], "captions": ["x"]} for k in range(33)]
    raw = own_folder(tmp_path / "raw", *lines)
    with pytest.raises(FileNotFoundError) as caught:
        convert(raw, tmp_path / "out.h5", progress=False)
    message = str(caught.value)
    assert message.startswith("33 of 33") and message.endswith("- and 13 more")
    assert message.count("there is no picture") == 20


def test_missing_pictures_of_pororo_are_left_out(pororo, tmp_path):
    (pororo / "Pororo_ENGLISH1_1/ep3/4.png").unlink()
    with pytest.warns(UserWarning, match="1 stories were left out"):
        out = convert_pororo(pororo, tmp_path / "out.h5", progress=False, keep_going=True)
    assert [row["reason"].split(" (")[0] for row in left_out(out)] == [
        f"{pororo / 'Pororo_ENGLISH1_1/ep3/4.png'}"
    ]
    train = StoryDataset(out, "train")
    assert [train.story(k).id for k in range(2)] == [f"Pororo_ENGLISH1_1/ep{k}/1" for k in (0, 5)]


def test_a_caption_that_is_no_utf8_is_named_and_can_be_left_out(pororo, tmp_path):
    path = pororo / "descriptions.npy"
    descriptions = np.load(path, allow_pickle=True).item()
    name = "Pororo_ENGLISH1_1/ep3/2"
    descriptions[name] = [b"caf\xe9"]
    np.save(path, np.array(descriptions, dtype=object))
    where = re.escape(f"{path}, {name} is not a caption in UTF-8") + ".*'utf-8' codec can't decode"
    with pytest.raises(ValueError, match=where):
        convert_pororo(pororo, tmp_path / "out.h5", progress=False)
    with pytest.warns(UserWarning, match="1 stories were left out"):
        out = convert_pororo(pororo, tmp_path / "out.h5", progress=False, keep_going=True)
    [row] = left_out(out)
    assert row["story"] == "3" and re.search(where, row["reason"])
    assert len(StoryDataset(out, "train")) == 2


def test_a_hostile_clip_is_refused_also_when_going_on(flintstones, tmp_path):
    mark = tmp_path / "mark"
    clip = flintstones / "video_frames_sampled" / "s_01_e_01_shot_000002.npy"
    np.save(clip, np.array([Call(os.system, f"echo owned > {mark}")], dtype=object))
    with pytest.raises(RefusedPickle, match="system"):
        convert(flintstones, tmp_path / "out.h5", progress=False)
    with pytest.warns(UserWarning, match="left out"):
        out = convert(flintstones, tmp_path / "out.h5", progress=False, keep_going=True)
    assert "refused" in left_out(out)[0]["reason"] and not mark.exists()


# ---------------------------------------------------------------- variants of the layouts


def test_the_folder_of_larger_clips_is_read(flintstones, tmp_path):
    clips = flintstones / "video_frames_sampled"
    for path in clips.iterdir():
        np.save(path, np.load(path).repeat(2, axis=1).repeat(2, axis=2))
    clips.rename(flintstones / "video_frames_sampled_4x")
    out = convert(flintstones, tmp_path / "out.h5", progress=False)
    [frame, *_] = StoryDataset(out, "val").story(0, tile=4).frames
    np.testing.assert_array_equal(np.asarray(frame)[::2, ::2], picture(1, 0, 4))


@pytest.mark.parametrize(
    "change",
    [
        lambda clip: clip.astype(np.float64) / 255,
        lambda clip: clip.astype(np.float32),
        lambda clip: clip.astype(np.int64),
        lambda clip: clip.astype(np.uint16) * 257,
        lambda clip: clip.transpose(0, 3, 1, 2),
    ],
    ids=["0 to 1", "0 to 255", "int64", "uint16", "colours first"],
)
def test_clips_of_other_numbers_are_read(change, flintstones, tmp_path):
    for path in (flintstones / "video_frames_sampled").iterdir():
        np.save(path, change(np.load(path)))
    out = convert(flintstones, tmp_path / "out.h5", progress=False)
    assert_story(StoryDataset(out, "test").story(0, tile=3), 2, tile=3)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda clip: clip / 127.5 - 1, "scale is not clear"),
        (lambda clip: clip * 4.0, "scale is not clear"),
        (lambda clip: (clip > 100).astype(np.float32), "scale is not clear"),
        (lambda clip: np.full(clip.shape, np.nan), "scale is not clear"),
        (lambda clip: clip > 100, "scale is not clear"),
        (lambda clip: clip[..., :1], "is expected"),
        (lambda clip: clip[:0], "is expected"),
        (lambda clip: clip[:, :100], "is expected"),
        (lambda clip: clip.ravel(), "is expected"),
    ],
)
def test_clips_that_could_mean_anything_are_refused(change, message, flintstones, tmp_path):
    path = flintstones / "video_frames_sampled" / "s_02_e_01_shot_000001.npy"
    np.save(path, change(np.load(path)))
    with pytest.raises(ValueError, match=rf"{path.name}.*{message}"):
        convert(flintstones, tmp_path / "out.h5", progress=False)


def test_strips_are_rounded_down_and_it_is_said_once(pororo, tmp_path):
    for path in pororo.glob("*/*/*.png"):
        whole = np.asarray(Image.open(path))
        Image.fromarray(np.concatenate([whole, whole[:50]])).save(path)
    with pytest.warns(
        UserWarning, match=r"128x690 pixels is no whole.*and in 5 more stories"
    ) as caught:
        out = convert(pororo, tmp_path / "out.h5", progress=False)
    assert len(caught) == 1
    dataset = StoryDataset(out, "test")
    assert dataset.tile_counts(0) == [5] * 5
    assert_story(dataset.story(0, tile=4), 1, tile=4)


# ---------------------------------------------------------------- labels


def test_labels_of_pororo_go_into_the_file(pororo, tmp_path):
    names = load_npy(pororo / "descriptions.npy").item()
    labels = {name: np.array([1, 0, 0, 0, 0, 0, 0, 0, 1.0]) for name in names}
    labels["Pororo_ENGLISH1_1/ep4/2"] = [0] * 9
    del labels["Pororo_ENGLISH1_1/ep0/5"]
    np.save(pororo / "labels.npy", np.array(labels, dtype=object))
    out = convert(pororo, tmp_path / "out.h5", progress=False)
    record = StoryDataset(out, "val").story(0)
    both = ["harry", "pororo"]
    assert record.labels == [both, [], both, both, both]
    train = StoryDataset(out, "train")
    assert train.story(0).labels is None and train.story(1).labels == [both] * 5
    assert train.characters[:2] == ("pororo", "loopy") and len(train.characters) == 9


def test_labels_in_another_order_are_left_out_with_a_warning(pororo, tmp_path):
    names = load_npy(pororo / "descriptions.npy").item()
    descriptions = {name: ["Loopy waves."] for name in names}
    np.save(pororo / "descriptions.npy", np.array(descriptions, dtype=object))
    labels = {name: [1, 0, 0, 0, 0, 0, 0, 0, 0] for name in names}
    np.save(pororo / "labels.npy", np.array(labels, dtype=object))
    with pytest.warns(UserWarning, match=r"labels\.npy marks loopy in 0 of 30 pictures") as caught:
        out = convert(pororo, tmp_path / "out.h5", progress=False)
    assert len(caught) == 1
    assert StoryDataset(out, "val").story(0).labels is None


@pytest.mark.parametrize("entry", [[1, 0], [2] * 9, "text", None, [[0] * 9]])
def test_labels_that_are_no_labels_are_an_error(entry, pororo, tmp_path):
    np.save(pororo / "labels.npy", np.array({"a/1": entry}, dtype=object))
    with pytest.raises(ValueError, match=r"labels\.npy"):
        convert(pororo, tmp_path / "out.h5", progress=False)


def test_annotated_characters_of_flintstones_go_into_the_file(flintstones, tmp_path):
    path = flintstones / "flintstones_annotations_v1-0.json"
    notes = json.loads(path.read_text())
    for note in notes:
        note["characters"] = [{"entityLabel": " Fred"}, {"entityLabel": "mr slate "}]
        note["characters"] += [{"entityLabel": "some guest"}]
        if note["globalID"].startswith("s_02"):
            del note["characters"]
    path.write_text(json.dumps(notes))
    out = convert(flintstones, tmp_path / "out.h5", progress=False)
    assert StoryDataset(out, "val").story(0).labels == [["fred", "mr slate"]] * 5
    test = StoryDataset(out, "test")
    assert test.story(0).labels is None and len(test.characters) == 7


def test_own_labels_go_into_the_file(tmp_path):
    raw = own_folder(tmp_path / "raw", GOOD | {"labels": [["Ida"], [], ["Ida", "Bo"]]})
    dataset = StoryDataset(convert(raw, tmp_path / "out.h5", progress=False))
    assert dataset.story(0).labels == [["Ida"], [], ["Bo", "Ida"]]
    assert dataset.characters == ("Bo", "Ida") and dataset[0]["labels"] == dataset.story(0).labels
    for wrong in (["Ida"], [["Ida"]], [[1], [], []], {}):
        own_folder(raw, GOOD | {"labels": wrong})
        with pytest.raises(ValueError, match="labels"):
            convert(raw, tmp_path / "out.h5", progress=False)


# ---------------------------------------------------------------- text


def test_separators_inside_a_string_do_not_end_a_line(tmp_path):
    raw = own_folder(tmp_path / "raw")
    text = "one\u2028two\u2029three\u0085four\x0bfive"
    lines = [
        json.dumps({"frames": ["a.png"], "captions": [text], "id": "x"}, ensure_ascii=False),
        json.dumps({"frames": ["b.jpg"], "captions": ["y"], "id": "y"}),
    ]
    (raw / "stories.jsonl").write_bytes("\r\n".join(lines).encode())
    dataset = StoryDataset(convert(raw, tmp_path / "out.h5", progress=False))
    assert [dataset.story(k).captions for k in range(2)] == [["one two three four five"], ["y"]]


@pytest.mark.parametrize("layout", ["stories.jsonl", "metadata.jsonl", "train.jsonl"])
def test_lines_that_are_not_utf8_name_the_file(layout, tmp_path):
    raw = own_folder(tmp_path / "raw")
    (raw / "stories.jsonl").unlink()
    (raw / layout).write_bytes(b'{"captions": ["caf\xe9"]}')
    with pytest.raises(ValueError, match=rf"{layout} is not a text file in UTF-8"):
        convert(raw, tmp_path / "out.h5", progress=False)


def test_deep_grey_pictures_are_scaled(tmp_path):
    raw = own_folder(tmp_path / "raw", GOOD)
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(64, axis=0)
    Image.fromarray(ramp).save(raw / "c.png")
    frame = StoryDataset(convert(raw, tmp_path / "out.h5", progress=False)).story(0).frames[2]
    expected = np.rint(ramp / 257).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(frame)[:, :, 1], expected)


def test_an_animated_picture_is_said_once(tmp_path):
    raw = own_folder(tmp_path / "raw", GOOD | {"frames": ["a.gif", "b.gif", "c.png"]})
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "green")]
    for name in ("a.gif", "b.gif"):
        frames[0].save(raw / name, save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="gif is animated: its first picture is used") as caught:
        out = convert(raw, tmp_path / "out.h5", progress=False)
    assert len(caught) == 1
    assert StoryDataset(out).story(0).frames[0].getpixel((9, 9)) == (255, 0, 0)


def test_half_letters_become_a_sign_for_unknown(tmp_path):
    line = json.dumps(GOOD | {"captions": ["a \ud83d b", "\ud83e\udd8a", "c"]})
    raw = own_folder(tmp_path / "raw", line)
    dataset = StoryDataset(convert(raw, tmp_path / "out.h5", progress=False))
    assert dataset.story(0).captions == ["a \ufffd b", "\U0001f98a", "c"]
    own_folder(raw, json.dumps(GOOD | {"id": "x\ud83d"}))
    with pytest.raises(ValueError, match=r"line_?\s?1|x\\ud83d"):
        convert(raw, tmp_path / "out.h5", progress=False)


# ---------------------------------------------------------------- layouts that people have


def save_frames(raw: Path, number: int, size=(128, 128)) -> list[str]:
    "A story's five pictures, the tile in the middle of a picture of this size."
    names = [f"{number}/frame_{k}.png" for k in range(5)]
    (raw / str(number)).mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names):
        canvas = Image.new("RGB", size, "white")
        canvas.paste(
            Image.fromarray(picture(number, k, 0)), ((size[0] - 128) // 2, (size[1] - 128) // 2)
        )
        canvas.save(raw / name)
    return names


@pytest.mark.parametrize("folder", ["", "images"])
def test_storystream(folder, tmp_path):
    raw = tmp_path / "raw"
    lines = []
    for number in (0, 1):
        names = save_frames(raw / folder, number, size=(220, 128))
        lines.append({"id": 7, "images": names, "captions": captions(number)})
    places = [3, 0, 4, 1, 2]
    lines[0]["orders"] = list(range(5))
    lines[1]["orders"] = places
    lines[1]["images"] = [lines[1]["images"][place] for place in places]
    lines[1]["captions"] = [lines[1]["captions"][place] for place in places]
    (raw / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (raw / "val.jsonl").write_text(json.dumps(lines[0]))
    out = convert(raw, tmp_path / "out.h5", progress=False)
    train = StoryDataset(out, "train")
    for number in (0, 1):
        assert_story(train.story(number), number)
    assert [train.story(k).id for k in range(2)] == ["train_1", "train_2"]
    assert len(StoryDataset(out, "val")) == 1
    for orders in ([0, 1, 2, 3], [0, 0, 1, 2, 3], "01234", [1, 2, 3, 4, 5], [True, 0, 2, 3, 4]):
        (raw / "val.jsonl").write_text(json.dumps(lines[0] | {"orders": orders}))
        with pytest.raises(ValueError, match=r'val\.jsonl, line 1: "orders"'):
            convert(raw, tmp_path / "out.h5", progress=False)


SPOKEN = {
    "train": "train training train2017 story stories latest contest festival medieval"
    " arrival greatest attest devil protéval 2017 developed",
    "val": "val VAL val-2 val_set valset valid validation stories.val my-validation-data dev"
    " train_val2 storyVal eval",
    "test": "test TEST test_set testset tests test2017 storystream-test.v2 StoryTest testA"
    " a_test_b testing",
}


@pytest.mark.parametrize("split, name", [(s, n) for s in SPOKEN for n in SPOKEN[s].split()])
def test_a_split_is_a_whole_word_of_a_name(split, name):
    assert _split_of(name) == split


def test_words_that_only_hold_the_name_of_a_split_stay_in_train(tmp_path):
    "latest.jsonl and contest/ were test, festival/ was val: whole data sets went astray."
    raw = tmp_path / "stream"
    names = save_frames(raw, 0)
    write_lines(raw / "latest.jsonl", [dict(images=names, captions=captions(0))])
    out = convert(raw, tmp_path / "stream.h5", "storystream", progress=False)
    assert count_stories(out) == dict(train=1)
    raw = tmp_path / "folders"
    for number, folder in enumerate(("contest", "festival", "test")):
        write_lines(raw / folder / "metadata.jsonl", imagefolder_lines(raw / folder, number))
    out = convert(raw, tmp_path / "folders.h5", progress=False)
    assert count_stories(out) == dict(train=2, test=1)


def storygptv_folder(flintstones: Path) -> Path:
    "The Flintstones folder as StoryGPT-V has it: stories of four, other files, cleaned captions."
    followings = load_pickle(flintstones / "following_cache4.pkl")
    three = {name: ids[:3] for name, ids in followings.items() if name != "short"}
    (flintstones / "following_cache3.pkl").write_bytes(pickle.dumps(three))
    (flintstones / "following_cache4.pkl").unlink()
    (flintstones / "train-val-test_split.json").rename(flintstones / "split.json")
    (flintstones / "video_frames_sampled").rename(flintstones / "video_frames_sampled_4x")
    path = flintstones / "flintstones_annotations_v1-0.json"
    notes = json.loads(path.read_text())
    cleaned = {n["globalID"]: {"caption": "clean: " + n["description"]} for n in notes}
    (flintstones / "cleaned_annotations.json").write_text(json.dumps(cleaned))
    return flintstones


def test_storygptv(flintstones, tmp_path):
    raw = storygptv_folder(flintstones)
    out = convert(raw, tmp_path / "out.h5", progress=False)
    record = StoryDataset(out, "val").story(0, tile=2)
    assert record.captions == ["clean: " + caption(1, frame) for frame in range(4)]
    assert [np.array_equal(frame, picture(1, k, 2)) for k, frame in enumerate(record.frames)] == [
        True
    ] * 4
    assert record.labels == [[]] * 4
    (raw / "flintstones_annotations_v1-0.json").unlink()
    cleaned = json.loads((raw / "cleaned_annotations.json").read_text())
    several = {name: {"captions": ["first", "second"]} for name in cleaned}
    (raw / "cleaned_annotations.json").write_text(json.dumps(several))
    convert(raw, out, progress=False)  # as its folder of PororoSV has them
    record = StoryDataset(out, "val").story(0)
    assert record.captions == ["first"] * 4 and record.labels is None


def test_contextualstory(pororo, tmp_path):
    descriptions = load_npy(pororo / "descriptions.npy").item()
    better = {name: ["blip: " + texts[0]] for name, texts in descriptions.items()}
    np.save(pororo / "descriptions_blip2.npy", np.array(better, dtype=object))
    assert convert(pororo, tmp_path / "out.h5", progress=False)
    assert StoryDataset(tmp_path / "out.h5", "val").story(0).captions == captions(4)
    out = convert(pororo, tmp_path / "out.h5", "contextualstory", progress=False)
    val = StoryDataset(out, "val")
    assert val.story(0).captions == ["blip: " + text for text in captions(4)]
    assert val.kind == "pororo" and val.tile_counts(0) == [5] * 5
    chosen = pororo / "pororo_png_filtered_blip2"
    for path in [*pororo.glob("Pororo_ENGLISH1_1/*/*.png")]:
        target = chosen / path.relative_to(pororo)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).crop((0, 128, 128, 256)).save(target)
    (pororo / "descriptions.npy").unlink()
    convert(pororo, out, progress=False)  # now it is recognised
    val = StoryDataset(out, "val")
    assert val.tile_counts(0) == [1] * 5
    np.testing.assert_array_equal(np.asarray(val.story(0).frames[3]), picture(4, 3, 1))


@pytest.fixture
def vist(version1) -> Path:
    "AR-LDM's file of VIST: photographs of any shape, two captions."
    with h5py.File(version1, "r+") as file:
        for group in file.values():
            texts = group["text"].asstr()[()]
            group.move("text", "sis")
            group["dii"] = ["|".join(f"seen: {one}" for one in text.split("|")) for text in texts]
    return version1


def test_vist_is_converted_and_recognised(vist, tmp_path):
    with pytest.raises(ValueError, match="AR-LDM's file of VIST.*causal-story prepare vist"):
        StoryDataset(vist)
    with pytest.warns(
        UserWarning, match="image0, is not square: its middle is kept.*and in 5 more stories"
    ):
        out = convert(vist, tmp_path / "out.h5", progress=False)
    record = StoryDataset(out, "val").story(0)
    assert record.captions == captions(3)
    tall = picture(3, 1, 2)  # the middle square of a strip of five tiles
    np.testing.assert_array_equal(np.asarray(record.frames[1]), tall)
    convert(vist, out, "vist", progress=False, captions="dii", size=64)
    record = StoryDataset(out, "val").story(0)
    assert record.captions[0] == "seen: " + captions(3)[0] and record.frames[0].size == (64, 64)
    with pytest.raises(ValueError, match="captions='text': choose 'sis'"):
        convert(vist, out, "vist", progress=False, captions="text")


def test_vist_with_fewer_descriptions_than_pictures(vist, tmp_path):
    with h5py.File(vist, "r+") as file:
        file["train/dii"][1] = "a|b|c"
    with pytest.raises(ValueError, match=r"row 1 of 'train'.*dii holds 3 captions.*dropped"):
        convert(vist, tmp_path / "out.h5", progress=False, captions="dii")
    with pytest.warns(UserWarning, match="1 stories were left out"):
        convert(vist, tmp_path / "out.h5", progress=False, captions="dii", keep_going=True)
    assert len(StoryDataset(tmp_path / "out.h5", "train")) == 2


def imagefolder_lines(raw: Path, number: int, **more) -> list[dict]:
    names = save_frames(raw, number)
    lines = [
        {"file_name": name, "text": text, "story": number, "position": k} | more
        for k, (name, text) in enumerate(zip(names, captions(number)))
    ]
    return lines[::-1]  # the position counts, not the line


def write_lines(path: Path, lines: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


def test_an_image_folder_with_one_table(tmp_path):
    raw = tmp_path / "raw"
    lines = imagefolder_lines(raw, 0) + imagefolder_lines(raw, 1, split="validation")
    write_lines(raw / "metadata.jsonl", lines)
    out = convert(raw, tmp_path / "out.h5", progress=False)
    assert_story(StoryDataset(out, "train").story(0), 0)
    assert_story(StoryDataset(out, "val").story(0), 1)


def test_an_image_folder_with_a_table_a_split(tmp_path):
    raw = tmp_path / "raw"
    for number, split in ((0, "train"), (1, "validation"), (2, "test")):
        lines = imagefolder_lines(raw / split, number)
        renamed = [
            {
                "file_name": line["file_name"],
                "caption": line["text"],
                "story_id": "a story",
                "frame": line["position"] / 2,
            }
            for line in lines
        ]
        write_lines(raw / split / "metadata.jsonl", renamed)
    out = convert(raw, tmp_path / "out.h5", progress=False)
    for number, split in ((0, "train"), (1, "val"), (2, "test")):
        assert_story(StoryDataset(out, split).story(0), number)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"position": "one"}, "position must be a number"),
        ({"text": 7}, "list of strings"),
        ({"file_name": "nowhere.png"}, "no picture 'nowhere.png'"),
        ({"position": 2}, "position 2 twice"),
        ({"story": None, "split": "a/b"}, "split"),
    ],
)
def test_lines_of_an_image_folder_are_checked(change, message, tmp_path):
    raw = tmp_path / "raw"
    lines = imagefolder_lines(raw, 0)
    lines[1] = lines[1] | change
    write_lines(raw / "metadata.jsonl", lines)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"metadata\.jsonl, line.*{message}"):
        convert(raw, tmp_path / "out.h5", progress=False)


def test_columns_that_nobody_knows_are_named(tmp_path):
    raw = tmp_path / "raw"
    lines = imagefolder_lines(raw, 0)
    for line in lines:
        line["scene"] = line.pop("story")
    write_lines(raw / "metadata.jsonl", lines)
    with pytest.raises(ValueError, match="no story: one of story, story_id.* there are .*'scene'"):
        convert(raw, tmp_path / "out.h5", progress=False)


@pytest.mark.parametrize(
    "name, advice",
    [
        ("metadata.csv", "metadata.jsonl"),
        ("train/metadata.csv", "metadata.jsonl"),
        ("data/train-00000.parquet", "stories.jsonl"),
        ("sis/train.story-in-sequence.json", "vist_hdf5.py"),
        ("images.tar.gz", "unpack"),
    ],
)
def test_what_is_not_read_is_recognised_with_what_to_do(name, advice, tmp_path):
    path = tmp_path / "raw" / name
    path.parent.mkdir(parents=True)
    path.write_text("")
    for kind in (None, "folder"):
        with pytest.raises(FileNotFoundError, match=advice):
            convert(tmp_path / "raw", tmp_path / "out.h5", kind, progress=False)


def test_a_folder_of_no_layout_lists_them_all(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        convert(tmp_path, tmp_path / "out.h5")
    for layout in LAYOUTS.values():
        assert not layout.read or layout.name in str(caught.value)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a file"):
        convert(tmp_path / "nowhere", tmp_path / "out.h5")
    with pytest.raises(ValueError, match="kind='comic' is unknown: choose one of flintstones"):
        convert(tmp_path, tmp_path / "out.h5", "comic")


def test_options_that_a_layout_has_not_are_named(flintstones, tmp_path):
    with pytest.raises(ValueError, match="FlintstonesSV.*without an option 'size'.*none"):
        convert(flintstones, tmp_path / "out.h5", size=64)


def test_a_new_layout_is_one_entry(tmp_path, monkeypatch):
    "A reader and an entry of the table: recognised, converted, offered, and named in errors."

    def read_comic(raw):
        def read_story(split, page):
            strips = [open_image(path, str(path)) for path in sorted(page.glob("*.png"))]
            return RawStory(page.name, (page / "words.txt").read_text().split("\n"), strips)

        return RawData(
            {"train": sorted(page.parent for page in raw.glob("*/words.txt"))}, read_story
        )

    monkeypatch.setitem(LAYOUTS, "comic", Layout("comic", ("*/words.txt",), read_comic))
    save_frames(tmp_path / "raw", 3)
    (tmp_path / "raw/3/words.txt").write_text("\n".join(captions(3)))
    out = convert(tmp_path / "raw", tmp_path / "out.h5", progress=False)
    assert_story(StoryDataset(out, "train").story(0), 3)
    assert "comic" in readable_kinds()
    with pytest.raises(FileNotFoundError, match="It looks like a comic folder"):
        convert(tmp_path / "raw", tmp_path / "out.h5", "pororo")
