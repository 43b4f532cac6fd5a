"""The audio tokenizer's three families of discriminators, as one module."""

from typing import NamedTuple

from torch import Tensor, nn

from training.losses.period_discriminator import PeriodDiscriminator
from training.losses.spectrogram_discriminators import BandDiscriminator, MagnitudeDiscriminator

PERIODS = (2, 3, 5, 7, 11)


class Judgement(NamedTuple):
    """Output of one family for a batch.

    logits: of each of its discriminators, (B, 1, rows, columns); above zero (hinge) or near one (least
        squares) for real.
    features: of each, the activations that feature matching compares.
    """

    logits: list[Tensor]
    features: list[list[Tensor]]


class AudioJudgement(NamedTuple):
    """Return each family's output for a batch."""

    multi_period: Judgement
    multi_resolution: Judgement
    dac: Judgement


class AudioDiscriminator(nn.Module):
    """Multi-period, multi-resolution and DAC discriminators (fixture losses_audio).

    With the published widths they have 41,105,770, 600,198 and 42,519,760 parameters. The families
    differ in more than their losses: the DAC's removes the mean and levels the peak of every clip first,
    always pads to whole periods, and sees complex spectra. What feature matching compares differs too:
    all but the first layer (multi-period), all (multi-resolution), all but the logits (DAC).

    Args:
        period_channels, dac_channels: width of the first layers.
        resolution_channels: width of the multi-resolution layers.
    """

    def __init__(
        self, period_channels: int = 32, resolution_channels: int = 64, dac_channels: int = 32
    ):
        super().__init__()
        self.multi_period = nn.ModuleList(
            PeriodDiscriminator(period, period_channels) for period in PERIODS
        )
        self.multi_resolution = nn.ModuleList(
            MagnitudeDiscriminator(n_fft, resolution_channels) for n_fft in (1024, 2048, 512)
        )
        self.dac = nn.ModuleList(
            PeriodDiscriminator(period, dac_channels, always_pad=True) for period in PERIODS
        )
        self.dac.extend(BandDiscriminator(n_fft, dac_channels) for n_fft in (2048, 1024, 512))

    def forward(self, waveforms: Tensor) -> AudioJudgement:
        """Waveforms (B, 1, L), any sampling rate, L > 1024, to logits and features of each family.

        Clips do not see each other: a batch may be judged sharded.

        Raises:
            ValueError: if the clips are too short for the largest spectrogram.
        """
        waveforms = waveforms.float()
        levelled = level(waveforms)
        by_period = [judge(waveforms) for judge in self.multi_period]
        by_resolution = [judge(waveforms) for judge in self.multi_resolution]
        by_dac = [judge(levelled) for judge in self.dac]
        return AudioJudgement(
            Judgement(_last(by_period), [activations[1:] for activations in by_period]),
            Judgement(_last(by_resolution), by_resolution),
            Judgement(_last(by_dac), [activations[:-1] for activations in by_dac]),
        )


def level(waveforms: Tensor, peak: float = 0.8, quietest: float = 1e-4) -> Tensor:
    """Remove each clip's mean and scale it to the peak.

    The original also scales up what cannot be heard, and its gradient with it: by 8e8 for a silent
    clip, far beyond half precision. Above `quietest` there is no difference.

    Args:
        waveforms: (B, 1, L) float32.
        peak: largest magnitude afterwards.
        quietest: clips whose peak is lower are scaled as if it were this (three steps of 16-bit audio).
    """
    centred = waveforms - waveforms.mean(dim=-1, keepdim=True)
    loudest = centred.abs().amax(dim=-1, keepdim=True)
    return peak * centred / (loudest + 1e-9).clamp(min=quietest)


def _last(activations: list[list[Tensor]]) -> list[Tensor]:
    return [layers[-1] for layers in activations]
