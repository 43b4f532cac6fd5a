"""Layers of the streaming audio tokenizer: they look at the past alone, and a state carries it on.

A state is a dict of tensors by the layers' names; an empty one is the start of a stream. Each layer takes
what it needs and leaves what its next call needs, of a size that does not grow. With None there is no state:
the chunk is a whole clip. Before a clip's start, and in the padding of its last frame, is silence: zeros.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .basis_and_projection import has_hooks
from .lstm import LSTM, next_cell

State = dict[str, Tensor]
# What layers know besides their input: the lengths or the mask of a batch of clips, or a stream's state.
Context = Tensor | State | None
COLUMNS = 8  # of a product; with more, little is left of the gain for single frames


def unplain_layer(model: nn.Module) -> str | None:
    """Return the name of a layer that is more than its weights, or has them elsewhere; None if none is.

    A stream computes with the weights themselves: what hooks, adapters or quantized layers do would be left
    out.
    """
    package = __name__.rpartition(".")[0]
    for name, layer in model.named_modules():
        if next(layer.parameters(recurse=False), None) is None and "_hf_hook" not in layer.__dict__:
            continue
        known = type(layer).__module__.startswith(("torch.nn.", package))
        if not known or "forward" in layer.__dict__ or has_hooks(layer):
            return name
    return None


def name_layers(model: nn.Module) -> None:
    """Tell every layer of a model the name under which it keeps its part of a state."""
    for name, layer in model.named_modules():
        layer.stream_name = name


def with_past(layer: nn.Module, hidden: Tensor, left: int, state: State | None) -> Tensor:
    """Put the positions before a chunk in front of it: those that the layer saw last, or zeros at the start.

    Args:
        hidden: (B, C, T).
        left: positions to put in front.

    Returns:
        (B, C, left + T).
    """
    if not left:
        return hidden
    if state is None or layer.stream_name not in state:
        joined = F.pad(hidden, (left, 0))
    else:
        joined = torch.cat([state[layer.stream_name], hidden], dim=-1)
    if state is not None:
        state[layer.stream_name] = joined[..., joined.shape[-1] - left :].clone()
    return joined


def product(
    weight: Tensor, columns: Tensor, bias: Tensor | None, place: int | None = None
) -> Tensor:
    """Product of a weight and so few columns that reading the weight is most of the work.

    In this order the BLAS of CPUs takes half the time of a linear layer's. With a place, a column gives the
    very same numbers whatever comes before and behind it in its chunk: COLUMNS are multiplied at a time, each
    always at the same position among them. Products of other sizes would be rounded otherwise.

    Args:
        weight: (O, I).
        columns: (B, I, T).
        place: columns of the stream before these.

    Returns:
        (B, O, T).
    """
    if place is None:
        return _product(weight, columns, bias)
    count, before = columns.shape[-1], place % COLUMNS
    filled = F.pad(columns, (before, -(before + count) % COLUMNS))
    found = [_product(weight, part, bias) for part in filled.split(COLUMNS, dim=-1)]
    return torch.cat(found, dim=-1)[..., before : before + count]


def _product(weight: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    # Streams of a batch side by side: the weight is read once for all.
    flat = columns.transpose(0, 1).flatten(1).contiguous()
    found = weight @ flat if bias is None else torch.addmm(bias[:, None], weight, flat)
    return found.unflatten(1, (len(columns), -1)).transpose(0, 1)


def convolve_few(conv: nn.Conv1d, joined: Tensor, place: int | None = None) -> Tensor:
    """Convolution, without padding, of few positions: a `product`, for F.conv1d packs the weight first."""
    size, (dilation,), (stride,) = conv.kernel_size[0], conv.dilation, conv.stride
    windows = joined.unfold(-1, dilation * (size - 1) + 1, stride)[..., ::dilation]
    columns = windows.transpose(2, 3).flatten(1, 2)
    return product(conv.weight.flatten(1), columns, conv.bias, place)


def map_few(layer: nn.Linear, rows: Tensor, in_stream: bool) -> Tensor:
    """Linear layer of rows (B, T, I), in a stream as a `product`."""
    return product(layer.weight, rows.mT, layer.bias).mT if in_stream else layer(rows)


def recur(lstm: LSTM, hidden: Tensor, state: State, place: int) -> Tensor:
    """Run an LSTM over positions (B, C, T) from where it stopped, and add its input.

    torch's packs its weights anew for every call on a CPU, and rounds by the number of positions.
    """
    inputs = hidden
    for layer in range(lstm.num_layers):
        into, again, *biases = (
            getattr(lstm, f"{name}_l{layer}")
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        names = [f"{lstm.stream_name}.{part}.{layer}" for part in ("hidden", "cell")]
        if names[0] not in state:
            state.update(dict.fromkeys(names, torch.zeros_like(hidden[..., 0])))
        output, cell = (state[name] for name in names)
        outputs = []
        for gates in product(into, inputs, sum(biases), place).unbind(-1):
            gates = gates + _product(again, output[..., None], None)[..., 0]
            output, cell = next_cell(gates, cell)
            outputs.append(output)
        state.update(zip(names, (output, cell), strict=True))
        inputs = torch.stack(outputs, dim=-1)
    return hidden + inputs


def attend_to_past(
    layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, window: int, state: State | None
) -> Tensor:
    """Attention of one head in which each frame sees itself and the `window - 1` frames before it.

    Some queries at a time, with the keys that they can see: memory and time grow linearly with the clip.

    Args:
        query, key, value: (B, C, T).

    Returns:
        (B, C, T).
    """
    frames, name = query.shape[-1], layer.stream_name
    left = window - 1
    if state is None or name + ".key" not in state:
        key, value = (F.pad(part, (left, 0)) for part in (key, value))
        seen = torch.zeros(1, dtype=torch.int64, device=query.device)
    else:
        key = torch.cat([state[name + ".key"], key], dim=-1)
        value = torch.cat([state[name + ".value"], value], dim=-1)
        seen = state[name + ".seen"]
    if state is not None:
        state[name + ".key"] = key[..., key.shape[-1] - left :].clone()
        state[name + ".value"] = value[..., value.shape[-1] - left :].clone()
        state[name + ".seen"] = (seen + frames).clamp(max=left)
    query, key, value = (part.mT[:, None] for part in (query, key, value))
    pieces = []
    # An exported graph takes any number of frames, all at once.
    exporting = torch.compiler.is_exporting()
    step = frames if exporting else min(frames, max(window, 64))
    for start in (0,) if exporting else range(0, frames, step):
        stop = frames if exporting else min(start + step, frames)
        rows = torch.arange(start, stop, device=query.device)[:, None] + left
        columns = torch.arange(start, stop + left, device=query.device)
        # Columns before `left - seen` are before the start of the stream: zeros, and no keys.
        allowed = (columns <= rows) & (columns > rows - window) & (columns >= left - seen)
        pieces.append(
            F.scaled_dot_product_attention(
                query[:, :, start:stop],
                key[:, :, start : stop + left],
                value[:, :, start : stop + left],
                attn_mask=allowed,
            )
        )
    return torch.cat(pieces, dim=2)[:, 0].mT


def add_to_waveform(
    layer: nn.Module, frames: Tensor, window: Tensor, hop: int, state: State
) -> Tensor:
    """Add windowed frames to what earlier ones left, and return the samples that no later frame can change.

    They lag behind the frames: the first sample is (n_fft - hop) / 2 samples before the first frame's own.

    Args:
        frames: (B, n_fft, T), windowed.
        window: (n_fft,).

    Returns:
        (B, T * hop), divided by the sum of squared windows.
    """
    squares = window.square()[None, :, None].expand(1, -1, frames.shape[-1])
    added = []
    for name, part in (("waveform", frames), ("windows", squares)):
        summed = overlap_add(part, hop)
        name = f"{layer.stream_name}.{name}"
        if name in state:
            rest = state[name]
            summed = torch.cat(
                [summed[:, : rest.shape[1]] + rest, summed[:, rest.shape[1] :]], dim=1
            )
        ready = frames.shape[-1] * hop
        state[name] = summed[:, ready:].clone()
        added.append(summed[:, :ready])
    waveform, windows = added
    return waveform / windows.clamp(min=1e-11)


def rest_of_waveform(layer: nn.Module, state: State) -> Tensor:
    """Return what add_to_waveform still holds, (B, n_fft - hop), as it is if no frame follows."""
    name = layer.stream_name
    return state[name + ".waveform"] / state[name + ".windows"].clamp(min=1e-11)


def overlap_add(frames: Tensor, hop: int) -> Tensor:
    """Add frames (B, n, T), each `hop` samples after the one before, to (B, (T - 1) * hop + n)."""
    size, count = frames.shape[1:]
    length = (count - 1) * hop + size
    return F.fold(frames, (1, length), kernel_size=(1, size), stride=(1, hop))[:, 0, 0]
