"""The exponential average of the weights, which is validated, saved and published."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel

from modeling_simvq import SimVQ
from training.runtime import sharding


class WeightAverage(AveragedModel):
    """Average of what is trained. The frozen basis, 134 MB at K = 262,144, is not read at every step.

    Args:
        model: not yet prepared. Where the launch shards it, the average is sharded alike.
    """

    def __init__(self, model: PreTrainedModel, decay: float, accelerator: Accelerator):
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.sharded = sharding.is_sharding(accelerator)
        if self.sharded:
            sharding.shard(self.module, accelerator)
        else:
            self.to(accelerator.device)
        # AveragedModel copies the weights at its first update unless told that it has one already; the
        # original averages from the first step on (fixture image_tiny1, train_trace).
        self.n_averaged.fill_(1)
        self.eval()

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

    def for_checkpoint(self) -> "WeightAverage | sharding.WholeState":
        """Return what a checkpoint holds and loads: the state of a whole model."""
        return sharding.WholeState(self) if self.sharded else self

    def for_saving(self) -> PreTrainedModel | None:
        """Return the averaged model whole; of a sharded one on the first rank alone. For all ranks to call."""
        return sharding.whole_copy(self.module) if self.sharded else self.module

    def free(self) -> None:
        """Give back what a validation has taken: the kept codebook, which changes now, and whole shards."""
        for module in self.module.modules():
            if isinstance(module, SimVQ):
                module.forget_codebook()
        if self.sharded:
            sharding.reshard(self.module)
