# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Pictures through an exported model: ``psaq-predict DIR picture.jpg folder/ --out shown/``. It needs NumPy, OpenCV and
one runtime, and neither PyTorch nor an OpenMMLab library.
"""

import argparse
import ast
import json
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from psaq_mm.errors import ConfigError, DataError, PsaqError
from psaq_mm.runtime import RUNTIMES, DeployedModel, Prediction, load
from psaq_mm.runtime.pictures import Shown, pictures_in
from psaq_mm.runtime.preparation import opencv, read_picture

__all__ = ['main']


class _Times:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: Dict[str, List[float]] = {}

    def measured(self, what: str, call: Any, *args: Any) -> Any:
        begun = time.perf_counter()
        result = call(*args)
        self.seconds.setdefault(what, []).append(time.perf_counter() - begun)
        return result

    def rate(self, what: str) -> str:
        """How many a second."""
        spent = self.seconds.get(what, [])
        return f'{len(spent) / max(sum(spent), 1e-9):.1f}' if spent else 'none'


def _predicted(model: DeployedModel, picture: np.ndarray, times: _Times) -> Prediction:
    """The prediction of a picture; one that starts a graph is not measured with the others."""
    started, begun = model.started, time.perf_counter()
    prediction = model.predict(picture)
    kind = 'prediction' if model.started == started else 'start'
    times.seconds.setdefault(kind, []).append(time.perf_counter() - begun)
    return prediction


def _write_picture(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    done, data = opencv().imencode('.png' if path.suffix.lower() == '.png' else '.jpg', picture)
    if not done:
        raise DataError(
            f'a picture of {picture.shape[0]} x {picture.shape[1]} cannot be written to {path}: leave it out'
        )
    path.write_bytes(data.tobytes())  # not by name: OpenCV writes no names beyond ASCII on Windows


def _out_path(out: str, place: Path) -> Path:
    """Where a drawn picture goes: PNG stays PNG, all others become JPEG."""
    return Path(out) / (place if place.suffix.lower() in ('.png', '.jpg', '.jpeg') else Path(f'{place}.jpg'))


def _predictions(
    model: DeployedModel, pictures: Sequence[Shown], args: argparse.Namespace, times: _Times
) -> Iterator[Tuple[Shown, Optional[Prediction], str]]:
    """Picture, prediction, and what is wrong with it: the others go on."""
    for shown in pictures:
        try:
            picture = times.measured('reading', read_picture, shown.path, model.manifest['channels'])
            prediction = _predicted(model, picture, times)
            if args.out:
                drawing = times.measured('drawing', prediction.draw, picture, args.score_threshold)
                _write_picture(_out_path(args.out, shown.place), drawing)
            yield shown, prediction.above(args.score_threshold), ''
        except DataError as error:
            yield shown, None, str(error)


def _summary(model: DeployedModel, times: _Times, count: int, failed: int) -> str:
    timed, starts = times.seconds.get('prediction', []), times.seconds.get('start', [])
    rates = f'{times.rate("prediction")} a second' if timed else 'not measured'
    if starts:
        rates += f' without the {len(starts)} that started a graph ({sum(starts):.2f} s)'
    drawn = f', drawing {times.rate("drawing")} a second' if 'drawing' in times.seconds else ''
    failures = f', {failed} of them failed' if failed else ''
    place = f'{model.runtime}, {" and ".join(model.kernels)} kernels' if model.kernels else model.runtime
    return f'{count} pictures{failures}; {place}: predictions {rates}; reading {times.rate("reading")} a second{drawn}'


def _settings(pairs: Sequence[str]) -> Dict[str, Any]:
    """``NAME=VALUE`` pairs as a dict; a value that reads as one of Python is that, any other one is text.

    Raises:
        ConfigError: One has no ``=``.
    """
    settings: Dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition('=')
        if not equals or not name:
            raise ConfigError(f'--settings {pair} has no value: write NAME=VALUE, such as NUM_STREAMS=2')
        try:
            settings[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            settings[name] = text
    return settings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='psaq-predict', description=__doc__)
    parser.add_argument('directory', help='an exported model, as psaq-export writes it')
    parser.add_argument('pictures', nargs='+', help='picture files, or folders of them')
    parser.add_argument('--out', metavar='FOLDER', help='draw the predictions onto copies of the pictures')
    parser.add_argument('--json', metavar='FILE', help='write the predictions; masks are run lengths as COCO has them')
    parser.add_argument('--runtime', default='openvino', help=f'{", ".join(RUNTIMES)}; defaults to openvino')
    parser.add_argument('--device', help='of the runtime, such as GPU or AUTO (openvino), CUDA (onnxruntime); the CPU')
    parser.add_argument('--threads', type=int, help='of the runtime; defaults to its own choice')
    parser.add_argument(
        '--settings', nargs='+', default=[], metavar='NAME=VALUE', help="the runtime's own, such as NUM_STREAMS=2"
    )
    parser.add_argument(
        '--score-threshold', type=float, default=0.3, help='leave out boxes of a lower score; defaults to 0.3'
    )
    parser.add_argument('--quiet', action='store_true', help='print the summary alone')
    return parser


def _run(args: argparse.Namespace) -> int:
    pictures = pictures_in(args.pictures)
    model = load(
        args.directory, args.runtime, args.threads, device=args.device, settings=_settings(args.settings) or None
    )
    times, rows, failed = _Times(), [], 0
    for shown, prediction, wrong in _predictions(model, pictures, args, times):
        if prediction is None:
            failed += 1
            print(f'psaq-predict: {wrong if str(shown.path) in wrong else f"{shown.path}: {wrong}"}', file=sys.stderr)
            rows.append(dict(picture=str(shown.path), error=wrong))
            continue
        if not args.quiet:
            print(f'{shown.path}: {prediction.describe()}')
        if args.json:
            rows.append(dict(picture=str(shown.path), **prediction.to_plain()))
    if args.json:
        Path(args.json).write_text(json.dumps(dict(classes=model.classes, pictures=rows), indent=1), encoding='utf-8')
    print(_summary(model, times, len(pictures), failed))
    return 1 if failed else 0


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line; returns the exit status: 0, or 1 where a picture or the model could not be read."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except KeyboardInterrupt:
        print(f'{parser.prog}: interrupted; the same command begins anew', file=sys.stderr)
        return 130
    except PsaqError as error:
        print(f'{parser.prog}: {error}', file=sys.stderr)
    except OSError as error:
        name = error.filename or 'a file'
        print(f'{parser.prog}: {name} cannot be written ({error.strerror}): give another --out', file=sys.stderr)
    return 1


if __name__ == '__main__':
    raise SystemExit(main())
