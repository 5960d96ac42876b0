"What a reader of 12_explorer need not see: edits in any order, hostile recipes, and the app in a real browser."

import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import causal_story.explorer as explorer
from causal_story.cartoon import CHARACTERS, SETTINGS, Actor, Scene, render
from causal_story.causal_mask import frame_mask
from causal_story.explorer import (
    EXAMPLES,
    CaptionRow,
    OneJob,
    StoryExplorer,
    StorySession,
    arcs_png,
    from_recipe,
    known_words,
    named_changes,
    read_recipe,
    recipe,
    replace_word,
    save_story,
    story_changes,
    story_gif,
    strip_png,
    unknown_words,
)

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs" / "12_explorer.ipynb"
CAPTIONS = EXAMPLES["Two on the moon"]  # four of them
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


def test_a_known_word_stays_known_after_replacing(pipe):
    known = known_words(pipe.history_tokenizer)
    assert (
        {name.lower() for name in CHARACTERS} <= known and "##a" not in known and "b" not in known
    )
    row = CaptionRow(0, known, "Kiki <b>danzes</b> at hom.")
    assert all("<b>" not in getattr(part, "value", "") for part in row.hints.children)


# ---------------------------------------------------------------- drawing


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5, 8])
def test_a_stopped_drawing_goes_on_as_if_nothing_had_happened(pipe, stop_at):
    story, heard = StorySession(pipe, CAPTIONS), []
    assert story.draw(heard.append, lambda: len(heard) == stop_at) == (stop_at == 8)
    assert len(heard) == stop_at and sum(p is not None for p in story.pictures) == stop_at // 2
    assert story.draw() and as_bytes(story.pictures) == as_bytes(drawn(pipe).pictures)


def test_one_pipeline_draws_for_one_at_a_time(pipe):
    first, second, started, go = (
        StorySession(pipe, CAPTIONS),
        StorySession(pipe, CAPTIONS),
        threading.Event(),
        threading.Event(),
    )
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


@settings(max_examples=12)
@given(edits=EDITS, task=st.sampled_from(["visualization", "continuation"]))
def test_edits_in_any_order(pipe, edits, task):
    story = drawn(
        pipe,
        source_image=OTHER if task == "continuation" else None,
        task=task,
        num_inference_steps=1,
    )
    for each in edits:
        if each[0] == "link" and each[1] < story.given:
            continue
        was, n = as_bytes(story.pictures), len(story.past)
        first = edit(story, *each)
        assert (
            len(story.past) == n + 1
            and story.draw()
            and as_bytes(story.pictures)[:first] == was[:first]
        )
    direct = pipe(**story.request(), history_frames=[story.pictures[story.given :]]).frames[0]
    for k, picture in enumerate(direct, story.given):
        if k not in story.pinned:
            assert np.abs(np.asarray(picture, int) - np.asarray(story.pictures[k], int)).max() <= 1
    while story.past:
        story.undo()
    assert as_bytes(story.pictures) == as_bytes(
        drawn(
            pipe,
            source_image=OTHER if task == "continuation" else None,
            task=task,
            num_inference_steps=1,
        ).pictures
    )


def test_edits_before_drawing_add_up(pipe):
    story = drawn(pipe)
    was = as_bytes(story.pictures)
    story.set_link(3, 0, False)
    story.rewrite(1, "Luna sleeps.")
    assert [p is None for p in story.pictures] == [False, True, True, True] and as_bytes(
        story.before
    ) == was
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
    look, effect, visible = (
        story.look(),
        story.effect(),
        frame_mask(policy, 4 - story.given, task, window),
    )
    assert look.mass.shape == effect.shape == visible.shape and (look.relevance is not None) == (
        policy == "weighted"
    )
    assert (
        (look.mass[~visible] < 1e-6).all()
        and (effect[~visible] < 1e-3).all()
        and (effect[visible] > 0).all()
    )
    assert story.effect(should_stop=lambda: True) is None
    assert Image.open(io.BytesIO(arcs_png(None, visible, visible, 100))).size == (400, 130)


