# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""LoRAModel of mmpretrain, which is refused: its weights are merged first."""

from typing import Optional

from torch import nn

from psaq_mm.models.adapters.backbone import Backbone, register_backbone

__all__ = ['LoRAModel']


@register_backbone
class LoRAModel(Backbone):
    """A network with low-rank layers beside its own (LoRA, arXiv 2106.09685). Its checkpoints hold these alone, and
    would lose the ranges of quantizers.
    """

    names = ('mmpretrain.models.peft.lora.LoRAModel',)

    def unsupported(self, net: nn.Module) -> Optional[str]:
        """See :meth:`.Backbone.unsupported`."""
        return (
            "its checkpoints hold the low-rank weights alone: merge them with mmpretrain's "
            f'tools/model_converters/merge_lora_weight.py, and use {type(net.module).__name__} as the backbone'
        )
