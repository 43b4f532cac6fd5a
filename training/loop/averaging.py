"""The exponential average of the weights, which is validated, saved and published."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from training.runtime import sharding


class WeightAverage(AveragedModel):
    """Average of what is trained. The frozen basis, 134 MB at K = 262,144, is not read at every step."""

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards the model's weights; buffers are copied."""
        pairs = zip(self.module.parameters(), model.parameters(), strict=True)
        pairs = (map(sharding.own_part, pair) for pair in pairs if pair[1].requires_grad)
        averaged, current = zip(*pairs, strict=True)
        self.multi_avg_fn(averaged, current, self.n_averaged)
        for copy, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            copy.copy_(buffer)
        self.n_averaged += 1
