"""The commands behind docs/results.md, at a size of seconds."""

import importlib
import json
import math
import shutil
import sys
from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image

from tests.support import programs
from tests.training.support.recordings import RATE, noise
from training.experiments import code_samples, report, runs, which_k
from training.metrics.inception import frechet_distance

REPOSITORY = Path(__file__).parents[3]
TINY = [
    "resolution=32",
    "max_steps=2",
    "warmup_steps=0",
    "validate_every=1",
    "batch_size=4",
    "codebook_dim=8",
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("validation", 6)):
        (folder / split).mkdir()
        for number in range(count):
            pixels = generator.integers(0, 256, (36, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("work")


def command(name: str, pictures: Path, work: Path, output: Path, *words: str):
    words = ["--work", work, "--output", output, f"dataset={pictures}", *TINY, *words]
    module = f"training.experiments.{name}"
    return programs.run("-m", module, *words, cwd=REPOSITORY)


@pytest.mark.soak
@pytest.mark.slow
def test_collapse_compares_the_systems_and_runs_nothing_twice(
    pictures, work, tmp_path, monkeypatch
):
    pytest.importorskip("vector_quantize_pytorch")
    here(monkeypatch, "collapse", pictures, work, tmp_path, "--sizes", "1024")
    found = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [run["variant"].split(",")[0] for run in found] == [
        "SimVQ", "VQGAN", "VQGAN-EMA", "VQGAN-FC", "FSQ", "LFQ",
    ]  # fmt: skip
    for run in found:
        assert "error" not in run, run
        assert 0 < run["metrics"]["train_utilisation"] <= 1 and run["metrics"]["psnr"] > 3
        assert run["settings"]["dataset"] == pictures.name  # no path of this machine
        assert [figures["step"] for figures in run["history"]] == [1, 2]
    page = (tmp_path / "README.md").read_text()
    assert all(run["hash"] in page for run in found) and "FSQ, K = 1,024" in page
    assert Image.open(tmp_path / "figure.png").size[0] > 600
    times = {path: path.stat().st_mtime_ns for path in work.glob("*/result.json")}
    assert len(times) == 6
    done = command("collapse", pictures, work, tmp_path / "again", "--sizes", "1024")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "again" / "results.json").read_text())["runs"] == found
    assert times == {path: path.stat().st_mtime_ns for path in work.glob("*/result.json")}


@pytest.mark.soak
@pytest.mark.slow
def test_a_run_has_a_process_of_its_own(pictures, tmp_path):
    done = command("rank", pictures, tmp_path / "work", tmp_path / "out", "--sizes", "32")
    assert done.returncode == 0, done.stderr
    (run,) = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert "error" not in run and run["metrics"]["psnr"] > 3


class InThisProcess(Executor):
    """In the place of processes, which take seconds to start."""

    def __init__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


def here(
    monkeypatch, name: str, dataset: Path, work: Path, output: Path, *words: str, sizes: list = TINY
) -> None:
    places = ["--work", str(work), "--output", str(output), f"dataset={dataset}"]
    monkeypatch.setattr(sys, "argv", [name, *places, *sizes, *words])
    monkeypatch.setattr(runs, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    importlib.import_module(f"training.experiments.{name}").main()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "remedies",
        # The same machinery; each takes as long as the first.
        *(
            pytest.param(name, marks=pytest.mark.soak)
            for name in (
                "trained_parts",
                "initialisation",
                "warmup",
                "long_training",
                "rank",
                "larger",
            )
        ),
    ],
)
def test_each_claim_has_a_command(name, pictures, work, tmp_path, monkeypatch):
    if name == "remedies":  # the options have tests of their own
        module = importlib.import_module("training.experiments.remedies")
        some = dict(list(module.remedies(4, 32).items())[4:13:4])
        monkeypatch.setattr(module, "remedies", lambda steps, width: some)
    steps = ["max_steps=4", "validate_every=2"]
    here(monkeypatch, name, pictures, work, tmp_path, "--sizes", "32", *steps)
    found = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert found and not [run for run in found if "error" in run], found
    assert (tmp_path / "figure.png").stat().st_size > 5000
    rows = [line for line in (tmp_path / "README.md").read_text().splitlines() if "K = 32" in line]
    assert len([row for row in rows if row.startswith("|")]) == len(found)


@pytest.mark.soak
@pytest.mark.slow
def test_prefixes_are_compared_at_equal_bits(pictures, work, tmp_path, monkeypatch):
    steps = ["max_steps=4", "validate_every=2"]
    here(monkeypatch, "prefixes", pictures, work, tmp_path, "--sizes", "8", *steps)
    found = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert not [run for run in found if "error" in run], found
    assert [run["settings"]["codebook_size"] for run in found] == [8, 64, 512, 4096, 8, 8, 8]
    rows = [line.split(" | ") for line in (tmp_path / "README.md").read_text().splitlines()]
    bits = {}
    for name, number, *_ in (row for row in rows if len(row) == 5 and row[1][:1].isdigit()):
        bits.setdefault(name.strip("| "), []).append(int(number))
    assert list(bits) == [
        "one codebook each",
        *("residual, 4 of K = 8", "grouped, 4 of K = 8", "residual without dropout, 4 of K = 8"),
    ]
    assert all(each == [3, 6, 9, 12] for each in bits.values())