def test_changes_are_named(monkeypatch):
    said = dict(
        setting=np.array([0, 1]),
        presence=np.zeros((2, 6), bool),
        prop=np.zeros((2, 6), int),
        scarf=np.zeros((2, 6), int),
    )
    said["presence"][:, 0] = said["presence"][0, 1] = said["presence"][1, 2] = True
    said["scarf"][1] = 1
    monkeypatch.setattr(explorer, "read_frames", lambda reader, frames: said)
    told = named_changes(None, [OTHER], [OTHER])[0]
    assert told == [
        f"setting: {SETTINGS[0]} → {SETTINGS[1]}",
        "Milo's scarf: red → blue",
        f"{CHARACTERS[1]} is gone",
        f"{CHARACTERS[2]} appears",
    ]
    with pytest.raises(ValueError, match="same positions"):
        named_changes(None, [OTHER], [])


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
    told = json.loads(json.dumps(recipe(edited)))
    name = data.draw(st.sampled_from(sorted(told)))
    told[name] = data.draw(
        st.one_of(
            st.none(),
            st.integers(-3, 99),
            st.text(max_size=5),
            st.lists(st.integers(0, 3), max_size=3),
            st.dictionaries(st.sampled_from(["0", "9", "x"]), st.text(max_size=4), max_size=2),
        )
    )
    try:
        story = from_recipe(pipe, told)
    except ValueError as error:
        assert str(error)
    else:
        assert (
            len(story.captions) == 3
            and not (story.links & ~frame_mask("full", 2, "continuation")).any()
        )


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
    monkeypatch.setattr(explorer, "story_gif", lambda story: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_story(edited, tmp_path / "kept")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="not complete"):
        strip_png(StorySession(edited.pipe, CAPTIONS))
    with pytest.raises(ValueError, match="not complete"):
        story_gif(StorySession(edited.pipe, CAPTIONS))


# ---------------------------------------------------------------- the app without a browser


@pytest.fixture
def app(pipe, tmp_path):
    app = StoryExplorer(pipe)
    app.folder = tmp_path
    app.write(CAPTIONS)
    yield app
    app.job.stop()
    assert app.job.wait(30)


def test_a_job_stops_within_a_second(app):
    app.steps.value = 50
    app.draw()
    while app.progress.value == 0:
        time.sleep(0.01)
    pressed = time.perf_counter()
    app.job.stop()
    assert app.job.wait(30) and time.perf_counter() - pressed < 1
    assert (
        "stopped" in app.status.value and not app.go_on_button.disabled and app.stop_button.disabled
    )
    app.steps.value = 2
    app.draw()
    assert app.job.wait(60) and app.session.complete


