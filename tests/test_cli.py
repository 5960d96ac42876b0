"What 14_command_line need not show: every verb explains itself, wrong requests are one line, sampling options reach the pipeline."
import pytest
from transformers.utils import logging

import causal_story.cli as cli
from causal_story.cli import main
from causal_story.data import convert_folder, write_folder
from causal_story.storyworld import make_stories

VERBS = ("prepare", "pretrain", "train", "sample", "experiment", "demo")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_folder(dict(train=make_stories(2), test=make_stories(2, "test")), folder / "raw", size=64)
    return convert_folder(folder / "raw", folder / "stories.h5", progress=False)


@pytest.fixture(autouse=True)
def no_bars():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as end: main([verb, "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "show this help" in said and len(said.splitlines()) > 5


@pytest.mark.parametrize("words, named", [
    (["pretrain", "{0}/base", "--steps", "unet=3"], "unet=3"),
    (["pretrain", "{0}/base", "--steps", "decoder=0"], "decoder=0"),
    (["train", "{0}/nowhere", "{0}/data.h5", "{0}/out"], "nowhere"),
    (["train", "miniature", "{0}/nowhere.h5", "{0}/out"], "nowhere.h5"),
    (["sample", "{0}/nowhere", "{0}/data.h5"], "nowhere"),
    (["sample", "miniature", "{0}/nowhere.h5"], "nowhere.h5"),
    (["prepare", "folder", "{0}/nowhere", "{0}/out.h5"], "nowhere"),
])
def test_wrong_requests_are_one_line_that_names_what_is_wrong(words, named, tmp_path, capsys):
    assert main([word.format(tmp_path) for word in words]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"causal-story {words[0]}:") and named in said
    assert not list(tmp_path.rglob("*.h5"))


def test_sampling_options_reach_the_pipeline(data, tmp_path, monkeypatch):
    seen = {}
    class Pipe:
        scheduler = None
        def __call__(self, captions, **options):
            seen.update(options)
            raise ValueError("that will do")
    monkeypatch.setattr(cli, "load_pipeline", lambda folder: Pipe())
    words = ["sample", "miniature", data, "--num-inference-steps", 3, "--guidance-scale", 1.5, "--policy", "local", "--window", 2, "--task", "continuation"]
    assert main([str(word) for word in words]) == 1
    assert (seen["num_inference_steps"], seen["guidance_scale"], seen["history_policy"], seen["window"], seen["task"]) == (3, 1.5, "local", 2, "continuation")
    assert seen["source_image"].size == (64, 64)
