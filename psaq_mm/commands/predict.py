# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Pictures through an exported model or a student: ``psaq predict MODEL picture.jpg folder/ --out shown/``.

An exported model needs NumPy, OpenCV and one runtime, and neither PyTorch nor an OpenMMLab library.
"""

import argparse
import ast
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from psaq_mm.commands.listing import RUNTIME_NAMES
from psaq_mm.commands.parsing import make_parser
from psaq_mm.errors import ConfigError, DataError, PsaqError
from psaq_mm.files import write_whole
from psaq_mm.progress import track

if TYPE_CHECKING:
    import numpy as np

    from psaq_mm.runtime import Prediction
    from psaq_mm.runtime.pictures import Shown

__all__ = ['build_parser', 'main']

_CONFIGS = ('.py', '.json', '.yaml', '.yml')
_CHECKPOINTS = ('.pth', '.pt', '.safetensors')


class _Model(NamedTuple):
    """What predicts, an exported model or a student.

    Attributes:
        predict: Gives the prediction of a picture.
        channels: Of the pictures.
        classes: Their names.
        started: How many graphs have been started: a prediction that starts one takes longer.
        place: Tells, at the end, where it ran.
    """

    predict: Callable[[Any], 'Prediction']
    channels: int
    classes: Sequence[str]
    started: Callable[[], int]
    place: Callable[[], str]


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


def _predicted(model: _Model, picture: 'np.ndarray', times: _Times) -> 'Prediction':
    """The prediction of a picture; one that starts a graph is not measured with the others."""
    started, begun = model.started(), time.perf_counter()
    prediction = model.predict(picture)
    kind = 'prediction' if model.started() == started else 'start'
    times.seconds.setdefault(kind, []).append(time.perf_counter() - begun)
    return prediction


def _write_picture(path: Path, picture: 'np.ndarray') -> None:
    from psaq_mm.runtime.preparation import opencv

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
    model: _Model, pictures: Sequence['Shown'], args: argparse.Namespace, times: _Times
) -> Iterator[Tuple['Shown', Optional['Prediction'], str]]:
    """Picture, prediction, and what is wrong with it: the others go on."""
    from psaq_mm.runtime.preparation import read_picture

    for shown in pictures:
        try:
            picture = times.measured('reading', read_picture, shown.path, model.channels)
            prediction = _predicted(model, picture, times)
            if args.out:
                drawing = times.measured('drawing', prediction.draw, picture, args.score_threshold)
                _write_picture(_out_path(args.out, shown.place), drawing)
            yield shown, prediction.above(args.score_threshold), ''
        except DataError as error:
            yield shown, None, str(error)


def _summary(model: _Model, times: _Times, count: int, failed: int) -> str:
    timed, starts = times.seconds.get('prediction', []), times.seconds.get('start', [])
    rates = f'{times.rate("prediction")} a second' if timed else 'not measured'
    if starts:
        rates += f' without the {len(starts)} that started a graph ({sum(starts):.2f} s)'
    drawn = f', drawing {times.rate("drawing")} a second' if 'drawing' in times.seconds else ''
    failures = f', {failed} of them failed' if failed else ''
    reading = f'reading {times.rate("reading")} a second'
    return f'{count} pictures{failures}; {model.place()}: predictions {rates}; {reading}{drawn}'


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


# ---------------------------------------------------------------------- models
def _exported(args: argparse.Namespace) -> _Model:
    """The exported model of a command line."""
    from psaq_mm.runtime import load

    model = load(
        args.model,
        args.runtime or 'openvino',
        args.threads,
        device=args.device,
        settings=_settings(args.settings) or None,
    )

    def place() -> str:
        return f'{model.runtime}, {" and ".join(model.kernels)} kernels' if model.kernels else model.runtime

    return _Model(model.predict, model.manifest['channels'], model.classes, lambda: model.started, place)


@contextlib.contextmanager
def _student(args: argparse.Namespace, config: Optional[str], checkpoint: str, prog: str) -> Iterator[_Model]:
    """The student of a command line; it predicts inside the block."""
    from psaq_mm.commands.missing import require_libraries

    for option in ('runtime', 'threads', 'settings'):
        if getattr(args, option):
            raise ConfigError(f'--{option} is for an exported model, and {checkpoint} is a student: leave it out')
    require_libraries(prog)
    from psaq_mm.engine.device import on_device
    from psaq_mm.engine.one_call import load, record_of
    from psaq_mm.engine.predicting import Predictor

    with on_device(args.device) if args.device else contextlib.nullcontext():
        student = load(checkpoint, config=config)
        record = record_of(student)
        predictor = Predictor(student, record.config, record.dataset_meta, args.device)
        yield _Model(
            predictor, predictor.prepare.channels, predictor.classes, lambda: 0, lambda: f'PyTorch, {predictor.device}'
        )


def _student_named(args: argparse.Namespace, prog: str) -> Tuple[Optional[str], Optional[str]]:
    """CONFIG and STUDENT.pth, or STUDENT.pth alone, of a command line; none where MODEL is an exported one.

    Raises:
        ConfigError: No student or no picture comes after CONFIG.
    """
    ending = Path(args.model).suffix.lower()
    if Path(args.model).is_dir() or ending not in (*_CONFIGS, *_CHECKPOINTS):
        return None, None
    if ending in _CHECKPOINTS:
        return None, args.model
    student, *pictures = args.pictures
    if Path(student).suffix.lower() not in _CHECKPOINTS or not pictures:
        raise ConfigError(
            f'after the config {args.model} come the student and pictures: {prog} {args.model} STUDENT.pth PICTURE'
        )
    args.pictures = pictures
    return args.model, student


# ---------------------------------------------------------------------- command line
def build_parser(prog: str = 'psaq-predict') -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = make_parser(
        prog,
        'MODEL PICTURE [PICTURE ...] [options]',
        'Predict pictures and folders of pictures, and draw boxes, masks, class maps or classes onto copies of them. '
        'For an exported model neither PyTorch nor OpenMMLab is needed.',
        [
            'deployed street.jpg --out shown',
            'work_dirs/CONFIG/student.pth pictures/ --out shown --device cuda',
            'CONFIG work_dirs/CONFIG/student.pth pictures/ --json all.json',
        ],
    )
    model = parser.add_argument_group('model')
    model.add_argument(
        'model',
        metavar='MODEL',
        help='an exported model (the folder that psaq export wrote), a student.pth, which holds its config, or CONFIG '
        'and student.pth',
    )
    model.add_argument(
        '--device',
        metavar='NAME',
        help='of a student: cpu, cuda, cuda:1; of an exported model, as its runtime names it: GPU or AUTO (openvino), '
        'CUDA (onnxruntime) (default: the CPU)',
    )
    model.add_argument(
        '--runtime', metavar='NAME', help=f'of an exported model: {", ".join(RUNTIME_NAMES)} (default: openvino)'
    )
    model.add_argument('--threads', type=int, metavar='N', help="of the runtime (default: the runtime's own choice)")
    model.add_argument(
        '--settings',
        nargs='+',
        default=[],
        metavar='NAME=VALUE',
        help="the runtime's own, such as NUM_STREAMS=2 (default: none)",
    )
    pictures = parser.add_argument_group('pictures')
    pictures.add_argument('pictures', nargs='+', metavar='PICTURE', help='files, or folders and the folders in them')
    pictures.add_argument(
        '--out', metavar='FOLDER', help='where drawn copies of the pictures go (default: none are drawn)'
    )
    pictures.add_argument(
        '--json',
        metavar='FILE',
        help='where the predictions go; masks are run lengths as COCO has them (default: none are written)',
    )
    pictures.add_argument(
        '--score-threshold',
        type=float,
        default=0.3,
        metavar='S',
        help='leave out boxes of a lower score (default: %(default)s)',
    )
    pictures.add_argument('--quiet', action='store_true', help='print the summary alone (default: a line a picture)')
    return parser


def _run(args: argparse.Namespace, prog: str) -> int:
    from psaq_mm.runtime.pictures import pictures_in

    config, student = _student_named(args, prog)
    pictures = pictures_in(args.pictures)  # before a model is read
    if student is None:
        return _predict(_exported(args), pictures, args, prog)
    with _student(args, config, student, prog) as model:
        return _predict(model, pictures, args, prog)


def _predict(model: _Model, pictures: Sequence['Shown'], args: argparse.Namespace, prog: str) -> int:
    times, rows, failed = _Times(), [], 0
    for shown, prediction, wrong in track(_predictions(model, pictures, args, times), 'Predicting', len(pictures)):
        if prediction is None:
            failed += 1
            print(f'{prog}: {wrong if str(shown.path) in wrong else f"{shown.path}: {wrong}"}', file=sys.stderr)
            rows.append(dict(picture=str(shown.path), error=wrong))
            continue
        if not args.quiet:
            print(f'{shown.path}: {prediction.describe()}')
        if args.json:
            rows.append(dict(picture=str(shown.path), **prediction.to_plain()))
    if args.json:
        write_whole(args.json, json.dumps(dict(classes=list(model.classes), pictures=rows), indent=1))
    print(_summary(model, times, len(pictures), failed))
    if args.out and failed < len(pictures):
        print(f'drawn predictions are in {args.out}')
    return 1 if failed else 0


def main(argv: Optional[Sequence[str]] = None, prog: str = 'psaq-predict') -> int:
    """Command line; returns the exit status: 0, or 1 where a picture or the model could not be read."""
    args = build_parser(prog).parse_args(argv)
    try:
        return _run(args, prog)
    except KeyboardInterrupt:
        print(f'{prog}: interrupted; the same command begins anew', file=sys.stderr)
        return 130
    except PsaqError as error:
        print(f'{prog}: {error}', file=sys.stderr)
    except OSError as error:
        name = error.filename or 'a file'
        print(f'{prog}: {name} cannot be written ({error.strerror}): give another --out', file=sys.stderr)
    return 1


if __name__ == '__main__':
    raise SystemExit(main())
