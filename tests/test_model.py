"The whole model against a second program: AR-LDM's prediction assembled by hand, and the weights that start as nothing."

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch.testing import assert_close

from causal_story.data import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD, StoryCollator, convert_stories
from causal_story.experiments import story_records
from causal_story.model import story_loss
from causal_story.pipeline import story_pipeline
from causal_story.storyworld import make_stories
from causal_story.training import TrainingConfig, check_history

TASKS = ("visualization", "continuation")


@pytest.fixture(scope="module")
def pipe():
    pipe = story_pipeline("miniature", adapter_width=8, context_layers=1, history_policy="weighted")
    with torch.no_grad():  # embeddings that matter; adapters, layer and relevance stay untrained
        for table in (pipe.story_context.type_embedding, pipe.story_context.time_embedding):
            table.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    return pipe


def batch_of(pipe, task, lengths=(5, 4)):
    "Two stories of unequal length as the collator gives them, with noise and timesteps."
    records = story_records([make_stories(1, seed=k, n_frames=n)[0] for k, n in enumerate(lengths)])
    collator = StoryCollator(
        pipe.tokenizer,
        pipe.history_tokenizer,
        pipe.vae.config.sample_size,
        pipe.history_encoder.config["vision_config"]["image_size"],
        pipe.max_length,
        task,
    )
    batch = collator(
        [
            dict(id=r.id, index=k, captions=r.captions, frames=r.frames, truth=None)
            for k, r in enumerate(records)
        ]
    )
    V, generator = batch["caption_ids"].shape[1], torch.Generator().manual_seed(2)
    noisy = torch.randn(2, V, pipe.unet.config.in_channels, 8, 8, generator=generator)
    return (
        batch,
        noisy,
        torch.randint(0, 1000, (2, V), generator=generator),
        torch.rand(2, V, generator=generator) < 0.4,
    )


@torch.no_grad()
def by_hand(pipe, batch, noisy, timesteps, dropped, task):
    "One frame at a time, AR-LDM's words in AR-LDM's order (FACTS of its code: context, masks, null rows), a U-Net without adapters."
    unet = UNet2DConditionModel.from_config(pipe.unet.config).eval()
    unet.load_state_dict(
        {name: value for name, value in pipe.unet.state_dict().items() if name in unet.state_dict()}
    )
    type_table, time_table = (
        pipe.story_context.type_embedding.weight,
        pipe.story_context.time_embedding.weight,
    )
    empty = lambda tokenizer: (
        tokenizer(
            "",
            padding="max_length",
            truncation=True,
            max_length=pipe.max_length,
            return_tensors="pt",
        ).input_ids
    )
    size = pipe.history_encoder.config["vision_config"]["image_size"]
    black = (
        ((0 - torch.tensor(CLIP_IMAGE_MEAN)) / torch.tensor(CLIP_IMAGE_STD))
        .view(1, 3, 1, 1)
        .repeat(1, 1, size, size)
    )
    null_caption = pipe.text_encoder(empty(pipe.tokenizer)).last_hidden_state[0]
    null_block = pipe.history_encoder(black, empty(pipe.history_tokenizer))[0]
    out, (B, V), given = torch.zeros_like(noisy), noisy.shape[:2], int(task == "continuation")
    for b in range(B):
        for i in range(V):
            if not batch["frame_valid"][b, i]:
                continue
            nothing = bool(dropped[b, i])
            caption = pipe.text_encoder(
                batch["caption_ids"][b, i][None], attention_mask=batch["caption_mask"][b, i][None]
            ).last_hidden_state[0]
            tokens, seen = (
                [(null_caption if nothing else caption) + type_table[0]],
                [torch.ones(pipe.max_length).bool() if nothing else batch["caption_mask"][b, i]],
            )
            for k in range(i + given):  # blocks strictly before the frame; the given one always
                block = pipe.history_encoder(
                    batch["history_frames"][b, k][None],
                    batch["history_ids"][b, k][None],
                    batch["history_mask"][b, k][None],
                )[0]
                tokens.append((null_block if nothing else block) + type_table[1] + time_table[k])
                seen.append(
                    torch.ones(pipe.max_length).bool() if nothing else batch["history_mask"][b, k]
                )
            visible = torch.cat(seen)
            out[b, i] = unet(
                noisy[b, i][None], timesteps[b, i], torch.cat(tokens)[visible][None]
            ).sample[0]  # what is hidden is simply not there
    return out


