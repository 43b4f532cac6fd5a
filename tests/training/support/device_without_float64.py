"""Tensors that say they are on MPS and lie in the CPU's memory: as there, none may be float64.

Within `device_without_float64()` whatever is made on, or sent to, the device "mps" is such a tensor, and an
operation on one gives others, or the errors that devices give.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

CPU, MPS = torch.device("cpu"), torch.device("mps")
# They take tensors of several devices.
MIXED = {"copy_", "__getitem__", "__setitem__"}


class Elsewhere(torch.Tensor):
    """A tensor of that device."""


class _Device(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs or {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        on_it = any(isinstance(tensor, Elsewhere) for tensor in tensors)
        if function == torch.Tensor.device.__get__:
            return MPS if on_it else CPU
        name = getattr(function, "__name__", "")
        plain = [t for t in tensors if t.dim() and not isinstance(t, Elsewhere)]
        if on_it and plain and name not in MIXED:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        for leaf in leaves:  # the device that is asked for
            if isinstance(leaf, torch.device):
                on_it = leaf == MPS
        if name == "cpu":
            on_it = False
        args, kwargs = tree_map(_inside, (args, kwargs or {}))
        out = function(*args, **kwargs)
        return tree_map_only(torch.Tensor, _outside, out) if on_it else out


def _inside(leaf):
    if isinstance(leaf, Elsewhere):
        return leaf.as_subclass(torch.Tensor)
    return CPU if isinstance(leaf, torch.device) else leaf


def _outside(tensor: torch.Tensor) -> Elsewhere:
    if tensor.dtype == torch.float64:
        raise TypeError("the MPS framework does not support float64")
    return tensor.as_subclass(Elsewhere)


@contextmanager
def device_without_float64() -> Iterator[torch.device]:
    """The device, while it is there."""
    with torch.no_grad(), _Device():
        yield MPS
