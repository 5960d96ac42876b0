"What a reader of library/session need not see: edits in any order, hostile recipes, sudden stops."

import base64
import io
import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

import causal_story.effects as effects
import causal_story.session as session
from causal_story.cartoon import (
    ATTRIBUTES,
    CHARACTERS,
    REMEMBERED,
    SETTINGS,
    Actor,
    Scene,
    render,
)
from causal_story.causal_mask import HistoryPolicy, frame_mask
from causal_story.checks import as_picture
from causal_story.data import StoryRecord
from causal_story.drawing import draw_stories
from causal_story.effects import attention_mass
from causal_story.pipeline import story_generator
from causal_story.raw import convert_folder
from causal_story.session import (
    EXAMPLES,
    RECIPE_KINDS,
    StorySession,
    arcs_png,
    from_recipe,
    known_words,
    look_png,
    named_changes,
    read_recipe,
    recipe,
    replace_word,
    save_story,
    story_changes,
    story_gif,
    story_page,
    unknown_words,
    world_story,
)

CAPTIONS = EXAMPLES["Two on the moon"].captions  # four of them
OTHER = render(Scene("home", (Actor("Milo", "waves", "umbrella", "green"),)), 64, seed=1)


@pytest.fixture(scope="module")
def pipe(as_if_tuned):
    return as_if_tuned(num_inference_steps=2)


def drawn(pipe, captions=CAPTIONS, **options):
    story = StorySession(pipe, captions, **options)
    assert story.draw()
    return story


def as_bytes(pictures):
    return [None if picture is None else picture.tobytes() for picture in pictures]


# ---------------------------------------------------------------- words


@given(st.text(max_size=60))
def test_any_text_can_be_checked(text):
    known = {"milo", "jumps", "a"}
    for word, near in unknown_words(text, known).items():
        assert word in text and word.lower() not in known
        for better in near:
            assert better.lower() in known and word not in unknown_words(
                replace_word(text, word, better), known
            )


def test_known_words_are_whole_words(pipe):
    known = known_words(pipe.history_tokenizer)
    assert {name.lower() for name in CHARACTERS} <= known
    assert "##a" not in known and "b" not in known


# ---------------------------------------------------------------- drawing


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5, 8])
def test_a_stopped_drawing_goes_on_as_if_nothing_had_happened(pipe, stop_at):
    story = StorySession(pipe, CAPTIONS)
    heard = []
    assert story.draw(heard.append, lambda: len(heard) == stop_at) == (stop_at == 8)
    assert len(heard) == stop_at and sum(p is not None for p in story.pictures) == stop_at // 2
    assert story.draw() and as_bytes(story.pictures) == as_bytes(drawn(pipe).pictures)


def test_one_pipeline_draws_for_one_at_a_time(pipe):
    first = StorySession(pipe, CAPTIONS)
    second = StorySession(pipe, CAPTIONS)
    started = threading.Event()
    go = threading.Event()
    thread = threading.Thread(target=lambda: first.draw(lambda step: started.set() or go.wait(20)))
    thread.start()
    assert started.wait(20)
    with pytest.raises(RuntimeError, match="already"):
        second.draw()
    with pytest.raises(RuntimeError, match="drawing"):
        first.forget(0)
    go.set()
    thread.join()
    assert first.complete and second.draw()


def test_a_failing_listener_leaves_a_usable_story(pipe):
    story = StorySession(pipe, CAPTIONS)
    with pytest.raises(ZeroDivisionError):
        story.draw(lambda step: 1 / 0)
    assert story.draw()


