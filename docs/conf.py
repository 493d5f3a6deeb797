"""Configure Sphinx: ``sphinx-build -W -n docs build/docs`` makes the HTML pages."""

from typing import Any

import fastguide
from sphinx.application import Sphinx

project = "fastguide"
author = "the fastguide authors"
copyright = author
release = fastguide.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # links to headings, as on GitHub

html_theme = "furo"
html_title = f"fastguide {release}"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False

# Not looked up: what torch, diffusers and Python document, as their inventories need a
# network, and names of types that annotations have as they are in the source.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|diffusers|collections|typing)\..*"),
    (
        "py:class",
        r"Tensor|Base|Callback|Condition|DeviceMesh|Dim|Generators|GradientForm|Scale|Space",
    ),
    (
        "py:class",
        r"([\w.]+\.)?(AddedUp|Calls|FirstOrder|FromMoments|GradientSource|LowPasses)",
    ),
    (
        "py:class",
        r"([\w.]+\.)?(Mode|MomentWeights|Table|TableSpace|Vector)",
    ),
]


def keep_sentences(*event: Any) -> None:
    """Put back what napoleon takes for a type: the words before a colon, as here.

    Types are in the annotations, from which autodoc adds them.
    """
    lines: list[str] = event[-1]
    for taken, field in ((":rtype: ", ":returns: "), (":type: ", "")):
        words = next((line for line in lines if line.startswith(taken)), None)
        if words is not None:
            lines.remove(words)
            first = next(i for i, line in enumerate(lines) if line.startswith(field))
            rest = lines[first].removeprefix(field)
            lines[first] = f"{field}{words.removeprefix(taken)}: {rest}"


def setup(app: Sphinx) -> None:
    """Connect after napoleon, whose priority is 500."""
    app.connect("autodoc-process-docstring", keep_sentences, priority=600)
