"""Put the codes where the latents are, when quantization begins: their mean and covariance, or all of them."""

import math
from collections.abc import Iterator
from itertools import islice

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from modeling_simvq import SimVQ
from modeling_simvq.several_quantizers import GroupedQuantizer, SeveralQuantizers, levels_of
from modeling_simvq.shared_basis import SimVQOnBasisOf
from modeling_simvq.straight_through import to_rows
from training.runtime.float64 import to_float64


@torch.no_grad()
def match_codes_to_latents(
    quantizers: list[nn.Module], latents: Tensor, accelerator: Accelerator, first: int = 0
) -> None:
    """Set W and b so that W c + b is distributed as the latents are, to second order.

    C is N(0, 1/m), so W is sqrt(m) times a Cholesky factor of the latents' covariance, and b their mean. With
    features in the place of C it is their own covariance that is taken out. Quantizers that have no such W
    stay as they are.
    An autoencoder that was trained without quantization has latents of any scale and orientation; codes far
    from them would all but a few stay unused at first.

    Args:
        quantizers: all are set to the same W and b (the trained model's and the average's).
        latents: (B, d, *spatial) of this process; moments are taken over all processes.
        first: of several quantizers, the first that is set; those before it stay as they are.
    """
    for index, (levels, seen) in enumerate(_what_each_sees(quantizers, latents)):
        if index >= first:
            _match(levels, seen, accelerator)


def _match(quantizers: list[nn.Module], latents: Tensor, accelerator: Accelerator) -> None:
    quantizers = [q for q in quantizers if isinstance(q, SimVQ) and _has_matrix(q)]
    rows = to_float64(latents).movedim(1, -1).reshape(-1, latents.shape[1])
    moments = torch.cat([rows.mean(dim=0, keepdim=True), rows.T @ rows / len(rows)])
    mean, *second = accelerator.reduce(moments, reduction="mean")
    covariance = torch.stack(second) - torch.outer(mean, mean)
    factor, failed = _factor(covariance)
    if failed:
        return  # latents that are not finite: the guard of the steps reports them
    for quantizer in quantizers:
        _spread(quantizer, factor, mean)


