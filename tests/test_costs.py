"""What is counted is what happens: memory by PyTorch's profiler, tokens by the model's calls."""

import pytest
import torch
from published import parts_of_training, small

from causal_story.costs import full_size_model, full_size_parts, saved_bytes, training_tflop
from causal_story.features import StoryBatches
from causal_story.model import CausalStoryModel, story_loss, trained_by_part
from causal_story.recipes import find_recipe
from causal_story.training import TrainingConfig
from causal_story.tuning import prepare_tuning


def test_counted_memory_is_what_the_profiler_sees(world):
    unet = prepare_tuning(small(world), find_recipe("causal-story", "full")).unet
    latents, context = torch.randn(5, 4, 8, 8), torch.randn(5, 120, 32, requires_grad=True)

    def forward():
        return unet(latents, torch.full((5,), 500), context).sample

    with torch.profiler.profile(profile_memory=True) as profiled:
        out = forward()
    held = sum(event.self_cpu_memory_usage for event in profiled.key_averages())
    held += 4 * (latents.numel() + context.numel())
    assert out.requires_grad and saved_bytes(forward, [unet]) == pytest.approx(held, rel=0.02)


@pytest.mark.parametrize("name", ["causal-story", "released", "ar-ldm"])
def test_the_model_without_weights_trains_what_the_real_one_trains(world, name):
    recipe = find_recipe(name, "full")
    pipe = prepare_tuning(small(world, name), recipe)
    real = {n for n, p in pipe.model.named_parameters() if p.requires_grad}
    names = ("unet", "vae", "text_encoder", "history_encoder")
    parts = {part: getattr(small(world, name), part).to("meta") for part in names}
    counted = full_size_model(parts, recipe, max_length=24)
    assert {n for n, p in counted.named_parameters() if p.requires_grad} == real
    assert trained_by_part(counted) == trained_by_part(pipe.model)


def test_published_figures_of_the_released_configuration():
    "267,239,360 parameters train in its U-Net; adapters of width 64 are 0.19 % of it."
    counts = trained_by_part(full_size_model(full_size_parts(), "released", new_words=False))
    assert counts["unet"][0] == 267_239_360
    counts = trained_by_part(full_size_model(full_size_parts(), new_words=False))
    assert counts["adapters"] == (1_610_944, 1_610_944) and counts["unet"][0] == 0


def test_counted_tokens_are_those_that_the_unet_reads(world, monkeypatch):
    "One story of five frames, no frame without its condition: every U-Net call is looked at."
    from causal_story.costs import _tokens_read

    model, dataset, collator = parts_of_training(world)
    read, predict = [], CausalStoryModel.predict

    def noting(model, noisy, timesteps, conditioning, *arguments):
        read.append((conditioning.mask.clone(), sum(g.mask.numel() for g in conditioning.groups())))
        return predict(model, noisy, timesteps, conditioning, *arguments)

    monkeypatch.setattr(CausalStoryModel, "predict", noting)
    batches = StoryBatches(dataset, collator, TrainingConfig(batch_size=1), ("visualization",))
    task, batch = next(b for b in map(batches, range(6)) if b[1]["frame_valid"].shape[1] == 5)
    for name in ("caption_mask", "history_mask"):  # captions of eight tokens each
        batch[name] = torch.zeros_like(batch[name])
        batch[name][..., :8] = True
    with torch.no_grad():
        story_loss(model, batch, "full", task, drop=0.0)
    mask, tokens = read[0]
    assert mask.sum(-1).flatten().tolist() == [8 * (1 + i) for i in range(5)]
    assert tokens == _tokens_read(5, 24, 8, 0.0)


def test_less_is_computed_where_less_is_seen(world):
    names = ("unet", "vae", "text_encoder", "history_encoder")

    def parts():
        pipe = small(world)
        return {name: getattr(pipe, name).to("meta") for name in names}

    options = dict(n_frames=5, max_length=24)
    everything = training_tflop(parts(), **options)
    ours = training_tflop(parts(), **options, seen=8, cached=True)
    assert everything.keys() == ours.keys()
    assert all(ours[part] <= everything[part] for part in ours)
    assert ours["autoencoder"] == 0 and ours["U-Net"] < everything["U-Net"]
