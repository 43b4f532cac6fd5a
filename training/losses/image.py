"""Losses of the image tokenizer: L1 + LPIPS + adversarial + commitment, and the discriminator's hinge."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.runtime.processes import mean_over_ranks

Terms = dict[str, Tensor]

# Lifts pixel gradients of a mean over ten million values out of fp16's coarse range; those above 64 overflow.
PIXEL_SCALE = 1024.0


class ImageLoss(nn.Module):
    """Both sides' losses, as in the original (fixture losses_image; paper section 5.1).

    Args:
        perceptual: LPIPS, two images (B, 3, H, W) in [-1, 1] to (B, 1, 1, 1); None to do without.
        reconstruction_weight, perceptual_weight: of L1 and of LPIPS.
        colour_weight: of L1 between the colours alone, as `colours` has them; zero in the paper.
        commitment_weight: of the quantizer's loss.
        adversarial_weight: of the generator's adversarial term; None adapts it so that its gradient at the
            last layer is as large as that of the reconstruction (Esser et al. 2021, equation 7).
        adaptive_scale: factor on the adaptive weight.
        discriminator_start: generator step from which the adversarial terms count.
        lecam_weight: of the LeCAM regularisation of the discriminator (Tseng et al. 2021).
    """

    lecam_decay = 0.999

    def __init__(
        self,
        perceptual: nn.Module | None,
        *,
        reconstruction_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        colour_weight: float = 0.0,
        commitment_weight: float = 1.0,
        adversarial_weight: float | None = 0.1,
        adaptive_scale: float = 1.0,
        discriminator_start: int = 0,
        lecam_weight: float = 0.0,
    ):
        super().__init__()
        self.perceptual = perceptual
        self.reconstruction_weight = reconstruction_weight
        self.perceptual_weight = perceptual_weight
        self.colour_weight = colour_weight
        self.commitment_weight = commitment_weight
        self.adversarial_weight = adversarial_weight
        self.adaptive_scale = adaptive_scale
        self.discriminator_start = discriminator_start
        self.lecam_weight = lecam_weight
        # Running means of the discriminator's logits; as buffers they are part of every checkpoint.
        self.register_buffer("lecam_real", torch.zeros(()))
        self.register_buffer("lecam_fake", torch.zeros(()))

    def state_dict(self, *args, **kwargs) -> dict:
        """Only the running means: the perceptual network is frozen and comes from its package."""
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if "perceptual." not in name}

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False):
        """Load what state_dict gave; the perceptual network keeps its weights.

        Raises:
            RuntimeError: if strict and a running mean is missing or a name is unknown.
        """
        own = super().state_dict()
        kept = {name: value for name, value in own.items() if "perceptual." in name}
        return super().load_state_dict({**kept, **state_dict}, strict=strict, assign=assign)

    def generator(
        self,
        pixel_values: Tensor,
        reconstruction: Tensor,
        commitment_loss: Tensor,
        discriminator: nn.Module,
        step: int,
        last_layer: Tensor | None = None,
    ) -> tuple[Tensor, Terms]:
        """The tokenizer's loss.

        Args:
            pixel_values, reconstruction: (B, 3, H, W), in [-1, 1] and towards it.
            commitment_loss: scalar, of the quantizer.
            discriminator: images to logits. The caller freezes it.
            step: generator steps so far.
            last_layer: weight for the adaptive adversarial weight.

        Returns:
            Scalar loss, and its terms, detached.
        """
        l1 = (pixel_values - reconstruction).abs().mean()
        perceptual = l1.new_zeros(())
        if self.perceptual is not None and self.perceptual_weight > 0:
            perceptual = self.perceptual(pixel_values, reconstruction).mean()
        nll = self.reconstruction_weight * l1 + self.perceptual_weight * perceptual
        if self.colour_weight:
            difference = colours(pixel_values - reconstruction).abs().mean()
            nll = nll + self.colour_weight * difference
        total = nll + self.commitment_weight * commitment_loss
        adversarial = weight = l1.new_zeros(())
        if step >= self.discriminator_start:
            # Non-saturating loss on each image's mean logit.
            adversarial = F.softplus(-_picture_logits(discriminator(reconstruction))).mean()
            weight = self._adversarial_weight(nll, adversarial, reconstruction, last_layer)
            total = total + weight * adversarial
        terms = {
            "total": total,
            "nll": nll,
            "reconstruction": l1,
            "perceptual": perceptual,
            "commitment": commitment_loss,
            "adversarial": adversarial,
            "adversarial_weight": weight,
        }
        return total, {name: value.detach() for name, value in terms.items()}

    def discriminator(
        self, pixel_values: Tensor, reconstruction: Tensor, discriminator: nn.Module, step: int
    ) -> tuple[Tensor, Terms]:
        """The discriminator's hinge loss, with LeCAM regularisation if that has a weight.

        Zero before discriminator_start, as in the original. The trainer does not call it then.
        """
        real = discriminator(pixel_values.detach()).float()
        fake = discriminator(reconstruction.detach()).float()
        hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        lecam = self._lecam(real, fake)
        started = float(step >= self.discriminator_start)
        total = started * (hinge + self.lecam_weight * lecam)
        terms = {
            "total": total,
            "hinge": hinge,
            "lecam": lecam,
            "logits_real": real.mean(),
            "logits_fake": fake.mean(),
        }
        return total, {name: value.detach() for name, value in terms.items()}

    def _adversarial_weight(
        self, nll: Tensor, adversarial: Tensor, reconstruction: Tensor, last_layer: Tensor | None
    ) -> Tensor:
        if self.adversarial_weight is not None:
            # Filled on the device: no copy from the host to wait for.
            return nll.new_full((), self.adversarial_weight)
        if not torch.is_grad_enabled():
            return nll.new_zeros(())
        if last_layer is None:
            raise ValueError("an adaptive adversarial weight needs last_layer")
        gradients = [_gradient_at(last_layer, loss, reconstruction) for loss in (nll, adversarial)]
        of_nll, of_adversarial = mean_over_ranks(torch.stack(gradients))
        ratio = of_nll.norm() / (of_adversarial.norm() + 1e-4)
        # Gradients that overflow all the same give no weight, rather than a loss that is not finite.
        ratio = torch.where(ratio.isfinite(), ratio, 0.0)
        return ratio.clamp(0.0, 1e4).detach() * self.adaptive_scale

    def _lecam(self, real: Tensor, fake: Tensor) -> Tensor:
        if self.lecam_weight == 0:
            return real.new_zeros(())
        if self.training:  # the original's means also move during validation
            means = mean_over_ranks(torch.stack([real.detach().mean(), fake.detach().mean()]))
            self.lecam_real.lerp_(means[0], 1 - self.lecam_decay)
            self.lecam_fake.lerp_(means[1], 1 - self.lecam_decay)
        above = F.relu(real - self.lecam_fake).square().mean()
        return above + F.relu(self.lecam_real - fake).square().mean()


def colours(images: Tensor) -> Tensor:
    """Red minus green, and blue minus yellow: (B, 3, H, W) to (B, 2, H, W), zero where an image is grey.

    Colours vary a tenth as much as brightness in photographs, so that L1 of the three channels alone leaves
    them to the end of a training, and a short training leaves the image grey.
    """
    red, green, blue = images.unbind(dim=1)
    return torch.stack([red - green, blue - (red + green) / 2], dim=1)


def _picture_logits(logits: Tensor) -> Tensor:
    """Mean logit of each image, (B,) float32."""
    return logits.float().mean(dim=(1, 2, 3))


def _gradient_at(last_layer: Tensor, loss: Tensor, reconstruction: Tensor) -> Tensor:
    """Gradient of a loss with respect to a weight that it depends on through the reconstruction alone.

    In fp16 a pixel's share in a mean over a batch, 3e-7 for 64 images of 128 x 128, is lost: below 6e-5 fp16
    rounds coarsely, and below 6e-8 to zero. But a factor that is large enough for the pixels makes the sum
    over all of them overflow at 65,504. So there are two passes then, of a scale each: to the pixels, times
    PIXEL_SCALE, and on to the weight, from pixel gradients of norm one.
    """
    if reconstruction.dtype != torch.float16:
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        return gradient
    (pixels,) = torch.autograd.grad(loss * PIXEL_SCALE, reconstruction, retain_graph=True)
    norm = pixels.float().norm().clamp(min=torch.finfo(torch.float32).tiny)
    unit = (pixels.float() / norm).half()
    (gradient,) = torch.autograd.grad(reconstruction, last_layer, unit, retain_graph=True)
    return gradient * (norm / PIXEL_SCALE)