class LatentSample:
    """Keeps latents of the newest steps, from which codes can be drawn.

    A quarter of each step's are taken, at random, since neighbours in a sample resemble each other.

    Args:
        count: latents that this process keeps.
        width: d.
    """

    def __init__(self, count: int, width: int, device: torch.device):
        self._rows = torch.zeros(count, width, device=device)
        self._seen = 0

    @torch.no_grad()
    def add(self, latents: Tensor) -> None:
        """Take from the latents (B, d, *spatial) of a step."""
        rows = to_rows(latents.float())
        count = min(max(1, len(rows) // 4), len(self._rows))
        chosen = rows[torch.randperm(len(rows), device=rows.device)[:count]]
        places = (self._seen + torch.arange(count, device=rows.device)) % len(self._rows)
        self._rows[places] = chosen.to(self._rows.device)
        self._seen += count

    @torch.no_grad()
    def draw(self, count: int, accelerator: Accelerator) -> Tensor:
        """Return latents (count, d) of all processes, the same on each of them; none if none is finite.

        Where there are fewer, they are drawn again with noise of the width of Scott's rule (Scott, Multivariate
        Density Estimation, 1992): codes must differ.
        """
        rows = accelerator.gather(self._rows[: self._seen]).cpu()
        rows = rows[rows.isfinite().all(dim=1)]
        generator = torch.Generator().manual_seed(0)
        if len(rows) >= count:
            return rows[torch.randperm(len(rows), generator=generator)[:count]]
        if not len(rows):
            return rows
        missing = count - len(rows)
        again = rows[torch.randint(len(rows), (missing,), generator=generator)]
        width = rows.std(dim=0, correction=0) * len(rows) ** (-1 / (rows.shape[1] + 4))
        return torch.cat([rows, again + width * torch.randn(again.shape, generator=generator)])

    def state_dict(self) -> dict:
        return {"rows": self._rows, "seen": self._seen}

    def load_state_dict(self, state: dict) -> None:
        self._rows.copy_(state["rows"])
        self._seen = state["seen"]


@torch.no_grad()
def put_codes_on(quantizers: list[nn.Module], rows: Tensor) -> None:
    """Set C, W and b so that the codes are these latents (K, d), and C has the moments that it is drawn with.

    W and b alone can give the codes the latents' mean and covariance, but not their shape: few codes would be
    where latents gather, as those of silence do, and many where there is none. C stays frozen afterwards.
    Quantizers whose C is not as wide as the latents stay as they are, and of residual ones all but the first:
    codes that are the latents leave nothing of them.
    """
    if not len(rows):
        return
    if isinstance(quantizers[0], SeveralQuantizers):
        count = None if isinstance(quantizers[0], GroupedQuantizer) else 1
        for levels, seen in islice(_what_each_sees(quantizers, rows), count):
            put_codes_on(levels, seen)
        return
    rows = to_float64(rows)
    width = rows.shape[1]
    mean = rows.mean(dim=0)
    factor, failed = _factor((rows - mean).T @ (rows - mean) / len(rows))
    if failed:
        return
    white = torch.linalg.solve_triangular(factor, (rows - mean).T, upper=False).T
    for quantizer in quantizers:
        if takes_latents_as_codes(quantizer) and len(quantizer.basis) == len(rows):
            quantizer.basis.copy_(white / math.sqrt(width))
            quantizer.projection.weight.copy_(factor * math.sqrt(width))
            quantizer.projection.bias.copy_(mean)


def takes_latents_as_codes(quantizer: nn.Module) -> bool:
    """Tell whether C, W and b of a quantizer, the first of several, can be set so that codes are latents."""
    first = levels_of(quantizer)[0]
    if not isinstance(first, SimVQ) or isinstance(first, SimVQOnBasisOf):
        return False
    return _has_matrix(first) and first.basis.shape[1] == first.codebook_dim


@torch.no_grad()
def whiten_codes(quantizer: nn.Module) -> None:
    """Set W and b so that the codes have mean zero and the identity as covariance, as whitened latents have.

    A quantizer that has no such W stays as it is. Of residual ones each later one is narrower by K^(-1/d), the
    least that K codes leave of a Gaussian of d dimensions (rate 2 / d * log K of the distortion).
    """
    grouped = isinstance(quantizer, GroupedQuantizer)
    for index, level in enumerate(levels_of(quantizer)):
        if isinstance(level, SimVQ) and _has_matrix(level):
            width = level.codebook_dim
            identity = torch.eye(width, dtype=to_float64(level.basis[:0]).dtype)
            left = 1.0 if grouped else level.codebook_size ** (-index / width)
            _spread(level, left * identity, identity.new_zeros(width))


def _what_each_sees(
    quantizers: list[nn.Module], latents: Tensor
) -> Iterator[tuple[list[nn.Module], Tensor]]:
    """Yield the first quantizer of each model and the latents that it sees, then the second ones, and so on.

    What is left for the next is computed after the caller has done with a level.
    """
    if not isinstance(quantizers[0], SeveralQuantizers):
        yield quantizers, latents
        return
    for index, seen in enumerate(quantizers[0].seen(latents)):
        yield [several.levels[index] for several in quantizers], seen


def _factor(covariance: Tensor) -> tuple[Tensor, bool]:
    """Return the Cholesky factor of a covariance, and whether there is none."""
    # Directions that the latents do not use get a thousandth of the mean spread, so that W has full rank.
    covariance.diagonal().add_(1e-6 * covariance.diagonal().mean().clamp(min=1e-12))
    factor, failed = torch.linalg.cholesky_ex(covariance)
    return factor, bool(failed) or not factor.isfinite().all()


def _has_matrix(quantizer: nn.Module) -> bool:
    linear = isinstance(quantizer.projection, nn.Linear)
    return linear and quantizer.basis.shape[1] >= quantizer.codebook_dim


def _spread(quantizer: SimVQ, factor: Tensor, mean: Tensor) -> None:
    """Set W and b so that the codes have this mean (d,) and the covariance factor factor^T, (d, d)."""
    given = quantizer.basis_init == "given"
    whitening, centre = _whitening(quantizer.basis, len(mean), given)
    weight = factor @ whitening
    quantizer.projection.weight.copy_(weight)
    quantizer.projection.bias.copy_(mean - weight @ centre)


def _whitening(basis: Tensor, width: int, given: bool) -> tuple[Tensor, Tensor]:
    """A matrix (width, m) that makes a row `width` uncorrelated numbers of variance one; and the rows' mean."""
    rows = to_float64(basis)
    if not given:
        identity = torch.eye(width, rows.shape[1], dtype=rows.dtype, device=rows.device)
        return identity * math.sqrt(rows.shape[1]), torch.zeros_like(rows[0])
    centre = rows.mean(dim=0)
    values, vectors = torch.linalg.eigh((rows - centre).T @ (rows - centre) / len(rows))
    values = values[-width:].clamp(min=1e-6 * float(values.mean()) + 1e-12)
    return (vectors[:, -width:] / values.sqrt()).T, centre
