"""A part of a tokenizer for ExecuTorch, the engine of phones. Needs the extra `executorch`."""

from pathlib import Path

from transformers import PreTrainedModel

from .exportable import exportable, is_audio, traced

# Memory is set apart for the largest input: tokens a side of an image, frames of a clip.
MOST_TOKENS, MOST_FRAMES = 64, 1502


def write_executorch(model: PreTrainedModel, part: str, path: Path) -> None:
    """Write a part of a tokenizer for XNNPACK, the engine's own CPU kernels: one image or clip at a time.

    Args:
        part: "encoder" or "decoder".
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    most = MOST_FRAMES if is_audio(model) else MOST_TOKENS
    program = traced(exportable(model, part), model, part, batched=False, most=most)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)
