"""Encoders and context against independent references, round trips, leaks, bad input."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipTextConfig,
    BlipVisionConfig,
)

from causal_story.blip import resize_image_positions
from causal_story.causal_mask import frame_mask, relevance_bias, token_mask
from causal_story.encoders import (
    RELEVANCES,
    HistoryEncoder,
    StoryContext,
    encode_captions,
    masked_softmax,
    null_caption_ids,
    null_caption_states,
    null_history_states,
    pack_tokens,
    tiny_history_encoder,
    tiny_text_encoder,
)
from causal_story.words import tiny_tokenizers

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


def fresh_process(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout


# caption encoder


def test_caption_padding_does_not_reach_words(tokenizers, text_encoder):
    batch = tokenizers[0](CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    mask = batch.attention_mask.bool()
    states = encode_captions(text_encoder, batch.input_ids, mask)
    assert states.shape == (3, 16, 32)
    changed = torch.where(mask, batch.input_ids, 5)
    torch.testing.assert_close(encode_captions(text_encoder, changed, mask)[mask], states[mask])
    stacked = encode_captions(
        text_encoder, batch.input_ids[None].expand(2, -1, -1), mask[None].expand(2, -1, -1)
    )
    torch.testing.assert_close(stacked[1], states)


def test_a_frame_that_is_not_there_gives_no_nan(text_encoder, history_encoder):
    ids, nothing = torch.zeros(2, 16, dtype=torch.long), torch.zeros(2, 16, dtype=torch.bool)
    nothing[0] = True
    assert torch.isfinite(encode_captions(text_encoder, ids, nothing)).all()
    states = history_encoder(torch.zeros(2, 3, 16, 16), ids, nothing)
    assert torch.isfinite(states).all()


def test_a_caption_longer_than_the_table_is_refused(text_encoder):
    with pytest.raises(ValueError, match="17 tokens"):
        encode_captions(text_encoder, torch.zeros(1, 17, dtype=torch.long))


# history encoder


def test_history_encoder_reads_image_words_and_enc(tokenizers, history_encoder):
    batch = tokenizers[1](CAPTIONS[:2], padding="max_length", truncation=True, return_tensors="pt")
    ids, mask = batch.input_ids, batch.attention_mask.bool()
    pixels = torch.randn(2, 3, 16, 16)
    states = history_encoder(pixels, ids, mask)
    assert states.shape == (2, 16, 32)
    features = history_encoder.image_features(pixels)
    assert features.shape == (2, 5, 32)
    torch.testing.assert_close(
        history_encoder(image_features=features, input_ids=ids, attention_mask=mask), states
    )
    other_first = ids.clone()
    other_first[:, 0] = 9
    torch.testing.assert_close(history_encoder(pixels, other_first, mask), states)
    assert (history_encoder(pixels.flip(0), ids, mask) - states).abs().max() > 1e-3
    assert torch.equal(ids, batch.input_ids)
    padding = torch.where(mask, ids, 7)
    torch.testing.assert_close(history_encoder(pixels, padding, mask)[mask], states[mask])


def test_history_encoder_is_bidirectional_unless_causal(history_encoder):
    ids, pixels = torch.full((1, 8), 6), torch.randn(1, 3, 16, 16)
    late = ids.clone()
    late[:, 5] = 9

    def moved(causal):
        before, after = (history_encoder(pixels, x, causal=causal) for x in (ids, late))
        return (after - before).abs().amax((0, 2))

    assert (moved(False)[:5] > 0).all()
    assert (moved(True)[:5] == 0).all() and (moved(True)[5:] > 0).all()


def test_causal_reading_starts_with_dec(history_encoder):
    enc, dec = history_encoder.config["enc_token_id"], history_encoder.config["dec_token_id"]
    assert enc != dec
    ids, pixels = torch.full((1, 8), 6), torch.randn(1, 3, 16, 16)
    by_hand = ids.clone()
    by_hand[:, 0] = dec
    expected = history_encoder.text(
        input_ids=by_hand,
        encoder_hidden_states=history_encoder.image_features(pixels),
        is_decoder=True,
        use_cache=False,
    ).last_hidden_state
    torch.testing.assert_close(history_encoder(pixels, ids, causal=True), expected)


def test_gradient_reaches_picture_and_words(history_encoder):
    pixels = torch.randn(1, 3, 16, 16, requires_grad=True)
    history_encoder(pixels, torch.full((1, 8), 6)).square().sum().backward()
    assert pixels.grad.abs().sum() > 0
    unused = [name for name, p in history_encoder.named_parameters() if p.grad is None]
    assert unused == []


def test_history_encoder_round_trips_in_a_fresh_process(history_encoder, tmp_path):
    history_encoder.save_pretrained(tmp_path / "encoder")
    pixels, ids = torch.randn(2, 3, 16, 16), torch.randint(5, 60, (2, 12))
    torch.save(
        dict(pixels=pixels, ids=ids, states=history_encoder(pixels, ids).detach()),
        tmp_path / "expected.pt",
    )
    assert (tmp_path / "encoder" / "diffusion_pytorch_model.safetensors").exists()
    assert fresh_process(
        """
