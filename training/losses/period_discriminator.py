"""Discriminator that sees a waveform folded into rows of one period."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class PeriodDiscriminator(nn.Module):
    """Convolutions down the columns of the folded waveform (Kong et al. 2020, HiFi-GAN).

    Args:
        period: samples in a row.
        channels: width of the first layer; the others have 4, 16, 32 and 32 times as many.
        always_pad: pad a whole row also where the clip divides into rows, as the DAC's does.
    """

    def __init__(self, period: int, channels: int = 32, always_pad: bool = False):
        super().__init__()
        self.period, self.always_pad = period, always_pad
        widths = [1, channels, 4 * channels, 16 * channels, 32 * channels, 32 * channels]
        self.layers = nn.ModuleList(
            weight_norm(
                nn.Conv2d(
                    inputs,
                    outputs,
                    kernel_size=(5, 1),
                    stride=(3, 1) if depth < 4 else 1,
                    padding=(2, 0),
                )
            )
            for depth, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False))
        )
        self.head = weight_norm(nn.Conv2d(widths[-1], 1, kernel_size=(3, 1), padding=(1, 0)))

    def forward(self, waveforms: Tensor) -> list[Tensor]:
        """Waveforms (B, 1, L), L > period, to each layer's activations (B, channels, rows, period).

        The last are the logits.
        """
        batch, _, length = waveforms.shape
        missing = -length % self.period
        if missing == 0 and self.always_pad:
            missing = self.period
        folded = F.pad(waveforms, (0, missing), mode="reflect")
        hidden = folded.view(batch, 1, -1, self.period)
        activations = []
        for layer in self.layers:
            hidden = F.leaky_relu(layer(hidden), 0.1)
            activations.append(hidden)
        return [*activations, self.head(hidden)]
