"""AdamW as every module here is trained with it."""

import torch
from torch import nn
from torch.optim import Optimizer

from training.runtime.settings import LoopSettings


def make_optimizer(module: nn.Module, settings: LoopSettings) -> torch.optim.AdamW:
    """AdamW over what is trained; without weight decay, the default, it is Adam to the bit.

    Decay is of matrices alone: norms, biases and other vectors stay free, as is usual for transformers. They
    are groups of their own at any decay, so that a checkpoint fits a run with another one.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    order = sorted(range(len(trained)), key=lambda index: trained[index].ndim < 2)
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        settings.learning_rate,
        tuple(settings.adam_betas),
        weight_decay=settings.weight_decay,
    )
    optimizer.register_load_state_dict_pre_hook(
        lambda optimizer, state: _split_group(optimizer, state, order)
    )
    return optimizer


def follow_settings(optimizer: Optimizer, settings: LoopSettings) -> None:
    """Give a loaded optimiser the settings of this run: those of the checkpoint came with its state.

    The learning rate is the schedule's affair.
    """
    for group in optimizer.param_groups:
        group["betas"] = tuple(settings.adam_betas)
        decays = any(parameter.ndim >= 2 for parameter in group["params"])
        group["weight_decay"] = settings.weight_decay if decays else 0.0


def _split_group(optimizer: Optimizer, state: dict, order: list[int]) -> dict | None:
    """Earlier versions kept one group, in the module's order, in runs without weight decay."""
    groups = state["param_groups"]
    if (
        len(groups) != 1
        or len(optimizer.param_groups) == 1
        or len(groups[0]["params"]) != len(order)
    ):
        return None
    position, split = 0, []
    for group in optimizer.param_groups:
        end = position + len(group["params"])
        split.append(groups[0] | {"params": list(range(position, end))})
        position = end
    saved = [groups[0]["params"][index] for index in order]
    moments = {new: state["state"][old] for new, old in enumerate(saved) if old in state["state"]}
    return {**state, "state": moments, "param_groups": split}
