"""Data-dependent start of weight-normalised convolutions (Salimans and Kingma 2016, section 3)."""

import torch
from torch import Tensor, nn

from modeling_simvq.weight_norm_conv1d import WeightNormConv1d


@torch.no_grad()
def start_from_data(module: nn.Module, inputs: Tensor) -> None:
    """Scale and shift every weight-normalised convolution so that its outputs have mean 0 and deviation 1.

    With torch's own initialisation each layer of a deep encoder passes on a fraction of what it gets: speech,
    which is quiet to begin with, hardly reaches the latents, and the first steps go into undoing that.

    Args:
        module: called once with inputs; its convolutions are set in the order in which they run.
        inputs: a batch of training data.
    """

    def standardise(conv: WeightNormConv1d, _: tuple, output: Tensor) -> Tensor:
        mean = output.mean(dim=(0, 2))
        deviation = output.std(dim=(0, 2)).clamp(min=1e-6)
        conv.parametrizations.weight.original0.div_(deviation[:, None, None])
        conv.bias.sub_(mean).div_(deviation)
        mean, deviation = mean[:, None], deviation[:, None]
        return (output - mean) / deviation

    convolutions = [layer for layer in module.modules() if isinstance(layer, WeightNormConv1d)]
    hooks = [layer.register_forward_hook(standardise) for layer in convolutions]
    try:
        module(inputs)
    finally:
        for hook in hooks:
            hook.remove()
