"""The site: it builds without a warning, every page is in the menu, and no link leads nowhere.

Sphinx itself says what stands in no table of contents, which link of a page has no target, and which docstring is not
well formed; warnings are errors. What the API pages hold is read out of the source, so no library is imported.
"""

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip('sphinx', reason='pip install -r requirements-docs.txt')
ROOT = Path(__file__).parents[2]
# Where a page stood before: a link there would still work for nobody.
MOVED = 'deploy many_gpus compare adding_a_backbone performance settings backbones architecture tutorial'.split()


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """The folder of the built site."""
    out = tmp_path_factory.mktemp('site')
    command = [sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-t', 'plain', '-d', str(out / 'trees')]
    done = subprocess.run(
        [*command, str(ROOT / 'docs'), str(out / 'html')],
        env=dict(os.environ, PYTHONDONTWRITEBYTECODE='1'),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return out / 'html'


class _Links(HTMLParser):
    """Targets of links and pictures, and the places that a link can lead to."""

    def __init__(self, text):
        super().__init__()
        self.targets, self.places = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.places |= {attributes[key] for key in ('id', 'name') if attributes.get(key)}
        self.targets |= {attributes[key] for key in ('href', 'src') if attributes.get(key)}


def test_every_page_of_the_folder_is_built(site):
    pages = {
        path.relative_to(ROOT / 'docs').with_suffix('.html').as_posix()
        for path in (ROOT / 'docs').rglob('*.md')
        if '_build' not in path.parts
    }
    built = {path.relative_to(site).as_posix() for path in site.rglob('*.html') if '_static' not in path.parts}
    assert pages <= built and len(pages) > 30


def test_every_link_of_the_site_has_a_target(site):
    pages = [path for path in site.rglob('*.html') if '_static' not in path.parts]
    read = {path: _Links(path.read_text(encoding='utf-8')) for path in pages}
    dead = []
    for page, links in read.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            place = unquote(parts.fragment)
            if not path.exists() or (place and path in read and place not in read[path].places):
                dead.append(f'{page.relative_to(site)}: {target}')
    assert not dead, '\n'.join(dead)


def test_no_file_names_an_old_address():
    """Of the pages that moved into docs/guides and docs/reference."""
    old = re.compile(rf'docs/(?:{"|".join(MOVED)})\.md')
    listed = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip('no repository')
    found = [
        name
        for name in listed.stdout.splitlines()
        if name.endswith(('.md', '.py', '.yml', '.yaml', '.ipynb', '.txt', 'Makefile')) and (ROOT / name).is_file()
        if old.search((ROOT / name).read_text(encoding='utf-8'))
    ]
    assert not found


def test_links_from_the_readme_are_there():
    """GitHub and the package index show it; Sphinx does not read it."""
    for page in ('README.md', 'configs/README.md'):
        text = (ROOT / page).read_text(encoding='utf-8')
        for target in re.findall(r'\]\(([^)#\s]+)', text):
            assert '://' in target or (ROOT / page).parent.joinpath(target).exists(), f'{page}: {target}'


def test_the_api_holds_what_users_and_plugins_need(site):
    from sphinx.util.inventory import InventoryFile

    content = (site / 'objects.inv').read_bytes()
    inventory = InventoryFile.loads(content, uri='')
    names = {name for kind, found in inventory.data.items() if kind.startswith('py:') for name in found}
    calls = {f'psaq_mm.{name}' for name in ('quantize', 'export', 'predict')}
    deploy = {f'psaq_mm.deploy.{name}' for name in ('export_model', 'write_plain_onnx')}
    assert calls | deploy | {'psaq_mm.runtime.load', 'psaq_mm.quantization.QuantSpec'} <= names
    registering = {
        function
        for path in (ROOT / 'psaq_mm').rglob('*.py')
        for function in re.findall(r'^def (register_\w+)', path.read_text(encoding='utf-8'), re.MULTILINE)
    }
    assert len(registering) >= 7 and registering <= {name.rsplit('.', 1)[-1] for name in names}


def test_the_model_zoo_is_that_of_the_metafiles():
    spec = importlib.util.spec_from_file_location('model_zoo', ROOT / '.dev' / 'model_zoo.py')
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    expected = (ROOT / 'docs' / 'model_zoo.md').read_text(encoding='utf-8')
    assert script.page() == expected, 'python .dev/model_zoo.py > docs/model_zoo.md'
