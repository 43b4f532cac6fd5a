"""Decoder of the audio tokenizer: Vocos (ConvNeXt blocks at the frame rate, then an inverse STFT).

The position network's attention and norms are global over a clip. In a batch of clips of different
lengths they are masked, so that each clip gives what it gives alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_in_pieces import attend
from .configuration_simvq_audio import SimVQAudioConfig
from .streaming_layers import (
    Context,
    State,
    add_to_waveform,
    attend_to_past,
    convolve_few,
    map_few,
    overlap_add,
    with_past,
)

# Magnitudes are clipped here as in Vocos: exp of an early network's output would overflow.
LARGEST_MAGNITUDE = 100.0


class Norm(nn.GroupNorm):
    """GroupNorm over the real frames, which accepts one value per group; in a stream LayerNorm of each frame.

    A group has too few channels for the moments of a single frame: two of them would become 1 and -1.
    """

    def __init__(self, config: SimVQAudioConfig):
        super().__init__(config.norm_groups, config.hidden_size, eps=1e-6)
        self.streaming = config.streaming

    def forward(self, hidden: Tensor, mask: Context) -> Tensor:
        """hidden (B, C, T), mask (B, 1, T) of ones and zeros."""
        if self.streaming:
            shape = self.weight.shape
            return F.layer_norm(hidden.mT, shape, self.weight, self.bias, self.eps).mT
        if mask is None:
            return torch.group_norm(hidden, self.num_groups, self.weight, self.bias, self.eps)
        dtype = hidden.dtype
        groups = hidden.float().unflatten(1, (self.num_groups, -1))
        real = mask[:, None].float()
        count = real.sum(dim=(2, 3), keepdim=True) * groups.shape[2]
        mean = (groups * real).sum(dim=(2, 3), keepdim=True) / count
        variance = ((groups - mean).square() * real).sum(dim=(2, 3), keepdim=True) / count
        normed = ((groups - mean) * torch.rsqrt(variance + self.eps)).flatten(1, 2)
        return (normed * self.weight[:, None] + self.bias[:, None]).to(dtype)


class FrameConv1d(nn.Conv1d):
    """Convolution over frames that keeps their number: centred, or over the past in a stream."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, config, groups: int = 1
    ):
        padding = 0 if config.streaming else kernel_size // 2
        super().__init__(in_channels, out_channels, kernel_size, padding=padding, groups=groups)
        self.streaming = config.streaming

    def forward(self, hidden: Tensor, mask: Context) -> Tensor:
        """(B, C, T) to (B, C', T); mask (B, 1, T): what lies behind a clip's end counts as zeros."""
        if self.streaming:
            hidden = with_past(self, hidden, self.kernel_size[0] - 1, mask)
            few = mask is not None and self.groups == 1
            return convolve_few(self, hidden) if few else super().forward(hidden)
        return super().forward(hidden if mask is None else hidden * mask.to(hidden.dtype))


class ResNetBlock(nn.Module):
    """Norm, SiLU, convolution of width 3, twice, around the identity."""

    def __init__(self, config: SimVQAudioConfig):
        super().__init__()
        channels = config.hidden_size
        self.norm1 = Norm(config)
        self.conv1 = FrameConv1d(channels, channels, 3, config)
        self.norm2 = Norm(config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = FrameConv1d(channels, channels, 3, config)

    def forward(self, hidden: Tensor, mask: Context) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(hidden, mask)), mask)
        inner = self.dropout(F.silu(self.norm2(inner, mask)))
        return hidden + self.conv2(inner, mask)


class Attention(nn.Module):
    """Single-head self-attention over the frames of a clip, or the last ones of a stream."""

    def __init__(self, config: SimVQAudioConfig):
        super().__init__()
        channels = config.hidden_size
        self.norm = Norm(config)
        self.query = nn.Conv1d(channels, channels, kernel_size=1)
        self.key = nn.Conv1d(channels, channels, kernel_size=1)
        self.value = nn.Conv1d(channels, channels, kernel_size=1)
        self.out = nn.Conv1d(channels, channels, kernel_size=1)
        self.window = config.attention_window if config.streaming else None

    def forward(self, hidden: Tensor, mask: Context) -> Tensor:
        normed = self.norm(hidden, mask)
        query, key, value = (layer(normed) for layer in (self.query, self.key, self.value))
        if self.window is not None:
            return hidden + self.out(attend_to_past(self, query, key, value, self.window, mask))
        allowed = None if mask is None else mask.bool()
        return hidden + self.out(attend(query, key, value, allowed))


