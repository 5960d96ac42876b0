"What a reader of library/comics need not see: any text, any number of pictures, two kinds of file."

import io
import random
import threading
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from causal_story.comics import (
    PAGE_LAYOUTS,
    PANEL,
    comic_page,
    figure_bytes,
    page_rows,
    save_comic,
    text_width,
    wrapped_lines,
)

PICTURE = Image.new("RGB", (16, 16), (200, 40, 40))


def as_image(figure):
    return Image.open(io.BytesIO(figure_bytes(figure))).convert("RGB")


@given(n=st.integers(1, 16), layout=st.sampled_from(sorted(PAGE_LAYOUTS)))
def test_every_frame_has_its_place_in_order(n, layout):
    rows = page_rows(n, layout)
    assert [k for row in rows for k in row] == list(range(n))
    assert all(len(row) <= len(rows[0]) for row in rows)
    if layout == "grid":
        assert abs(len(rows) - len(rows[0])) <= 1


@pytest.mark.filterwarnings("ignore:.*Glyph.*")
@settings(max_examples=60)
@given(text=st.text(max_size=80), width=st.floats(0.4, 3))
def test_any_text_breaks_into_lines_that_fit(text, width):
    lines = wrapped_lines(text, width, 9)
    for line in lines:
        assert len(line) == 1 or text_width(line, 9) <= width
    kept = "".join(lines).replace(" ", "")
    assert kept == "".join(text.encode("utf-8", "replace").decode().split())


@pytest.mark.filterwarnings("ignore:.*Glyph.*")
@pytest.mark.parametrize(
    "caption",
    [
        "costs $5 or $6",
        r"\frac{1}{2} $\alpha_",
        "$",
        "a|b\nc\td",
        "half a pair: \ud800",
        "nothing\x00here",
        "맛있는 사과 🦊",
        "w" * 300,
        "",
    ],
)
def test_any_caption_can_stand_in_a_panel(caption, tmp_path):
    for kind in ("png", "pdf"):
        page = save_comic(tmp_path / f"page.{kind}", [PICTURE], [caption])
        assert page.stat().st_size > 1000


def test_dollar_signs_are_text():
    "Set as mathematics, the second page would lose both signs and look like the first."
    plain, signs = (
        as_image(comic_page([PICTURE], [text])) for text in ("costs 5 or 6", "costs $5 or $6")
    )
    assert plain.size == signs.size and np.abs(np.array(plain, int) - np.array(signs, int)).sum()
    ink = [(np.array(page)[:45].min(-1) < 120).sum() for page in (plain, signs)]
    assert ink[1] > ink[0]


def test_pictures_are_not_covered():
    "Every panel holds as many pixels of its picture as one without a caption."
    for caption in ("", "A long caption. " * 20):
        page = np.array(as_image(comic_page([PICTURE], [caption])), int)
        red = (np.abs(page - (200, 40, 40)).max(-1) < 8).sum()
        assert red > 0.96 * (100 * PANEL) ** 2


@pytest.mark.parametrize("layout", sorted(PAGE_LAYOUTS))
@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_pages_of_any_length(layout, n):
    page = as_image(comic_page([PICTURE] * n, ["Milo waves."] * n, layout, "A title", given=1))
    rows = page_rows(n, layout)
    width = 100 * (0.1 + len(rows[0]) * (PANEL + 0.1))
    assert abs(page.width - width) <= 2 and page.height > 100 * PANEL * len(rows)


def test_large_and_strange_pictures_and_gaps():
    pictures = [Image.new("RGBA", (30, 60)), Image.new("L", (700, 500)), None]
    comic_page(pictures, ["one", "two", "a gap"])


def test_files_are_repeatable_and_replaced_whole(tmp_path, monkeypatch):
    for kind in ("png", "pdf"):
        path = tmp_path / f"page.{kind}"
        first = save_comic(path, [PICTURE], ["Milo."]).read_bytes()
        assert save_comic(path, [PICTURE], ["Milo."]).read_bytes() == first
    monkeypatch.setattr("causal_story.comics.figure_bytes", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_comic(path, [PICTURE], ["Other."])
    assert path.read_bytes() == first and len(list(tmp_path.iterdir())) == 2


def test_captions_in_a_pdf_are_text(tmp_path):
    content = save_comic(tmp_path / "page.pdf", [PICTURE], ["Milo"]).read_bytes()
    streams = [part.split(b"endstream")[0].strip(b"\r\n") for part in content.split(b"stream")[1:]]
    texts = []
    for stream in streams:
        try:
            texts.append(zlib.decompress(stream))
        except zlib.error:
            pass
    assert any(b"Tj" in text or b"TJ" in text for text in texts)


def test_pages_can_be_made_in_threads():
    pages = {}

    def make(name):
        pages[name] = figure_bytes(comic_page([PICTURE] * 3, [f"Frame of {name}"] * 3))

    names = [f"thread {random.Random(k).random():.3f}" for k in range(4)]
    threads = [threading.Thread(target=make, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        assert pages[name] == figure_bytes(comic_page([PICTURE] * 3, [f"Frame of {name}"] * 3))


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(ValueError, match=".png or .pdf"):
        save_comic(tmp_path / "page.jpg", [PICTURE], ["Milo."])
