"""The feature cache: equal to computing, once for every picture, stale or foreign ones refused."""

from collections import namedtuple

import pytest
import torch
from PIL import Image
from published import parts_of_training

import causal_story.features as features
from causal_story.data import StoriesInMemory, StoryDataset, StoryRecord
from causal_story.features import (
    FeatureCache,
    StoryBatches,
    _tiles_in_order,
    cache_path,
    cache_settings,
    contents_hash,
    open_cache,
    scan_stories,
    write_cache,
)
from causal_story.raw import convert_folder, write_folder
from causal_story.recipes import find_recipe
from causal_story.storyworld import make_stories
from causal_story.training import TrainingConfig, make_accelerator
from causal_story.tuning import recipe_loss


def losses(model, batches, steps=4):
    loss = recipe_loss(find_recipe("causal-story", "full"), make_accelerator(batches.config))
    with torch.no_grad():
        return torch.stack([loss(model, batches(step), step) for step in range(steps)])


@pytest.mark.parametrize("words", [True, False], ids=["words train", "captions kept"])
def test_batches_from_the_cache_are_those_from_pictures(world, tmp_path, words):
    "Stories of three and five frames in one batch, both tasks, the loss of every step."
    model, dataset, collator = parts_of_training(world)
    if not words:
        model.text_encoder.requires_grad_(False)
    settings = cache_settings(model, dataset, collator)
    options = dict(batch_size=4, progress=False)
    write_cache(tmp_path / "c.h5", model, dataset, collator, settings, **options)
    cache = FeatureCache(tmp_path / "c.h5", settings)
    assert {"latent_mean", "latent_std", "image_features"} <= set(cache.file)
    assert ("caption_states" in cache.file) is not words
    config = TrainingConfig(batch_size=3)
    kept, fresh = (StoryBatches(dataset, collator, config, cache=c) for c in (cache, None))
    torch.testing.assert_close(losses(model, kept), losses(model, fresh), rtol=1e-5, atol=0)
    _, batch = kept(0)
    assert "frames" not in batch and batch["latent_mean"].shape[2:] == (4, 8, 8)


def test_a_cache_in_memory_is_that_of_a_file(world, tmp_path):
    "The same stories, the history as the autoencoder shows it."
    model, _, collator = parts_of_training(world)
    stories = make_stories(3, seed=5)
    write_folder(dict(train=stories), tmp_path / "raw", size=64)
    data = convert_folder(tmp_path / "raw", tmp_path / "stories.h5", progress=False)
    config = TrainingConfig(batch_size=2)
    found = []
    for dataset in (StoryDataset(data, "train"), StoriesInMemory(stories)):
        cache = open_cache(model, dataset, collator, reconstructed=True, progress=False)
        found.append(losses(model, StoryBatches(dataset, collator, config, cache=cache), 2))
        cache.close()
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


@pytest.mark.parametrize("latents", [False, True], ids=["nothing kept", "latents kept"])
def test_without_a_cache_the_history_is_shown_alike(world, latents):
    "Reconstructed is reconstructed: what a recipe says does not depend on what is kept."
    model, dataset, collator = parts_of_training(world)
    vision = model.history_encoder.vision
    config = TrainingConfig(batch_size=3)

    def batch_of(cache, **options):
        return StoryBatches(dataset, collator, config, cache=cache, **options)(0)[1]

    cache = open_cache(model, dataset, collator, reconstructed=True, progress=False)
    expected = batch_of(cache)["image_features"]
    cache.close()
    cache = None
    if latents:
        vision.requires_grad_(True)  # what vision says is not kept then
        cache = open_cache(model, dataset, collator, reconstructed=True, progress=False)
        assert "image_features" not in cache.file and "latent_mean" in cache.file
    true, shown = batch_of(cache), batch_of(cache, shown_by=model.vae)
    n_blocks = expected.shape[1]
    valid = shown["history_valid"][:, :n_blocks]
    differences = []
    for batch in (true, shown):
        pictures = batch["history_frames"][:, :n_blocks]
        with torch.no_grad():
            found = model.history_encoder.image_features(pictures.flatten(0, 1))
        differences.append((found.view_as(expected) - expected)[valid].abs().max().item())
    assert differences[1] < 0.01  # pictures are rounded to bytes: one may tip over
    assert differences[0] > 20 * differences[1]


def test_two_caches_in_memory_live_side_by_side(world):
    "Also where the first was never closed, because somebody interrupted a cell."
    model, _, collator = parts_of_training(world)
    stories = [StoriesInMemory(make_stories(1, seed=seed, n_frames=3)) for seed in (1, 2)]
    first, second = (open_cache(model, one, collator, progress=False) for one in stories)
    assert first.pictures != second.pictures
    first.close()
    assert second.rows("latent_mean", [0]).isfinite().all()
    second.close()


def test_half_precision_is_nearly_the_same(world, tmp_path):
    model, dataset, collator = parts_of_training(world)
    config, found = TrainingConfig(batch_size=3), []
    for half in (False, True):
        settings = cache_settings(model, dataset, collator, half)
        path = tmp_path / f"{half}.h5"
        write_cache(path, model, dataset, collator, settings, progress=False)
        batches = StoryBatches(dataset, collator, config, cache=FeatureCache(path, settings))
        found.append(losses(model, batches, 2))
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, rtol=1e-3, atol=0)
    whole, short = ((tmp_path / f"{half}.h5").stat().st_size for half in (False, True))
    assert short < 0.6 * whole


