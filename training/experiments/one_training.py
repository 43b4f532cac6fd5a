"""One training of an experiment: from its settings to the finished model."""

from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedModel


def train_model(groups: dict, build_recipe: Callable) -> tuple[PreTrainedModel, Accelerator]:
    """Train, and load what came of it.

    Args:
        groups: settings by the names of a Task's groups.
        build_recipe: of the trainer.

    Returns:
        The averaged model in evaluation mode, on the accelerator's device.
    """
    from accelerate.state import AcceleratorState
    from transformers import AutoModel

    from training.recipes.run import make_accelerator, train

    AcceleratorState._reset_state(reset_partial_state=True)  # several runs in one process
    accelerator = make_accelerator(groups["loop"])
    train(groups, build_recipe, accelerator)
    model = AutoModel.from_pretrained(Path(groups["loop"].output_dir) / "model").eval()
    return model.to(accelerator.device), accelerator
