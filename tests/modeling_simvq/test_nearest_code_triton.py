"""The Triton kernels: the float64 answer. On a GPU, and without one in Triton's interpreter.

The interpreter is chosen by a variable that Triton reads when it is imported, so this file runs itself
as a script in a process of its own, which prints what every case found.
"""

import importlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":
    # The search without the models: transformers takes longer to import than all cases to run.
    package = types.ModuleType("modeling_simvq")
    package.__path__ = [str(Path(__file__).parents[2] / "modeling_simvq")]
    sys.modules["modeling_simvq"] = package
    if "without-triton" in sys.argv:
        sys.modules["triton"] = None
search = importlib.import_module("modeling_simvq.nearest_code")
kernels = importlib.import_module("modeling_simvq.nearest_code_triton")


def exact(queries: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    queries, codes = queries.double(), codes.double()
    return (queries @ codes.T - codes.square().sum(dim=1) / 2).argmax(dim=1)


def same(z: torch.Tensor, e: torch.Tensor) -> bool:
    found = kernels.search_gpu(z, e)
    return found.dtype == torch.int64 and torch.equal(found, exact(z, e))


def sizes(queries: int, codes: int, width: int) -> Callable[[str], bool]:
    def case(device: str) -> bool:
        return same(
            torch.randn(queries, width, device=device), torch.randn(codes, width, device=device)
        )

    return case


def trained(device: str) -> bool:
    """A projected codebook with an offset, and latents near its codes."""
    basis, offset = torch.randn(1000, 16, device=device), torch.randn(16, device=device)
    e = basis @ torch.randn(16, 16, device=device) * 0.2 + offset
    return same(e[::40] + 0.05 * torch.randn(25, 16, device=device), e)


def near_ties(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Every code has a twin in another group, closer than float32 scores can tell."""
    e = torch.randn(500, 32, device=device).repeat(2, 1)
    e = e * (1 + 1e-6 * torch.randn(1000, 1, device=device))
    return e[:40] + 0.1 * torch.randn(40, 32, device=device), e


def more_groups_than_a_vector(device: str) -> bool:
    """The kernels go through the groups 128 at a time; the nearest codes are in the last of them."""
    e = torch.randn(kernels.GROUP_CODES**2 + 300, 3, device=device)
    return same(e[[0, -1, -290]], e)


def scaled(scale: float) -> Callable[[str], bool]:
    return lambda device: same(
        torch.randn(20, 16, device=device) * scale, torch.randn(1000, 16, device=device)
    )


def far_from_the_origin(device: str) -> bool:
    return same(torch.randn(20, 16, device=device) + 300, torch.randn(500, 16, device=device) + 300)


def one_length_a_code(device: str) -> bool:
    lengths = 10 ** torch.linspace(-3, 2, 1000, device=device)[:, None]
    return same(torch.randn(20, 16, device=device), torch.randn(1000, 16, device=device) * lengths)


def duplicates(device: str) -> bool:
    e = torch.randn(20, 16, device=device).repeat(15, 1)
    lowest = torch.arange(20, device=device)
    one = torch.randn(1, 16, device=device).expand(300, 16)
    equal = kernels.search_gpu(torch.randn(9, 16, device=device), one)
    return torch.equal(kernels.search_gpu(e[-20:], e), lowest) and not equal.any()


def codes_that_are_not_usable(device: str) -> bool:
    z, e = torch.randn(20, 16, device=device), torch.randn(300, 16, device=device)
    e[:128] = torch.nan  # a whole group
    e[200], e[210, 3], e[220, 0], e[230] = torch.inf, -torch.inf, torch.nan, 1e30
    usable = (e.abs() < 1e29).all(dim=1)
    expected = usable.nonzero()[:, 0][exact(z, e[usable])]
    none = kernels.search_gpu(z, torch.full_like(e, torch.nan))
    return torch.equal(kernels.search_gpu(z, e), expected) and not none.any()


def queries_in_parts(device: str) -> bool:
    """A part of two tiles and one of less than a tile."""
    before = kernels.TILE_QUERIES, kernels.MAXIMA_BYTES
    kernels.TILE_QUERIES, kernels.MAXIMA_BYTES = 32, 4 * 2 * 64  # 64 queries times 2 groups
    try:
        return sizes(84, kernels.GROUP_CODES + 50, 3)(device)
    finally:
        kernels.TILE_QUERIES, kernels.MAXIMA_BYTES = before


def cut(x: torch.Tensor) -> torch.Tensor:
    """The 10 bits of mantissa that TF32 keeps."""
    return ((x.contiguous().view(torch.int32) >> 13) << 13).view(torch.float32)


def injected_rounding(scale: float) -> Callable[[str], bool]:
    """A first pass as inexact as TF32 is repaired by the bound, and would be wrong without it."""

    def case(device: str) -> bool:
        saved = kernels._group_maxima, kernels._precision, kernels._rounding
        kernels._group_maxima = lambda z, e, half, _: saved[0](cut(z), cut(e), half, "ieee")
        kernels._precision = lambda device: "tf32"
        try:
            z, e = near_ties(device)
            e = e * scale
            repaired = same(z, e)
            kernels._rounding = lambda width, precision: 0.0
            wrong = kernels.search_gpu(z, e) != exact(z, e)
            return repaired and bool(wrong.float().mean() > 0.1)
        finally:
            kernels._group_maxima, kernels._precision, kernels._rounding = saved

    return case


def the_public_function_comes_here(device: str) -> bool:
    z, e = torch.randn(20, 24, device=device).bfloat16(), torch.randn(200, 24, device=device)
    expected = exact(z, 2 * e[:, ::2].repeat(1, 2))
    z[3, 0], expected[3] = torch.nan, 0
    calls = []
    search.search_gpu = lambda *arguments: calls.append(1) or kernels.search_gpu(*arguments)
    try:
        found = search.nearest_code(z, e, lambda rows: 2 * rows[:, ::2].repeat(1, 2))
    finally:
        search.search_gpu = kernels.search_gpu
    return len(calls) == 1 and torch.equal(found, expected)


CASES = {
    "one of each": sizes(1, 1, 3),
    "fewer codes than a group": sizes(37, 100, 16),
    "rows wider than a chunk": sizes(37, 300, 130),
    "many codes": sizes(3, 5000, 16),
    "more groups than a vector": more_groups_than_a_vector,
    "no queries": sizes(0, 10, 3),
    "trained": trained,
    "near ties": lambda device: same(*near_ties(device)),
    "long queries": scaled(1e4),
    "very long queries": scaled(1e10),
    "very short queries": scaled(1e-10),
    "far from the origin": far_from_the_origin,
    "codes of many lengths": one_length_a_code,
    "duplicates": duplicates,
    "codes that are not usable": codes_that_are_not_usable,
    "queries in parts": queries_in_parts,
    "injected rounding": injected_rounding(1.0),
    # The squares of their norms are zero in float32.
    "injected rounding, very short codes": injected_rounding(1e-25),
    "the public function": the_public_function_comes_here,
}


def run_this_file(*arguments: str, **variables: str) -> str:
    run = subprocess.run(
        [sys.executable, __file__, *arguments],
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def interpreted():
    """What every case returned in the interpreter."""
    # Interpreters before this version's fail with today's NumPy.
    pytest.importorskip("triton", minversion="3.9")
    return json.loads(run_this_file(TRITON_INTERPRET="1"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_interpreted(case, interpreted):
    assert interpreted[case] is True


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case):
    pytest.importorskip("triton")
    torch.manual_seed(0)
    assert CASES[case]("cuda")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_host():
    z, e = torch.randn(300, 64, device="cuda"), torch.randn(3000, 64, device="cuda")
    first = kernels.search_gpu(z, e)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = kernels.search_gpu(z, e)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)


def test_not_chosen_on_the_cpu():
    assert not kernels.triton_can_search(torch.randn(2, 2))


@pytest.mark.slow
def test_the_package_works_without_triton():
    run_this_file("without-triton")


def main() -> None:
    if "without-triton" in sys.argv:
        one = torch.eye(3)
        assert not kernels.triton_can_search(one)
        assert search.nearest_code(one, one).tolist() == [0, 1, 2]
        return
    # Small operators only: one thread is quickest, and beside other tests the kindest.
    torch.set_num_threads(1)
    results = {}
    for name, case in CASES.items():
        torch.manual_seed(0)
        results[name] = case("cpu")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
