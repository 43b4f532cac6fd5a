"""Losses of the audio tokenizer: mel + adversarial + feature matching + commitment; hinge and least squares."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.losses.audio_discriminators import AudioJudgement
from training.losses.mel import LogMelSpectrogram

Terms = dict[str, Tensor]


class AudioLoss(nn.Module):
    """Both sides' losses, as in the original (fixture losses_audio).

    The multi-period and multi-resolution families play the hinge game, averaged over their members; the
    DAC's plays least squares, summed over its members and so much the heaviest.

    Args:
        sampling_rate: of the clips, in Hz.
        mel_weight: of the L1 distance of log-mel spectrograms.
        mel_windows: of the spectrograms, in samples. Hops are a quarter of them, and bands 100, fewer below
            1,024; the distance is the mean over them.
        adversarial_weight: of all adversarial and feature matching terms.
        commitment_weight: of the quantizer's loss.
        discriminator_start: generator step from which the adversarial terms count.
    """

    def __init__(
        self,
        *,
        sampling_rate: int = 24_000,
        mel_weight: float = 45.0,
        mel_windows: Sequence[int] = (1024,),
        adversarial_weight: float = 1.0,
        commitment_weight: float = 1000.0,
        discriminator_start: int = 0,
    ):
        super().__init__()
        self.mels = nn.ModuleList(
            LogMelSpectrogram(sampling_rate, window, window // 4, min(100, window * 100 // 1024))
            for window in mel_windows
        )
        self.mel_weight = mel_weight
        self.adversarial_weight = adversarial_weight
        self.commitment_weight = commitment_weight
        self.discriminator_start = discriminator_start

    def generator(
        self,
        input_values: Tensor,
        reconstruction: Tensor,
        commitment_loss: Tensor,
        discriminator: nn.Module,
        step: int,
        last_layer: Tensor | None = None,
    ) -> tuple[Tensor, Terms]:
        """The tokenizer's loss.

        Args:
            input_values, reconstruction: (B, 1, L), L > 1024.
            commitment_loss: scalar, of the quantizer.
            discriminator: an AudioDiscriminator. The caller freezes it.
            step: generator steps so far.
            last_layer: not used; the weights are fixed.

        Returns:
            Scalar loss, and its terms before weighting, detached.

        Raises:
            ValueError: if input and reconstruction differ in shape, or are too short.
        """
        _check_shapes(input_values, reconstruction)
        with torch.no_grad():
            targets = [mel(input_values) for mel in self.mels]
        distances = (
            F.l1_loss(mel(reconstruction), target)
            for mel, target in zip(self.mels, targets, strict=True)
        )
        mel = _mean(distances)
        total = self.mel_weight * mel + self.commitment_weight * commitment_loss
        adversarial = dict.fromkeys(_ADVERSARIAL, mel.new_zeros(()))
        if step >= self.discriminator_start:
            with torch.no_grad():  # the real clips' features are targets
                real = discriminator(input_values)
            adversarial = _adversarial(real, discriminator(reconstruction))
            total = total + self.adversarial_weight * sum(adversarial.values())
        terms = {"total": total, "mel": mel, "commitment": commitment_loss, **adversarial}
        return total, {name: value.detach() for name, value in terms.items()}

    def discriminator(
        self, input_values: Tensor, reconstruction: Tensor, discriminator: nn.Module, step: int
    ) -> tuple[Tensor, Terms]:
        """The discriminators' losses, with shapes as for the generator.

        Zero before discriminator_start. The trainer does not call them then.
        """
        _check_shapes(input_values, reconstruction)
        # One call with both, for the sake of DistributedDataParallel.
        both = torch.cat([input_values.detach().float(), reconstruction.detach().float()])
        judgement: AudioJudgement = discriminator(both)
        logits = {name: _halves(family.logits) for name, family in judgement._asdict().items()}
        terms = {
            "multi_period": _hinge(*logits["multi_period"]),
            "multi_resolution": _hinge(*logits["multi_resolution"]),
            "dac": _least_squares(*logits["dac"]),
        }
        total = float(step >= self.discriminator_start) * sum(terms.values())
        terms = {"total": total, **terms}
        return total, {name: value.detach() for name, value in terms.items()}


_ADVERSARIAL = tuple(
    f"{kind}_{family}" for kind in ("adversarial", "features") for family in AudioJudgement._fields
)


def _adversarial(real: AudioJudgement, fake: AudioJudgement) -> Terms:
    """The generator's terms under the names of _ADVERSARIAL, in that order."""
    values = (
        _mean(F.relu(1 - logits.float()).mean() for logits in fake.multi_period.logits),
        _mean(F.relu(1 - logits.float()).mean() for logits in fake.multi_resolution.logits),
        sum((1 - logits.float()).square().mean() for logits in fake.dac.logits),
        _mean(map(_distance, real.multi_period.features, fake.multi_period.features)),
        _mean(map(_distance, real.multi_resolution.features, fake.multi_resolution.features)),
        sum(map(_distance, real.dac.features, fake.dac.features)),
    )
    return dict(zip(_ADVERSARIAL, values, strict=True))


def _distance(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """Feature matching in one discriminator: L1, summed over layers (Larsen et al. 2016)."""
    return sum(F.l1_loss(b.float(), a.float()) for a, b in zip(real, fake, strict=True))


def _hinge(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    return _mean(
        F.relu(1 - a).mean() + F.relu(1 + b).mean() for a, b in zip(real, fake, strict=True)
    )


def _least_squares(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    return sum((1 - a).square().mean() + b.square().mean() for a, b in zip(real, fake, strict=True))


def _halves(logits: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Float32 logits of the first half of the batch, and of the second."""
    pairs = [part.float().chunk(2) for part in logits]
    return [real for real, _ in pairs], [fake for _, fake in pairs]


def _mean(values) -> Tensor:
    values = list(values)
    return sum(values) / len(values)


def _check_shapes(input_values: Tensor, reconstruction: Tensor) -> None:
    if input_values.shape != reconstruction.shape:
        raise ValueError(
            f"input {tuple(input_values.shape)} and reconstruction {tuple(reconstruction.shape)} "
            "differ in shape: crop the reconstruction to its input"
        )