@pytest.mark.parametrize(
    "options, problem",
    [
        (dict(task="drawing"), "unknown"),
        (dict(task="continuation"), "source_image"),
        (dict(history_policy="local"), "window"),
        (dict(history_policy="most"), "policy"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(pipe, options, problem):
    with pytest.raises(ValueError, match=problem):
        StorySession(pipe, CAPTIONS, **options)
    with pytest.raises(ValueError, match="captions"):
        StorySession(pipe, ["Milo waves."] * 12)


@pytest.mark.parametrize("task", ["visualization", "continuation"])
def test_the_picture_is_the_pipelines_for_the_same_seed(pipe, task):
    "The one rule for noise: a session draws what story 0 of that seed is drawn as elsewhere."
    given = int(task == "continuation")
    story = drawn(pipe, task=task, seed=11, source_image=OTHER if given else None)
    source = dict(source_image=OTHER, source_caption=CAPTIONS[0]) if given else {}
    out = pipe(CAPTIONS[given:], task=task, generator=story_generator(11, 0), **source)
    assert as_bytes(out.frames[0]) == as_bytes(story.pictures[given:])
    record = StoryRecord("", list(CAPTIONS), [OTHER] * len(CAPTIONS), None)
    elsewhere = draw_stories(pipe, [record], task, seed=11, progress=False)
    assert as_bytes(elsewhere[0]) == as_bytes(story.pictures[given:])


def test_a_policy_may_be_one_value(pipe):
    policy = HistoryPolicy("weighted", 1, keep_given=False)
    story = StorySession(
        pipe, CAPTIONS, OTHER, task="continuation", history_policy=policy, num_inference_steps=1
    )
    assert torch.equal(story.links, policy.mask(3, "continuation")) and not story.links[2, 0]
    assert (story.settings.history_policy, story.settings.window) == ("weighted", 1)
    again = from_recipe(pipe, json.loads(json.dumps(recipe(story))))
    assert torch.equal(again.links, story.links) and again.settings == story.settings


def test_a_policys_name_means_what_it_means_in_a_call(as_if_tuned):
    "A name alone is the checkpoint's policy of that name, window and all; a value is itself."
    pipe = as_if_tuned(window=2, num_inference_steps=1)
    story = drawn(pipe, history_policy="weighted")
    assert torch.equal(story.links, frame_mask("weighted", 4, "visualization", 2))
    out = pipe(CAPTIONS, history_policy="weighted", generator=story_generator(0, 0))
    assert as_bytes(out.frames[0]) == as_bytes(story.pictures)
    assert story.settings == StorySession(pipe, CAPTIONS).settings

    far = StorySession(pipe, CAPTIONS, history_policy=HistoryPolicy("weighted"))
    assert torch.equal(far.links, frame_mask("weighted", 4, "visualization"))
    again = from_recipe(pipe, json.loads(json.dumps(recipe(far))))
    assert torch.equal(again.links, far.links) and again.settings == far.settings


@pytest.mark.parametrize("n", [9, 3])
def test_stories_as_long_as_the_time_table(pipe, n):
    story = drawn(pipe, ["Milo waves."] * n, num_inference_steps=1)
    look = story.look()
    effect = story.effect()
    assert look.mass.shape == effect.shape == (n, n)
    assert Image.open(io.BytesIO(look_png(look, story.pictures, n - 1))).width > 400
    assert 3 <= len(world_story(0, n).captions) <= n


def test_a_session_follows_the_frame_size(as_if_tuned):
    "Given and pinned pictures keep their pixels, and looks are measured where the model draws."
    pipe = as_if_tuned(num_inference_steps=1).use_frame_size(128)
    fine = render(Scene("home", (Actor("Milo", "waves", "umbrella", "green"),)), 128, seed=1)
    story = drawn(pipe, CAPTIONS, source_image=fine, task="continuation")
    assert story.size == 128 and {picture.size for picture in story.pictures} == {(128, 128)}
    assert as_bytes(story.pictures[:1]) == as_bytes([fine])
    story.replace_picture(2, fine)
    assert as_bytes(story.pictures[2:3]) == as_bytes([fine]) and story.draw()
    record = StoryRecord("", list(CAPTIONS), story.pictures, None)
    mass = attention_mass(pipe, [record], "continuation")[0]
    torch.testing.assert_close(story.look().mass, mass, atol=1e-5, rtol=1e-4)
    with Image.open(io.BytesIO(story_gif(story, scale=2))) as gif:
        assert gif.size == (256, 256)


def lying_photo(turn=6, size=64):
    "(photo, upright): a picture whose EXIF tag says how it has to be turned, and what it shows."
    upright = render(Scene("home", (Actor("Milo", "waves", "umbrella", "green"),)), size, seed=1)
    photo = upright.transpose({3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[turn])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    buffer = io.BytesIO()
    photo.save(buffer, "PNG", exif=exif)
    return Image.open(io.BytesIO(buffer.getvalue())), upright


@pytest.mark.parametrize("turn", [3, 6])
def test_a_photo_is_turned_upright_once(pipe, turn):
    "What is shown, drawn on, kept and opened again is the picture that the model reads."
    photo, upright = lying_photo(turn)
    lying, standing = [
        drawn(pipe, task="continuation", source_image=one, num_inference_steps=1)
        for one in (photo, upright)
    ]
    assert as_bytes(lying.pictures) == as_bytes(standing.pictures)
    assert as_picture(lying.pictures[0], "it").tobytes() == upright.tobytes()
    lying.replace_picture(2, photo)
    assert as_bytes(lying.pictures[2:3]) == as_bytes([upright])
    entries = recipe(standing)
    photo.save(buffer := io.BytesIO(), "PNG", exif=photo.getexif())
    entries["pinned"]["0"] = base64.b64encode(buffer.getvalue()).decode()
    assert as_bytes(from_recipe(pipe, entries).pictures[:1]) == as_bytes([upright])


def test_a_deep_grey_picture_is_read_as_the_pipeline_reads_it(pipe):
    "Its 16 bits are scaled, not clipped to white."
    deep = Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16))
    story = StorySession(pipe, CAPTIONS, deep, task="continuation")
    assert as_bytes(story.pictures[:1]) == as_bytes([as_picture(deep, "it")])


# ---------------------------------------------------------------- changing the past

EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("replace"), st.integers(0, 3)),
        st.tuples(st.just("forget"), st.integers(0, 3)),
        st.tuples(st.just("rewrite"), st.integers(0, 3), st.booleans()),
        st.tuples(st.just("link"), st.integers(1, 3), st.integers(0, 2), st.booleans()),
    ),
    min_size=1,
    max_size=4,
)


