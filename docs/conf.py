# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The site: `make docs` builds it, Read the Docs too (.readthedocs.yaml), and tests/docs/test_site.py."""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / '_ext'))

project = 'psaq_mm'
author = 'The psaq_mm authors'
copyright = '2026, the psaq_mm authors'  # noqa: A001 (Sphinx's name)
version = re.search(r"^__version__ = '(.+)'", (HERE.parent / 'psaq_mm' / '__init__.py').read_text(), re.MULTILINE)[1]
release = version

extensions = [
    'myst_parser',
    'sphinx.ext.napoleon',
    'sphinx.ext.mathjax',
    'sphinx_copybutton',
    'static_api',
    'twins',
]
root_doc = 'index'
exclude_patterns = ['_build', '_ext']

# Pages are read on the web view of the repository too: headings get the anchors that they have there.
myst_heading_anchors = 4
myst_enable_extensions = ['colon_fence', 'dollarmath']

napoleon_google_docstring = True
napoleon_numpy_docstring = False
# As fields, not as entries of their own: an attribute that is described twice would be one object too many.
napoleon_use_ivar = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = 'hide'

# The theme of lmdeploy and XTuner, OpenMMLab's younger sisters. The one of mmdet and mmengine, their fork of
# pytorch_sphinx_theme, is on no package index; PyTorch's own new one wants an old Sphinx and calls trackers.
html_theme = 'sphinx_book_theme'
html_theme_options = {
    'show_navbar_depth': 1,
    'show_toc_level': 2,
    'use_download_button': False,
    'use_fullscreen_button': False,
    'navigation_with_keys': False,
}
# `-t plain`, of the tests: the same pages without the theme's menus, which take longer than all that is in the pages.
if 'plain' in tags:  # noqa: F821 (Sphinx gives it)
    html_theme, html_theme_options = 'basic', {}
html_title = f'psaq_mm {version}'
html_static_path = ['_static']
html_css_files = ['style.css']
html_copy_source = False
html_show_sphinx = False

copybutton_prompt_text = r'>>> |\.\.\. |\$ '
copybutton_prompt_is_regexp = True
