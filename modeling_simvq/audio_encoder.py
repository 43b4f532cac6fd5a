"""Encoder of the audio tokenizer: SEANet (strided convolutions, then an LSTM), from waveform to latents.

Layers as in the original (fixtures audio_*): ELU, weight-normalised convolutions, reflect padding. Every
layer can be told the true lengths of a right-padded batch. It then pads each clip where that clip ends,
so that no clip sees what it was batched with.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_simvq_audio import SimVQAudioConfig
from .lstm import LSTM
from .streaming_layers import Context, State, convolve_few, recur, with_past
from .weight_norm_conv1d import WeightNormConv1d, in_the_form_of


def reflect_pad(hidden: Tensor, left: int, right: Tensor, most: int, lengths: Tensor) -> Tensor:
    """Pad every clip of a batch by reflection at its own two ends.

    A clip too short to be reflected is first extended by zeros, and the extension is cut off again, as
    the original does.

    Args:
        hidden: (B, C, T); clip b occupies the first lengths[b] positions, the rest is ignored.
        left: number of positions to add at the start.
        right: (B,) number of positions to add at the end of each clip.
        most: the largest that right can be.
        lengths: (B,), at least 1 and at most T.

    Returns:
        (B, C, left + T + most); only the first left + lengths[b] + right[b] positions of clip b mean
        anything.
    """
    batch, channels, width = hidden.shape
    ends = lengths[:, None]
    before = torch.arange(-left, 0, device=hidden.device).expand(batch, left)
    after = ends + torch.arange(most, device=hidden.device)
    longest_pad = right.clamp(min=left)[:, None]
    extended = torch.where(ends > longest_pad, ends, longest_pad + 1)
    positions = torch.cat([before, after], dim=1)
    sources = positions.abs()
    sources = torch.where(sources >= extended, 2 * (extended - 1) - sources, sources)
    # A source at or behind the end lies in the zeros that extend a short clip.
    real = ((sources < ends) & (sources >= 0))[:, None]
    sources = sources.clamp(0, width - 1)[:, None].expand(-1, channels, -1)
    values = hidden.gather(2, sources) * real
    targets = (positions + left)[:, None].expand(-1, channels, -1)
    return F.pad(hidden, (left, most)).scatter(2, targets, values)


class PaddedConv1d(nn.Module):
    """Convolution with reflect padding such that T positions become ceil(T / stride)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        config: SimVQAudioConfig,
    ):
        super().__init__()
        kind = WeightNormConv1d if config.weight_norm else nn.Conv1d
        self.conv = kind(in_channels, out_channels, kernel_size, stride=stride, dilation=dilation)
        self.stride, self.streaming = stride, config.streaming
        padding = dilation * (kernel_size - 1) + 1 - stride
        self.right = 0 if config.causal else padding // 2
        self.left = padding - self.right

    def forward(self, hidden: Tensor, lengths: Context) -> tuple[Tensor, Context]:
        """(B, C, T) to (B, C', ceil(T / stride)), and the clips' new lengths, or a stream's state."""
        if self.streaming and lengths is not None:
            return self.step(hidden, lengths, None), lengths
        if self.streaming:
            return self.conv(with_past(self, hidden, self.left, None)), None
        width = hidden.shape[-1]
        extra = -width % self.stride
        if lengths is None and width > max(self.left, self.right + extra):
            hidden = F.pad(hidden, (self.left, self.right + extra), mode="reflect")
            return self.conv(hidden), None
        known = lengths
        if lengths is None:
            lengths = torch.full((len(hidden),), width, device=hidden.device)
        right = self.right + (-lengths) % self.stride
        hidden = reflect_pad(hidden, self.left, right, self.right + self.stride - 1, lengths)
        frames = -(-width // self.stride)
        hidden = self.conv(hidden)[..., :frames]
        return hidden, None if known is None else -(-lengths // self.stride)

    def step(self, hidden: Tensor, state: State, place: int | None) -> Tensor:
        """Convolve the next positions of a stream; place as in `product`."""
        return convolve_few(self.conv, with_past(self, hidden, self.left, state), place)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        # Weights may come folded or not, whatever this layer is.
        in_the_form_of(self.conv, state_dict, prefix + "conv.")
        super()._load_from_state_dict(state_dict, prefix, *args)


class SEANetBlock(nn.Module):
    """ELU and a dilated convolution to half the width, ELU and a pointwise one back; pointwise shortcut."""

    def __init__(self, channels: int, dilation: int, config: SimVQAudioConfig):
        super().__init__()
        inner = max(1, channels // 2)
        self.conv1 = PaddedConv1d(channels, inner, 3, dilation=dilation, config=config)
        self.conv2 = PaddedConv1d(inner, channels, 1, config=config)
        self.shortcut = PaddedConv1d(channels, channels, 1, config=config)

    def forward(self, hidden: Tensor, lengths: Context) -> Tensor:
        inner, _ = self.conv1(F.elu(hidden), lengths)
        inner, _ = self.conv2(F.elu(inner), lengths)
        shortcut, _ = self.shortcut(hidden, lengths)
        return shortcut + inner


class Downsampling(nn.Module):
    """Residual blocks, ELU, and a convolution that takes every stride-th position at twice the width."""

    def __init__(self, channels: int, stride: int, config: SimVQAudioConfig):
        super().__init__()
        self.blocks = nn.ModuleList(
            SEANetBlock(channels, 2**depth, config) for depth in range(config.num_residual_layers)
        )
        self.conv = PaddedConv1d(channels, 2 * channels, 2 * stride, stride=stride, config=config)

    def forward(self, hidden: Tensor, lengths: Context) -> tuple[Tensor, Context]:
        for block in self.blocks:
            hidden = block(hidden, lengths)
        return self.conv(F.elu(hidden), lengths)


class AudioEncoder(nn.Module):
    """(B, 1, L) to latents (B, d, ceil(L / hop))."""

    def __init__(self, config: SimVQAudioConfig):
        super().__init__()
        self.hop_length, self.streaming = config.hop_length, config.streaming
        channels = config.num_filters
        self.conv_in = PaddedConv1d(1, channels, 7, config=config)
        self.levels = nn.ModuleList()
        for stride in config.downsampling_ratios:
            self.levels.append(Downsampling(channels, stride, config))
            channels *= 2
        self.lstm = None
        if config.num_lstm_layers:
            self.lstm = LSTM(channels, channels, config.num_lstm_layers)
        self.conv_out = PaddedConv1d(channels, config.codebook_dim, 7, config=config)

    def forward(
        self, waveform: Tensor, lengths: Tensor | None = None, chunk_frames: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Latents, and with lengths the number of frames of every clip.

        Args:
            waveform: (B, 1, L).
            lengths: (B,) samples of each clip of a right-padded batch; None if all fill their rows.
            chunk_frames: run the convolutions on so many frames at a time. The result is the same up to
                rounding: every chunk sees the samples that it depends on, and the LSTM's state is carried.
        """
        if self.streaming:
            waveform, frames = self.whole_frames(waveform, lengths)
            hidden, _ = self._convolve(waveform, None)
            hidden, _ = self._recur(hidden, None)
            return self.conv_out(F.elu(hidden), None)[0], frames
        if chunk_frames is None:
            hidden, frames = self._convolve(waveform, lengths)
            hidden, _ = self._recur(hidden, None)
        else:
            hidden = self._in_chunks(waveform, lengths, chunk_frames)
            frames = None if lengths is None else -(-lengths // self.hop_length)
        latents, _ = self.conv_out(F.elu(hidden), frames)
        return latents, frames

    def whole_frames(
        self, waveform: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Fill the last frame with silence; count the frames of each clip."""
        filled = F.pad(waveform, (0, -waveform.shape[-1] % self.hop_length))
        return filled, None if lengths is None else -(-lengths // self.hop_length)

    def step(self, waveform: Tensor, state: State, place: int = 0) -> Tensor:
        """Latents (B, d, t) of the next t * hop samples of a stream.

        They are the very same in whatever pieces a stream comes: layers of many positions a frame take one
        frame at a time, the last ones, with most of the weights, several at fixed places.

        Args:
            place: frames of the stream before these.
        """
        pieces, last = [], self.levels[-1]
        for frame in waveform.split(self.hop_length, dim=-1):
            hidden, _ = self.conv_in(frame, state)
            for level in self.levels[:-1]:
                hidden, _ = level(hidden, state)
            for block in last.blocks:
                hidden = block(hidden, state)
            pieces.append(F.elu(hidden))
        hidden = last.conv.step(torch.cat(pieces, dim=-1), state, place)
        if self.lstm is not None:
            hidden = recur(self.lstm, hidden, state, place)
        # An ELU too rounds by the place in its tensor.
        activated = [F.elu(frame.contiguous()) for frame in hidden.split(1, dim=-1)]
        return self.conv_out.step(torch.cat(activated, dim=-1), state, place)

    def _convolve(self, waveform: Tensor, lengths: Context) -> tuple[Tensor, Context]:
        hidden, lengths = self.conv_in(waveform, lengths)
        for level in self.levels:
            hidden, lengths = level(hidden, lengths)
        return hidden, lengths

    def _recur(self, hidden: Tensor, state: tuple | None) -> tuple[Tensor, tuple | None]:
        if self.lstm is None:
            return hidden, None
        out, state = self.lstm(hidden.mT, state)
        return hidden + out.mT, state

    def _in_chunks(self, waveform: Tensor, lengths: Tensor | None, chunk_frames: int) -> Tensor:
        hop, (batch, _, width) = self.hop_length, waveform.shape
        frames, context, state, whole = -(-width // hop), self.context_frames, None, None
        counts = [width] * batch if lengths is None else lengths.tolist()
        rows = list(range(batch))
        for start in range(0, frames, chunk_frames):
            kept = [i for i, row in enumerate(rows) if counts[row] > start * hop]
            if not kept:
                break
            if len(kept) < len(rows):  # clips that ended before this chunk are left out
                rows = [rows[i] for i in kept]
                state = None if state is None else tuple(part[:, kept] for part in state)
            stop = min(start + chunk_frames, frames)
            # Causal layers need what follows too: the reflection at the clip's start reads it.
            first, last = max(0, start - context), stop + context
            piece = waveform[..., first * hop : last * hop]
            piece = piece if len(rows) == batch else piece[rows]
            within = None
            if lengths is not None:
                within = (lengths[rows] - first * hop).clamp(max=piece.shape[-1])
            hidden, _ = self._convolve(piece, within)
            hidden, state = self._recur(hidden[..., start - first : stop - first], state)
            if whole is None:
                whole = hidden.new_zeros(batch, hidden.shape[1], frames)
            whole[rows, :, start:stop] = hidden
        return whole

    @property
    def context_frames(self) -> int:
        """Frames on either side on which the convolutions before the LSTM can depend."""
        reach, step = self.conv_in.left + self.conv_in.right, 1
        for level in self.levels:
            for conv in [*(block.conv1 for block in level.blocks), level.conv]:
                reach += step * (conv.left + conv.right)
                step *= conv.stride
            reach += step  # padding at the end of a clip that fills no whole frame
        return math.ceil(reach / self.hop_length) + 1
