"""Learning-rate schedule: linear warm-up, then constant or cosine."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def rate_factor(step: int, *, warmup_steps: int, total_steps: int | None, floor: float) -> float:
    """Factor on the learning rate at an optimiser step, counted from 0 (fixture losses_image, lr_schedule).

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
    """Scheduler to be stepped once per optimiser step, whatever the number of processes."""
    horizon = total_steps if schedule == "cosine" else None
    return LambdaLR(
        optimizer,
        lambda step: rate_factor(step, warmup_steps=warmup_steps, total_steps=horizon, floor=floor),
    )


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
