"""train_generator.py under FSDP on the CPU, where Accelerate would silently train whole copies.

It is told that there are GPUs; the code behind asks for the device. Started with
training/configs/accelerate/fsdp.yaml. The environment may ask for trouble: DIES_AT, a step at which the first
rank is killed, and BAD_AT, one at which the last rank's loss is NaN.
"""

import json
import os
import runpy
import signal
import sys

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType

from tests.support.programs import REPOSITORY
from training.loop.steps import LossStepper
from training.loop.trainer import Trainer
from training.runtime.sharding import own_part

_save_model, _backward = Trainer._save_model, LossStepper._backward
_losses = 0


def say_shares(trainer: Trainer, *args, **options) -> None:
    """Before the model is saved: how much of everything this rank has held."""
    state = trainer.stepper.optimizers["generator"].state_dict()["state"]
    moments = [values["exp_avg"] for values in state.values()]
    parameters, averaged = (list(m.parameters()) for m in (trainer.model, trainer.ema.module))
    shares = [
        sum(own_part(tensor).numel() for tensor in tensors)
        / sum(tensor.numel() for tensor in tensors)
        for tensors in (parameters, averaged, moments)
    ]
    # A file each: lines of two ranks on one pipe may run into each other.
    (trainer.output_dir / f"shares-{dist.get_rank()}.json").write_text(json.dumps(shares))
    _save_model(trainer, *args, **options)


def make_trouble(stepper: LossStepper, loss) -> None:
    """In place of the backward pass."""
    global _losses
    rank, step = dist.get_rank(), _losses
    _losses += 1
    if rank == 0 and os.environ.get("DIES_AT") == str(step):
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == dist.get_world_size() - 1 and os.environ.get("BAD_AT") == str(step):
        loss = loss * float("nan")
    _backward(stepper, loss)


if __name__ == "__main__":
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    Trainer._save_model, LossStepper._backward = say_shares, make_trouble
    sys.argv[0] = str(REPOSITORY / "training" / "train_generator.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
