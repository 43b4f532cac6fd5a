"""Generators on the one loop, in this process: what is learnt, validation, resume, broken rows, mistakes."""

import json
import math
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch

from hub_cards.generator_card import make_generator_card
from hub_cards.push_to_hub import push_to_hub
from modeling_simvq import (
    SimVQAudioConfig,
    SimVQAudioModel,
    SimVQForAudioGeneration,
    SimVQForImageGeneration,
    SimVQImageConfig,
    SimVQImageGenerationConfig,
    SimVQImageModel,
)
from tests.training.support.generator_runs import (
    GROUPS,
    train_here,
    write_picture_codes,
    write_split,
)
from training.data.codes import AudioTokenDecoder, ImageTokenDecoder, TokenLayout
from training.data.reader import UnreadableSample
from training.export_checkpoint import export_checkpoint
from training.loop.checkpoints import CheckpointError
from training.loop.optimizers import make_optimizer
from training.recipes.generator import (
    GeneratorLoopSettings,
)
from training.runtime.settings import SettingsError, parse_settings

CONFIGS = Path(__file__).parents[2] / "training" / "configs"


@pytest.fixture
def run(tmp_path):
    """Trains with the tiny settings and others; gives back the recipe."""

    def start(dataset, **settings):
        return train_here(dataset, settings.pop("output_dir", tmp_path / "run"), **settings)

    return start


@pytest.fixture(scope="module")
def picture_codes(tmp_path_factory):
    return write_picture_codes(tmp_path_factory.mktemp("pictures"))


@pytest.mark.slow
def test_classes_are_learnt_and_the_figures_are_those_of_the_saved_model(
    run, picture_codes, tmp_path
):
    run(picture_codes, max_steps=80, validate_every=40)
    lines = (tmp_path / "run" / "figures.jsonl").read_text().splitlines()
    figures = json.loads(lines[-1])
    # The entropies of the classes: log 10, log 5 and 0.
    best = (math.log(10) + math.log(5)) / 3
    assert best - 0.1 < figures["loss"] < best + 0.35
    assert figures["bits_per_code"] == pytest.approx(figures["loss"] / math.log(2))

    model = SimVQForImageGeneration.from_pretrained(tmp_path / "run" / "model").eval()
    assert model.config.grid_size == [3, 4] and model.config.id2label[1] == "narrow"
    rows = datasets.load_dataset(
        str(picture_codes), split="validation", cache_dir=str(tmp_path)
    ).with_format("torch")
    codes, labels = rows["image_codes"][:].long(), rows["label"][:]
    with torch.no_grad():
        loss = float(model(image_codes=codes, class_labels=labels).loss)
        unconditional = float(model(image_codes=codes).loss)
    assert figures["loss"] == pytest.approx(loss, rel=1e-5)
    # The null class was trained too, by label dropout; one code gives the class away, the first costs more.
    assert loss < unconditional < loss + 1


@pytest.mark.slow
def test_resume_goes_on_bit_for_bit(run, picture_codes, tmp_path):
    same = {"label_dropout": 0.5, "lr_schedule": "constant", "mixed_precision": "bf16"}
    whole = run(picture_codes, max_steps=6, output_dir=str(tmp_path / "whole"), **same)
    run(picture_codes, max_steps=3, **same)
    resumed = run(picture_codes, max_steps=6, resume="latest", **same)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    averages = [tmp_path / folder / "model/model.safetensors" for folder in ("whole", "run")]
    assert averages[0].read_bytes() == averages[1].read_bytes()
    exported = export_checkpoint(tmp_path / "run", tmp_path / "exported")
    assert (exported / "model.safetensors").read_bytes() == averages[0].read_bytes()
    assert (exported / "config.json").read_bytes() == averages[1].with_name(
        "config.json"
    ).read_bytes()
    with pytest.raises(CheckpointError, match="hidden_size was 32 and is now 64 "):
        run(picture_codes, max_steps=7, resume="latest", hidden_size=64, **same)


