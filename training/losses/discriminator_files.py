"""Discriminators beside the models that they were trained against: discriminator/, in safetensors."""

import json
from pathlib import Path

from accelerate.logging import get_logger
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from hub_cards.pushed_files import DISCRIMINATOR, DISCRIMINATOR_SIZES

logger = get_logger(__name__)


def save_discriminator(discriminator: nn.Module, sizes: dict[str, int], model_dir: Path) -> None:
    """Write a discriminator beside its model.

    Args:
        sizes: what it was built with.
    """
    (model_dir / DISCRIMINATOR).parent.mkdir()
    state = {name: value.contiguous() for name, value in discriminator.state_dict().items()}
    save_file(state, model_dir / DISCRIMINATOR, metadata={"format": "pt"})
    (model_dir / DISCRIMINATOR_SIZES).write_text(json.dumps(sizes, indent=2) + "\n")


def load_discriminator(discriminator: nn.Module, sizes: dict[str, int], source: str) -> bool:
    """Give a discriminator the weights of the one beside a model, and say in one line whether there is one.

    Args:
        sizes: what it was built with; one of other sizes is not taken.
        source: folder of the model, or its name on the Hub.
    """
    begins = "the discriminator begins untrained"
    weights, theirs = _find(source, DISCRIMINATOR), _find(source, DISCRIMINATOR_SIZES)
    if weights is None or theirs is None:
        logger.info(f"init_from: {source} has no discriminator/: {begins}")
        return False
    try:
        found = json.loads(theirs.read_text())
        if found != sizes:
            logger.warning(
                f"init_from: the discriminator of {source} has {found}, not {sizes}: {begins}"
            )
            return False
        state = load_file(weights)
        if not all(value.isfinite().all() for value in state.values()):
            raise ValueError("it holds NaN or infinity")
        discriminator.load_state_dict(state)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        logger.warning(f"init_from: cannot read the discriminator of {source} ({reason}): {begins}")
        return False
    logger.info(f"init_from: the discriminator of {source} goes on too")
    return True


def _find(source: str, name: str) -> Path | None:
    """Return a file beside a model; None if there is none, or the Hub cannot be asked."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None