def edit(story, kind, k, *more):
    "Make an edit; the first position it may change."
    if kind == "replace":
        return story.replace_picture(k, OTHER) or k
    if kind == "forget":
        return story.forget(k) or k + 1
    if kind == "rewrite":
        return story.rewrite(k, "Bruno sleeps in the snow.", more[0]) or k + more[0]
    return story.set_link(k, more[0] % k, more[1]) or k


@settings(max_examples=6)
@given(edits=EDITS, task=st.sampled_from(["visualization", "continuation"]))
def test_edits_in_any_order(pipe, edits, task):
    source = OTHER if task == "continuation" else None
    story = drawn(pipe, source_image=source, task=task, num_inference_steps=1)
    start = as_bytes(story.pictures)
    for each in edits:
        if each[0] == "link" and each[1] < story.given:
            continue
        was = as_bytes(story.pictures)
        n = len(story.past)
        first = edit(story, *each)
        assert len(story.past) == n + 1
        assert story.draw()
        assert as_bytes(story.pictures)[:first] == was[:first]
    direct = pipe(**story.request(), history_frames=[story.pictures[story.given :]]).frames[0]
    for k, picture in enumerate(direct, story.given):
        if k not in story.pinned:
            assert np.abs(np.asarray(picture, int) - np.asarray(story.pictures[k], int)).max() <= 1
    while story.past:
        story.undo()
    assert as_bytes(story.pictures) == start


def test_edits_before_drawing_add_up(pipe):
    story = drawn(pipe)
    was = as_bytes(story.pictures)
    story.set_link(3, 0, False)
    story.rewrite(1, "Luna sleeps.")
    assert [p is None for p in story.pictures] == [False, True, True, True]
    assert as_bytes(story.before) == was
    story.draw()
    assert as_bytes(story.before) == was and story_changes(story)[0] == ["untouched"]


def test_a_forgotten_position_draws_no_look_by_any_path(pipe):
    story = drawn(pipe)
    story.forget(0)
    story.draw()
    look = story.look()
    assert look.mass[:, 0].max() < 1e-6 and look.relevance[:, 0].max() == 0 and look.mass[2, 1] > 0
    was = as_bytes(story.pictures)
    story.replace_picture(0, OTHER)
    story.draw()
    assert as_bytes(story.pictures)[1:] == was[1:]


