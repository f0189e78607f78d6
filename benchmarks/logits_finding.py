# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What Gaussian calibration costs under PSAQ-ViT's quantizer, with the logits quantized and without.

    python benchmarks/logits_finding.py work_dirs/classification/deit_tiny.py

PSAQ-ViT (arXiv 2203.02250, released code) quantizes every edge but the attention weights, the classifier's output among
them, and its table has a row of Gaussian noise that collapses. Here the same points are calibrated on Gaussian noise
and on images of the training set, once as they are and once with the output of the last layer left in floating point,
and nothing else. CONFIG is that of a classifier with a training and a test set, such as ``benchmarks/image_folder.py``
writes for a folder of photographs.

Rows are kept in the work dir: a run that is stopped goes on where it was. The exit code is 1 where a row failed.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from psaq_mm.commands.common import add_config_arguments, load_config, run_command  # noqa: E402
from psaq_mm.commands.comparison import Wanted, compare, plan  # noqa: E402
from psaq_mm.commands.sample_rows import principal_metrics  # noqa: E402
from psaq_mm.tables import markdown_table  # noqa: E402

LOGITS = '*head.output'
KINDS = ('quantized', 'float')


def with_logits(config, bits: str, kind: str, pattern: str = LOGITS) -> Any:
    """A config under PSAQ-ViT's quantizer, whose logits are ``'quantized'`` or ``'float'``.

    Args:
        config: Of a classifier.
        bits: Such as ``'w8a8'``.
        kind: One of :data:`KINDS`.
        pattern: Name of the edge that holds the logits: that of the last layer with ``.output``.
    """
    from psaq_mm.engine.config import apply_method, quant_holder

    changed = apply_method(config, bits, 'psaq_v1')
    overrides = [] if kind == 'quantized' else [dict(pattern=pattern, float=True)]
    quant_holder(changed.model).quant = dict(preset=f'psaq_v1_{bits}', scope='full', overrides=overrides)
    return changed


def table(entries: Sequence[Dict[str, Any]]) -> str:
    """Markdown out of the comparison's entries, whose configs are called ``MODEL, logits KIND``."""
    full = next((e['full_precision'] for e in entries if e.get('full_precision')), {})
    metric = principal_metrics(full)[0] if full else 'top-1'
    lines = []
    if full:
        lines.append(('full precision', '-', '-', f'{full[metric]:.2f}', '-', '1'))
    for entry in entries:
        logits = entry['config'].rpartition(' ')[2]
        if not entry.get('metrics'):
            lines.append((logits, entry['source'], 'failed', '-', '-', '-'))
            continue
        value, difference = entry['metrics'][metric]['mean'], entry.get('difference')
        paired = f'{difference["mean"]:+.2f} ± {entry["difference_se"]["mean"]:.2f}' if difference else '-'
        seeds, agreement = str(len(entry['seeds'])), f'{entry["agreement"]["mean"]:.3f}'
        lines.append((logits, entry['source'], seeds, f'{value:.2f}', paired, agreement))
    return markdown_table(('logits', 'calibrated on', 'seeds', metric, 'difference', 'agreement'), lines)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog='logits_finding', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument('--bits', default='w8a8', help='precision (default: %(default)s)')
    parser.add_argument(
        '--samples',
        '--calibration',
        nargs='+',
        default=['gaussian', 'real'],
        metavar='SOURCE',
        help='as for tools/compare.py',
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument(
        '--logits', default=LOGITS, help='name of the edge that holds the logits (default: %(default)s)'
    )
    parser.add_argument('--work-dir', default='work_dirs/logits_finding')
    failed: List[str] = []

    def command(args) -> None:
        config, model = load_config(args.config, args.cfg_options), Path(args.config).stem
        configs = {f'{model}, logits {kind}': with_logits(config, args.bits, kind, args.logits) for kind in KINDS}
        runs = plan(configs, Wanted(tuple(args.samples), tuple(args.seeds)))
        file = compare(runs, args.work_dir)
        print('\n' + table(file.table), flush=True)
        failed.extend(run.name for run in runs if not file.done(run.key))

    return run_command(command, parser, argv) or int(bool(failed))


if __name__ == '__main__':
    sys.exit(main())