import sys, torch
from causal_story.encoders import HistoryEncoder
e = torch.load(sys.argv[2], weights_only=True)
model = HistoryEncoder.from_pretrained(sys.argv[1])
torch.testing.assert_close(model(e["pixels"], e["ids"]), e["states"])
print(model.training, model.config["enc_token_id"])
""",
        tmp_path / "encoder",
        tmp_path / "expected.pt",
    ).split() == ["False", str(history_encoder.config["enc_token_id"])]


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda m: m(torch.zeros(1, 3, 8, 8), torch.zeros(1, 4).long()), "pixel_values has shape"),
        (lambda m: m(None, torch.zeros(1, 4).long()), "pixel_values or image_features"),
        (lambda m: m(torch.zeros(1, 3, 16, 16)), "input_ids is missing"),
        (
            lambda m: HistoryEncoder(
                m.config["vision_config"], m.config["text_config"] | dict(is_decoder=False), 1
            ),
            "cross-attention",
        ),
        (
            lambda m: HistoryEncoder(m.config["vision_config"], m.config["text_config"], 1)(
                torch.zeros(1, 3, 16, 16), torch.zeros(1, 4).long(), causal=True
            ),
            "dec_token_id",
        ),
    ],
)
def test_history_encoder_refuses(history_encoder, call, says):
    with pytest.raises(ValueError, match=says):
        call(history_encoder)


# trained BLIP


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory):
    torch.manual_seed(1)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = BlipConfig(
        text_config=BlipTextConfig(
            **shape, vocab_size=40, max_position_embeddings=12, encoder_hidden_size=16
        ).to_dict(),
        vision_config=BlipVisionConfig(
            **shape, image_size=32, patch_size=8, initializer_range=0.02
        ).to_dict(),
        image_text_hidden_size=8,
    )
    folder = tmp_path_factory.mktemp("blip")
    BlipForImageTextRetrieval(config).save_pretrained(folder)
    return folder


def test_from_blip_keeps_what_blip_computes(blip_folder):
    blip = BlipForImageTextRetrieval.from_pretrained(blip_folder).eval()
    pixels, ids = torch.randn(2, 3, 32, 32), torch.randint(1, 38, (2, 7))
    for source in (blip_folder, str(blip_folder), blip):
        encoder = HistoryEncoder.from_blip(source, image_size=32)
        assert encoder.config["enc_token_id"] == 39 and encoder.config["dec_token_id"] == 38
        ids[:, 0] = 39
        image = blip.vision_model(pixels).last_hidden_state
        expected = blip.text_encoder(
            input_ids=ids, encoder_hidden_states=image, is_decoder=False
        ).last_hidden_state
        torch.testing.assert_close(encoder(pixels, ids), expected)


def test_from_blip_at_another_size(blip_folder, tmp_path):
    blip = BlipForImageTextRetrieval.from_pretrained(blip_folder).eval()
    encoder = HistoryEncoder.from_blip(blip_folder, image_size=48)
    pixels = torch.randn(2, 3, 48, 48)
    expected = blip.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(encoder.image_features(pixels), expected)
    encoder.save_pretrained(tmp_path)
    torch.testing.assert_close(
        HistoryEncoder.from_pretrained(tmp_path).image_features(pixels), expected
    )


def test_from_blip_refuses(blip_folder, tmp_path, text_encoder):
    with pytest.raises(ValueError, match="multiple of the patch size 8"):
        HistoryEncoder.from_blip(blip_folder, image_size=36)
    with pytest.raises(FileNotFoundError, match="no BLIP folder"):
        HistoryEncoder.from_blip(tmp_path / "nowhere")
    text_encoder.save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="not a BLIP"):
        HistoryEncoder.from_blip(tmp_path / "clip")


def test_image_positions_keep_their_middle():
    grid = torch.linspace(-1, 1, 8)[:, None] + torch.linspace(0, 2, 8)[None]
    table = torch.cat([torch.tensor([9.0]), grid.flatten()])[None, :, None]
    small = resize_image_positions(table, 4)
    assert small.shape == (1, 17, 1) and small[0, 0] == 9
    torch.testing.assert_close(small[0, 1:].mean(), table[0, 1:].mean(), atol=1e-3, rtol=0)
    assert torch.equal(resize_image_positions(table, 8), table)


# null inputs and dropped rows


def test_null_states(tokenizers, text_encoder, history_encoder):
    clip, bert = tokenizers
    ids = null_caption_ids(clip)
    assert ids.tolist() == [clip.bos_token_id] + [clip.eos_token_id] * 15
    caption = null_caption_states(text_encoder, ids)
    torch.testing.assert_close(caption, text_encoder(ids[None]).last_hidden_state[0])
    block = null_history_states(history_encoder, null_caption_ids(bert))
    black = (0 - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )  # AR-LDM: zeros, then its BLIP transform
    expected = history_encoder(
        black.view(1, 3, 1, 1).repeat(1, 1, 16, 16),
        null_caption_ids(bert)[None],
        torch.ones(1, 16).bool(),
    )[0]
    torch.testing.assert_close(block, expected)
    assert (
        caption.requires_grad and block.requires_grad and caption.shape == block.shape == (16, 32)
    )


# context


def reference_context(
    captions, histories, dropped, null_caption, null_history, type_table, time_table
):
    "AR-LDM's context, frame by frame and block by block; lists instead of broadcasting."
    stories = []
    for b in range(captions.shape[0]):
        frames = []
        for i in range(captions.shape[1]):
            unconditional = bool(dropped[b, i])
            pieces = [(null_caption if unconditional else captions[b, i]) + type_table[0]]
            for k in range(histories.shape[1]):
                block = null_history if unconditional else histories[b, k]
                pieces.append(block + type_table[1] + time_table[k])
            frames.append(torch.cat(pieces, dim=0))
        stories.append(torch.stack(frames))
    return torch.stack(stories)


def story(task, B=2, V=3, S=4, D=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    blocks = V + (task == "continuation")

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    caption_mask, history_mask = (
        torch.arange(S) < torch.randint(1, S + 1, (B, n, 1), generator=generator)
        for n in (V, blocks)
    )
    return dict(
        captions=draw(B, V, S, D),
        histories=draw(B, blocks, S, D),
        caption_mask=caption_mask,
        history_mask=history_mask,
        dropped=torch.rand(B, V, generator=generator) < 0.4,
        null_caption=draw(S, D),
        null_history=draw(S, D),
    )


def awake(context, scale=0.5):
    "Give every zero-initialised part random weights, as training would."
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in context.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return context.eval()


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(["visualization", "continuation"]), st.integers(1, 8), st.integers(0, 1000))
def test_assembly_equals_ar_ldm(task, V, seed):
    s, context = story(task, V=V, seed=seed), awake(StoryContext(8, context_layers=1))
    without = s["dropped"][..., None, None]
    captions = torch.where(without, s["null_caption"], s["captions"])
    histories = torch.where(without[..., None], s["null_history"], s["histories"][:, None])
    got = context(captions, histories, context_layer=False)
    expected = reference_context(
        s["captions"],
        s["histories"],
        s["dropped"],
        s["null_caption"],
        s["null_history"],
        context.type_embedding.weight,
        context.time_embedding.weight,
    )
    assert got.shape == (2, V, (1 + s["histories"].shape[1]) * 4, 8)
    torch.testing.assert_close(got, expected)
    shared = context(s["captions"], s["histories"], context_layer=False)
    nobody = torch.zeros_like(s["dropped"])
    torch.testing.assert_close(
        shared,
        reference_context(
            s["captions"],
            s["histories"],
            nobody,
            None,
            None,
            context.type_embedding.weight,
            context.time_embedding.weight,
        ),
    )


@pytest.mark.parametrize("task", ["visualization", "continuation"])
def test_context_layer_starts_as_ar_ldm_and_moves_when_trained(task):
    s, context = story(task), StoryContext(8, context_layers=2, heads=2)
    mask = token_mask(frame_mask("full", 3, task), s["caption_mask"], s["history_mask"])
    plain = context(s["captions"], s["histories"], context_layer=False)
    torch.testing.assert_close(context(s["captions"], s["histories"], mask), plain, rtol=0, atol=0)
    moved = awake(context)(s["captions"], s["histories"], mask) - context(
        s["captions"], s["histories"], context_layer=False
    )
    assert (moved[mask].abs().sum(-1) > 0).all() and (moved[~mask] == 0).all()


def independent_layers(context, tokens, mask, distance):
    "The context layers on the visible tokens only, torch's own attention as a second opinion."
    tokens = tokens[mask]
    hidden = tokens + context.distance_embedding.weight[distance[mask]]
    for layer in context.layers:
        attention = torch.nn.MultiheadAttention(hidden.shape[-1], layer.heads, batch_first=True)
        attention.in_proj_weight, attention.in_proj_bias = layer.to_qkv.weight, layer.to_qkv.bias
        attention.out_proj = layer.to_out
        x = layer.norm1(hidden)[None]
        hidden = hidden + attention(x, x, x, need_weights=False)[0][0]
        hidden = hidden + layer.mlp(layer.norm2(hidden))
    return tokens + context.projection(context.norm(hidden))


@pytest.mark.parametrize(
    "task, policy, window",
    [
        ("visualization", "full", None),
        ("continuation", "full", None),
        ("visualization", "local", 1),
        ("continuation", "local", 2),
        ("continuation", "none", None),
    ],
)
def test_context_layer_equals_attention_over_visible_tokens(task, policy, window):
    s, context = story(task), awake(StoryContext(8, context_layers=2, heads=2))
    mask = token_mask(
        frame_mask(policy, 3, task, window), s["caption_mask"], s["history_mask"], s["dropped"]
    )
    got, plain = (
        context(s["captions"], s["histories"], mask),
        context(s["captions"], s["histories"], context_layer=False),
    )
    for b in range(2):
        for i in range(3):
            now = i + (task == "continuation")
            distance = torch.tensor(
                [0] * 4
                + [max(now - k, 0) for k in range(s["histories"].shape[1]) for _ in range(4)]
            )
            expected = independent_layers(context, plain[b, i], mask[b, i], distance)
            torch.testing.assert_close(got[b, i][mask[b, i]], expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(["visualization", "continuation"]),
    st.integers(1, 6),
    st.none() | st.integers(1, 3),
    st.sampled_from(list(RELEVANCES)),
    st.integers(0, 1000),
    st.data(),
)
def test_what_a_frame_may_not_see_never_reaches_it(task, V, window, kind, seed, data):
    s, context = (
        story(task, V=V, seed=seed),
        awake(StoryContext(8, context_layers=2, heads=2, relevance=kind)),
    )
    frames = frame_mask("weighted", V, task, window)
    mask = token_mask(frames, s["caption_mask"], s["history_mask"])
    block = data.draw(st.integers(0, frames.shape[1] - 1))
    other = s["histories"].clone()
    other[:, block] = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(seed + 1))
    other[~s["history_mask"]] = torch.linspace(-5, 5, 8).sin()
    before, after = (context(s["captions"], h, mask) for h in (s["histories"], other))
    blind = ~frames[:, block]
    assert torch.equal(before[:, blind][mask[:, blind]], after[:, blind][mask[:, blind]])
    weighed = [
        context.weigh(c, frames, s["caption_mask"], s["history_mask"]) for c in (before, after)
    ]
    for one, other in zip(*weighed):  # relevance, shift
        assert torch.equal(one[:, blind], other[:, blind])
    if frames[:, block].any():
        assert not torch.equal(
            before[:, ~blind][mask[:, ~blind]], after[:, ~blind][mask[:, ~blind]]
        )


def test_one_frame_at_a_time_with_frame_times():
    s, context = (
        story("continuation", V=4),
        awake(StoryContext(8, context_layers=1, heads=2, relevance=True)),
    )
    frames = frame_mask("full", 4, "continuation")
    mask = token_mask(frames, s["caption_mask"], s["history_mask"])
    whole = context(s["captions"], s["histories"], mask)
    weights = context.relevance(whole, frames, s["caption_mask"], s["history_mask"])
    for i in range(4):
        known = i + 1
        part = dict(frame_times=torch.tensor([i + 1]))
        one_mask = mask[:, i : i + 1, : (1 + known) * 4]
        one = context(s["captions"][:, i : i + 1], s["histories"][:, :known], one_mask, **part)
        torch.testing.assert_close(one[one_mask], whole[:, i : i + 1, : (1 + known) * 4][one_mask])
        one_weights = context.relevance(
            one,
            frames[i : i + 1, :known],
            s["caption_mask"][:, i : i + 1],
            s["history_mask"][:, :known],
            **part,
        )
        torch.testing.assert_close(one_weights, weights[:, i : i + 1, :known])


def rows_of(tensor, frames):
    "(B, V, ...) and (B, n) frame numbers -> (B, n, ...): other frames of every story."
    return torch.stack([row[index] for row, index in zip(tensor, frames)])


@pytest.mark.parametrize("task", ["visualization", "continuation"])
def test_every_story_may_have_its_own_times(task):
    V, frames = 5, torch.tensor([[4, 1], [0, 3]])  # any two frames of each story, in any order
    s = story(task, V=V)
    context = awake(StoryContext(8, context_layers=2, heads=2, relevance=True))
    allowed = frame_mask("weighted", V, task)
    mask = token_mask(allowed, s["caption_mask"], s["history_mask"])
    whole = context(s["captions"], s["histories"], mask)
    weights = context.relevance(whole, allowed, s["caption_mask"], s["history_mask"])
    times = frames + (task == "continuation")
    captions, caption_mask = rows_of(s["captions"], frames), rows_of(s["caption_mask"], frames)
    part_mask, part_allowed = rows_of(mask, frames), allowed[frames]
    part = context(captions, s["histories"], part_mask, frame_times=times)
    part_weights = context.relevance(
        part, part_allowed, caption_mask, s["history_mask"], frame_times=times
    )
    torch.testing.assert_close(part[part_mask], rows_of(whole, frames)[part_mask])
    torch.testing.assert_close(part_weights, rows_of(weights, frames))
    for b in range(2):  # the same, a story a call with times of shape (V,)
        one = slice(b, b + 1)
        alone = context(captions[one], s["histories"][one], part_mask[one], frame_times=times[b])
        torch.testing.assert_close(alone[part_mask[one]], part[one][part_mask[one]])
        alone_weights = context.relevance(
            alone, part_allowed[b], caption_mask[one], s["history_mask"][one], frame_times=times[b]
        )
        torch.testing.assert_close(alone_weights, part_weights[one])


def test_times_of_the_wrong_shape_are_refused():
    s, context = story("visualization"), StoryContext(8, context_layers=1, relevance=True)
    mask = token_mask(frame_mask("full", 3, "visualization"), s["caption_mask"], s["history_mask"])
    for shape in ((2,), (3, 3), (2, 2), (1, 2, 3), ()):
        times = torch.zeros(shape, dtype=torch.long)
        with pytest.raises(ValueError, match="frame_times"):
            context(s["captions"], s["histories"], mask, frame_times=times)
        with pytest.raises(ValueError, match="frame_times"):
            context.relevance(
                torch.zeros(2, 3, 16, 8),
                frame_mask("full", 3, "visualization"),
                s["caption_mask"],
                s["history_mask"],
                frame_times=times,
            )


@pytest.mark.parametrize(
    "more", [{}, *[dict(context_layers=1, heads=2, relevance=kind) for kind in RELEVANCES]]
)
def test_a_grown_context(more, tmp_path):
    s, context = story("continuation"), awake(StoryContext(8, n_times=4, **more))
    frames = frame_mask("weighted", 3, "continuation")
    mask = token_mask(frames, s["caption_mask"], s["history_mask"])

    def run():
        states = context(s["captions"], s["histories"], mask)
        if not more:
            return [states]
        return [states, *context.weigh(states, frames, s["caption_mask"], s["history_mask"])]

    before = run()
    old = {name: value.clone() for name, value in context.state_dict().items()}
    assert context.grow(4) is context and context.config.n_times == 4
    context.time_embedding.weight.requires_grad_(False)
    assert context.grow(9) is context and context.config.n_times == 9
    assert not context.time_embedding.weight.requires_grad
    assert context.time_embedding.num_embeddings == 9
    assert list(old) == list(context.state_dict())
    grown = [name for name, value in context.state_dict().items() if len(value) != len(old[name])]
    tables = ["time_embedding.weight"]
    if more:
        tables += ["distance_embedding.weight", "relevance_head.distance_bias"]
        assert context.distance_embedding.weight.requires_grad
    assert sorted(grown) == sorted(tables)
    for name, value in context.state_dict().items():
        assert torch.equal(value[: len(old[name])], old[name])
        if name in tables:
            assert len(value) == 9
            assert torch.equal(value[4:], value[3:4].expand_as(value[4:]))
    for now, then in zip(run(), before):
        assert torch.equal(now, then)
    long = story("continuation", V=8)
    allowed = frame_mask("full", 8, "continuation")
    long_mask = token_mask(allowed, long["caption_mask"], long["history_mask"])
    expected = context(long["captions"], long["histories"], long_mask)
    context.save_pretrained(tmp_path)
    again = StoryContext.from_pretrained(tmp_path)
    assert again.config.n_times == 9
    assert torch.equal(again(long["captions"], long["histories"], long_mask), expected)
    assert StoryContext.from_config(StoryContext(width=8).grow(12).config).config.n_times == 12
    with pytest.raises(ValueError, match="does not shrink"):
        context.grow(8)


def test_far_off_is_read_as_the_furthest_that_was_learned():
    s = story("visualization", V=1)
    context = awake(StoryContext(8, n_times=3, context_layers=1, heads=2))
    mask = token_mask(torch.ones(1, 1).bool(), s["caption_mask"], s["history_mask"])
    far = torch.tensor([7])
    before = context(s["captions"], s["histories"], mask, frame_times=far)
    assert torch.equal(
        context.grow(12)(s["captions"], s["histories"], mask, frame_times=far), before
    )


def test_a_story_that_sees_nothing_gives_no_nan():
    s, context = (
        story("visualization"),
        awake(StoryContext(8, context_layers=1, heads=2, relevance=True)),
    )
    captions = s["captions"].clone().requires_grad_()
    nothing = torch.zeros_like(s["caption_mask"])
    mask = token_mask(frame_mask("none", 3, "visualization"), nothing, s["history_mask"])
    out = context(captions, s["histories"], mask)
    weights = context.relevance(
        out, frame_mask("none", 3, "visualization"), nothing, s["history_mask"]
    )
    (out.sum() + weights.sum()).backward()
    assert (
        torch.isfinite(out).all() and (weights == 0).all() and torch.isfinite(captions.grad).all()
    )


@pytest.mark.parametrize("task", ["visualization", "continuation"])
def test_relevance_starts_equal_sums_to_one_and_learns(task):
    s, context = story(task), StoryContext(8, context_layers=1, heads=2, relevance=True)
    frames = frame_mask("weighted", 3, task)
    mask = token_mask(frames, s["caption_mask"], s["history_mask"])

    def weigh():
        states = context(s["captions"], s["histories"], mask)
        return context.relevance(states, frames, s["caption_mask"], s["history_mask"])

    equal = frames / frames.sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(weigh(), equal.expand(2, -1, -1), rtol=0, atol=1e-7)
    (weigh()[..., 0].sum()).backward()
    assert context.relevance_head.query.weight.grad.abs().sum() > 0
    assert all(torch.isfinite(p.grad).all() for p in context.parameters() if p.grad is not None)
    awake(context)
    weights = weigh()
    torch.testing.assert_close(weights.sum(-1), frames.any(-1).float().expand(2, -1))
    assert (weights[:, ~frames] == 0).all()
    assert (weights - equal).abs().max() > 0.05


@pytest.mark.parametrize("kind", RELEVANCES)
def test_relevance_ignores_padding(kind):
    s, context = story("visualization"), awake(StoryContext(8, relevance=kind))
    frames = frame_mask("weighted", 3, "visualization")

    def weigh(captions, histories, dropped=None):
        states = context(captions, histories)
        return context.weigh(states, frames, s["caption_mask"], s["history_mask"], dropped=dropped)[
            0
        ]

    captions, histories = s["captions"].clone(), s["histories"].clone()
    captions[~s["caption_mask"]] = torch.randn(8)
    histories[~s["history_mask"]] = torch.randn(8)
    torch.testing.assert_close(weigh(captions, histories), weigh(s["captions"], s["histories"]))
    everyone = torch.ones(2, 3, dtype=torch.bool)
    assert not torch.allclose(
        weigh(captions, histories, everyone), weigh(s["captions"], s["histories"], everyone)
    )


def weighed(context, s, frames, **more):
    "Relevance and shift of a story."
    states = context(s["captions"], s["histories"], context_layer=False)
    return context.weigh(states, frames, s["caption_mask"], s["history_mask"], **more)


@pytest.mark.parametrize("task", ["visualization", "continuation"])
def test_blocks_are_shifted_as_the_causal_mask_says(task):
    s = story(task)
    for seed in range(5):
        torch.manual_seed(seed)
        frames = torch.rand(2, 3, s["histories"].shape[1]) < 0.6
        context = StoryContext(8, relevance=True if seed else "block")
        if seed:
            awake(context, scale=1 + seed)
        relevance, shift = weighed(context, s, frames, dropped=s["dropped"])
        assert torch.equal(shift, relevance_bias(relevance, frames, 4))
        states = context(s["captions"], s["histories"])
        again = context.relevance(
            states, frames, s["caption_mask"], s["history_mask"], dropped=s["dropped"]
        )
        assert torch.equal(again, relevance)


@pytest.mark.parametrize("kind", RELEVANCES)
@pytest.mark.parametrize("S", [1, 7, 91])
def test_every_relevance_starts_as_full_to_the_bit(kind, S):
    context = StoryContext(8, n_times=17, relevance=kind)
    s = story("continuation", V=16, S=S)
    frames = frame_mask("weighted", 16, "continuation")
    relevance, shift = weighed(context, s, frames)
    assert relevance.shape == (2, 16, 17) and shift.shape == (2, 16, 18 * S)
    assert (shift == 0).all()
    total = relevance.sum(-1)
    n = frames.sum(-1)
    expected = {"block": torch.ones(16), "token": torch.ones(16), "null": n / (n + 1)}[kind]
    torch.testing.assert_close(total, expected.expand(2, -1))
    assert (relevance[:, ~frames] == 0).all()


@pytest.mark.parametrize("kind", RELEVANCES)
def test_every_relevance_learns_from_its_shift_alone(kind):
    "What the denoising loss sees is the shift; its gradient must reach query and distance bias."
    s, context = story("continuation"), StoryContext(8, relevance=kind)
    frames = frame_mask("weighted", 3, "continuation")
    _, shift = weighed(context, s, frames)
    (shift * torch.randn(shift.shape)).sum().backward()
    head = context.relevance_head
    for p in (head.query.weight, head.distance_bias):
        assert torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0
    if kind == "null":
        assert head.none_bias.grad.abs().sum() > 0
    awake(context).zero_grad()
    relevance, shift = weighed(context, s, frames)
    (shift * torch.randn(shift.shape)).sum().backward()
    dead = [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == [] and all(torch.isfinite(p.grad).all() for p in head.parameters())


def test_token_relevance_is_log_n_r_of_every_visible_token():
    s, context = story("continuation"), awake(StoryContext(8, relevance="token"))
    frames, head = frame_mask("weighted", 3, "continuation"), context.relevance_head
    states = context(s["captions"], s["histories"])
    relevance, shift = weighed(context, s, frames)
    for b in range(2):
        for i in range(3):
            row = states[b, i].view(5, 4, 8)
            query = head.query(head.caption_pool(row[0], s["caption_mask"][b, i]))
            places, scores = [], []
            for k in range(4):
                for word in range(4):
                    if frames[i, k] and s["history_mask"][b, k, word]:
                        match = query @ head.key(head.norm(row[1 + k, word])) / 8**0.5
                        scores.append(match + head.distance_bias[i + 1 - k])
                        places.append((k, word))
            shares = torch.stack(scores).softmax(0)
            blocks, expected = torch.zeros(4), torch.zeros(5, 4)
            for (k, word), share in zip(places, shares):
                blocks[k] += share
                expected[1 + k, word] = (len(places) * share).log()
            torch.testing.assert_close(relevance[b, i], blocks)
            torch.testing.assert_close(shift[b, i].view(5, 4), expected, rtol=1e-4, atol=1e-4)


def test_null_relevance_may_say_none_of_them():
    s, context = story("continuation"), awake(StoryContext(8, relevance="null"))
    frames, head = frame_mask("weighted", 3, "continuation"), context.relevance_head
    relevance, shift = weighed(context, s, frames)
    total = relevance.sum(-1)
    assert (total < 1).all() and (total > 0).all()
    n = frames.sum(-1)[:, None]
    expected = torch.where(frames, (n + 1) * relevance, 1.0).log()
    torch.testing.assert_close(
        shift.view(2, 3, 5, 4)[:, :, 1:], expected[..., None].expand(-1, -1, -1, 4)
    )
    with torch.no_grad():
        head.none_bias.fill_(50)
    relevance, shift = weighed(context, s, frames)
    assert (relevance < 1e-6).all() and (shift.view(2, 3, 5, 4)[:, :, 1:][:, frames] < -20).all()
    with torch.no_grad():
        head.none_bias.fill_(-50)
    block = StoryContext(8, relevance="block")
    block.load_state_dict(context.state_dict(), strict=False)
    torch.testing.assert_close(weighed(context, s, frames)[0], weighed(block, s, frames)[0])


@pytest.mark.parametrize("kind", RELEVANCES)
def test_a_story_without_history_is_not_weighed(kind):
    context = awake(StoryContext(8, relevance=kind))
    captions, histories = torch.randn(2, 1, 4, 8), torch.randn(2, 0, 4, 8)
    words, no_words = torch.ones(2, 1, 4).bool(), torch.ones(2, 0, 4).bool()
    relevance, shift = context.weigh(
        context(captions, histories), torch.ones(1, 0).bool(), words, no_words
    )
    assert relevance.shape == (2, 1, 0) and (shift == 0).all() and shift.shape == (2, 1, 4)


def test_unknown_relevance_is_refused():
    with pytest.raises(ValueError, match="block, token, null"):
        StoryContext(8, relevance="word")


def test_context_round_trips_in_a_fresh_process(tmp_path):
    s, context = (
        story("continuation"),
        awake(StoryContext(8, context_layers=1, heads=2, relevance=True)),
    )
    mask = token_mask(frame_mask("full", 3, "continuation"), s["caption_mask"], s["history_mask"])
    context.save_pretrained(tmp_path / "context")
    expected = context(s["captions"], s["histories"], mask).detach()
    torch.save(
        dict(captions=s["captions"], histories=s["histories"], mask=mask, expected=expected),
        tmp_path / "expected.pt",
    )
    fresh_process(
        """
