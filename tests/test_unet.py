"""What a reader of the U-Net lesson need not see.

Odd attention flags, other dtypes, fresh processes, LoRA files, wrong bases, compiled U-Nets,
stale caches."""

import copy
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from causal_story.unet import (
    STABLE_DIFFUSION_15,
    TUNING_METHODS,
    AttentionRecord,
    BottleneckAdapter,
    ContextMemory,
    CrossAttnAdapterProcessor,
    SelfAttnProcessor,
    UNetAdapters,
    add_adapters,
    attach_adapters,
    cached_context,
    check_processors,
    cross_attention_sites,
    parameter_table,
    record_attention,
    site_channels,
    tiny_unet,
)

N, T, D = 3, 7, 64


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return tiny_unet(sample_size=4, latent_channels=4, width=D, block_channels=(32, 64)).eval()


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    return dict(
        sample=torch.randn(N, 4, 4, 4, generator=generator),
        timestep=torch.tensor([1, 500, 999]),
        encoder_hidden_states=torch.randn(N, T, D, generator=generator),
    )


def predict(unet, inputs, bias=None, mask=None):
    kwargs = None if bias is None else {"context_bias": bias}
    return unet(**inputs, encoder_attention_mask=mask, cross_attention_kwargs=kwargs).sample


def enliven(tuning, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tuning.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator).to(p))
    return tuning


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    heads=st.sampled_from((1, 2, 4)),
    residual=st.booleans(),
    rescale=st.sampled_from((1.0, 2.0)),
    group_norm=st.booleans(),
    norm_cross=st.sampled_from((None, "layer_norm")),
    qk_norm=st.sampled_from((None, "layer_norm")),
    cross=st.booleans(),
    mask_share=st.sampled_from((None, 0.3, 0.8)),
)
def test_equals_the_stock_processor_for_every_flag(
    seed, heads, residual, rescale, group_norm, norm_cross, qk_norm, cross, mask_share
):
    torch.manual_seed(seed)
    attn = Attention(
        query_dim=16,
        cross_attention_dim=12 if cross else None,
        heads=heads,
        dim_head=8,
        bias=True,
        residual_connection=residual,
        rescale_output_factor=rescale,
        norm_num_groups=4 if group_norm else None,
        cross_attention_norm=norm_cross if cross else None,
        qk_norm=qk_norm,
    ).eval()
    pixels, context = torch.randn(2, 9, 16), torch.randn(2, 5, 12) if cross else None
    tokens = 5 if cross else 9
    mask = (
        None if mask_share is None else -10000.0 * (torch.rand(2, 1, tokens) < mask_share).float()
    )
    attn.set_processor(AttnProcessor2_0())
    stock = attn(pixels, encoder_hidden_states=context, attention_mask=mask)
    attn.set_processor(CrossAttnAdapterProcessor())
    assert_close(
        attn(pixels, encoder_hidden_states=context, attention_mask=mask),
        stock,
        atol=1e-6,
        rtol=1e-5,
    )


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), copies=st.lists(st.integers(1, 4), min_size=5, max_size=5))
def test_a_bias_of_log_m_is_m_copies_of_the_token(seed, copies):
    torch.manual_seed(seed)
    attn = Attention(
        query_dim=16,
        cross_attention_dim=12,
        heads=2,
        dim_head=8,
        processor=CrossAttnAdapterProcessor(),
    ).eval()
    pixels, context = torch.randn(2, 9, 16), torch.randn(2, 5, 12)
    biased = attn(
        pixels, encoder_hidden_states=context, context_bias=torch.tensor(copies).log().expand(2, -1)
    )
    copied = attn(
        pixels, encoder_hidden_states=context.repeat_interleave(torch.tensor(copies), dim=1)
    )
    assert_close(biased, copied, atol=1e-6, rtol=1e-5)


