"""Windows, masks and heads as look-ups, with sizes known at the export and found out by the graph, against plain
rolling and cutting."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from psaq_mm.deploy import windows
from psaq_mm.deploy.lowering import mask_regions
from psaq_mm.deploy.pooling import _traced_matrix, pooling_matrix
from psaq_mm.deploy.windows import TracedWindows, Windows

SIDE = 7


def reference(x, shift, pad_first, fill):
    """Tokens (H, W, C) cut into windows by padding and rolling."""
    height, width = x.shape[:2]
    bottom, right = -height % SIDE, -width % SIDE

    def pad(t):
        out = fill.expand(height + bottom, width + right, -1).clone()
        out[:height, :width] = t
        return out

    x = torch.roll(pad(x), (-shift, -shift), (0, 1)) if pad_first else pad(torch.roll(x, (-shift, -shift), (0, 1)))
    x = x.reshape(x.shape[0] // SIDE, SIDE, x.shape[1] // SIDE, SIDE, -1).transpose(1, 2)
    return x.reshape(-1, SIDE * SIDE, x.shape[-1])


def of(size, shift, pad_first, traced):
    ends = *size, (SIDE, SIDE), (shift, shift), pad_first
    return TracedWindows(*ends, tuple(torch.tensor(s) for s in size), {}) if traced else Windows(*ends)


@pytest.mark.parametrize('size', [(7, 7), (14, 21), (9, 15), (20, 7)])
@pytest.mark.parametrize('shift', [0, 3])
@pytest.mark.parametrize('kind', ['padded first', 'shifted first', 'traced'])
def test_windows_are_cut_as_the_libraries_do_and_joined_again(size, shift, kind):
    made = of(size, shift, kind != 'shifted first', kind == 'traced')
    x, fill = torch.arange(size[0] * size[1] * 4.0).reshape(*size, 4), -torch.arange(1.0, 5)
    cut = made.cut(x.reshape(-1, 4), fill)
    assert torch.equal(cut, reference(x, shift, kind != 'shifted first', fill))
    heads = cut.reshape(*cut.shape[:2], 2, 2).transpose(1, 2)  # (windows, heads, tokens, channels)
    assert torch.equal(made.join(heads), x.reshape(-1, 4))


@pytest.mark.parametrize('size', [(7, 7), (9, 15)])
def test_the_traced_mask_is_that_of_the_regions(size):
    made = of(size, 3, True, traced=True)
    regions = torch.from_numpy(mask_regions(*made.padded, SIDE, SIDE, 3, 3).astype(np.int64))
    wanted = (regions[:, None] != regions[:, :, None]).float()[:, None] * windows.MASKED
    assert torch.equal(made.mask(torch.zeros(len(regions), 2, 49, 49)), wanted.expand(-1, 2, -1, -1))
    assert made.mask(torch.zeros(1)) is not made.cache and len(made.cache) == 1  # worked out once
    assert not of(size, 0, True, traced=True).mask(torch.zeros(1)).any()


@pytest.mark.parametrize('size', [3, 16, 19])
@pytest.mark.parametrize('cells', [1, 2, 3, 6])
def test_the_traced_pooling_is_pytorchs(size, cells):
    found = _traced_matrix(torch.tensor(size), cells)
    assert torch.allclose(found, pooling_matrix(size, cells))
    x = torch.randn(1, 1, size)
    assert torch.allclose(x @ found.t(), F.adaptive_avg_pool1d(x, cells), atol=1e-6)
