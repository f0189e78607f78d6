# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Teacher and student: their discrepancy, and the samples that evolve against it."""
from psaq_mm.distillation.coevolution import CoEvolution, CoEvolutionSettings
from psaq_mm.distillation.discrepancy import normalized_l1
from psaq_mm.distillation.pool import FreshPool, SamplePool
from psaq_mm.distillation.sourced import SourcedEvolution
from psaq_mm.distillation.weighting import AdaptiveWeight

__all__ = ['AdaptiveWeight', 'CoEvolution', 'CoEvolutionSettings', 'FreshPool', 'SamplePool', 'SourcedEvolution', 'normalized_l1']