@pytest.mark.slow
def test_weight_decay_spares_vectors(run, picture_codes):
    recipe = run(picture_codes, max_steps=1, gradient_checkpointing=True)
    optimizer = make_optimizer(recipe.model, GeneratorLoopSettings())
    decays = {group["weight_decay"]: group["params"] for group in optimizer.param_groups}
    assert set(decays) == {0.05, 0.0}
    assert {p.ndim for p in decays[0.0]} == {1} and {p.ndim for p in decays[0.05]} == {2}
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_sound_of_any_length(run, tmp_path, streaming, capsys, monkeypatch, hub):
    """Crops and padding; the validation's loss is the mean over codes, not over clips."""
    # Datasets sleeps at the end of every epoch of a stream.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)
    random = np.random.default_rng(0)
    features = {"audio_codes": datasets.List(datasets.Value("uint8"))}
    lengths = {"train": [30, 3, 12, 20, 9, 12, 31, 8] * 2, "validation": [2, 12, 25]}
    for split, sizes in lengths.items():
        clips = [random.integers(0, 40, size).tolist() for size in sizes]
        write_split(tmp_path / "sound", split, {"audio_codes": clips}, features)
    small = {"num_filters": 4, "downsampling_ratios": [4, 5, 8], "num_lstm_layers": 0, "n_fft": 640}
    small |= {"hidden_size": 32, "intermediate_size": 32, "num_decoder_layers": 1}
    tokenizer = SimVQAudioModel(SimVQAudioConfig(**small, codebook_size=40, codebook_dim=16))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    run(
        tmp_path / "sound",
        max_steps=3,
        clip_codes=12,
        samples=2,
        tokenizer=str(tmp_path / "tokenizer"),
        streaming=streaming,
        validation_split=None if streaming else "validation",
    )
    model = SimVQForAudioGeneration.from_pretrained(tmp_path / "run" / "model").eval()
    assert model.config.max_codes == 12
    if streaming:
        return
    total = 0.0
    for clip in clips:
        codes = torch.tensor(clip[:12])[None, None]
        with torch.no_grad():
            total += float(model(audio_codes=codes).loss) * codes.numel()
    figures = json.loads((tmp_path / "run" / "figures.jsonl").read_text().splitlines()[-1])
    assert figures["loss"] == pytest.approx(total / (2 + 12 + 12), rel=1e-5)
    heard = sorted((tmp_path / "run" / "sounds").iterdir())
    assert [path.name[-12:] for path in heard] == ["sample-0.wav", "sample-1.wav"]
    for path in heard:
        sound, rate = soundfile.read(path)
        assert (len(sound), rate) == (12 * 160, 24_000) and np.abs(sound).max() > 0
    # Its card, with the code that loads it.
    made = push_to_hub(tmp_path / "run" / "model", "maker/voices", with_code=True, dry_run=True)
    card = (Path(made) / "README.md").read_text()
    assert "generator.generate_audio(num_codes=12)" in card and "bits for a code" in card
    assert "modeling_simvq_generation.py" in capsys.readouterr().out
    shutil.rmtree(made)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("generator_*.yaml")), ids=lambda f: f.stem)
def test_shipped_configurations_are_valid(file):
    settings = parse_settings(GROUPS, "", ["--config", str(file), "dataset=codes"])
    layout = TokenLayout((16, 16), ["cat"])
    assert settings["model"].config(layout, 8192, 750).num_classes == 1


def test_rows_that_cannot_be_used():
    pictures = ImageTokenDecoder((2, 2), 40, 3, "label", 0.5)
    good = {"image_codes": [[0, 39], [1, 2]], "label": 2}
    sample = pictures.read(good, "row 0", None)
    assert sample["image_codes"].tolist() == good["image_codes"] and sample["class_labels"] == 2
    assert [pictures.read(good | {"label": n}, "", None)["class_labels"] for n in (None, -1)] == [
        3,
        3,
    ]
    for change in (
        {"image_codes": [[0, 40], [1, 2]]},
        {"image_codes": [[0, -1], [1, 2]]},
        {"image_codes": [[0, 1], [1]]},
        {"image_codes": [[0, 1, 2]]},
        {"image_codes": [[0.5, 1], [1, 2]]},
        {"image_codes": None},
        {"image_codes": "codes"},
        {"label": 3},
        {"label": "cat"},
    ):
        with pytest.raises(UnreadableSample, match="row 7"):
            pictures.read(good | change, "row 7", None)
    # Which classes are hidden follows from the sample's generator alone.
    seeds = [torch.Generator().manual_seed(n) for n in range(200)]
    labels = [int(pictures.read(good, "", generator)["class_labels"]) for generator in seeds]
    assert 70 < labels.count(3) < 130 and set(labels) == {2, 3}

    sound = AudioTokenDecoder(4, 40)
    with pytest.raises(UnreadableSample, match="row 7"):
        sound.read({"audio_codes": []}, "row 7", None)
    sample = sound.read({"audio_codes": [5, 6]}, "row 0", torch.Generator())
    assert sample["audio_codes"].tolist() == [[5, 6, 0, 0]]
    assert sample["audio_codes_mask"].tolist() == [[1, 1, 0, 0]]
    long = {"audio_codes": list(range(10))}
    starts = {
        int(sound.read(long, "", torch.Generator().manual_seed(n))["audio_codes"][0, 0])
        for n in range(60)
    }
    assert starts == set(range(7))