def test_a_picture_is_kept_once(tmp_path):
    stories = make_stories(2, seed=5)
    write_folder(dict(train=[*stories, *stories]), tmp_path / "raw", size=64)
    data = convert_folder(tmp_path / "raw", tmp_path / "twice.h5", progress=False)
    dataset = StoryDataset(data, "train")
    contents = scan_stories(dataset, progress=False)
    assert len(dataset) == 4 and contents.n_tiles == len(contents.pictures) <= 10


def test_a_story_is_decoded_once_however_many_tiles_its_pictures_have(world, monkeypatch):
    pictures = [Image.new("RGB", (8, 8 * n), (40 * n, 10 * n, 200)) for n in (5, 1, 3)]
    for n, picture in enumerate(pictures):
        for tile in range(picture.height // 8):
            picture.putpixel((0, 8 * tile), (n, tile, 0))
    story = StoryRecord("tiles", ["one", "two", "three \ud800"], pictures, None, None)
    dataset = StoriesInMemory([story, story])
    asked = []
    strips = StoriesInMemory.strips
    monkeypatch.setattr(
        StoriesInMemory, "strips", lambda self, k: asked.append(k) or strips(self, k)
    )
    tiles = list(_tiles_in_order(dataset, scan_stories(dataset, progress=False)))
    assert [tile.getpixel((0, 0))[:2] for tile in tiles] == [
        *((0, k) for k in range(5)),
        (1, 0),
        *((2, k) for k in range(3)),
    ]
    assert asked == [0]

    model, _, collator = parts_of_training(world)
    model.text_encoder.requires_grad_(False)
    settings = cache_settings(model, dataset, collator)
    cache = FeatureCache(write_cache(None, model, dataset, collator, settings, progress=False))
    assert cache.picture(dataset.stored(0).images[2]) == (6, 3)
    assert cache.rows("latent_mean", range(9)).isfinite().all()
    cache.caption("three \ud800")


def test_other_weights_have_another_cache_and_a_foreign_one_is_refused(world, tmp_path):
    model, dataset, collator = parts_of_training(world)
    settings = cache_settings(model, dataset, collator)
    path = tmp_path / "c.h5"
    write_cache(path, model, dataset, collator, settings, progress=False)
    with torch.no_grad():
        model.vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-7
    changed = cache_settings(model, dataset, collator)
    assert cache_path(world.data, changed) != cache_path(world.data, settings)
    with pytest.raises(ValueError, match="other vae"):
        FeatureCache(path, changed)
    with pytest.raises(ValueError, match="made from other data"):
        FeatureCache(path).picture(b"?")
    with pytest.raises(ValueError, match="made from other data"):
        FeatureCache(path).caption("?")
    with pytest.raises(ValueError, match="not a cache"):
        FeatureCache(world.data)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut short"):
        FeatureCache(path, settings)
    with pytest.raises(FileNotFoundError, match="no such cache"):
        open_cache(model, dataset, collator, build=False)


def test_other_settings_have_another_cache(world):
    model, dataset, collator = parts_of_training(world)

    def path(**options):
        return cache_path(world.data, cache_settings(model, dataset, collator, **options))

    plain = path()
    assert plain == path()
    assert len({plain, path(half=True), path(reconstructed=True)}) == 3
    collator.history_size = 16
    assert path() != plain


def test_too_little_disk_is_said_before_anything_starts(world, tmp_path, monkeypatch):
    model, dataset, collator = parts_of_training(world)
    settings = cache_settings(model, dataset, collator)
    usage = namedtuple("usage", "total used free")(10, 9, 1000)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(model.vae, "encode", None)
    with pytest.raises(OSError, match="only 0.00 GB are free. Nothing was started"):
        write_cache(tmp_path / "c.h5", model, dataset, collator, settings, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_no_cache(world, tmp_path, monkeypatch):
    model, dataset, collator = parts_of_training(world)
    settings = cache_settings(model, dataset, collator)
    rows, calls = features._tile_rows, []

    def fails(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rows(*arguments)

    monkeypatch.setattr(features, "_tile_rows", fails)
    options = dict(batch_size=4, progress=False)
    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path / "c.h5", model, dataset, collator, settings, **options)
    assert not list(tmp_path.iterdir())


def test_nothing_is_kept_of_an_autoencoder_that_trains(world):
    model, dataset, collator = parts_of_training(world)
    model.vae.requires_grad_(True)
    with pytest.raises(ValueError, match="autoencoder trains"):
        cache_settings(model, dataset, collator)


def test_stories_in_memory_find_their_cache_again(world, tmp_path):
    "Runs of an experiment share it; other stories do not."
    model, _, collator = parts_of_training(world)
    stories = StoriesInMemory(make_stories(2, seed=1, n_frames=3))
    first = open_cache(model, stories, collator, folder=tmp_path / "kept", progress=False)
    again = open_cache(model, stories, collator, folder=tmp_path / "kept", build=False)
    assert again.path == first.path and again.path.parent == tmp_path / "kept"
    in_memory = open_cache(model, stories, collator, progress=False)
    for name in ("latent_mean", "image_features"):
        torch.testing.assert_close(again.rows(name, [0, 1]), in_memory.rows(name, [0, 1]))

    turned = StoriesInMemory(make_stories(2, seed=1, n_frames=3)[::-1])
    assert contents_hash(turned) != contents_hash(stories)
    with pytest.raises(FileNotFoundError):
        open_cache(model, turned, collator, folder=tmp_path / "kept", build=False)
    for cache in (first, again, in_memory):
        cache.close()
