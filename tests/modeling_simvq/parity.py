"""What the parity tests of both modalities share."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from transformers import PreTrainedModel

from modeling_simvq.convert_simvq_checkpoint import convert_simvq_checkpoint
from tests.fixtures.recipe import value

FIXTURES = Path(__file__).parents[1] / "fixtures"


def checkpoint(name: str, folder: Path, kept: tuple[str, ...]) -> Path:
    """The fixture's checkpoint, or one made from the names and shapes of its tensors that start with `kept`."""
    stored = FIXTURES / name / "checkpoint.ckpt"
    if stored.is_file():
        return stored
    state = {}
    for key, shape, dtype in json.loads((FIXTURES / name / "keys.json").read_text()):
        if key.startswith(kept) and dtype == "float32":
            state[key] = torch.from_numpy(value(key, tuple(shape), 0))
            if key != "quantize.embedding.weight":
                average = "model_ema." + key.replace(".", "")
                state[average] = torch.from_numpy(value(key, tuple(shape), 1))
    made = folder / "made.ckpt"
    torch.save({"state_dict": state}, made)
    return made


def converter(make_folder, kept: tuple[str, ...]) -> Callable[[str, str], PreTrainedModel]:
    """Converted models by fixture and weights, each made once, as is the checkpoint of one of published size.

    Args:
        make_folder: ``tmp_path_factory.mktemp``.
        kept: see checkpoint.
    """
    made = cache(lambda name: checkpoint(name, make_folder(name), kept))
    return cache(
        lambda name, weights: convert_simvq_checkpoint(
            made(name), make_folder(name) / "model", weights
        )
    )


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the original."""
    return float((ours.detach() - theirs).norm() / theirs.norm())
