"""TF32 emulated on the CPU: factors are rounded to 10 binary digits wherever PyTorch is allowed to do that on a GPU."""

import pytest
import torch
import torch.nn.functional as F


def shortened(x, digits=10):
    """float32 rounded to so many binary digits after the point."""
    cut = 23 - digits
    return ((x.detach().contiguous().view(torch.int32) + (1 << (cut - 1))) >> cut << cut).view(torch.float32)


@pytest.fixture
def tf32(monkeypatch):
    """Convolutions and Linear layers as on a GPU with TF32 whose switches are both on; a list of the calls that made
    use of it."""
    used = []

    def emulated(name, allowed):
        plain = getattr(F, name)

        def call(x, weight, *args, **kwargs):
            if allowed():
                used.append(name)
                x, weight = shortened(x), shortened(weight)
            return plain(x, weight, *args, **kwargs)

        monkeypatch.setattr(F, name, call)

    for name in ('conv2d', 'conv_transpose2d'):
        emulated(name, lambda: torch.backends.cudnn.allow_tf32)
    emulated('linear', lambda: torch.backends.cuda.matmul.allow_tf32)
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision('high')
    yield used
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])
