# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The whole library in five calls: ``quantize``, ``export``, ``predict``, ``save`` and ``load``.

They are reached as ``psaq_mm.quantize`` and so on. Nothing heavy is imported before one of them is called: to predict
with an exported model, neither PyTorch nor an OpenMMLab library is needed.
"""

import os
from typing import TYPE_CHECKING, Any, List, Mapping, Optional, Sequence, Union

if TYPE_CHECKING:
    from mmengine.config import Config
    from torch import nn

    from psaq_mm.deploy.export import ExportedModel
    from psaq_mm.runtime import DeployedModel, Prediction
    from psaq_mm.runtime.preparation import Picture

__all__ = ['export', 'load', 'predict', 'quantize', 'save']

PathLike = Union[str, os.PathLike]
Size = Union[int, Sequence[int]]


def quantize(
    config_or_model: Union[PathLike, 'Config', 'nn.Module'],
    checkpoint: Optional[PathLike] = None,
    method: Optional[str] = 'best',
    quant: Union[str, Mapping, None] = 'w8a8',
    *,
    config: Union[PathLike, 'Config', None] = None,
    size: Optional[Size] = None,
    mean: Optional[Sequence[float]] = None,
    std: Optional[Sequence[float]] = None,
    classes: Optional[Sequence[str]] = None,
    work_dir: Optional[PathLike] = None,
    in_place: bool = False,
    verbose: bool = False,
    **settings: Any,
) -> 'nn.Module':
    """Quantize a model without data: no picture of a data set is read, and no file is written.

    Args:
        config_or_model: The path of a config file, an MMEngine ``Config``, or a built model of mmdet, mmseg,
            mmpretrain, timm or transformers with its weights in it.
        checkpoint: Full-precision weights: a file or URL. Defaults to None: the model's own weights; with a config, its
            ``load_from``.
        method: Name of a method (:data:`psaq_mm.engine.methods.METHODS`), such as ``'fast'``, ``'best'``, ``'repq'``,
            ``'gaussian'``, ``'psaq_v1'``, ``'psaq_v2'``. None: the config's own.
        quant: Bits of weights and activations, such as ``'w4a8'``, or a dict of
            :class:`psaq_mm.quantization.QuantSpec`. None: the config's own.
        config: The config of a model in memory, which tells its test pipeline. Defaults to None: the one that
            ``init_detector``, ``init_model`` and ``get_model`` of the libraries leave in the model, if any.
        size: (height, width) in pixels of the pictures that the model takes, or one number for both. Defaults to None:
            from the config, the model's data preprocessor, its position embedding, or timm's ``pretrained_cfg``.
        mean: Subtracted from each channel (red, green, blue), for values 0 to 255: of a model of transformers, and of
            one of timm without a ``pretrained_cfg``. Defaults to None: the model or its config tells it.
        std: Each channel is divided by it, for values 0 to 255. As ``mean``.
        classes: Names of the classes. Defaults to None: of the checkpoint, the model or its config.
        work_dir: Where ``student.pth``, the log and sample sheets are written. Defaults to None: nothing is written.
        in_place: Whether a model in memory itself becomes the student. Defaults to False: a copy of it does.
        verbose: Whether the log of the run is printed.
        **settings: Settings of the run, as the config's ``dfq`` has them (``samples``, ``seed``, ``iters``,
            ``calibration_samples``, ...), and of the quantizer (``scope``, ``overrides``, ...): see
            docs/reference/settings.

    Returns:
        The student, of the model's own class, in eval mode. Its predictions are those of the quantized model.

    Raises:
        ConfigError: A setting is not known; the size or the normalization of a model in memory is not known.
        CheckpointError: The checkpoint is absent or does not fit.
        UnsupportedModelError: The model is of a kind that cannot be quantized, or is a student already.

    Example:
        >>> student = psaq_mm.quantize('mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', 'mask_rcnn_swin-t.pth')
        >>> model = timm.create_model('deit_small_patch16_224', pretrained=True)
        >>> student = psaq_mm.quantize(model, method='fast', quant='w4a8', seed=1)
    """
    from psaq_mm.engine import one_call

    return one_call.quantize(
        config_or_model,
        checkpoint,
        method,
        quant,
        config=config,
        known=one_call.Known(size=size, mean=mean, std=std, classes=classes),
        work_dir=work_dir,
        in_place=in_place,
        verbose=verbose,
        settings=settings,
    )


def export(
    student: Union['nn.Module', PathLike],
    directory: PathLike,
    *,
    config: Union[PathLike, 'Config', None] = None,
    size: Union[Size, Sequence[Size], None] = None,
    dynamic: bool = False,
    format: Union[str, Sequence[str]] = 'bundle',
    verify: bool = False,
    runtime: Union[str, Sequence[str]] = (),
    external_data: bool = False,
    opset: Optional[int] = None,
    threads: Optional[int] = None,
    verbose: bool = False,
) -> 'ExportedModel':
    """Write a student as graphs with integer weights and activations, as ``psaq-export`` does.

    Args:
        student: Of :func:`quantize` or :func:`load`, or the path of a ``student.pth``.
        directory: To be written; an exported model in it is replaced.
        config: Of a ``student.pth``. Defaults to None, the one that it holds.
        size: (height, width) in pixels to export for, one number for both, or a list of several sizes. Defaults to
            None: what the test pipeline makes, see :func:`psaq_mm.engine.exporting.default_sizes`.
        dynamic: One graph for pictures of any size, padded to multiples of 32.
        format: ``'bundle'`` for :func:`predict` and :func:`psaq_mm.runtime.load`, ``'onnx'`` for plain ONNX files, or
            both.
        verify: Compare the integer codes with the student's, layer by layer and for each size, in each runtime.
        runtime: Names of runtimes to start the exported model in. Defaults to none; to verify, all that are installed.
        external_data: With ``'onnx'``, weights go beside the ONNX files, which share them.
        opset: Of ONNX, 17 or newer. Defaults to None, the oldest one that has all operations.
        threads: Of the runtimes. Defaults to None, their own choice.
        verbose: Whether what ``psaq-export`` prints is printed.

    Returns:
        :class:`psaq_mm.deploy.export.ExportedModel`.

    Raises:
        ConfigError: A size, the opset or a runtime does not fit, or ``directory`` holds something else.
        CheckpointError: ``student`` is no student.
        PsaqError: The verification failed. The files were written all the same.

    Example:
        >>> psaq_mm.export(student, 'deployed', verify=True)
        >>> psaq_mm.export('work_dirs/mask-rcnn/student.pth', 'deployed', size=[(800, 1216), (1216, 800)])
    """
    from psaq_mm.engine import one_call

    return one_call.export(
        student,
        directory,
        config=config,
        size=size,
        dynamic=dynamic,
        formats=(format,) if isinstance(format, str) else tuple(format),
        verify=verify,
        runtimes=(runtime,) if isinstance(runtime, str) else tuple(runtime),
        external_data=external_data,
        opset=opset,
        threads=threads,
        verbose=verbose,
    )


def predict(
    model: Union['nn.Module', 'DeployedModel', PathLike],
    pictures: Union['Picture', Sequence['Picture']],
    *,
    config: Union[PathLike, 'Config', None] = None,
    runtime: str = 'openvino',
    threads: Optional[int] = None,
    device: Optional[str] = None,
) -> List['Prediction']:
    """What a model says of pictures.

    Args:
        model: The directory of an exported model, a student, or the path of a ``student.pth``. A full-precision model
            of mmdet, mmseg, mmpretrain, timm or transformers predicts too, as the one to compare a student with.
        pictures: The path of a picture or of a folder of them, an array (H, W, C) of uint8, blue first as OpenCV reads,
            or a list of such.
        config: Of a ``student.pth`` or a model in memory. Defaults to None, the one that it holds.
        runtime: Of an exported model, one of :data:`psaq_mm.runtime.RUNTIMES`.
        threads: Of the runtime. Defaults to None, its own choice.
        device: Of the runtime of an exported model, such as ``'GPU'``; of a student, such as ``'cuda:0'``. Defaults to
            None: the CPU; where the student is.

    Returns:
        A :class:`psaq_mm.runtime.Prediction` for each picture, in their order; those of a folder by name.

    Raises:
        DataError: A picture is none, or is not there.
        CheckpointError: ``model`` is no exported model and no student.
        UnsupportedModelError: The model gives no boxes, no classes and no class of each pixel.

    Example:
        >>> [prediction] = psaq_mm.predict('deployed', 'street.jpg')
        >>> cv2.imwrite('shown.jpg', prediction.draw('street.jpg'))
    """
    from psaq_mm.runtime import DeployedModel
    from psaq_mm.runtime import load as load_exported
    from psaq_mm.runtime.pictures import listed

    if isinstance(model, (str, os.PathLike)) and (os.path.isdir(model) or not os.path.exists(model)):
        model = load_exported(model, runtime, threads, device=device)
    if isinstance(model, DeployedModel):
        return [model.predict(picture) for picture in listed(pictures)]
    from psaq_mm.engine import one_call

    return one_call.predict(model, listed(pictures), config=config, device=device)


def save(student: 'nn.Module', path: PathLike) -> None:
    """Write a student as ``student.pth``, which ``psaq-test``, ``psaq-export`` and :func:`load` read.

    Args:
        student: Of :func:`quantize` or :func:`load`.
        path: Of the file, which is whole at every moment.

    Raises:
        UnsupportedModelError: It is no student.

    Example:
        >>> psaq_mm.save(student, 'student.pth')
    """
    from psaq_mm.engine import one_call

    one_call.save(student, path)


def load(
    path: PathLike,
    *,
    model: Optional['nn.Module'] = None,
    config: Union[PathLike, 'Config', None] = None,
    **runtime: Any,
) -> Union['nn.Module', 'DeployedModel']:
    """Read a student, or an exported model.

    Args:
        path: Of a ``student.pth``, or of the directory of an exported model.
        model: The full-precision model that the student was made from, in any weights, which is copied: needed for a
            model of timm or transformers, or of another library without its config.
        config: The student's config. Defaults to None, the one in the file.
        **runtime: Of an exported model, see :func:`psaq_mm.runtime.load`.

    Returns:
        The student in eval mode, or a :class:`psaq_mm.runtime.DeployedModel`.

    Raises:
        CheckpointError: ``path`` is neither, or does not fit ``model`` or ``config``.
        ConfigError: A student of a model that was built without a config needs ``model``.

    Example:
        >>> student = psaq_mm.load('work_dirs/mask-rcnn/student.pth')
        >>> student = psaq_mm.load('deit.pth', model=timm.create_model('deit_small_patch16_224'))
        >>> exported = psaq_mm.load('deployed', runtime='onnxruntime')
    """
    from psaq_mm.runtime import load as load_exported

    if os.path.isdir(path) or not os.path.exists(path):
        return load_exported(path, **runtime)
    from psaq_mm.engine import one_call

    return one_call.load(path, model=model, config=config)
