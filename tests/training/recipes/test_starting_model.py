"""Runs that begin from a model: its weights to the bit, sizes that differ, parts that stay as they are."""

import json
import logging

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import save_file

from modeling_simvq import (
    SimVQAudioConfig,
    SimVQAudioModel,
    SimVQForImageGeneration,
    SimVQImageConfig,
    SimVQImageGenerationConfig,
    SimVQImageModel,
)
from tests.training.support.tiny_recipe import Pictures, build_tiny_recipe
from training.data.codes import TokenLayout
from training.data.images import ImageDataConfig
from training.data.recordings import AudioDataConfig
from training.loop.trainer import Trainer
from training.losses.discriminator_files import load_discriminator, save_discriminator
from training.losses.patch_discriminator import PatchDiscriminator
from training.recipes.audio import AudioModelSettings
from training.recipes.generator import GeneratorModelSettings
from training.recipes.image import ImageModelSettings, save_image_tokenizer
from training.recipes.run import make_accelerator
from training.recipes.starting_model import Recorded, StartSettings
from training.recipes.tokenizer import TokenizerLoopSettings
from training.runtime.settings import SettingsError, build_settings

SIZES = {"base_channels": 8, "norm_groups": 2, "channel_multipliers": [1, 2], "num_res_blocks": 1}
SIZES |= {"codebook_size": 64, "codebook_dim": 4, "whiten_latents": True}


