# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Running an exported model with NumPy and one runtime: no PyTorch, no OpenMMLab library."""

import os
import threading
import warnings
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple, Union

import numpy as np

from psaq_mm.errors import ConfigError, DataError
from psaq_mm.runtime.bundle import read_manifest, read_weights
from psaq_mm.runtime.glue import finish
from psaq_mm.runtime.kernels import KERNELS, NARROW, is_exact, make_probe
from psaq_mm.runtime.wire import append_initializers

__all__ = ['RUNTIMES', 'DeployedModel', 'exact_way', 'load', 'require_kernels', 'require_runtime', 'start']

Images = Union[np.ndarray, Sequence[np.ndarray]]


ORT_DISABLED = ('MatMulAddFusion', 'WeightBiasQuantization')
"""Optimizers of ONNX Runtime that are off. A product and its bias made one Gemm would have a float kernel, as its
output is float; apart, the product is an integer one. And a bias is float32 in the model: it is not rounded to
multiples of the two scales."""


class _OnnxRuntime:
    """A graph in ONNX Runtime. It runs products of activations in float as it is.

    Attributes:
        kernels: See :data:`.kernels.KERNELS`.
    """

    title = 'ONNX Runtime'
    ways = ('integer', 'unsigned', 'float')
    """Those of ``kernels``, and between them integer kernels on weights with 128 added, which do not saturate where the
    first ones do."""

    def __init__(self, graph: bytes, threads: Optional[int], way: str):
        self.session = self.new_session(graph, threads, way)
        self.way, self.kernels = way, 'float' if way == 'float' else 'integer'
        self.names = [output.name for output in self.session.get_outputs()]
        self.input_names = {given.name for given in self.session.get_inputs()}

    @classmethod
    def begin(cls, graph: bytes, threads: Optional[int], kernels: str) -> '_OnnxRuntime':
        """A session with the kernels that are asked for."""
        way = kernels if kernels == 'float' else exact_way('onnxruntime')
        if kernels != 'auto':
            return cls(graph, threads, 'integer' if kernels != 'float' and way == 'float' else way)
        try:
            return cls(graph, threads, way)
        except Exception:  # of the runtime's own
            # A graph of an earlier psaq_mm may read one weight in several products, which this way does not take.
            if way != 'unsigned':
                raise
            return cls(graph, threads, 'float')

    @staticmethod
    def new_session(graph: bytes, threads: Optional[int], way: str, optimized_path: Optional[str] = None):
        """The runtime's own session.

        Args:
            graph: ONNX file.
            threads: Of the runtime.
            way: One of :attr:`ways`.
            optimized_path: Where to write the graph as the runtime executes it.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what cannot be started is raised
        if threads:
            options.intra_op_num_threads = threads
        if optimized_path:
            options.optimized_model_filepath = optimized_path
        options.add_session_config_entry('session.x64quantprecision', '1' if way == 'unsigned' else '0')
        options.add_session_config_entry('session.disable_quant_qdq', '1' if way == 'float' else '0')
        return onnxruntime.InferenceSession(
            graph, options, providers=['CPUExecutionProvider'], disabled_optimizers=list(ORT_DISABLED)
        )

    def run(self, inputs: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
        """All outputs by name. Threads may call it at once, as the runtime's session."""
        return dict(zip(self.names, self.session.run(None, dict(inputs))))


