"""Settings of Sphinx for the site that build.py makes. Sphinx reads this file by itself."""

import sys
from configparser import ConfigParser
from pathlib import Path

from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.util import logging

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # for myst_heading_slug_func, which names a function

parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(HERE.parent.parent / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

project = "Causal-Story"
author = settings["author"]
copyright = settings["copyright"]
release = version = settings["version"]
language = "en"

extensions = ["myst_nb"]
root_doc = "index"
nb_execution_mode = "off"  # the saved outputs are shown; the tests run the notebooks
nb_merge_streams = True
nb_number_source_lines = False
myst_enable_extensions = [
    "alert",
    "amsmath",
    "attrs_block",
    "colon_fence",
    "dollarmath",
    "html_image",
]
myst_heading_anchors = 4
myst_heading_slug_func = "pages.slug"
myst_dmath_double_inline = True
python_display_short_literal_types = True
toc_object_entries_show_parents = "hide"
add_module_names = False

html_theme = "sphinx_book_theme"
html_title = "Causal-Story"
html_static_path = [str(HERE / "static")]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_math_renderer = "mathml"
html_theme_options = {
    "repository_url": settings["git_url"],
    "use_repository_button": bool(settings["git_url"]),
    "use_download_button": False,
    "navbar_persistent": [],  # the search field is in the sidebar already
    "home_page_in_toc": True,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "pygments_light_style": "friendly",
    "pygments_dark_style": "monokai",
}


to_mathml = LatexToMathML()


def mathml(
    node: nodes.Node,  # holds an equation: LaTeX without its dollars
    displaystyle: bool,  # the equation stands alone
) -> str:  # MathML, which browsers set without a script and without the network
    "Turn one equation into MathML; what cannot be read is a warning and so, here, an error."
    try:
        return to_mathml.convert_with_local_state(node.astext(), displaystyle=displaystyle)
    except LatexError as error:
        logging.getLogger(__name__).warning("equation: %s", error, location=node)
        return ""


def visit_math(translator, node: nodes.math):
    "Write an equation inside a line."
    translator.body.append(f'<span class="math">{mathml(node, False)}</span>')
    raise nodes.SkipNode


def visit_math_block(translator, node: nodes.math_block):
    "Write an equation that stands alone; a wide one scrolls by itself."
    translator.body.append(f'<div class="math">{mathml(node, True)}</div>')
    raise nodes.SkipNode


def setup(app):
    "Called by Sphinx: equations become MathML."
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