import sys, torch
from causal_story.encoders import StoryContext
e = torch.load(sys.argv[2], weights_only=True)
context = StoryContext.from_pretrained(sys.argv[1])
torch.testing.assert_close(context(e["captions"], e["histories"], e["mask"]), e["expected"])
""",
        tmp_path / "context",
        tmp_path / "expected.pt",
    )


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(history_states=torch.zeros(2, 3, 4, 6)), "history_states has shape"),
        (dict(caption_states=torch.zeros(2, 3, 4, 6)), "width 6"),
        (dict(history_states=torch.zeros(2, 10, 4, 8)), "10 history blocks"),
        (
            dict(history_states=torch.zeros(2, 5, 4, 8), token_mask=torch.ones(2, 3, 24).bool()),
            "give frame_times",
        ),
        (dict(token_mask=torch.ones(2, 3, 15).bool()), "token_mask has shape"),
        (dict(token_mask=None), "token_mask is missing"),
    ],
)
def test_context_refuses(change, says):
    good = dict(
        caption_states=torch.zeros(2, 3, 4, 8),
        history_states=torch.zeros(2, 3, 4, 8),
        token_mask=torch.ones(2, 3, 16).bool(),
    )
    with pytest.raises(ValueError, match=says):
        StoryContext(8, context_layers=1)(**(good | change))


def test_relevance_refuses_without_a_head():
    with pytest.raises(ValueError, match="relevance=False"):
        StoryContext(8).relevance(
            torch.zeros(1, 1, 8, 8),
            torch.ones(1, 1).bool(),
            torch.ones(1, 1, 4).bool(),
            torch.ones(1, 1, 4).bool(),
        )


def test_packing_keeps_order_and_loses_nothing():
    mask = torch.tensor([[True, False, True, False], [False, False, True, False], [False] * 4])
    tokens = torch.arange(12.0).reshape(3, 4, 1)
    packed, packed_mask, places = pack_tokens(tokens, mask)
    assert packed.shape == (3, 2, 1) and places.tolist()[0] == [0, 2]
    assert packed_mask.tolist() == [[True, True], [True, False], [False, False]]
    assert packed[0, :, 0].tolist() == [0, 2] and packed[1, 0, 0] == 6


def test_masked_softmax():
    scores = torch.tensor([[1.0, 2.0, 50.0], [3.0, 3.0, 3.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    weights = masked_softmax(scores, mask)
    torch.testing.assert_close(weights[0, :2], torch.tensor([1.0, 2.0]).softmax(0))
    assert (weights[~mask] == 0).all()
    weights.square().sum().backward()
    assert torch.isfinite(scores.grad).all() and (scores.grad[1] == 0).all()


# other homes of BLIP, other devices, half precision


@pytest.mark.parametrize(
    "kind",
    [
        "BlipForImageTextRetrieval",
        "BlipForConditionalGeneration",
        "BlipForQuestionAnswering",
        "BlipModel",
    ],
)
def test_from_blip_finds_both_towers_in_every_blip(kind, tmp_path):
    import transformers

    torch.manual_seed(2)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = BlipConfig(
        text_config=dict(
            **shape, vocab_size=40, max_position_embeddings=12, bos_token_id=38, sep_token_id=3
        ),
        vision_config=dict(**shape, image_size=16, patch_size=8, initializer_range=0.02),
        image_text_hidden_size=8,
    )
    blip = getattr(transformers, kind)(config).eval()
    blip.save_pretrained(tmp_path)
    encoder = HistoryEncoder.from_blip(tmp_path, image_size=16)
    text = {
        "BlipForConditionalGeneration": lambda: blip.text_decoder.bert,
        "BlipModel": lambda: blip.text_model,
    }.get(kind, lambda: blip.text_encoder)()
    pixels, ids = torch.randn(1, 3, 16, 16), torch.tensor([[39, 5, 6, 7]])
    expected = text(
        input_ids=ids,
        encoder_hidden_states=blip.vision_model(pixels).last_hidden_state,
        is_decoder=False,
    ).last_hidden_state
    torch.testing.assert_close(encoder(pixels, ids), expected)


@pytest.mark.parametrize("kind", RELEVANCES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, kind, history_encoder):
    s, context = (
        story("visualization"),
        awake(StoryContext(8, context_layers=1, heads=2, relevance=kind)),
    )
    frames = frame_mask("weighted", 3, "visualization")
    mask = token_mask(frames, s["caption_mask"], s["history_mask"])

    def run(module, dtype):
        return module(s["captions"].to(dtype), s["histories"].to(dtype), mask)

    def weigh(module, states):
        return module.relevance(states, frames, s["caption_mask"], s["history_mask"])

    exact = run(context, torch.float32)
    exact_weights = weigh(context, exact)
    half = context.to(dtype)
    rough = run(half, dtype)
    assert rough.dtype == dtype
    torch.testing.assert_close(rough.float(), exact, atol=0.3, rtol=0.05)
    weights = weigh(half, rough)
    assert weights.dtype == torch.float32
    loose = dict(atol=0.05, rtol=0) if kind == "null" else {}  # only its sums are not fixed
    torch.testing.assert_close(weights.sum(-1), exact_weights.sum(-1), **loose)
    states = history_encoder.to(dtype)(
        torch.randn(1, 3, 16, 16, dtype=dtype), torch.full((1, 8), 6)
    )
    assert states.dtype == dtype and torch.isfinite(states).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_numbers_on_cuda(tokenizers, text_encoder, history_encoder):
    s, context = (
        story("continuation"),
        awake(StoryContext(8, context_layers=1, heads=2, relevance=True)),
    )
    frames = frame_mask("weighted", 3, "continuation")

    def run(device):
        there = {name: value.to(device) for name, value in s.items()}
        module = context.to(device)
        mask = token_mask(frames, there["caption_mask"], there["history_mask"], there["dropped"])
        states = module(there["captions"], there["histories"], mask)
        weights = module.relevance(
            states, frames, there["caption_mask"], there["history_mask"], dropped=there["dropped"]
        )
        nulls = (
            null_caption_states(text_encoder.to(device), null_caption_ids(tokenizers[0])),
            null_history_states(history_encoder.to(device), null_caption_ids(tokenizers[1])),
        )
        return [x.detach().cpu() for x in (states, weights, *nulls)]

    for there, here in zip(run("cuda"), run("cpu")):
        torch.testing.assert_close(there, here, atol=1e-4, rtol=1e-3)
