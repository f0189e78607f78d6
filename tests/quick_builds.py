"""What makes configs and models of full size quick to read and to build, for tests that look at many of them."""

import contextlib
import functools

import pytest
import torch
from torch.overrides import TorchFunctionMode


class WeightsWithoutMemory(TorchFunctionMode):
    """Weights are made on the meta device, where they have a shape and are never initialized; all else is as ever."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {}, **(dict(device='meta') if function is torch.empty else {}))
        return function(*args, **kwargs)


@contextlib.contextmanager
def metafiles_read_once():
    """A base ``mmdet::...`` has MMEngine read every metafile of mmdet and the list of all packages, each time; inside,
    it reads each once."""
    with pytest.MonkeyPatch.context() as patch:
        with contextlib.suppress(ImportError):
            import mmengine.config.config as config
            import mmengine.config.utils as utils

            patch.setattr(utils, 'load', functools.lru_cache(None)(utils.load))
            patch.setattr(config, 'is_installed', functools.lru_cache(None)(config.is_installed))
        yield


@contextlib.contextmanager
def configs_as_they_are():
    """MMEngine has yapf format the config several times a run, which takes most of a tiny one; inside, the text stays
    as it is."""
    with pytest.MonkeyPatch.context() as patch:
        with contextlib.suppress(ImportError):
            import mmengine.config.config as config

            patch.setattr(config, 'FormatCode', lambda text, *args, **kwargs: (text, False))
        yield
