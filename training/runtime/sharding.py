"""Models sharded (FSDP2): every rank holds a share of each weight, its gradient and its optimiser state.

Accelerate shards the trained model. This is what the loop needs beside it: the average sharded in the same way,
whole states for checkpoints that any number of ranks can read, and a whole copy to save as a model. What only
such runs need of torch is imported when they do: it takes seconds.
"""

from typing import TYPE_CHECKING

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from training.runtime.settings import SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_sharding(accelerator: Accelerator) -> bool:
    """Tell whether the launch asks for sharded models."""
    return accelerator.distributed_type == DistributedType.FSDP


def check_plugin(accelerator: Accelerator) -> None:
    """Refuse what the loop cannot keep its promises with.

    Raises:
        SettingsError: naming the setting of the launch and its remedy.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise SettingsError(
            f"fsdp_version is {plugin.fsdp_version}: set it to 2, as training/configs/accelerate/fsdp.yaml does"
        )
    if plugin.state_dict_type.name != "FULL_STATE_DICT":
        raise SettingsError(
            f"fsdp_state_dict_type is {plugin.state_dict_type.name}: set it to FULL_STATE_DICT. Checkpoints in "
            "parts have an index that only an unpickler reads, which could run any code"
        )
    if accelerator.mixed_precision == "fp16":
        raise SettingsError("mixed_precision fp16 does not go with FSDP here: take bf16")


def shard(module: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Shard a module in place, in the way that Accelerate has sharded the model it is a copy of."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    return fsdp2_prepare_model(accelerator, module)


def call_as_forward(module: nn.Module, *names: str) -> None:
    """Let methods of sharded submodules have their weights whole, as forward has."""
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    for part in module.modules():
        for name in names if isinstance(part, FSDPModule) else ():
            if hasattr(part, name):
                register_fsdp_forward_method(part, name)


def reshard(module: nn.Module) -> None:
    """Free the whole weights that a forward pass without a backward pass leaves: all is sharded again."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def own_part(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor."""
    return tensor.to_local() if _in_parts(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on all ranks; for all ranks to call."""
    return tensor.full_tensor() if _in_parts(tensor) else tensor


def _in_parts(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")  # a DTensor, without the import


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module that is sharded, in memory of the CPU: on the first rank, on others nothing."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(
        module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


class WholeState:
    """A sharded module whose state is written and read as that of a whole one, by all ranks together."""

    def __init__(self, module: nn.Module):
        self.module = module

    def state_dict(self) -> dict[str, Tensor]:
        return whole_state(self.module)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.module, state if dist.get_rank() == 0 else {}, options=options)


def whole_copy(model: "PreTrainedModel") -> "PreTrainedModel | None":
    """A sharded model as one that can be saved: on the first rank, on the CPU. For all ranks to call."""
    from torch.distributed.fsdp import FSDPModule

    state = whole_state(model)
    if dist.get_rank() != 0:
        return None
    plain = next(base for base in type(model).__bases__ if base is not FSDPModule)
    copy = plain(model.config)
    copy.load_state_dict(state)
    return copy.eval()
