"""Base class of all quantizers: what every one of them promises, and the checks that they share."""

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor

from .float32_module import Float32Module, check_float32
from .hooked_weights import brings_weights
from .integer_codes import integers, outside


class Quantizer(Float32Module):
    """Base of SimVQ and of the systems that it is compared with. Computes and stays in float32.

    A subclass implements `_quantize` and `_vectors`. Both are called with inputs that have been checked, with
    float32 weights and without autocast.

    Args:
        codebook_size: K, number of codes.
        codebook_dim: d, width of a code and of the latents.
    """

    def __init__(self, codebook_size: int, codebook_dim: int):
        super().__init__()
        self.codebook_size, self.codebook_dim = codebook_size, codebook_dim

    @brings_weights
    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Replace every latent vector by a code.

        Args:
            latents: (B, d, *spatial), any floating-point type.

        Returns:
            Quantized latents of the same shape and type, codes (B, *spatial) int64, and the commitment
            loss, a float32 scalar. In training, latents that hold NaN or infinity get code 0 from SimVQ and
            the trained codebooks, and make their loss NaN.

        Raises:
            ValueError: if the second dimension is not d; in evaluation, if a latent is not finite; if a weight
                is not float32.
        """
        if latents.ndim < 2 or latents.shape[1] != self.codebook_dim:
            raise ValueError(
                f"{type(self).__name__} takes latents (B, {self.codebook_dim}, *spatial), "
                f"got {tuple(latents.shape)}"
            )
        self._check_float32()
        with torch.autocast(device_type=latents.device.type, enabled=False):
            exact = latents.float()
            quantized, codes, loss = self._quantize(exact)
            if not self._codebook_moves():
                # One number for all: looking at each latent costs 30 times as much. Read after the search, so
                # that a GPU has its work before anything waits for it.
                size = torch.linalg.vector_norm(exact.detach()) + loss.detach()
                if not size.isfinite():
                    raise ValueError(
                        "latents hold NaN or infinity, or values too large to square in float32"
                    )
        batch, _, *spatial = latents.shape
        return quantized.to(latents.dtype), codes.long().view(batch, *spatial), loss

    @brings_weights
    def lookup(self, codes: Tensor) -> Tensor:
        """Return the vectors of codes.

        Args:
            codes: integers of any type in [0, K), (B, *spatial): a tensor, a NumPy array or a list.

        Returns:
            (B, d, *spatial) float32: exactly what forward of SimVQ returned with these codes in evaluation
            mode, and the same to rounding for the others.

        Raises:
            ValueError: if the codes are not integers, or one lies outside [0, K); if a weight is not float32
                or has no values.
        """
        self._check_float32()
        codes = integers("codes", codes, self._device())
        if not torch.compiler.is_compiling():
            wrong = outside(codes, self.codebook_size)
            if wrong is not None:
                raise ValueError(
                    f"code {wrong} is out of range: this codebook has {self.codebook_size} codes, "
                    f"0 to {self.codebook_size - 1}"
                )
        with torch.autocast(device_type=codes.device.type, enabled=False):
            # Contiguous, as in forward: convolutions round differently in different memory layouts.
            return self._vectors(codes).movedim(-1, 1).contiguous()

    def from_codes(self, audio_codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the vectors (B, d, T) of codes (B, 1, T), again, and the codes: as DAC's quantizer does."""
        if getattr(audio_codes, "ndim", None) != 3 or audio_codes.shape[1] != 1:
            shape = tuple(getattr(audio_codes, "shape", ()))
            raise ValueError(f"from_codes takes a tensor of codes (B, 1, T), got shape {shape}")
        vectors = self.lookup(audio_codes[:, 0])
        return vectors, vectors, audio_codes

    @brings_weights
    @torch.no_grad()
    def codebook(self) -> Tensor:
        """Return the vectors of all codes, (K, d) float32, without gradient: a copy."""
        self._check_float32()
        return self._vectors(torch.arange(self.codebook_size, device=self._device()))

    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return quantized latents (B, d, *spatial), codes (N,), N = B times spatial, and the loss ().

        Args:
            latents: (B, d, *spatial) float32.
        """
        raise NotImplementedError

    def _vectors(self, codes: Tensor) -> Tensor:
        """Return the vectors (..., d) of codes (...)."""
        raise NotImplementedError

    def _codebook_moves(self) -> bool:
        """Return whether the codebook changes from call to call; so must a compiled graph assume."""
        return self.training or torch.compiler.is_compiling()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        # By hand: named_parameters would take as long as looking up a code.
        for module in self.modules():
            for name, tensor in chain(module._parameters.items(), module._buffers.items()):
                if tensor is not None:
                    yield name, tensor

    def _device(self) -> torch.device:
        return next(self._tensors())[1].device

    def _check_float32(self) -> None:
        for name, tensor in self._tensors():
            if tensor.device.type == "meta":
                raise ValueError(
                    f"{name} of the quantizer has no values (it is on the meta device): load the weights first"
                )
            check_float32(name, tensor)

    def extra_repr(self) -> str:
        return f"codebook_size={self.codebook_size}, codebook_dim={self.codebook_dim}"
