"""Discriminators that see a spectrogram: of magnitudes, or of complex numbers in bands.

Both transform with a rectangular window, as the original does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from training.losses.spectrogram import spectrogram


class MagnitudeDiscriminator(nn.Module):
    """Convolutions over the magnitudes (Jang et al. 2021, UnivNet; sizes of Siuzdak 2023, Vocos).

    Args:
        n_fft: window in samples; the step is a quarter of it.
        channels: width of every layer.
    """

    # Kernel and stride, (frequency, time).
    geometry = (
        ((7, 5), (2, 2)),
        ((5, 3), (2, 1)),
        ((5, 3), (2, 2)),
        ((3, 3), (2, 1)),
        ((3, 3), (2, 2)),
    )

    def __init__(self, n_fft: int, channels: int = 64):
        super().__init__()
        self.n_fft = n_fft
        self.layers = nn.ModuleList(
            _conv(channels if depth else 1, channels, kernel, stride)
            for depth, (kernel, stride) in enumerate(self.geometry)
        )
        self.head = _conv(channels, 1, (3, 3))
        self.register_buffer("window", torch.ones(n_fft), persistent=False)

    def forward(self, waveforms: Tensor) -> list[Tensor]:
        """Waveforms (B, 1, L), L > n_fft // 2, to each layer's activations (B, channels, f, t).

        The last are the logits.
        """
        spectra = spectrogram(waveforms, self.n_fft, self.n_fft // 4, self.window)
        hidden = spectra.abs().unsqueeze(1)
        activations = []
        for layer in self.layers:
            hidden = F.leaky_relu(layer(hidden), 0.1)
            activations.append(hidden)
        return [*activations, self.head(hidden)]


class BandDiscriminator(nn.Module):
    """Convolutions over real and imaginary part, of five bands apart (Kumar et al. 2023, DAC).

    Args:
        n_fft: window in samples; the step is a quarter of it.
        channels: width of every layer.
    """

    edges = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # of the bands, as parts of the spectrum
    # Kernel and stride, (time, frequency).
    geometry = (
        ((3, 9), (1, 1)),
        ((3, 9), (1, 2)),
        ((3, 9), (1, 2)),
        ((3, 9), (1, 2)),
        ((3, 3), (1, 1)),
    )

    def __init__(self, n_fft: int, channels: int = 32):
        super().__init__()
        self.n_fft = n_fft
        borders = [int(edge * (n_fft // 2 + 1)) for edge in self.edges]
        self.band_widths = [high - low for low, high in zip(borders, borders[1:], strict=False)]
        self.bands = nn.ModuleList(
            nn.ModuleList(
                _conv(channels if depth else 2, channels, kernel, stride)
                for depth, (kernel, stride) in enumerate(self.geometry)
            )
            for _ in self.band_widths
        )
        self.head = _conv(channels, 1, (3, 3))
        self.register_buffer("window", torch.ones(n_fft), persistent=False)

    def forward(self, waveforms: Tensor) -> list[Tensor]:
        """Waveforms (B, 1, L), L > n_fft // 2, to each layer's activations (B, channels, t, f).

        Band by band; the last are the logits, over all bands.
        """
        spectra = spectrogram(waveforms, self.n_fft, self.n_fft // 4, self.window)
        # (B, f, t) complex to (B, real and imaginary, t, f)
        parts = torch.view_as_real(spectra).permute(0, 3, 2, 1)
        activations, ends = [], []
        for hidden, layers in zip(parts.split(self.band_widths, dim=-1), self.bands, strict=True):
            for layer in layers:
                hidden = F.leaky_relu(layer(hidden), 0.1)
                activations.append(hidden)
            ends.append(hidden)
        return [*activations, self.head(torch.cat(ends, dim=-1))]


def _conv(
    inputs: int, outputs: int, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1)
) -> nn.Module:
    padding = tuple(size // 2 for size in kernel)
    return weight_norm(nn.Conv2d(inputs, outputs, kernel, stride, padding))
