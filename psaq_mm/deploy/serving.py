# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""An exported graph in place of a model's own layers, so that the library's tools evaluate the integer model."""

import os
from typing import Any, List, Mapping, Optional, Sequence, Union

import numpy as np
import torch
from torch import Tensor, nn

from psaq_mm.deploy.parts import rest_state
from psaq_mm.errors import CheckpointError, ConfigError
from psaq_mm.quantization import adopt
from psaq_mm.registry import MODELS
from psaq_mm.runtime import load
from psaq_mm.runtime.bundle import read_rest
from psaq_mm.runtime.deployed import nested
from psaq_mm.runtime.detection import Detections, ImageInfo

__all__ = ['DeployedBackbone', 'DeployedDetectorMixin', 'DeployedFeatures', 'DeployedHeadMixin', 'deploy_model_']

PathLike = Union[str, os.PathLike]


class DeployedFeatures(tuple):
    """Feature maps of a graph that holds a head as well.

    Attributes:
        dense: The head's outputs, nested as the head's forward gives them; None without a head.
    """

    dense: Any = None


@MODELS.register_module()
class DeployedBackbone(nn.Module):
    """Runs the graph of an exported model: its backbone, and the neck and dense head where the graph holds them.

    As ``backbone`` of a config its outputs are the levels after the neck: set ``neck=None`` there.
    ``tools/test.py CONFIG --deployed DIR`` does that, and takes the head's outputs from the graph too.

    Args:
        directory: As ``tools/export.py`` wrote it.
        runtime: Name of the runtime, one of :data:`psaq_mm.runtime.RUNTIMES`.
        threads: Of the runtime. Defaults to None, its own choice.
        init_cfg: Not used; OpenMMLab's configs give it to every backbone.

    Raises:
        CheckpointError: The directory is no exported model, or not whole.
        ConfigError: The runtime is not known or not installed.

    Example:
        >>> backbone = dict(_delete_=True, type='psaq_mm.DeployedBackbone', directory='work_dirs/deployed')
        >>> model = dict(backbone=backbone, neck=None)
    """

    def __init__(
        self,
        directory: PathLike,
        runtime: str = 'openvino',
        threads: Optional[int] = None,
        init_cfg: Optional[Mapping] = None,
    ):
        super().__init__()
        self.deployed = load(directory, runtime, threads)

    def init_weights(self) -> None:
        """There is nothing to initialize."""

    def forward(self, images: Tensor) -> Union[Tensor, DeployedFeatures]:
        """Normalized images (N, C, H, W) to :class:`DeployedFeatures`, or to logits where the graph is a whole
        network.
        """
        arrays = self.deployed.run(images.detach().float().cpu().numpy())
        outputs = {
            name: torch.from_numpy(np.ascontiguousarray(array)).to(images.device) for name, array in arrays.items()
        }
        names = self.deployed.manifest['outputs']
        dense = nested(names['dense'], outputs)
        if not names['levels'] and self.deployed.manifest['dense_head'] is None:
            return dense
        for name in names.get('channel_last') or ():
            outputs[name] = outputs[name].permute(0, 3, 1, 2)
        levels = nested(names.get('features') or names['levels'], outputs)
        if not isinstance(levels, tuple):  # a backbone whose output is one map, in no tuple
            return levels
        features = DeployedFeatures(levels)
        features.dense = dense
        return features


class DeployedHeadMixin:
    """A head that takes its outputs from the features, and does not call its own layers."""

    def forward(self, features: DeployedFeatures, *args, **kwargs) -> Any:
        """The graph's outputs of this head for these features."""
        return features.dense


class DeployedDetectorMixin:
    """A detector of mmdet whose predictions are those of an exported detector, from the picture to boxes and masks."""

    def predict(self, batch_inputs: Tensor, batch_data_samples: Sequence, rescale: bool = True) -> List:
        """Predictions of the exported detector, as mmdet's ``predict`` gives them.

        Args:
            batch_inputs: Normalized and padded, (N, C, H, W).
            batch_data_samples: With the sizes of the pictures; they get ``pred_instances``.
            rescale: Whether boxes and masks are of the original size; if not, of the resized one.

        Returns:
            ``batch_data_samples``.
        """
        infos = [_image_info(sample.metainfo, rescale) for sample in batch_data_samples]
        images = batch_inputs.detach().float().cpu().numpy()
        results = self.backbone.deployed.detect(images, infos)  # type: ignore[attr-defined]
        for sample, detections in zip(batch_data_samples, results):
            sample.pred_instances = _instances(detections, batch_inputs.device)
        return list(batch_data_samples)