@pytest.mark.parametrize(
    "task, policy, window",
    [
        ("continuation", "weighted", None),
        ("continuation", "local", 1),
        ("visualization", "none", None),
        ("visualization", "full", None),
    ],
)
def test_looks_and_effect_lie_on_links(pipe, task, policy, window):
    story = drawn(
        pipe,
        source_image=OTHER if task == "continuation" else None,
        task=task,
        history_policy=policy,
        window=window,
    )
    look = story.look()
    effect = story.effect()
    visible = frame_mask(policy, 4 - story.given, task, window)
    assert look.mass.shape == effect.shape == visible.shape
    assert (look.relevance is not None) == (policy == "weighted")
    assert (look.mass[~visible] < 1e-6).all()
    assert (effect[~visible] < 1e-3).all() and (effect[visible] > 0).all()
    assert story.effect(should_stop=lambda: True) is None
    for dpi in (100, 200):
        arcs = arcs_png(None, visible, visible, 100, dpi=dpi)
        assert Image.open(io.BytesIO(arcs)).size == (4 * dpi, 1.5 * dpi)


def test_a_row_of_relevance_sums_to_1_or_less(pipe, as_if_tuned):
    "To 1 where a frame sees a position, to 0 where it sees none, to less if none may be chosen."
    for one, low, high in ((pipe, 0.999, 1.001), (as_if_tuned("weighted-null"), 0.01, 0.99)):
        story = StorySession(one, CAPTIONS)
        story.set_link(2, 0, False)
        story.set_link(2, 1, False)
        for k in range(len(CAPTIONS)):
            story.replace_picture(k, OTHER)
        sums = story.look().relevance.sum(1)
        assert sums[[0, 2]].tolist() == [0, 0] and (low < sums[[1, 3]]).all()
        assert (sums[[1, 3]] < high).all()


def test_changes_are_named(monkeypatch):
    reading = dict(
        setting=np.array([0, 1]),
        presence=np.zeros((2, 6), bool),
        prop=np.zeros((2, 6), int),
        scarf=np.zeros((2, 6), int),
    )
    reading["presence"][:, 0] = True  # in both
    reading["presence"][0, 1] = True  # before only
    reading["presence"][1, 2] = True  # after only
    reading["scarf"][1] = 1
    monkeypatch.setattr(session, "read_frames", lambda reader, frames: reading)
    assert named_changes(None, [OTHER], [OTHER])[0] == [
        f"setting: {SETTINGS[0]} → {SETTINGS[1]}",
        "Milo's scarf: red → blue",
        f"{CHARACTERS[1]} is gone",
        f"{CHARACTERS[2]} appears",
    ]
    with pytest.raises(ValueError, match="same positions"):
        named_changes(None, [OTHER], [])


def test_an_attribute_that_is_added_to_the_world_is_compared_as_well(monkeypatch):
    "By its changes in the explorer, and in the count of what an exchanged frame changes."
    hat = replace(ATTRIBUTES["scarf"], values=("none", "cap"))
    monkeypatch.setitem(ATTRIBUTES, "hat", hat)
    monkeypatch.setattr(session, "REMEMBERED", (*REMEMBERED, "hat"))
    names = ("prop", "scarf", "action", "hat")

    def reading(hats):
        facts = {name: np.zeros((len(hats), 6), int) for name in names}
        presence = np.ones((len(hats), 6), bool)
        facts["hat"][:, 0] = hats
        return facts | dict(setting=np.zeros(len(hats), int), presence=presence)

    monkeypatch.setattr(session, "read_frames", lambda reader, frames: reading([0, 1]))
    assert named_changes(None, [OTHER], [OTHER]) == [["Milo's hat: none → cap"]]
    monkeypatch.setattr(effects, "read_frames", lambda reader, frames: reading(frames))
    assert effects._changed_attributes(None, [[0, 0], [0, 1]]).tolist() == [[0], [1]]


# ---------------------------------------------------------------- keeping


@pytest.fixture(scope="module")
def edited(pipe):
    story = drawn(
        pipe,
        ["Milo <waves> at “home”.", "He jumps.", "Er schläft 🦊."],
        source_image=OTHER,
        task="continuation",
        seed=7,
    )
    story.replace_picture(1, OTHER)
    story.set_link(2, 0, False)
    story.draw()
    return story


