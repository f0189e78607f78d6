"""Densities of patch similarity: normalized, of the pairs that count and of no others."""

import copy
import math

import pytest
import torch
from torch import nn

from psaq_mm.errors import DataError, UnsupportedModelError
from psaq_mm.quantization import padded
from psaq_mm.visualization import similarity_densities
from psaq_mm.visualization.densities import pair_histogram


class Attention(nn.Module):
    """Attention as the taps find it; what reaches ``proj`` is the input itself."""

    def __init__(self, channels, heads):
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, tokens):
        self.proj(tokens)
        return tokens


class Model(nn.Module):
    """Pixels as tokens, (B, C, H, W) to (B, H * W, C), through two blocks."""

    def __init__(self, channels=8, heads=2):
        super().__init__()
        self.first, self.second = Attention(channels, heads), Attention(channels, heads)

    def forward(self, images):
        return self.second(self.first(images.flatten(2).transpose(1, 2)).cumsum(1))


def _images(count=3, seed=0):
    return torch.randn(count, 8, 4, 5, generator=torch.Generator().manual_seed(seed))


def test_a_density_integrates_to_one_and_there_is_one_a_block():
    found = similarity_densities(Model(), _images(), bins=64)
    assert [d.name for d in found] == ['first', 'second']
    for density in found:
        assert density.centers.shape == density.density.shape == (64,)
        assert density.density.sum().item() * 2 / 64 == pytest.approx(1, abs=1e-12)
        assert (density.density >= 0).all() and density.entropy <= math.log(2)
        assert density.centers[0].item() == pytest.approx(-1 + 1 / 64) and density.centers[-1].item() == pytest.approx(
            1 - 1 / 64
        )


def test_mean_and_spread_are_those_of_the_pairs():
    tokens = _images(1).flatten(2).transpose(1, 2)[0].view(20, 2, 4).mean(1)
    rows, columns = torch.triu_indices(20, 20, 1)
    pairs = torch.cosine_similarity(tokens[rows], tokens[columns], dim=1)
    found = similarity_densities(Model(), _images(1), bins=1000)[0]
    assert found.mean == pytest.approx(float(pairs.mean()), abs=1e-3)
    assert found.spread == pytest.approx(float(pairs.std(unbiased=False)), abs=1e-3)


def test_leading_tokens_that_are_no_patch_are_left_out():
    images = _images(2)
    first = similarity_densities(Model(), images.flatten(2)[:, :, None, 3:])[0]
    assert torch.equal(similarity_densities(Model(), images, drop_tokens=3)[0].density, first.density)


def test_counts_are_those_of_the_definition():
    tokens = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(1))
    counts = pair_histogram(tokens, None, 20)
    wanted = [0] * 20
    for group in tokens:
        for i in range(6):
            for j in range(i + 1, 6):
                value = torch.cosine_similarity(group[i], group[j], dim=0).item()
                wanted[min(19, int((value + 1) * 10))] += 1
    assert counts.tolist() == wanted


def test_tokens_of_padding_take_no_part():
    tokens = torch.randn(4, 6, 4, generator=torch.Generator().manual_seed(2))
    valid = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])  # two windows an image, two images
    counts = pair_histogram(tokens, valid, 20)
    assert counts.sum() == 2 * (15 + 3)
    assert torch.equal(counts, pair_histogram(tokens[[0, 2]], None, 20) + pair_histogram(tokens[[1, 3], :3], None, 20))
    wild = tokens.clone()
    wild[1::2, 3:] = 1e6
    assert torch.equal(counts, pair_histogram(wild, valid, 20))


def test_the_rows_of_padded_queries_that_attention_names_take_no_part():
    model, images = Model(), _images(2)
    whole = similarity_densities(model, images)
    with padded(model.first, torch.arange(20).view(1, -1) < 10):
        half = similarity_densities(model, images)
    assert not torch.equal(whole[0].density, half[0].density)
    assert torch.equal(whole[1].density, half[1].density)


def test_batches_make_no_difference():
    images = _images(5)
    one, many = (similarity_densities(Model(), images, batch_size=n) for n in (5, 2))
    assert all(torch.equal(a.density, b.density) for a, b in zip(one, many))


def test_many_pairs_are_counted_piece_by_piece(monkeypatch):
    tokens = torch.randn(7, 6, 4, generator=torch.Generator().manual_seed(3))
    valid = torch.rand(7, 6, generator=torch.Generator().manual_seed(4)) < 0.7
    whole = pair_histogram(tokens, valid, 20)
    monkeypatch.setattr('psaq_mm.visualization.densities._PAIRS', 72)  # two groups at a time
    assert torch.equal(whole, pair_histogram(tokens, valid, 20))


def test_equal_patches_are_narrow_and_different_ones_wide():
    flat = torch.ones(2, 8, 4, 5) + 1e-3 * _images(2)
    narrow, wide = (similarity_densities(Model(), images)[0] for images in (flat, _images(2)))
    assert narrow.density.argmax() == 99 and narrow.entropy < wide.entropy - 2


def test_a_backbone_is_run_alone_unless_told_otherwise():

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = Model()

        def forward(self, images):
            raise AssertionError('the whole detector was run')

    found = similarity_densities(Detector(), _images())
    assert [d.name for d in found] == ['backbone.first', 'backbone.second']


def test_what_has_no_density_is_refused():
    with pytest.raises(UnsupportedModelError, match='Linear'):
        similarity_densities(nn.Linear(2, 2), _images())
    with pytest.raises(DataError, match='samples of shape'):
        similarity_densities(Model(), _images()[0])
    with pytest.raises(DataError, match='NaN'):
        similarity_densities(Model(), _images() * float('nan'))
    with pytest.raises(DataError, match='no group of first holds two patches'):
        similarity_densities(Model(), _images()[..., :1, :1])


def test_samples_may_lie_elsewhere_than_the_model(device):
    model, images = Model(), _images()
    expected = similarity_densities(model, images)
    found = similarity_densities(copy.deepcopy(model).to(device), images, batch_size=2)
    for one, other in zip(found, expected):  # a similarity at the edge of two bins may fall into the other one
        assert float((one.density.cpu() - other.density).abs().sum() / other.density.sum()) < 0.02