def _image_info(meta: Mapping[str, Any], rescale: bool) -> ImageInfo:
    height, width = (int(side) for side in meta['img_shape'][:2])
    if not rescale:
        return ImageInfo((height, width), (height, width))
    across, down = (float(scale) for scale in meta.get('scale_factor', (1.0, 1.0))[:2])
    original = tuple(int(side) for side in meta['ori_shape'][:2])
    return ImageInfo((height, width), (original[0], original[1]), (across, down))


def _instances(detections: Detections, device: torch.device) -> Any:
    """Detections as mmdet's evaluators read them."""
    from mmengine.structures import InstanceData

    arrays = {'bboxes': detections.boxes, 'scores': detections.scores, 'labels': detections.labels}
    if detections.masks is not None:
        arrays['masks'] = detections.masks
    return InstanceData(**{name: torch.from_numpy(array).to(device) for name, array in arrays.items()})


def deploy_model_(
    model: nn.Module, directory: PathLike, runtime: str = 'openvino', threads: Optional[int] = None
) -> nn.Module:
    """Put an exported graph into the model that it was made from, in place, and load the weights of the other parts. A
    detector that was exported as a whole predicts with its graphs alone.

    Args:
        model: Built from the config that was exported; its weights need not be loaded.
        directory: As ``tools/export.py`` wrote it.
        runtime: Name of the runtime, one of :data:`psaq_mm.runtime.RUNTIMES`.
        threads: Of the runtime. Defaults to None, its own choice.

    Returns:
        ``model``.

    Raises:
        CheckpointError: The directory is not whole, or was exported from another model.
        ConfigError: The runtime is not known or not installed, or the graph is of a backbone alone.
    """
    backbone = DeployedBackbone(directory, runtime, threads)
    manifest = backbone.deployed.manifest
    if manifest['model'] != type(model).__name__ and not _inherits(model, manifest['model']):
        raise CheckpointError(
            f'{directory} was exported from a {manifest["model"]} and the config builds a {type(model).__name__}: give '
            'the config that was exported'
        )
    head = manifest['dense_head']
    absent = [name for name in manifest['replaced'] if not hasattr(model, name)]
    if absent or manifest['task'] == 'backbone':
        raise ConfigError(
            f'{directory} holds '
            f'{"a backbone alone" if not absent else "parts that the model lacks: " + ", ".join(absent)}: '
            'export the whole model to evaluate it, or use psaq_mm.DeployedBackbone in a config'
        )
    for name in manifest['replaced']:
        if name in ('backbone', 'model'):
            setattr(model, name, backbone)
        elif name == 'neck':
            model.neck = None
        elif name == head:
            adopt(getattr(model, name), DeployedHeadMixin)
        else:
            setattr(model, name, None)  # RoI heads: they are graphs, and what the model has are no weights of theirs
    if manifest['task'] == 'detection' and backbone.deployed.complete:
        adopt(model, DeployedDetectorMixin)
    else:
        _load_rest(model, directory, manifest)
    model.eval()
    return model


def _inherits(model: nn.Module, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(model).__mro__)


def _load_rest(model: nn.Module, directory: PathLike, manifest: Mapping) -> None:
    rest = read_rest(directory, manifest)
    if manifest['task'] != 'detection' and not rest:  # an export of an earlier version
        return
    state = rest_state(model, manifest['replaced'])
    misfits = sorted(set(rest) ^ set(state)) or [k for k in state if tuple(state[k].shape) != rest[k].shape]
    if misfits:
        raise CheckpointError(
            f'{directory} does not fit the model of the config ({", ".join(misfits[:3])}): give the config that was '
            'exported'
        )
    errors: List[str] = []
    # Module by module: the check of the whole model asks for the weights that the graph replaced, too.
    for name, module in model.named_modules():
        weights = {
            k[len(name) + 1 :]: torch.from_numpy(v) for k, v in rest.items() if name and k.rpartition('.')[0] == name
        }
        if weights:
            module._load_from_state_dict(weights, '', {}, True, [], [], errors)
    if errors:
        raise CheckpointError(f'{directory} does not fit the model of the config ({errors[0]})')
    with torch.no_grad():
        for name, value in (*model.named_parameters(recurse=False), *model.named_buffers(recurse=False)):
            if name in rest:  # such as level_embed of DINO: of no module but the model, whose load hooks must not run
                value.copy_(torch.from_numpy(rest[name]))
