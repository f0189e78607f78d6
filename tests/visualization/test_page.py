"""Templates: what a page is given is text, and a name that is missing is an error."""

import jinja2
import numpy as np
import pytest

from psaq_mm.visualization import Line, Picture, render

BODY = """{% extends 'page.html' %}
{% from 'parts.html' import head, legend, picture_grid, row, table %}
{% block body %}
{{ legend(lines) }}
{{ picture_grid(pictures, 'two') }}
{% call table('all <rows>') %}
{{ head(['a', 'b']) }}
{{ row('x', [value], true) }}
{% endcall %}
{% endblock %}
"""


def test_a_page_of_a_template_elsewhere(tmp_path):
    template = tmp_path / 'own.html'
    template.write_text(BODY)
    picture = Picture(np.zeros((2, 3, 3), np.uint8), 'A & B', 'a "star"')
    content = dict(title='A <title>', lines=[Line('l <1>', (), (), style=3)], pictures=[picture], value='<b>')
    page = render(template, **content)
    assert page.startswith('<!DOCTYPE html>') and '<title>A &lt;title&gt;</title>' in page
    assert 'stroke: var(--c3); stroke-width: 1.8; stroke-dasharray: 8,3,1.5,3"/></svg>l &lt;1&gt;</span>' in page
    assert 'width="3" height="2" loading="lazy" alt="a &#34;star&#34;"><figcaption>A &amp; B</figcaption>' in page
    assert (
        'aria-label="all &lt;rows&gt;"' in page and '<tr class="mark"><th scope="row">x</th><td>&lt;b&gt;</td>' in page
    )
    with pytest.raises(jinja2.UndefinedError, match='value'):
        render(template, **{name: item for name, item in content.items() if name != 'value'})
