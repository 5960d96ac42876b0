"""Stories as pictures."""

import numpy as np
import pytest
from story_samples import ORANGE, ToyStory

from causal_story.figures import compact, show_story


def test_show_story_makes_a_picture(tmp_path):
    story = ToyStory(0)
    rows = [("truth", story.frames()), ("drawn", [None, *story.frames()[1:]])]
    for figure in (
        show_story(story.frames(), story.captions, title="A title", given=1),
        show_story(rows=rows, captions=story.captions),
        show_story([np.asarray(frame) for frame in story.frames()]),
    ):
        shown = compact(figure, colours=32)
        assert shown.mode == "P" and shown.width > 900 and shown.height > 190
        assert np.abs(np.asarray(shown.convert("RGB")).astype(int) - ORANGE).sum(-1).min() < 20
    for nothing in ({}, {"frames": []}, {"rows": []}):
        with pytest.raises(ValueError, match="at least one frame"):
            show_story(**nothing)


def test_captions_are_shown_as_they_were_written(tmp_path):
    "A dollar is no mathematics, a backslash no command, half a letter no error."
    captions = ["costs $5 or $6", r"a $\frac{1}$ b", "half \ud83d", "_x^2_", "{}"]
    figure = show_story(ToyStory(0).frames(), captions, title="$1", rows=None)
    figure.savefig(tmp_path / "story.pdf")
    found = {text.get_text().replace("\n", " ") for text in figure.texts}
    assert {"costs $5 or $6", r"a $\frac{1}$ b", "half \ufffd", "$1"} <= found
    assert not any(text.get_parse_math() for text in figure.texts)
