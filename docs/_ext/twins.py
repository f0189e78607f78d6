# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Files outside docs/ that are pages of the site, and links to them.

The web view of the repository shows CONTRIBUTING.md where its readers look for it; the site shows the same text as a
page. A link from any page to such a file leads to the page, and links in the file are those that stand in it.
"""

import os
import re
from pathlib import Path
from typing import List

from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parents[1]
TWINS = {
    'contributing': 'CONTRIBUTING.md',
    'changelog': 'CHANGELOG.md',
    'reference/configs': 'configs/README.md',
}
"""Files of the repository by the page that shows them."""

_LINK = re.compile(r'\]\(([^)#\s]+)(#[^)\s]*)?\)')


def show(app: Sphinx, docname: str, source: List[str]) -> None:
    """Put the file in place of the page that stands for it, and pages in place of files in all links."""
    page = DOCS / f'{docname}.md'
    base = page.parent
    if docname in TWINS:
        file = DOCS.parent / TWINS[docname]
        base = file.parent
        app.env.note_dependency(str(file))
        source[0] = file.read_text(encoding='utf-8')
    pages = {DOCS.parent / file: DOCS / f'{name}.md' for name, file in TWINS.items()}

    def linked(match: 're.Match') -> str:
        target = match[1]
        if re.match(r'[\w+]+:', target):
            return match[0]
        path = Path(os.path.normpath(base / target))
        if path not in pages and base == page.parent:
            return match[0]
        return f']({os.path.relpath(pages.get(path, path), page.parent)}{match[2] or ""})'

    source[0] = _LINK.sub(linked, source[0])


def setup(app: Sphinx) -> dict:
    """Register it."""
    app.connect('source-read', show)
    return {'version': '1', 'parallel_read_safe': True}