def test_bias_differs_between_rows_and_is_broadcast_over_heads_and_pixels_only(base, inputs):
    unet = add_adapters(copy.deepcopy(base), method="none").unet
    bias = torch.zeros(N, T)
    bias[1, 2] = 3
    moved = (predict(unet, inputs, bias) - predict(unet, inputs)).abs().flatten(1).amax(1)
    assert moved[0] == 0 and moved[1] > 1e-3 and moved[2] == 0


def test_bias_and_mask_add_up(base, inputs):
    unet = add_adapters(copy.deepcopy(base), method="none").unet
    mask = torch.ones(N, T, dtype=torch.bool)
    mask[:, 3] = False
    bias = torch.randn(N, T)
    louder = bias.clone()
    louder[:, 3] = 50
    assert_close(
        predict(unet, inputs, louder, mask), predict(unet, inputs, bias, mask), atol=0, rtol=0
    )
    assert not torch.allclose(
        predict(unet, inputs, bias, mask), predict(unet, inputs, mask=mask), atol=1e-4
    )
    assert_close(
        predict(unet, inputs, bias, mask.float()), predict(unet, inputs, bias, mask), atol=0, rtol=0
    )


def test_kinds_of_attention_that_are_refused():
    attn = Attention(
        query_dim=16,
        cross_attention_dim=12,
        heads=2,
        dim_head=8,
        added_kv_proj_dim=6,
        norm_num_groups=4,
    )
    with pytest.raises(ValueError, match="another kind"):
        CrossAttnAdapterProcessor()(attn, torch.randn(2, 9, 16), torch.randn(2, 5, 12))
    attn = Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8)
    with pytest.raises(ValueError, match=r"\(N, H\*W, C\)"):
        CrossAttnAdapterProcessor()(attn, torch.randn(2, 16, 3, 3), torch.randn(2, 5, 12))


@pytest.mark.parametrize("wrong", [torch.ones(N, T + 1), torch.ones(N, T - 1), torch.ones(1, T)])
def test_mask_or_bias_of_another_shape_is_refused(base, inputs, wrong):
    unet = add_adapters(copy.deepcopy(base), method="none").unet
    with pytest.raises(ValueError, match="encoder_attention_mask must be"):
        predict(unet, inputs, mask=wrong)
    with pytest.raises(ValueError, match="context_bias must be"):
        predict(unet, inputs, bias=wrong)


@pytest.mark.parametrize("method", TUNING_METHODS)
def test_every_method_starts_as_the_frozen_unet(base, inputs, method):
    unet = add_adapters(copy.deepcopy(base), 4, method).unet
    mask = torch.rand(N, T) < 0.7
    mask[:, 0] = True
    assert_close(
        predict(unet, inputs, torch.zeros(N, T), mask),
        predict(base, inputs, mask=mask),
        atol=1e-6,
        rtol=1e-5,
    )


def expected_names(model, method):
    "Written out once more, by hand, from the table of the notebook."
    rule = {
        "adapter": lambda n: n.startswith("adapters."),
        "attention": lambda n: n.startswith("unet.") and "attentions" in n,
        "lora": lambda n: "lora_A" in n or "lora_B" in n,
        "full": lambda n: n.startswith("unet."),
        "none": lambda n: False,
    }[method]
    return {name for name, _ in model.named_parameters() if rule(name)}


def both_of(tuning):
    parts = dict(unet=tuning.unet)
    if tuning.module is not None:
        parts["adapters"] = tuning.module
    return nn.ModuleDict(parts)


@pytest.mark.parametrize("method", TUNING_METHODS)
def test_gradient_reaches_what_the_method_names_and_nothing_else(base, inputs, method):
    tuning = enliven(add_adapters(copy.deepcopy(base), 4, method))
    model = both_of(tuning)
    loss = predict(tuning.unet, inputs, torch.zeros(N, T, requires_grad=True)).square().mean()
    loss.backward()
    touched = {
        name
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }
    dead = expected_names(model, method) - touched
    assert touched <= expected_names(model, method)
    assert not dead, dead


