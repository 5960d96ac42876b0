"""Files, folders and parts of a model that are whole or not there; errors that name the file."""

import hashlib
import json
import os

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import BertTokenizer, CLIPTextModel, CLIPTokenizer

from causal_story.storage import (
    atomic_folder,
    atomic_path,
    fingerprint,
    load_part,
    local_folder,
    read_json,
    read_lines,
    reading,
    shipped_weights,
)


def content(folder) -> dict:
    "Relative path -> bytes of every file."
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def write(folder, **parts):
    with atomic_folder(folder, "index.json", replaces=("unet", "adapters")) as new:
        for name, text in parts.items():
            (new / name).mkdir()
            (new / name / "weights").write_text(text)
        (new / "index.json").write_text(json.dumps(sorted(parts)))


def test_atomic_path_with_two_writers(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a") as partial:
        partial.write_text("new")
        1 / 0
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a") as partial:
        partial.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
        1 / 0
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_needs_its_table_of_contents(tmp_path):
    with pytest.raises(ValueError, match="index.json was not written"):
        with atomic_folder(tmp_path / "a", "index.json") as new:
            (new / "unet").mkdir()
    assert not (tmp_path / "a").exists()


def test_a_folder_is_replaced_and_what_is_not_ours_stays(tmp_path):
    write(tmp_path, unet="one", adapters="one")
    (tmp_path / "step-00000010").mkdir()
    (tmp_path / "thesis.tex").write_text("mine")
    write(tmp_path, unet="two")
    assert content(tmp_path) == {
        "index.json": b'["unet"]',
        "unet/weights": b"two",
        "thesis.tex": b"mine",
    }
    assert (tmp_path / "step-00000010").is_dir()


def killed_before_move(folder, moment: int) -> int:
    "A process that dies before its n-th move while it replaces a model; its exit status."
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    moves, move = [], os.replace

    def replace(source, target):
        if len(moves) == moment:
            os._exit(9)
        moves.append(move(source, target))

    os.replace = replace
    try:
        write(folder, unet="new", adapters="new")
    finally:
        os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("moment", range(7))
def test_a_writer_that_is_killed_leaves_nothing_that_looks_whole(moment, tmp_path):
    "With a table of contents there is one whole model; without, the next writer brings it back."
    write(tmp_path, unet="old", adapters="old")
    assert killed_before_move(tmp_path, moment) == (0 if moment == 6 else 9)
    found = {name: text for name, text in content(tmp_path).items() if not name.startswith(".")}
    if "index.json" in found:
        assert set(found) == {"index.json", "unet/weights", "adapters/weights"}
        assert found["unet/weights"] == found["adapters/weights"]
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path, "index.json"):
        1 / 0
    old = b"new" if moment == 6 else b"old"
    back = content(tmp_path)
    assert back == {
        "index.json": b'["adapters", "unet"]',
        "unet/weights": old,
        "adapters/weights": old,
    }
    write(tmp_path, unet="newest")
    assert content(tmp_path) == {"index.json": b'["unet"]', "unet/weights": b"newest"}


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_part_that_is_a_link_is_replaced_and_its_target_is_not(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weights").write_text("shared")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "unet").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "model", unet="new")
    assert (tmp_path / "elsewhere" / "weights").read_text() == "shared"
    assert content(tmp_path / "model")["unet/weights"] == b"new"


# ---------------------------------------------------------------- parts of a model

PARTS = dict(
    vae=AutoencoderKL,
    text_encoder=CLIPTextModel,
    tokenizer=CLIPTokenizer,
    unet=UNet2DConditionModel,
    history_tokenizer=BertTokenizer,
)


@pytest.mark.parametrize("name", PARTS)
def test_shipped_parts_load(name):
    part = load_part(PARTS[name], shipped_weights("base") / name)
    if isinstance(part, torch.nn.Module):
        assert not part.training
        assert {value.dtype for value in part.parameters()} == {torch.float32}


@pytest.fixture
def text_encoder(tmp_path):
    "A copy of a shipped part, and its weights."
    load_part(CLIPTextModel, shipped_weights("base") / "text_encoder").save_pretrained(tmp_path)
    return load_file(tmp_path / "model.safetensors")


def test_position_numbers_of_older_versions_are_harmless(text_encoder, tmp_path):
    before = fingerprint(load_part(CLIPTextModel, tmp_path))
    old = text_encoder | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    assert fingerprint(load_part(CLIPTextModel, tmp_path)) == before


@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched", "cut", "gone", "config"])
def test_a_part_that_is_not_whole_is_refused_by_name(fault, text_encoder, tmp_path):
    path = tmp_path / "model.safetensors"
    name = sorted(text_encoder)[0]
    changed = dict(text_encoder)
    if fault == "missing":
        del changed[name]
    elif fault == "mismatched":
        changed[name] = changed[name][:-1].clone()
    elif fault == "unexpected":
        changed[name := "of_somebody_else"] = torch.zeros(2)
    save_file(changed, path, {"format": "pt"})
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    elif fault == "gone":
        path.unlink()
    elif fault == "config":
        (tmp_path / "config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError) as caught:
        load_part(CLIPTextModel, tmp_path)
    assert str(tmp_path) in str(caught.value)
    if fault in ("missing", "unexpected", "mismatched"):
        assert name in str(caught.value)


def test_a_missing_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="owner/name is missing"):
        load_part(CLIPTextModel, "owner/name")
    with pytest.raises(FileNotFoundError, match="base='owner/name' is no folder here.*network"):
        local_folder("owner/name", "base", "weights")


def test_fingerprint_of_a_shipped_part_is_golden():
    "Tuned folders name the base they fit by these digits."
    told = read_json(shipped_weights("story") / "tuned.json", dict)["base"]["fingerprints"]
    for name in ("unet", "vae", "text_encoder"):
        part = load_part(PARTS[name], shipped_weights("base") / name)
        assert fingerprint(part) == told[name]
        assert fingerprint(part.to(torch.float16)) == told[name]
    tokenizer = load_part(CLIPTokenizer, shipped_weights("base") / "tokenizer")
    words = [tokenizer.model_max_length, sorted(tokenizer.get_vocab().items())]
    words = json.dumps(words).encode()
    assert fingerprint(tokenizer) == told["tokenizer"] == hashlib.sha256(words).hexdigest()[:16]


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe", b"[" * 10**5, b'{"a": tru', b"1" * 5000, b'"\\ud8"'], ids=repr
)
def test_damaged_json_names_the_file(data, tmp_path):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.json"):
        read_json(tmp_path / "a.json", dict)


def test_a_byte_order_mark_is_no_damage(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_lines_end_at_line_feeds_only(tmp_path):
    text = '{"a": "x\u2028y\u0085z"}\r\n\n  \n2'
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    assert list(read_lines(tmp_path / "a.jsonl")) == [(1, '{"a": "x\u2028y\u0085z"}'), (4, "2")]


class Panic(BaseException):
    "What a library in Rust raises."


@pytest.mark.parametrize("error", [KeyError("vae"), RuntimeError(""), MemoryError(), Panic("")])
def test_whatever_goes_wrong_the_file_is_named(error):
    with pytest.raises(ValueError, match=r"a\.h5 is not a story file \(.+\): copy"):
        with reading("a.h5", "a story file", "copy it again"):
            raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), FileNotFoundError("b"), ValueError("a.h5")])
def test_what_says_enough_already_passes(error):
    with pytest.raises(type(error)) as caught:
        with reading("a.h5", "a story file"):
            raise error
    assert caught.value is error
