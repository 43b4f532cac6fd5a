"""Whether the weights of a checkpoint fit the modules of a run: told by name before any of them is loaded."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from training.loop.checkpoint_files import DamagedCheckpoint


def check_fit(checkpoint: Path, modules: list[nn.Module]) -> None:
    """Compare names and shapes, from the headers of the files alone.

    Args:
        modules: in the order in which Accelerate numbers them.

    Raises:
        ValueError: naming the first tensor that does not fit.
        DamagedCheckpoint: if a file is no safetensors.
    """
    for number, module in enumerate(modules):
        path = checkpoint / f"model{f'_{number}' if number else ''}.safetensors"
        if not path.is_file():  # of a sharded model, which Accelerate writes in another way
            continue
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                saved = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise DamagedCheckpoint(f"{path.name} cannot be read: {error}") from None
        state = module.state_dict()
        kind, advice = type(module).__name__, "the model of this run is another one"
        for name, shape in saved.items():
            if name not in state:
                raise ValueError(f"{advice}: {kind} has no {name}, which is in the checkpoint")
            if tuple(state[name].shape) != shape:
                raise ValueError(
                    f"{advice}: {name} of {kind} is {tuple(state[name].shape)}, in the checkpoint {shape}. "
                    "Settings, tokenizer and classes of the data must give the same model"
                )
        # Of tensors that share their memory, one is saved.
        present = {state[name].data_ptr() for name in saved}
        for name, tensor in state.items():
            if name not in saved and tensor.numel() and tensor.data_ptr() not in present:
                raise ValueError(f"{advice}: {name} of {kind} is not in the checkpoint")
