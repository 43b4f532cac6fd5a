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

    def forward(self, rows: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """(B, T, C) to (B, T, H), from a state on or from silence; and the state after it.

        In a compiled graph for inference it begins with silence, and leaves no state.
        """
        if torch.compiler.is_dynamo_compiling() and not torch.is_grad_enabled():
            return _from_silence(rows, self._flat_weights), None
        if state is None:
            state = _silence(rows, self._flat_weights)
        outputs, *state = _run(rows, state, self._flat_weights, self.training)
        return outputs, tuple(state)


def _silence(rows: Tensor, weights: list[Tensor]) -> State:
    zeros = rows.new_zeros(len(weights) // 4, rows.shape[0], weights[1].shape[1])
    return zeros, zeros


def _run(
    rows: Tensor, state: State, weights: list[Tensor], training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # With biases; without dropout; in one direction; batch first.
    return torch.lstm(rows, state, weights, True, len(weights) // 4, 0.0, training, False, True)


@torch.library.custom_op("simvq::lstm", mutates_args=())
def _from_silence(rows: Tensor, weights: list[Tensor]) -> Tensor:
    return _run(rows, _silence(rows, weights), weights, False)[0].contiguous()


@_from_silence.register_fake
def _(rows: Tensor, weights: list[Tensor]) -> Tensor:
    return rows.new_empty(rows.shape[0], rows.shape[1], weights[1].shape[1])
