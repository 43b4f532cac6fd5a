"""A saved folder loads without this package (its code travels along), and with it, without questions."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from tests.support import programs

BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_simvq", "training"):
            raise ImportError(f"{name} is blocked in this test")

sys.meta_path.insert(0, Blocked())
"""

LOAD = """
import json, sys, torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

folder, data, remote = sys.argv[1], load_file(sys.argv[2]), json.loads(sys.argv[3])
model = AutoModel.from_pretrained(folder, **remote)
processor = AutoImageProcessor.from_pretrained(folder, **remote)
pixels = processor([data["picture"]], return_tensors="pt").pixel_values
with torch.no_grad():
    output = model(pixels)
print(json.dumps({
    "module": type(model).__module__,
    "processor": type(processor).__module__,
    "frozen": not model.quantizer.basis.requires_grad,
    "codes": torch.equal(output.image_codes, data["codes"]),
    "error": float((output.pixel_values - data["reconstruction"]).abs().max()),
    "diffusers": "diffusers" in sys.modules,
    "post_process": processor.post_process(output.pixel_values)[0].size,
}))
"""


@pytest.fixture
def reference(tiny_model, tiny_folder, tmp_path):
    """A picture, and what this process makes of it."""
    from transformers import AutoImageProcessor

    generator = torch.Generator().manual_seed(3)
    picture = torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8, generator=generator)
    processor = AutoImageProcessor.from_pretrained(tiny_folder)
    with torch.no_grad():
        output = tiny_model(processor([picture], return_tensors="pt").pixel_values)
    path = tmp_path / "reference.safetensors"
    tensors = {
        "picture": picture,
        "codes": output.image_codes,
        "reconstruction": output.pixel_values,
    }
    save_file(tensors, path)
    return path


def run(program: str, tiny_folder, reference, remote: dict, tmp_path) -> tuple[dict, str]:
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_MODULES_CACHE": str(tmp_path / "hf_modules"),
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("PYTHONPATH", None)
    arguments = [str(tiny_folder), str(reference), json.dumps(remote)]
    done = programs.run("-c", program, *arguments, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def check(result: dict, stderr: str) -> None:
    assert result["frozen"] and result["codes"] and result["error"] < 1e-5, result
    assert result["post_process"] == [128, 128]
    assert not result["diffusers"]  # only the pipeline needs it, and it takes long to import
    lines = [line for line in stderr.splitlines() if line.strip() and "Loading weights" not in line]
    assert len(lines) <= 2 and "Traceback" not in stderr, stderr


@pytest.mark.slow
def test_the_folder_loads_without_the_package(tiny_folder, reference, tmp_path):
    remote = {"trust_remote_code": True}
    result, stderr = run(BLOCK + LOAD, tiny_folder, reference, remote, tmp_path)
    assert result["module"].startswith("transformers_modules.")
    assert result["processor"].startswith("transformers_modules.")
    check(result, stderr)


@pytest.mark.slow
def test_with_the_package_no_remote_code_is_needed(tiny_folder, reference, tmp_path):
    result, stderr = run("import modeling_simvq\n" + LOAD, tiny_folder, reference, {}, tmp_path)
    assert result["module"] == "modeling_simvq.modeling_simvq_image"
    assert result["processor"] == "modeling_simvq.image_processing_simvq"
    check(result, stderr)


def test_the_folder_holds_every_file_that_its_code_imports(tiny_folder):
    names = {path.name for path in tiny_folder.glob("*.py")}
    assert names == {
        "attention_in_pieces.py",
        "basis_and_projection.py",
        "bridged_codebook.py",
        "configuration_checks.py",
        "configuration_simvq_image.py",
        "configuration_simvq_tokenizer.py",
        "float32_module.py",
        "float32_product.py",
        "foldable_codebook.py",
        "group_norm.py",
        "hooked_weights.py",
        "image_processing_simvq.py",
        "index_backpropagation.py",
        "integer_codes.py",
        "kept_codebook.py",
        "latent_whitening.py",
        "lookup_free_entropy.py",
        "modeling_simvq_image.py",
        "nearest_code.py",
        "nearest_code_cpu.py",
        "nearest_code_triton.py",
        "quantization_simvq.py",
        "quantization_baselines.py",
        "quantizer.py",
        "quantizer_names.py",
        "row_quantizer.py",
        "several_quantizers.py",
        "shared_basis.py",
        "straight_through.py",
        "tiling.py",
        "verified_download.py",
    }
    settings = json.loads((tiny_folder / "config.json").read_text())
    assert settings["auto_map"]["AutoModel"] == "modeling_simvq_image.SimVQImageModel"
