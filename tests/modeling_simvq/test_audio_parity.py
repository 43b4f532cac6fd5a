"""Outputs, losses and gradients of the authors' code (fixtures audio_*), with raw and with EMA weights."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from modeling_simvq import SimVQAudioConfig
from modeling_simvq.convert_simvq_audio import KEPT
from tests.modeling_simvq.parity import FIXTURES, converter, relative

NAMES = ["audio_tiny1", "audio_tiny2", "audio_real"]
FIELDS = [spec.name for spec in dataclasses.fields(SimVQAudioConfig) if "help" in spec.metadata]
# The input that the fixture's gradients are of.
GRADIENT_INPUT = {"audio_tiny1": "mult", "audio_tiny2": "mult", "audio_real": "short"}
CASES = [(name, weights) for name in NAMES for weights in ("raw", "ema")]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Converted models by (name, weights), each made once."""
    return converter(tmp_path_factory.mktemp, KEPT)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "weights"), CASES)
def test_outputs_equal_the_original(name, weights, converted):
    model = converted(name, weights)
    inputs = load_file(FIXTURES / name / "inputs.safetensors")
    expected = load_file(FIXTURES / name / "outputs.safetensors")
    for case, waveform in inputs.items():
        key = f"{weights}.{case}."
        with torch.no_grad():
            encoded = model.encode(waveform)
            decoded = model.decode(audio_codes=encoded.audio_codes)
            whole = model(waveform)
        assert encoded.audio_codes.shape == (len(waveform), 1, encoded.latents.shape[-1])
        assert encoded.audio_codes_mask.all()
        assert torch.equal(encoded.audio_codes.flatten(), expected[key + "indices"])
        for ours, theirs in (("latents", "z"), ("quantized_latents", "z_q")):
            if key + theirs in expected:
                assert relative(encoded[ours], expected[key + theirs]) < 1e-5
        assert relative(encoded.commitment_loss, expected[key + "commit_loss"]) < 1e-5
        assert relative(whole.audio_values, expected[key + "rec"]) < 1e-5
        assert torch.equal(decoded.audio_values, whole.audio_values)


@pytest.mark.parametrize("name", ["audio_tiny1", "audio_tiny2"])
def test_the_originals_loudness_normalisation_is_a_division_by_the_rms(name, converted):
    """audio_normalize of the original: divide by the RMS before, multiply after (fixture norm.*)."""
    model = converted(name, "raw")
    inputs = load_file(FIXTURES / name / "inputs.safetensors")
    expected = load_file(FIXTURES / name / "outputs.safetensors")
    scale = expected["norm.mult.scale"][..., None]
    with torch.no_grad():
        output = model(inputs["mult"] / scale)
    torch.testing.assert_close(
        inputs["mult"].square().mean(-1, True).sqrt(), scale, rtol=1e-4, atol=1e-6
    )
    assert torch.equal(output.audio_codes.flatten(), expected["norm.mult.indices"])
    assert relative(output.commitment_loss, expected["norm.mult.commit_loss"]) < 1e-5
    assert relative(output.audio_values * scale, expected["norm.mult.rec"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_the_original(name, converted):
    expected = load_file(FIXTURES / name / "outputs.safetensors")
    model = converted(name, "raw")
    model.zero_grad()
    waveform = load_file(FIXTURES / name / "inputs.safetensors")[GRADIENT_INPUT[name]]
    output = model(waveform)
    error = F.mse_loss(output.audio_values[..., : waveform.shape[-1]], waveform)
    loss = error + output.commitment_loss
    loss.backward()
    first = model.encoder.conv_in.conv
    ours = {
        "loss": loss.detach(),
        "mse": error.detach(),
        "backbone.embed.bias": model.decoder.conv_in.bias.grad,
        "encoder.model.0.conv.conv.bias": first.bias.grad,
        "encoder.model.0.conv.conv.weight_g": first.parametrizations.weight.original0.grad,
        "encoder.model.0.conv.conv.weight_v": first.parametrizations.weight.original1.grad,
        "quantize.embedding_proj.weight": model.quantizer.projection.weight.grad,
        "quantize.embedding_proj.bias": model.quantizer.projection.bias.grad,
    }
    checked = [key for key in expected if key.startswith("grad.")]
    for key in checked:
        if expected[key].norm() < 1e-6:  # groups of one value undo this bias: nothing but rounding
            assert ours[key.removeprefix("grad.")].norm() < 1e-6, key
        else:
            assert relative(ours[key.removeprefix("grad.")], expected[key]) < 1e-4, key
    assert len(checked) >= 7
    assert model.quantizer.basis.grad is None


def test_published_size(converted):
    config = SimVQAudioConfig(codebook_size=1024)
    model = converted("audio_real", "raw")
    assert {name: getattr(model.config, name) for name in FIELDS} == {
        name: getattr(config, name) for name in FIELDS
    }
    assert model.num_parameters() == 72_477_186
    assert config.hop_length == 320 and config.frame_rate == 75
