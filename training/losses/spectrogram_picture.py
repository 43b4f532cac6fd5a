"""Log-mel spectrograms of some waveforms, one above the other, for people to look at."""

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from training.losses.mel import LogMelSpectrogram

FLOOR = -9.0  # natural logarithm of the magnitude shown as black


@torch.no_grad()
def draw_spectrograms(waveforms: dict[str, Tensor], sampling_rate: int) -> Tensor:
    """Draw each waveform's spectrogram under its name, on one scale of colours.

    Args:
        waveforms: title to (samples,), in [-1, 1], longer than 512 samples.
        sampling_rate: in Hz.

    Returns:
        Picture (3, H, W) in [0, 1].
    """
    mel = LogMelSpectrogram(sampling_rate)
    pictures = {
        title: mel(waveform.float().cpu()[None])[0].clamp(min=FLOOR)
        for title, waveform in waveforms.items()
    }
    brightest = max(float(picture.max()) for picture in pictures.values())
    figure = Figure(figsize=(10, 2.6 * len(pictures)), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(len(pictures), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (title, picture) in zip(panels, pictures.items(), strict=True):
        seconds = waveforms[title].numel() / sampling_rate
        panel.imshow(
            picture.numpy(),
            origin="lower",
            aspect="auto",
            cmap="magma",
            vmin=FLOOR,
            vmax=max(brightest, FLOOR + 1),
            extent=(0, seconds, 0, len(picture)),
        )
        panel.set(title=title, ylabel="mel band")
    panels[-1].set_xlabel("seconds")
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
