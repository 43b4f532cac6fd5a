"""The quantizer stays in float32, whichever way a model is put into half precision."""

import copy

import pytest
import torch
from accelerate import Accelerator, dispatch_model
from torch import nn
from transformers import AutoModel

from modeling_simvq import SimVQ, SimVQAudioConfig, SimVQAudioModel, SimVQImageConfig
from modeling_simvq.quantizer_names import QUANTIZERS

IMAGE = {"base_channels": 32, "channel_multipliers": [1, 1], "num_res_blocks": 1}
OPTIONS = {"lc": {"basis_dim": 8}, "fsq": {"levels": [16, 16]}}
HALF = (torch.float16, torch.bfloat16)


def configuration(name: str) -> SimVQImageConfig:
    options = OPTIONS.get(name, {})
    return SimVQImageConfig(
        quantizer=name, quantizer_options=options, codebook_size=256, codebook_dim=16, **IMAGE
    )


def made(name: str, seed: int = 0):
    torch.manual_seed(seed)
    return AutoModel.from_config(configuration(name)).eval()


def tensors(module: nn.Module) -> dict:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def swapping(model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


ROADS = {
    "to": lambda model: model.to(torch.bfloat16),
    "to device and dtype": lambda model: model.to("cpu", torch.float16),
    "to like": lambda model: model.to(torch.zeros(1, dtype=torch.float16)),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "type": lambda model: model.type(torch.bfloat16),
    "type by name": lambda model: model.type("torch.HalfTensor"),
    "module.to": lambda model: nn.Module.to(model, torch.bfloat16),
    "in a container": lambda model: nn.Sequential(model).half()[0],
    "swapping": swapping,
    "twice": lambda model: model.half().bfloat16(),
    "from float64": lambda model: model.double().half(),
    "submodule": lambda model: (model.quantizer.half(), model)[1],
    "apply": lambda model: model.apply(lambda part: part.half() if part is not model else part),
    "dispatched": lambda model: dispatch_model(model.half(), {"": "cpu"}),
    "prepared": lambda model: Accelerator(cpu=True).prepare(model).half(),
}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_no_conversion_reaches_the_quantizer(name, road):
    model = made(name)
    before = copy.deepcopy(model.quantizer)
    latents = torch.randn(1, 16, 6, 6)
    codes = model.quantizer(latents)[1]
    model = ROADS[road](model)
    if road == "apply" and name not in ("simvq", "lc", "ibq"):
        # Modules of torch and vector-quantize-pytorch do not resist on their own.
        with pytest.raises(ValueError, match="load the quantizer again"):
            model.quantizer(latents)
        return
    for key, tensor in tensors(model.quantizer).items():
        old = tensors(before)[key]
        assert tensor.dtype == old.dtype, key
        assert torch.equal(tensor, old), key
    assert torch.equal(model.quantizer(latents)[1], codes)
    assert torch.equal(model.quantizer.codebook(), before.codebook())
    if road != "submodule":
        assert {p.dtype for p in model.encoder.parameters()} <= set(HALF)
        pixels = torch.rand(1, 3, 16, 16) * 2 - 1
        with torch.no_grad():
            encoded = model.encode(pixels)
            own = before.lookup(encoded.image_codes)
            assert torch.equal(before(encoded.latents)[1], encoded.image_codes)
            assert torch.equal(encoded.quantized_latents, own.to(encoded.latents.dtype))
            assert torch.equal(
                model.decode(encoded.image_codes).pixel_values, model(pixels).pixel_values
            )


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("dtype", HALF)
def test_no_type_at_the_making_reaches_the_quantizer(name, dtype, tmp_path):
    reference = made(name)
    torch.manual_seed(0)
    model = AutoModel.from_config(configuration(name), dtype=dtype)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        made_by_default = type(model)(configuration(name))
    finally:
        torch.set_default_dtype(default)
    reference.save_pretrained(tmp_path)
    for one in (model, made_by_default, AutoModel.from_pretrained(tmp_path, dtype=dtype)):
        for key, tensor in tensors(one.quantizer).items():
            # transformers makes float32 of integers and flags too; their values stay.
            assert tensor.dtype in (torch.float32, tensors(reference.quantizer)[key].dtype), key
        assert one.encoder.conv_in.weight.dtype == dtype
    for key, tensor in tensors(one.quantizer).items():  # the loaded one
        assert torch.equal(tensor, tensors(reference.quantizer)[key].to(tensor.dtype)), key
    latents = torch.randn(1, 16, 6, 6)
    for ours, expected in zip(one.quantizer(latents), reference.quantizer(latents), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_weights_that_were_rounded_behind_its_back_are_refused(name):
    model = made(name)
    for parameter in model.quantizer.parameters():
        parameter.data = parameter.data.half()
    if not list(model.quantizer.parameters()):  # vq_ema has buffers alone
        model.quantizer.inner.half()
    for use in (
        lambda: model.quantizer(torch.randn(1, 16, 4)),
        lambda: model.quantizer.lookup(torch.tensor([[1]])),
        model.quantizer.codebook,
        lambda: model.train().quantizer(torch.randn(1, 16, 4)),
        lambda: model.train().quantizer.lookup(torch.tensor([[1]])),
        model.quantizer.codebook,
    ):
        with pytest.raises(ValueError, match=r"is torch.float16, .*load the quantizer again"):
            use()


@pytest.mark.parametrize("options", [{}, {"projection_hidden_dim": 5}, {"train_projection": False}])
def test_the_quantizer_alone_keeps_its_codes(options):
    quantizer, latents = SimVQ(64, 8, **options).eval(), torch.randn(2, 8, 9)
    quantized, codes, _ = quantizer(latents)
    quantizer.half()
    assert all(p.dtype == torch.float32 for p in quantizer.parameters())
    assert torch.equal(quantizer(latents)[1], codes)
    halved, codes_of_half, _ = quantizer(latents.half())
    assert halved.dtype == torch.float16
    assert torch.equal(codes_of_half, quantizer(latents.half().float())[1])
    folded = copy.deepcopy(quantizer)
    folded.fold_codebook()
    folded.bfloat16()
    assert torch.equal(folded(latents)[1], codes)


def test_the_audio_model_keeps_its_quantizer_too():
    config = SimVQAudioConfig(
        num_filters=2, hidden_size=32, intermediate_size=32, num_decoder_layers=1, codebook_size=64
    )
    model = SimVQAudioModel(config).eval()
    before = model.quantizer.codebook().clone()
    model.to(torch.bfloat16)
    assert model.quantizer.basis.dtype == torch.float32
    assert model.decoder.conv_in.weight.dtype == torch.bfloat16
    assert torch.equal(model.quantizer.codebook(), before)


def test_moves_still_move():
    quantizer = SimVQ(64, 8)
    moved = quantizer.to("meta", torch.float16)
    assert {(p.device.type, p.dtype) for p in moved.parameters()} == {("meta", torch.float32)}
    empty = moved.to_empty(device="cpu")
    assert {p.device.type for p in empty.parameters()} == {"cpu"}
    assert not empty.basis.requires_grad and empty.projection.weight.requires_grad
    assert SimVQ(64, 8).double().basis.dtype == torch.float64
