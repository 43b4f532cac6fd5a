"""Saving and loading: every weight comes back bit for bit, whatever the loading path."""

import copy
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from modeling_simvq import SimVQImageConfig, SimVQImageModel, SimVQImageProcessor
from tests.fixtures.recipe import value

PATHS = {
    "plain": {},
    "dtype": {"dtype": torch.float32},
    "device_map": {"device_map": "cpu"},
    "device_map and dtype": {"device_map": "cpu", "dtype": torch.float32},
    "low_cpu_mem": {"low_cpu_mem_usage": True},
}


def same_weights(model, weights: dict) -> bool:
    state = model.state_dict()
    return state.keys() == weights.keys() and all(
        torch.equal(state[name], weights[name]) for name in weights
    )


def test_the_auto_classes_find_ours(tiny_folder):
    config = AutoConfig.from_pretrained(tiny_folder)
    assert type(config) is SimVQImageConfig and config.downsample_factor == 2
    assert type(AutoModel.from_pretrained(tiny_folder)) is SimVQImageModel
    assert type(AutoImageProcessor.from_pretrained(tiny_folder)) is SimVQImageProcessor
    assert type(AutoModel.from_config(config)) is SimVQImageModel


def test_save_and_load_gives_back_weights_and_outputs(tiny_model, pixels, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert same_weights(again, tiny_model.state_dict())
    with torch.no_grad():
        before, after = tiny_model(pixels), again(pixels)
    assert torch.equal(before.image_codes, after.image_codes)
    # Tensors mapped from a file are not aligned, so sums may round otherwise in the last bit.
    torch.testing.assert_close(before.pixel_values, after.pixel_values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", PATHS)
@pytest.mark.parametrize("seed", [1, 2])
def test_no_weight_is_silently_initialised_again(how, seed, tiny_model, tmp_path):
    weights = {
        name: torch.from_numpy(value(name, tuple(tensor.shape), 7))
        for name, tensor in tiny_model.state_dict().items()
    }
    tiny_model.load_state_dict(weights)
    tiny_model.save_pretrained(tmp_path)
    torch.manual_seed(seed)
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True, **PATHS[how])
    assert not any(report.values()), report
    assert same_weights(loaded, weights)


@pytest.mark.parametrize("how", PATHS)
def test_the_basis_stays_frozen_through_loading_and_fine_tuning(how, tiny_folder, pixels):
    model = AutoModel.from_pretrained(tiny_folder, **PATHS[how])
    assert not model.quantizer.basis.requires_grad
    others = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert others == ["quantizer.basis"]
    before = model.quantizer.basis.detach().clone()
    model.train().requires_grad_(True)  # what fine-tuning scripts do to a whole model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    output = model(pixels)
    (output.pixel_values.square().mean() + output.commitment_loss).backward()
    optimizer.step()
    assert model.quantizer.basis.grad is None
    assert torch.equal(model.quantizer.basis, before)


@pytest.mark.parametrize("name", ["quantizer.basis", "encoder.conv_out.weight"])
def test_a_missing_weight_is_reported_and_its_neighbours_are_kept(name, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    dropped = weights.pop(name)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {name}
    state = model.state_dict()
    fresh = state.pop(name)
    assert fresh.isfinite().all() and fresh.std() > 0 and not torch.equal(fresh, dropped)
    assert all(torch.equal(state[key], weights[key]) for key in weights)
    assert not model.quantizer.basis.requires_grad


def test_bfloat16_keeps_the_quantizer_in_float32(tiny_folder, tiny_model, pixels):
    model = AutoModel.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    assert model.encoder.conv_in.weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.quantizer.parameters()} == {torch.float32}
    assert torch.equal(model.quantizer.codebook(), tiny_model.quantizer.codebook())
    with torch.no_grad():
        output = model(pixels)  # float32 images
        exact = tiny_model(pixels)
        codes = tiny_model.quantizer(output.latents.float())[1]
    assert output.pixel_values.dtype == torch.bfloat16 and output.pixel_values.isfinite().all()
    assert output.image_codes.min() >= 0 and output.image_codes.max() < 64
    assert torch.equal(output.image_codes, codes)  # the search itself lost nothing
    assert (output.image_codes == exact.image_codes).float().mean() > 0.8


def test_a_truncated_weight_file_is_refused(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    whole = (tiny_folder / "model.safetensors").read_bytes()
    for size in (0, 5, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(Exception, match=r"(?i)safetensors|header|invalid|incomplete"):
            AutoModel.from_pretrained(tmp_path)


def test_a_wrong_shape_is_refused(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["codebook_size"] = 32
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=r"quantizer\.basis|mismatch"):
        AutoModel.from_pretrained(tmp_path)


def test_a_config_file_with_an_impossible_value_is_refused(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["codebook_size"] = 0
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="codebook_size"):
        AutoModel.from_pretrained(tmp_path)


def test_the_configuration_survives_a_round_trip(tmp_path):
    config = SimVQImageConfig(
        in_channels=3, channel_multipliers=(1, 3), codebook_size=77, commitment_cost=1
    )
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    for field in ("in_channels", "channel_multipliers", "codebook_size", "commitment_cost"):
        assert getattr(again, field) == getattr(config, field)
    assert again.channel_multipliers == [1, 3] and again.commitment_cost == 1.0


@pytest.mark.parametrize("bad", [0, -1, 2.0, "3", None, True])
@pytest.mark.parametrize(
    "field", ["in_channels", "base_channels", "num_res_blocks", "codebook_size", "codebook_dim"]
)
def test_impossible_sizes_are_named(field, bad):
    with pytest.raises(ValueError, match=rf"{field}.*{bad}"):
        SimVQImageConfig(**{field: bad})


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("base_channels", 48),
        ("channel_multipliers", []),
        ("channel_multipliers", 4),
        ("channel_multipliers", [1, 0]),
        ("channel_multipliers", [1, 1.5]),
        ("commitment_cost", -0.1),
        ("commitment_cost", float("nan")),
        ("commitment_cost", float("inf")),
        ("commitment_cost", "a lot"),
        ("commitment_cost", True),
    ],
)
def test_other_impossible_values_are_named(field, bad):
    shown = str(bad[-1] if isinstance(bad, list) and bad else bad).replace("[", r"\[")
    with pytest.raises(ValueError, match=rf"{field}.*{shown}"):
        SimVQImageConfig(**{field: bad})


def test_fields_are_checked_when_they_are_set_and_when_they_are_saved(tmp_path):
    config = SimVQImageConfig()
    for change in ({"codebook_size": 0}, {"codebook_size": True}, {"quantizer": "vqvq"}):
        (name, bad), *_ = change.items()
        with pytest.raises(ValueError, match=rf"{name}.*{bad}"):
            config.update(change)
    assert config == SimVQImageConfig()
    config.save_pretrained(tmp_path)
    config.base_channels = 32_000
    with pytest.raises(ValueError, match="parameters, more than"):
        config.save_pretrained(tmp_path)


def test_a_configuration_keeps_no_object_of_its_maker():
    options, widths = {"rotation_trick": True}, [1, 2]
    config = SimVQImageConfig(quantizer_options=options, channel_multipliers=widths)
    options.clear()
    widths.append(3)
    for same in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert same.quantizer_options == {"rotation_trick": True}
        assert same.channel_multipliers == [1, 2]
        assert same == config and same != SimVQImageConfig()
    assert SimVQImageConfig(quantizer_options=None).quantizer_options == {}


@pytest.mark.parametrize("field", ["codebook_sise", "commitment_costs", "base_chanels"])
def test_misspelt_fields_are_named(field):
    with pytest.raises(TypeError, match=field):
        SimVQImageConfig(**{field: 4})


@pytest.mark.parametrize(
    "options",
    [
        {"basis_dim": 5, "rotation_trick": True},
        {"projection_hidden_dim": 12},
        {"train_basis": True, "basis_init": "orthogonal"},
    ],
)
def test_options_of_the_quantizer_and_its_folded_form_are_saved(options, pixels, tmp_path):
    torch.manual_seed(0)
    config = SimVQImageConfig(
        base_channels=32,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        codebook_size=40,
        codebook_dim=8,
        quantizer_options=options,
    )
    model = SimVQImageModel(config).eval()
    expected = model.encode(pixels)
    model.save_pretrained(tmp_path / "whole")
    model.fold_codebook()
    model.save_pretrained(tmp_path / "folded")
    for name in ("whole", "folded"):
        loaded = AutoModel.from_pretrained(tmp_path / name)
        assert loaded.config.quantizer_options == (options if name == "whole" else {})
        trained = loaded.quantizer.basis.requires_grad
        assert trained == (name == "whole" and "train_basis" in options)
        found = loaded.encode(pixels)
        assert torch.equal(found.image_codes, expected.image_codes)
        torch.testing.assert_close(found.quantized_latents, expected.quantized_latents)


def test_misnamed_options_of_the_quantizer_are_refused():
    with pytest.raises(ValueError, match="rotation"):
        SimVQImageModel(SimVQImageConfig(quantizer_options={"rotation": True}))
    with pytest.raises(ValueError, match="quantizer_options"):
        SimVQImageConfig(quantizer_options="rotation_trick")
