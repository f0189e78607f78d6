# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Running an exported model with NumPy and one runtime: no PyTorch, no OpenMMLab library."""

import os
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from psaq_mm.errors import DataError, UnsupportedModelError
from psaq_mm.runtime.bundle import read_graph, read_manifest, read_weights
from psaq_mm.runtime.detection import Detections, DetectorSettings, ImageInfo, detect
from psaq_mm.runtime.detection.arrays import sigmoid, softmax
from psaq_mm.runtime.glue import finish, label_map, slide
from psaq_mm.runtime.heads import HeadSessions
from psaq_mm.runtime.predictions import Prediction, class_name
from psaq_mm.runtime.preparation import Picture, Preparation, Prepared, read_picture
from psaq_mm.runtime.registry import Runtime, find_runtime, start, starting
from psaq_mm.runtime.wire import append_initializers

__all__ = ['DeployedModel', 'load', 'nested']

Images = Union[Picture, Sequence[Picture]]

_TASKS = ('classification', 'segmentation', 'detection')


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
        complete: Whether it gives final predictions. If not, it gives the outputs of its graphs, and its own library
            makes predictions of them (``tools/test.py --deployed``).

    Raises:
        CheckpointError: The directory holds no exported model, or a file of it is missing or changed.
        ConfigError: The runtime is not known, not installed or too old, has no such device, or ``kernels`` is not
            known.
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
        self.complete = self._is_complete()
        # Earlier exports say nothing of the test pipeline: their pictures are taken as they come.
        self._predicts = self.complete and self.manifest['version'] >= 3
        self._preparation = Preparation(self.manifest)
        self._detector: Optional[DetectorSettings] = None
        if self.task == 'detection' and self.manifest.get('detector') is not None:
            self._detector = DetectorSettings.from_dict(self.manifest['detector'])

    def _is_complete(self) -> bool:
        named = 'logits' in self.manifest['outputs']['names']
        if self.task == 'segmentation':
            return named and bool(self.manifest.get('labels', dict(rule='argmax')))
        if self.task == 'classification':
            return named
        return self.task == 'detection' and bool(self.manifest.get('complete'))

    @property
    def classes(self) -> List[str]:
        """Names of the classes; empty where the export has none."""
        return list(self.manifest.get('classes') or ())

    @property
    def started(self) -> int:
        """How many graphs were started so far."""
        return len(self._sessions)

    @property
    def sizes(self) -> List[Tuple[int, int]]:
        """Image sizes (height, width) that there is a graph for, smallest first; with a dynamic size, the one that the
        graph was traced with.
        """
        return list(self._graphs)

    def graph(self, size: Tuple[int, int]) -> bytes:
        """The ONNX file of a size with its weights; those of 4 bits are widened to bytes."""
        return self._graph(self._entry(size))

    def head_graph(self, kind: str, stage: int = 0) -> bytes:
        """The ONNX file of a head with its weights.

        Args:
            kind: ``'box'`` or ``'mask'``.
            stage: Of a cascade, from 0 on.
        """
        return self._graph(self.manifest['heads'][kind][stage])

    def session(self, size: Tuple[int, int]) -> Runtime:
        """The runtime that was started with the graph of a size."""
        return self._session(self._entry(size))

    def head_session(self, kind: str, stage: int = 0) -> Runtime:
        """The runtime that was started with the graph of a head, see :meth:`head_graph`."""
        return self._session(self.manifest['heads'][kind][stage])

    def _graph(self, entry: Mapping[str, Any]) -> bytes:
        content = read_graph(self.directory, self.manifest, entry)
        return append_initializers(content, read_weights(self.directory, self.manifest, entry['weights']))

    def _session(self, entry: Mapping[str, Any]) -> Runtime:
        file = entry['file']
        if file not in self._sessions:
            with starting:  # of two threads that ask for one at once, the first one starts it
                if file not in self._sessions:
                    self._sessions[file] = self._started(self._graph(entry))
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

    def _check_images(self, images: np.ndarray) -> None:
        if images.ndim != 4 or images.shape[1] != self.manifest['channels']:
            raise DataError(f'the images have shape {tuple(images.shape)}: give (N, {self.manifest["channels"]}, H, W)')
        if not len(images):
            raise DataError(f'there is no image in an array of shape {tuple(images.shape)}: give at least one')

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
        self._check_images(images)
        height, width = images.shape[2:]
        session, fitting = self._fitting(images)
        rows = [session.run({'images': fitting[i : i + 1]}) for i in range(len(fitting))]
        outputs = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        return self._cut(outputs, height, width)

    def _fitting(self, images: np.ndarray) -> Tuple[Runtime, np.ndarray]:
        """The session for images of a size, and the images as its graph takes them."""
        height, width = images.shape[2:]
        size = self.size_for(height, width)
        session = self.session(size)
        if size != (height, width):
            images = np.pad(images, ((0, 0), (0, 0), (0, size[0] - height), (0, size[1] - width)))
        return session, np.ascontiguousarray(images, np.float32)

    def _cut(self, outputs: Mapping[str, np.ndarray], height: int, width: int) -> Dict[str, np.ndarray]:
        """Maps without what belongs to the padding to an exported size: views."""
        strides, last = self.manifest['strides'], set(self.manifest['outputs'].get('channel_last') or ())
        cut = {}
        for name, value in outputs.items():
            if strides.get(name):
                rows, columns = (-(-side // strides[name]) for side in (height, width))
                value = value[:, :rows, :columns] if name in last else value[..., :rows, :columns]
            cut[name] = value
        return cut

    def detect(self, images: np.ndarray, infos: Sequence[ImageInfo]) -> List[Detections]:
        """Run a detector on normalized images: dense graph, the glue in NumPy, box and mask heads.

        Args:
            images: float32 (N, C, H, W), normalized, padded with zeros to a multiple of ``pad_divisor`` of the
                manifest: each of their cells has its anchors, as in mmdet.
            infos: Sizes of each picture.

        Returns:
            :class:`.detection.Detections` of each picture, at its original size.

        Raises:
            DataError: No size fits.
            UnsupportedModelError: The export holds no whole detector.
        """
        if self._detector is None:
            raise UnsupportedModelError(
                f'{self.directory} holds no whole detector, only its graphs: evaluate it with psaq test CONFIG '
                '--deployed, or export it again and read why its boxes are decoded in PyTorch'
            )
        self._check_images(images)
        if len(images) != len(infos):
            raise DataError(f'there are {len(images)} images and sizes of {len(infos)}: give one ImageInfo for each')
        session, fitting = self._fitting(images)
        heads = HeadSessions(self.manifest['heads'], self._session) if self._detector.box else None
        outputs, names = [], self.manifest['outputs']
        height, width = images.shape[2:]
        last = set(names['levels']) <= set(names.get('channel_last') or ())
        for i, info in enumerate(infos):
            # The maps are read where the runtime wrote them: those of one picture may be 80 MB.
            with session.borrowed({'images': fitting[i : i + 1]}) as borrowed:
                maps = self._cut(borrowed, height, width)
                levels = [maps[name] for name in names['levels']]
                dense = nested(names['dense'], maps)
                outputs += detect(self._detector, levels, dense, heads, [info], self.threads or _cores(), last)
        return outputs

    def normalize(self, images: Union[np.ndarray, Sequence[np.ndarray]]) -> np.ndarray:
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

    # ------------------------------------------------------------------ predictions
    def prepare(self, picture: Picture) -> Prepared:
        """A picture of any size as the network takes it: resized as the test pipeline says, normalized, padded.

        Args:
            picture: (H, W, C) uint8, blue first as OpenCV reads, or the path of a file.

        Raises:
            DataError: It is no picture that the model takes.
        """
        return self._preparation(picture)

    def predict(self, picture: Picture) -> Prediction:
        """What the model says of one picture, at the picture's own size.

        Args:
            picture: (H, W, C) uint8 of any size, blue first as OpenCV reads, or the path of a file.

        Raises:
            DataError: It is no picture, or does not fit the model.
            UnsupportedModelError: The export gives no final predictions.

        Example:
            >>> prediction = model.predict('street.jpg')
            >>> prediction.names, prediction.boxes, prediction.scores
        """
        if not self.complete:
            what = 'feature maps alone' if self.task not in _TASKS else f'a part of a model for {self.task}'
            raise UnsupportedModelError(
                f'{self.directory} holds {what}, which gives no predictions without its library: evaluate it with '
                'psaq test CONFIG --deployed, or read the outputs that calling the model gives'
            )
        prepared = self.prepare(picture)
        self._check_prepared(prepared)
        known: Dict[str, Any] = dict(
            task=self.task,
            size=prepared.info.original,
            classes=self.classes,
            palette=self.manifest.get('palette'),
        )
        if self.task == 'detection':
            return self._detection(prepared, known)
        if self.task == 'segmentation':
            return self._segmentation(prepared, known)
        return self._classification(prepared, known)

    def _check_prepared(self, prepared: Prepared) -> None:
        """Raises DataError where a picture is of another size in the network than the export has."""
        if prepared.info.shape == prepared.info.original or self.manifest.get('slide'):
            return
        try:
            self.size_for(prepared.image.shape[1], prepared.image.shape[2])
        except DataError as error:
            (height, width), (rows, columns) = prepared.info.original, prepared.info.shape
            raise DataError(
                f'a picture of {height} x {width} becomes one of {rows} x {columns} in the test pipeline, which does '
                f'not fit ({str(error).partition(":")[0]}): export with a --size for it, or with --dynamic'
            ) from error

    def _detection(self, prepared: Prepared, known: Mapping[str, Any]) -> Prediction:
        boxes, scores, labels, masks = self.detect(prepared.image[None], [prepared.info])[0]
        return Prediction(**known, boxes=boxes, scores=scores, labels=labels, names=self._names(labels), masks=masks)

    def _segmentation(self, prepared: Prepared, known: Mapping[str, Any]) -> Prediction:
        image, info, corners = prepared.image[None], prepared.info, self.manifest['align_corners']
        window = self.manifest.get('slide')
        if window:
            logits = slide(lambda part: self.run(part)['logits'], image, window, corners)
        else:
            logits = self.run(image)['logits']
        sizes = [image.shape[2:], info.shape, info.original]
        rule = self.manifest.get('labels', dict(rule='argmax'))
        return Prediction(**known, label_map=label_map(logits[0], sizes, corners, rule), logits=logits[0])

    def _classification(self, prepared: Prepared, known: Mapping[str, Any]) -> Prediction:
        logits = self.run(prepared.image[None])['logits'][0]
        chances = (sigmoid if self.manifest.get('several_labels') else softmax)(logits)
        labels = np.argsort(-chances, kind='stable')
        return Prediction(
            **known,
            labels=labels,
            scores=chances[labels],
            names=self._names(labels),
            logits=logits,
            probabilities=chances,
        )

    def _names(self, labels: np.ndarray) -> List[str]:
        classes = self.classes
        return [class_name(classes, int(label)) for label in labels]

    def __call__(self, pictures: Images) -> Dict[str, Any]:
        """Run the model on pictures.

        Args:
            pictures: One (H, W, C), or the path of a file; several of one size as (N, H, W, C); or a sequence of
                pictures of any sizes. uint8, blue first as OpenCV reads.

        Returns:
            A dict whose values have an entry for each picture, in order:

            - of a detector ``boxes``, ``scores``, ``labels``, ``names`` and, where it has them, ``masks``: lists, see
              :class:`.predictions.Prediction`;
            - of a segmentor ``labels``, the class of each pixel, (N, H, W), or a list where the sizes differ, and
              ``logits`` as its head gives them, likewise;
            - of a classifier ``logits`` (N, classes), ``labels`` (N,) and ``names``, the best class of each.

            An export that gives no final predictions, and one of format version 1 or 2, gives the graph's outputs, for
            pictures of one size as they come: ``logits`` (N, classes, ...), for a segmentor ``labels`` (N, H, W), for
            a detector its maps.

        Raises:
            DataError: The pictures do not fit.
        """
        if not self._predicts:
            batch = self.normalize([_array(picture, self.manifest['channels']) for picture in _several(pictures)])
            return finish(self.run(batch), self.manifest, (batch.shape[2], batch.shape[3]))
        predictions = [self.predict(picture) for picture in _several(pictures)]
        if self.task == 'detection':
            kinds = ('boxes', 'scores', 'labels', 'names', 'masks')
            columns: Dict[str, Any] = {kind: [getattr(p, kind) for p in predictions] for kind in kinds}
            return columns if all(masks is not None for masks in columns['masks']) else _without(columns, 'masks')
        logits = [p.logits for p in predictions if p.logits is not None]
        if self.task == 'segmentation':
            return dict(logits=_stacked(logits), labels=_stacked([p.label_map for p in predictions]))
        return dict(
            logits=np.stack(logits),
            labels=np.array([p.labels[0] for p in predictions if p.labels is not None], np.int64),
            names=[p.names[0] for p in predictions if p.names],
        )


def _several(pictures: Images) -> Sequence[Picture]:
    """Pictures one by one.

    Raises:
        DataError: There is none.
    """
    if isinstance(pictures, (str, os.PathLike)) or (isinstance(pictures, np.ndarray) and pictures.ndim != 4):
        return [pictures]
    if not len(pictures):
        raise DataError('there is no picture in what the model was called with: give at least one')
    return list(pictures)


def _array(picture: Picture, channels: int) -> np.ndarray:
    """A picture as it comes."""
    return read_picture(picture, channels) if isinstance(picture, (str, os.PathLike)) else picture


def _stacked(arrays: Sequence[Any]) -> Any:
    """One array where all have one shape, else the list."""
    return np.stack(arrays) if len({array.shape for array in arrays}) == 1 else list(arrays)


def _without(columns: Mapping[str, Any], key: str) -> Dict[str, Any]:
    return {name: value for name, value in columns.items() if name != key}


def nested(names: Any, outputs: Mapping[str, Any]) -> Any:
    """Outputs of a graph, arrays or tensors, nested as a manifest has their names; sequences become tuples."""
    if isinstance(names, str):
        return outputs[names]
    if isinstance(names, Mapping):
        return {key: nested(value, outputs) for key, value in names.items()}
    return None if names is None else tuple(nested(value, outputs) for value in names)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


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
        >>> model.predict('street.png').draw('street.png')
    """
    return DeployedModel(directory, runtime, threads, kernels, device, settings)
