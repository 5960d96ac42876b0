"""Tokenizers made on the spot, new words, longer captions: round trips, bad input."""

import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import BertTokenizer, CLIPTextModel, CLIPTokenizer

from causal_story.encoders import (
    HistoryEncoder,
    encode_captions,
    tiny_history_encoder,
    tiny_text_encoder,
)
from causal_story.storage import warn_once
from causal_story.words import (
    STORY_DATA,
    add_blip_tokens,
    add_words,
    grow_embedding,
    lengthen_positions,
    story_words,
    teach_words,
    tiny_tokenizers,
    warn_of_unknown_words,
)

CAPTIONS = [
    "Milo is at the beach holding a ball.",
    "Meanwhile Kiki sleeps at home.",
    "He jumps with Kiki's balloon!",
]


@pytest.fixture(scope="module")
def tokenizers():
    return tiny_tokenizers(CAPTIONS, max_length=16, characters=("Zaza",))


@pytest.fixture
def text_encoder(tokenizers):
    torch.manual_seed(0)
    return tiny_text_encoder(tokenizers[0], width=32, heads=2)


@pytest.fixture
def history_encoder(tokenizers):
    torch.manual_seed(0)
    return tiny_history_encoder(tokenizers[1], width=32, heads=2, image_size=16, patch_size=8)


# tokenizers


def test_every_training_word_is_one_token(tokenizers):
    words = {
        word.strip(".!").removesuffix("'s") for caption in CAPTIONS for word in caption.split()
    } | {"Zaza", "zaza", "MILO"}
    for tokenizer in tokenizers:
        for word in words:
            assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word


def test_clip_spells_what_it_does_not_know(tokenizers):
    clip, bert = tokenizers
    for text in ("quixotic zebra 42", "Žofie čte café", "日本 🙂"):
        ids = clip(text, add_special_tokens=False).input_ids
        assert clip.eos_token_id not in ids[:-1] and clip.unk_token_id not in ids[:-1]
    assert "[UNK]" not in bert.tokenize("quixotic zebra 42, café!")


def test_tokenizers_round_trip(tmp_path):
    for tokenizer, kind in zip(
        tiny_tokenizers(CAPTIONS, max_length=16), (CLIPTokenizer, BertTokenizer)
    ):
        add_words(tokenizer, None, ["Fred"])
        tokenizer.save_pretrained(tmp_path / kind.__name__)
        back = kind.from_pretrained(tmp_path / kind.__name__)
        assert type(back) is kind and len(back) == len(tokenizer) and back.model_max_length == 16
        assert back.convert_tokens_to_ids(["[ENC]", "[DEC]"]) == tokenizer.convert_tokens_to_ids(
            ["[ENC]", "[DEC]"]
        )
        for text in CAPTIONS + ["", "fred's xylophone is [ENC] FRED"]:
            arguments = dict(padding="max_length", truncation=True)
            assert back(text, **arguments).input_ids == tokenizer(text, **arguments).input_ids


def test_tokenizers_are_deterministic():
    first, second = tiny_tokenizers(CAPTIONS), tiny_tokenizers(CAPTIONS)
    for one, other in zip(first, second):
        assert one.get_vocab() == other.get_vocab()


def test_tiny_tokenizers_refuse():
    with pytest.raises(ValueError, match="captions is empty"):
        tiny_tokenizers([])
    with pytest.raises(ValueError, match="max_length is 2"):
        tiny_tokenizers(CAPTIONS, max_length=2)


# new words


def test_added_words_match_in_any_case_and_never_inside_others(tokenizers):
    for tokenizer in tiny_tokenizers(CAPTIONS):
        assert add_words(tokenizer, None, ["Fred", "Pororo", "DINO"]) == ["fred", "pororo", "dino"]
        for text in ("Fred", "fred", "FRED"):
            assert tokenizer.tokenize(text) == ["fred"]
        assert tokenizer.tokenize("Pororo's")[0] == "pororo"
        assert tokenizer.tokenize("Dino, dino!")[0] == "dino"
        assert "dino" not in tokenizer.tokenize("dinosaur") and "dino" not in tokenizer.tokenize(
            "undino"
        )
        assert add_words(tokenizer, None, ["fred", "PORORO", "Dino"]) == []
        assert add_words(tokenizer, None, ["Milo", "Kiki"]) == []


def test_adding_words_grows_both_encoders(text_encoder, history_encoder):
    for tokenizer, model in zip(
        tiny_tokenizers(CAPTIONS, max_length=16, characters=("Zaza",)),
        (text_encoder, history_encoder),
    ):
        old = model.get_input_embeddings().weight.detach().clone()
        assert add_words(tokenizer, model, ["Fred", "Milo", "wilma"]) == ["fred", "wilma"]
        new = model.get_input_embeddings().weight
        assert new.shape[0] == len(old) + 2 == len(tokenizer)
        assert torch.equal(new[: len(old)], old)
        torch.testing.assert_close(new[len(old) :], old.mean(0).expand(2, -1))
        add_words(tokenizer, model, ["Fred", "Milo", "wilma"])
        assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert (
        history_encoder.config["text_config"]["vocab_size"]
        == history_encoder.text.config.vocab_size
        == len(tokenizer)
    )
    assert text_encoder.config.vocab_size == len(text_encoder.get_input_embeddings().weight)


def test_grown_history_encoder_round_trips(history_encoder, tmp_path):
    tokenizer = tiny_tokenizers(CAPTIONS, max_length=16, characters=("Zaza",))[1]
    add_words(tokenizer, history_encoder, ["Fred"])
    history_encoder.save_pretrained(tmp_path)
    back = HistoryEncoder.from_pretrained(tmp_path)
    assert torch.equal(
        back.get_input_embeddings().weight, history_encoder.get_input_embeddings().weight
    )


