"""The whole model against a second program: AR-LDM's prediction, assembled by hand."""

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch.testing import assert_close

import causal_story.tuning as tuning
from causal_story.data import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD, StoriesInMemory, convert_stories
from causal_story.model import story_loss
from causal_story.pipeline import CausalStoryPipeline
from causal_story.recipes import Recipe, find_recipe
from causal_story.storyworld import make_stories
from causal_story.training import TrainingConfig
from causal_story.tuning import check_lengths, tune

TASKS = ("visualization", "continuation")


@pytest.fixture(scope="module")
def pipe():
    "Embeddings that matter; adapters, context layer and relevance stay untrained."
    pipe = CausalStoryPipeline.from_base("miniature", replace(find_recipe(), width=8))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for table in (pipe.story_context.type_embedding, pipe.story_context.time_embedding):
            table.weight.normal_(std=0.5, generator=generator)
    return pipe


def batch_of(pipe, task, lengths=(5, 4)):
    "Two stories of unequal length as the collator gives them, noise, timesteps, who is dropped."
    stories = [make_stories(1, seed=k, n_frames=n)[0] for k, n in enumerate(lengths)]
    dataset = StoriesInMemory(stories)
    batch = pipe.collator(task)([dataset[k] for k in range(len(dataset))])
    V = batch["caption_ids"].shape[1]
    generator = torch.Generator().manual_seed(2)
    noisy = torch.randn(2, V, pipe.unet.config.in_channels, 8, 8, generator=generator)
    timesteps = torch.randint(0, 1000, (2, V), generator=generator)
    dropped = torch.rand(2, V, generator=generator) < 0.4
    return batch, noisy, timesteps, dropped


class ByHand:
    """One frame at a time, AR-LDM's words in AR-LDM's order (its context, its masks, its null
    rows), a U-Net without adapters and without our processors."""

    def __init__(self, pipe):
        self.pipe = pipe
        self.unet = UNet2DConditionModel.from_config(pipe.unet.config).eval()
        names = self.unet.state_dict().keys()
        weights = pipe.unet.state_dict()
        self.unet.load_state_dict({name: weights[name] for name in names})
        self.types = pipe.story_context.type_embedding.weight
        self.times = pipe.story_context.time_embedding.weight
        self.null_caption = pipe.text_encoder(self.empty(pipe.tokenizer)).last_hidden_state[0]
        size = pipe.history_encoder.config["vision_config"]["image_size"]
        black = (0 - torch.tensor(CLIP_IMAGE_MEAN)) / torch.tensor(CLIP_IMAGE_STD)
        black = black.view(1, 3, 1, 1).repeat(1, 1, size, size)
        self.null_block = pipe.history_encoder(black, self.empty(pipe.history_tokenizer))[0]

    def empty(self, tokenizer):
        length = self.pipe.max_length
        options = dict(padding="max_length", truncation=True, max_length=length)
        return tokenizer("", return_tensors="pt", **options).input_ids

    def caption(self, batch, b, i):
        ids, mask = batch["caption_ids"][b, i], batch["caption_mask"][b, i]
        return self.pipe.text_encoder(ids[None], attention_mask=mask[None]).last_hidden_state[0]

    def block(self, batch, b, k):
        names = ("history_frames", "history_ids", "history_mask")
        return self.pipe.history_encoder(*[batch[name][b, k][None] for name in names])[0]

    def frame(self, batch, b, i, n_blocks, nothing):
        "Everything that frame i sees: what is hidden is simply not there."
        every_token = torch.ones(self.pipe.max_length).bool()
        caption = self.null_caption if nothing else self.caption(batch, b, i)
        tokens = [caption + self.types[0]]
        visible = [every_token if nothing else batch["caption_mask"][b, i]]
        for k in range(n_blocks):
            block = self.null_block if nothing else self.block(batch, b, k)
            tokens.append(block + self.types[1] + self.times[k])
            visible.append(every_token if nothing else batch["history_mask"][b, k])
        return torch.cat(tokens)[torch.cat(visible)][None]

    def predict(self, batch, noisy, timesteps, dropped, task):
        out = torch.zeros_like(noisy)
        for b, i in batch["frame_valid"].nonzero().tolist():
            n_blocks = i + int(task == "continuation")  # strictly before; the given one always
            context = self.frame(batch, b, i, n_blocks, bool(dropped[b, i]))
            out[b, i] = self.unet(noisy[b, i][None], timesteps[b, i], context).sample[0]
        return out


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_untrained_parts_predict_as_ar_ldm(pipe, task):
    batch, noisy, timesteps, dropped = batch_of(pipe, task)
    valid = batch["frame_valid"]
    assert dropped.any() and not dropped.all() and not valid.all()
    expected = ByHand(pipe).predict(batch, noisy, timesteps, dropped, task)
    options = dict(task=task, dropped=dropped)
    for layer in (False, True):  # the context layer starts as nothing too
        options["context_layer"] = layer
        found, _ = pipe.model(batch, noisy, timesteps, "full", **options)
        assert_close(found[valid], expected[valid], atol=1e-5, rtol=1e-5)
    other, _ = pipe.model(batch, noisy, timesteps, "none", **options)
    # the history does matter here
    assert (other - expected)[valid & ~dropped].abs().max() > 1e-2


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_weighted_starts_exactly_as_full(pipe, task):
    batch, noisy, timesteps, dropped = batch_of(pipe, task)
    options = dict(task=task, dropped=dropped)
    full, _ = pipe.model(batch, noisy, timesteps, "full", **options)
    weighted, conditioning = pipe.model(batch, noisy, timesteps, "weighted", **options)
    assert_close(weighted, full, atol=1e-5, rtol=1e-5)
    relevance = conditioning.relevance
    assert relevance.shape == (2, noisy.shape[1], batch["history_ids"].shape[1])  # (B, V, F)
    assert (relevance >= 0).all()