@pytest.mark.parametrize("task", TASKS)
def test_untrained_parts_predict_as_ar_ldm(pipe, task):
    batch, noisy, timesteps, dropped = batch_of(pipe, task)
    assert dropped.any() and not dropped.all() and not batch["frame_valid"].all()
    expected = by_hand(pipe, batch, noisy, timesteps, dropped, task)
    with torch.no_grad():
        for layer in (False, True):  # the context layer starts as nothing too
            got, _ = pipe.as_model()(
                batch, noisy, timesteps, "full", task=task, dropped=dropped, context_layer=layer
            )
            assert_close(
                got[batch["frame_valid"]], expected[batch["frame_valid"]], atol=1e-5, rtol=1e-5
            )
        other, _ = pipe.as_model()(batch, noisy, timesteps, "none", task=task, dropped=dropped)
        assert (other - expected)[
            batch["frame_valid"] & ~dropped
        ].abs().max() > 1e-2  # the history does matter here


@pytest.mark.parametrize("task", TASKS)
def test_weighted_starts_exactly_as_full(pipe, task):
    batch, noisy, timesteps, dropped = batch_of(pipe, task)
    with torch.no_grad():
        (full, _), (weighted, told) = (
            pipe.as_model()(batch, noisy, timesteps, policy, task=task, dropped=dropped)
            for policy in ("full", "weighted")
        )
    assert_close(weighted, full, atol=1e-5, rtol=1e-5)
    assert told.relevance.shape == (2, noisy.shape[1], batch["history_ids"].shape[1])  # (B, V, F)
    assert (told.relevance >= 0).all()


@pytest.mark.parametrize("task", TASKS)
def test_the_denoising_loss_reaches_relevance(as_if_tuned, task):
    pipe = as_if_tuned()
    model = pipe.as_model()
    batch, *_ = batch_of(pipe, task)
    model.requires_grad_(False)
    model.story_context.relevance_head.requires_grad_(True)
    story_loss(model, dict(batch, keys=[(0, 0, 0), (0, 0, 1)]), "weighted", None, task).backward()
    assert all(
        p.grad is not None and p.grad.abs().max() > 0
        for p in model.story_context.relevance_head.parameters()
    )


# ---------------------------------------------------------------- what cannot be trained is refused before anything is computed


@pytest.mark.parametrize(
    "lengths, settings, named",
    [
        ((3, 4), {}, "has 3 frames, story .* 4: stories of one length"),
        ((5, 5), dict(history_policy="local"), "window"),
        ((10, 10), {}, "10 frames; this story context knows at most 9"),
    ],
)
def test_training_refuses_before_it_reads(tmp_path, monkeypatch, lengths, settings, named):
    import causal_story.experiments as experiments

    class Story:
        def __init__(self, n):
            self.captions = ["Milo waves."] * n

        def truth(self):
            return None

        def frames(self, size, take=0):
            return [Image.new("RGB", (size, size))] * len(self.captions)

    convert_stories(dict(train=[Story(n) for n in lengths]), tmp_path / "a.h5", progress=False)
    monkeypatch.setattr(
        experiments, "cache_stories", lambda *_, **__: pytest.fail("something was computed")
    )
    with pytest.raises(ValueError, match=named):
        experiments.train_stories(
            story_pipeline("miniature", **settings),
            tmp_path / "a.h5",
            TrainingConfig(steps=1, batch_size=1),
            progress=False,
        )


def test_relevance_that_is_not_there_cannot_be_trained():
    pipe = story_pipeline("miniature", history_policy="full")
    pipe.story_context.relevance_head = None
    with pytest.raises(ValueError, match="relevance=True"):
        check_history(pipe.as_model(), "weighted", None, 5)
    check_history(pipe.as_model(), "full", None, 5)
