# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Pictures a second of a whole detector or segmentor: the picture goes in as OpenCV reads it, boxes and masks or a map
of classes come out at its own size.

Measured in turn, in one process:

- PyTorch float32: the library's own test pipeline, model and post-processing.
- float32 in each runtime: the same export with every quantizer switched off. The graphs are float32, all code around
  them is the same, so that the ratio to it is what integers give. (Its Swin-T backbone takes 0.94 to 0.96 of the time
  of the one that PyTorch's exporter writes.)
- the integer model in each runtime, as ``psaq_mm.deploy.load(DIR).predict(picture)`` runs it.
- NNCF's int8 of the same float32 graphs in OpenVINO, with ``--nncf PYTHON``.

Without a checkpoint, weights are random and the quantizers' ranges come from the picture: neither changes what a graph
costs. What random weights change is how many boxes the RoI heads see. So the threshold of scores is set for the model
to have ten times as many boxes above it as it may give; and where the RPN's suppression leaves fewer proposals than the
config allows, it is off. Numbers of boxes are printed, and a side that has fewer than the config allows (1000 proposals
and 100 detections in the configs of COCO) ends the benchmark.

Example:
    python benchmarks/deploy_detector.py configs/mask_rcnn_swin_t_w8a8.py
    python benchmarks/deploy_detector.py configs/cascade_mask_rcnn_swin_t_w8a8.py --threads 1 --processor-time
    python benchmarks/deploy_detector.py configs/demo/mask_rcnn_swin_demo_w8a8.py --size 160 160 --checkpoint
    demo/checkpoints/mask_rcnn_swin_demo.pth
"""

import argparse
import contextlib
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks.measuring import busy_share, processor  # noqa: E402
from psaq_mm.commands.common import load_config  # noqa: E402
from psaq_mm.contexts import replaced  # noqa: E402
from psaq_mm.deploy import export_model, load  # noqa: E402
from psaq_mm.engine.building import build_model  # noqa: E402
from psaq_mm.engine.checkpoint import load_weights, read_checkpoint  # noqa: E402
from psaq_mm.engine.config import full_precision_model_config, quantized_model_config  # noqa: E402
from psaq_mm.engine.pipelines import pipeline_steps  # noqa: E402
from psaq_mm.models import TaskModel  # noqa: E402
from psaq_mm.pictures import DeadLeaves, ImageSpec, SampleStream  # noqa: E402
from psaq_mm.quantization import calibrate, quantizers  # noqa: E402
from psaq_mm.runtime import RUNTIMES, registry  # noqa: E402
from psaq_mm.runtime.backends.openvino import OpenVino  # noqa: E402
from psaq_mm.runtime.registry import Runtime  # noqa: E402
from psaq_mm.tables import text_table  # noqa: E402

CANDIDATES = 10
"""Boxes above the threshold of scores, for one that the detector may give."""
DELTA = 0.2
"""Spread of the deltas of a random RPN: what trained ones have, about."""
GRAPHS = ('dense', 'box', 'mask')
GLUE = ('proposals', 'one_stage', 'roi_align', 'suppress', 'paste')
"""Functions of :mod:`psaq_mm.runtime.detection.detector` whose time is shown; the rest of the glue is ``other``."""


# ---------------------------------------------------------------------- PyTorch
class Library:
    """A model behind its library's own test pipeline; called with a picture (H, W, 3), blue first, bytes.

    Args:
        model: In evaluation mode.
        config: Whole.
    """

    def __init__(self, model, config):
        from mmengine.dataset import Compose, pseudo_collate

        self.model, self._collate = model, pseudo_collate
        steps = [dict(step) for step in config.test_dataloader.dataset.pipeline if 'Annotations' not in step['type']]
        if 'LoadImageFromFile' not in steps[0]['type']:
            raise SystemExit(f'the test pipeline begins with {steps[0]["type"]}: only that of files is measured')
        steps[0]['type'] = 'LoadImageFromNDArray'
        steps[0].pop('backend_args', None)
        self.pipeline = Compose(steps)

    def data(self, picture: np.ndarray) -> Dict:
        """The picture as the model's preprocessor takes it."""
        return self._collate([self.pipeline(dict(img=picture, img_id=0, img_path='', seg_map_path=None))])

    def images(self, picture: np.ndarray) -> torch.Tensor:
        """The picture as the network takes it: resized, normalized, padded, (1, C, H, W)."""
        return self.model.data_preprocessor(self.data(picture), False)['inputs']

    def __call__(self, picture: np.ndarray):
        with torch.no_grad():
            return self.model.test_step(self.data(picture))[0]


def drawn_picture(size: Sequence[int]) -> np.ndarray:
    """A picture of dead leaves, uint8 (H, W, 3)."""
    image = SampleStream(DeadLeaves(), tuple(size), ImageSpec(), 0).take(1)[0]
    low, high = image.min(), image.max()
    return ((image - low) / (high - low) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def float_model(config, checkpoint: Optional[str]):
    """The full-precision model in evaluation mode; random weights without a checkpoint."""
    torch.manual_seed(0)
    model = build_model(config, full_precision_model_config(config.model))
    if checkpoint:
        load_weights(model, read_checkpoint(checkpoint), checkpoint)
    model.eval()
    return model


# ---------------------------------------------------------------------- boxes
class Boxes(NamedTuple):
    """Boxes of one picture: those that enter the RoI heads, and those that come out of the detector; None where there
    are none such.
    """

    proposals: Optional[int]
    detections: Optional[int]


def allowed_boxes(model) -> Boxes:
    """How many boxes the settings of a model allow; those of a segmentor are None."""
    test_cfg = getattr(model, 'test_cfg', None) or {}
    rpn, rcnn = test_cfg.get('rpn'), test_cfg.get('rcnn', test_cfg)
    if 'max_per_img' not in rcnn:
        return Boxes(None, None)
    return Boxes(rpn.max_per_img if rpn else None, rcnn.max_per_img)


def library_boxes(library: Library, picture: np.ndarray, sides: Optional[List[float]] = None) -> Boxes:
    """How many boxes a model of the library has on a picture. The square roots of the proposals' areas are added to
    ``sides``.
    """
    counts: List[int] = []
    head = getattr(library.model, 'roi_head', None)
    predict = getattr(head, 'predict', None)

    def counted(levels, proposals, *args, **kwargs):
        counts.extend(map(len, proposals))
        if sides is not None:
            sides.extend((proposals[0].bboxes[:, 2:] - proposals[0].bboxes[:, :2]).prod(1).sqrt().tolist())
        return predict(levels, proposals, *args, **kwargs)

    with contextlib.nullcontext() if head is None else replaced(head, 'predict', counted):
        sample = library(picture)
    detections = len(sample.pred_instances) if 'pred_instances' in sample else None
    return Boxes(counts[0] if counts else None, detections)


@contextlib.contextmanager
def _recorded_scores(scores: List[np.ndarray]) -> Iterator[None]:
    """Scores that mmdet compares with its threshold are recorded inside the block, and all pass it."""
    from mmdet.models.dense_heads import base_dense_head
    from mmdet.models.roi_heads.bbox_heads import bbox_head

    of_rois, of_levels = bbox_head.multiclass_nms, base_dense_head.filter_scores_and_topk

    def rois(boxes, values, threshold, *args, **kwargs):
        scores.append(values[:, :-1].flatten().numpy())
        return of_rois(boxes, values, threshold, *args, **kwargs)

    def level(values, threshold, number, *args, **kwargs):
        scores.append(np.sort(values.flatten().numpy())[-number:])
        return of_levels(values, threshold, number, *args, **kwargs)

    with replaced(bbox_head, 'multiclass_nms', rois), replaced(base_dense_head, 'filter_scores_and_topk', level):
        yield


def seed_(library: Library, picture: np.ndarray) -> None:
    """Give random weights proposals as large as in photographs, in place. As they come, the largest map has nearly all
    of the best scores, and deltas of 1 make thin boxes of its anchors.

    Levels are scaled so that each has as many scores among the best, and deltas get a spread of :data:`DELTA`. Without
    biases, the RPN's outputs are proportional to the level.
    """
    rpn = getattr(library.model, 'rpn_head', None)
    if rpn is None:
        return
    with torch.no_grad():
        for module in rpn.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.zeros_(module.bias)
        rpn.rpn_cls.weight -= rpn.rpn_cls.weight.mean(1, keepdim=True)
        images, convs = library.images(picture), library.model.neck.fpn_convs
        share = library.model.test_cfg.rpn.max_per_img // len(convs)
        for conv, scores in zip(convs, rpn(library.model.extract_feat(images))[0]):
            best = scores.flatten().sort(descending=True).values[:share]
            for parameter in conv.parameters():
                parameter /= best[-1]
        deltas = torch.cat([level.flatten() for level in rpn(library.model.extract_feat(images))[1]])
        rpn.rpn_reg.weight *= DELTA / deltas.std()


def lower_thresholds_(config, library: Library, picture: np.ndarray) -> List[str]:
    """Set the settings of a config and of its model so that it has as many boxes as it allows.

    Returns:
        What was changed, as sentences.
    """
    wanted = allowed_boxes(library.model)
    if wanted.detections is None:
        return []
    changes = []
    holders = [config.model.test_cfg, library.model.test_cfg]
    if wanted.proposals is not None and library_boxes(library, picture).proposals != wanted.proposals:
        for settings in (*(h.rpn for h in holders), library.model.rpn_head.test_cfg):
            settings.nms.iou_threshold = 1.0
        changes.append("the RPN's suppression is off")
    scores: List[np.ndarray] = []
    with _recorded_scores(scores):
        library(picture)
    values = np.sort(np.concatenate(scores))
    threshold = float(values[-min(len(values), CANDIDATES * wanted.detections + 1)])
    roi_head = getattr(library.model, 'roi_head', None)
    own = library.model.bbox_head if roi_head is None else roi_head
    for settings in (*(h.get('rcnn', h) for h in holders), own.test_cfg):
        settings.score_thr = threshold
    changes.append(f'scores count from {threshold:.4g}: {int((values > threshold).sum())} boxes')
    return changes


# ---------------------------------------------------------------------- exports
class Exports(NamedTuple):
    """Directories of the integer model and of its float32 twin, and what the integer one is called."""

    integer: str
    float32: str
    label: str


def export_both(config, library: Library, picture: np.ndarray, folder: str) -> Exports:
    """Quantize a model on a picture and export it, with its quantizers and with all of them switched off."""
    student = build_model(config, quantized_model_config(config))
    load_weights(student, dict(state_dict=library.model.state_dict(), meta={}), 'the full-precision model')
    student.eval()
    images, task = library.images(picture), TaskModel(student)
    with torch.no_grad():
        calibrate(student, lambda: task.calibration_forward(images, student.quant_spec.scope), allow_unseen=True)
    test = pipeline_steps(config)
    if test.unknown:
        raise SystemExit(f'the runtimes cannot prepare pictures: the test pipeline has {test.unknown}')
    preparation = dict(pipeline=test.pipeline, pad_divisor=test.pad_divisor, slide=test.slide)
    settings = dict(sizes=[tuple(images.shape[-2:])], preparation=preparation)
    integer, float32 = (os.path.join(folder, name) for name in ('integer', 'float32'))
    label = export_model(student, integer, **settings).manifest['label']
    for _, quantizer in quantizers(student):
        quantizer.mode = 'off'
    export_model(student, float32, **settings)
    return Exports(integer, float32, label)


# ---------------------------------------------------------------------- NNCF
_NNCF = """
import sys
sys.modules['torch'] = None
import nncf, numpy, openvino
graph, inputs, out, kind = sys.argv[1:]
data = nncf.Dataset([dict(numpy.load(inputs))])
settings = dict(model_type=nncf.ModelType.TRANSFORMER) if kind == 'dense' else {}
if kind == 'mask':  # the product of the logits has its weights looked up, where NNCF ends with an error
    settings = dict(ignored_scope=nncf.IgnoredScope(types=['MatMul', 'Gather']))
model = nncf.quantize(openvino.Core().read_model(graph), data, subset_size=1, **settings)
openvino.save_model(model, out, compress_to_fp16=False)
"""


def graph_kind(inputs: Mapping[str, np.ndarray]) -> str:
    """One of :data:`GRAPHS` by a graph's inputs; ``'probe'`` of a runtime's kernels, as its first graph is started."""
    if 'images' in inputs:
        return 'dense'
    if 'features' not in inputs:
        return 'probe'
    return 'mask' if 'labels' in inputs else 'box'


class Recorded(OpenVino):
    """OpenVINO; the inputs of each graph's first run are kept by the graph's hash, for NNCF's calibration."""

    inputs: Dict[str, Dict[str, np.ndarray]] = {}

    def __init__(self, graph: bytes, threads: Optional[int], way: str, **kwargs):
        super().__init__(graph, threads, way, **kwargs)
        self._hash = hashlib.sha256(graph).hexdigest()

    @contextlib.contextmanager
    def borrowed(self, inputs):
        """See :meth:`.registry.Runtime.borrowed`."""
        self.inputs.setdefault(self._hash, {name: np.array(value) for name, value in inputs.items()})
        with super().borrowed(inputs) as outputs:
            yield outputs


class Nncf(Runtime):
    """NNCF's post-training quantization of a float32 graph, in OpenVINO with the settings of :class:`.OpenVino`."""

    name, title, package = 'nncf', "NNCF's model in OpenVINO", 'openvino'
    python = sys.executable
    kernels = 'integer'

    def __init__(self, graph: bytes, threads: Optional[int], way: str):
        import openvino

        inputs = Recorded.inputs[hashlib.sha256(graph).hexdigest()]
        self.input_names = set(inputs)
        with tempfile.TemporaryDirectory() as folder:
            paths = [os.path.join(folder, name) for name in ('graph.onnx', 'inputs.npz', 'nncf.xml')]
            with open(paths[0], 'wb') as file:
                file.write(graph)
            np.savez(paths[1], **inputs)
            kind = graph_kind(inputs)
            subprocess.run([self.python, '-c', _NNCF, *paths, kind], check=True, stdout=subprocess.DEVNULL)
            model = openvino.Core().read_model(paths[2])
            settings = {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': 'f32'}
            settings.update({'INFERENCE_NUM_THREADS': threads} if threads else {})
            self.output_names = [output.get_any_name() for output in model.outputs]
            self.request = openvino.Core().compile_model(model, 'CPU', settings).create_infer_request()

    @classmethod
    def begin(cls, graph: bytes, threads: Optional[int], kernels: str) -> 'Nncf':
        """A session of the quantized graph."""
        return cls(graph, threads, 'integer')

    def run(self, inputs):
        """All outputs by name."""
        with self.borrowed(inputs) as outputs:
            return {name: np.array(output) for name, output in outputs.items()}

    @contextlib.contextmanager
    def borrowed(self, inputs):
        """See :meth:`.registry.Runtime.borrowed`: read where they lie, as :class:`.OpenVino` does."""
        outputs = self.request.infer(dict(inputs), share_inputs=True, share_outputs=True)
        yield {name: outputs[i] for i, name in enumerate(self.output_names)}

    def products(self, graph):
        """Not told."""
        return []


# ---------------------------------------------------------------------- timing
class Parts:
    """Seconds of the parts of the calls inside :meth:`measured`, by name.

    Args:
        clock: In seconds.

    Attributes:
        seconds: By name, summed over calls: ``GRAPHS``, and ``GLUE`` without what they call of each other.
        rows: How many rows the last run of a graph had, by name.
    """

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.seconds: Dict[str, float] = defaultdict(float)
        self.rows: Dict[str, int] = {}
        self._inside = 0.0

    def _timed(self, function: Callable, name: Optional[str]) -> Callable:
        """``function``, timed as ``name``; None: by its inputs, as a graph."""

        def timed(*args, **kwargs):
            part = name or self._graph_of(args)
            outside, self._inside, begun = self._inside, 0.0, self.clock()
            try:
                return function(*args, **kwargs)
            finally:
                spent = self.clock() - begun
                self.seconds[part] += spent - self._inside
                self._inside = outside + spent

        return timed

    def _graph_of(self, args: Sequence) -> str:
        inputs = next(arg for arg in args if isinstance(arg, Mapping))
        part = graph_kind(inputs)
        if part in GRAPHS:
            self.rows[part] = len(next(iter(inputs.values())))
        return part

    @contextlib.contextmanager
    def measured(self) -> Iterator['Parts']:
        """Calls inside the block are measured. Both runtimes are, where they are entered."""
        import onnxruntime
        import openvino

        from psaq_mm.runtime.detection import detector

        entries = [(openvino.InferRequest, 'infer', None), (onnxruntime.InferenceSession, 'run', None)]
        entries += [(detector, name, name) for name in GLUE]
        with contextlib.ExitStack() as stack:
            for owner, attribute, name in entries:
                stack.enter_context(replaced(owner, attribute, self._timed(getattr(owner, attribute), name)))
            yield self


class Side(NamedTuple):
    """One of the models that are measured.

    Attributes:
        name: In the table.
        call: With a picture.
        reference: Name of the float32 side of the same runtime.
    """

    name: str
    call: Callable[[np.ndarray], Any]
    reference: str


PYTORCH = 'PyTorch float32'


def make_sides(exports: Exports, library: Library, picture: np.ndarray, args) -> List[Side]:
    """All sides, PyTorch first."""
    sides = [Side(PYTORCH, library, PYTORCH)]
    for runtime in args.runtime:
        reference = f'{RUNTIMES[runtime].title} float32'
        sides += [
            Side(reference, load(exports.float32, runtime, args.threads).predict, reference),
            Side(
                f'{RUNTIMES[runtime].title} {exports.label}',
                load(exports.integer, runtime, args.threads).predict,
                reference,
            ),
        ]
    if args.nncf:
        Nncf.python = args.nncf
        with replaced(registry, 'RUNTIMES', {**RUNTIMES, 'openvino': Recorded, 'nncf': Nncf}):
            load(exports.float32, 'openvino', args.threads).predict(picture)
            model = load(exports.float32, 'nncf', args.threads)
            model.predict(picture)  # starts all graphs
        sides.append(Side('OpenVINO NNCF int8', model.predict, f'{OpenVino.title} float32'))
    return sides


def check_boxes(name: str, boxes: Boxes, wanted: Boxes) -> None:
    """Exit where a detector has other numbers of boxes than it is measured with."""
    if boxes != wanted:
        raise SystemExit(
            f'{name} has {boxes.proposals} proposals and {boxes.detections} detections on the picture, not '
            f'{wanted.proposals} and {wanted.detections}: its heads have less to do than is to be measured; give a '
            'larger --size or another --picture'
        )


def deployed_boxes(call: Callable, picture: np.ndarray) -> Boxes:
    """How many boxes an exported model has on a picture."""
    parts = Parts(time.perf_counter)
    with parts.measured():
        prediction = call(picture)
    boxes = getattr(prediction, 'boxes', None)
    return Boxes(parts.rows.get('box'), None if boxes is None else len(boxes))


def time_in_turn(sides: Sequence[Side], picture: np.ndarray, rounds: int, clock) -> Tuple[Dict, Dict]:
    """Seconds of each side, and of the parts of each that has some, both by name; one round before is not counted."""
    seconds: Dict[str, List[float]] = {side.name: [] for side in sides}
    parts: Dict[str, List[Dict[str, float]]] = {side.name: [] for side in sides}
    for turn in range(rounds + 1):
        for side in sides:
            time.sleep(0.05)  # threads of a runtime look out for more work for a while after a run
            split = Parts(clock)
            with split.measured():
                begun = clock()
                side.call(picture)
                spent = clock() - begun
            if turn:
                seconds[side.name].append(spent)
                parts[side.name].append(split.seconds)
    return seconds, parts


def split_rows(seconds: Dict, parts: Dict) -> List[Tuple]:
    """Milliseconds of the graphs, of all glue, and of its parts, medians; a row a side that is no PyTorch."""
    rows = []
    for name, turns in parts.items():
        if name == PYTORCH:
            continue
        columns = [[turn.get(part, 0.0) for turn in turns] for part in (*GRAPHS, *GLUE)]
        graphs = [sum(turn.get(part, 0.0) for part in GRAPHS) for turn in turns]
        glue = [whole - inside for whole, inside in zip(seconds[name], graphs)]
        named = [sum(turn.get(part, 0.0) for part in GLUE) for turn in turns]
        other = [a - b for a, b in zip(glue, named)]
        cells = [*columns[: len(GRAPHS)], glue, *columns[len(GRAPHS) :], other]
        rows.append((name, *(f'{1e3 * statistics.median(cell):.1f}' for cell in cells)))
    return rows


def speed_rows(sides: Sequence[Side], seconds: Dict) -> List[Tuple]:
    """Pictures a second, milliseconds, and speed-up over PyTorch and over the runtime's own float32; a row a side."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        (
            side.name,
            f'{1 / medians[side.name]:.3f}',
            f'{1e3 * medians[side.name]:.1f}',
            f'{ratio(seconds, PYTORCH, side.name):.2f}',
            f'{ratio(seconds, side.reference, side.name):.2f}',
        )
        for side in sides
    ]


def ratio(seconds: Dict[str, List[float]], of: str, to: str) -> float:
    """Median of the ratios of what was measured in the same turn."""
    return statistics.median(a / b for a, b in zip(seconds[of], seconds[to]))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='of a quantized detector or segmentor')
    parser.add_argument('--checkpoint', help='full-precision weights; random without')
    parser.add_argument(
        '--size', nargs=2, type=int, metavar=('H', 'W'), default=(800, 1216), help='of the drawn picture'
    )
    parser.add_argument('--picture', help='a file, in place of a drawn picture')
    parser.add_argument('--quant', help="preset such as w4a8, in place of the config's")
    parser.add_argument('--scope', default='full', choices=('full', 'backbone'), help='what is quantized')
    parser.add_argument('--runtime', nargs='+', default=list(RUNTIMES), choices=list(RUNTIMES))
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument(
        '--nncf', nargs='?', const=sys.executable, metavar='PYTHON', help="measure NNCF's model of the same graphs too"
    )
    parser.add_argument(
        '--processor-time',
        action='store_true',
        help='count what the processor spends on it: for a machine that has other work, with --threads 1, as waiting '
        'threads count too',
    )
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    torch.set_num_threads(args.threads)
    busy = busy_share()
    config = load_config(args.config, {'model.quant.scope': args.scope}, args.quant)
    picture = drawn_picture(args.size) if args.picture is None else cv2.imread(args.picture)
    library = Library(float_model(config, args.checkpoint), config)
    if not args.checkpoint:
        seed_(library, picture)
    changes = lower_thresholds_(config, library, picture)
    wanted = allowed_boxes(library.model)
    proposal_sides: List[float] = []
    check_boxes(PYTORCH, library_boxes(library, picture, proposal_sides), wanted)
    if proposal_sides:
        low, middle, high = np.percentile(proposal_sides, (5, 50, 95))
        changes.append(f'proposals of {low:.0f} to {high:.0f} pixels, half of them above {middle:.0f}')
    with tempfile.TemporaryDirectory() as folder:
        exports = export_both(config, library, picture, folder)
        sides = make_sides(exports, library, picture, args)
        for side in sides[1:]:
            check_boxes(side.name, deployed_boxes(side.call, picture), wanted)
        clock = time.process_time if args.processor_time else time.perf_counter
        seconds, parts = time_in_turn(sides, picture, args.rounds, clock)
    report(args, picture, library, changes, wanted, busy)
    head = ('model', 'pictures/s', 'ms', 'over PyTorch', 'over its float32')
    print(text_table(head, speed_rows(sides, seconds), 'lrrrr', rule=False))
    head = ('milliseconds of', *GRAPHS, 'glue:', *GLUE, 'other')
    print('\n' + text_table(head, split_rows(seconds, parts), 'l' + 'r' * (len(head) - 1), rule=False))
    if busy is not None and busy > 0.1 and not args.processor_time:
        print('The machine was busy: these ratios are no result.')


def report(args, picture, library, changes, wanted, busy) -> None:
    """Print what was measured, and on what."""
    height, width = picture.shape[:2]
    network = tuple(library.images(picture).shape[-2:])
    print(processor())
    print(f'CPU time that others took before: {"not known" if busy is None else f"{busy:.0%}"}')
    print(
        f'{os.path.basename(args.config)}, scope {args.scope}, a picture of {height} x {width}, a network of '
        f'{network[0]} x {network[1]}, {args.threads} threads, median of {args.rounds} in turn, '
        f'{args.checkpoint or "random weights"}{", processor time" if args.processor_time else ""}'
    )
    if wanted.detections is not None:
        proposals = '' if wanted.proposals is None else f' of {wanted.proposals} proposals'
        print(f'{wanted.detections} detections{proposals} on every side; {"; ".join(changes)}')


if __name__ == '__main__':
    main()