@pytest.mark.parametrize("task", TASKS)
def test_the_denoising_loss_reaches_relevance(as_if_tuned, task):
    pipe = as_if_tuned()
    batch, *_ = batch_of(pipe, task)
    head = pipe.story_context.relevance_head
    pipe.model.requires_grad_(False)
    head.requires_grad_(True)
    keys = [(0, 0, 0), (0, 0, 1)]
    story_loss(pipe.model, batch | dict(keys=keys), "weighted", task).backward()
    for parameter in head.parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0


# ------------------------------------------- what cannot be trained is refused before computing


class PlainStory:
    def __init__(self, n_frames):
        self.captions = ["Milo waves."] * n_frames

    def truth(self):
        return None

    def frames(self, size, take=0):
        return [Image.new("RGB", (size, size))] * len(self.captions)


@pytest.fixture
def nothing_computed(monkeypatch):
    def computed(*_, **__):
        pytest.fail("something was computed")

    monkeypatch.setattr(tuning, "open_cache", computed)
    monkeypatch.setattr(tuning, "fit", computed)


@pytest.mark.parametrize(
    "n_frames, said",
    [(10, "10 frames; this story context knows at most 9"), (1, "nothing is left to continue")],
)
@pytest.mark.parametrize("in_file", [True, False], ids=["file", "memory"])
def test_training_refuses_before_it_reads(
    tmp_path, nothing_computed, pipe, n_frames, said, in_file
):
    stories = [PlainStory(5), PlainStory(n_frames)]
    if in_file:
        convert_stories(dict(train=stories), tmp_path / "a.h5", progress=False)
        stories = tmp_path / "a.h5"
    trained = [name for name, p in pipe.model.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=said):
        tune(pipe, stories, config=TrainingConfig(steps=1, batch_size=1), progress=False)
    after = [name for name, p in pipe.model.named_parameters() if p.requires_grad]
    assert after == trained


def test_a_policy_without_its_window_is_no_recipe():
    with pytest.raises(ValueError, match="window"):
        Recipe(policy="local")


def test_stories_of_unequal_length_are_no_reason_to_refuse(pipe):
    stories = [PlainStory(3), PlainStory(4)]
    check_lengths(pipe, StoriesInMemory(stories), find_recipe())


def test_relevance_that_is_not_there_cannot_be_trained(nothing_computed):
    recipe = replace(find_recipe("full"), relevance=False)
    pipe = CausalStoryPipeline.from_base("miniature", recipe)
    assert pipe.story_context.relevance_head is None
    with pytest.raises(ValueError, match="relevance is not False"):
        tune(pipe, [PlainStory(5)], "weighted", TrainingConfig(steps=1), progress=False)
    check_lengths(pipe, StoriesInMemory([PlainStory(5)]), recipe)
