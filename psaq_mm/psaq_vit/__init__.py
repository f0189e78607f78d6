# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""PSAQ-ViT and PSAQ-ViT V2: samples out of a trained model, and samples and student that evolve against each other."""

from psaq_mm.psaq_vit.coevolution import CoEvolution, CoEvolutionSettings
from psaq_mm.psaq_vit.generator import GeneratedSamples, SampleGenerator
from psaq_mm.psaq_vit.pool import FreshPool, SamplePool
from psaq_mm.psaq_vit.priors import total_variation, variation_prior, variation_target
from psaq_mm.psaq_vit.similarity import SimilarityDensity, patch_similarity_density, patch_similarity_entropy
from psaq_mm.psaq_vit.sourced import SourcedEvolution
from psaq_mm.psaq_vit.taps import AttentionTap, AttentionTaps
from psaq_mm.psaq_vit.weighting import AdaptiveWeight

__all__ = [
    'AdaptiveWeight',
    'AttentionTap',
    'AttentionTaps',
    'CoEvolution',
    'CoEvolutionSettings',
    'FreshPool',
    'GeneratedSamples',
    'SampleGenerator',
    'SamplePool',
    'SimilarityDensity',
    'SourcedEvolution',
    'patch_similarity_density',
    'patch_similarity_entropy',
    'total_variation',
    'variation_prior',
    'variation_target',
]
