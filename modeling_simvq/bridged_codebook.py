"""Codebook behind a small transformer, VQBridge of FVQ (arXiv 2509.10140): compress, process, recover."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .float32_module import float32_by_default
from .nearest_code import nearest_code
from .row_quantizer import RowQuantizer
from .straight_through import with_gradient_of


class BridgedCodebook(RowQuantizer):
    """Quantizer with a trained table of codes behind a transformer, "fvq" of make_quantizer.

    Consecutive codes are joined to one token, the tokens pass some layers of a transformer, and each becomes as
    many codes again: the gradient of the codes that were picked moves all of them. The transformer is part of
    the codebook alone; it costs nothing in the models' own layers.

    Args:
        commitment_cost: beta.
        bridge_tokens: codes are joined to so many tokens, or one a code where there are fewer.
        bridge_dim: width of the transformer.
        bridge_layers: its depth.
        bridge_heads: of its attention.

    Raises:
        ValueError: if an option is out of range or does not divide what it has to.
    """

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        commitment_cost: float,
        *,
        bridge_tokens: int = 512,
        bridge_dim: int = 128,
        bridge_layers: int = 2,
        bridge_heads: int = 4,
    ):
        super().__init__(codebook_size, codebook_dim)
        self.commitment_cost = commitment_cost
        sizes = {"tokens": bridge_tokens, "dim": bridge_dim, "heads": bridge_heads}
        for name, value in (*sizes.items(), ("layers", bridge_layers)):
            least = 0 if name == "layers" else 1
            if type(value) is not int or value < least:
                raise ValueError(
                    f"quantizer_options: bridge_{name} must be a whole number, at least {least}, got {value!r}"
                )
        if bridge_dim % bridge_heads:
            raise ValueError(
                f"quantizer_options: bridge_dim must be a multiple of bridge_heads = {bridge_heads}, got "
                f"{bridge_dim}"
            )
        tokens = min(bridge_tokens, codebook_size)
        if codebook_size % tokens:
            raise ValueError(
                f"codebook_size: fvq joins {codebook_size} codes to {tokens} tokens, which must divide it: set "
                "quantizer_options={bridge_tokens: ...}"
            )
        self.joined = codebook_size // tokens * codebook_dim
        with float32_by_default():
            self.table = nn.Parameter(torch.empty(codebook_size, codebook_dim))
            self.compress = nn.Linear(self.joined, bridge_dim)
            layers = [
                nn.TransformerEncoderLayer(
                    bridge_dim,
                    bridge_heads,
                    2 * bridge_dim,
                    dropout=0.0,
                    activation="gelu",
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(bridge_layers)
            ]
            self.process = nn.Sequential(*layers, nn.LayerNorm(bridge_dim))
            self.recover = nn.Linear(bridge_dim, self.joined)
        nn.init.normal_(self.table, std=codebook_dim**-0.5)

    def _codes(self) -> Tensor:
        """Return all codes (K, d), with gradient."""
        tokens = self.compress(self.table.view(1, -1, self.joined))
        return self.recover(self.process(tokens)).view(self.codebook_size, self.codebook_dim)

    def _quantize_rows(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        table = self._codes()
        codes = nearest_code(rows.detach(), table.detach())
        q = F.embedding(codes, table)
        loss = self.commitment_cost * F.mse_loss(rows, q.detach()) + F.mse_loss(q, rows.detach())
        return with_gradient_of(rows, q), codes, loss

    def _vectors(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self._codes())
