"""Ways to compute faster on CUDA, all in one place. On other devices they change nothing, to the bit.

The quantizer is left out of TF32 by itself: its search does not depend on what is allowed, and its projection
of codes asks for whole float32 products (modeling_simvq/float32_product.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FastMath:
    """Choice of ways, each of which a benchmark can leave out.

    Attributes:
        tf32: products and convolutions of float32 cut their inputs to 10 bits, for tensor cores.
        benchmark: cuDNN measures which algorithm is fastest at each size. Training has few sizes.
        channels_last: images and the kernels that they meet lie as tensor cores read them.
        fused: the optimiser's step is one kernel.
    """

    tf32: bool = True
    benchmark: bool = True
    channels_last: bool = True
    fused: bool = True


chosen = FastMath()


def allow(device: torch.device) -> None:
    """Set torch's flags for a process that trains on this device."""
    if device.type != "cuda":
        return
    backends, precision = torch.backends, "tf32" if chosen.tf32 else "ieee"
    # The older switch of the two: torch.compile still asks it, and refuses an answer that only the newer knows.
    backends.cuda.matmul.allow_tf32 = chosen.tf32
    backends.cudnn.conv.fp32_precision = precision
    backends.cudnn.rnn.fp32_precision = precision
    # What is fastest may add in another order from run to run: not where somebody has asked for the same bits.
    asked = torch.are_deterministic_algorithms_enabled() or backends.cudnn.deterministic
    backends.cudnn.benchmark = chosen.benchmark and not asked


def lay_out(module: nn.Module, device: torch.device) -> None:
    """Lay out the kernels of a module that takes images, before it goes to this device."""
    if device.type == "cuda" and chosen.channels_last:
        module.to(memory_format=torch.channels_last)


def laid_out(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) as such a module takes them best."""
    if images.is_cuda and chosen.channels_last:
        return images.contiguous(memory_format=torch.channels_last)
    return images


def fuses(device: torch.device) -> bool | None:
    """Return the optimiser's argument `fused`; None leaves it to torch."""
    return True if device.type == "cuda" and chosen.fused else None