@pytest.mark.parametrize("word", ["", "mr slate", "a\tb"])
def test_add_words_refuses(tokenizers, word):
    with pytest.raises(ValueError, match="words holds"):
        add_words(tokenizers[0], None, ["fine", word])


def test_add_words_does_not_take_over_rows_in_use(history_encoder):
    tokenizer = BertTokenizer(
        vocab={
            token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"])
        }
    )
    with pytest.raises(ValueError, match="add_blip_tokens"):
        add_words(tokenizer, history_encoder, ["Fred"])
    assert len(add_blip_tokens(add_blip_tokens(tokenizer))) == 8
    assert tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [6, 7]


# longer captions


def test_lengthened_positions(text_encoder, tmp_path):
    old = text_encoder.embeddings.position_embedding.weight.detach().clone()
    ids = torch.arange(5, 15)[None]
    before = text_encoder(ids).last_hidden_state
    lengthen_positions(text_encoder, 25, keep=10)
    new = text_encoder.embeddings.position_embedding.weight
    assert (
        new.shape == (25, 32)
        and new.requires_grad
        and text_encoder.config.max_position_embeddings == 25
    )
    assert torch.equal(new[:10], old[:10])
    torch.testing.assert_close(new[-1], old[-1])
    torch.testing.assert_close(new[11], old[10] + (old[11] - old[10]) * 5 / 14)
    torch.testing.assert_close(text_encoder(ids).last_hidden_state, before)
    text_encoder.save_pretrained(tmp_path)
    back = CLIPTextModel.from_pretrained(tmp_path).eval()
    long = torch.randint(0, 50, (2, 25))
    torch.testing.assert_close(encode_captions(back, long), encode_captions(text_encoder, long))


def test_lengthen_positions_refuses_to_shrink(text_encoder):
    with pytest.raises(ValueError, match="does not shrink"):
        lengthen_positions(text_encoder, 8)
    assert lengthen_positions(text_encoder, 16).config.max_position_embeddings == 16


# all at once


def parts_of(tokenizers, max_length=16):
    clip, bert = tiny_tokenizers(CAPTIONS, max_length=max_length)
    torch.manual_seed(0)
    return dict(
        tokenizer=clip,
        history_tokenizer=bert,
        text_encoder=tiny_text_encoder(clip, width=32, heads=2),
        history_encoder=tiny_history_encoder(bert, 32, heads=2, image_size=16, patch_size=8),
    )


def test_teach_words_reaches_all_four_parts(tokenizers):
    parts = parts_of(tokenizers)
    words, max_length = story_words("flintstones", ["Kiki", "Milo"])
    assert max_length == 91 and words[-2:] == ("Kiki", "Milo")
    new = teach_words(parts, iter(words), 14)  # any iterable, read once
    assert new == [*STORY_DATA["flintstones"]["words"]]
    for tokenizer, model in (
        (parts["tokenizer"], parts["text_encoder"]),
        (parts["history_tokenizer"], parts["history_encoder"]),
    ):
        assert tokenizer.model_max_length == 14
        assert len(model.get_input_embeddings().weight) == len(tokenizer)
        ids = tokenizer("Fred and WILMA", padding="max_length", truncation=True).input_ids
        assert len(ids) == 14 and tokenizer.unk_token_id not in ids[1:2]
    assert teach_words(parts, words, 14) == []


def test_teach_words_stretches_clip_and_never_blip(tokenizers):
    parts = parts_of(tokenizers)
    rows = len(parts["tokenizer"])
    with pytest.raises(ValueError, match="max_length=17: this BLIP reads at most 16 tokens"):
        teach_words(parts, ["Fred"], 17)
    assert len(parts["tokenizer"]) == rows and parts["tokenizer"].model_max_length == 16
    config = parts["history_encoder"].config["text_config"] | dict(max_position_embeddings=30)
    parts["history_encoder"].register_to_config(text_config=config)
    teach_words(parts, [], 20)
    assert parts["text_encoder"].config.max_position_embeddings == 20


def test_story_words_lists_what_it_knows():
    assert story_words("pororo", max_length=60)[1] == 60
    assert story_words(None) == ((), None)
    assert story_words(None, ["zib"]) == (("zib",), None)
    with pytest.raises(ValueError, match="pororo, flintstones"):
        story_words("smurfs")


class Told(list):
    "Stories that have captions only."

    def stored(self, index):
        return SimpleNamespace(captions=self[index])


@pytest.mark.parametrize(
    "captions, named",
    [
        (CAPTIONS, None),
        (["MILO jumps with Kiki's balloon, holding a ball."] * 9 + ["Zib jumps!"], None),  # few
        (["Zib wakes. Zib sings."], "zib, wakes, sings: these words .* 100% of all words"),
        ([" ".join(3 * letter for letter in "bcdefghijklm")], r"iii \(and 4 more\): "),
        (["..."], None),
        ([], None),
    ],
)
def test_many_unknown_words_are_named_and_few_are_not(tokenizers, captions, named):
    warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            warn_of_unknown_words(tokenizers, Told([captions[::2], captions[1::2]]))
    told = [str(one.message) for one in caught]
    assert len(told) == (named is not None)
    assert named is None or re.search(named, told[0]), told


def test_growing_to_the_same_size_changes_nothing(text_encoder):
    table = text_encoder.get_input_embeddings()
    grow_embedding(text_encoder, len(table.weight))
    assert text_encoder.get_input_embeddings() is table
