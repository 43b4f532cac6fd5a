"""Files of the parts of a tokenizer in each format: written, opened again, and compared with the model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .export_executorch import write_executorch
from .export_onnx import write_onnx
from .exportable import example, exportable, input_and_output, is_audio, run_part, traced
from .missing_packages import needing
from .several_quantizers import look_up

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2", "executorch": ".pte"}
EXTRAS = {".pte": "executorch"}  # of the others: export
# A code counts as another if it is farther than the model's own by more than this share: what lies between is
# within the rounding of the encoders.
MARGIN = 1e-4


@dataclass
class Compared:
    """A file beside the model, on an example that it was not traced with.

    Attributes:
        megabytes: size of the file, in 10^6 bytes, with what belongs to it.
        codes: that were compared, of an encoder; 0 of a decoder.
        other_codes: those that are farther from the latents than the model's own, by more than the margin.
        worst_error: of a decoder, the largest difference, where the model's largest value is 1.
    """

    megabytes: float
    codes: int = 0
    other_codes: int = 0
    worst_error: float = 0.0

    def __str__(self) -> str:
        size = f"{self.megabytes:.1f} MB, "
        if self.codes:
            return size + f"{self.other_codes} of {self.codes} codes differ from the model's"
        return size + f"worst error {self.worst_error:.1e} of the largest value"


def write_part(
    model: PreTrainedModel, part: str, format: str, folder: Path, weights: str = "float32"
) -> Path:
    """Write a part of a tokenizer in a format, and return its file.

    Args:
        part: "encoder" or "decoder".
        format: "onnx", "openvino", "torch" or "executorch".
        weights: how they are stored, "float32", "float16" or "int8"; the last two in onnx and openvino alone.

    Raises:
        ValueError: if a package is missing, or the format cannot store such weights.
    """
    path = folder / f"{part}{FORMATS[format]}"
    if weights != "float32" and format not in ("onnx", "openvino"):
        raise ValueError(f"the format {format} stores weights as float32, not as {weights}")
    with needing(path.name, EXTRAS.get(path.suffix, "export")):
        if format == "torch":
            torch.export.save(traced(exportable(model, part), model, part), path)
        elif format == "executorch":
            write_executorch(model, part, path)
        else:
            onnx_path = path.with_suffix(".onnx")
            write_onnx(model, part, onnx_path, weights)
            if format == "openvino":
                _convert_to_openvino(onnx_path, path)
                onnx_path.unlink()
    return path


def _convert_to_openvino(onnx_path: Path, path: Path) -> None:
    import openvino

    # Not openvino.convert_model, which reports its use over the network.
    openvino.save_model(openvino.Core().read_model(onnx_path), path, compress_to_fp16=False)


def open_part(path: Path, threads: int = 0) -> Callable[[Tensor], Tensor]:
    """Open a file that write_part wrote: a function of one tensor to one.

    Args:
        threads: of onnxruntime and OpenVINO, 0 for as many as they like; the others have their own settings.

    Raises:
        ValueError: if the format's engine is not installed.
    """
    openers = {
        ".onnx": _open_onnx,
        ".xml": _open_openvino,
        ".pt2": _open_torch,
        ".pte": _open_executorch,
    }
    with needing(path.name, EXTRAS.get(path.suffix, "export")):
        return openers[path.suffix](path, threads)


def megabytes_of(path: Path) -> float:
    """Return the size of a file that write_part wrote, in 10^6 bytes, with what belongs to it."""
    return sum(file.stat().st_size for file in path.parent.glob(path.stem + ".*")) / 1e6


def compare(model: PreTrainedModel, part: str, path: Path) -> Compared:
    """Run a file and the model on one example, of another size than that which was traced."""
    values = example(model, part, rows=1, tokens=24)
    megabytes, found = megabytes_of(path), open_part(path)(values)
    with torch.no_grad():
        if part == "encoder":
            return Compared(megabytes, *other_codes(model, values, found))
        made = run_part(model, part, values)
    return Compared(megabytes, worst_error=float((found - made).abs().max() / made.abs().max()))


@torch.no_grad()
def other_codes(model: PreTrainedModel, values: Tensor, found: Tensor) -> tuple[int, int]:
    """Count the positions that were compared, and those whose codes are farther off than the model's.

    Args:
        values: what was encoded, as `encode` takes it; images and clips of whole tokens.
        found: the codes of another engine.
    """
    encoded = model.encode(values)
    codes = encoded[input_and_output(model, "encoder")[1]]
    if found.shape != codes.shape:
        raise ValueError(f"codes have shape {tuple(found.shape)}, the model's {tuple(codes.shape)}")
    if not is_audio(model) and model.config.num_quantizers == 1:
        codes, found = codes[:, None], found[:, None]
    own, other = (
        (encoded.latents.float() - look_up(model.quantizer, some)).norm(dim=1)
        for some in (codes, found)
    )
    return own.numel(), int((other > own * (1 + MARGIN)).sum())


def _open_onnx(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda values: torch.from_numpy(session.run(None, {given.name: values.numpy()})[0])


def _open_openvino(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    import openvino

    # By itself OpenVINO computes in bfloat16 where a CPU can.
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = openvino.compile_model(path, "CPU", settings)
    return lambda values: torch.from_numpy(np.array(compiled([values.numpy()])[0]))


def _open_torch(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    module = torch.export.load(path).module()

    def run(values: Tensor) -> Tensor:
        with torch.no_grad():
            return module(values)

    return run


def _open_executorch(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    return lambda values: method.execute([values.contiguous()])[0].clone()
