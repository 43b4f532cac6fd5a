"""Modules that stay in float32, whichever way a model is converted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

PRECISE = (torch.float32, torch.float64)


class Float32Module(nn.Module):
    """Module whose parameters and buffers no conversion puts below float32.

    ``half()``, ``bfloat16()``, ``to(dtype)`` and ``type(dtype)``, of it or of what holds it, move them to the
    device that was asked for and leave their type. ``double()`` widens them. Integers stay integers.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # Every conversion of nn.Module, and so of transformers, accelerate and diffusers, comes through here.
        return super()._apply(lambda tensor: _converted(fn, tensor), recurse)


class Float32Linear(Float32Module, nn.Linear):
    """nn.Linear that no conversion puts below float32, nor a default type at its making."""

    def __init__(self, in_features: int, out_features: int, device: torch.device | None = None):
        super().__init__(in_features, out_features, device=device, dtype=torch.float32)


def check_float32(name: str, tensor: Tensor) -> None:
    """Raise ValueError for a tensor that ``tensor.data = ...`` or torchao left with less than float32."""
    if type(tensor).__module__.startswith("torchao."):
        raise ValueError(
            f"{name} of the quantizer was quantized by torchao, which gives other codes: load the model again "
            "and leave it out, with filter_fn=lambda module, name: isinstance(module, torch.nn.Linear) "
            'and "quantizer" not in name'
        )
    if tensor.is_floating_point() and tensor.dtype not in PRECISE:
        raise ValueError(
            f"{name} of the quantizer is {tensor.dtype}, whose rounding gives other codes: load the quantizer "
            "again and leave it in float32"
        )


@contextmanager
def float32_by_default() -> Iterator[None]:
    """New tensors are float32, whatever torch's default type is."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def _converted(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    new = fn(tensor)
    if new.dtype == tensor.dtype:
        return new
    if not tensor.is_floating_point():
        return tensor.to(new.device)
    return new if new.dtype in PRECISE else tensor.to(new.device, torch.float32)