def test_a_second_press_never_runs_two(pipe):
    job, running, most = OneJob(), [], []

    def work(should_stop):
        running.append(1)
        most.append(len(running))
        time.sleep(0.01)
        running.pop()

    threads = [
        threading.Thread(target=lambda: [job.start(work) for _ in range(20)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert job.wait(5) and set(most) == {1}


def test_what_is_wrong_is_said_beside_the_buttons(app, monkeypatch):
    app.rows[1].text.value = " "
    app.draw()
    assert "caption 1 is empty" in app.status.value and app.session is None
    app.rows[1].text.value = "<script>"
    monkeypatch.setattr(StorySession, "draw", lambda *a, **k: 1 / 0)
    app.draw()
    assert (
        app.job.wait(30)
        and "ZeroDivisionError" in app.status.value
        and not app.draw_button.disabled
    )
    assert "<script>" not in app.columns[1].title.value


def test_three_to_eight_captions(app):
    for _ in range(9):
        app._resize(1)
    assert len(app.rows) == len(app.rows_box.children) == 8
    for _ in range(9):
        app._resize(-1)
    assert len(app.rows) == 3
    app.write_random(seed=5)
    assert len(app.rows) == 3 and not any(row.hints.children for row in app.rows)


@pytest.mark.parametrize(
    "policy, window", [("none", 3), ("full", 3), ("local", 0), ("weighted", 2)]
)
def test_every_setting_can_be_drawn(app, policy, window):
    app.example.value, app.task.value, app.policy.value, app.window.value = (
        "A balloon in the snow",
        "continuation",
        policy,
        window,
    )
    app.draw()
    assert app.job.wait(60) and app.session.complete, app.status.value
    assert app.session.given == 1 and app.columns[0].picture in app.columns[0].widget.children
    for question in ("attention", "causal effect", "relevance"):
        app.question.value = question
        assert app.job.wait(60)
    for k in range(3):
        app.select(k)


def test_a_kept_story_is_opened_again(app):
    app.seed.value = 11
    app.draw()
    assert app.job.wait(60)
    app.select(1)
    app._replace(None)
    app.redraw()
    assert app.job.wait(60) and len(app.columns[2].note.value) > 0
    app.name.value = "../a story/"
    app.keep()
    kept = app.folder / "a-story"
    assert (kept / "stories.jsonl").is_file() and "a-story.zip" in app.kept.value
    app.keep()
    assert "another name" in app.status.value
    pictures = as_bytes(app.session.pictures)
    app.seed.value = 0
    app._on_open(dict(new=({"content": memoryview((kept / "story.png").read_bytes())},)))
    assert app.job.wait(60) and app.seed.value == 11 and as_bytes(app.session.pictures) == pictures
    for handler in (app._on_open, app._on_upload, app._on_replace_upload):
        handler(dict(new=({"content": memoryview(b"no picture")},)))
        assert "story-wrong" in app.status.value
        app.say("")


# ---------------------------------------------------------------- the app in a browser

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PIXELS = """images => images.map(image => { const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    canvas.getContext('2d').drawImage(image, 0, 0); return canvas.toDataURL(); })"""


def find_browser():
    "Path of a Chromium, or None."
    return next(
        filter(
            None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))
        ),
        None,
    )


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def only_the_app(notebook: dict) -> dict:
    "The notebook without the lesson: imports, the two models, the explorer. (test_notebooks.py runs all of it.)"
    source = lambda cell: "".join(cell["source"])
    wanted = ("#| hide\nimport", "pipe = CausalStoryPipeline.from_pretrained", "#| eval: false")
    cells = [
        cell
        for cell in notebook["cells"]
        if cell["cell_type"] == "code" and source(cell).startswith(wanted)
    ]
    assert len(cells) == 3
    cells.insert(
        2,
        dict(
            cell_type="code",
            id="import",
            metadata={},
            execution_count=None,
            outputs=[],
            source="from causal_story.explorer import StoryExplorer",
        ),
    )
    return notebook | dict(cells=cells)


@pytest.fixture(params=["voila", "lab"])
def page(request, tmp_path):
    "The explorer, open in a browser: the whole notebook as an app, and its last cell in JupyterLab."
    if find_browser() is None:
        pytest.skip("no Chromium found: apt-get install chromium")
    for module in ("playwright", request.param if request.param == "voila" else "jupyterlab"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install {module}")
    from playwright.sync_api import sync_playwright

    notebook, port = json.loads(NOTEBOOK.read_text(encoding="utf-8")), free_port()
    (tmp_path / "12_explorer.ipynb").write_text(
        json.dumps(notebook if request.param == "voila" else only_the_app(notebook)),
        encoding="utf-8",
    )
    command = (
        ["voila", "12_explorer.ipynb", f"--port={port}"]
        if request.param == "voila"
        else [
            "jupyterlab",
            "--allow-root",
            f"--ServerApp.port={port}",
            "--IdentityProvider.token=",
            "--ServerApp.root_dir=.",
        ]
    )
    environment = os.environ | {
        name: str(tmp_path / name.lower())
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    }
    environment |= dict(
        PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        JUPYTER_PREFER_ENV_PATH="1",
    )
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", *command, "--no-browser"],
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=find_browser(), args=FLAGS)
            page = browser.new_page(
                viewport=dict(width=1180 if request.param == "voila" else 1500, height=1640)
            )
            page.set_default_timeout(120_000)
            page.kind = request.param
            open_explorer(page, port, server, tmp_path / "server.log")
            yield page
            browser.close()
    finally:
        end(server)


def end(server):
    "End a server and its kernels, politely if possible."
    for number in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(server.pid, number)
        try:
            return server.wait(20)
        except subprocess.TimeoutExpired:
            pass


def open_explorer(page, port, server, log):
    "Wait for the server, open the notebook, run it."
    for _ in range(600):
        if server.poll() is not None:
            raise AssertionError(log.read_text())
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    if page.kind == "voila":
        page.goto(f"http://127.0.0.1:{port}/", wait_until="commit", timeout=300_000)
    else:
        page.goto(f"http://127.0.0.1:{port}/lab/tree/12_explorer.ipynb?reset", wait_until="commit")
        page.locator(".jp-Notebook .jp-Cell").first.wait_for()
        started = page.locator(".jp-InputPrompt", has_text=re.compile(r"\[(\*|\d+)\]"))
        for _ in range(20):  # the menu is there before its commands do anything
            page.get_by_text("Run", exact=True).first.click()
            page.get_by_text("Run All Cells", exact=True).click()
            page.wait_for_timeout(3000)
            if started.count():
                break
            page.keyboard.press("Escape")
    try:
        page.locator(".story-explorer").wait_for(timeout=300_000)
    except Exception as error:
        raise AssertionError(
            f"no explorer on the page:\n{page.locator('body').inner_text()[-3000:]}\n{log.read_text()[-3000:]}"
        ) from error


def button(page, icon):
    return page.locator(f".story-explorer button:has(.fa-{icon})")


def pictures(page, name="picture"):
    return page.locator(f".story-{name} img").evaluate_all(PIXELS)


def wait_for(page, text):
    "Wait until the explorer says something."
    page.locator(".story-explorer").get_by_text(text).first.wait_for(timeout=120_000)


def test_a_story_is_written_drawn_and_its_past_changed(page, tmp_path):
    caption = page.locator(".story-explorer input[type=text]").first
    caption.fill("Mlio is at the beach and waves, holding a ball, in a red scarf.")
    page.locator(".story-word", has_text="Milo").click()
    page.wait_for_function(
        "document.querySelector('.story-explorer input[type=text]').value.startsWith('Milo is')"
    )
    assert page.locator(".story-strange").count() == 0

    button(page, "paint-brush").click()
    page.locator(".story-drawing").first.wait_for()  # a live preview
    wait_for(page, "5 frames in")
    whole = pictures(page)
    assert len(set(whole)) == 5

    page.locator(".story-click").nth(3).click()  # who looked at whom, and where
    wait_for(page, "Frame 3: which words")
    page.locator(".story-click").nth(0).click()  # another picture at position 0
    boxes = page.locator(".story-explorer select")
    boxes.nth(boxes.count() - 3).select_option("home")
    boxes.nth(boxes.count() - 2).select_option("umbrella")
    boxes.nth(boxes.count() - 1).select_option("green")
    page.wait_for_timeout(500)
    button(page, "image").click()
    wait_for(page, "to be drawn again: frame 1, 2, 3, 4")
    button(page, "step-forward").click()
    wait_for(page, "4 frames in")
    changed = pictures(page)
    assert [a != b for a, b in zip(whole, changed)] == [True] * 5 and pictures(
        page, "before"
    ) == whole
    assert page.locator(".story-pinned").count() == 1

    page.locator(".story-click").nth(1).click()
    wait_for(page, "Frame 1: which words")
    page.mouse.move(2, 2)  # a frame under the mouse is tinted
    page.wait_for_timeout(500)
    target = Path(
        os.environ.get("STORY_SCREENSHOT") or tmp_path / "explorer.png"
    )  # STORY_SCREENSHOT=nbs/images/explorer.png makes the README's picture
    page.locator(".story-explorer").screenshot(path=str(target))
    with Image.open(target) as shot:
        assert shot.width > 800 and len(shot.convert("RGB").getcolors(10**7)) > 1000

    page.locator(".story-explorer .widget-slider .widget-readout").first.fill("50")
    page.keyboard.press("Enter")
    button(page, "paint-brush").click()
    page.locator(".story-drawing").first.wait_for()
    pressed = time.perf_counter()
    button(page, "stop").click()
    wait_for(page, "stopped after")
    assert time.perf_counter() - pressed < 2  # one second, and what the browser takes to say so
    assert button(page, "play").is_enabled() and button(page, "stop").is_disabled()
