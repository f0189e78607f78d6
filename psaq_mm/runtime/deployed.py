# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Running an exported model with NumPy and one runtime: no PyTorch, no OpenMMLab library."""

import os
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from psaq_mm.errors import DataError
from psaq_mm.runtime.bundle import read_manifest, read_weights
from psaq_mm.runtime.glue import finish
from psaq_mm.runtime.registry import Runtime, find_runtime, start, starting
from psaq_mm.runtime.wire import append_initializers

__all__ = ['DeployedModel', 'load']

Images = Union[np.ndarray, Sequence[np.ndarray]]


class DeployedModel:
    """An exported model in a runtime. A graph is compiled when the first image of its size comes. Several threads may
    call one model.

    Args:
        directory: As ``tools/export.py`` wrote it.
        runtime: Name of the runtime, one of :data:`.registry.RUNTIMES`.
        threads: Of the runtime. Defaults to None, its own choice.
        kernels: See :func:`.registry.start`.
        device: Of the runtime, by its own names (``'CPU'``, ``'GPU'``, ``'AUTO'``; ``'CUDA'``). Defaults to None, the
            CPU.
        settings: The runtime's own settings by name, such as ``{'NUM_STREAMS': 2}``.

    Attributes:
        manifest: What the export wrote down.
        task: ``'classification'``, ``'segmentation'``, ``'detection'``, ``'backbone'``, or ``'other'`` for a model that
            is none of these.

    Raises:
        CheckpointError: The directory holds no exported model, or a file of it is missing or changed.
        ConfigError: The runtime is not known, not installed or too old, has no such device, or ``kernels`` is not known.
    """

    def __init__(
        self,
        directory: Union[str, os.PathLike],
        runtime: str = 'openvino',
        threads: Optional[int] = None,
        kernels: str = 'auto',
        device: Optional[str] = None,
        settings: Optional[Mapping[str, Any]] = None,
    ):
        find_runtime(runtime, kernels, device, settings)
        self.directory, self.runtime, self.threads, self._wanted_kernels = directory, runtime, threads, kernels
        self._place: Dict[str, Any] = dict(device=device, settings=settings)
        self.manifest = read_manifest(directory)
        self.task: str = self.manifest['task']
        graphs = sorted(self.manifest['graphs'], key=lambda g: g['size'][0] * g['size'][1])
        self._graphs = {tuple(g['size']): g for g in graphs}
        self._multiple: Optional[int] = graphs[0].get('multiple')
        self._sessions: Dict[str, Runtime] = {}

    @property
    def sizes(self) -> List[Tuple[int, int]]:
        """Image sizes (height, width) that there is a graph for, smallest first; with a dynamic size, the one that the
        graph was traced with.
        """
        return list(self._graphs)

    def graph(self, size: Tuple[int, int]) -> bytes:
        """The ONNX file of a size with its weights; those of 4 bits are widened to bytes."""
        entry = self._entry(size)
        with open(os.path.join(self.directory, entry['file']), 'rb') as file:
            content = file.read()
        return append_initializers(content, read_weights(self.directory, self.manifest, entry['weights']))

    def session(self, size: Tuple[int, int]) -> Runtime:
        """The runtime that was started with the graph of a size."""
        file = self._entry(size)['file']
        if file not in self._sessions:
            with starting:  # of two threads that ask for one at once, the first one starts it
                if file not in self._sessions:
                    self._sessions[file] = self._started(self.graph(size))
        return self._sessions[file]

    def _started(self, graph: bytes) -> Runtime:
        return start(graph, self.runtime, self.threads, self._wanted_kernels, **self._place)

    @property
    def kernels(self) -> Tuple[str, ...]:
        """What the graphs that were started so far run with, of :data:`.kernels.KERNELS`."""
        return tuple(sorted({session.kernels for session in list(self._sessions.values())}))

    def _entry(self, size: Tuple[int, int]) -> Dict[str, Any]:
        return next(iter(self._graphs.values())) if self._multiple else self._graphs[size]

    def size_for(self, height: int, width: int) -> Tuple[int, int]:
        """The smallest exported size that an image fits into.

        Raises:
            DataError: There is none, or the model takes one size only.
        """
        if self._multiple:
            return -(-height // self._multiple) * self._multiple, -(-width // self._multiple) * self._multiple
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
        """Run the graph on normalized images.

        An image is padded with zeros at the right and at the bottom to the smallest exported size that it fits into, as
        the libraries pad the images of a batch (a zero is the mean colour). Maps are cut back to the part of the image.

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
        outputs = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        if size != (height, width):
            outputs = {name: self._cut(name, output, height, width) for name, output in outputs.items()}
        return outputs

    def _cut(self, name: str, value: np.ndarray, height: int, width: int) -> np.ndarray:
        stride = self.manifest['strides'].get(name)
        return value if not stride else value[..., : -(-height // stride), : -(-width // stride)]

    def normalize(self, images: Images) -> np.ndarray:
        """Normalize pictures as the network takes them.

        Args:
            images: (H, W, C), (N, H, W, C), or a sequence of (H, W, C) of one size; raw values, blue channel first as
                OpenCV reads.

        Returns:
            float32 (N, C, H, W).

        Raises:
            DataError: They are of several sizes, or have other channels.
        """
        if isinstance(images, np.ndarray):
            batch = images[None] if images.ndim == 3 else images
        else:
            arrays = [np.asarray(image) for image in images]
            shapes = {array.shape for array in arrays}
            if len(shapes) != 1:
                raise DataError(f'the images have the shapes {sorted(shapes)}: call the model once for each size')
            batch = np.stack(arrays)
        if batch.ndim != 4 or batch.shape[-1] != self.manifest['channels']:
            raise DataError(
                f'images of shape {tuple(batch.shape)} are no pictures of {self.manifest["channels"]} channels: give '
                '(H, W, C) or (N, H, W, C)'
            )
        if self.manifest['reverse_channels']:
            batch = batch[..., ::-1]
        batch = batch.astype(np.float32)
        if self.manifest['mean']:
            mean, std = (np.array(self.manifest[name], np.float32) for name in ('mean', 'std'))
            batch = (batch - mean) / std
        return np.ascontiguousarray(batch.transpose(0, 3, 1, 2))

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
        return finish(self.run(batch), self.manifest, (batch.shape[2], batch.shape[3]))


def load(
    directory: Union[str, os.PathLike],
    runtime: str = 'openvino',
    threads: Optional[int] = None,
    kernels: str = 'auto',
    device: Optional[str] = None,
    settings: Optional[Mapping[str, Any]] = None,
) -> DeployedModel:
    """An exported model, ready to be called with pictures. See :class:`DeployedModel`.

    Example:
        >>> model = psaq_mm.deploy.load('work_dirs/deployed', runtime='onnxruntime')
        >>> classes = model(cv2.imread('street.png'))['labels'][0]
    """
    return DeployedModel(directory, runtime, threads, kernels, device, settings)
