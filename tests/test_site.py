"""The site: what it is made of, that it builds without a warning, how a real browser shows it."""

import functools
import html.parser
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "nbs" / "site"
sys.path.insert(0, str(SITE))
import api  # noqa: E402
import pages  # noqa: E402

LONGEST_BUILD = 180  # seconds of one processor
NARROW = 400  # pixels, a small telephone
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
GENERATOR = {"sphinx": "sphinx", "myst_nb": "myst-nb", "sphinx_book_theme": "sphinx-book-theme"}
GENERATOR |= {"math_core": "math-core", "mermaidx": "mermaidx"}


def need_generator():
    "Skip, and say why, where the extra [docs] is not installed."
    missing = [name for module, name in GENERATOR.items() if not importlib.util.find_spec(module)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; pip install -e '.[docs]'")


# ---------------------------------------------------------------- what pages are made of


@pytest.mark.parametrize(
    "anchor, wanted",
    [
        ("What we learned", "what-we-learned"),
        ("What-we-learned", "what-we-learned"),  # as JupyterLab writes it
        ("what-we-learned", "what-we-learned"),  # as GitHub does
        ("Does it hide? (V, F)", "does-it-hide-v-f"),
        ("U%2DNet", "u-net"),
        ("`frame_mask`", "frame_mask"),
    ],
)
def test_anchors_of_jupyterlab_and_github_are_one(anchor, wanted):
    assert pages.slug(anchor) == wanted


def test_links_and_headings_are_not_looked_for_in_code():
    text = "# A [name](b.ipynb)\n\n`[x](code.md)` and [y](a.md#part)\n\n```\n# no\n[z](c.md)\n```\n"
    assert pages.links(text) == ["b.ipynb", "a.md#part"]
    assert pages.anchors(text + '<a id="here"></a>') == {"a-name", "here"}


def test_links_follow_to_where_the_site_has_the_page(tmp_path):
    index, module = pages.NOTEBOOKS / "index.ipynb", next((ROOT / "causal_story").glob("[a-z]*.py"))
    follow = functools.partial(pages.link_for_the_site, page=index, sources=tmp_path)
    assert follow("https://arxiv.org/abs/2309.09553") == "https://arxiv.org/abs/2309.09553"
    assert follow("#Draw-a-story") == "#draw-a-story"
    assert follow("../README.md") == "index.ipynb"
    assert follow(f"../causal_story/{module.name}") == f"api/{module.stem}.md"
    assert follow("../LICENSE") == "files/LICENSE" and (tmp_path / "files" / "LICENSE").exists()
    assert follow("nowhere.ipynb") == "nowhere.ipynb"
    inside = pages.NOTEBOOKS / "library" / "room.ipynb"
    assert pages.link_for_the_site("../index.ipynb#Licence", inside, tmp_path) == (
        "../index.ipynb#licence"
    )


def test_code_is_left_alone_when_links_are_rewritten(tmp_path):
    text = "`[a](../LICENSE)` [b](../LICENSE)\n\n```\n[c](../LICENSE)\n```"
    written = pages.text_for_the_site(text, pages.NOTEBOOKS / "index.ipynb", tmp_path)
    assert written == "`[a](../LICENSE)` [b](files/LICENSE)\n\n```\n[c](../LICENSE)\n```"


@pytest.mark.parametrize(
    "source, tags",
    [
        ("#| hide\nx = 1", None),
        ("#| default_exp data", None),
        ("#| echo: false\nshow()", ["remove-input"]),
        ("#| export\ndef f():\n    pass", ["hide-input"]),
        ("#| exports\ndef f():\n    pass", None),
        ("x = 1", None),
    ],
)
def test_plumbing_is_folded_and_hidden_cells_are_left_out(source, tags):
    shown = pages.code_for_the_site({"id": "a", "source": source, "metadata": {}})
    if source.startswith(("#| hide", "#| default_exp")):
        assert shown is None
    else:
        assert shown["metadata"].get("tags") == tags
        assert "#|" not in shown["source"]


def test_diagrams_are_drawn(tmp_path):
    need_generator()
    text = 'Before.\n\n```mermaid\nflowchart LR\n    A["one"] --> B["two"]\n```\n\nAfter.'
    page = pages.NOTEBOOKS / "library" / "room.ipynb"
    written = pages.text_for_the_site(text, page, tmp_path)
    picture = re.fullmatch(
        r"Before\.\n\n!\[Diagram: one, two\]\(\.\./(diagrams/\w+\.svg)\)\n\nAfter\.", written
    )
    assert "<svg" in (tmp_path / picture.group(1)).read_text(encoding="utf-8")


MODULE = '''"""A module."""

# %% ../nbs/library/room.ipynb #0a1b
LIMIT = 3  # frames

# %% ../nbs/library/room.ipynb #0c1d
def look(
    where: str,  # "past" or `future`
    window: int
    | None = None,  # frames in view
    *rest,
    # told in the line above
    keep: bool = True,
) -> list[int]:  # (V,) ages
    "What is seen. Raises `ValueError` for a window < 1."

class Story:
    "A story."
    def __init__(self, frames: list): self.frames = frames
    def _hidden(self): "no"
    @classmethod
    def of(cls, n: int): "Made."

@patch
def draw(self: Story, seed: int = 0) -> str:  # a name
    "Draw it."

@patch(as_prop=True)
def length(self: Story): "How long."

@dataclass(frozen=True)
class Policy:
    "Who may look."
    name: str = "full"  # its name
    window: int | None = None  # frames

def _private(): "no"
'''


def test_reference_is_read_off_docments(tmp_path):
    (tmp_path / "room.py").write_text(MODULE)
    module = api.read_module(tmp_path / "room.py")
    found = {definition.name: definition for definition in module.definitions}
    assert list(found) == ["LIMIT", "look", "Story", "Policy"]
    look = found["look"]
    assert look.signature == "(where, window=None, *rest, keep=True)"
    assert look.arguments == [
        ("where", "str", "", '"past" or `future`'),
        ("window", "int | None", "None", "frames in view"),
        ("*rest", "", "", ""),
        ("keep", "bool", "True", "told in the line above"),
    ]
    assert look.returns == ("list[int]", "(V,) ages")
    kinds = [(m.name, m.kind, m.signature, m.options) for m in found["Story"].methods]
    assert kinds == [
        ("of", "method", "(n)", ("classmethod",)),
        ("draw", "method", "(seed=0)", ()),
        ("length", "property", "", ()),
    ]
    assert found["Policy"].signature == "(name='full', window=None)"
    assert found["Policy"].arguments[1] == ("window", "int | None", "None", "frames")
    page = api.module_page(module, {"0c1d"}, {"library/room.ipynb": "A room"}, "https://git/b")
    assert "[A room](../library/room.ipynb)" in page
    assert "(#cell-0c1d)" in page and "(#cell-0a1b)" not in page
    assert "causal_story/room.py#L7" in page
    assert "**Raises** `ValueError` for a window \\< 1." in page
    assert "&quot;past&quot; or <code>future</code>" in page


def test_names_that_are_handed_on_lead_to_where_they_are_defined(tmp_path):
    source = "__all__ = ['look', 'Story']\nfrom .past import look\nfrom torch import Story\n"
    (tmp_path / "room.py").write_text(source)
    module = api.read_module(tmp_path / "room.py")
    assert module.handed_on == {"look": "past"}
    assert "{py:obj}`look <causal_story.past.look>`" in api.module_page(module, set(), {})


def test_handed_on_names_exist_there():
    modules = [api.read_module(path) for path in (ROOT / "causal_story").glob("[a-z]*.py")]
    known = {module.name: {one.name for one in module.definitions} for module in modules}
    for module in modules:
        for name, home in module.handed_on.items():
            assert name in known[home], f"{module.name} hands {name} on, {home} lacks it"


def test_every_public_name_is_in_the_reference():
    for path in sorted((ROOT / "causal_story").glob("[a-z]*.py")):
        exported = re.search(r"__all__ = (\[.*?\])", path.read_text(encoding="utf-8"), re.DOTALL)
        names = set(re.findall(r"'(\w+)'", exported.group(1)))
        module = api.read_module(path)
        shown = {definition.name for definition in module.definitions}
        patched = {method.name for item in module.definitions for method in item.methods}
        missing = {name for name in names if name[0] != "_"} - shown - patched
        missing -= set(module.handed_on)
        assert not missing, f"{path.name}: not on the reference's page"


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "html").mkdir()
    (tmp_path / "html" / "mine.html").write_text("mine")
    command = [sys.executable, str(SITE / "build.py"), str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 1 and "holds what is not of this site" in told.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["html", "mine.html"]


# ---------------------------------------------------------------- the built site


class Page(html.parser.HTMLParser):
    "What one page of the site holds: places, links, pictures, and what it loads."

    def __init__(self, text: str):
        super().__init__()
        self.names, self.links, self.loaded, self.tags, self.classes = set(), [], [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.classes |= set((values.get("class") or "").split())
        self.names |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag in ("img", "script", "iframe", "video") and values.get("src"):
            self.loaded.append(values["src"])
        if tag == "link" and "stylesheet" in (values.get("rel") or ""):
            self.loaded.append(values["href"])


def build(*arguments, folder: Path) -> str:
    "Run a Python program in a fresh process; it must succeed and say nothing that is a warning."
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    "The site, built with the command of CONTRIBUTING.md into a temporary folder."
    need_generator()
    folder = tmp_path_factory.mktemp("site")
    before = os.times()
    report = build(SITE / "build.py", folder, folder=ROOT)
    after = os.times()  # what other programs take from the processor meanwhile does not count
    seconds = after.children_user - before.children_user
    seconds += after.children_system - before.children_system
    assert seconds <= LONGEST_BUILD, report
    return folder / "html"


@pytest.fixture(scope="module")
def site_pages(site) -> dict[str, Page]:
    "Every page of the site, read."
    return {
        path.relative_to(site).as_posix(): Page(path.read_text(encoding="utf-8"))
        for path in sorted(site.rglob("*.html"))
        if "_static" not in path.parts
    }


def test_every_notebook_and_module_has_a_page(site_pages):
    notebooks = {
        path.relative_to(pages.NOTEBOOKS).with_suffix(".html").as_posix()
        for path in pages.reading_order()
    }
    modules = {f"api/{path.stem}.html" for path in (ROOT / "causal_story").glob("[a-z]*.py")}
    assert notebooks | modules | {"search.html", "genindex.html"} <= set(site_pages)


def test_no_link_of_the_site_is_dead(site, site_pages):
    dead, count = [], 0
    for name, page in site_pages.items():
        for link in page.links + page.loaded:
            if pages.is_outside(link):
                continue
            target, place = urldefrag(urljoin(f"/{name}", link))
            file = unquote(target).lstrip("/").split("?")[0] or "index.html"
            count += 1
            if not (site / file).is_file():
                dead.append((name, link))
            elif place and file in site_pages and unquote(place) not in site_pages[file].names:
                dead.append((name, link))
    assert count > 1000
    assert not dead


def test_pages_load_nothing_from_elsewhere(site_pages):
    foreign = {
        (name, link)
        for name, page in site_pages.items()
        for link in page.loaded
        if pages.is_outside(link) and not link.startswith("data:")
    }
    assert not foreign, "the site has to work without the network"


def test_parts_are_in_the_menu(site):
    text = (site / "index.html").read_text(encoding="utf-8")
    captions = re.findall(r'class="caption-text">([^<]+)<', text)
    wanted = [*pages.parts(), "Reference", "The project"]
    assert list(dict.fromkeys(captions)) == wanted


def test_equations_are_equations(site, site_pages):
    formulas = 0
    for path in pages.reading_order():
        text = pages.prose(pages.markdown_of(path))
        place = path.relative_to(pages.NOTEBOOKS).with_suffix(".html").as_posix()
        wanted = len(re.findall(r"(?s)\$\$.+?\$\$", text))
        formulas += wanted
        assert site_pages[place].tags.count("math") >= wanted, place
        body = (site / place).read_text(encoding="utf-8")
        visible = re.sub(r"(?s)<(script|pre|code)\b.*?</\1>", "", body)
        assert not re.search(r"\$\$|\\(frac|sqrt|mathrm|bar)\b", visible), place
    assert formulas > 5


SAMPLE = r"""# A page

Inline $\bar\alpha_t$, and alone:

$$\mathrm{softmax}\!\left(\frac{QK^\top}{\sqrt d} + M\right) \mathcal V$$

> [!WARNING]
> As GitHub writes it.

:::{note}
As MyST writes it.
:::

<details><summary>Answer</summary>

It is **four**, because $2 + 2 = 4$.

```python
2 + 2
```

</details>
"""


def test_equations_admonitions_and_answers_render(tmp_path):
    need_generator()
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "index.md").write_text(SAMPLE, encoding="utf-8")
    build("-m", "sphinx", "-W", "-q", "-c", SITE, "sources", "html", folder=tmp_path)
    text = (tmp_path / "html" / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("math") == 3 and {"mfrac", "msqrt"} <= set(page.tags)
    assert {"warning", "note"} <= page.classes and "[!WARNING]" not in text
    answer = re.search(r"(?s)<details>.*?</details>", text).group()
    assert "<strong>four</strong>" in answer and "<math" in answer and "highlight" in answer


def test_an_equation_that_cannot_be_read_stops_the_build(tmp_path):
    need_generator()
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "index.md").write_text("# A page\n\n$\\nosuchcommand{x}$\n")
    with pytest.raises(AssertionError, match="equation"):
        build("-m", "sphinx", "-W", "-q", "-c", SITE, "sources", "html", folder=tmp_path)


# ---------------------------------------------------------------- in a real browser


@pytest.fixture(scope="module")
def address(site):
    "The site, served to this computer only."

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    "Chromium, or a reason to skip."
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed: pip install playwright")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium found: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser):
    "An empty page of the browser; what goes wrong in it is in `tab.faults`."
    tab = browser.new_page(viewport={"width": NARROW, "height": 800})
    tab.faults = []
    tab.on("pageerror", lambda error: tab.faults.append(str(error)))
    tab.on("requestfailed", lambda request: tab.faults.append(request.url))
    tab.on(
        "response",
        lambda answer: tab.faults.append(answer.url) if answer.status >= 400 else None,
    )
    yield tab
    tab.close()


LOOK = """() => {
    const unseen = [...document.images].filter(i => i.src && i.naturalWidth === 0);
    return {
        width: document.documentElement.scrollWidth,
        unseen: unseen.map(image => image.src),
        headings: document.querySelectorAll('main h1').length,
        flat: [...document.querySelectorAll('main math')].filter(
            m => m.getClientRects().length && m.getBoundingClientRect().height < 3).length,
    };
}"""


def test_every_page_in_a_narrow_browser(tab, address, site_pages):
    faults = {}
    for name in site_pages:
        tab.faults.clear()
        tab.goto(f"{address}/{name}", wait_until="load")
        seen = tab.evaluate(LOOK)
        wrong = list(tab.faults)
        if seen["width"] > NARROW:
            wrong.append(f"scrolls sideways: {seen['width']} pixels wide")
        if seen["unseen"]:
            wrong.append(f"missing pictures: {seen['unseen']}")
        if seen["flat"]:
            wrong.append(f"{seen['flat']} equations have no height")
        if not seen["headings"]:
            wrong.append("no title")
        if wrong:
            faults[name] = wrong
    assert not faults, json.dumps(faults, indent=1)


def test_search_finds_a_function_and_a_lesson(tab, address):
    tab.goto(f"{address}/search.html?q=frame_mask")
    tab.wait_for_selector("#search-results li a")
    found = tab.eval_on_selector_all("#search-results li a", "all => all.map(a => a.href)")
    assert any("api/causal_mask.html#causal_story.causal_mask.frame_mask" in link for link in found)
    assert any(re.search(r"/\d\d_\w+\.html", link) for link in found)


def test_light_and_dark(browser, address):
    shades = {}
    for scheme in ("light", "dark"):
        tab = browser.new_page(color_scheme=scheme)
        tab.goto(f"{address}/index.html")
        colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        shades[scheme] = sum(map(int, re.findall(r"\d+", colour)[:3]))
        tab.close()
    assert shades["light"] > 600 > 200 > shades["dark"]


def test_folded_answers_open(tab, address, site_pages):
    folded = [name for name, page in site_pages.items() if "details" in page.tags]
    assert folded
    tab.goto(f"{address}/{folded[0]}")
    details = tab.locator("main details").first
    height = details.bounding_box()["height"]
    details.locator("summary").first.click()
    assert details.bounding_box()["height"] > height
