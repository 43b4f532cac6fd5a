"""The tokenizers that ship: what their folders hold and how well they do, and the command that stores them."""

import json
import math
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hub_cards.push_contents import PushError
from hub_cards.store_checkpoint import CHECKPOINTS, MOST_BYTES, store
from training.demo import audio, image

ALLOWED = {"config.json", "preprocessor_config.json", "model.safetensors", "README.md"}
ALLOWED |= {"evaluation.json", "evaluation.md", "training_settings.json", "samples"}
SHIPPED = sorted(path for path in CHECKPOINTS.iterdir() if path.is_dir())


def test_there_is_one_for_images_and_one_for_speech():
    assert {image.SHIPPED, audio.SHIPPED} <= set(SHIPPED)


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_a_folder_holds_weights_card_and_figures(folder):
    assert {path.name for path in folder.iterdir()} <= ALLOWED
    assert (folder / "model.safetensors").stat().st_size <= MOST_BYTES
    card = ModelCard.load(folder / "README.md")
    assert card.data.license and "seed:" in card.text
    measured = json.loads((folder / "evaluation.json").read_text())
    figures = {result.metric_type: result.metric_value for result in card.data.eval_results or []}
    assert figures and measured
    settings = json.loads((folder / "training_settings.json").read_text())
    assert settings["trained_steps"] > 0 and "/" not in str(settings["dataset"])


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_it_computes_in_float32_and_its_codes_are_exact(folder):
    model = AutoModel.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    precise = {name for name, kind in types.items() if kind == "F32"}
    assert precise and all(name.startswith(("quantizer.", "whitening.")) for name in precise)


@pytest.mark.slow
def test_the_cat_is_better_than_block_means_of_more_bits():
    photo = image.scaled(image.load_photo("chelsea"))
    (decoded,), (codes,) = image.reconstruct(image.SHIPPED, [photo])
    size = json.loads((image.SHIPPED / "config.json").read_text())["codebook_size"]
    assert codes.size * math.log2(size) < codes.size * 24  # three bytes a block
    assert image.psnr(photo, decoded) > image.psnr(photo, image.block_means(photo, 8))


def tiny(tmp_path: Path, spoil: float | None = None) -> Path:
    from modeling_simvq import SimVQImageConfig, SimVQImageModel
    from training.recipes.image import save_image_tokenizer

    torch.manual_seed(0)
    model = SimVQImageModel(
        SimVQImageConfig(
            base_channels=8, norm_groups=2, channel_multipliers=[1, 2], num_res_blocks=1,
            codebook_size=16, codebook_dim=4, whiten_latents=True,
        )
    )  # fmt: skip
    if spoil is not None:
        torch.nn.init.constant_(model.decoder.conv_out.weight, spoil)
    folder = save_image_tokenizer(model, tmp_path / "model", 32)
    (folder / "training_settings.json").write_text("{}")
    return folder


def test_storing_halves_the_networks_and_leaves_the_quantizer(tmp_path):
    folder = tiny(tmp_path)
    before = load_file(folder / "model.safetensors")
    size = store(folder, tmp_path / "stored")
    after = load_file(tmp_path / "stored" / "model.safetensors")
    assert size == sum(tensor.nbytes for tensor in after.values())
    for name, tensor in before.items():
        if name.startswith(("quantizer.", "whitening.")):
            assert torch.equal(after[name], tensor)
        else:
            assert torch.equal(after[name], tensor.half())
    model = AutoModel.from_pretrained(tmp_path / "stored")
    assert torch.equal(
        model.encoder.conv_in.weight, before["encoder.conv_in.weight"].half().float()
    )


def test_what_cannot_be_stored_is_refused(tmp_path, monkeypatch):
    folder = tiny(tmp_path, spoil=1e6)
    with pytest.raises(PushError, match=r"cannot hold decoder\.conv_out\.weight"):
        store(folder, tmp_path / "stored")
    monkeypatch.setattr("hub_cards.store_checkpoint.MOST_BYTES", 100)
    save_file({"a": torch.zeros(1000)}, folder / "model.safetensors")
    with pytest.raises(PushError, match="more than 100"):
        store(folder, tmp_path / "stored")
    (folder / "model.safetensors").unlink()
    with pytest.raises(PushError, match=r"holds no model\.safetensors"):
        store(folder, tmp_path / "stored")
    assert not (tmp_path / "stored").exists()
