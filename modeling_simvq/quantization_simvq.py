"""SimVQ: vector quantization whose codebook does not collapse (arXiv 2411.02038).

A plain codebook learns only through the codes that are picked, so the others fall behind and die. SimVQ
freezes a random basis C and learns one linear layer over it: code k is ``W c_k + b``. Every step moves W,
and with it every code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .nearest_code import nearest_code


class SimVQ(nn.Module):
    """Quantizer with a frozen Gaussian basis and one trained linear layer (paper section 4, equations 5-7).

    Loss (means over all elements): ``beta * |z - sg[q]|^2 + |q - sg[z]|^2``; gradients reach the encoder
    straight through. Everything is computed in float32, also under autocast and in half-precision models.

    Args:
        codebook_size: K, number of codes.
        codebook_dim: d, width of a code and of the latents.
        commitment_cost: beta, weight of the encoder's side of the loss.

    Attributes:
        basis: C, (K, d) ~ N(0, 1/d), frozen. It is a Parameter and not a buffer because
            DistributedDataParallel broadcasts buffers at every step.
        projection: W and b.
    """

    def __init__(self, codebook_size: int, codebook_dim: int, commitment_cost: float = 0.25):
        super().__init__()
        if codebook_size < 1 or codebook_dim < 1:
            raise ValueError(
                "codebook_size and codebook_dim must be at least 1, "
                f"got codebook_size={codebook_size} and codebook_dim={codebook_dim}"
            )
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.commitment_cost = commitment_cost
        self.basis = nn.Parameter(torch.empty(codebook_size, codebook_dim))
        self.projection = nn.Linear(codebook_dim, codebook_dim)
        self._projected: tuple[tuple, Tensor] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw C from N(0, 1/d). The projection initialises itself, as any nn.Linear does."""
        init.normal_(self.basis, mean=0.0, std=self.codebook_dim**-0.5)

    def __setattr__(self, name: str, value) -> None:
        # from_pretrained replaces parameters by new ones that require gradients. All loaders assign
        # through here, so the basis is frozen again at the one place that none of them can skip.
        if name == "basis" and isinstance(value, nn.Parameter):
            value.requires_grad_(False)
        super().__setattr__(name, value)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Replace every latent vector by its nearest code.

        Args:
            latents: (B, d, *spatial), any floating-point type.

        Returns:
            Quantized latents of the same shape and type, codes (B, *spatial) int64, and the commitment
            loss, a float32 scalar.

        Raises:
            ValueError: if the second dimension is not d.
        """
        if latents.ndim < 2 or latents.shape[1] != self.codebook_dim:
            raise ValueError(
                f"SimVQ takes latents (B, {self.codebook_dim}, *spatial), got {tuple(latents.shape)}"
            )
        with torch.autocast(device_type=latents.device.type, enabled=False):
            z = latents.float().movedim(1, -1)
            rows = z.reshape(-1, self.codebook_dim)
            codes = nearest_code(rows, self.codebook()).view(z.shape[:-1])
            q = self._codes_to_vectors(codes)
            commitment_loss = self.commitment_cost * F.mse_loss(z, q.detach())
            commitment_loss = commitment_loss + F.mse_loss(q, z.detach())
            # Straight-through. The value is q to the last bit, so that decoding the codes gives the
            # same picture; `z + (q - z).detach()` would round.
            quantized = q.detach() + (z - z.detach())
        # One memory layout here and in lookup: convolutions round differently in different layouts.
        return quantized.movedim(-1, 1).contiguous().to(latents.dtype), codes, commitment_loss

    def lookup(self, codes: Tensor) -> Tensor:
        """Vectors of the given codes, through W and b.

        Args:
            codes: integers in [0, K), (B, *spatial).

        Returns:
            (B, d, *spatial) float32: exactly what forward returned with these codes in evaluation mode.

        Raises:
            ValueError: if the codes are not integers, or one lies outside [0, K).
        """
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise ValueError(f"codes must be integers, got {codes.dtype}")
        if not torch.compiler.is_compiling() and codes.numel():
            low, high = (int(value) for value in codes.aminmax())
            if low < 0 or high >= self.codebook_size:
                wrong = low if low < 0 else high
                raise ValueError(
                    f"code {wrong} is out of range: this codebook has {self.codebook_size} codes, "
                    f"0 to {self.codebook_size - 1}"
                )
        with torch.autocast(device_type=codes.device.type, enabled=False):
            return self._codes_to_vectors(codes.long()).movedim(-1, 1).contiguous()

    def _codes_to_vectors(self, codes: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.projection.weight.requires_grad:
            # Only the selected rows go through W inside autograd: no dense (K, d) gradient.
            rows = F.embedding(codes, self.basis.detach()).float()
            return F.linear(rows, self.projection.weight.float(), self._bias())
        return F.embedding(codes, self.codebook())

    def _bias(self) -> Tensor:
        return self.projection.bias.float()

    @torch.no_grad()
    def codebook(self) -> Tensor:
        """The effective codebook ``C W^T + b``, (K, d) float32, without gradient. Do not modify it.

        In evaluation it is computed once and kept until W, b or C changes in any way: an optimiser step,
        load_state_dict, a move to another device or type, an in-place edit.
        """
        if self.training or torch.compiler.is_compiling():
            self._projected = None
            return self._project()
        key = tuple(
            (id(tensor), tensor.data_ptr(), _version(tensor), tensor.dtype, tensor.device)
            for tensor in (self.basis, self.projection.weight, self.projection.bias)
        )
        if self._projected is None or self._projected[0] != key:
            self._projected = (key, self._project())
        return self._projected[1]

    def _project(self) -> Tensor:
        with torch.autocast(device_type=self.basis.device.type, enabled=False):
            return F.linear(self.basis.float(), self.projection.weight.float(), self._bias())

    def __getstate__(self) -> dict:
        # A copy or a pickle makes its own projected codebook.
        return {**super().__getstate__(), "_projected": None}

    def extra_repr(self) -> str:
        return (
            f"codebook_size={self.codebook_size}, codebook_dim={self.codebook_dim}, "
            f"commitment_cost={self.commitment_cost}"
        )


def _version(tensor: Tensor) -> int:
    # Tensors made in inference mode count no versions, and cannot be edited outside of it either.
    return -1 if tensor.is_inference() else tensor._version
