"""FSDP2 through Accelerate on the CPU: two ranks, each with half of a tiny Llama, against one whole.

Started with training/configs/accelerate/fsdp.yaml. Accelerate offers FSDP for GPUs alone and falls back to
DistributedDataParallel here, so this tells it that there are some; the code behind asks for the device.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from training.processes import end_processes

STEPS = 3
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)


def build() -> tuple[LlamaForCausalLM, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    return model, torch.optim.AdamW(model.parameters(), 1e-2)


def main(folder: Path) -> None:
    state = PartialState(cpu=True)
    seen = str(state.distributed_type)
    state.distributed_type = DistributedType.MULTI_GPU
    accelerator = Accelerator(cpu=True)
    rank, count = accelerator.process_index, accelerator.num_processes
    codes = torch.randint(0, 64, (STEPS, 4, 16), generator=torch.Generator().manual_seed(1))

    whole, optimizer = build()
    expected = []
    for batch in codes:
        loss = whole(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))

    model, optimizer = accelerator.prepare(*build())
    parameters = dict(model.named_parameters())
    found = []
    for batch in codes:
        mine = batch.chunk(count)[rank]
        loss = model(input_ids=mine, labels=mine).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(accelerator.reduce(loss.detach().clone(), "mean")))
    here = sum(p.to_local().numel() for p in parameters.values() if isinstance(p, DTensor))
    weights = accelerator.get_state_dict(model)
    distances = {
        name: float((values - weights[name]).abs().max()) if rank == 0 else 0.0
        for name, values in whole.state_dict().items()
    }
    said = {
        "without being told": seen,
        "kind": str(accelerator.distributed_type),
        "version": accelerator.state.fsdp_plugin.fsdp_version,
        "wraps": os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"],
        "sharded": all(isinstance(p, DTensor) for p in parameters.values()),
        "here": here,
        "whole": whole.num_parameters(),
        "expected": expected,
        "found": found,
        "farthest": max(distances.values()),
    }
    (folder / f"fsdp-{rank}.json").write_text(json.dumps(said))
    del model, optimizer, parameters
    end_processes(accelerator)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