@pytest.mark.parametrize("method", [m for m in TUNING_METHODS if m != "none"])
def test_two_optimizer_steps_move_all_that_was_named_and_nothing_else(base, inputs, method):
    tuning = add_adapters(copy.deepcopy(base), 4, method)
    model = both_of(tuning)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(2):
        predict(tuning.unet, inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == expected_names(model, method)


def test_gradient_checkpointing_gives_the_same_gradients(base, inputs):
    tuning = enliven(add_adapters(copy.deepcopy(base), 4))
    bias = torch.zeros(N, T, requires_grad=True)

    def gradients():
        tuning.module.zero_grad()
        bias.grad = None
        predict(tuning.unet, inputs, bias).square().sum().backward()
        return [p.grad.clone() for p in tuning.parameters()] + [bias.grad.clone()]

    tuning.unet.train()
    expected = gradients()
    tuning.unet.enable_gradient_checkpointing()
    assert_close(gradients(), expected)
    assert all(g.abs().sum() > 0 for g in expected)


def test_a_copy_of_the_whole_stays_wired_and_a_copy_of_the_unet_is_independent(base, inputs):
    tuning = enliven(add_adapters(copy.deepcopy(base), 4))
    whole, alone = copy.deepcopy(both_of(tuning)), copy.deepcopy(tuning.unet)
    expected = predict(tuning.unet, inputs)
    assert_close(predict(whole["unet"], inputs), expected, atol=0, rtol=0)
    enliven_module = whole["adapters"]
    with torch.no_grad():
        for p in enliven_module.parameters():
            p.add_(1)
    assert not torch.allclose(predict(whole["unet"], inputs), expected, atol=1e-3)
    assert_close(predict(alone, inputs), expected, atol=0, rtol=0)
    assert_close(predict(tuning.unet, inputs), expected, atol=0, rtol=0)


def test_half_precision_base_with_full_precision_adapters(base, inputs):
    unet = copy.deepcopy(base).to(torch.bfloat16)
    adapters = UNetAdapters.for_unet(base, 4)
    tuning = enliven(add_adapters(unet, method="adapter", adapters=adapters))
    half = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()}
    out = predict(unet, half, torch.zeros(N, T))
    out.float().square().mean().backward()
    assert out.dtype == torch.bfloat16 and all(
        p.grad.dtype == torch.float32 for p in tuning.parameters()
    )
    reference = predict(enliven(add_adapters(copy.deepcopy(base), 4)).unet, inputs)
    assert_close(out.float(), reference, atol=0.1, rtol=0.1)


def test_new_adapters_take_the_dtype_of_the_unet(base):
    assert {
        p.dtype for p in UNetAdapters.for_unet(copy.deepcopy(base).double(), 4).parameters()
    } == {torch.float64}


def test_the_unet_checkpoint_stays_the_bases(base, inputs, tmp_path):
    tuning = enliven(add_adapters(copy.deepcopy(base), 4))
    tuning.unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == base.state_dict().keys()
    assert_close(predict(loaded.eval(), inputs), predict(base, inputs), atol=0, rtol=0)


