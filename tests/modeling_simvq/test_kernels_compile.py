"""The Triton kernels compiled for cards that are not here, with the block sizes that the search takes there.

Triton's compiler and Nvidia's assembler need no GPU. What does not fit a card fails on it only when it is
launched, and what spills is only slow.
"""

import re
from functools import cache

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from modeling_simvq import nearest_code_triton as kernels
from modeling_simvq.nearest_code import nearest_code
from tests.support.cards import (
    A100,
    H100,
    RTX_3090,
    RTX_5090,
    T4,
    Card,
    Compiled,
    compile_for,
    described,
    launches_noted,
)

pytestmark = [
    pytest.mark.skipif(
        kernels.triton is None, reason="needs triton, which comes with torch for CUDA"
    ),
    pytest.mark.skipif(kernels.INTERPRETED, reason="TRITON_INTERPRET=1 compiles nothing"),
]
# Widths at which the queries are held whole on one card or both, or on none.
WIDTHS = (16, 64, 128, 512)
CASES = [(card, width) for card in (A100, H100) for width in WIDTHS]
# The smallest shared memory of each kind of tensor core; T4's take no TF32.
CASES += [(card, 128) for card in (T4, RTX_3090, RTX_5090)]
# Bytes of stack that a thread may spill registers to: two float64 numbers. The assembler for sm_80 takes 8 at a
# width of 64, to stay at 128 registers.
SPILLED = 16


@cache
def compiled(card: Card, width: int) -> dict[str, Compiled]:
    """Both kernels, by name, of a search in a training step."""
    with described(card), launches_noted() as noted, FakeTensorMode():
        queries, codes = (torch.empty(n, width, device="cuda") for n in (4096, 65_536))
        found = nearest_code(queries, codes)
    assert found.device == queries.device and found.dtype == torch.int64
    assert [launch.name for launch in noted] == ["_maxima_kernel", "_resolve_kernel"]
    return {launch.name: compile_for(card, launch) for launch in noted}


@pytest.mark.parametrize("kernel", ("_maxima_kernel", "_resolve_kernel"))
@pytest.mark.parametrize(
    ("card", "width"), CASES, ids=[f"sm_{card.capability}-{width}" for card, width in CASES]
)
def test_fits_the_card(card, width, kernel):
    made = compiled(card, width)[kernel]
    assert made.shared <= card.shared
    assert made.stack <= SPILLED and made.local == 0, "registers are spilled"
    assert made.threads * made.registers <= card.registers


@pytest.mark.parametrize("card", (A100, H100))
def test_multiplies_on_tensor_cores(card):
    pattern = r"(wgmma|mma)\.\S*\.tf32\.tf32"
    assert re.search(pattern, compiled(card, 128)["_maxima_kernel"].ptx)


@pytest.mark.parametrize("card", (A100, H100))
def test_scores_again_in_float64_with_tf32_nowhere(card):
    ptx = compiled(card, 128)["_resolve_kernel"].ptx
    assert "fma.rn.f64" in ptx and "tf32" not in ptx


def test_queries_are_held_whole_where_they_fit():
    """Then they are loaded once, not once for each group of codes."""

    def chunk(card: Card) -> int:
        with described(card), launches_noted() as noted, FakeTensorMode():
            kernels.search_gpu(*(torch.empty(300, 128, device="cuda") for _ in range(2)))
        return noted[0].options["CHUNK"]

    assert (chunk(H100), chunk(A100)) == (128, 32)
