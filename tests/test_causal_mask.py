"""Masks against an independent reference, bad input, and properties over random stories."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_story.causal_mask import (
    POLICIES,
    TASKS,
    HistoryPolicy,
    PolicyRule,
    as_policy,
    frame_mask,
    frame_times,
    relevance_bias,
    token_mask,
)


def reference_frame_mask(n_frames, task, window=None, keep_given=True):
    "Story positions counted one by one: the given frame is position 0, so drawn frames begin at 1."
    rows = []
    for i in range(n_frames):
        now = i if task == "visualization" else i + 1
        row = []
        for block in range(n_frames if task == "visualization" else n_frames + 1):
            earlier = block < now
            near = window is None or now - block <= window
            kept = task == "continuation" and block == 0 and keep_given
            row.append(earlier and (near or kept))
        rows.append(row)
    return torch.tensor(rows)


def reference_token_mask(frames, caption_mask, history_mask, dropped):
    "AR-LDM's rule token by token; frames is (B, V, F)."
    B, V, S = caption_mask.shape
    out = torch.zeros(B, V, (1 + history_mask.shape[1]) * S, dtype=torch.bool)
    for b in range(B):
        for i in range(V):
            tokens = [bool(caption_mask[b, i, s]) or bool(dropped[b, i]) for s in range(S)]
            for k in range(history_mask.shape[1]):
                for s in range(S):
                    tokens.append(
                        bool(frames[b, i, k])
                        and (bool(history_mask[b, k, s]) or bool(dropped[b, i]))
                    )
            out[b, i] = torch.tensor(tokens)
    return out


lengths, tasks = st.integers(1, 8), st.sampled_from(TASKS)
windows = st.none() | st.integers(1, 10)


@given(lengths, tasks, windows, st.booleans())
def test_frame_mask_equals_reference(n, task, window, keep_given):
    policy = "full" if window is None else "local"
    mask = frame_mask(policy, n, task, window, keep_given)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, reference_frame_mask(n, task, window, keep_given))
    assert torch.equal(mask, frame_mask("weighted", n, task, window, keep_given))


@given(lengths, tasks, st.sampled_from(list(POLICIES)), st.integers(1, 10))
def test_nothing_future_is_visible(n, task, policy, window):
    mask = frame_mask(policy, n, task, window if policy in ("local", "weighted") else None)
    future = torch.arange(mask.shape[1])[None] >= frame_times(n, task)[:, None]
    assert not (mask & future).any()
    assert not mask[:, -1].any()


@given(lengths, tasks, st.integers(1, 10), st.booleans())
def test_local_grows_into_full(n, task, window, keep_given):
    small, large = (frame_mask("local", n, task, w, keep_given) for w in (window, window + 1))
    full = frame_mask("full", n, task)
    assert not (small & ~large).any() and not (large & ~full).any()
    assert torch.equal(frame_mask("local", n, task, n + 1, keep_given), full)
    assert small.sum(1).max() <= window + (task == "continuation" and keep_given)


@settings(deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    tasks,
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_token_mask_equals_reference(B, V, task, S, batched, seed):
    generator = torch.Generator().manual_seed(seed)

    def coin(*shape):
        return torch.rand(shape, generator=generator) < 0.5

    frames = frame_mask("full", V, task)
    blocks = frames.shape[1]
    caption_mask, history_mask, dropped = coin(B, V, S), coin(B, blocks, S), coin(B, V)
    per_story = frames & coin(B, V, blocks) if batched else frames.expand(B, V, blocks)
    mask = token_mask(per_story if batched else frames, caption_mask, history_mask, dropped)
    assert torch.equal(mask, reference_token_mask(per_story, caption_mask, history_mask, dropped))
    without = token_mask(per_story, caption_mask, history_mask)
    assert torch.equal(
        without, reference_token_mask(per_story, caption_mask, history_mask, torch.zeros(B, V))
    )
    spread = mask[..., S:].unflatten(-1, (blocks, S)).any(-1)
    assert not (spread & ~per_story).any()


def test_the_shorter_story_of_a_batch_sees_what_it_sees_alone():
    words = torch.arange(6) < torch.tensor([6, 5, 3, 3, 2])[:, None]  # (V, S)
    short = words.clone()
    short[3:] = False
    batch = torch.stack([words, short])
    together = token_mask(frame_mask("full", 5, "visualization"), batch, batch)
    alone = token_mask(frame_mask("full", 3, "visualization"), short[None, :3], short[None, :3])
    assert torch.equal(together[1, :3, :24], alone[0])
    assert not together[1, :3, 24:].any()


@pytest.mark.parametrize(
    "arguments, error, says",
    [
        (dict(policy="causal"), ValueError, "policy is 'causal'"),
        (dict(task="prediction"), ValueError, "task is 'prediction'"),
        (dict(policy="local"), ValueError, "needs window"),
        (dict(policy="local", window=0), ValueError, "window is 0"),
        (dict(policy="weighted", window=-1), ValueError, "window is -1"),
        (dict(policy="local", window=1.5), TypeError, "window is 1.5"),
        (dict(policy="local", window=True), TypeError, "window is True"),
        (dict(policy="full", window=2), ValueError, "takes no window"),
        (dict(policy="none", window=2), ValueError, "takes no window"),
        (dict(n_frames=0), ValueError, "n_frames is 0"),
        (dict(n_frames="five"), TypeError, "n_frames is 'five'"),
    ],
)
def test_frame_mask_refuses(arguments, error, says):
    good = dict(policy="full", n_frames=5, task="visualization")
    with pytest.raises(error, match=says):
        frame_mask(**(good | arguments))


@given(lengths, tasks, st.sampled_from(list(POLICIES)), windows, st.booleans())
def test_a_policy_is_one_value(n, task, name, window, keep_given):
    rule = POLICIES[name]
    allowed = {"none": window is None, "required": window is not None, "optional": True}
    if not allowed[rule.window]:
        with pytest.raises(ValueError, match="window"):
            HistoryPolicy(name, window)
        return
    policy = HistoryPolicy(name, window, keep_given)
    assert torch.equal(policy.mask(n, task), frame_mask(name, n, task, window, keep_given))
    assert policy.weighs == (name == "weighted")
    assert as_policy(policy) is policy and as_policy(policy, window) is policy
    assert as_policy(name, window) == HistoryPolicy(name, window)
    assert HistoryPolicy(**dataclasses.asdict(policy)) == policy
    assert len({policy, HistoryPolicy(name, window, keep_given)}) == 1


def test_policies_in_words():
    assert HistoryPolicy() == as_policy("full")
    assert str(as_policy("full")) == "full"
    assert str(as_policy("weighted", 2)) == "weighted, window 2"
    assert str(HistoryPolicy("local", 1, False)) == "local, window 1, given frame not kept"


def test_two_windows_are_refused_and_so_is_what_is_no_policy():
    with pytest.raises(ValueError, match="'local, window 2' already; window 3"):
        as_policy(HistoryPolicy("local", 2), 3)
    with pytest.raises(ValueError, match="policy is None"):
        as_policy(None)
    with pytest.raises(ValueError, match=r"policy is \['full'\]"):
        as_policy(["full"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        HistoryPolicy().name = "none"


@given(lengths, tasks)
def test_a_new_policy_is_one_entry_and_cannot_see_the_future(n, task):
    rule = PolicyRule(lambda age: age % 2 == 0, window="optional", weighs=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(POLICIES, "every other", rule)
        policy = as_policy("every other", 3)
        mask = policy.mask(n, task)
        assert policy.weighs and str(policy) == "every other, window 3"
        age = frame_times(n, task)[:, None] - torch.arange(mask.shape[1])
        expected = age == 2
        if task == "continuation":
            expected[:, 0] |= (age[:, 0] >= 1) & (age[:, 0] % 2 == 0)
        assert torch.equal(mask, expected)


@pytest.mark.parametrize(
    "change, error, says",
    [
        (dict(frame_mask=torch.ones(2, 3).bool()), ValueError, "frame_mask has shape"),
        (dict(history_mask=torch.ones(2, 4, 4).bool()), ValueError, "history_mask has shape"),
        (dict(history_mask=torch.ones(2, 3, 5).bool()), ValueError, "history_mask has shape"),
        (dict(dropped=torch.ones(3, 2).bool()), ValueError, "dropped has shape"),
        (dict(caption_mask=torch.ones(2, 3, 4)), TypeError, "caption_mask has dtype"),
        (dict(caption_mask=torch.ones(3, 4).bool()), ValueError, "caption_mask has shape"),
    ],
)
def test_token_mask_refuses(change, error, says):
    good = dict(
        frame_mask=frame_mask("full", 3, "visualization"),
        caption_mask=torch.ones(2, 3, 4).bool(),
        history_mask=torch.ones(2, 3, 4).bool(),
        dropped=None,
    )
    with pytest.raises(error, match=says):
        token_mask(**(good | change))


@given(lengths, tasks, windows)
def test_equal_relevance_shifts_nothing(n, task, window):
    mask = frame_mask("weighted", n, task, window)
    relevance = (
        torch.zeros(mask.shape).masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)[None]
    )
    assert torch.equal(
        relevance_bias(relevance, mask, 3), torch.zeros(1, n, (1 + mask.shape[1]) * 3)
    )


def test_relevance_bias_by_hand():
    mask = torch.tensor([[False, False, False], [True, False, False], [True, True, False]])
    relevance = torch.tensor([[[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.75, 0.25, 0.0]]])
    bias = relevance_bias(relevance, mask, n_tokens=2)
    expected = torch.zeros(1, 3, 8)
    expected[0, 2, 2:4], expected[0, 2, 4:6] = math.log(1.5), math.log(0.5)
    torch.testing.assert_close(bias, expected)


def test_relevance_bias_is_bounded_and_differentiable():
    mask = frame_mask("weighted", 3, "visualization")[None]
    relevance = torch.tensor(
        [[[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]], requires_grad=True
    )
    bias = relevance_bias(relevance, mask, n_tokens=2)
    assert torch.isfinite(bias).all()
    assert bias.min().item() == pytest.approx(math.log(1e-6), rel=1e-4)
    bias.sum().backward()
    assert (
        torch.isfinite(relevance.grad).all()
        and relevance.grad[0, 2, 0] != 0
        and relevance.grad[0, 0].abs().sum() == 0
    )


def test_relevance_bias_refuses_a_wrong_shape():
    with pytest.raises(ValueError, match="relevance has shape"):
        relevance_bias(torch.ones(3, 3), torch.ones(3, 3).bool(), 2)
    with pytest.raises(ValueError, match="frame_mask has shape"):
        relevance_bias(torch.ones(1, 3, 3), torch.ones(3, 4).bool(), 2)
