"""Convolutions with weight normalisation that can be copied, pickled, folded, and filled from either form.

torch's parametrization makes a class for each layer. Deep copies share it, so that folding one breaks the
others, and pickle refuses it. Here only the names of the stored tensors are torch's.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Of the tensors of a convolution with weight normalisation, as torch stores them.
LENGTH, DIRECTION = "parametrizations.weight.original0", "parametrizations.weight.original1"


class LengthAndDirection(nn.Module):
    """A weight (C', C, k): original0 are lengths (C', 1, 1), original1 directions (C', C, k) of any length."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.original0 = nn.Parameter(_lengths(weight.detach()), weight.requires_grad)
        self.original1 = weight

    def forward(self) -> Tensor:
        """The weight, length times direction."""
        return torch._weight_norm(self.original1, self.original0, 0)


class WeightNormConv1d(nn.Conv1d):
    """Convolution whose weight is a length times a direction (Salimans and Kingma 2016)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _split(self)

    @property
    def weight(self) -> Tensor:
        """The weight that the convolution has, (C', C, k)."""
        return self.parametrizations.weight()


def set_weight_norm(module: nn.Module, wanted: bool) -> None:
    """Give all convolutions inside a module weight normalisation, or fold it into plain weights.

    The weights that they have stay the same up to rounding. What is in the other form changes in place: an
    optimizer must be made after this.
    """
    for conv in module.modules():
        if type(conv) is nn.Conv1d and wanted:
            conv.__class__ = WeightNormConv1d
            _split(conv)
        elif type(conv) is WeightNormConv1d and not wanted:
            trained = conv.parametrizations.weight.original1.requires_grad
            weight = nn.Parameter(conv.weight.detach(), trained)
            del conv.parametrizations
            conv.__class__ = nn.Conv1d
            conv.weight = weight


def in_the_form_of(conv: nn.Conv1d, state: dict[str, Tensor], prefix: str) -> None:
    """Change, in a state dict, the tensors of a convolution to the form that it has, folded or not."""
    plain = prefix + "weight"
    length, direction = prefix + LENGTH, prefix + DIRECTION
    if isinstance(conv, WeightNormConv1d) and plain in state and direction not in state:
        state[direction] = state.pop(plain)
        state[length] = _lengths(state[direction])
    elif not isinstance(conv, WeightNormConv1d) and length in state and direction in state:
        state[plain] = torch._weight_norm(state.pop(direction), state.pop(length), 0)


def stored_with_weight_norm(names: Iterable[str]) -> bool:
    """Tell whether tensors of these names belong to convolutions with weight normalisation."""
    return any(name.endswith(DIRECTION) for name in names)


def _split(conv: nn.Conv1d) -> None:
    weight = conv._parameters.pop("weight")
    conv.parametrizations = nn.Module()
    conv.parametrizations.weight = LengthAndDirection(weight)


def _lengths(direction: Tensor) -> Tensor:
    return torch.norm_except_dim(direction, 2, 0)
