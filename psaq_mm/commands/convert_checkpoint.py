# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Convert a Swin checkpoint of another release: ``psaq convert-checkpoint CONFIG SOURCE --out OUT``."""

import argparse
from typing import Any, Dict, Optional, Sequence, Tuple

from psaq_mm.commands.common import add_config_arguments, load_config, run_command
from psaq_mm.commands.parsing import make_parser
from psaq_mm.errors import ConfigError

__all__ = ['build_parser', 'main', 'convert_checkpoint']


def convert_checkpoint(
    config, source: str, backbone_only: bool = False, drop: Sequence[str] = ()
) -> Tuple[Dict, Any, Any]:
    """Convert a checkpoint for the full-precision model of a config. Nothing is written; misfits are not raised.

    Args:
        config: A whole config of a full-precision or a quantized model.
        source: File or URL, ``.pth`` or ``.safetensors``.
        backbone_only: See :func:`psaq_mm.models.conversion.fit_weights`.
        drop: See :func:`psaq_mm.models.conversion.fit_weights`.

    Returns:
        The checkpoint to save, and the two steps to it: :class:`~psaq_mm.models.conversion.Renamed` and
        :class:`~psaq_mm.models.conversion.Conversion`.

    Raises:
        CheckpointError: ``source`` cannot be read, holds no Swin or is quantized.
        UnsupportedModelError: The config's model has no Swin of OpenMMLab as its backbone.
    """
    from psaq_mm.engine.building import build_model
    from psaq_mm.engine.checkpoint import is_quantized, read_checkpoint
    from psaq_mm.engine.config import full_precision_model_config
    from psaq_mm.errors import CheckpointError
    from psaq_mm.models.conversion import fit_weights, rename_swin
    from psaq_mm.models.loading import usable_weights

    checkpoint = read_checkpoint(source)
    if is_quantized(checkpoint):
        raise CheckpointError(f'{source} is quantized: convert the full-precision checkpoint and quantize that')
    usable = usable_weights(checkpoint['state_dict'], checkpoint['meta'])
    for note in usable.notes:
        print(f'{source}: {note}')
    renamed = rename_swin(usable.weights)
    model = build_model(config, full_precision_model_config(config.model))
    conversion = fit_weights(renamed, model, backbone_only, drop)
    meta = dict(
        dataset_meta=checkpoint['meta'].get('dataset_meta', {}),
        converted_from=dict(checkpoint=str(source), naming=renamed.naming),
    )
    return dict(meta=meta, state_dict=conversion.state_dict), renamed, conversion


def _say(renamed, conversion) -> None:
    """Print the names of all weights that are not in the new checkpoint."""
    print(
        f'naming of the checkpoint: {renamed.naming}; {len(conversion.state_dict)} weights placed, '
        f'{len(renamed.derived)} position indices and masks computed anew'
    )
    for what, names in (
        ('found no place', conversion.unplaced),
        ('is not in the checkpoint', conversion.missing),
        ('does not fit', conversion.wrong),
        ('left out', conversion.left_out),
        ('is not in the checkpoint and keeps its initial value', conversion.untrained),
    ):
        for name in names:
            print(f'  {what}: {name}')


def build_parser(prog: str = 'psaq-convert-checkpoint') -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = make_parser(
        prog,
        'CONFIG SOURCE --out OUT.pth [options]',
        'Convert a Swin checkpoint of another release, such as those of Microsoft, timm and mmpretrain, for the model '
        'of a config. Weights that find no place are named, and then nothing is written.',
        [
            'mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py \\\n      mask_rcnn_swin_tiny.pth --out converted.pth',
            'upernet_swin-t.py swin_tiny.safetensors \\\n      --out backbone.pth --backbone-only',
        ],
    )
    model = add_config_arguments(parser)
    model.add_argument('source', metavar='SOURCE', help='what is converted: a .pth or .safetensors file, or its URL')
    result = parser.add_argument_group('result')
    result.add_argument(
        '--out', required=True, metavar='OUT.pth', help='the checkpoint to be written, whole or not at all'
    )
    result.add_argument(
        '--backbone-only',
        action='store_true',
        help='convert the backbone alone, as from a classifier to a detector; a config that reads the result as '
        'init_cfg has to say convert_weights=False (default: the whole model)',
    )
    result.add_argument(
        '--drop',
        nargs='+',
        default=[],
        metavar='PATTERN',
        help='weights to leave out, by their names in SOURCE, such as "head.*" (default: none)',
    )
    return parser


def main(argv: Optional[Sequence[str]] = None, prog: str = 'psaq-convert-checkpoint') -> int:
    """Command line; returns the exit status."""

    def command(args) -> None:
        from psaq_mm.engine.checkpoint import save_atomic

        if not args.out.endswith('.pth'):
            raise ConfigError(f'--out {args.out} must end with .pth: OpenMMLab reads nothing else')
        config = load_config(args.config, args.cfg_options)
        if not config.get('model'):
            raise ConfigError(f'the config {args.config} has no model: give a full model config, not one of its bases')
        checkpoint, renamed, conversion = convert_checkpoint(config, args.source, args.backbone_only, args.drop)
        _say(renamed, conversion)
        conversion.check()
        save_atomic(checkpoint, args.out)
        print(f'saved to {args.out}')

    return run_command(command, build_parser(prog), argv)


if __name__ == '__main__':
    raise SystemExit(main())
