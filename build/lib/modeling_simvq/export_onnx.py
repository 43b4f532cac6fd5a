"""A part of a tokenizer as ONNX, for onnxruntime and what else reads it. Needs the extra `export`."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel

from .exportable import LoopedLSTM, dynamic_shapes, exportable, input_and_output, traced
from .exported_weights import store_as

OPSET = 20


def write_onnx(model: PreTrainedModel, part: str, path: Path, weights: str = "float32") -> None:
    """Write a part of a tokenizer as one file, batch and sizes dynamic.

    Args:
        part: "encoder" or "decoder".
        weights: how they are stored, "float32", "float16" or "int8". What is computed stays in float32.
    """
    import onnx

    module = exportable(model, part)
    if part == "encoder" and isinstance(getattr(module.model.encoder, "lstm", None), LoopedLSTM):
        # The operator of ONNX: its loop would copy all frames for each of them.
        module.model.encoder.lstm = OperatorLSTM(module.model.encoder.lstm)
    given, made = input_and_output(model, part)
    written = torch.onnx.export(
        traced(module, model, part),
        dynamo=True,
        opset_version=OPSET,
        input_names=[given],
        output_names=[made],
        verbose=False,
    )
    proto = written.model_proto
    _name_sizes(proto.graph, dynamic_shapes(model, part)[0])
    store_as(proto, weights)
    onnx.save(proto, path)


def _name_sizes(graph, dynamic: dict[int, Dim]) -> None:
    """Call the dynamic sizes what we call them; torch numbers them: 8*s89 becomes 8*height."""
    sizes = [value.type.tensor_type.shape.dim for value in (*graph.input, *graph.output)]
    called = {}
    for axis, size in dynamic.items():
        (symbol,) = re.findall(r"s\d+", sizes[0][axis].dim_param)
        called[symbol] = re.findall(r"[a-z]+", size.__name__)[0]
    for size in (size for shape in sizes for size in shape if size.dim_param):
        size.dim_param = re.sub(r"s\d+", lambda found: called[found[0]], size.dim_param)


class OperatorLSTM(nn.Module):
    """LSTM of any number of frames, from silence, as ONNX has it. Only to be traced."""

    def __init__(self, lstm: LoopedLSTM):
        super().__init__()
        self.width = lstm.width
        self.layers = nn.ModuleList()
        for layer in range(lstm.num_layers):
            # Gates: enter, forget, change and leave in torch; enter, leave, forget and change in ONNX.
            into, again, bias_in, bias_again = (
                torch.cat([tensor.chunk(4)[gate] for gate in (0, 3, 1, 2)])
                for tensor in lstm.weights[4 * layer : 4 * layer + 4]
            )
            biases = torch.cat([bias_in, bias_again])
            self.layers.append(
                nn.ParameterList(
                    nn.Parameter(tensor[None], requires_grad=False)
                    for tensor in (into, again, biases)
                )
            )

    def forward(self, rows: Tensor, state: None) -> tuple[Tensor, None]:
        """(B, T, C) to (B, T, C)."""
        hidden = rows.transpose(0, 1)
        frames, batch, _ = hidden.shape
        for weights in self.layers:
            hidden = torch.onnx.ops.symbolic(
                "LSTM",
                (hidden, *weights),
                {"hidden_size": self.width},
                dtype=hidden.dtype,
                shape=(frames, 1, batch, self.width),
                version=OPSET,
            )[:, 0]
        return hidden.transpose(0, 1), None
