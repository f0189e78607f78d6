# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from toys import ToyTransformer

from psaq_mm.calibration.blocks import BlockTaps, find_blocks
from psaq_mm.errors import ConfigError, DataError, UnsupportedModelError

IMAGES = torch.randn(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))


class Wrapped(nn.Module):
    """An attention inside two modules more, as Swin's shifting holds its window attention."""

    def __init__(self, block):
        super().__init__()
        self.attn = nn.Module()
        self.attn.inner = block

    def forward(self, x):
        return self.attn.inner(x), 'beside'


class Stage(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)


def taken(model, stride):
    return [name for name, _ in BlockTaps(model, stride).blocks]


def deep(depth):
    model = ToyTransformer()
    model.blocks = nn.ModuleList(ToyTransformer(seed=i).blocks[0] for i in range(depth))
    return model


@pytest.mark.parametrize(
    'depth, stride, expected', [(12, 3, [2, 5, 8, 11]), (4, 3, [2, 3]), (2, 3, [1]), (3, 1, [0, 1, 2]), (1, 3, [0])]
)
def test_every_few_blocks_and_the_last(depth, stride, expected):
    assert taken(deep(depth), stride) == [f'blocks.{i}' for i in expected]


def test_blocks_of_stages_with_one_block_and_with_several():
    stages = nn.Module()
    stages.stages = nn.ModuleList([Stage(Wrapped(b) for b in deep(2).blocks), Stage([Wrapped(deep(1).blocks[0])])])
    assert [name for name, _ in find_blocks(stages)] == ['stages.0.blocks.0', 'stages.0.blocks.1', 'stages.1.blocks.0']


def test_outputs_are_those_of_the_blocks_in_this_forward():
    model = deep(4)
    x = torch.cat([model.token.expand(2, -1, -1), model.embed(IMAGES).flatten(2).transpose(1, 2)], 1)
    expected = []
    for block in model.blocks:
        x = block(x)
        expected.append(x)
    with BlockTaps(model, 2).record() as found:
        model(IMAGES)
    for ours, theirs in zip(found, (expected[1], expected[3])):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert len(found) == 2 and not any(m._forward_hooks for m in model.modules())


def test_tokens_of_a_map_and_of_a_tuple():
    model = ToyTransformer(window=3)
    model.blocks = nn.ModuleList(ToyTransformer(window=3, seed=i).blocks[0] for i in range(2))
    with BlockTaps(model, 1).record() as found:
        model(IMAGES)
    assert [tuple(t.shape) for t in found] == [(2, 20, 16)] * 2
    holder = nn.Sequential(Wrapped(deep(1).blocks[0]))
    with BlockTaps(holder, 1).record() as found:
        holder(torch.randn(2, 7, 16))
    assert tuple(found[0].shape) == (2, 7, 16)


def gradients(checkpointing):
    model = ToyTransformer(checkpointing=checkpointing)
    images = IMAGES.clone().requires_grad_()
    with BlockTaps(model, 1).record(needs_grad=True) as found:
        model(images)
    loss = sum(t.square().mean() for t in found)
    return torch.autograd.grad(loss, [images, model.blocks[0].attn.qkv.weight, model.blocks[1].mlp[1].weight])


def test_gradients_with_and_without_activation_checkpointing_agree():
    for plain, checkpointed in zip(gradients(None), gradients('plain')):
        assert float(plain.abs().max()) > 0
        torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)


def test_blocks_inside_one_reentrant_checkpoint_are_refused_and_the_hooks_are_gone():
    model = deep(3)
    holder = nn.Sequential(*model.blocks)
    tokens = torch.randn(2, 7, 16, requires_grad=True)
    with pytest.raises(UnsupportedModelError, match="block '0'.*reentrant"):
        with BlockTaps(holder, 1).record(needs_grad=True):
            checkpoint(holder, tokens, use_reentrant=True)
    assert not any(m._forward_hooks for m in holder.modules())


def test_frozen_blocks_need_no_gradient():
    model = deep(3)
    model.blocks[0].requires_grad_(False), model.embed.requires_grad_(False), model.token.requires_grad_(False)
    with BlockTaps(model, 1).record() as found:
        model(IMAGES)
    assert [t.requires_grad for t in found] == [False, True, True]


class Odd(nn.Module):
    """A block that gives something else than tokens."""

    def __init__(self):
        super().__init__()
        self.attn = deep(1).blocks[0].attn

    def forward(self, x):
        return self.attn(x).mean(1)


def test_misuse_is_named():
    with pytest.raises(ConfigError, match='block_stride=0'):
        BlockTaps(deep(1), 0)
    with pytest.raises(UnsupportedModelError, match='Linear has no transformer blocks'):
        BlockTaps(nn.Linear(2, 2))
    with pytest.raises(DataError, match=r'shape \(2, 16\)'):
        holder = nn.Sequential(Odd())
        with BlockTaps(holder, 1).record():
            holder(torch.randn(2, 7, 16))
    with pytest.raises(UnsupportedModelError, match='none of the blocks'):
        with BlockTaps(deep(1)).record():
            pass
