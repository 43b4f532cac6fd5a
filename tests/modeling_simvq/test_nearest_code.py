"""The search: the float64 answer on every kind of data, in bounded memory."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_simvq import nearest_code
from tests.support.programs import run

search = sys.modules["modeling_simvq.nearest_code_cpu"]


def exact(queries: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The float64 argmin of the distance, lowest index first; scores, as |z|^2 only costs digits."""
    queries, codes = queries.double(), codes.double()
    return (queries @ codes.T - codes.square().sum(dim=1) / 2).argmax(dim=1)


@pytest.fixture
def small_blocks(monkeypatch):
    """Many blocks, pieces and chunks of pairs, of sizes that do not divide each other."""
    monkeypatch.setattr(search, "BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr(search, "PIECE_CODES", 300)
    monkeypatch.setattr(search, "EXACT_PAIRS", 70)


@settings(max_examples=80, deadline=None)
@given(
    queries=st.integers(0, 300),
    codes=st.integers(1, 3000) | st.integers(1, 33).map(lambda groups: 64 * groups),
    width=st.integers(1, 33),
    scale=st.sampled_from([1e-6, 1.0, 1e4, 1e18]),
    seed=st.integers(0, 1000),
)
def test_random_data(queries, codes, width, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(queries, width, generator=generator) * scale
    e = torch.randn(codes, width, generator=generator)
    found = nearest_code(z, e)
    assert found.dtype == torch.int64 and torch.equal(found, exact(z, e))


@pytest.mark.parametrize("kind", ["trained", "near ties", "far from the origin"])
@pytest.mark.parametrize("count", [1, 5, 16, 17])
def test_few_queries_of_many_codes(kind, count):
    """They have tiles of their own, of more codes; 9,003 codes fill neither tiles nor groups."""
    queries, codes = data(kind)
    codes = torch.cat([codes, codes * 1.01, codes.flip(0) + 0.01])[:9003]
    assert torch.equal(nearest_code(queries[:count], codes), exact(queries[:count], codes))


def data(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    basis, z = torch.randn(3001, 32), torch.randn(500, 32)
    if kind == "trained":  # a projected codebook with an offset, and latents near its codes
        codes = basis @ torch.randn(32, 32) * 0.2 + torch.randn(32)
        return codes[torch.randint(0, 3001, (500,))] + 0.05 * z, codes
    if kind == "near ties":  # neighbours that float32 scores cannot tell apart
        codes = basis[:1500].repeat(2, 1) * (1 + 1e-6 * torch.randn(3000, 1))
        return codes[:500] + 0.1 * z, codes
    if kind == "far from the origin":
        return z + 300, basis + 300
    if kind == "lengths over ten decades":
        return z * 10 ** torch.linspace(-5, 5, 500)[:, None], basis * 10 ** torch.linspace(
            -3, 2, 3001
        )[:, None]
    if kind == "tiny codes":  # their squared norms are below what float32 holds
        return z, basis * 1e-21
    if kind == "long queries":
        return torch.nn.functional.normalize(z, dim=1) * 1e4, basis
    if kind == "very long queries":
        return z * 1e10, basis
    return z, basis


KINDS = [
    "trained",
    "near ties",
    "far from the origin",
    "lengths over ten decades",
    "long queries",
    "tiny codes",
]


@pytest.mark.parametrize("kind", [*KINDS, "very long queries", "plain"])
@pytest.mark.parametrize("way", ["whole", "blocks", "book", "projected", "small"])
def test_adversarial_data(kind, way, small_blocks, monkeypatch):
    z, e = data(kind)
    if way in ("whole", "small"):
        monkeypatch.setattr(search, "BLOCK_BYTES", 16 << 20)
    if way == "small":  # pairs of near ties stay
        e = e[::3][:960]
    if way == "book":
        found = nearest_code(z, search.make_book(e))
    elif way == "projected":
        found = nearest_code(z, e / 2, lambda rows: rows * 2)
    else:
        found = nearest_code(z, e)
    assert torch.equal(found, exact(z, e))


def test_float32_alone_would_be_wrong_on_near_ties():
    """What the second pass is for: without it these tests would see no difference."""
    z, e = data("near ties")
    plain = (z @ e.T - e.square().sum(dim=1) / 2).argmax(dim=1)
    assert (plain != exact(z, e)).float().mean() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("width", [2, 130, 5000])
@pytest.mark.parametrize("times", [30, 32])
def test_equal_codes_give_the_lowest_index(width, times, small_blocks):
    e = torch.randn(40, width).repeat(times, 1)
    assert torch.equal(nearest_code(e, e), torch.arange(40).repeat(times))
    one = torch.randn(1, width).expand(1000, width)
    assert not nearest_code(torch.randn(100, width), one).any()


@pytest.mark.parametrize("codes", [2000, 1984])
def test_queries_and_codes_that_are_not_finite(codes, small_blocks):
    torch.manual_seed(0)
    z, e = torch.randn(6, 8), torch.randn(codes, 8)
    expected = exact(z, e)
    z[1, 3], z[4, 0] = torch.nan, torch.inf
    expected[[1, 4]] = 0
    assert torch.equal(nearest_code(z, e), expected)
    e[expected[0]] = torch.nan
    e[expected[2], 1] = -torch.inf
    found, usable = nearest_code(z, e), e.isfinite().all(dim=1)
    assert usable[found[[0, 2, 3, 5]]].all() and torch.equal(found[[1, 4]], expected[[1, 4]])
    e[:] = torch.nan
    assert not nearest_code(z, e).any()


def test_a_batch_of_nan_costs_no_more_than_another(monkeypatch):
    """Not everything may become a candidate for such queries."""
    seen = []
    candidates = search._candidates
    monkeypatch.setattr(
        search, "_candidates", lambda *args: seen.append(len(args[0])) or candidates(*args)
    )
    assert not nearest_code(torch.full((500, 8), torch.nan), torch.randn(4096, 8)).any()
    assert sum(seen) <= 600


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_and_autocast_give_the_exact_answer(dtype):
    z, e = torch.randn(300, 32).to(dtype), torch.randn(900, 32).to(dtype)
    expected = exact(z.float(), e.float())
    assert torch.equal(nearest_code(z, e), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_code(z, e), expected)


def test_memory_layout_does_not_matter():
    z, e = torch.randn(32, 400).T, torch.randn(700, 64)[:, ::2]
    assert torch.equal(nearest_code(z, e), exact(z, e))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_of_lower_precision_are_repaired(precision, monkeypatch):
    """A first pass as inexact as torch's setting allows; the setting itself is read, never changed."""
    z, e = data("near ties")
    correct = exact(z, e)
    bits = {"high": 10, "medium": 7}[precision]

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return ((x.contiguous().view(torch.int32) >> (23 - bits)) << (23 - bits)).view(
            torch.float32
        )

    def product(queries, codes, half, out):
        return torch.addmm(half, rounded(queries), rounded(codes).T, out=out)

    monkeypatch.setattr(search, "plan", lambda queries, codes: (product, 512))
    wrong = (rounded(z) @ rounded(e).T + rounded(-e.square().sum(dim=1) / 2)).argmax(dim=1)
    assert not torch.equal(wrong, correct)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert torch.equal(nearest_code(z, e), correct)
    finally:
        torch.set_float32_matmul_precision(before)


def test_integers_find_the_maxima_of_positive_scores():
    scores = torch.rand(40, 5, 16)
    scores[3], scores[7, 2, :9] = -torch.inf, 0.0
    maxima = torch.empty(5, 40).T
    assert torch.equal(search._amax(scores, 1.0, out=maxima), scores.amax(dim=2))
    assert torch.equal(maxima, scores.amax(dim=2))
    scores[5] -= 2
    assert torch.equal(search._amax(scores, 0.0), scores.amax(dim=2))


@pytest.mark.parametrize("length", [7.9, 8.1])
@pytest.mark.parametrize("codes", [960, 3001])
def test_one_long_query_does_not_make_work_for_the_others(length, codes, monkeypatch):
    """What makes the scores positive must not drown them: candidates stay one or two a query."""
    torch.manual_seed(0)
    z, e = torch.randn(512, 32), torch.randn(codes, 32)
    z[3] *= length * e.norm(dim=1).max() / z[3].norm()
    pairs, scores = [], search._float64_scores
    monkeypatch.setattr(
        search, "_float64_scores", lambda *args: pairs.append(len(args[0])) or scores(*args)
    )
    assert torch.equal(nearest_code(z, e), exact(z, e))
    assert sum(pairs) < 20  # of queries with a single candidate none


def test_search_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(5, 2\)"):
        nearest_code(torch.zeros(4, 3), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="empty"):
        nearest_code(torch.zeros(4, 3), torch.zeros(0, 3))


@pytest.mark.slow
def test_compiled_and_exported_graphs_find_the_same_codes():
    z, e = torch.randn(50, 8), torch.randn(200, 8)
    expected = nearest_code(z, e)
    assert torch.equal(
        torch.compile(nearest_code, backend="aot_eager", fullgraph=True)(z, e), expected
    )

    class Search(torch.nn.Module):
        def forward(self, z, e):
            return nearest_code(z, e)

    assert torch.equal(torch.export.export(Search(), (z, e)).module()(z, e), expected)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_memory_does_not_grow_with_the_number_of_scores():
    """1,024 x 131,072 scores would be 512 MiB. In a process of its own."""
    code = """
import torch
from modeling_simvq import nearest_code
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
codes, queries = torch.randn(131_072, 32), torch.randn(1024, 32)
nearest_code(queries[:64], codes[:2048])
before = peak()
nearest_code(queries, codes)
print((peak() - before) / 1024)
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 64
