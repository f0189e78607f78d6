# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Web pages out of jinja2 templates. A page is one file: style, pictures and charts are inside, for light and dark.

``templates/page.html`` is the base of all pages, ``templates/parts.html`` has macros for pictures, legends and tables.
"""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from psaq_mm.visualization.charts import STYLES
from psaq_mm.visualization.sheets import encode_png

__all__ = ['Picture', 'render']

SHARED = Path(__file__).parent / 'templates'


@dataclass(frozen=True)
class Picture:
    """A picture of a page.

    Args:
        array: (H, W, 3), uint8, RGB.
        caption: The line below it, plain text; may be empty.
        alt: What it shows, for those who do not see it.
        lossless: PNG; else JPEG, about a fifth of the size for pictures with grain.
    """

    array: np.ndarray
    caption: str
    alt: str
    lossless: bool = False

    @property
    def height(self) -> int:
        """In pixels."""
        return self.array.shape[0]

    @property
    def width(self) -> int:
        """In pixels."""
        return self.array.shape[1]

    @property
    def source(self) -> str:
        """The picture as a ``data:`` address."""
        if self.lossless:
            kind, content = 'png', encode_png(self.array)
        else:
            buffer = io.BytesIO()
            Image.fromarray(self.array).save(buffer, format='JPEG', quality=88, optimize=True)
            kind, content = 'jpeg', buffer.getvalue()
        return f'data:image/{kind};base64,{base64.b64encode(content).decode()}'


def render(template: Path, **content: object) -> str:
    """Fill a template in; text is escaped.

    Args:
        template: A file. It may extend, include and import those of ``templates`` beside this module by their names.
        content: What the template names. A name that is missing is an error, not an empty string.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path(template).parent, SHARED]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals['STYLES'] = STYLES
    return environment.get_template(Path(template).name).render(content)