TINY_CODE_MODELS = {
    **{"num_workers": 0, "label_column": None, "tracker": "none", "samples": 0},
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "batch_size": 4, "max_steps": 2, "validate_every": 2},
}


class FewFeatures(torch.nn.Module):
    """In the place of Inception."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pictures.float() / 255, 2).flatten(1)


@pytest.mark.slow
def test_which_k_trains_a_code_model_over_each_tokenizer(pictures, work, tmp_path, monkeypatch):
    monkeypatch.setattr(code_samples, "load_inception", FewFeatures)
    monkeypatch.setattr(code_samples, "frechet_distance", partial(frechet_distance, width=12))
    monkeypatch.setattr(code_samples, "SAMPLES", 5)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY_CODE_MODELS))
    words = ["--sizes", "16,24", "--code-models", str(tmp_path / "tiny.yaml")]
    out = tmp_path / "out"
    here(monkeypatch, "which_k", pictures, work, out, *words)
    found = json.loads((out / "results.json").read_text())
    for name, task in (("runs", "images"), ("code_models", "code_models")):
        assert [run["variant"] for run in found[name]] == ["K = 16", "K = 24"]
        for run in found[name]:
            assert "error" not in run, run
            assert runs.config_hash(run["settings"], task) == run["hash"]
    assert [run["settings"]["tokenizer"] for run in found["code_models"]] == [
        run["hash"] for run in found["runs"]
    ]
    for size, run in zip((16, 24), found["code_models"], strict=True):
        figures = run["metrics"]
        assert (
            len(figures["bits_by_position"]) == 64
            and math.prod(run["settings"]["code_factors"]) == size
        )
        assert figures["bits"] == pytest.approx(sum(figures["bits_by_position"]))
        # Two steps learn next to nothing: about a guess.
        assert 0.9 < figures["bits"] / 64 / math.log2(size) < 1.1
        assert sum(figures["prefix_entropies"]) == pytest.approx(math.log2(12))
        assert figures["gfid"] > 0 and figures["floor_fid"] > 0
        assert (work / run["hash"] / "samples.json").is_file()
    page = (out / "README.md").read_text()
    assert "2 steps of 4 images" in page and "rank correlation" not in page  # of so few runs
    assert (out / "figure.png").stat().st_size > 5000
    # What is not done is left out, on request, and what is done is not done again.
    times = {path: path.stat().st_mtime_ns for path in work.glob("*/result.json")}
    words[1] = "16,24,64"
    here(monkeypatch, "which_k", pictures, work, tmp_path / "again", *words, "--finished")
    assert json.loads((tmp_path / "again" / "results.json").read_text()) == found
    assert times == {path: path.stat().st_mtime_ns for path in work.glob("*/result.json")}


def test_which_k_says_how_cheap_figures_order_the_runs():
    cheap = dict.fromkeys(which_k.CHEAP, 1.0) | {"bits_by_position": [1.0, 2.0]}
    found = [
        cheap
        | {"bits": 3.0, "gfid": gfid, "floor_fid": 9.0 - 9 * bits}
        | {"neighbour_bits": bits, "uniform_bits": 2.0 + bits}
        for gfid, bits in ((30.0, 1.0), (25.0, 2.0), (20.0, 3.0))
    ]
    found = [{"metrics": metrics, "tokenizer": {"psnr": 20.0}} for metrics in found]
    rows = which_k.rank_table(which_k.with_tokenizers([*found, {"error": "", "tokenizer": {}}]))
    assert rows[1].startswith("| rank correlation with | bits an image (3 runs) |")
    cells = [row.split(" | ") for row in rows if "neighbours |" in row]
    assert cells[0][2:] == ["-1.00", "-1.00", "+1.00 |"]
    assert "| held-out codes that no other image has |  |  |  |  |" in rows  # all alike
    assert which_k.rank_table(which_k.with_tokenizers(found[:2])) == []
    assert which_k.factors_of(8192) == [64, 128] and which_k.factors_of(7) == [1, 7]


@pytest.mark.soak
@pytest.mark.slow
def test_a_tokenizer_without_its_model_is_trained_again(pictures, work, tmp_path, monkeypatch):
    here(monkeypatch, "rank", pictures, work, tmp_path, "--sizes", "20")
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    shutil.rmtree(work / run["hash"] / "model")
    plan = runs.parse_plan("rank", "", [20], ["--work", str(work), f"dataset={pictures}", *TINY])
    variants = {"again": {"codebook_size": 20}}
    finished = replace(plan, start=False)
    assert runs.run_all(finished, variants)[0]["metrics"] == run["metrics"]
    assert runs.run_all(finished, variants, with_model=True) == []
    with pytest.raises(SystemExit, match="no run in .* is finished"):
        here(monkeypatch, "rank", pictures, tmp_path / "empty", tmp_path / "other", "--finished")
    assert not (tmp_path / "other").exists()
    runs.run_all(plan, variants, with_model=True)
    assert (work / run["hash"] / "model").is_dir()


TINY_SPEECH = ["sampling_rate=8000", "clip_seconds=0.32", "num_filters=2", "hidden_size=32"]
TINY_SPEECH += [
    "downsampling_ratios=[4,4]",
    "n_fft=32",
    "intermediate_size=32",
    "num_decoder_layers=1",
]
TINY_SPEECH += [
    "max_steps=3",
    "batch_size=2",
    "mel_windows=[512]",
    "validate_every=3",
    "warmup_steps=0",
]
TINY_SPEECH += ["tracker=none"]


@pytest.mark.soak
@pytest.mark.slow
def test_the_claim_for_speech(work, tmp_path, monkeypatch):
    pytest.importorskip("vector_quantize_pytorch")
    for split, count in (("train", 3), ("validation", 1)):
        (tmp_path / "speech" / split).mkdir(parents=True)
        for number in range(count):
            file = tmp_path / "speech" / split / f"{number}.wav"
            soundfile.write(file, noise(8000, seed=number), RATE)
    words = ["--sizes", "32", "autoencoder_steps=1"]
    dataset, out = tmp_path / "speech", tmp_path / "out"
    here(monkeypatch, "speech", dataset, work, out, *words, sizes=TINY_SPEECH)
    found = json.loads((out / "results.json").read_text())["runs"]
    assert not [run for run in found if "error" in run], found
    assert len({run["hash"] for run in found}) == len(found) == 5
    for run in found:
        assert run["metrics"]["train_tokens_per_code"] == 3 * 500 / 32
        assert 0 < run["metrics"]["train_utilisation"] <= 1 and "stoi" in run["metrics"]
    page = (out / "README.md").read_text()
    assert "VQGAN, K = 32, whitened latents" in page and "3 steps of 2 crops of 0.32 s" in page


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_others(pictures, work, tmp_path, monkeypatch):
    pytest.importorskip("vector_quantize_pytorch")
    monkeypatch.setattr("training.experiments.collapse.PAPER", ["simvq", "fsq"])
    # No levels of FSQ multiply to 32.
    here(monkeypatch, "collapse", pictures, work, tmp_path, "--sizes", "32")
    found = json.loads((tmp_path / "results.json").read_text())["runs"]
    errors = {run["variant"]: run["error"] for run in found if "error" in run}
    assert list(errors) == ["FSQ, K = 32"] and "fsq knows levels" in errors["FSQ, K = 32"]
    assert "fsq knows levels" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("sped=3", "unknown setting 'sped'"),
        ("dataset=null", "dataset"),
        ("--sizes=64,many", "whole numbers with commas between, got '64,many'"),
        ("--sizes=0", "at least 1 code, got 0"),
        ("--seeds=x", "whole numbers"),
    ],
)
def test_mistakes_end_in_one_line(word, message, pictures, work, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        here(monkeypatch, "rank", pictures, work, tmp_path, word)
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_the_hash_knows_settings_and_not_places():
    base = {"dataset": "/somewhere/pictures", "codebook_size": 64}
    key = runs.config_hash(base)
    assert runs.config_hash(base | {"dataset": "/elsewhere/pictures", "output_dir": "x"}) == key
    assert runs.config_hash(base | {"quantizer": "simvq"}) == key  # the default, said aloud
    for change in ({"codebook_size": 65}, {"seed": 1}, {"quantizer_options": {"basis_dim": 4}}):
        assert runs.config_hash(base | change) != key


def test_recorded_runs_keep_their_hashes():
    """A setting that comes later must not make them other runs."""
    recorded = [
        run
        for file in (REPOSITORY / "docs" / "results").glob("*/results.json")
        for run in json.loads(file.read_text()).get("runs", [])
        if "dataset" in run.get("settings", {}) and not run["settings"].get("codebook_features")
    ]
    assert len(recorded) >= 40
    for run in recorded:
        task = "speech" if "sampling_rate" in run["settings"] else "images"
        assert runs.config_hash(run["settings"], task) == run["hash"], run["variant"]


def test_the_table_has_means_over_seeds_and_the_last_validation():
    found = [
        {"variant": "A", "hash": "a1", "metrics": {"psnr": 20.0}, "history": [{"rank_w": 3.0}]},
        {"variant": "A", "hash": "a2", "metrics": {"psnr": 22.0}, "history": [{"rank_w": 5.0}]},
        {"variant": "B", "hash": "b", "error": "ValueError: no"},
    ]
    rows = report.table(found, ["psnr", "rank_w"], "system")
    assert rows[2] == "| A | 21.00 ± 1.41 | 4.0 ± 1.4 | `a1`, `a2` |"
    assert rows[3] == "| B |  |  | `b` failed: ValueError: no |"
