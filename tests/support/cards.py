"""Graphics cards that are not there: what torch says of one, and the kernels compiled for it.

torch.cuda answers for the card, tensors are fake ones "on" it, and a kernel's launch is written down instead of
made. So the code under test chooses its block sizes exactly as it would there.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch

from modeling_simvq import nearest_code_triton


class Card(NamedTuple):
    """Limits of a card, by Nvidia's tables of compute capabilities.

    Attributes:
        capability: 80 for sm_80.
        shared: bytes of shared memory that one block may ask for.
        registers: that one block may have.
    """

    capability: int
    multiprocessors: int
    shared: int
    registers: int = 65_536


T4 = Card(75, 40, 64 << 10)
A100 = Card(80, 108, 163 << 10)
RTX_3090 = Card(86, 82, 99 << 10)
H100 = Card(90, 132, 227 << 10)
RTX_5090 = Card(120, 170, 99 << 10)


class Launch(NamedTuple):
    """Launch of a kernel, as it was asked for."""

    kernel: object
    grid: tuple[int, ...]
    arguments: tuple
    options: dict

    @property
    def name(self) -> str:
        return self.kernel.__name__


class Compiled(NamedTuple):
    """Needs of a compiled kernel.

    Attributes:
        threads: of a block.
        registers: of a thread.
        stack, local: bytes of a thread in slow memory, where registers are spilled to.
        shared: bytes of shared memory of a block.
    """

    threads: int
    registers: int
    stack: int
    local: int
    shared: int
    ptx: str


@contextmanager
def described(card: Card) -> Iterator[None]:
    """Let torch.cuda speak of this card; nothing can run on it."""
    answers: dict[str, Callable] = {
        "get_device_capability": lambda device=None: divmod(card.capability, 10),
        "get_device_properties": lambda device=None: SimpleNamespace(
            multi_processor_count=card.multiprocessors, shared_memory_per_block_optin=card.shared
        ),
        "device": lambda device: nullcontext(),
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        yield


@contextmanager
def launches_noted() -> Iterator[list[Launch]]:
    """Note the launches of the search's kernels, and make none."""
    noted: list[Launch] = []

    class Noting:
        def __init__(self, kernel: object):
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **options: noted.append(
                Launch(self.kernel, grid, arguments, options)
            )

    with ExitStack() as stack:
        for name in ("_maxima_kernel", "_resolve_kernel"):
            kernel = Noting(getattr(nearest_code_triton, name))
            stack.enter_context(mock.patch.object(nearest_code_triton, name, kernel))
        yield noted


def compile_for(card: Card, launch: Launch) -> Compiled:
    """Compile what was launched, for its types and alignments, as Triton does before it runs a kernel."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import MockTensor

    # Triton keeps what it compiled by device: a number for each card.
    there = SimpleNamespace(
        get_current_device=lambda: card.capability,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", card.capability, 32),
    )
    # Of fake tensors a kernel can see only the type: torch's own begin at multiples of 512 bytes.
    arguments = [
        MockTensor(value.dtype) if isinstance(value, torch.Tensor) else value
        for value in launch.arguments
    ]
    with mock.patch.object(driver, "_active", there):
        kernel = launch.kernel.warmup(*arguments, grid=launch.grid, **launch.options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", cubin],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    registers, stack, local = (
        int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    shared, threads = kernel.metadata.shared, 32 * kernel.metadata.num_warps
    return Compiled(threads, registers, stack, local, shared, kernel.asm["ptx"])
