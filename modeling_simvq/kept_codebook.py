"""The projected codebook of SimVQ, kept in evaluation until the weights it was made from differ.

No mark on a tensor shows every write: its version does not count those through ``.data``, a NumPy view, mapped
memory or another thread, and new weights may come to lie where old ones lay. So the weights themselves are
compared, bit by bit, with copies of what they were. That costs two reads of them, far less than projecting or
searching the codebook does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .basis_and_projection import is_plain, layers_of, project
from .nearest_code import Book, make_book

_SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# Quantizers and books that this thread trusts for now.
_trusted: ContextVar[tuple[tuple[nn.Module, Book], ...]] = ContextVar("trusted", default=())


@contextmanager
def trusting(quantizers: list[nn.Module], books: tuple[Book | None, ...]) -> Iterator[None]:
    """Let quantizers search books that they made before, without comparing their weights: chunks are small."""
    pairs = zip(quantizers, books, strict=False)  # there are none at first
    token = _trusted.set(tuple((one, book) for one, book in pairs if book is not None))
    try:
        yield
    finally:
        _trusted.reset(token)


def book_of(quantizer: nn.Module) -> Book | None:
    """Return the book that a quantizer keeps; None if it keeps none."""
    kept = getattr(quantizer, "_kept", None)
    return None if kept is None else kept.book


class KeepsCodebook(nn.Module):
    """Mixin of SimVQ: makes the codebook when it is needed, keeps it, and drops it when it may have changed.

    Uses `basis`, `projection` and `_project` of the class that takes it.
    """

    _kept: "KeptCodebook | None" = None

    @torch.no_grad()
    def _book(self, codes: Tensor | None = None) -> Book:
        """Return the codebook of the present weights. With `codes`, only these need be right.

        Raises:
            ValueError: if the codebook holds NaN or infinity.
        """
        for quantizer, book in _trusted.get():
            if quantizer is self:
                return book
        structure, weights = made_of(self.basis, self.projection)
        kept = self._kept
        if kept is not None and kept.made_from(structure, weights, codes):
            return kept.book
        self._kept = kept = None  # the old one goes before the new one is made
        then = copies(weights) if structure else None
        if then is None:
            book = make_book(self.basis, self._project)
        else:
            # Of the copies: another thread may write to the weights meanwhile, even what they were before.
            copied = projection_of(structure, then[1:])
            book = make_book(then[0], lambda rows: project(rows, copied))
        if book.half.isneginf().any():
            raise ValueError("the codebook holds NaN or infinity: its training diverged")
        if then is not None:
            self._kept = KeptCodebook(structure, then, book)
        return book

    def forget_codebook(self) -> None:
        """Give back the memory of the kept codebook; it is made again when it is needed."""
        self._kept = None

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode. Training drops the kept codebook: the next step changes it."""
        if mode:
            self._kept = None
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        self._kept = None  # it does not move along
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        # A copy or a pickle makes its own codebook.
        return {**super().__getstate__(), "_kept": None}


class KeptCodebook(NamedTuple):
    """Codebook that is ready to be searched, and what it was made from.

    Attributes:
        structure: what is done with the weights, in any form that compares.
        weights: copies; the first one is the basis (K, m), a row for each code.
        book: what was made of them. It never leaves the quantizer: writes to it would not be seen.
    """

    structure: tuple
    weights: tuple[Tensor, ...]
    book: Book

    def made_from(
        self, structure: tuple, weights: list[Tensor], codes: Tensor | None = None
    ) -> bool:
        """Return whether these weights give the same codes: all of them, or those of `codes` (any shape)."""
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


def made_of(basis: Tensor, projection: nn.Module) -> tuple[tuple, list[Tensor]]:
    """Return what a codebook is made from: the kinds of the layers, or () if they are unknown; C, W, b, ..."""
    weights, structure = [basis.detach()], []
    for layer in layers_of(projection):
        biased = getattr(layer, "bias", None) is not None
        structure.append((type(layer), getattr(layer, "approximate", None), biased))
        if not is_plain(layer):
            return (), weights
        if isinstance(layer, nn.Linear):
            # As attributes: that is where parametrizations and functional_call put theirs.
            weights += [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    return tuple(structure), weights


def projection_of(structure: tuple, weights: tuple[Tensor, ...]) -> nn.Sequential:
    """Return layers of this structure that hold these W, b, ... themselves."""
    left, layers = iter(weights), []
    for kind, approximate, biased in structure:
        if issubclass(kind, nn.Linear):
            layer = nn.Linear(1, 1, bias=biased, device="meta")
            layer.weight = nn.Parameter(next(left), requires_grad=False)
            if biased:
                layer.bias = nn.Parameter(next(left), requires_grad=False)
            layers.append(layer)
        elif issubclass(kind, nn.GELU):
            layers.append(nn.GELU(approximate))
    return nn.Sequential(*layers)


def copies(weights: list[Tensor]) -> tuple[Tensor, ...] | None:
    """Return copies to compare with, or None where the weights cannot be compared."""
    if not all(map(_comparable, weights)):
        return None
    return tuple(weight.detach().clone(memory_format=torch.contiguous_format) for weight in weights)


def _comparable(weight: Tensor) -> bool:
    # Not tensors of another kind (sharded, quantized, without values), nor those of a transform of torch.func,
    # which must not live longer than it.
    return (
        type(weight) in (Tensor, nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(weight)
        and weight.layout == torch.strided
        and weight.device.type != "meta"
    )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of one shape and type have the same bits, in NaN and zeros too."""
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
