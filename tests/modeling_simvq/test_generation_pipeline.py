"""The diffusers pipeline: one repository that loads with this package and without it, here and from a Hub."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel

import modeling_simvq
from modeling_simvq import (
    SimVQAudioGenerationConfig,
    SimVQForAudioGeneration,
    SimVQForImageGeneration,
    SimVQImageGenerationConfig,
)
from tests.modeling_simvq.test_remote_code import BLOCK
from tests.support.programs import run

REMOTE = """
import json, sys, torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from transformers import AutoModel

folder, hub_name, data, again = sys.argv[1], sys.argv[2], load_file(sys.argv[3]), sys.argv[4]

try:
    DiffusionPipeline.from_pretrained(folder)
    refused = False
except ValueError as error:
    refused = "trust_remote_code" in str(error)

def check(pipe):
    pipe.set_progress_bar_config(disable=True)
    images = pipe("dog", num_images=2, guidance_scale=2.0, top_k=20, output_type="pt",
                  generator=torch.Generator().manual_seed(5)).images
    return float((images - data["images"]).abs().max())

pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
errors = [check(pipe)]
modules = [type(part).__module__ for part in (pipe, *pipe.components.values())]
pipe.save_pretrained(again)
errors.append(check(DiffusionPipeline.from_pretrained(again, trust_remote_code=True)))
errors.append(check(DiffusionPipeline.from_pretrained(hub_name, trust_remote_code=True)))
half = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
part = AutoModel.from_pretrained(hub_name, subfolder="transformer", trust_remote_code=True)
print(json.dumps({
    "refused": refused,
    "errors": errors,
    "modules": modules,
    "dtype": str(half.transformer.dtype),
    "part": type(part).__name__,
}))
"""


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    tokenizer = AutoModel.from_pretrained(tiny_folder)
    torch.manual_seed(0)
    config = SimVQImageGenerationConfig(
        codebook_size=tokenizer.config.codebook_size,
        num_classes=2,
        grid_size=(3, 4),
        id2label={0: "tabby, tabby cat", 1: "dog"},
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    processor = AutoImageProcessor.from_pretrained(tiny_folder)
    transformer = SimVQForImageGeneration(config).eval()
    pipe = modeling_simvq.SimVQImagePipeline(tokenizer, transformer, processor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, **how):
    generator = torch.Generator().manual_seed(5)
    return pipe(
        "dog", num_images=2, guidance_scale=2.0, top_k=20, generator=generator, **how
    ).images


def test_pictures(pipe, capsys):
    images = sample(pipe)
    factor = pipe.tokenizer.config.downsample_factor
    assert [image.size for image in images] == [(4 * factor, 3 * factor)] * 2
    assert all((x != y for x, y in zip(images, sample(pipe), strict=True))) is False
    # Names, parts of names and numbers; batches; a bar that moves to its end.
    pipe.set_progress_bar_config(disable=False)
    many = pipe(["tabby", 1, None, "Tabby, tabby CAT"], num_images=2, batch_size=3).images
    assert len(many) == 8 and "36/36" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    labels = ["tabby", "dog", "tabby cat", 0, None]
    assert [pipe.class_label(label) for label in labels] == [0, 1, 0, 0, 2]


def test_impossible_wishes_are_named(pipe, tiny_model):
    for arguments, words in (
        ({"classes": "dgo"}, "'dgo'.*'dog'"),
        ({"classes": 3}, "3 .*0 to 1"),
        ({"classes": []}, "empty"),
        ({"num_images": 0}, "num_images .* 0"),
        ({"batch_size": -1}, "batch_size .* -1"),
        ({"output_type": "jpg"}, "output_type .*'jpg'"),
        ({"temperature": -1.0}, "temperature .* -1"),
    ):
        with pytest.raises(ValueError, match=words):
            pipe(**arguments)
    other = SimVQForImageGeneration(
        SimVQImageGenerationConfig(
            codebook_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2
        )
    )
    with pytest.raises(ValueError, match="64 codes.* 8"):
        modeling_simvq.SimVQImagePipeline(tiny_model, other, pipe.processor)


@pytest.mark.slow
def test_one_repository_with_and_without_the_package(pipe, hub, tmp_path):
    folder = tmp_path / "repository"
    pipe.save_pretrained(folder)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*.*")}
    assert {"model_index.json", "pipeline_simvq_image.py", "quantization_baselines.py"} <= names
    for part in ("tokenizer", "transformer"):
        assert {f"{part}/model.safetensors", f"{part}/config.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    # With the package, and no remote code.
    expected = sample(pipe, output_type="pt")
    loaded = modeling_simvq.SimVQImagePipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(sample(loaded, output_type="pt"), expected)
    assert type(loaded.transformer) is SimVQForImageGeneration
    # Without it, from the folder, from what is saved again, and from a Hub.
    pipe.push_to_hub("maker/pictures", token=hub.token)
    data = tmp_path / "data.safetensors"
    save_file({"images": expected}, data)
    environment = os.environ | hub.environment(tmp_path / "hf")
    environment.pop("PYTHONPATH", None)
    arguments = [folder, "maker/pictures", data, tmp_path / "again"]
    done = run("-c", BLOCK + REMOTE, *arguments, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["refused"] and max(result["errors"]) < 1e-5, result
    assert result["dtype"] == "torch.bfloat16" and result["part"] == "SimVQForImageGeneration"
    assert all(
        module.startswith(("diffusers_modules.", "transformers_modules."))
        for module in result["modules"]
    ), result
    # The package loads what was saved without it, and what lies on the Hub.
    for place in (tmp_path / "again", "maker/pictures"):
        loaded = modeling_simvq.SimVQImagePipeline.from_pretrained(place)
        loaded.set_progress_bar_config(disable=True)
        torch.testing.assert_close(sample(loaded, output_type="pt"), expected)


def test_speech_goes_on(tiny_audio_model, waveform):
    """The README's way: waveform, codes, more codes, waveform."""
    tokenizer = tiny_audio_model
    config = SimVQAudioGenerationConfig(
        codebook_size=tokenizer.config.codebook_size,
        max_codes=400,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = SimVQForAudioGeneration(config).eval()
    with torch.no_grad():
        prompt = tokenizer.encode(waveform[..., :24000]).audio_codes
        made = model.generate_audio(round(0.5 * tokenizer.config.frame_rate), prompt)
        decoded = tokenizer.decode(made.audio_codes, audio_codes_mask=made.audio_codes_mask)
    length = prompt.shape[2] + round(0.5 * tokenizer.config.frame_rate)
    assert decoded.audio_values.shape == (1, 1, length * tokenizer.config.hop_length)
    assert decoded.audio_values.isfinite().all()
