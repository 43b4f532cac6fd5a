"""LSTM over the frames of clips: nn.LSTM, but that torch.compile takes it too."""

import torch
from torch import Tensor, nn

State = tuple[Tensor, Tensor]


class LSTM(nn.RNNBase):
    """LSTM of one direction, with the parameters, names and numbers of nn.LSTM.

    torch.compile breaks its graph at nn.LSTM itself, whatever is done with it.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int):
        super().__init__("LSTM", input_size, hidden_size, num_layers, batch_first=True)

    def forward(self, rows: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """(B, T, C) to (B, T, H), from a state on or from silence; and the state after it.

        Under autocast the result has its type. On a CPU it is computed in float32 all the same: for some CPUs
        oneDNN has no LSTM in bfloat16.
        """
        kind, weights = rows.device.type, self._flat_weights
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
        inside = weights[0].dtype if kind == "cpu" else dtype
        rows = rows.to(inside)
        if state is None:
            silence = rows.new_zeros(self.num_layers, rows.shape[0], self.hidden_size)
            state = silence, silence
        state = tuple(part.to(inside) for part in state)
        with torch.autocast(kind, enabled=False):
            weights = (
                [weight.to(inside) for weight in weights] if inside != weights[0].dtype else weights
            )
            if torch.compiler.is_dynamo_compiling() and not torch.is_grad_enabled():
                outputs, *state = _lstm(rows, *state, weights)
            else:
                outputs, *state = _run(rows, state, weights, self.training)
        return outputs.to(dtype), tuple(state)


def next_cell(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Return output and cell (B, H) of a position, from its gates (B, 4 H) and the cell before it."""
    enter, forget, change, leave = gates.chunk(4, dim=1)
    cell = forget.sigmoid() * cell + enter.sigmoid() * change.tanh()
    return leave.sigmoid() * cell.tanh(), cell


def _run(
    rows: Tensor, state: State, weights: list[Tensor], training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # With biases; without dropout; in one direction; batch first.
    return torch.lstm(rows, state, weights, True, len(weights) // 4, 0.0, training, False, True)


@torch.library.custom_op("simvq::lstm", mutates_args=())
def _lstm(
    rows: Tensor, hidden: Tensor, cell: Tensor, weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(part.contiguous() for part in _run(rows, (hidden, cell), weights, False))


@_lstm.register_fake
def _(
    rows: Tensor, hidden: Tensor, cell: Tensor, weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = rows.new_empty(rows.shape[0], rows.shape[1], hidden.shape[2])
    return outputs, torch.empty_like(hidden), torch.empty_like(cell)
