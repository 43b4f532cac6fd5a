"""Several quantizers for each position: residual, each on what is left, or grouped, each on its channels.

More bits a position without a larger codebook: Q codebooks of K codes give Q * log2(K) bits. Any first q of the
Q codes decode too, coarsely: train with `dropout` so that they decode well.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .float32_module import Float32Module
from .integer_codes import integers
from .straight_through import rotate, with_gradient_of


class SeveralQuantizers(Float32Module):
    """Base of ResidualQuantizer and GroupedQuantizer. Computes in float32, as its levels do.

    Args:
        levels: Q quantizers.
        dropout: share of training batches that use only the first q, drawn from 1 to Q evenly (SoundStream,
            arXiv 2107.03312, section III-C).
    """

    def __init__(self, levels: list[nn.Module], dropout: float = 0.0):
        super().__init__()
        self.levels, self.dropout = nn.ModuleList(levels), dropout
        self.codebook_size = levels[0].codebook_size

    @property
    def codebook_dim(self) -> int:
        """Width d of the latents."""
        raise NotImplementedError

    def forward(self, latents: Tensor, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Replace every latent vector by codes.

        Args:
            latents: (B, d, *spatial), any floating-point type.
            count: how many quantizers, the first ones; all, or what `dropout` draws in training.

        Returns:
            Quantized latents of the same shape and type, codes (B, count, *spatial) int64, and the sum of the
            quantizers' commitment losses, a float32 scalar.

        Raises:
            ValueError: if the count is not in 1 to Q; as a level does.
        """
        drawn = count is None and self.training and self.dropout > 0
        count = self._drawn_count() if drawn else check_count(count, len(self.levels))
        exact = latents.float()
        quantized, codes, loss = self._quantize(exact, count)
        if torch.is_grad_enabled() and self.training:
            # Parameters without a gradient are an error of DistributedDataParallel.
            for level in self.levels[count:]:
                loss = loss + sum(0.0 * p.sum() for p in level.parameters() if p.requires_grad)
        turned = getattr(self.levels[0], "rotation_trick", False)
        out = (rotate if turned else with_gradient_of)(exact, quantized)
        return out.to(latents.dtype), torch.stack(codes, dim=1), loss

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the vectors of codes.

        Args:
            codes: integers of any type, (B, q, *spatial), of the first q quantizers: a tensor, array or list.

        Returns:
            (B, d, *spatial) float32, exactly what forward returns with these codes in evaluation mode.

        Raises:
            ValueError: if q is not in 1 to Q; as a level does.
        """
        codes = integers(
            "codes", codes, None if isinstance(codes, Tensor) else self.levels[0]._device()
        )
        if codes.ndim < 2:
            raise ValueError(f"codes must be (B, q, ...), got shape {tuple(codes.shape)}")
        count = check_count(
            codes.shape[1], len(self.levels), "the second size of codes (B, q, ...)"
        )
        return self._vectors([self.levels[i].lookup(codes[:, i]) for i in range(count)])

    def from_codes(self, audio_codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the vectors (B, d, T) of codes (B, q, T), again, and the codes: as DAC's quantizer does."""
        vectors = self.lookup(audio_codes)
        return vectors, vectors, audio_codes

    def codebook(self) -> Tensor:
        """Return (K, d) vectors on the latents' own scale, which statistics compare the latents with."""
        raise NotImplementedError

    def forget_codebook(self) -> None:
        """Give back the memory of the kept codebooks."""
        for level in self.levels:
            if hasattr(level, "forget_codebook"):
                level.forget_codebook()

    def fold_codebook(self) -> None:
        """Put each effective codebook in the place of its basis, as SimVQ.fold_codebook does."""
        # The first may own the basis of the others: it changes last.
        for level in reversed(self.levels):
            level.fold_codebook()

    def _drawn_count(self) -> int:
        whole = torch.rand(()) >= self.dropout
        return len(self.levels) if whole else int(torch.randint(1, len(self.levels) + 1, ()))

    def seen(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield what each quantizer is given of latents (B, d, *spatial), computed when it is asked for."""
        raise NotImplementedError

    def _quantize(self, latents: Tensor, count: int) -> tuple[Tensor, list[Tensor], Tensor]:
        """Return vectors without gradient, the codes of each level, and the loss, of float32 latents."""
        raise NotImplementedError

    def _vectors(self, levels: list[Tensor]) -> Tensor:
        """Put together the vectors of the first levels."""
        raise NotImplementedError


class ResidualQuantizer(SeveralQuantizers):
    """Each quantizer codes what those before it left; their vectors add up (EnCodec, arXiv 2210.13438)."""

    @property
    def codebook_dim(self) -> int:
        """Width d of the latents, and of each quantizer's codes."""
        return self.levels[0].codebook_dim

    def seen(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield the latents, and then what the quantizers before leave of them."""
        yield (rest := latents)
        total = 0.0
        for level in self.levels[:-1]:
            total = total + level(rest)[0].detach()
            yield (rest := latents - total)

    def _quantize(self, latents: Tensor, count: int) -> tuple[Tensor, list[Tensor], Tensor]:
        total, codes, loss = None, [], 0.0
        for level in self.levels[:count]:
            # The encoder learns from every level's loss, of what is left of its own output.
            rest = latents if total is None else latents - total
            vectors, found, cost = level(rest)
            total = vectors.detach() if total is None else total + vectors.detach()
            codes.append(found)
            loss = loss + cost
        return total, codes, loss

    def codebook(self) -> Tensor:
        """Return the first quantizer's codebook (K, d), without gradient: a copy."""
        return self.levels[0].codebook()

    def _vectors(self, levels: list[Tensor]) -> Tensor:
        total = levels[0]
        for vectors in levels[1:]:
            total = total + vectors
        return total


class GroupedQuantizer(SeveralQuantizers):
    """Each quantizer codes its own d / Q channels (product quantization, MGVQ, arXiv 2507.07997).

    The channels of quantizers that are left out are zero.
    """

    @property
    def codebook_dim(self) -> int:
        """Width d of the latents, those of all groups."""
        return sum(level.codebook_dim for level in self.levels)

    def seen(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield the channels of each group."""
        yield from latents.chunk(len(self.levels), dim=1)

    def _quantize(self, latents: Tensor, count: int) -> tuple[Tensor, list[Tensor], Tensor]:
        parts = zip(self.levels[:count], self.seen(latents), strict=False)
        found = [level(part) for level, part in parts]
        vectors, codes, losses = zip(*found, strict=True)
        return self._vectors([one.detach() for one in vectors]), list(codes), sum(losses)

    def codebook(self) -> Tensor:
        """Return vectors (K, d), of which row k is code k of every group, without gradient."""
        return torch.cat([level.codebook() for level in self.levels], dim=1)

    def _vectors(self, levels: list[Tensor]) -> Tensor:
        missing = len(self.levels) - len(levels)
        return torch.cat([*levels, *[torch.zeros_like(levels[0])] * missing], dim=1)


def levels_of(quantizer: nn.Module) -> list[nn.Module]:
    """Return the quantizers of several, or the one that there is."""
    return list(quantizer.levels) if isinstance(quantizer, SeveralQuantizers) else [quantizer]


def quantize(
    quantizer: nn.Module, latents: Tensor, count: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize by one quantizer or several, as SeveralQuantizers.forward: codes are (B, q, *spatial)."""
    if isinstance(quantizer, SeveralQuantizers):
        return quantizer(latents, count)
    quantized, codes, loss = quantizer(latents)
    return quantized, codes[:, None], loss


def look_up(quantizer: nn.Module, codes: Tensor) -> Tensor:
    """Return the vectors (B, d, *spatial) of codes (B, q, *spatial) of one quantizer or several."""
    several = isinstance(quantizer, SeveralQuantizers)
    return quantizer.lookup(codes if several else codes[:, 0])


def check_count(count: int | None, most: int, name: str = "num_quantizers") -> int:
    """Return how many quantizers to use, all for None.

    Raises:
        ValueError: if they are not 1 to `most`.
    """
    if count is None:
        return most
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
        raise ValueError(f"{name} must be a whole number from 1 to {most}, got {count!r}")
    return count
