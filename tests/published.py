"""Tiny folders of the published layouts, and a data set, for the tests at full size."""

import shutil
from collections import namedtuple
from pathlib import Path

from causal_story.data import StoryDataset
from causal_story.full_scale import write_tiny_folders
from causal_story.pipeline import CausalStoryPipeline
from causal_story.raw import convert_folder, write_folder
from causal_story.recipes import find_recipe
from causal_story.storyworld import make_stories
from causal_story.tuning import prepare_tuning
from causal_story.words import story_words

World = namedtuple("World", "folder sd blip data")


def make_world(folder: Path) -> World:
    "Folders of Stable Diffusion and BLIP, and stories of three and of five frames."
    stories = [*make_stories(3, seed=1), *make_stories(3, seed=2, n_frames=3)]
    captions = [caption for story in stories for caption in story.captions]
    sd, blip = write_tiny_folders(folder / "tiny", captions + ["dinosaur talks to friends"])
    write_folder(dict(train=stories), folder / "raw", size=64)
    data = convert_folder(folder / "raw", folder / "stories.h5", progress=False)
    return World(folder, sd, blip, data)


def small(world, recipe="causal-story", **options) -> CausalStoryPipeline:
    "A pipeline on the tiny folders; they count as full size."
    options = dict(words=["milo"], max_length=24, image_size=32) | options
    return CausalStoryPipeline.from_base(world.sd, recipe, blip=world.blip, **options)


def taught(world, dataset, recipe="causal-story") -> CausalStoryPipeline:
    "A pipeline that has learned the words of a published data set."
    words, max_length = story_words(dataset)
    return small(world, recipe, words=words, max_length=max_length)


def parts_of_training(world, recipe="causal-story"):
    "A model set to train, its data and its collator."
    pipe = prepare_tuning(small(world, recipe), find_recipe(recipe, "full"))
    return pipe.model.eval(), StoryDataset(world.data, "train"), pipe.collator()


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))
