# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Running an exported model with NumPy and one runtime: no PyTorch, no OpenMMLab library."""
import os
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from ..errors import ConfigError, DataError
from .bundle import read_manifest, read_weights
from .wire import append_initializers

__all__ = ['RUNTIMES', 'DeployedModel', 'load', 'require_runtime', 'start']

Images = Union[np.ndarray, Sequence[np.ndarray]]


ORT_DISABLED = ('MatMulAddFusion', 'WeightBiasQuantization')
"""Optimizers of ONNX Runtime that are off. A product and its bias made one Gemm would have a float kernel, as its output is float; apart,
the product is an integer one. And a bias is float32 in the model: it is not rounded to multiples of the two scales."""


class _OnnxRuntime:
    """A graph in ONNX Runtime."""

    def __init__(self, graph: bytes, threads: Optional[int]):
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads:
            options.intra_op_num_threads = threads
        # Without VNNI, the fast kernel for unsigned times signed codes saturates in 16 bits: ask for the exact one there.
        options.add_session_config_entry('session.x64quantprecision', '1')
        self.session = onnxruntime.InferenceSession(
            graph, options, providers=['CPUExecutionProvider'], disabled_optimizers=list(ORT_DISABLED))
        self.names = [output.name for output in self.session.get_outputs()]
        self.input_names = {given.name for given in self.session.get_inputs()}

    def run(self, inputs: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
        """All outputs by name."""
        return dict(zip(self.names, self.session.run(None, dict(inputs))))


class _OpenVino:
    """A graph in OpenVINO, on the CPU."""

    def __init__(self, graph: bytes, threads: Optional[int]):
        import io

        import openvino
        # What is float in the graph is float32 at run time too: a CPU with bfloat16 or float16 units would otherwise use those.
        # And what is quantized is so by the ranges of the model alone: where it has no integer kernel, OpenVINO would quantize the
        # activations by ranges of its own.
        settings = {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': 'f32', 'DYNAMIC_QUANTIZATION_GROUP_SIZE': '0'}
        if threads:
            settings['INFERENCE_NUM_THREADS'] = threads
        core = openvino.Core()
        model = core.read_model(io.BytesIO(graph))
        self.names = [output.get_any_name() for output in model.outputs]
        self.input_names = {name for given in model.inputs for name in given.get_names()}
        self.compiled = core.compile_model(model, 'CPU', settings)
        self.request = self.compiled.create_infer_request()

    def run(self, inputs: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
        """All outputs by name."""
        # Read where they lie; and the outputs' memory is the next run's too, so they are copied, once.
        found = self.request.infer(dict(inputs), share_inputs=True, share_outputs=True)
        return {name: np.array(found[i]) for i, name in enumerate(self.names)}


RUNTIMES: Dict[str, Any] = {'openvino': _OpenVino, 'onnxruntime': _OnnxRuntime}
"""Classes that run a graph, by the name of the package they need."""


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
        raise ConfigError(f'the runtime {runtime} is not installed ({error}): pip install psaq_mm[deploy], or choose another one of '
                          f'{", ".join(map(repr, RUNTIMES))}') from error


def start(graph: bytes, runtime: str, threads: Optional[int] = None):
    """A session of a whole ONNX graph; its ``run(inputs)`` takes and gives arrays by name.

    Raises:
        ConfigError: The runtime is not known or not installed.
    """
    require_runtime(runtime)
    return RUNTIMES[runtime](graph, threads)


class DeployedModel:
    """An exported model in a runtime. Graphs are compiled when an image of their size first comes.

    Args:
        directory: As ``tools/export.py`` wrote it.
        runtime: ``'openvino'`` or ``'onnxruntime'``.
        threads: Of the runtime. Defaults to None, its own choice.

    Attributes:
        manifest: What the export wrote down.
        task: ``'classification'``, ``'segmentation'``, ``'detection'``, ``'backbone'``, or ``'other'`` for a model that is none of these.
        sizes: Image sizes (height, width) that there is a graph for, smallest first; with a dynamic size, the one it was traced with.

    Raises:
        CheckpointError: The directory is none, or not whole.
        ConfigError: The runtime is not known or not installed.
    """

    def __init__(self, directory: Union[str, os.PathLike], runtime: str = 'openvino', threads: Optional[int] = None):
        require_runtime(runtime)
        self.directory, self.runtime, self.threads = directory, runtime, threads
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
            self._sessions[file] = start(self.graph(size), self.runtime, self.threads)
        return self._sessions[file]

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
            raise DataError(f'an image of {height} x {width} does not fit this model, which takes {known} and pads nothing: resize '
                            'the image, or export it with --size for this one too')
        for size in self._graphs:
            if height <= size[0] and width <= size[1]:
                return size
        raise DataError(f'an image of {height} x {width} is larger than what the model was exported for ({known}): resize it, or '
                        'export with a larger --size')

    def run(self, images: np.ndarray) -> Dict[str, np.ndarray]:
        """Outputs of the graph for images as the network takes them.

        An image smaller than the smallest size that it fits into is padded with zeros at the right and at the bottom, as the
        libraries pad the images of a batch (a zero is the mean colour); maps are cut back to what belongs to the image.

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
        rows = [session.run({'images': images[i:i + 1]}) for i in range(len(images))]
        found = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        if size != (height, width):
            found = {k: self._cut(k, v, height, width) for k, v in found.items()}
        return found

    def _cut(self, name: str, value: np.ndarray, height: int, width: int) -> np.ndarray:
        stride = self.manifest['strides'].get(name)
        return value if not stride else value[..., :-(-height // stride), :-(-width // stride)]

    def normalize(self, images: Images) -> np.ndarray:
        """Pictures as the network takes them.

        Args:
            images: (H, W, C), (N, H, W, C), or a sequence of (H, W, C) of one size; raw values, blue channel first as OpenCV reads.

        Returns:
            float32 (N, C, H, W).

        Raises:
            DataError: They are of several sizes, or have other channels.
        """
        if not isinstance(images, np.ndarray):
            images = [np.asarray(image) for image in images]
            if len({image.shape for image in images}) != 1:
                raise DataError(f'the images have the shapes {sorted({i.shape for i in images})}: call the model once for each size')
            images = np.stack(images)
        images = images[None] if images.ndim == 3 else images
        if images.ndim != 4 or images.shape[-1] != self.manifest['channels']:
            raise DataError(f'images of shape {tuple(images.shape)} are no pictures of {self.manifest["channels"]} channels: give '
                            '(H, W, C) or (N, H, W, C)')
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
            The graph's outputs: for a classifier ``logits`` (N, classes); for a segmentor ``logits`` (N, classes, h, w) and ``labels``
            (N, H, W), the class of each pixel (feature maps alone where its head stays in PyTorch); for a detector feature maps and the maps of its dense head, which its library's RoI
            part or box decoding turns into boxes (``tools/test.py --deployed``).

        Raises:
            DataError: The images do not fit.
        """
        batch = self.normalize(images)
        found = self.run(batch)
        rule = self.manifest.get('labels', dict(rule='argmax'))  # what exports of earlier versions have
        if self.task == 'segmentation' and rule and 'logits' in found:
            found['labels'] = _classes(_upsample(found['logits'], batch.shape[2:], self.manifest['align_corners']), rule)
        return found


def _classes(logits: np.ndarray, rule: Mapping) -> np.ndarray:
    """The class of each pixel, (N, C, H, W) to (N, H, W): the greatest of several logits; of one, whether its sigmoid exceeds a
    threshold."""
    if rule['rule'] == 'argmax':
        return logits.argmax(1)
    with np.errstate(over='ignore'):
        return (1 / (1 + np.exp(-logits[:, 0])) > np.float32(rule['threshold'])).astype(np.int64)


def _positions(size: int, target: int, align_corners: bool) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    if align_corners:
        where = np.linspace(0, size - 1, target)
    else:
        where = np.maximum((np.arange(target) + .5) * size / target - .5, 0)
    low = np.minimum(where.astype(np.int64), size - 1)
    return low, np.minimum(low + 1, size - 1), (where - low).astype(np.float32)


def _upsample(maps: np.ndarray, size: Sequence[int], align_corners: bool) -> np.ndarray:
    """Bilinear, (N, C, h, w) to (N, C, H, W), as PyTorch's ``interpolate``."""
    low, high, share = _positions(maps.shape[2], size[0], align_corners)
    maps = maps[:, :, low] * (1 - share)[:, None] + maps[:, :, high] * share[:, None]
    low, high, share = _positions(maps.shape[3], size[1], align_corners)
    return maps[..., low] * (1 - share) + maps[..., high] * share


def load(directory: Union[str, os.PathLike], runtime: str = 'openvino', threads: Optional[int] = None) -> DeployedModel:
    """An exported model, ready to be called with pictures. See :class:`DeployedModel`.

    Example:
        >>> model = psaq_mm.deploy.load('work_dirs/deployed', runtime='onnxruntime')
        >>> classes = model(cv2.imread('street.png'))['labels'][0]
    """
    return DeployedModel(directory, runtime, threads)
