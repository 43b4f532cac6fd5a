"""Engines take the tokens that the model takes: transformers' Llama, llama.cpp, and one that does not."""

import json
import sys
import urllib.request

import pytest
import torch

from modeling_simvq import export_gguf
from tests.benchmarks.test_generator_benchmarks import load
from tests.modeling_simvq.test_export_generator import varied
from tests.modeling_simvq.test_generation import image_model

SMALL = ["--codes", "64", "--width", "64", "--layers", "2", "--tokens", "60"]


def rows_of(arguments: list[str], monkeypatch, capsys) -> dict[str, list[str]]:
    engines = load("engines")
    monkeypatch.setattr(sys, "argv", ["engines.py", *arguments])
    engines.main()
    table = capsys.readouterr().out.split("|---|---|---|---|---|\n")[1]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    return {row[0]: row[1:] for row in cells}


@pytest.mark.slow
def test_llama_and_llama_cpp_take_the_same_tokens(monkeypatch, capsys):
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    rows = rows_of(SMALL, monkeypatch, capsys)
    assert list(rows) == ["LlamaForCausalLM", "llama.cpp"]
    for _, equal, ties, worst in rows.values():
        assert int(equal) + int(ties) == 60 and float(worst) < 1e-2


@pytest.mark.slow
def test_a_trained_model_begins_with_each_class(monkeypatch, capsys, tmp_path):
    varied(image_model()).save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--tokens", "40", "--skip-llama-cpp"]
    (row,) = rows_of(arguments, monkeypatch, capsys).values()
    assert int(row[1]) + int(row[2]) == 48  # four whole images of 12 codes


@pytest.mark.slow
def test_llama_cpp_reads_class_tokens_and_samples_only_codes(tmp_path):
    pytest.importorskip("gguf")
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(export_gguf(varied(image_model()), tmp_path / "out"))
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 13, 1, 0
    params.warmup, params.verbosity = False, 0
    server = xllamacpp.Server(params)

    def post(path: str, body: dict) -> dict:
        request = urllib.request.Request(
            server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    text = "<|image_class_1|><|image_code_31|><|image_end|>"
    assert post("/tokenize", {"content": text, "parse_special": True})["tokens"] == [33, 31, 35]
    # Without a limit an image ends with the model's positions, and the file's settings sample from all codes.
    made = post("/completion", {"prompt": "<|image_class_1|>", "return_tokens": True, "seed": 1})
    assert len(made["tokens"]) == 12 and max(made["tokens"]) < 32
    settings = made["generation_settings"]
    assert (settings["temperature"], settings["top_k"], settings["top_p"]) == (1.0, 0, 1.0)
    hot = {"prompt": [34], "n_predict": 12, "temperature": 100.0, "return_tokens": True}
    assert max(post("/completion", hot)["tokens"]) < 32


def test_a_difference_is_a_near_tie_or_an_error():
    compare = load("engines").compare
    own = [3, 1, 2]
    logits = torch.zeros(3, 4)
    logits[[0, 1, 2], own] = 1.0
    logits[1, 0] = 1.0 - 5e-5
    chances = [float(row.log_softmax(-1)[token]) for row, token in zip(logits, own, strict=True)]
    asked = []

    def engine(ids: list[int], count: int) -> tuple[list[int], list[float]]:
        asked.append(ids)
        return ([3, 0, 0], chances) if len(ids) == 1 else (own[-count:], chances[-count:])

    assert compare(engine, 9, own, logits, margin=1e-4) == (2, 1, 0.0)
    assert asked == [[9], [9, 3, 1]]
    with pytest.raises(SystemExit, match="token 1 after 9: the engine takes 0, the model 1"):
        compare(engine, 9, own, logits, margin=1e-5)
    with pytest.raises(SystemExit, match="stopped after 1 of 3"):
        compare(lambda ids, count: ([3], chances[:1]), 9, own, logits, margin=1e-4)
