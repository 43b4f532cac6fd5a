"""The quantizers that the models take by name: SimVQ, the systems that it is compared with, its successors.

Most are those of vector-quantize-pytorch (the optional extra `baselines`), given the face of SimVQ.
Tables of codes are searched by nearest_code, so that only the quantizers differ.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bridged_codebook import BridgedCodebook
from .float32_module import float32_by_default
from .index_backpropagation import IndexBackpropagation
from .lookup_free_entropy import bit_entropy, entropy, mean_probabilities
from .nearest_code import nearest_code
from .quantization_simvq import SimVQ
from .quantizer import Quantizer
from .row_quantizer import RowQuantizer
from .several_quantizers import GroupedQuantizer, ResidualQuantizer
from .shared_basis import SimVQOnBasisOf
from .straight_through import with_gradient_of

# Levels per dimension of FSQ: those of its paper (arXiv 2309.15505, section 4.1), and 262,144.
FSQ_LEVELS = {
    240: [8, 6, 5],
    1000: [8, 5, 5, 5],
    4375: [7, 5, 5, 5, 5],
    8000: [8, 8, 5, 5, 5],
    15360: [8, 8, 8, 6, 5],
    64000: [8, 8, 8, 5, 5, 5],
    262144: [8, 8, 8, 8, 8, 8],
}


def make_quantizer(config) -> nn.Module:
    """Return the quantizer of a model's configuration: one of these, or several, num_quantizers of them.

    - "simvq": SimVQ. Options: its arguments.
    - "vq" (VQGAN): a codebook trained by the gradient of the codes that were picked.
    - "vq_ema" (VQGAN-EMA): each code moves to the running mean of the latents that picked it. Options: decay
      (0.99), eps.
    - "fc" (VQGAN-FC): "vq" in few dimensions between two linear layers, everything of length one. Options:
      code_dim (8).
    - "fsq": every one of a few dimensions is rounded to a few levels. Options: levels, known for
      codebook_size in FSQ_LEVELS; their product is the codebook_size.
    - "lfq": log2(codebook_size) bits, with an entropy loss. Options: those of vector-quantize-pytorch's LFQ.
    - "lc" (VQGAN-LC): frozen features of another network through a trained linear layer: SimVQ whose basis is
      given (training takes it from codebook_features). Options: basis_dim, width of the features.
    - "ibq": the choice of a code has a gradient to all codes (arXiv 2412.02692). Options: those of
      IndexBackpropagation.
    - "diveq": "vq" whose error has a random direction in training, and so a gradient to latents and codes
      instead of losses (DiVeQ, openreview KRVnpTbx7R). Options: variance (0.005).
    - "fvq": "vq" behind a small transformer over all codes (arXiv 2509.10140). Options: those of
      BridgedCodebook.

    Raises:
        ValueError: if the codebook size or an option does not suit the quantizer.
        ImportError: if vector-quantize-pytorch is needed and not installed.
    """
    if config.num_quantizers == 1:
        return _make_one(config)
    levels = [_make_one(config)]
    for _ in range(1, config.num_quantizers):
        levels.append(_make_one(config, levels[0] if config.share_basis else None))
    grouped = config.quantizer_arrangement == "grouped"
    kind = GroupedQuantizer if grouped else ResidualQuantizer
    return kind(levels, config.quantizer_dropout)


def _make_one(config, owner: SimVQ | None = None) -> Quantizer:
    name, options = config.quantizer, dict(config.quantizer_options)
    size, dim, beta = config.codebook_size, config.quantizer_dim, config.commitment_cost
    try:
        if name in ("simvq", "lc"):
            if owner is not None:
                return SimVQOnBasisOf(owner, size, dim, beta, **options)
            return SimVQ(size, dim, beta, **options)
        if name in ("vq", "fc"):
            options = {"code_dim": 8, "unit_length": True, **options} if name == "fc" else options
            return CodebookQuantizer(size, dim, beta, **options)
        if name == "vq_ema":
            return CodebookQuantizer(size, dim, beta, **{"decay": 0.99, **options})
        if name == "diveq":
            return CodebookQuantizer(size, dim, beta, **{"variance": 5e-3, **options})
        if name == "ibq":
            return IndexBackpropagation(size, dim, beta, **options)
        if name == "fvq":
            return BridgedCodebook(size, dim, beta, **options)
        if name == "fsq":
            return FSQuantizer(size, dim, **options)
        return LFQuantizer(size, dim, beta, **options)
    except TypeError as error:
        raise ValueError(f"quantizer_options of {name!r}: {error}") from error


class CodebookQuantizer(RowQuantizer):
    """Quantizer with a trained table of codes: "vq", "vq_ema", "fc" and "diveq" of make_quantizer.

    Args:
        commitment_cost: beta.
        code_dim: width of the table, with linear layers on both sides unless it is d.
        unit_length: latents and codes are compared as directions.
        decay: of running means in the place of gradients.
        variance: of the direction of DiVeQ's error in training, which replaces straight-through and losses.
    """

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        commitment_cost: float,
        *,
        code_dim: int | None = None,
        unit_length: bool = False,
        decay: float | None = None,
        eps: float = 1e-5,
        variance: float | None = None,
    ):
        super().__init__(codebook_size, codebook_dim)
        if variance is not None:
            _check_diveq(codebook_dim, code_dim, decay, variance)
        self.commitment_cost, self.unit_length = commitment_cost, unit_length
        self.variance = variance
        self.averages = decay is not None
        self.inner = _load(
            "VectorQuantize",
            dim=codebook_dim,
            codebook_size=codebook_size,
            codebook_dim=code_dim,
            ema_update=self.averages,
            learnable_codebook=not self.averages,
            decay=0.99 if decay is None else decay,
            eps=eps,
            rotation_trick=False,
        )

    def _table(self) -> Tensor:
        table = self.inner.codebook.float()
        return F.normalize(table, dim=1) if self.unit_length else table

    def _quantize_rows(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, table = self.inner.project_in(rows), self._table()
        if self.unit_length:
            z = F.normalize(z, dim=1)
        codes = nearest_code(z.detach(), table.detach())
        q = F.embedding(codes, table)
        if self.training and self.variance is not None:
            from vector_quantize_pytorch.vector_quantize_pytorch import directional_reparam

            return directional_reparam(z, q, self.variance), codes, z.new_zeros(())
        loss = self.commitment_cost * F.mse_loss(z, q.detach())
        if not self.averages:
            loss = loss + F.mse_loss(q, z.detach())
        elif self.training:
            self._move_averages(rows.detach(), codes)
        return self.inner.project_out(with_gradient_of(z, q)), codes, loss

    @torch.no_grad()
    def _move_averages(self, rows: Tensor, codes: Tensor) -> None:
        # What inner.update_indices(rows[None], codes[None]) does, without its one-hot matrix (N, K).
        book = self.inner._codebook
        counts = torch.zeros_like(book.cluster_size[0]).index_add_(
            0, codes, rows.new_ones(len(rows))
        )
        sums = torch.zeros_like(book.embed_avg[0]).index_add_(0, codes, rows)
        if torch.distributed.is_initialized():
            for tensor in (counts, sums):
                torch.distributed.all_reduce(tensor)
        book.cluster_size[0].lerp_(counts, 1 - book.decay)
        book.embed_avg[0].lerp_(sums, 1 - book.decay)
        book.update_ema()

    def _vectors(self, codes: Tensor) -> Tensor:
        return self.inner.project_out(F.embedding(codes, self._table()))


def _check_diveq(codebook_dim: int, code_dim: int | None, decay: float | None, variance) -> None:
    """Raise ValueError for options of other quantizers, and a variance that is none."""
    if code_dim not in (None, codebook_dim) or decay is not None:
        raise ValueError(
            f"quantizer_options: diveq has codes as wide as the latents, {codebook_dim}, and no means, got "
            f"code_dim={code_dim} and decay={decay}: leave both out"
        )
    if type(variance) not in (int, float) or not variance >= 0:
        raise ValueError(f"quantizer_options: variance must be at least 0, got {variance!r}")


class FSQuantizer(RowQuantizer):
    """Finite scalar quantization, "fsq" of make_quantizer. It needs no loss."""

    def __init__(self, codebook_size: int, codebook_dim: int, *, levels: list[int] | None = None):
        super().__init__(codebook_size, codebook_dim)
        levels = FSQ_LEVELS.get(codebook_size) if levels is None else levels
        if levels is None:
            raise ValueError(
                f"codebook_size: fsq knows levels for {', '.join(map(str, FSQ_LEVELS))} codes, got "
                f"{codebook_size}: take one of these or give quantizer_options={{levels: [...]}}"
            )
        whole = isinstance(levels, (list, tuple)) and all(type(n) is int and n > 1 for n in levels)
        # Before the codebook is made.
        if not whole or not levels or math.prod(levels) != codebook_size:
            raise ValueError(
                f"codebook_size={codebook_size} is not the product of the levels {levels}"
            )
        self.inner = _load("FSQ", levels=list(levels), dim=codebook_dim)

    def _quantize_rows(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, codes = self.inner(rows[None])
        return quantized[0], codes[0], rows.new_zeros(())

    def _vectors(self, codes: Tensor) -> Tensor:
        return self.inner.project_out(F.embedding(codes, self.inner.implicit_codebook))


class LFQuantizer(RowQuantizer):
    """Lookup-free quantization, "lfq" of make_quantizer. Its loss can be negative: it rewards entropy.

    The entropies are those of vector-quantize-pytorch without its matrix of latents x codes
    (lookup_free_entropy.py), where the codes are the corners of a cube; other options of it go through it.
    """

    # Options with which all is computed here.
    OWN = {"entropy_loss_weight", "diversity_gamma", "commitment_loss_weight", "codebook_scale"}
    INVERSE_TEMPERATURE = 100.0

    def __init__(self, codebook_size: int, codebook_dim: int, commitment_cost: float, **options):
        super().__init__(codebook_size, codebook_dim)
        if codebook_size & (codebook_size - 1):
            raise ValueError(f"codebook_size: lfq needs a power of two, got {codebook_size}")
        options = {"commitment_loss_weight": commitment_cost, **options}
        self.inner = _load("LFQ", dim=codebook_dim, codebook_size=codebook_size, **options)
        self.factorises = options.keys() <= self.OWN

    def _quantize_rows(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.training or not self.factorises:
            quantized, codes, loss = self.inner(rows[None])
            return quantized[0], codes[0], loss
        inner, z = self.inner, self.inner.project_in(rows)
        bits = z > 0
        q = inner.bits_to_codes(bits.to(z.dtype))
        # Log odds of a bit: the difference of squared distances over the temperature.
        logits = 4 * self.INVERSE_TEMPERATURE * inner.codebook_scale * z
        mean = mean_probabilities(logits)
        if torch.distributed.is_initialized():
            from torch.distributed.nn.functional import all_reduce

            mean = all_reduce(mean) / torch.distributed.get_world_size()
        loss = inner.entropy_loss_weight * (
            bit_entropy(logits) - inner.diversity_gamma * entropy(mean)
        ) + inner.commitment_loss_weight * F.mse_loss(z, q)
        return inner.project_out(with_gradient_of(z, q)), (bits * inner.mask).sum(dim=1), loss

    def _vectors(self, codes: Tensor) -> Tensor:
        return self.inner.project_out(F.embedding(codes, self.inner.codebook))


def _load(name: str, **arguments) -> nn.Module:
    """Return a module of vector-quantize-pytorch."""
    try:
        import vector_quantize_pytorch
    except ImportError as error:
        raise ImportError(
            'this quantizer needs vector-quantize-pytorch: pip install "modeling-simvq[baselines]"'
        ) from error
    # FSQ reads values of its own buffers, which are not there on the meta device of from_pretrained.
    with torch.device("cpu"), float32_by_default():
        module = getattr(vector_quantize_pytorch, name)(**arguments)
    # from_pretrained leaves non-persistent buffers uninitialised.
    for part in module.modules():
        for key, buffer in list(part.named_buffers(recurse=False)):
            part.register_buffer(key, buffer, persistent=True)
    return module