def test_half_an_emoji_is_kept(pipe, tmp_path):
    story = StorySession(pipe, [*CAPTIONS[:1], "He jumps. \ud83d"], num_inference_steps=1)
    story.draw()
    folder = save_story(story, tmp_path / "kept")
    assert from_recipe(pipe, read_recipe(folder)).captions == story.captions
    convert_folder(folder, tmp_path / "kept.h5", progress=False)


def test_a_recipe_survives_every_file(pipe, edited, tmp_path):
    folder = save_story(edited, tmp_path / "kept")
    for source in (
        folder,
        folder / "story.png",
        folder / "story.gif",
        (folder / "story.png").read_bytes(),
        (folder / "story.gif").read_bytes(),
    ):
        assert read_recipe(source) == json.loads(json.dumps(recipe(edited)))
    again = from_recipe(pipe, read_recipe(folder))
    assert again.draw() and as_bytes(again.pictures) == as_bytes(edited.pictures)
    with Image.open(folder / "story.gif") as gif:
        assert gif.n_frames >= 2


@given(st.data())
def test_hostile_recipes_are_refused_by_name(pipe, edited, data):
    entries = json.loads(json.dumps(recipe(edited)))
    assert set(entries) == set(RECIPE_KINDS)
    name = data.draw(st.sampled_from(sorted(entries)))
    entries[name] = data.draw(
        st.one_of(
            st.none(),
            st.integers(-3, 99),
            st.text(max_size=5),
            st.lists(st.integers(0, 3), max_size=3),
            st.dictionaries(st.sampled_from(["0", "9", "x"]), st.text(max_size=4), max_size=2),
        )
    )
    try:
        story = from_recipe(pipe, entries)
    except ValueError as error:
        assert str(error)
    else:
        assert len(story.captions) == 3 and story.settings.num_inference_steps > 0
        assert not (story.links & ~frame_mask("full", 2, "continuation")).any()


def test_other_pictures_hold_no_recipe(tmp_path):
    OTHER.save(tmp_path / "plain.png")
    OTHER.save(tmp_path / "comment.gif", comment=b"made by hand")
    (tmp_path / "text.png").write_text("no picture")
    for name in ("plain.png", "comment.gif", "text.png"):
        with pytest.raises(ValueError, match="no recipe"):
            read_recipe(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_recipe(tmp_path / "nothing.png")


def test_nothing_half_written_is_left(edited, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "story_gif", lambda story: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_story(edited, tmp_path / "kept")
    assert not list(tmp_path.iterdir())
    for write in (story_page, story_gif):
        with pytest.raises(ValueError, match="not complete"):
            write(StorySession(edited.pipe, CAPTIONS))


def test_a_continuation_of_several_given_pictures(pipe, tmp_path):
    "Drawn, looked at, changed, kept and opened again as the pipeline draws it."
    sources = [OTHER, OTHER.rotate(90)]
    story = drawn(pipe, task="continuation", seed=11, source_image=sources)
    assert story.given == 2 and story.pinned == {0, 1} and story.links.shape == (2, 4)
    out = pipe(
        CAPTIONS[2:],
        task="continuation",
        source_image=sources,
        source_caption=list(CAPTIONS[:2]),
        generator=story_generator(11, 0),
    )
    assert as_bytes(out.frames[0]) == as_bytes(story.pictures[2:])
    look = story.look()
    assert look.relevance.shape == look.mass.shape == (2, 4) and (look.mass[0, 2:] == 0).all()
    assert story.effect(steps=1).shape == (2, 4)

    entries = read_recipe(save_story(story, tmp_path / "kept"))
    assert entries["version"] == 2 and entries["given"] == 2
    again = from_recipe(pipe, entries)
    assert again.draw() and as_bytes(again.pictures) == as_bytes(story.pictures)

    story.forget(1)
    assert not story.links[:, 1].any() and story.pictures[1] is not None
    with pytest.raises(ValueError, match="3 to"):
        StorySession(pipe, CAPTIONS[:2], sources, task="continuation")
    for wrong in (0, True, "2"):
        with pytest.raises(ValueError, match="given="):
            from_recipe(pipe, entries | dict(given=wrong))
    with pytest.raises(ValueError, match="source_image is missing"):
        from_recipe(pipe, entries | dict(given=3))
