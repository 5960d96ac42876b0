"""Checkpoints of AR-LDM: everything arrives, what does not fit changes nothing, no code runs."""

import pytest
import torch
from published import taught

from causal_story.arldm import (
    arldm_name,
    arldm_state,
    import_arldm_checkpoint,
    read_lightning,
)
from causal_story.words import STORY_DATA


def fresh_arldm(world):
    return taught(world, "pororo", "ar-ldm")


@pytest.fixture(scope="module")
def arldm(world):
    "A pipeline of the recipe ar-ldm with random weights, and its state under AR-LDM's names."
    pipe = fresh_arldm(world)
    torch.manual_seed(7)
    names = ("unet", "vae", "text_encoder", "history_encoder", "story_context")
    with torch.no_grad():
        for name in names:
            for parameter in getattr(pipe, name).parameters():
                parameter.normal_(std=0.1)
    return pipe, arldm_state(pipe)


def test_everything_arrives_and_the_rest_is_reported(world, arldm, tmp_path):
    checkpoint = dict(state_dict=arldm[1], epoch=3, loops={}, optimizer_states=[])
    torch.save(checkpoint, tmp_path / "a.ckpt")
    mine = fresh_arldm(world)
    report = import_arldm_checkpoint(tmp_path / "a.ckpt", mine, "pororo")
    assert set(report.unused) == {"clip_text_null_token", "blip_image_null_token"}
    assert not report.missing and not report.wrong_shape
    assert [name for name, _ in report.partly] == ["time_embeddings.weight"]
    assert len(report.used) + 3 == len(arldm[1])
    for part in ("unet", "vae", "text_encoder", "history_encoder"):
        pairs = (getattr(pipe, part).parameters() for pipe in (mine, arldm[0]))
        for one, other in zip(*pairs, strict=True):
            assert torch.equal(one, other)


VISION_NAMES = (
    "cls_token",
    "pos_embed",
    "patch_embed.proj.weight",
    "blocks.0.norm1.weight",
    "blocks.0.attn.qkv.weight",
    "blocks.0.attn.proj.bias",
    "blocks.0.norm2.bias",
    "blocks.0.mlp.fc1.weight",
    "norm.weight",
)
TEXT_NAMES = (
    "embeddings.word_embeddings.weight",
    "encoder.layer.0.attention.self.query.weight",
    "encoder.layer.0.crossattention.output.dense.bias",
)


def test_names_of_ar_ldm_hit_every_weight(arldm):
    "Written out by hand: names as AR-LDM's modules have them."
    mine = {f"history_encoder.{name}" for name in arldm[0].history_encoder.state_dict()}
    theirs = [f"visual_encoder.{name}" for name in VISION_NAMES]
    theirs += [f"text_encoder.{name}" for name in TEXT_NAMES]
    for name in theirs:
        assert arldm_name(f"mm_encoder.{name}") in mine, name


def test_word_rows_go_to_their_words(world, arldm, tmp_path):
    """Words that the checkpoint's tokenizer knew already had no row of their own; the others come
    in the order of the list."""
    state, pipe = dict(arldm[1]), fresh_arldm(world)
    key = "mm_encoder.text_encoder.embeddings.word_embeddings.weight"
    short = dict(state_dict=state | {key: state[key][:-2]})
    torch.save(short, tmp_path / "short.ckpt")
    before = pipe.history_encoder.get_input_embeddings().weight.clone()
    report = import_arldm_checkpoint(tmp_path / "short.ckpt", pipe, "pororo")
    assert "do not fit the new words" in dict(report.partly)[key]
    after = pipe.history_encoder.get_input_embeddings().weight
    added = pipe.history_tokenizer.get_added_vocab()
    new = [word for word in STORY_DATA["pororo"]["words"] if word in added]
    n_base = len(pipe.history_tokenizer) - len(new)
    assert torch.equal(after[:n_base], state[key][:n_base])
    assert torch.equal(after[n_base:], before[n_base:])


@pytest.mark.parametrize("fault", ["shape", "missing"])
def test_what_does_not_fit_changes_nothing(world, arldm, tmp_path, fault):
    state, pipe = dict(arldm[1]), fresh_arldm(world)
    if fault == "shape":
        state["unet.conv_in.weight"] = torch.zeros(1, 2, 3, 3)
    else:
        del state["unet.conv_in.weight"]
    path = tmp_path / "a.ckpt"
    torch.save(state, path)  # a plain dictionary of weights is read as well
    first, last = pipe.unet.conv_in.weight.clone(), pipe.unet.conv_out.weight.clone()
    with pytest.raises(ValueError, match="(?s)nothing was changed.*unet.conv_in.weight"):
        import_arldm_checkpoint(path, pipe, "pororo")
    assert torch.equal(pipe.unet.conv_out.weight, last)
    import_arldm_checkpoint(path, pipe, "pororo", strict=False)
    assert torch.equal(pipe.unet.conv_in.weight, first)
    assert not torch.equal(pipe.unet.conv_out.weight, last)


class Touch:
    "A pickle that would make a file."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    evil = dict(state_dict=dict(a=torch.zeros(1)), hyper_parameters=Touch(tmp_path / "ran"))
    torch.save(evil, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="refused, because opening it would run code"):
        read_lightning(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_checkpoints(world, tmp_path):
    (tmp_path / "half.ckpt").write_bytes(b"PK\x03\x04 half a file")
    torch.save(dict(epoch=3), tmp_path / "empty.ckpt")
    torch.save(dict(state_dict={"backbone.weight": torch.zeros(2)}), tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="half.ckpt: damaged"):
        read_lightning(tmp_path / "half.ckpt")
    with pytest.raises(ValueError, match="no weights"):
        read_lightning(tmp_path / "empty.ckpt")
    with pytest.raises(ValueError, match="not one of its 1 weights"):
        import_arldm_checkpoint(tmp_path / "other.ckpt", fresh_arldm(world))
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        read_lightning(tmp_path / "none.ckpt")
