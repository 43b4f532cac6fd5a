"""The benchmark compares like with like, and prints every figure that it measured."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "benchmarks" / "quantizer.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("quantizer_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_published_formulation_is_the_same_computation(benchmark):
    torch.manual_seed(0)
    theirs, ours = benchmark.Published(300, 8), benchmark.make("ours", 300, 8, "cpu")
    ours.load_state_dict(theirs.state_dict())
    results = []
    for module in (ours, theirs):
        module.zero_grad()
        latents = torch.randn(
            2, 8, 4, 4, generator=torch.Generator().manual_seed(1)
        ).requires_grad_()
        quantized, codes, loss = module(latents)
        (quantized.square().sum() + loss).backward()
        weights = (module.projection.weight.grad, module.projection.bias.grad)
        results.append((quantized, codes.flatten(), loss, latents.grad, *weights))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_all_figures_of_a_size_reach_the_table(benchmark, capsys):
    names = ["ours", "published"]
    row = benchmark.measure(128, 256, 8, 1, "cpu", names)
    row["peak"] = dict.fromkeys(names, 12.0)
    assert row["search"] > 0 and row["product"] > 0 and set(row["step"]) == set(names)
    decoding = benchmark.measure_decoding(128, 256, 8, 1, "cpu", names)
    assert decoding["decode"]["ours"] > 0
    benchmark.show([row], names)
    header, line, cells = capsys.readouterr().out.splitlines()
    assert header.count("|") == line.count("|") == cells.count("|")
    assert f"{1e3 * row['step']['ours']:,.1f}" in cells


def test_the_search_alone(benchmark, capsys, monkeypatch):
    words = ["quantizer.py", "--search", "--runs", "1", "--size", "4096,2048,16"]
    monkeypatch.setattr("sys.argv", words)
    benchmark.main()
    row = capsys.readouterr().out.splitlines()[-1]
    cells = [cell.strip().replace(",", "") for cell in row.strip("|").split("|")]
    assert cells[:3] == ["4096", "2048", "16"]
    search, product, share = (float(cell.rstrip("%")) for cell in cells[3:])
    assert search > 0 and product > 0 and share == pytest.approx(100 * product / search, rel=0.2)


def test_what_runs_out_of_memory_is_not_a_figure(benchmark):
    def fails():
        raise MemoryError

    times = benchmark.interleaved({"fails": fails, "runs": lambda: None}, 3, "cpu")
    assert math.isnan(times["fails"]) and times["runs"] >= 0


def test_the_products_alone(benchmark, capsys, monkeypatch):
    words = ["quantizer.py", "--products", "--runs", "1", "--size", "512,512,16"]
    monkeypatch.setattr("sys.argv", words)
    benchmark.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 512")]
    times = [float(row.split("|")[5].replace(",", "")) for row in rows]
    assert times == sorted(times) and {row.split("|")[4].split()[0] for row in rows} == {
        "mm",
        "convolution",
    }


def test_systems_that_do_not_fit_into_memory_are_left_out(benchmark, monkeypatch):
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}  # 4 MB
    monkeypatch.setattr(benchmark.os, "sysconf", sizes.get)
    row = benchmark.measure(2048, 256, 8, 1, "cpu", ["ours", "published"])
    assert row["step"]["ours"] > 0 and math.isnan(row["step"]["published"])
    assert math.isnan(benchmark.peak_memory("published", 2048, 256, 8, "cpu"))