@pytest.fixture(autouse=True)
def a_log(one_process):
    """Accelerate's loggers need to know the process."""
    PartialState(cpu=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Folder of a tokenizer whose whitening has seen images."""
    torch.manual_seed(3)
    model = SimVQImageModel(SimVQImageConfig(**SIZES)).train()
    for _ in range(30):
        model(Pictures(8).pixels)
    return save_image_tokenizer(model.eval(), tmp_path_factory.mktemp("source") / "model", 48)


def chosen(**values) -> ImageModelSettings:
    """Settings as a command makes them: it is known which somebody has chosen."""
    return build_settings({"model": ImageModelSettings}, values)["model"]


def equal_states(first, second) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def data() -> ImageDataConfig:
    return build_settings({"data": ImageDataConfig}, {})["data"]


def test_step_0_is_the_source_to_the_bit(source):
    settings, about_data = chosen(init_from=str(source)), data()
    model = settings.build(about_data)
    there = SimVQImageModel.from_pretrained(source)
    assert equal_states(model, there)
    assert model.config.to_dict() == there.config.to_dict() | {
        "dtype": model.config.to_dict()["dtype"]
    }
    # The record of the run tells what came from there.
    assert (settings.base_channels, settings.whiten_latents) == (8, True)
    assert about_data.resolution == 48


def test_what_shapes_no_weight_may_differ(source, caplog):
    with caplog.at_level(logging.INFO):
        model = chosen(init_from=str(source), commitment_cost=1.0).build(data())
    assert model.quantizer.commitment_cost == 1.0 == model.config.commitment_cost
    assert "commitment_cost 0.25 -> 1.0" in caplog.text
    assert equal_states(model, SimVQImageModel.from_pretrained(source))


def test_dropout_of_quantizers_is_no_size(tmp_path):
    model = chosen(num_quantizers=2, codebook_size=32).build(data())
    model.save_pretrained(tmp_path)
    again = chosen(init_from=str(tmp_path), quantizer_dropout=0.5).build(data())
    assert again.quantizer.dropout == 0.5 and again.config.num_quantizers == 2


def test_other_sizes_are_refused_by_name(source):
    settings = chosen(init_from=str(source), base_channels=32, codebook_dim=4, num_res_blocks=2)
    with pytest.raises(SettingsError) as refused:
        settings.build(data())
    assert "base_channels is 32 and the model's is 8" in str(refused.value)
    assert "num_res_blocks is 2 and the model's is 1" in str(refused.value)
    assert "codebook_dim" not in str(refused.value)


def test_a_codebook_that_grows_keeps_its_codes(source):
    torch.manual_seed(0)
    model = chosen(init_from=str(source), codebook_size=20_000).build(data()).eval()
    there = SimVQImageModel.from_pretrained(source).eval()
    assert model.config.codebook_size == 20_000
    assert torch.equal(model.quantizer.basis[:64], there.quantizer.basis)
    assert torch.equal(model.quantizer.projection.weight, there.quantizer.projection.weight)
    codes = torch.arange(64)  # products of more rows round in another way
    torch.testing.assert_close(model.quantizer.lookup(codes), there.quantizer.lookup(codes))
    new, old = model.quantizer.basis[64:], there.quantizer.basis
    torch.testing.assert_close(
        torch.cov(new.T), torch.cov(old.T, correction=0), atol=0.02, rtol=0.1
    )
    torch.testing.assert_close(new.mean(dim=0), old.mean(dim=0), atol=0.02, rtol=0)


def test_a_codebook_that_cannot_grow_or_would_shrink_is_refused(source, tmp_path):
    with pytest.raises(SettingsError, match="has 64 codes and cannot lose any"):
        chosen(init_from=str(source), codebook_size=32).build(data())
    fsq = SIZES | {"quantizer": "fsq", "quantizer_options": {"levels": [4, 4, 4]}}
    SimVQImageModel(SimVQImageConfig(**fsq)).save_pretrained(tmp_path / "fsq")
    with pytest.raises(SettingsError, match="only the C of one simvq .* 1 x fsq of 64 codes"):
        chosen(init_from=str(tmp_path / "fsq"), codebook_size=128).build(data())


def tiny_trainer(settings, folder, **loop) -> Trainer:
    recipe = build_tiny_recipe(validation=0)
    recipe.model, recipe.beginning = settings.build(data()), settings
    recipe.discriminator_sizes = {"base_channels": 8, "num_layers": 3}
    loop = TokenizerLoopSettings(
        output_dir=str(folder),
        tracker="none",
        max_steps=3,
        learning_rate=1e-2,
        ema_decay=0.5,
        **loop,
    )
    folder.mkdir(exist_ok=True)
    return Trainer(recipe, loop, make_accelerator(loop))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["encoder", "quantizer", "decoder"])
def test_only_the_named_part_moves(source, one_process, tmp_path, part):
    trainer = tiny_trainer(chosen(init_from=str(source), train=part), tmp_path / "run")
    there = SimVQImageModel.from_pretrained(source).eval()
    pixels = Pictures(8).pixels
    codes = there.encode(pixels).image_codes
    trainer.train()
    ended = SimVQImageModel.from_pretrained(tmp_path / "run" / "model").eval()
    for model in (trainer.recipe.model.eval(), ended):
        moved = {
            name: not equal_states(getattr(model, name), getattr(there, name))
            for name in ("encoder", "quantizer", "decoder")
        }
        assert moved == {name: name == part for name in moved}
        assert equal_states(model.whitening, there.whitening) == (part != "encoder")
        if part == "decoder":
            assert torch.equal(model.encode(pixels).image_codes, codes)
    held = trainer.stepper.optimizers["generator"].state_dict()["state"]
    trained = list(getattr(trainer.recipe.model, part).parameters())
    assert len(held) == sum(parameter.requires_grad for parameter in trained)
    frozen = [p for n, p in trainer.recipe.model.named_parameters() if not n.startswith(part)]
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in frozen)


@pytest.mark.slow
def test_new_codes_are_drawn_for_a_model_that_there_is(source, one_process, tmp_path, caplog):
    anew = {"autoencoder_steps": 2, "codes_from_latents": True, "batch_size": 4}
    with caplog.at_level(logging.WARNING):
        trainer = tiny_trainer(chosen(init_from=str(source)), tmp_path / "run", **anew)
    assert "its codes end with step 2" in caplog.text
    before = SimVQImageModel.from_pretrained(source).quantizer.basis
    assert torch.equal(trainer.recipe.model.quantizer.basis, before)
    trainer.train()
    assert not torch.equal(trainer.recipe.model.quantizer.basis, before)


@pytest.mark.slow
def test_the_discriminator_travels(source, one_process, tmp_path, caplog):
    trainer = tiny_trainer(chosen(init_from=str(source)), tmp_path / "run", batch_size=4)
    trainer.train()
    folder = tmp_path / "run" / "model"
    sizes = {"base_channels": 8, "num_layers": 3}
    assert json.loads((folder / "discriminator" / "config.json").read_text()) == sizes
    again = PatchDiscriminator(**sizes)
    with caplog.at_level(logging.INFO):
        assert load_discriminator(again, sizes, str(folder))
    assert "goes on too" in caplog.text
    assert equal_states(again, trainer.recipe.discriminator)


@pytest.mark.slow
def test_a_discriminator_that_took_no_part_is_not_saved(source, one_process, tmp_path):
    trainer = tiny_trainer(chosen(init_from=str(source)), tmp_path / "run")
    trainer.recipe.loss.discriminator_start = 1000
    trainer.train()
    assert not (tmp_path / "run" / "model" / "discriminator").exists()


@pytest.mark.parametrize("fault", ["none", "other sizes", "cut", "other weights", "not finite"])
def test_a_discriminator_that_does_not_fit_is_told_in_one_line(tmp_path, caplog, fault):
    sizes = {"base_channels": 8, "num_layers": 3}
    if fault != "none":
        save_discriminator(PatchDiscriminator(**sizes), sizes, tmp_path)
    weights = tmp_path / "discriminator" / "model.safetensors"
    if fault == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    if fault == "other weights":
        save_file({"a": torch.zeros(1)}, weights)
    if fault == "not finite":
        broken = PatchDiscriminator(**sizes).state_dict()
        broken["main.0.weight"][0] = torch.nan
        save_file(broken, weights)
    wanted = sizes | {"base_channels": 16} if fault == "other sizes" else sizes
    discriminator = PatchDiscriminator(**wanted)
    before = {k: v.clone() for k, v in discriminator.state_dict().items()}
    with caplog.at_level(logging.INFO):
        assert not load_discriminator(discriminator, wanted, str(tmp_path))
    (line,) = caplog.messages
    assert "the discriminator begins untrained" in line and "\n" not in line
    assert all(torch.equal(before[k], v) for k, v in discriminator.state_dict().items())


def test_sources_that_cannot_be_begun_from(source, tmp_path):
    (tmp_path / "empty").mkdir()
    for place, message in (
        (tmp_path / "nowhere", "there is no folder .*nowhere"),
        (tmp_path / "empty", "holds no model: it has no config.json"),
        (source / "config.json", "is a file: name the folder that holds it"),
        (source / "model.safetensors", "is a file: name the folder that holds it"),
    ):
        with pytest.raises(SettingsError, match=f"init_from: .*{message}"):
            chosen(init_from=str(place)).build(data())
    for part in ("decoder", "encoder"):
        with pytest.raises(SettingsError, match=f"train={part} leaves the codes as they are"):
            chosen(init_from=str(source), codebook_size=2000, train=part).build(data())
    with pytest.raises(
        SettingsError, match="is of type simvq_image, this command trains simvq_audio"
    ):
        AudioModelSettings(init_from=str(source)).build(AudioDataConfig())
    there = SimVQImageModel.from_pretrained(source)
    there.config.save_pretrained(tmp_path / "pickled")
    torch.save(there.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(SettingsError, match=r"cannot load .*pickled"):
        chosen(init_from=str(tmp_path / "pickled")).build(data())


def test_a_run_that_goes_on_does_not_need_its_source(source, tmp_path):
    """Its sizes are in the checkpoint, and settings that nobody gives are not changed back to defaults."""
    groups = {"data": ImageDataConfig, "model": ImageModelSettings}
    settings = build_settings(groups, {"init_from": str(source), "codebook_size": 100})
    first = settings["model"].build(settings["data"])
    gone = {"init_from": str(tmp_path / "gone")}
    again = build_settings(groups, gone)
    again["model"].go_on_from(Recorded(first.config.to_dict(), {"resolution": 48}))
    second = again["model"].build(again["data"])
    assert second.config.codebook_size == again["model"].codebook_size == 100
    assert second.config.channel_multipliers == first.config.channel_multipliers
    assert again["data"].resolution == 48
    second.load_state_dict(first.state_dict())
    with pytest.raises(SettingsError, match="codebook_dim is 32 and the model's is"):
        other = build_settings(groups, gone | {"codebook_dim": 32})
        other["model"].go_on_from(Recorded(first.config.to_dict(), {}))
        other["model"].build(other["data"])


def test_settings_that_contradict_the_beginning(source, one_process, tmp_path):
    with pytest.raises(SettingsError, match="train=decoder .* set init_from"):
        StartSettings(train="decoder").check_start()
    with pytest.raises(SettingsError, match="train must be one of"):
        StartSettings(init_from="x", train="both").check_start()
    with pytest.raises(SettingsError, match="start_from_data: the tokenizer of init_from"):
        AudioModelSettings(init_from="x", start_from_data=True)
    with pytest.raises(SettingsError, match="set autoencoder_steps=0"):
        tiny_trainer(chosen(init_from=str(source)), tmp_path / "run", autoencoder_steps=2)
    anew = {"autoencoder_steps": 2, "codes_from_latents": True}
    with pytest.raises(SettingsError, match="codes_from_latents=true with train=all"):
        tiny_trainer(chosen(init_from=str(source), train="decoder"), tmp_path / "run", **anew)
    with pytest.raises(SettingsError, match="encoder_steps=1 .* has train=encoder"):
        alone = chosen(init_from=str(source), train="encoder")
        tiny_trainer(alone, tmp_path / "run", encoder_steps=1)
    settings = chosen(init_from=str(source), train="encoder")
    recipe = build_tiny_recipe(validation=0, adversarial_weight=None)
    recipe.model, recipe.beginning = settings.build(data()), settings
    loop = TokenizerLoopSettings(output_dir=str(tmp_path / "other"), tracker="none", max_steps=1)
    with pytest.raises(SettingsError, match="adversarial_weight: null .* train=encoder"):
        Trainer(recipe, loop, make_accelerator(loop))


def test_audio_at_another_rate_and_a_folded_source(tmp_path, caplog):
    config = SimVQAudioConfig(
        num_filters=2, downsampling_ratios=[4, 4], n_fft=32, hidden_size=32, intermediate_size=32,
        num_decoder_layers=1, codebook_size=32, codebook_dim=4, sampling_rate=16_000,
    )  # fmt: skip
    model = SimVQAudioModel(config)
    model.remove_weight_norm()
    model.save_pretrained(tmp_path)
    groups = {"model": AudioModelSettings, "data": AudioDataConfig}
    settings = build_settings(groups, {"init_from": str(tmp_path)})
    same = settings["model"].build(settings["data"])
    assert settings["data"].sampling_rate == 16_000 and equal_states(same, model)
    settings = build_settings(groups, {"init_from": str(tmp_path), "sampling_rate": 24_000})
    with caplog.at_level(logging.INFO):
        other = settings["model"].build(settings["data"])
    assert other.config.sampling_rate == 24_000 and equal_states(other, model)
    assert "sampling_rate 16000 -> 24000" in caplog.text


def test_a_generator_begins_from_another(tmp_path):
    config = SimVQImageGenerationConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, codebook_size=16, grid_size=[2, 2], num_classes=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = SimVQForImageGeneration(config)
    model.save_pretrained(tmp_path)
    layout = TokenLayout((2, 2), ["cat", "dog"])
    groups = {"model": GeneratorModelSettings}
    settings = build_settings(groups, {"init_from": str(tmp_path)})["model"]
    again = settings.build(layout, 16, 4)
    assert equal_states(again, model) and again.config.id2label == {0: "cat", 1: "dog"}
    assert settings.build(layout, None, 4).config.codebook_size == 16
    with pytest.raises(SettingsError, match="codebook_size is 32 and the model's is 16"):
        settings.build(layout, 32, 4)
    settings = build_settings(groups, {"init_from": str(tmp_path), "hidden_size": 64})["model"]
    with pytest.raises(SettingsError, match="hidden_size is 64 and the model's is 32"):
        settings.build(layout, 16, 4)
