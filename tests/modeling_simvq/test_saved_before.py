"""Folders that version 0.1.0 saved before its files were renamed still load, with their code and without."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoModel

from modeling_simvq import SimVQImagePipeline
from tests.modeling_simvq.test_remote_code import BLOCK
from tests.support.programs import run

FOLDER = Path(__file__).parents[1] / "fixtures" / "saved_before"

REMOTE = """
import json, sys, torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from transformers import AutoModel

folder = sys.argv[1]
expected = load_file(folder + "/expected.safetensors")
audio = AutoModel.from_pretrained(folder + "/audio", trust_remote_code=True)
with torch.no_grad():
    said = audio(expected["samples"])
pipe = DiffusionPipeline.from_pretrained(folder + "/pipeline", trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
drawn = pipe("dog", output_type="pt", generator=torch.Generator().manual_seed(5)).images
print(json.dumps({
    "module": type(audio).__module__,
    "codes": torch.equal(said.audio_codes, expected["audio.codes"]),
    "error": float((drawn - expected["pipeline.drawn"]).abs().max()),
}))
"""


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "expected.safetensors")


@pytest.mark.parametrize("name", ["pipeline", "fsq", "options"])
def test_image_tokenizers(name, expected):
    folder = FOLDER / name / ("tokenizer" if name == "pipeline" else "")
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        output = model(expected["pixels"])
    assert torch.equal(output.image_codes, expected[f"{name}.codes"])
    torch.testing.assert_close(output.pixel_values, expected[f"{name}.output"])
    processor = folder.parent / "processor" if name == "pipeline" else folder
    assert AutoImageProcessor.from_pretrained(processor).size_divisor == 2


def test_audio_tokenizer(expected):
    model = AutoModel.from_pretrained(FOLDER / "audio")
    with torch.no_grad():
        output = model(expected["samples"])
    assert torch.equal(output.audio_codes, expected["audio.codes"])
    torch.testing.assert_close(output.audio_values, expected["audio.output"])
    assert AutoFeatureExtractor.from_pretrained(FOLDER / "audio").hop_length == 8


def test_pipeline(expected):
    pipe = SimVQImagePipeline.from_pretrained(FOLDER / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe("dog", output_type="pt", generator=torch.Generator().manual_seed(5)).images
    torch.testing.assert_close(drawn, expected["pipeline.drawn"])


@pytest.mark.slow
def test_their_own_code_still_runs(tmp_path):
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = run("-c", BLOCK + REMOTE, FOLDER, env=environment)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout.splitlines()[-1])
    assert said["module"].startswith("transformers_modules")
    assert said["codes"] and said["error"] < 1e-5