def test_round_trip_in_a_fresh_process(base, inputs, tmp_path):
    tuning = enliven(add_adapters(copy.deepcopy(base), 4, activation="silu"))
    tuning.unet.save_pretrained(tmp_path / "unet")
    tuning.module.save_pretrained(tmp_path / "adapters")
    torch.save(inputs, tmp_path / "inputs.pt")
    torch.save(predict(tuning.unet, inputs).detach(), tmp_path / "expected.pt")
    program = """
import sys, torch
from diffusers import UNet2DConditionModel
from causal_story.unet import UNetAdapters, add_adapters
folder = sys.argv[1]
unet = UNet2DConditionModel.from_pretrained(folder + "/unet").eval()
tuning = add_adapters(unet, adapters=UNetAdapters.from_pretrained(folder + "/adapters"))
assert tuning.module.config.width == 4 and tuning.module.config.activation == "silu"
assert all(p.requires_grad for p in tuning.module.parameters())
out = unet(**torch.load(folder + "/inputs.pt")).sample
torch.testing.assert_close(out, torch.load(folder + "/expected.pt"), atol=1e-6, rtol=1e-5)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_adapters_of_another_base_are_refused_with_site_and_channels(base):
    other = tiny_unet(sample_size=4, latent_channels=4, width=D, block_channels=(32, 96))
    before = list(other.attn_processors.values())
    with pytest.raises(ValueError) as error:
        attach_adapters(other, UNetAdapters.for_unet(base, 4))
    for text in (
        "mid_block.attentions.0.transformer_blocks.0.attn2",
        "the adapters have 64",
        "the U-Net has 96",
    ):
        assert text in str(error.value)
    assert list(other.attn_processors.values()) == before


def test_adapters_of_a_deeper_base_are_refused(base):
    deeper = tiny_unet(sample_size=4, latent_channels=4, width=D, block_channels=(32, 64), layers=2)
    with pytest.raises(ValueError, match="no such site.*"):
        attach_adapters(base, UNetAdapters.for_unet(deeper, 4))
    with pytest.raises(ValueError, match="the adapters have none"):
        attach_adapters(deeper, UNetAdapters.for_unet(base, 4))


def test_lora_through_diffusers_own_files(base, inputs, tmp_path):
    tuning = enliven(add_adapters(copy.deepcopy(base), 4, "lora"))
    tuning.unet.save_lora_adapter(tmp_path)
    fresh = copy.deepcopy(base)
    fresh.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert_close(predict(fresh, inputs), predict(tuning.unet, inputs), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(predict(fresh, inputs), predict(base, inputs), atol=1e-3)


@pytest.mark.parametrize("method", [m for m in TUNING_METHODS if m != "none"])
def test_state_dict_of_what_trains_round_trips(base, inputs, method):
    tuned = enliven(add_adapters(copy.deepcopy(base), 4, method))
    fresh = add_adapters(copy.deepcopy(base), 4, method)
    fresh.load_state_dict(tuned.state_dict())
    assert_close(predict(fresh.unet, inputs), predict(tuned.unet, inputs), atol=0, rtol=0)
    with pytest.raises(ValueError, match="another method's"):
        fresh.load_state_dict({"nobody": torch.zeros(1)})


def test_a_second_call_takes_the_adapters_out_again(base, inputs):
    unet = enliven(add_adapters(copy.deepcopy(base), 4)).unet
    assert not torch.allclose(predict(unet, inputs), predict(base, inputs), atol=1e-3)
    add_adapters(unet, method="none")
    assert_close(predict(unet, inputs), predict(base, inputs), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", TUNING_METHODS)
def test_adapters_that_are_there_stay_and_train_only_by_their_own_method(base, inputs, method):
    adapters = enliven(add_adapters(copy.deepcopy(base), 4)).module
    unet = attach_adapters(copy.deepcopy(base), adapters)
    expected = predict(unet, inputs)
    assert not torch.allclose(expected, predict(base, inputs), atol=1e-3)
    tuning = add_adapters(unet, 4, method, adapters)
    assert tuning.module is adapters
    assert_close(predict(unet, inputs), expected, atol=1e-6, rtol=1e-5)
    model = both_of(tuning)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == expected_names(model, method)
    assert {name.split(".", 1)[1] for name in trains} == set(tuning.state_dict())
    if method != "none":
        predict(unet, inputs).square().mean().backward()
    if method != "adapter":
        assert all(p.grad is None for p in adapters.parameters())


@pytest.mark.parametrize("method", TUNING_METHODS)
def test_a_lora_that_is_there_trains_further(base, inputs, method):
    unet = enliven(add_adapters(copy.deepcopy(base), 4, "lora")).unet
    before = predict(unet, inputs)
    again = add_adapters(unet, 8, method)
    assert_close(predict(unet, inputs), before, atol=0, rtol=0)
    trains = set(again.state_dict())
    if method == "lora":
        assert trains == set(add_adapters(copy.deepcopy(base), 4, "lora").state_dict())
    elif method in ("adapter", "none"):
        assert not any("lora_" in name for name in trains)


def test_attaching_again_keeps_the_processors(base, inputs):
    unet = copy.deepcopy(base)
    adapters = enliven(add_adapters(unet, 4)).module
    processors = list(unet.attn_processors.values())
    with record_attention(unet) as record:
        for attached in (adapters, None, adapters):
            attach_adapters(unet, attached)
            assert all(new is old for new, old in zip(unet.attn_processors.values(), processors))
            predict(unet, inputs)
    assert all(len(calls) == 3 for calls in record.mass.values())
    with pytest.raises(ValueError, match="another U-Net"):
        attach_adapters(unet, UNetAdapters.for_unet(tiny_unet(width=D), 4))
    site = "mid_block.attentions.0.transformer_blocks.0.attn2"
    assert cross_attention_sites(unet)[site].processor.adapter is adapters[site]


def test_records_nest(base, inputs):
    unet = add_adapters(copy.deepcopy(base), method="none").unet
    with record_attention(unet) as outer:
        predict(unet, inputs)
        with record_attention(unet) as inner:
            predict(unet, inputs)
        predict(unet, inputs)
    assert {len(calls) for calls in outer.mass.values()} == {2}
    assert {len(calls) for calls in inner.mass.values()} == {1}


def test_processors_that_another_call_took_away_are_named(base, inputs):
    unet = copy.deepcopy(base)
    with pytest.raises(ValueError, match="AttnProcessor2_0.*attach_adapters"):
        check_processors(unet)
    adapters = enliven(add_adapters(unet, 4)).module
    expected = predict(unet, inputs)
    for thief, name in (
        (lambda: unet.set_attn_processor(AttnProcessor2_0()), "AttnProcessor2_0"),
        (lambda: unet.set_attention_slice("auto"), "SlicedAttnProcessor"),
        (unet.fuse_qkv_projections, "FusedAttnProcessor2_0"),
    ):
        check_processors(unet)
        thief()
        with pytest.raises(ValueError, match=f"computed by {name}, "):
            check_processors(unet)
        attach_adapters(unet, adapters)
        assert_close(predict(unet, inputs), expected, atol=0, rtol=0)
    one = cross_attention_sites(unet)["mid_block.attentions.0.transformer_blocks.0.attn2"]
    one.set_processor(SelfAttnProcessor())
    with pytest.raises(ValueError, match="at mid_block.attentions.0.transformer_blocks.0.attn2"):
        check_processors(unet)


@pytest.mark.parametrize("method, compiled", [("adapter", "whole"), ("lora", "inner")])
def test_compiled_unets_have_the_same_sites_names_and_predictions(base, inputs, method, compiled):
    plain = add_adapters(copy.deepcopy(base), 4, method)
    unet = copy.deepcopy(base)
    if compiled == "whole":
        unet = torch.compile(unet, backend="eager")
    else:
        unet.mid_block = torch.compile(unet.mid_block, backend="eager")
    tuning = add_adapters(unet, 4, method)
    check_processors(unet)
    assert set(cross_attention_sites(unet)) == set(cross_attention_sites(base))
    assert {p.site for p in unet.attn_processors.values() if hasattr(p, "site")} == set(
        site_channels(base)
    )
    enliven(plain)
    assert set(tuning.state_dict()) == set(plain.state_dict())
    tuning.load_state_dict(plain.state_dict())
    if method == "lora":  # peft draws lora_A at random: load_state_dict has set both factors
        assert any(p.abs().sum() > 0 for p in tuning.parameters())
    with torch.no_grad(), cached_context(unet), record_attention(unet) as record:
        assert_close(predict(unet, inputs), predict(plain.unet, inputs), atol=1e-5, rtol=1e-5)
    assert set(record.mass) == set(cross_attention_sites(base))


def test_recording_counts_calls_keeps_maps_and_ends_after_an_error(base, inputs):
    unet = add_adapters(copy.deepcopy(base), method="none").unet
    with pytest.raises(KeyError), record_attention(unet, keep_maps=True) as record:
        predict(unet, inputs)
        predict(unet, inputs)
        raise KeyError("interrupted")
    predict(unet, inputs)
    assert set(record.mass) == set(cross_attention_sites(unet)) and all(
        len(calls) == 2 for calls in record.mass.values()
    )
    mid = "mid_block.attentions.0.transformer_blocks.0.attn2"
    assert record.maps[mid][0].shape == (N, 4, T)
    assert_close(record.maps[mid][1].mean(1), record.mass[mid][1])
    assert_close(record.mean_mass().sum(1), torch.ones(N))


def test_recorded_maps_are_the_attention_that_was_applied():
    "With the identity as value and output projection the output of one head is its attention map."
    torch.manual_seed(0)
    attn = Attention(query_dim=5, cross_attention_dim=5, heads=1, dim_head=5, out_bias=False)
    with torch.no_grad():
        attn.to_v.weight.copy_(torch.eye(5))
        attn.to_out[0].weight.copy_(torch.eye(5))
    processor = CrossAttnAdapterProcessor(site="here")
    processor.record = AttentionRecord(keep_maps=True)
    bias, context = torch.randn(2, 5), torch.eye(5).expand(2, -1, -1)
    out = processor(attn, torch.randn(2, 9, 5), context, context_bias=bias)
    assert_close(processor.record.maps["here"][0], out.detach())


def test_recording_needs_our_processors_and_a_call(base):
    with (
        pytest.raises(ValueError, match="add_adapters"),
        record_attention(tiny_unet(block_channels=(32, 32))),
    ):
        pass
    with pytest.raises(ValueError, match="nothing recorded"):
        AttentionRecord().mean_mass()


def test_golden_counts_of_stable_diffusion():
    rows = {(r["method"], r["width"]): r for r in parameter_table(STABLE_DIFFUSION_15)}
    assert rows["full", None]["trained"] == rows["adapter", 64]["total"] == 859_520_964
    assert rows["attention", None]["trained"] == 267_239_360
    assert [rows["adapter", w]["trained"] for w in (32, 64, 128)] == [811_712, 1_610_944, 3_209_408]
    assert round(100 * rows["adapter", 64]["share"], 2) == 0.19


def test_size_and_adapter_share_of_the_miniature():
    unet = tiny_unet()
    total = sum(p.numel() for p in unet.parameters())
    assert 4e6 < total < 6e6
    assert sum(p.numel() for p in UNetAdapters.for_unet(unet, 16).parameters()) < 0.01 * total
    assert set(site_channels(unet).values()) == {96, 128}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda unet: add_adapters(unet, method="prefix"), "method must be one of"),
        (lambda unet: add_adapters(unet, width=0), "width must be at least 1"),
        (lambda unet: tiny_unet(block_channels=(48, 64)), "multiples of head_width"),
    ],
)
def test_bad_input(base, call, message):
    with pytest.raises(ValueError, match=message):
        call(copy.deepcopy(base))


def test_a_unet_without_cross_attention_is_refused():
    plain = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=D,
    )
    with pytest.raises(ValueError, match="no cross-attention"):
        add_adapters(plain)


def test_adapter_is_the_formula():
    adapter = BottleneckAdapter(6, 3)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    x = torch.randn(2, 4, 6)
    inside = nn.functional.gelu(x @ adapter.down.weight.T + adapter.down.bias)
    assert_close(adapter(x), x + inside @ adapter.up.weight.T + adapter.up.bias)


# ---------------------------------------------------------------- keys and values computed once


def projections(unet):
    return [
        layer for attn in cross_attention_sites(unet).values() for layer in (attn.to_k, attn.to_v)
    ]


def memories(unet):
    "What each site remembers: context -> keys and values; None outside `cached_context`."
    found = [attn.processor.project_context for attn in cross_attention_sites(unet).values()]
    return [project.known if isinstance(project, ContextMemory) else None for project in found]


class Counting:
    "A layer's `forward` that counts its calls."

    def __init__(self, layer):
        self.forward, self.calls = layer.forward, 0

    def __call__(self, x):
        self.calls += 1
        return self.forward(x)


def count_projections(unet):
    counters = []
    for layer in projections(unet):
        counters.append(Counting(layer))
        layer.forward = counters[-1]
    return counters


@pytest.mark.parametrize("method", [None, *TUNING_METHODS])
def test_remembering_changes_no_bit(base, inputs, method):
    unet = copy.deepcopy(base)
    if method is not None:
        enliven(add_adapters(unet, 4, method))
    mask = torch.ones(N, T, dtype=torch.bool)
    mask[1, 3:] = False
    kinds, names = dict(unet.attn_processors), list(unet.state_dict())
    with torch.no_grad():
        expected = predict(unet, inputs, mask=mask)
        with cached_context(unet) as same:
            assert same is unet and list(unet.state_dict()) == names
            for _ in range(3):
                assert torch.equal(predict(unet, inputs, mask=mask), expected)
        assert torch.equal(predict(unet, inputs, mask=mask), expected)
    assert dict(unet.attn_processors) == kinds
    if method is not None:
        assert memories(unet) == [None] * len(memories(unet))


def test_every_projection_runs_once_a_context(base, inputs):
    unet = add_adapters(copy.deepcopy(base), 4).unet
    counters = count_projections(unet)
    other = dict(inputs, encoder_hidden_states=inputs["encoder_hidden_states"][:, :4].clone())
    with torch.no_grad(), cached_context(unet):
        for _ in range(3):
            predict(unet, inputs)
            predict(unet, other)
        assert {c.calls for c in counters} == {2}
    with torch.no_grad():
        predict(unet, inputs)
        predict(unet, inputs)
    assert {c.calls for c in counters} == {4}


def test_attaching_inside_the_block_forgets_nothing(base, inputs):
    unet = copy.deepcopy(base)
    adapters = enliven(add_adapters(unet, 4)).module
    counters = count_projections(unet)
    with torch.no_grad(), cached_context(unet):
        predict(unet, inputs)
        attach_adapters(unet, adapters)
        predict(unet, inputs)
    assert {c.calls for c in counters} == {1}


def test_another_strength_of_a_lora_is_another_answer(base, inputs):
    unet = enliven(add_adapters(copy.deepcopy(base), 4, "lora")).unet
    with torch.no_grad():
        weak = unet(**inputs, cross_attention_kwargs={"scale": 0.25}).sample
        expected = predict(unet, inputs)
        with cached_context(unet):
            assert torch.equal(predict(unet, inputs), expected)
            again = unet(**inputs, cross_attention_kwargs={"scale": 0.25}).sample
            assert torch.equal(again, weak)
            unet.disable_adapters()
            assert_close(predict(unet, inputs), predict(base, inputs), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(weak, expected, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(
    acts=st.lists(
        st.sampled_from(
            ("call", "other", "write", "weight", "swap", "norm", "half", "grad", "copy")
        ),
        min_size=1,
        max_size=8,
    ),
    norm_cross=st.sampled_from((None, "layer_norm")),
)
def test_no_answer_is_stale_whatever_happens_in_between(acts, norm_cross):
    torch.manual_seed(0)
    options = dict(
        query_dim=8,
        cross_attention_dim=6,
        heads=2,
        dim_head=4,
        cross_attention_norm=norm_cross,
        processor=CrossAttnAdapterProcessor(),
    )
    attn = Attention(**options).eval()
    unet = nn.ModuleDict(dict(attn2=attn))
    pixels = torch.randn(2, 5, 8)
    contexts = [torch.randn(2, 3, 6), torch.randn(2, 3, 6)]

    def check(module, context):
        fresh = Attention(**options | dict(processor=CrossAttnAdapterProcessor())).eval()
        fresh.load_state_dict(module.state_dict())
        for _ in range(2):
            found = module(pixels, encoder_hidden_states=context)
            assert torch.equal(found, fresh(pixels, encoder_hidden_states=context))

    with torch.no_grad(), cached_context(unet):
        for act in ["call", *acts]:
            if act == "write":
                contexts[0][:, 1] += 1
            if act == "weight":
                attn.to_k.weight.mul_(1.5)
            if act == "swap":
                attn.to_v.weight = nn.Parameter(torch.randn_like(attn.to_v.weight))
            if act == "norm" and norm_cross:
                attn.norm_cross.weight.mul_(1.5)
            if act == "half":
                with torch.autocast("cpu", torch.bfloat16):
                    check(attn, contexts[0])
            elif act == "grad":
                with torch.enable_grad():
                    check(attn, contexts[0])
            elif act == "copy":
                twin = copy.deepcopy(attn)
                twin.to_k.weight.add_(1)
                check(twin, contexts[0])
            check(attn, contexts[act == "other"])


def test_fresh_contexts_leave_nothing_behind(base, inputs):
    unet = add_adapters(copy.deepcopy(base), method="none").unet
    with torch.no_grad(), cached_context(unet):
        for _ in range(3):
            tokens = inputs["encoder_hidden_states"].clone()
            predict(unet, dict(inputs, encoder_hidden_states=tokens))
        del tokens
        assert all(len(memory) == 0 for memory in memories(unet))
        predict(unet, inputs)
        assert all(len(memory) == 1 for memory in memories(unet))


def test_blocks_nest_and_end_after_an_error(base, inputs):
    unet = add_adapters(copy.deepcopy(base), method="none").unet
    with torch.no_grad(), pytest.raises(KeyError), cached_context(unet):
        expected = predict(unet, inputs)
        outer = memories(unet)
        with cached_context(unet):
            assert torch.equal(predict(unet, inputs), expected)
        assert all(now is before for now, before in zip(memories(unet), outer))
        raise KeyError("interrupted")
    assert memories(unet) == [None] * len(outer)


@pytest.mark.parametrize("method", ["adapter", "lora", "full"])
def test_training_inside_is_training_outside(base, inputs, method):
    def gradients(tuning):
        predict(tuning.unet, inputs).square().mean().backward()
        return {name: p.grad for name, p in tuning.named_parameters()}

    tunings = []
    for _ in range(2):
        torch.manual_seed(0)
        tunings.append(enliven(add_adapters(copy.deepcopy(base), 4, method)))
    expected = gradients(tunings[0])
    with cached_context(tunings[1].unet) as unet:
        with torch.no_grad():
            predict(unet, inputs)
        found = gradients(tunings[1])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_inference_mode_is_served_without_memory(base, inputs):
    unet = add_adapters(copy.deepcopy(base), method="none").unet
    with torch.no_grad():
        expected = predict(unet, inputs)
    with torch.inference_mode(), cached_context(unet):
        own = dict(inputs, encoder_hidden_states=inputs["encoder_hidden_states"].clone())
        assert torch.equal(predict(unet, own), expected)
        assert all(len(memory) == 0 for memory in memories(unet))


def test_there_must_be_a_context():
    with pytest.raises(ValueError, match="no cross-attention"), cached_context(nn.ModuleDict()):
        pass
