"""A projected codebook that is kept until the weights it was made from differ.

No mark on a tensor shows every write: its version does not count those through ``.data``, a NumPy view, mapped
memory or another thread, and new weights may come to lie where old ones lay. So the weights themselves are
compared, bit by bit, with copies of what they were. That costs two reads of them, far less than projecting or
searching the codebook does.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .nearest_code import Book

_PLAIN = (Tensor, nn.Parameter)
_SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class KeptCodebook(NamedTuple):
    """Codes ready to be searched, and what they were made from.

    Attributes:
        structure: what is done with the weights, in any form that compares.
        weights: copies; the first one is the basis (K, m), a row for each code.
        book: what was made of them.
        version: of book.codes, which callers of SimVQ.codebook hold too.
    """

    structure: tuple
    weights: tuple[Tensor, ...]
    book: Book
    version: int

    def made_from(
        self, structure: tuple, weights: list[Tensor], codes: Tensor | None = None
    ) -> bool:
        """Whether these weights would give the same codes: all of them, or those of `codes` (any shape)."""
        if version(self.book.codes) != self.version:
            return False
        if structure != self.structure or len(weights) != len(self.weights):
            return False
        pairs = list(zip(weights, self.weights, strict=True))
        if not all(
            (now.shape, now.dtype, now.device) == (then.shape, then.dtype, then.device)
            and _comparable(now)
            for now, then in pairs
        ):
            return False
        if codes is not None and codes.numel() < len(weights[0]):
            pairs[0] = tuple(basis[codes] for basis in pairs[0])
        # The small ones first.
        return all(_same_bits(now, then) for now, then in reversed(pairs))


def copies(weights: list[Tensor]) -> tuple[Tensor, ...] | None:
    """Copies to compare with, or None where the weights cannot be compared."""
    if not all(map(_comparable, weights)):
        return None
    return tuple(weight.detach().clone(memory_format=torch.contiguous_format) for weight in weights)


def _comparable(weight: Tensor) -> bool:
    # Not tensors of another kind (sharded, quantized, without values), nor those of a transform of torch.func,
    # which must not live longer than it.
    return (
        type(weight) in _PLAIN
        and not torch._C._functorch.is_functorch_wrapped_tensor(weight)
        and weight.layout == torch.strided
        and weight.device.type != "meta"
    )


def version(tensor: Tensor) -> int:
    """How often a tensor was written to; 0 for one of inference mode, which does not count."""
    return 0 if tensor.is_inference() else tensor._version


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and type are equal bit by bit, NaN and the sign of a zero included."""
    one, other = one.detach(), other.detach()
    size = one.element_size()
    # Eight bytes at a time take half as long as four.
    if all(
        tensor.is_contiguous()
        and tensor.numel() * size % 8 == 0
        and tensor.storage_offset() * size % 8 == 0
        for tensor in (one, other)
    ):
        return torch.equal(one.view(-1).view(torch.int64), other.view(-1).view(torch.int64))
    return torch.equal(one.view(_SAME_SIZE[size]), other.view(_SAME_SIZE[size]))


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer does what its class in torch does, and with nothing but its weight and bias."""
    if "forward" in layer.__dict__ or has_hooks(layer):
        return False
    if type(layer).forward is nn.Linear.forward:
        return type(layer.weight) in _PLAIN
    return type(layer).forward in (nn.GELU.forward, nn.Identity.forward)


def has_hooks(module: nn.Module) -> bool:
    """Whether something else runs when the module is called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