class ConvNeXtBlock(GradientCheckpointingLayer):
    """Depthwise convolution, LayerNorm, two pointwise layers, layer scale."""

    def __init__(self, config: SimVQAudioConfig):
        super().__init__()
        channels = config.hidden_size
        self.depthwise = FrameConv1d(channels, channels, 7, config, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, config.intermediate_size)
        self.contract = nn.Linear(config.intermediate_size, channels)
        self.layer_scale = nn.Parameter(torch.full((channels,), 1 / config.num_decoder_layers))

    def forward(self, hidden: Tensor, mask: Context) -> Tensor:
        inner, in_stream = self.norm(self.depthwise(hidden, mask).mT), isinstance(mask, dict)
        inner = map_few(self.contract, F.gelu(map_few(self.expand, inner, in_stream)), in_stream)
        return hidden + (self.layer_scale * inner).mT


class InverseSTFT(nn.Module):
    """Frames to waveform by overlap-add with Hann windows, trimmed to T * hop samples ("same" padding)."""

    def __init__(self, n_fft: int, hop_length: int):
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length

    def forward(self, magnitude: Tensor, phase: Tensor, mask: Context) -> Tensor:
        """Two of (B, n_fft / 2 + 1, T) to (B, T * hop), in a stream behind by `lag`; mask (B, 1, T)."""
        spectrum = torch.polar(magnitude, phase)
        # The window is made here: transformers loses buffers that a checkpoint does not hold.
        window = torch.hann_window(self.n_fft, dtype=torch.float32, device=spectrum.device)[:, None]
        if isinstance(mask, dict):
            frames = torch.fft.irfft(spectrum, self.n_fft, dim=1) * window
            return add_to_waveform(self, frames, window[:, 0], self.hop_length, mask)
        real = window.new_ones(1, 1, spectrum.shape[-1]) if mask is None else mask.float()
        frames = torch.fft.irfft(spectrum, self.n_fft, dim=1) * window * real
        envelope = self._overlap_add(window.square() * real)
        # Behind the end of a shorter clip there may be no window: 0 / 1e-11 instead of 0 / 0.
        waveform = self._overlap_add(frames) / envelope.clamp(min=1e-11)
        if mask is None:
            return waveform
        return waveform * mask[:, 0].repeat_interleave(self.hop_length, dim=1)

    @property
    def lag(self) -> int:
        """Samples of the next frames that a frame's own samples need."""
        return (self.n_fft - self.hop_length) // 2

    def _overlap_add(self, frames: Tensor) -> Tensor:
        summed = overlap_add(frames, self.hop_length)
        return summed[:, self.lag : summed.shape[1] - self.lag]


class AudioDecoder(nn.Module):
    """Latents (B, d, T) to a waveform (B, 1, T * hop)."""

    def __init__(self, config: SimVQAudioConfig):
        super().__init__()
        channels = config.hidden_size
        self.streaming = config.streaming
        self.conv_in = FrameConv1d(config.codebook_dim, channels, 7, config)
        self.position_net = nn.ModuleList(
            [
                ResNetBlock(config),
                ResNetBlock(config),
                Attention(config),
                ResNetBlock(config),
                ResNetBlock(config),
                Norm(config),
            ]
        )
        self.norm_in = nn.LayerNorm(channels, eps=1e-6)
        self.blocks = nn.ModuleList(ConvNeXtBlock(config) for _ in range(config.num_decoder_layers))
        self.norm_out = nn.LayerNorm(channels, eps=1e-6)
        self.head = nn.Linear(channels, 2 * (config.n_fft // 2 + 1))
        self.inverse_stft = InverseSTFT(config.n_fft, config.hop_length)

    def forward(
        self, latents: Tensor, mask: Tensor | None = None, state: State | None = None
    ) -> Tensor:
        """mask: (B, 1, T), true where a frame belongs to a clip; None if all do. state: of a stream."""
        # Layers that look at the past alone see nothing behind a clip's end.
        context = state if self.streaming else mask
        hidden = self.conv_in(latents, context)
        for layer in self.position_net:
            hidden = layer(hidden, context)
        hidden = self.norm_in(hidden.mT).mT
        for block in self.blocks:
            hidden = block(hidden, context)
        spectrum = map_few(self.head, self.norm_out(hidden.mT), state is not None).mT
        # float32 and no autocast: half precision has neither the range for exp nor an FFT on the CPU.
        with torch.autocast(device_type=spectrum.device.type, enabled=False):
            log_magnitude, phase = spectrum.float().chunk(2, dim=1)
            # Clamped before exp, whose infinity would make the gradient NaN.
            magnitude = log_magnitude.clamp(max=math.log(LARGEST_MAGNITUDE)).exp()
            waveform = self.inverse_stft(magnitude, phase, mask if state is None else state)
        return waveform[:, None].to(latents.dtype)
