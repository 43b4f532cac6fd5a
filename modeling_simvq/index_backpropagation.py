"""Index backpropagation quantization, IBQ (arXiv 2412.02692): all codes learn, through the choice itself."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from .nearest_code import EXPORTED_BLOCK, nearest_code
from .row_quantizer import RowQuantizer
from .straight_through import with_gradient_of

# Latents whose probabilities of all codes exist at a time.
BLOCK = 128


class IndexBackpropagation(RowQuantizer):
    """Quantizer with a trained table, "ibq" of make_quantizer: the code of the largest inner product.

    The gradient goes through the softmax of all inner products instead of around the choice. Its expectation
    over the codes is attention with the table as keys and values, which no matrix (N, K) is needed for.

    Args:
        commitment_cost: beta, which here weighs the codes' side of the loss.
        entropy_weight: of the entropy loss (few codes a latent, all codes over a batch).
        entropy_temperature: of the probabilities in it.

    Raises:
        ValueError: if an option is out of range.
    """

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        commitment_cost: float,
        *,
        entropy_weight: float = 0.05,
        entropy_temperature: float = 0.01,
    ):
        super().__init__(codebook_size, codebook_dim)
        if type(entropy_temperature) not in (int, float) or not entropy_temperature > 0:
            raise ValueError(
                f"quantizer_options: entropy_temperature must be above 0, got {entropy_temperature!r}"
            )
        self.commitment_cost = commitment_cost
        self.entropy_weight, self.entropy_temperature = entropy_weight, entropy_temperature
        self.table = nn.Parameter(torch.empty(codebook_size, codebook_dim, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table again, N(0, 1)."""
        init.normal_(self.table)

    def _quantize_rows(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = self._largest_product(rows.detach())
        q = F.embedding(codes, self.table)
        if not self.training:
            return q, codes, (1 + self.commitment_cost) * F.mse_loss(q, rows)
        table = self.table[None, None]
        expected = F.scaled_dot_product_attention(
            rows[None, None], table, table.detach(), scale=1.0
        )[0, 0]
        out = q + (expected - expected.detach())
        loss = (
            F.mse_loss(out, rows)
            + F.mse_loss(rows, q.detach())
            + self.commitment_cost * F.mse_loss(q, rows.detach())
        )
        if self.entropy_weight:
            loss = loss + self.entropy_weight * self._entropy_loss(rows)
        return with_gradient_of(out, q), codes, loss

    def _largest_product(self, rows: Tensor) -> Tensor:
        """Return the codes (N,) of the largest inner products.

        More dimensions make all codes equally long: the nearest is then that of the largest product. There are
        two of them, the second for what rounding to float32 leaves of the first: of a codebook with one very
        long code all others differ by less than that.
        """
        table = self.table.detach()
        if torch.compiler.is_exporting():
            return self._largest_exported(rows.float(), table)
        device = rows.device
        if device.type == "mps":  # no float64 there
            rows, table = rows.cpu(), table.cpu()
        norms = torch.linalg.vector_norm(table, dim=1, keepdim=True, dtype=torch.float64)
        missing = norms.max().square() - norms.square()
        first = (missing.sqrt() * (1 - torch.finfo(torch.float32).eps)).float()  # never above it
        second = (missing - first.double().square()).clamp(min=0).sqrt().float()
        return nearest_code(F.pad(rows, (0, 2)), torch.cat([table, first, second], dim=1)).to(
            device
        )

    @staticmethod
    def _largest_exported(rows: Tensor, table: Tensor) -> Tensor:
        """The same in operations that every format has, EXPORTED_BLOCK codes at a time."""
        most, codes = (rows @ table[:EXPORTED_BLOCK].T).max(dim=1)
        for start in range(EXPORTED_BLOCK, len(table), EXPORTED_BLOCK):
            products, found = (rows @ table[start : start + EXPORTED_BLOCK].T).max(dim=1)
            codes = torch.where(products > most, found + start, codes)
            most = torch.maximum(most, products)
        return codes

    def _entropy_loss(self, rows: Tensor) -> Tensor:
        """Return the mean entropy of a latent's codes less that of the mean over the latents, in nats."""
        each, mean = rows.new_zeros(()), rows.new_zeros(self.codebook_size)
        for block in rows.split(BLOCK):
            entropies, sums = checkpoint(self._entropies, block, use_reentrant=False)
            each, mean = each + entropies, mean + sums
        each, mean = each / len(rows), mean / len(rows)
        return each + (mean * (mean + 1e-5).log()).sum()

    def _entropies(self, block: Tensor) -> tuple[Tensor, Tensor]:
        logs = F.log_softmax(block @ self.table.T / self.entropy_temperature, dim=1)
        probabilities = logs.exp()
        return -(probabilities * logs).sum(), probabilities.sum(dim=0)

    def _vectors(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.table)
