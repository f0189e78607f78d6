# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import pytest
import torch
from torch import nn
from toys import ToyTransformer

from psaq_mm.errors import DataError, UnsupportedModelError
from psaq_mm.psaq_vit import AttentionTaps, patch_similarity_entropy


def images(size=(28, 20), seed=0):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def entropy_gradient(model, drop_tokens=0):
    batch = images().requires_grad_()
    with AttentionTaps(model, drop_tokens).record(batch) as record:
        model(batch)
    loss = sum(patch_similarity_entropy(t.tokens, t.valid, groups_per_image=t.groups_per_image) for t in record)
    loss.backward()
    return len(record), batch.grad


def test_taps_are_head_means_of_the_input_of_proj():
    model, seen = ToyTransformer(), []
    model.blocks[1].attn.proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with AttentionTaps(model, drop_tokens=1).record(images()) as record:
        model(images())
    assert [tap.name for tap in record] == ['blocks.0.attn', 'blocks.1.attn']
    heads = seen[0][..., :8], seen[0][..., 8:]
    torch.testing.assert_close(record[1].tokens, (heads[0] + heads[1])[:, 1:] / 2)
    assert record[1].tokens.shape == (2, 35, 8) and record[1].valid is None and record[1].groups_per_image == 1


def test_windows_and_padded_queries_are_told():
    model = ToyTransformer(window=3)
    with AttentionTaps(model).record(2) as record:
        model(images())  # 7 x 5 patches in 3 x 2 windows of 3 x 3
    tap = record[0]
    assert tap.tokens.shape == (12, 9, 8) and tap.groups_per_image == 6 and tap.valid.shape == (6, 9)
    assert int(tap.valid.sum()) == 35


@pytest.mark.parametrize('window', [None, 3])
def test_gradients_are_equal_with_and_without_checkpointing(window):
    taps, expected = entropy_gradient(ToyTransformer(window))
    taps_again, found = entropy_gradient(ToyTransformer(window, checkpointing='plain'))
    assert taps == taps_again == 2
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_recomputation_records_nothing():
    model, batch = ToyTransformer(checkpointing='plain'), images().requires_grad_()
    with AttentionTaps(model).record(batch) as record:
        output = model(batch)
    before = len(record)
    output.sum().backward()
    assert len(record) == before == 2


def test_reentrant_checkpointing_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match='blocks.0.attn.*use_reentrant=False'):
        entropy_gradient(ToyTransformer(checkpointing='reentrant'))


def test_no_hook_stays_after_the_forward_pass_even_if_it_fails():
    model = ToyTransformer()
    with pytest.raises(RuntimeError), AttentionTaps(model).record(2):
        model(torch.zeros(2, 5, 28, 28))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_model_without_attention_is_refused():
    with pytest.raises(UnsupportedModelError, match='Sequential has no self-attention'):
        AttentionTaps(nn.Sequential(nn.Conv2d(3, 4, 3)))


def test_attention_that_was_not_called_is_refused():
    with pytest.raises(UnsupportedModelError, match='none of the 2 attention modules was called'):
        with AttentionTaps(ToyTransformer()).record(2):
            pass


def test_wrong_batch_and_too_many_dropped_tokens_are_named():
    model = ToyTransformer()
    with pytest.raises(DataError, match='2 groups.*batch of 3'), AttentionTaps(model).record(3):
        model(images())
    with pytest.raises(DataError, match='drop_tokens=99'), AttentionTaps(model, 99).record(2):
        model(images())