class _OpenVino:
    """A graph in OpenVINO, on the CPU.

    Attributes:
        kernels: See :data:`.kernels.KERNELS`.
    """

    title = 'OpenVINO'
    ways = ('integer', 'weights', 'float')

    def __init__(self, graph: bytes, threads: Optional[int], way: str, check_weights: bool = False):
        import io

        import openvino

        # What is float in the graph is float32 at run time too: a CPU with bfloat16 or float16 units would otherwise
        # use those. And what is quantized is so by the ranges of the model alone: where it has no integer kernel,
        # OpenVINO would quantize the activations by ranges of its own.
        settings = {
            'PERFORMANCE_HINT': 'LATENCY',
            'INFERENCE_PRECISION_HINT': 'f32',
            'DYNAMIC_QUANTIZATION_GROUP_SIZE': '0',
        }
        if threads:
            settings['INFERENCE_NUM_THREADS'] = threads
        core = openvino.Core()
        model = core.read_model(io.BytesIO(graph))
        self.names = [output.get_any_name() for output in model.outputs]
        self.input_names = {name for given in model.inputs for name in given.get_names()}
        if way == 'weights' and check_weights and _has_wide_weights(model):
            way = 'float'
        if way == 'weights' and not _part_products(model):
            way = 'integer'
        if way == 'float':
            settings['LP_TRANSFORMS_MODE'] = 'NO'
        self.kernels = way
        self.compiled = core.compile_model(model, 'CPU', settings)
        self.request = self.compiled.create_infer_request()
        self.lock = threading.Lock()

    @classmethod
    def begin(cls, graph: bytes, threads: Optional[int], kernels: str) -> '_OpenVino':
        """A session with the kernels that are asked for."""
        if kernels == 'auto':
            return cls(graph, threads, exact_way('openvino'), check_weights=True)
        return cls(graph, threads, kernels)

    def run(self, inputs: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
        """All outputs by name. Threads may call it at once: they wait for each other, as there is one request."""
        with self.lock:
            # Read where they lie; and the outputs' memory is the next run's too, so they are copied, once.
            found = self.request.infer(dict(inputs), share_inputs=True, share_outputs=True)
            return {name: np.array(found[i]) for i, name in enumerate(self.names)}


def _has_wide_weights(model) -> bool:
    """Whether a weight of an OpenVINO model has codes beyond :data:`.kernels.NARROW`. Zero points and look-up tables
    are no matrices of int8.
    """
    for node in model.get_ops():
        if (
            node.get_type_name() == 'Constant'
            and node.get_element_type().get_type_name() == 'i8'
            and len(node.get_output_shape(0)) > 1
        ):
            codes = np.asarray(node.data)
            if codes.size and max(-int(codes.min()), int(codes.max())) > NARROW:
                return True
    return False


def _part_products(model) -> int:
    """Make the products of activations in an OpenVINO model float ones, in place; how many there are.

    A maximum with the least number changes no value, and OpenVINO looks for codes before it in vain.
    """
    from openvino import opset8

    from_inputs, products = set(), []
    for node in model.get_ordered_ops():
        sources = [port.get_source_output().get_node() for port in node.inputs()]
        varies = [source.get_friendly_name() in from_inputs for source in sources]
        if node.get_type_name() == 'Parameter' or any(varies):
            from_inputs.add(node.get_friendly_name())
        if node.get_type_name() == 'MatMul' and all(varies) and node.get_element_type().get_type_name() == 'f32':
            products.append(node)
    for node in products:
        port = node.input(1)
        least = opset8.constant(np.full(1, np.finfo(np.float32).min, np.float32))
        port.replace_source_output(opset8.maximum(port.get_source_output(), least).output(0))
    return len(products)


RUNTIMES: Dict[str, Any] = {'openvino': _OpenVino, 'onnxruntime': _OnnxRuntime}
"""Classes that run a graph, by the name of the package they need."""

_starting = threading.RLock()  # of sessions, and of what is found out once a process
_exact_ways: Dict[str, str] = {}
_told: Set[Tuple[str, str]] = set()


def exact_way(runtime: str) -> str:
    """The first of a runtime's ``ways`` that computes exactly on this processor, found out once a process.

    Raises:
        ConfigError: There is none.
    """
    with _starting:
        if runtime not in _exact_ways:
            _exact_ways[runtime] = _find_exact_way(runtime)
        return _exact_ways[runtime]


def _find_exact_way(runtime: str) -> str:
    kind = RUNTIMES[runtime]
    for way in kind.ways:
        probe = make_probe(NARROW if way == 'weights' else 127)
        if is_exact(kind(probe.graph, 1, way).run, probe):
            return way
    raise ConfigError(
        f'{kind.title} multiplies 8-bit codes wrongly on this processor, with integer and with float kernels: choose '
        f'another '
        f'runtime, one of {", ".join(repr(name) for name in RUNTIMES if name != runtime)}'
    )


def _tell(session) -> None:
    """Say once a process why a graph is not run as it would be elsewhere."""
    key = session.title, session.kernels
    if session.kernels == session.ways[0] or key in _told:
        return
    _told.add(key)
    which = 'this model' if session.kernels == 'float' else 'the attention of this model'
    advice = (
        ''
        if session.kernels != 'float'
        else (
            '. Weights held within 7 bits are exact in integer kernels everywhere: quantize with w_reduce_range=True '
            '(docs/deploy.md)'
        )
    )
    warnings.warn(
        f"{session.title}'s integer kernels are not exact on this processor (one without VNNI instructions): {which} "
        f'runs in '
        f'float kernels, with the same answers, slower{advice}',
        stacklevel=3,
    )


def require_runtime(runtime: str) -> None:
    """Check that a runtime is known and installed.

    Raises:
        ConfigError: It is not; the sentence says what to do.
    """
    if runtime not in RUNTIMES:
        raise ConfigError(f'runtime={runtime!r} is not known: choose one of {", ".join(map(repr, RUNTIMES))}')
    try:
        __import__(runtime)
    except ImportError as error:
        raise ConfigError(
            f'the runtime {runtime} is not installed ({error}): pip install psaq_mm[deploy], or choose another one of '
            f'{", ".join(map(repr, RUNTIMES))}'
        ) from error


def require_kernels(kernels: str) -> None:
    """Raises ConfigError where ``kernels`` is none of :data:`.kernels.KERNELS`."""
    if kernels not in KERNELS:
        raise ConfigError(f'kernels={kernels!r} is not known: choose one of {", ".join(map(repr, KERNELS))}')


def start(graph: bytes, runtime: str, threads: Optional[int] = None, kernels: str = 'auto'):
    """A session of a whole ONNX graph; its ``run(inputs)`` takes and gives arrays by name, and may be called by several
    threads.

    Args:
        graph: ONNX file.
        runtime: Its name.
        threads: Of the runtime. Defaults to None, its own choice.
        kernels: One of :data:`.kernels.KERNELS`. Any but ``'auto'`` is for measurements: integer kernels may be wrong.

    Raises:
        ConfigError: The runtime is not known or not installed, has no exact kernels on this processor, or ``kernels``
            is not known.
    """
    require_runtime(runtime)
    require_kernels(kernels)
    session = RUNTIMES[runtime].begin(graph, threads, kernels)
    if kernels == 'auto':
        _tell(session)
    return session


class DeployedModel:
    """An exported model in a runtime. Graphs are compiled when an image of their size first comes.

    Args:
        directory: As ``tools/export.py`` wrote it.
        runtime: ``'openvino'`` or ``'onnxruntime'``.
        threads: Of the runtime. Defaults to None, its own choice.
        kernels: See :func:`start`.

    Several threads may call one model.

    Attributes:
        manifest: What the export wrote down.
        task: ``'classification'``, ``'segmentation'``, ``'detection'``, ``'backbone'``, or ``'other'`` for a model that
            is none of these.
        sizes: Image sizes (height, width) that there is a graph for, smallest first; with a dynamic size, the one it
            was traced with.

    Raises:
        CheckpointError: The directory is none, or not whole.
        ConfigError: The runtime is not known or not installed, or ``kernels`` is not known.
    """

    def __init__(
        self,
        directory: Union[str, os.PathLike],
        runtime: str = 'openvino',
        threads: Optional[int] = None,
        kernels: str = 'auto',
    ):
        require_runtime(runtime)
        require_kernels(kernels)
        self.directory, self.runtime, self.threads, self._wanted_kernels = directory, runtime, threads, kernels
        self.manifest = read_manifest(directory)
        self.task: str = self.manifest['task']
        graphs = sorted(self.manifest['graphs'], key=lambda g: g['size'][0] * g['size'][1])
        self._graphs = {tuple(g['size']): g for g in graphs}
        self._multiple: Optional[int] = graphs[0].get('multiple')
        self._sessions: Dict[str, Any] = {}

    @property
    def sizes(self) -> List[Tuple[int, int]]:
        return list(self._graphs)

    def graph(self, size: Tuple[int, int]) -> bytes:
        """The ONNX file of a size, whole: with its weights, those of 4 bits widened."""
        entry = self._entry(size)
        with open(os.path.join(self.directory, entry['file']), 'rb') as file:
            content = file.read()
        return append_initializers(content, read_weights(self.directory, self.manifest, entry['weights']))

    def session(self, size: Tuple[int, int]):
        """The runtime's session of a size."""
        file = self._entry(size)['file']
        if file not in self._sessions:
            with _starting:  # of two threads that ask for one at once, the first one starts it
                if file not in self._sessions:
                    self._sessions[file] = start(self.graph(size), self.runtime, self.threads, self._wanted_kernels)
        return self._sessions[file]

    @property
    def kernels(self) -> Tuple[str, ...]:
        """What the sessions that were started so far run with, each of :data:`.kernels.KERNELS` once."""
        return tuple(sorted({session.kernels for session in list(self._sessions.values())}))

    def _entry(self, size: Tuple[int, int]) -> Dict[str, Any]:
        return next(iter(self._graphs.values())) if self._multiple else self._graphs[size]

    def size_for(self, height: int, width: int) -> Tuple[int, int]:
        """The smallest exported size that an image fits into.

        Raises:
            DataError: There is none, or the model takes one size only.
        """
        if self._multiple:
            return tuple(-(-side // self._multiple) * self._multiple for side in (height, width))
        if (height, width) in self._graphs:
            return height, width
        known = ', '.join(f'{h} x {w}' for h, w in self._graphs)
        if self.manifest['exact_size']:
            raise DataError(
                f'an image of {height} x {width} does not fit this model, which takes {known} and pads nothing: resize '
                'the image, or export it with --size for this one too'
            )
        for size in self._graphs:
            if height <= size[0] and width <= size[1]:
                return size
        raise DataError(
            f'an image of {height} x {width} is larger than what the model was exported for ({known}): resize it, or '
            'export with a larger --size'
        )

    def run(self, images: np.ndarray) -> Dict[str, np.ndarray]:
        """Outputs of the graph for images as the network takes them.

        An image smaller than the smallest size that it fits into is padded with zeros at the right and at the bottom,
        as the libraries pad the images of a batch (a zero is the mean colour); maps are cut back to what belongs to the
        image.

        Args:
            images: float32 (N, C, H, W), normalized.

        Returns:
            Arrays by the graph's output names, N in front.

        Raises:
            DataError: No size fits.
        """
        if images.ndim != 4 or images.shape[1] != self.manifest['channels']:
            raise DataError(f'the images have shape {tuple(images.shape)}: give (N, {self.manifest["channels"]}, H, W)')
        if not len(images):
            raise DataError(f'there is no image in an array of shape {tuple(images.shape)}: give at least one')
        height, width = images.shape[2:]
        size = self.size_for(height, width)
        session = self.session(size)
        if size != (height, width):
            images = np.pad(images, ((0, 0), (0, 0), (0, size[0] - height), (0, size[1] - width)))
        images = np.ascontiguousarray(images, np.float32)
        rows = [session.run({'images': images[i : i + 1]}) for i in range(len(images))]
        found = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        if size != (height, width):
            found = {k: self._cut(k, v, height, width) for k, v in found.items()}
        return found

    def _cut(self, name: str, value: np.ndarray, height: int, width: int) -> np.ndarray:
        stride = self.manifest['strides'].get(name)
        return value if not stride else value[..., : -(-height // stride), : -(-width // stride)]

    def normalize(self, images: Images) -> np.ndarray:
        """Pictures as the network takes them.

        Args:
            images: (H, W, C), (N, H, W, C), or a sequence of (H, W, C) of one size; raw values, blue channel first as
                OpenCV reads.

        Returns:
            float32 (N, C, H, W).

        Raises:
            DataError: They are of several sizes, or have other channels.
        """
        if not isinstance(images, np.ndarray):
            images = [np.asarray(image) for image in images]
            if len({image.shape for image in images}) != 1:
                raise DataError(
                    f'the images have the shapes {sorted({i.shape for i in images})}: call the model once for each size'
                )
            images = np.stack(images)
        images = images[None] if images.ndim == 3 else images
        if images.ndim != 4 or images.shape[-1] != self.manifest['channels']:
            raise DataError(
                f'images of shape {tuple(images.shape)} are no pictures of {self.manifest["channels"]} channels: give '
                '(H, W, C) or (N, H, W, C)'
            )
        if self.manifest['reverse_channels']:
            images = images[..., ::-1]
        images = images.astype(np.float32)
        if self.manifest['mean']:
            images = (images - np.float32(self.manifest['mean'])) / np.float32(self.manifest['std'])
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))

    def __call__(self, images: Images) -> Dict[str, np.ndarray]:
        """Run the model on pictures.

        Args:
            images: As for :meth:`normalize`.

        Returns:
            The graph's outputs: for a classifier ``logits`` (N, classes); for a segmentor ``logits`` (N, classes, h, w)
            and ``labels`` (N, H, W), the class of each pixel (feature maps alone where its head stays in PyTorch); for
            a detector feature maps and the maps of its dense head, which its library's RoI part or box decoding turns
            into boxes (``tools/test.py --deployed``).

        Raises:
            DataError: The images do not fit.
        """
        batch = self.normalize(images)
        return finish(self.run(batch), self.manifest, batch.shape[2:])


def load(
    directory: Union[str, os.PathLike], runtime: str = 'openvino', threads: Optional[int] = None, kernels: str = 'auto'
) -> DeployedModel:
    """An exported model, ready to be called with pictures. See :class:`DeployedModel`.

    Example:
        >>> model = psaq_mm.deploy.load('work_dirs/deployed', runtime='onnxruntime')
        >>> classes = model(cv2.imread('street.png'))['labels'][0]
    """
    return DeployedModel(directory, runtime, threads, kernels)
