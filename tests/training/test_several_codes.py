"""Several codes a position, from a dataset to samples: tokenization, training, generation."""

import json
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hub_cards.dataset_card import make_dataset_card
from hub_cards.generator_card import make_generator_card
from modeling_simvq import (
    SimVQAudioConfig,
    SimVQAudioModel,
    SimVQForAudioGeneration,
    SimVQForImageGeneration,
    SimVQImageConfig,
    SimVQImageGenerationConfig,
    SimVQImageModel,
    SimVQImageProcessor,
)
from modeling_simvq.export_generator import plain_llama
from tests.modeling_simvq.tiny import AUDIO, IMAGE
from tests.support.programs import launch, run
from tests.training.support.generator_runs import train_here, write_split
from training.data.codes import AudioTokenDecoder, ImageTokenDecoder
from training.data.reader import UnreadableSample
from training.data.recordings import AudioDataConfig
from training.evaluation.generated_pictures import from_pipeline
from training.runtime.settings import SettingsError
from training.tokenization.encoders import AudioTokens

TRAINING = Path(__file__).parents[2] / "training"
GENERATE = """
import sys, torch, modeling_simvq
from transformers import AutoModel

generator, tokenizer = (AutoModel.from_pretrained(folder).eval() for folder in sys.argv[1:3])
with torch.no_grad():
    codes = generator.generate_images(torch.tensor([0, 1]), guidance_scale=2.0, top_k=20)
    pixels = [tokenizer.decode(image_codes=codes[:, :q]).pixel_values for q in (1, 2)]
print(tuple(codes.shape), *(tuple(one.shape) for one in pixels))
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A tokenizer of images with two quantizers."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer") / "model"
    SimVQImageModel(SimVQImageConfig(**IMAGE, num_quantizers=2)).save_pretrained(folder)
    SimVQImageProcessor(size_divisor=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    for split in ("train", "validation"):
        images = [Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(6)]
        rows = {"image": images, "label": [n % 2 for n in range(6)]}
        made = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        made.to_parquet(str(folder / f"{split}.parquet"))
    return folder


@pytest.mark.slow
def test_from_a_dataset_to_samples(tokenizer, pictures, tmp_path):
    codes, output = tmp_path / "codes", tmp_path / "run"
    words = [f"model={tokenizer}", f"dataset={pictures}", "resolution=8", "num_workers=0"]
    done = launch(TRAINING / "tokenize_dataset.py", *words, f"output={codes}")
    assert done.returncode == 0, done.stderr
    assert "Each row holds the codes of 2 of 2 quantizers" in (codes / "README.md").read_text()
    words = [f"tokenizer={tokenizer}", f"dataset={codes}", f"output_dir={output}", "max_steps=2"]
    words += ["hidden_size=32", "intermediate_size=48", "num_hidden_layers=1", "batch_size=4"]
    words += ["num_attention_heads=2", "num_workers=0", "samples=1", "tracker=none"]
    done = launch(TRAINING / "train_generator.py", *words)
    assert done.returncode == 0, done.stderr
    figures = json.loads((output / "figures.jsonl").read_text().splitlines()[-1])
    levels = [figures[f"loss_level_{level}"] for level in (1, 2)]
    assert figures["loss"] == pytest.approx(sum(levels) / 2)
    assert figures["perplexity_level_2"] == pytest.approx(math.exp(levels[1]))
    assert (output / "pipeline/model_index.json").exists()
    assert list(output.glob("samples/*.png"))
    done = run("-c", GENERATE, output / "pipeline/transformer", tokenizer)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 2, 4, 4) (2, 3, 8, 8) (2, 3, 8, 8)"
    # Another number of quantizers would be other codes.
    words = [f"model={tokenizer}", f"dataset={pictures}", "resolution=8", "num_workers=0"]
    again = launch(TRAINING / "tokenize_dataset.py", *words, f"output={codes}", "num_quantizers=1")
    assert again.returncode and "num_quantizers was 2, is 1" in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("levels", [1, 2])
def test_the_pipeline_and_its_evaluation(tokenizer, levels):
    """A code model of the first quantizer alone, too."""
    from modeling_simvq import SimVQImagePipeline

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = SimVQImageGenerationConfig(
        codebook_size=64,
        num_quantizers=levels,
        num_classes=2,
        grid_size=(4, 4),
        num_attention_heads=2,
        **sizes,
    )
    model = SimVQForImageGeneration(config).eval()
    decoder = SimVQImageModel.from_pretrained(tokenizer).eval()
    pipe = SimVQImagePipeline(decoder, model, SimVQImageProcessor(size_divisor=2))
    pipe.set_progress_bar_config(disable=True)
    codes = pipe(1, num_images=2, guidance_scale=2.0, output_type="latent").images
    assert codes.shape == ((2, 4, 4) if levels == 1 else (2, 2, 4, 4))
    made = from_pipeline(pipe, 3, resolution=8, batch_size=3, ranks=1, seed=0)
    pixels, labels = made.pixels(next(iter(made.loader)))
    assert pixels.shape == (3, 3, 8, 8) and labels.tolist() == [0, 1, 0]
    card = str(make_generator_card(model, "me/made"))
    assert ("codes at each position Q" in card) == (levels > 1)
    one = SimVQImageModel(SimVQImageConfig(**IMAGE))
    if levels > 1:
        with pytest.raises(ValueError, match="1 quantizers, but the transformer makes codes of 2"):
            SimVQImagePipeline(one, model, SimVQImageProcessor())


@pytest.mark.parametrize(("count", "shape"), [(1, (5,)), (2, (2, 5)), (3, (3, 5))])
def test_recordings_to_codes_of_the_first_quantizers(count, shape):
    torch.manual_seed(0)
    model = SimVQAudioModel(SimVQAudioConfig(**AUDIO, num_quantizers=3)).eval()
    data = AudioDataConfig(dataset="none", sampling_rate=24_000)
    tokens = AudioTokens(model, data, 0, count)
    waveforms = [torch.randn(1, 40) / 3, torch.randn(1, 72) / 3]
    codes = tokens.encode(waveforms)
    assert codes[0].shape == shape and codes[1].shape == (*shape[:-1], 9)
    with torch.no_grad():
        live = model.encode(waveforms[0][None], num_quantizers=count).audio_codes[0]
    np.testing.assert_array_equal(codes[0].reshape(count, 5), live)
    table = datasets.Dataset.from_dict(
        {"audio_codes": codes}, features=datasets.Features({"audio_codes": tokens.feature})
    )
    sample = AudioTokenDecoder(7, 64, count).read(table[0], "row 0", None)
    assert sample["audio_codes"].shape == (count, 7)
    assert torch.equal(sample["audio_codes"][:, :5], live)
    assert sample["audio_codes_mask"].tolist() == [[1] * 5 + [0] * 2]
    with torch.no_grad():
        assert model.decode(sample["audio_codes"][None, :, :5]).audio_values.shape == (1, 1, 40)


@pytest.mark.slow
def test_audio_with_factors(tmp_path):
    """The second level repeats the first, which the model learns; the figures tell them apart."""
    torch.manual_seed(0)
    model = SimVQAudioModel(SimVQAudioConfig(**AUDIO | {"codebook_size": 16}, num_quantizers=2))
    model.save_pretrained(tmp_path / "tokenizer")
    random = np.random.default_rng(0)
    features = {"audio_codes": datasets.List(datasets.List(datasets.Value("uint8")), length=2)}
    for split, count in (("train", 64), ("validation", 16)):
        first = [random.integers(0, 16, random.integers(3, 12)) for _ in range(count)]
        rows = {"audio_codes": [np.stack([one, one]) for one in first]}
        write_split(tmp_path / "codes", split, rows, features)
    recipe = train_here(
        tmp_path / "codes",
        tmp_path / "run",
        codebook_size=None,
        tokenizer=str(tmp_path / "tokenizer"),
        code_factors=[4, 4],
        clip_codes=10,
        max_steps=30,
        num_hidden_layers=1,
        learning_rate=1e-2,
        samples=1,
    )
    figures = json.loads((tmp_path / "run/figures.jsonl").read_text().splitlines()[-1])
    assert figures["loss_level_1"] > 2.5 > 1.0 > figures["loss_level_2"]
    assert list((tmp_path / "run/sounds").glob("*.wav"))
    made = recipe.model.eval().generate_audio(8, num_clips=20).audio_codes
    assert (made[:, 0] == made[:, 1]).float().mean() > 0.5
    loaded = SimVQForAudioGeneration.from_pretrained(tmp_path / "run/model")
    with pytest.raises(ValueError, match="num_quantizers = 2: it predicts several codes at a step"):
        plain_llama(loaded)
    other = {"audio_codes": datasets.List(datasets.Value("uint8"))}
    write_split(tmp_path / "one", "train", {"audio_codes": [[1, 2, 3]]}, other)
    with pytest.raises(SettingsError, match="num_quantizers is 1 and the model's is 2"):
        train_here(
            tmp_path / "one",
            tmp_path / "other",
            codebook_size=None,
            init_from=str(tmp_path / "run/model"),
            num_hidden_layers=1,
            clip_codes=10,
            validation_split=None,
        )


def test_codes_of_other_quantizers_are_named():
    images = ImageTokenDecoder((2, 2), 64, 1, None, 0.0, 3)
    codes = np.arange(12).reshape(3, 2, 2)
    read = images.read({"image_codes": codes.tolist()}, "row 0", None)["image_codes"]
    np.testing.assert_array_equal(read, codes)
    assert images.blank()["image_codes"].shape == (3, 2, 2)
    with pytest.raises(UnreadableSample, match=r"row 1: codes of shape \(2, 2\), .* \(3, 2, 2\)"):
        images.read({"image_codes": codes[0].tolist()}, "row 1", None)
    with pytest.raises(UnreadableSample, match=r"codes of shape \(3,\), not \(2, T\)"):
        AudioTokenDecoder(7, 64, 2).read({"audio_codes": [1, 2, 3]}, "row 0", None)


def test_the_card_tells_how_many():
    options = {"splits": {"train": 3}, "codebook_size": 64}

    def card(column: str, *quantizers: int) -> str:
        names = ("num_quantizers", "of_quantizers")
        chosen = dict(zip(names, quantizers, strict=False))
        return str(make_dataset_card("a/b", "a/c", columns=[column], **chosen, **options))

    assert "the codes of 2 of 4 quantizers, the first ones: (2, T)." in card("audio_codes", 2, 4)
    assert '["audio_codes"].long()[None])' in card("audio_codes", 2, 4)
    first = card("image_codes", 1, 4)
    assert "the codes of 1 of 4 quantizers, the first ones.\n" in first
    assert '["image_codes"].long()[:, None])' in first
    one = card("audio_codes")
    assert "quantizers" not in one and ".long()[None, None])" in one
    assert '["image_codes"].long())' in card("image_codes", 4, 4)
