"""Base of the quantizers that work on rows of latents."""

from torch import Tensor

from .quantizer import Quantizer


class RowQuantizer(Quantizer):
    """Quantizer of rows (N, d): a subclass implements `_quantize_rows` and `_vectors`.

    Gradients are copied from layout to layout, which SimVQ saves (straight_through.py): it would double the
    time of its backward pass.
    """

    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = latents.movedim(1, -1)
        quantized, codes, loss = self._quantize_rows(rows.reshape(-1, self.codebook_dim))
        return quantized.view(rows.shape).movedim(-1, 1).contiguous(), codes, loss

    def _quantize_rows(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return quantized rows (N, d), with the gradient for the encoder, codes (N,) and the loss ()."""
        raise NotImplementedError
