# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""PSAQ-ViT and PSAQ-ViT V2: samples out of a trained model, and samples and student that evolve against each other."""

from psaq_mm.psaq_vit.coevolution import CoEvolution
from psaq_mm.psaq_vit.generator import GeneratedSamples, Objective, SampleGenerator
from psaq_mm.psaq_vit.priors import total_variation, variation_prior, variation_target
from psaq_mm.psaq_vit.similarity import patch_similarity_entropy
from psaq_mm.psaq_vit.synthesis import Synthesis, SynthesisSettings
from psaq_mm.psaq_vit.taps import AttentionTap, AttentionTaps
from psaq_mm.psaq_vit.weighting import AdaptiveWeight

__all__ = [
    'AdaptiveWeight',
    'AttentionTap',
    'AttentionTaps',
    'CoEvolution',
    'GeneratedSamples',
    'Objective',
    'SampleGenerator',
    'Synthesis',
    'SynthesisSettings',
    'patch_similarity_entropy',
    'total_variation',
    'variation_prior',
    'variation_target',
]
