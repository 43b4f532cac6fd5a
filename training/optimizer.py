"""AdamW as every module here is trained with it."""

import torch
from torch import nn

from training.settings import LoopSettings


def make_optimizer(module: nn.Module, settings: LoopSettings) -> torch.optim.AdamW:
    """AdamW over what is trained; without weight decay, the default, it is Adam to the bit.

    Decay is of matrices alone: norms, biases and other vectors stay free, as is usual for transformers.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [{"params": trained}]
    if settings.weight_decay:
        groups = [
            {"params": [p for p in trained if p.ndim >= 2]},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
    return torch.optim.AdamW(
        groups,
        settings.learning_rate,
        tuple(settings.adam_betas),
        weight_decay=settings.weight_decay,
    )
