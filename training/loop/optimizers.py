"""AdamW as every module here is trained with it, and its learning rate: warm-up, then constant or cosine."""

import math
import warnings

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from training.loop.settings import LoopSettings


def make_optimizers(
    modules: dict[str, nn.Module],
    settings: LoopSettings,
    total_steps: int,
    fused: bool | None = None,
) -> tuple[dict[str, Optimizer], list[LambdaLR]]:
    """Return an optimiser for each module, by name, and the schedules of their learning rates."""
    optimizers = {name: make_optimizer(module, settings, fused) for name, module in modules.items()}
    schedulers = [
        make_scheduler(
            optimizer,
            schedule=settings.lr_schedule,
            warmup_steps=settings.warmup_steps,
            total_steps=total_steps,
            floor=settings.min_learning_rate / settings.learning_rate,
        )
        for optimizer in optimizers.values()
    ]
    return optimizers, schedulers


def make_optimizer(
    module: nn.Module, settings: LoopSettings, fused: bool | None = None
) -> torch.optim.AdamW:
    """Return AdamW over what is trained; without weight decay, the default, it is Adam to the bit.

    Decay is of matrices alone: norms, biases and other vectors stay free, as is usual for transformers. They
    are groups of their own at any decay, so that a checkpoint fits a run with another one.

    Args:
        fused: whether a step is one kernel; None leaves it to torch.
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
        fused=fused,
    )
    optimizer.register_load_state_dict_pre_hook(
        lambda optimizer, state: _fuse_alike(
            optimizer, _split_group(optimizer, state, order) or state
        )
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


def rate_factor(step: int, *, warmup_steps: int, total_steps: int | None, floor: float) -> float:
    """Return the factor on the learning rate at a step, counted from 0 (fixture losses_image, lr_schedule).

    The warm-up begins at 0. `total_steps` None means constant afterwards; otherwise a cosine falls to
    `floor` (a factor) at total_steps and stays there.
    """
    if step < warmup_steps:
        return step / warmup_steps
    if total_steps is None:
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return max(floor, 0.5 * (1.0 + math.cos(math.pi * progress)))


def make_scheduler(
    optimizer: Optimizer, *, schedule: str, warmup_steps: int, total_steps: int, floor: float
) -> LambdaLR:
    """Return a scheduler to be stepped once per optimiser step, whatever the number of processes."""
    horizon = total_steps if schedule == "cosine" else None
    return LambdaLR(
        optimizer,
        lambda step: rate_factor(step, warmup_steps=warmup_steps, total_steps=horizon, floor=floor),
    )


def step_all(schedulers: list[LambdaLR]) -> None:
    """Step the schedules once. Rates follow the run's steps, also where an optimiser skipped one or waits."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of .lr_scheduler.step")
        for scheduler in schedulers:
            scheduler.step()


def set_peak_rate(scheduler: LambdaLR, learning_rate: float) -> None:
    """Let a loaded scheduler lead to this peak: its state brings that of the checkpoint along."""
    scheduler.base_lrs = [learning_rate] * len(scheduler.base_lrs)
    rates = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["initial_lr"], group["lr"] = learning_rate, rate
    scheduler._last_lr = rates


def _fuse_alike(optimizer: Optimizer, state: dict) -> dict:
    """Return a state that takes steps as this run does: whether they are fused is a matter of its device."""
    fused = optimizer.defaults["fused"]
    groups = [group | {"fused": fused} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


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
