# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""docs/model_zoo.md, from model-index.yml and the metafiles that it imports.

    python .dev/model_zoo.py > docs/model_zoo.md

A test compares the page with what this prints.
"""

import sys
from pathlib import Path
from typing import Dict, List

import yaml

ROOT = Path(__file__).resolve().parent.parent

HEAD = """# Model zoo

Written by `python .dev/model_zoo.py > docs/model_zoo.md`: do not edit. The rows are those of `model-index.yml` and of
the metafiles in `configs/`, which `mim search` reads too. A result stands where it was measured in this repository;
"not run" says that nobody has. How they were measured: [results](results.md).

Every config runs with every method and every precision: `--method` and `--quant` of `psaq quantize`.
[configs/README.md](../configs/README.md) says what each needs.
"""


def collections() -> List[dict]:
    """What each metafile holds, in the order of model-index.yml."""
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text(encoding='utf-8'))
    return [yaml.safe_load((ROOT / path).read_text(encoding='utf-8')) for path in index['Import']]


def results(model: Dict) -> str:
    """Metrics of a model in one cell."""
    metrics = [
        f'{name} {value:.2f}' if isinstance(value, float) else f'{name} {value}'
        for result in model.get('Results') or []
        for name, value in result['Metrics'].items()
    ]
    return ', '.join(metrics) or ('full precision' if 'Weights' in model else 'not run')


def datasets(model: Dict) -> str:
    """What a model was evaluated on, or is made for."""
    names = dict.fromkeys(result['Dataset'] for result in model.get('Results') or [])
    return ', '.join(names) or str((model.get('Metadata') or {}).get('Data', ''))


def cell(text: object) -> str:
    """Text that cannot end a cell."""
    return str(text).replace('|', '\\|').replace('\n', ' ')


def page() -> str:
    """The content of ``docs/model_zoo.md``."""
    lines = [HEAD]
    for content in collections():
        (collection,) = content['Collections']
        metadata = collection.get('Metadata') or {}
        lines += [f'## {collection["Name"]}', '']
        paper = collection.get('Paper') or {}
        if paper.get('URL'):
            lines += [f'[{paper["Title"]}]({paper["URL"]})', '']
        if metadata.get('Method'):
            lines += [f'{str(metadata["Method"]).rstrip(".")}.', '']
        weights = any(model.get('Weights') for model in content['Models'])
        lines += [f'| model | config | precision | data | result |{" weights |" if weights else ""}']
        lines += ['|---|---|---|---|---|' + ('---|' if weights else '')]
        for model in content['Models']:
            precision = (model.get('Metadata') or {}).get('Precision', '')
            config = f'[{model["Config"].split("configs/", 1)[-1]}](../{model["Config"]})'
            row = [model['Name'], config, precision, datasets(model), results(model)]
            if weights:
                row.append(f'[{Path(model["Weights"]).name}]({link(model["Weights"])})' if model.get('Weights') else '')
            lines += [f'| {" | ".join(map(cell, row))} |']
        lines += ['']
    return '\n'.join(lines).rstrip() + '\n'


def link(weights: str) -> str:
    """An address, or the path of a file of this repository as seen from docs/."""
    return weights if '://' in weights else f'../{weights}'


if __name__ == '__main__':
    sys.stdout.write(page())
