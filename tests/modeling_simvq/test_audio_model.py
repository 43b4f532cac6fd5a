"""The audio tokenizer's API: shapes, lengths, loading, folding, half precision, bad input."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioTokenization

from modeling_simvq import SimVQAudioConfig, SimVQAudioFeatureExtractor, SimVQAudioModel
from modeling_simvq.convert_simvq_checkpoint import main
from tests.modeling_simvq.test_remote_code import BLOCK, run

PATHS = {
    "plain": {},
    "dtype": {"dtype": torch.float32},
    "device_map": {"device_map": "cpu"},
    "low_cpu_mem": {"low_cpu_mem_usage": True},
}


def test_outputs_and_their_shapes(tiny_audio_model, waveform):
    with torch.no_grad():
        encoded = tiny_audio_model.encode(waveform)
        assert encoded.audio_codes.shape == encoded.audio_codes_mask.shape == (1, 1, 300)
        assert encoded.audio_codes.dtype == torch.int64 and encoded.audio_codes_mask.all()
        assert encoded.latents.shape == encoded.quantized_latents.shape == (1, 24, 300)
        assert encoded.commitment_loss.shape == ()
        decoded = tiny_audio_model.decode(audio_codes=encoded.audio_codes)
        again = tiny_audio_model.decode(quantized_latents=encoded.quantized_latents)
        assert torch.equal(decoded.audio_values, again.audio_values)
        assert decoded.audio_values.shape == waveform.shape
        whole = tiny_audio_model(waveform)
        assert torch.equal(whole.audio_values, decoded.audio_values)
        values = tiny_audio_model(waveform, return_dict=False)
        assert isinstance(values, tuple) and torch.equal(values[0], whole.audio_values)


@pytest.mark.parametrize("length", [1, 2, 240, 319, 320, 321, 639, 641, 5000])
def test_any_length(length, tiny_audio_model):
    torch.manual_seed(length)
    with torch.no_grad():
        output = tiny_audio_model(torch.randn(2, 1, length) * 0.1)
    assert output.audio_codes.shape == (2, 1, -(-length // 320))
    assert output.audio_values.shape == (2, 1, -(-length // 320) * 320)
    assert output.audio_values.isfinite().all()


def test_silence(tiny_audio_model):
    output = tiny_audio_model(torch.zeros(1, 1, 3200))
    assert output.audio_values.isfinite().all()
    output.audio_values.square().mean().backward()
    gradients = [p.grad for p in tiny_audio_model.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (torch.zeros(100), r"\(100,\)"),
        (torch.zeros(1, 2, 100), r"mono.*\(1, 2, 100\)"),
        (torch.zeros(1, 1, 0), "empty"),
        (torch.zeros(0, 1, 100), "empty"),
        (torch.zeros(1, 1, 100, dtype=torch.int16), "int16.*32768"),
        (torch.full((1, 1, 100), float("nan")), "NaN"),
        (torch.full((1, 1, 100), float("inf")), "infinite"),
    ],
)
def test_impossible_waveforms_are_named(values, named, tiny_audio_model):
    with pytest.raises(ValueError, match=named):
        tiny_audio_model.encode(values)


@pytest.mark.parametrize(
    ("mask", "named"),
    [
        (torch.ones(1, 99), r"\(1, 99\)"),
        (torch.tensor([[0] * 50 + [1] * 50]), "pad on the right"),
        (torch.zeros(1, 100), "clip 0 is empty"),
    ],
)
def test_impossible_masks_are_named(mask, named, tiny_audio_model):
    with pytest.raises(ValueError, match=named):
        tiny_audio_model.encode(torch.zeros(1, 1, 100), mask)


@pytest.mark.parametrize(
    ("codes", "named"),
    [
        (torch.tensor([[[64]]]), "64.*out of range"),
        (torch.tensor([[[-1]]]), "-1.*out of range"),
        (torch.zeros(1, 5, dtype=torch.long), r"\(1, 5\)"),
        (torch.zeros(1, 2, 5, dtype=torch.long), r"\(1, 2, 5\)"),
        (torch.zeros(1, 1, 0, dtype=torch.long), "not empty"),
        (torch.zeros(1, 1, 5), "integers"),
    ],
)
def test_impossible_codes_are_named(codes, named, tiny_audio_model):
    with pytest.raises(ValueError, match=named):
        tiny_audio_model.decode(audio_codes=codes)


def test_impossible_calls_of_decode(tiny_audio_model):
    codes = torch.zeros(1, 1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="exactly one"):
        tiny_audio_model.decode()
    with pytest.raises(ValueError, match=r"quantized_latents.*\(1, 3, 5\)"):
        tiny_audio_model.decode(quantized_latents=torch.zeros(1, 3, 5))
    with pytest.raises(ValueError, match="audio_codes_mask"):
        tiny_audio_model.decode(audio_codes=codes, audio_codes_mask=torch.ones(1, 1, 4))
    with pytest.raises(ValueError, match="first code"):
        tiny_audio_model.decode(audio_codes=codes, audio_codes_mask=torch.zeros(1, 1, 3))


def test_folding_weight_norm_changes_nothing_and_survives_saving(
    tiny_audio_model, waveform, tmp_path
):
    with torch.no_grad():
        before = tiny_audio_model(waveform)
        tiny_audio_model.remove_weight_norm()
        after = tiny_audio_model(waveform)
    torch.testing.assert_close(after.audio_values, before.audio_values, rtol=1e-4, atol=1e-5)
    assert not [name for name in tiny_audio_model.state_dict() if "parametrizations" in name]
    tiny_audio_model.remove_weight_norm()  # a second time does nothing
    tiny_audio_model.save_pretrained(tmp_path)
    again, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        torch.testing.assert_close(
            again(waveform).audio_values, after.audio_values, rtol=1e-4, atol=1e-5
        )


def test_the_auto_classes_find_ours(tiny_audio_folder):
    config = AutoConfig.from_pretrained(tiny_audio_folder)
    assert type(config) is SimVQAudioConfig and config.hop_length == 320
    for auto in (AutoModel, AutoModelForAudioTokenization):
        assert type(auto.from_pretrained(tiny_audio_folder)) is SimVQAudioModel
        assert type(auto.from_config(config)) is SimVQAudioModel
    extractor = AutoFeatureExtractor.from_pretrained(tiny_audio_folder)
    assert type(extractor) is SimVQAudioFeatureExtractor and extractor.sampling_rate == 24000


@pytest.mark.parametrize("how", PATHS)
def test_no_weight_is_silently_initialised_again(how, tiny_audio_model, waveform, tmp_path):
    weights = copy.deepcopy(tiny_audio_model.state_dict())
    tiny_audio_model.save_pretrained(tmp_path)
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True, **PATHS[how])
    assert not any(report.values()), report
    state = loaded.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    assert [n for n, p in loaded.named_parameters() if not p.requires_grad] == ["quantizer.basis"]
    with torch.no_grad():  # the window of the inverse STFT is whole too
        torch.testing.assert_close(
            loaded(waveform).audio_values,
            tiny_audio_model(waveform).audio_values,
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize(
    "name", ["encoder.conv_in.conv.parametrizations.weight.original1", "decoder.head.weight"]
)
def test_a_missing_weight_is_made_and_its_neighbours_are_kept(name, tiny_audio_folder, tmp_path):
    for path in tiny_audio_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(name)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {name}
    state = model.state_dict()
    fresh = state.pop(name)
    assert 0 < fresh.std() < 1 and fresh.abs().max() < 1  # and not what the memory held before
    assert all(torch.equal(state[key], weights[key]) for key in weights)


def test_a_new_model_is_initialised_as_torch_does():
    torch.manual_seed(0)
    config = SimVQAudioConfig(num_filters=4, codebook_size=16, codebook_dim=8, hidden_size=32)
    model = SimVQAudioModel(config)
    assert all(p.isfinite().all() for p in model.parameters())
    conv = model.encoder.levels[2].conv.conv
    weight = conv.parametrizations.weight
    norms = torch.linalg.vector_norm(weight.original1, dim=(1, 2), keepdim=True)
    torch.testing.assert_close(weight.original0, norms)
    bound = conv.weight[0].numel() ** -0.5
    assert weight.original1.abs().max() <= bound and conv.bias.abs().max() <= bound
    assert weight.original1.abs().max() > 0.9 * bound
    assert torch.equal(model.decoder.blocks[0].layer_scale, torch.full((32,), 1 / 12))


def test_bfloat16_keeps_the_quantizer_in_float32(tiny_audio_folder, waveform):
    model = AutoModel.from_pretrained(tiny_audio_folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.quantizer.parameters()} == {torch.float32}
    with torch.no_grad():
        output = model(waveform)
    assert output.audio_values.dtype == torch.bfloat16 and output.audio_values.isfinite().all()


def test_gradient_checkpointing_gives_the_same_gradients(tiny_audio_model, waveform):
    def gradients():
        tiny_audio_model.zero_grad()
        torch.manual_seed(0)
        output = tiny_audio_model(waveform[..., :6400])
        (output.audio_values.square().mean() + output.commitment_loss).backward()
        return {
            n: p.grad.clone() for n, p in tiny_audio_model.named_parameters() if p.requires_grad
        }

    tiny_audio_model.train()
    plain = gradients()
    enable = getattr(tiny_audio_model, "activation_checkpointing_enable", None)
    (enable or tiny_audio_model.gradient_checkpointing_enable)()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name])


LOAD = """
import json, sys, torch
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioTokenization

