"""Usage of codes and statistics of latents: the figures that show a collapse early."""

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from training.codebook.spectra import spectrum


class CodeCounter:
    """Counts codes on the device, over a window of batches; ranks are summed only when it is read.

    Args:
        codebook_size: K.
        quantizers: Q of a position; each is counted for itself.
    """

    def __init__(self, codebook_size: int, device: torch.device, quantizers: int = 1):
        shape = (codebook_size,) if quantizers == 1 else (quantizers, codebook_size)
        self.counts = torch.zeros(shape, dtype=torch.int64, device=device)

    def update(self, codes: Tensor) -> None:
        """Add a batch of codes, of any shape; of several quantizers (B, q, *spatial)."""
        if self.counts.ndim == 2:
            each = torch.arange(codes.shape[1], device=codes.device) * self.counts.shape[1]
            codes = codes + each.view(-1, *[1] * (codes.ndim - 2))
        # Unlike bincount this touches as many entries as there are tokens, and never waits for a GPU.
        codes = codes.flatten()
        self.counts.view(-1).index_add_(0, codes, torch.ones_like(codes))

    def read(self, accelerator: Accelerator) -> "CodeUsage":
        """Usage over all ranks since the last reset."""
        return CodeUsage.from_counts(accelerator.reduce(self.counts.clone(), reduction="sum"))

    def reset(self) -> None:
        """Start a new window."""
        self.counts.zero_()

    def state_dict(self) -> dict:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict) -> None:
        self.counts.copy_(state["counts"])


def reachable_utilisation(tokens: int, codebook_size: int) -> float:
    """Share of the codes that so many tokens reach on average if all codes are equally likely.

    What a utilisation is to be read beside: 256 tokens reach 22 % of 1,024 codes, however healthy these are.
    """
    if codebook_size == 1:
        return float(tokens > 0)
    return -math.expm1(tokens * math.log1p(-1 / codebook_size))


@dataclass
class CodeUsage:
    """Usage of a codebook over some tokens.

    Attributes:
        utilisation: used codes / K, the paper's figure.
        perplexity: exp of the entropy of the code frequencies, in nats; K if all are used equally.
        tokens: tokens counted.
        ceiling: the most that utilisation could be with so few tokens.
        codebook_size: K.
        each: of several quantizers, the usage of each; the figures above are their means, and tokens those of
            the first.
    """

    utilisation: float
    perplexity: float
    tokens: int
    ceiling: float
    codebook_size: int
    each: tuple["CodeUsage", ...] = ()

    @property
    def reachable(self) -> float:
        """See reachable_utilisation."""
        return reachable_utilisation(self.tokens, self.codebook_size)

    def metrics(self) -> dict[str, float]:
        """The figures of a validation or an evaluation, by the keys of hub_cards.evaluation.METRICS."""
        return {
            "utilisation": self.utilisation,
            "reachable_utilisation": self.reachable,
            "perplexity": self.perplexity,
        } | {f"utilisation_{n}": usage.utilisation for n, usage in enumerate(self.each, 1)}

    def __str__(self) -> str:
        several = "".join(f", {usage.utilisation:.1%}" for usage in self.each)
        return (
            f"{self.utilisation:.1%} of {self.codebook_size:,} codes used "
            f"({self.tokens:,} tokens could reach {self.reachable:.1%})"
        ) + (f"; by quantizer{several[1:]}" if several else "")

    @classmethod
    def from_counts(cls, counts: Tensor) -> "CodeUsage":
        """Compute usage from occurrences per code, (K,) integers, or (Q, K) of several quantizers."""
        counts = counts.cpu()  # float64, which not every device has
        if counts.ndim == 2:
            each = tuple(cls.from_counts(some) for some in counts)
            means = (
                sum(getattr(usage, name) for usage in each) / len(each)
                for name in ("utilisation", "perplexity")
            )
            return cls(*means, each[0].tokens, each[0].ceiling, each[0].codebook_size, each)
        tokens = int(counts.sum())
        if tokens == 0:
            return cls(0.0, 0.0, 0, 0.0, len(counts))
        used = counts[counts > 0].double() / tokens
        return cls(
            utilisation=len(used) / len(counts),
            perplexity=math.exp(-float((used * used.log()).sum())),
            tokens=tokens,
            ceiling=min(1.0, tokens / len(counts)),
            codebook_size=len(counts),
        )


@torch.no_grad()
def effective_rank(rows: Tensor) -> float:
    """Return the dimensions that vectors really span: exp of the entropy of the normalised singular values.

    Args:
        rows: (N, d). They are centred first. The result lies between 1 and min(N, d), and is 0 if all
            rows are equal or one is not finite. Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    return spectrum(rows).effective_rank if rows.isfinite().all() else 0.0


@torch.no_grad()
def latent_statistics(latents: Tensor, codebook: Tensor, most_rows: int = 4096) -> dict[str, float]:
    """Scale of the latents against that of the codes, and their effective rank.

    Args:
        latents: (B, d, *spatial), the encoder's output.
        codebook: (K, d), the effective codebook.
        most_rows: rows beyond this are left out, evenly, to bound the cost.

    Returns:
        scale_ratio: root mean square of the latents about their mean, over that of the codes. Near 1 is
            healthy; far above, the codes cannot reach the latents and few are used.
        latent_effective_rank: see effective_rank.
    """
    rows = latents.float().movedim(1, -1).reshape(-1, latents.shape[1])
    rows = rows[:: max(1, len(rows) // most_rows)].cpu()
    codes = codebook[:: max(1, len(codebook) // most_rows)].cpu()
    spread = [(x - x.mean(dim=0)).square().mean().sqrt() for x in (rows, codes)]
    return {
        "scale_ratio": float(spread[0] / spread[1].clamp(min=1e-12)),
        "latent_effective_rank": effective_rank(rows),
    }