def test_class_names_are_no_markup_on_the_card():
    names = {0: "```\n# x", 1: "[a](http://b)", 2: "cat"}
    config = SimVQImageGenerationConfig(
        num_classes=3,
        id2label=names,
        codebook_size=8,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = SimVQForImageGeneration(config)
    card = str(make_generator_card(model, "me/made", sample_names=list(names.values())))
    assert "pipeline(0, num_images=4" in card and "Rows: \\`\\`\\`" in card
    assert "\n# x" not in card and "[a](" not in card
    assert "SimVQImagePipeline.from_pretrained" in card


def test_mistakes_are_named(run, picture_codes, tmp_path):
    plain = {"label": datasets.Value("int64"), "text": datasets.Value("string")}
    write_split(tmp_path / "other", "train", {"label": [0], "text": ["a"]}, plain)
    codes = {"image_codes": datasets.List(datasets.List(datasets.Value("uint8")))}
    write_split(
        tmp_path / "plain", "train", {"label": [0], "image_codes": [[[1]]]},
        {"label": plain["label"], **codes},
    )  # fmt: skip
    for dataset, settings, message in (
        (tmp_path / "other", {}, "no column image_codes or audio_codes, it has label, text"),
        (tmp_path / "plain", {}, "num_classes: column 'label' does not tell"),
        (tmp_path / "plain", {"label_column": "kind"}, "label_column: .* no column 'kind'"),
        (picture_codes, {"num_classes": 9}, "num_classes is 9, but 'label' has 3"),
        (picture_codes, {"codebook_size": None}, "codebook_size: set it, or name the tokenizer"),
        (picture_codes, {"num_attention_heads": 3}, "hidden_size must be a multiple"),
        (picture_codes, {"label_dropout": 2}, "label_dropout must lie"),
        (picture_codes, {"validation_split": "test"}, "no split 'test'"),
        (tmp_path / "nowhere", {}, "there is no file or folder"),
    ):
        with pytest.raises(SettingsError, match=message):
            run(dataset, **settings)
    tokenizer = SimVQImageModel(
        SimVQImageConfig(
            base_channels=32,
            channel_multipliers=[1, 2],
            num_res_blocks=1,
            codebook_size=40,
            codebook_dim=8,
        )
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    shutil.copytree(picture_codes, tmp_path / "codes")
    (tmp_path / "codes" / "tokenization.json").write_text('{"weights": "0123456789abcdef"}')
    with pytest.raises(SettingsError, match="not of this tokenizer, .* hash 0123456789abcdef"):
        run(tmp_path / "codes", tokenizer=str(tmp_path / "tokenizer"))
    with pytest.raises(SettingsError, match="codebook_size is 30, but the tokenizer has 40"):
        run(picture_codes, codebook_size=30, tokenizer=str(tmp_path / "tokenizer"))
    # Codes of a larger codebook: every row is refused, and the message says why.
    with pytest.raises(UnreadableSample, match="those of the tokenizer are 0 to 4"):
        run(picture_codes, codebook_size=5, max_steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_shard_of_a_stream(run, picture_codes, tmp_path, num_workers, monkeypatch, capfd):
    """What is not whole is skipped by name; what breaks while it is read ends the run in one line."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)
    shutil.copytree(picture_codes, tmp_path / "codes")
    good = tmp_path / "codes/data/train-00000.parquet"
    second = tmp_path / "codes/data/train-00001.parquet"
    settings = {"streaming": True, "num_workers": num_workers, "epochs": 3}
    content = good.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    run(tmp_path / "codes", max_steps=13, validation_split=None, **settings)
    assert "train-00001.parquet" in capfd.readouterr().err
    garbled = bytearray(content)
    garbled[100:400] = bytes(byte ^ 0x5A for byte in garbled[100:400])
    second.write_bytes(garbled)
    with pytest.raises(
        OSError, match="stream of .*codes cannot be read any further.*damaged shard"
    ):
        run(tmp_path / "codes", output_dir=tmp_path / "other", max_steps=20, **settings)
