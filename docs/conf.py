"""Sphinx: these pages as a site. `make docs` builds it strictly: a link that leads nowhere fails the build."""

import os
import re
from pathlib import Path
from typing import Any

from cppo_trl import __version__

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")

project, author = "cppo_trl", "the cppo_trl authors"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["results/*", "upstream/*"]
html_theme = "furo"
html_title = f"cppo_trl {version}"
html_copy_source = False
myst_heading_anchors = 3  # named as a code host names them
default_role = "py:obj"  # `name` in a docstring leads to its entry, where there is one
autodoc_typehints = "both"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"


def site_links(text: str, written_in: Path) -> str:
    """Make links that were written for a code host fit the site.

    The README is the first page, other files of the repository are downloads, a directory is named without a link.
    What does not exist is left, and Sphinx reports it.
    """

    def link(match: re.Match[str]) -> str:
        name, target, anchor = match[1], Path(os.path.normpath(written_in.parent / match[2])), match[3] or ""
        if target.is_dir():
            return name
        if target == README:
            target = HERE / "index.md"
        is_file = target.suffix == ".md" and target.exists() and target.parent != HERE
        return f"[{name}]({'path:' if is_file else ''}{os.path.relpath(target, HERE)}{anchor})"

    return LINK.sub(link, text)


def setup(app: Any) -> None:
    """Read the pages, and what they include, through `site_links`."""

    def of_a_page(app: Any, page: str, content: list[str]) -> None:
        content[0] = site_links(content[0], HERE / f"{page}.md")

    def of_an_include(app: Any, path: Path, page: str, content: list[str]) -> None:
        content[0] = site_links(content[0], HERE / path)

    app.connect("source-read", of_a_page)
    app.connect("include-read", of_an_include)
