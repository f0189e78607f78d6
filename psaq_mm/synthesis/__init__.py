# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Samples out of a trained model: attention taps, patch similarity entropy, image priors, the generator."""
from psaq_mm.synthesis.generator import GeneratedSamples, SampleGenerator
from psaq_mm.synthesis.normalization import ImageSpec
from psaq_mm.synthesis.priors import total_variation, variation_prior, variation_target
from psaq_mm.synthesis.similarity import SimilarityDensity, patch_similarity_density, patch_similarity_entropy
from psaq_mm.synthesis.sources import (DeadLeaves, GaussianNoise, Generated, Mixture, PinkNoise, SampleStream, Scenes, Source,
                                       gaussian_noise, pink_noise, source_of)
from psaq_mm.synthesis.taps import AttentionTap, AttentionTaps, find_attention, is_attention

__all__ = [
    'AttentionTap', 'AttentionTaps', 'DeadLeaves', 'GaussianNoise', 'Generated', 'GeneratedSamples', 'ImageSpec', 'Mixture', 'PinkNoise',
    'SampleGenerator', 'SampleStream', 'Scenes', 'SimilarityDensity', 'Source', 'find_attention', 'gaussian_noise', 'is_attention',
    'patch_similarity_density', 'patch_similarity_entropy', 'pink_noise', 'source_of', 'total_variation', 'variation_prior',
    'variation_target'
]
