"""What a quantized model computes in floating point is named with the module that does it."""

import pytest
import torch
import torch.nn.functional as F
from backbone_builders import ROWS, build
from head_models import config_of
from torch import nn

from psaq_mm.commands.inspect import inspect
from psaq_mm.models import quantize_model_
from psaq_mm.models.uncovered import uncovered, watch
from psaq_mm.quantization import QuantMatMul, quantize_, set_mode

pytestmark = pytest.mark.filterwarnings('ignore')


class Operations(nn.Module):
    """One module for each kind of operation."""

    def __init__(self, operation):
        super().__init__()
        self.operation = operation
        self.table = nn.Parameter(torch.randn(8, 8))
        self.register_buffer('places', torch.zeros(1, 8, 8, 2))
        self.product = QuantMatMul(8, 8)

    def forward(self, x):
        return self.operation(self, x)


def _written_in_place(module, x):
    table = torch.zeros(8, 8)
    table[:] = x[0, 0]
    return x @ table


CASES = dict(
    at=(lambda m, x: x @ x, 'matmul of two activations'),
    bmm=(lambda m, x: torch.bmm(x[0], x[0]), 'bmm of two activations'),
    einsum=(lambda m, x: torch.einsum('bhij,bhkj->bhik', x, x), 'einsum of two activations'),
    table=(lambda m, x: torch.einsum('bhij,kj->bhik', x, m.table), 'einsum with a parameter'),
    made_of_a_parameter=(lambda m, x: x @ m.table.softmax(0).t(), 'matmul with a parameter'),
    written_in_place=(_written_in_place, 'matmul of two activations'),
    fused=(lambda m, x: F.scaled_dot_product_attention(x, x, x), 'fused attention'),
    function=(lambda m, x: F.linear(x, m.table), 'linear in floating point'),
    dynamic=(lambda m, x: F.linear(x, x[0, 0]), 'linear whose weight is an activation'),
    sampling=(lambda m, x: F.grid_sample(x, m.places, align_corners=False), 'sampling at computed places'),
    covered=(lambda m, x: m.product(x, x), None),
    looked_up=(lambda m, x: torch.einsum('bhij,kj->bhik', x, m.table[torch.arange(8)]), 'einsum with a parameter'),
    constants=(lambda m, x: x + m.table @ torch.eye(8), None),
    elementwise=(lambda m, x: F.layer_norm((x * x).softmax(-1), (8,)), None),
)


@pytest.mark.parametrize('case', CASES)
def test_each_kind_of_operation(case):
    operation, expected = CASES[case]
    behind = nn.Sequential(nn.Linear(8, 8))
    quantize_(behind, 'w8a8')
    model = nn.Sequential(nn.Identity(), Operations(operation), behind)
    set_mode(model, 'off')
    x = torch.randn(1, 2, 8, 8)
    rows = watch(model, model, x)
    assert [tuple(row) for row in rows] == ([] if expected is None else [('1', 'Operations', expected, 1)])


def test_the_librarys_own_model_has_two_products_in_each_attention():
    model = build(next(row for row in ROWS if row.id == 'mmdet_swin'))
    images = torch.randn(1, 3, 56, 72)
    rows = watch(model, model, images)
    products = [(row.module, row.calls) for row in rows if row.operation == 'matmul of two activations']
    assert products == [(f'stages.{name}.attn.w_msa', 2) for name in ('0.blocks.0', '0.blocks.1', '1.blocks.0')]
    assert {row.operation for row in rows} >= {'conv2d in floating point', 'linear in floating point'}


@pytest.mark.parametrize('row', ROWS, ids=lambda row: row.id)
def test_no_supported_backbone_computes_more_in_floating_point_than_it_declares(row):
    model = build(row)
    quantize_model_(model, 'w8a8')
    assert {one.operation for one in uncovered(model, row.size, with_told=True)} == set(row.floats)


def test_inspect_names_the_sampling_inside_a_neck():
    """DyHead convolves at learned offsets: its layers have no quantized form."""
    pytest.importorskip('mmdet')
    config = config_of('dyhead')
    config.model.quant = dict(preset='w8a8', scope='full')
    config.model.base_type, config.model.type = config.model.type, 'psaq_mm.Quantized'
    text = inspect(config)
    assert 'sampling at computed places: neck.1.dyhead_blocks.0.spatial_conv_high.conv' in text
    assert 'RepQ folding: the LayerNorms of' in text and 'patch similarity: 4 attention modules' in text
