"""Models whose weights accelerate offloads, or diffusers stores in another type, work as others do."""

import copy
import re

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from diffusers.hooks import apply_layerwise_casting
from torch import nn
from transformers import AutoModel

from modeling_simvq import (
    SimVQ,
    SimVQForImageGeneration,
    SimVQImageConfig,
    SimVQImageGenerationConfig,
    SimVQImageModel,
)
from modeling_simvq.hooked_weights import is_offloaded
from modeling_simvq.quantization_baselines import make_quantizer
from modeling_simvq.quantizer_names import QUANTIZERS

CPU = torch.device("cpu")
OPTIONS = {"lc": {"basis_dim": 8}, "fsq": {"levels": [16, 16]}}


def offloaded(model: nn.Module, way: str, folder) -> nn.Module:
    """A copy of a model whose weights are elsewhere."""
    model = copy.deepcopy(model)
    if way == "cpu":
        return cpu_offload(model, execution_device=CPU)
    if way == "disk":
        disk_offload(model, folder / "offloaded", execution_device=CPU)
        return model
    model.save_pretrained(folder / "model")
    parts = {"encoder": "cpu", "quantizer": "disk", "decoder": "cpu"}
    return AutoModel.from_pretrained(
        folder / "model", device_map=parts, offload_folder=folder / "offloaded"
    ).eval()


@pytest.mark.parametrize("way", ["cpu", "disk", "device_map"])
@pytest.mark.parametrize("kind", ["image", "audio"])
@torch.no_grad()
def test_an_offloaded_tokenizer_decodes(kind, way, tiny_model, tiny_audio_model, pixels, tmp_path):
    if kind == "image":
        model, inputs = tiny_model, pixels
        codes = model.encode(inputs).image_codes
        expected = model.decode(image_codes=codes).pixel_values
    else:
        model, inputs = tiny_audio_model, torch.randn(1, 1, 4000) * 0.1
        codes = model.encode(inputs).audio_codes
        expected = model.decode(codes).audio_values
    vectors = codes if kind == "image" else codes[:, 0]
    vectors, codebook = model.quantizer.lookup(vectors), model.quantizer.codebook()
    other = offloaded(model, way, tmp_path)
    assert is_offloaded(other.quantizer)
    assert torch.equal(other.encode(inputs)[0], codes)
    for given in (codes, codes.numpy(), codes.tolist(), codes.to(torch.uint8)):
        assert torch.allclose(other.decode(given)[0], expected, atol=1e-5)
    assert torch.equal(other.decode(quantized_latents=vectors)[0], other.decode(codes)[0])
    assert torch.equal(other.quantizer.codebook(), codebook)
    assert is_offloaded(other.quantizer)  # gone again
    with pytest.raises(ValueError, match="code 64 is out of range"):
        other.decode(codes.clamp(min=64))
    assert is_offloaded(other.quantizer)
    with pytest.raises(ValueError, match="offloaded"):
        other.quantizer.fold_codebook()


@pytest.mark.parametrize("name", QUANTIZERS)
@torch.no_grad()
def test_every_quantizer_can_be_offloaded(name):
    config = SimVQImageConfig(
        quantizer=name,
        quantizer_options=OPTIONS.get(name, {}),
        codebook_size=256,
        codebook_dim=16,
    )
    quantizer = make_quantizer(config).eval()
    latents = torch.randn(2, 16, 5)
    quantized, codes, _ = quantizer(latents)
    other = cpu_offload(copy.deepcopy(quantizer), execution_device=CPU)
    assert torch.equal(other(latents)[1], codes)
    assert torch.allclose(other(latents)[0], quantized, atol=1e-6)
    assert torch.equal(other.lookup(codes), quantizer.lookup(codes))
    assert torch.equal(other.codebook(), quantizer.codebook())


@pytest.mark.parametrize("factors", [None, (4, 4)])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_an_offloaded_code_model_generates(factors, tied):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = SimVQImageGenerationConfig(
        **small,
        num_attention_heads=2,
        codebook_size=16,
        grid_size=(2, 2),
        num_classes=2,
        code_factors=factors,
        tie_word_embeddings=tied,
    )
    model = SimVQForImageGeneration(config).eval()
    other = cpu_offload(copy.deepcopy(model), execution_device=CPU)
    hidden, codes = torch.randn(3, 16), torch.tensor([1, 5, 15])
    assert torch.equal(other.codes.logits(hidden[None]), model.codes.logits(hidden[None]))
    assert torch.equal(other.codes.loss(hidden, codes), model.codes.loss(hidden, codes))
    labels = torch.tensor([0, 1])
    expected = model.generate_images(labels, do_sample=False)
    assert torch.equal(other.generate_images(labels, do_sample=False), expected)
    guided = {"guidance_scale": 2.0, "generator": torch.Generator().manual_seed(3)}
    assert other.generate_images([1], **guided).shape == (1, 2, 2)


@torch.no_grad()
def test_weights_that_diffusers_stores_in_half_precision(tiny_model, pixels):
    """The encoder's and the decoder's are rounded, as asked for; the quantizer's are not."""
    rounded = copy.deepcopy(tiny_model)
    for name, layer in rounded.named_modules():
        if isinstance(layer, nn.Conv2d) and not re.search("norm", name):
            layer.weight.copy_(layer.weight.bfloat16())
            if layer.bias is not None:
                layer.bias.copy_(layer.bias.bfloat16())
    stored = copy.deepcopy(tiny_model)
    apply_layerwise_casting(stored, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert stored.decoder.conv_in.weight.dtype == torch.bfloat16
    codes = stored.encode(pixels).image_codes
    assert torch.equal(codes, rounded.encode(pixels).image_codes)
    decoded = stored.decode(image_codes=codes).pixel_values
    assert torch.equal(decoded, rounded.decode(image_codes=codes).pixel_values)
    assert torch.equal(stored.quantizer.codebook(), tiny_model.quantizer.codebook())


@pytest.mark.slow
def test_a_quantizer_that_is_stored_in_half_precision_says_so():
    config = SimVQImageConfig(quantizer="fc", codebook_size=64, codebook_dim=16)
    model = SimVQImageModel(config).eval()
    apply_layerwise_casting(model, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match="of the quantizer is torch.bfloat16"):
        model.quantizer(torch.randn(1, 16, 4))
    with pytest.raises(ValueError, match="of the quantizer is torch.bfloat16"):
        model.quantizer.lookup([[0]])


def test_weights_without_values_are_named():
    quantizer = SimVQ(64, 8).eval().to("meta")
    for use in (lambda: quantizer(torch.randn(2, 8, 5)), lambda: quantizer.lookup([[3]])):
        with pytest.raises(ValueError, match="basis of the quantizer has no values"):
            use()