folder, data, remote = sys.argv[1], load_file(sys.argv[2]), json.loads(sys.argv[3])
extractor = AutoFeatureExtractor.from_pretrained(folder, **remote)
inputs = extractor(data["clip"].numpy(), sampling_rate=24000, return_tensors="pt")
found = []
for auto in (AutoModel, AutoModelForAudioTokenization):
    model = auto.from_pretrained(folder, **remote)
    with torch.no_grad():
        found.append(torch.equal(model(**inputs).audio_codes, data["codes"]))
names = [type(model).__module__, type(extractor).__module__]
print(json.dumps({"codes": found, "names": names}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("installed", [True, False])
def test_a_folder_loads_with_and_without_the_package(
    installed, tiny_audio_folder, tiny_audio_model, waveform, tmp_path
):
    with torch.no_grad():
        codes = tiny_audio_model.encode(waveform).audio_codes
    reference = tmp_path / "reference.safetensors"
    save_file({"clip": waveform[0, 0], "codes": codes}, reference)
    start = "import modeling_simvq\n" if installed else BLOCK
    remote = {} if installed else {"trust_remote_code": True}
    result, _ = run(start + LOAD, tiny_audio_folder, reference, remote, tmp_path)
    assert result["codes"] == [True, True]
    prefix = "modeling_simvq." if installed else "transformers_modules."
    assert all(name.startswith(prefix) for name in result["names"])


def test_the_converter_drops_what_is_never_used(
    tiny_audio_folder, audio_checkpoint, tmp_path, capsys
):
    names = load_file(tiny_audio_folder / "model.safetensors").keys()
    assert not [n for n in names if n.startswith(("loss.", "head.")) or "istft" in n]
    config = tmp_path / "config.yaml"
    config.write_text(
        "model:\n  init_args:\n    sample_rate: 16000\n    ddconfig: {causal: false}\n"
        "    quantconfig: {params: {beta: 0.5}}\n"
    )
    main([str(audio_checkpoint), str(tmp_path / "out"), "--original-config", str(config)])
    assert json.loads(capsys.readouterr().out)["model_type"] == "simvq_audio"
    converted = AutoConfig.from_pretrained(tmp_path / "out")
    assert (converted.sampling_rate, converted.causal) == (16000, False)
    assert converted.commitment_cost == 0.5


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("sampling_rate", 0),
        ("downsampling_ratios", []),
        ("downsampling_ratios", [2, 0]),
        ("num_lstm_layers", -1),
        ("causal", 1),
        ("hidden_size", 48),
        ("dropout", 1.0),
        ("n_fft", 319),
        ("n_fft", 1281),
        ("commitment_cost", float("nan")),
        ("codebook_size", 2.5),
    ],
)
def test_impossible_configurations_are_named(field, bad):
    with pytest.raises(ValueError, match=field):
        SimVQAudioConfig(**{field: bad})


def test_misspelt_fields_are_named():
    with pytest.raises(TypeError, match="codebook_sise.*codebook_size"):
        SimVQAudioConfig(codebook_sise=4)
