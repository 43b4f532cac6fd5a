"""Sheets for people to look at: images in rows, images under titles, spectrograms one above the other."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor
from torchvision.utils import make_grid

# Decibels of a power spectrum, on one scale of colours; the lowest lies below the noise of 16 bits.
LOWEST_DECIBELS, HIGHEST_DECIBELS = -120, -30


def from_pixels(pixels: Tensor) -> Tensor:
    """Return images of a model, (N, 3, H, W) in [-1, 1], as a sheet takes them: in [0, 1], on the CPU."""
    return (pixels.float().cpu().clamp(-1, 1) + 1) / 2


def from_pil(images: Sequence[Image.Image]) -> Tensor:
    """Return RGB images of one size as (N, 3, H, W) in [0, 1]."""
    return torch.stack([to_tensor(image) for image in images])


def image_sheet(images: Tensor, columns: int, gap: int = 2, border: bool = True) -> Tensor:
    """Arrange images in rows, on white.

    Args:
        images: (N, 3, H, W) in [0, 1].
        columns: images in a row.
        gap: pixels between images.
        border: whether there is such a gap around all of them too.

    Returns:
        The sheet, (3, H', W') in [0, 1]; torchvision's save_image writes it.
    """
    sheet = make_grid(images, nrow=max(1, columns), padding=gap, pad_value=1.0)
    if border or not gap or len(images) == 1:  # one image alone has no border
        return sheet
    return sheet[:, gap:-gap, gap:-gap]


def write_titled_sheet(path: Path, rows: Sequence[Sequence[tuple[str, Tensor] | None]]) -> None:
    """Write a PNG of images under titles.

    Args:
        rows: a title and an image (3, H, W) uint8 for each place, or None to leave it empty.
    """
    columns = max(map(len, rows))
    figure = _figure(1.5 * columns, 1.65 * len(rows))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for line, row in zip(axes, rows, strict=True):
        for axis, cell in zip(line, row, strict=False):
            if cell is not None:
                title, image = cell
                axis.imshow(image.permute(1, 2, 0).cpu().numpy())
                axis.set_title(title, fontsize=7, loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def spectrogram_sheet(waveforms: dict[str, Tensor | np.ndarray], sampling_rate: int) -> Tensor:
    """Draw the spectrogram of each waveform under its title, on one scale of colours.

    Args:
        waveforms: title to (samples,), in [-1, 1].
        sampling_rate: in Hz.

    Returns:
        The sheet, (3, H, W) in [0, 1].
    """
    figure = _figure(10, 2.6 * len(waveforms))
    panels = figure.subplots(len(waveforms), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (title, waveform) in zip(panels, waveforms.items(), strict=True):
        samples = torch.as_tensor(waveform).float().cpu()
        panel.imshow(
            _decibels(samples, sampling_rate).numpy(),
            origin="lower",
            aspect="auto",
            cmap="magma",
            vmin=LOWEST_DECIBELS,
            vmax=HIGHEST_DECIBELS,
            extent=(0, len(samples) / sampling_rate, 0, sampling_rate / 2),
        )
        panel.set(title=title, ylabel="Hz")
    panels[-1].set_xlabel("seconds")
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def _decibels(samples: Tensor, sampling_rate: int) -> Tensor:
    """Return the power density (frequencies, frames) of samples (L,), in dB."""
    length = min(1024, len(samples))
    window = torch.hann_window(length)
    spectrum = torch.stft(samples, length, max(1, length // 4), window=window, return_complex=True)
    density = 2 * spectrum.abs().square() / (sampling_rate * window.square().sum())
    return 10 * density.clamp(min=10 ** (LOWEST_DECIBELS / 10)).log10()


def _figure(width: float, height: float):
    """A figure of so many inches that no window shows, whatever matplotlib's backend is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes its time to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
