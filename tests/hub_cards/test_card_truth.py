"""Tests that cards tell the truth: figures beside their ceiling, no local path, data told apart, the method."""

import re
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from hub_cards.card_samples import SamplesError, write_samples
from hub_cards.dataset_card import make_dataset_card
from hub_cards.evaluation import Evaluation
from hub_cards.tokenizer_card import eval_results, make_model_card, public_settings
from modeling_simvq import SimVQImageConfig, SimVQImageModel, SimVQImageProcessor

SPACE = Path(__file__).parents[2] / "hub_cards" / "space"


def tiny(**options) -> SimVQImageModel:
    sizes = {"base_channels": 32, "channel_multipliers": [1, 1], "num_res_blocks": 1}
    config = SimVQImageConfig(**sizes, codebook_dim=8, **{"codebook_size": 1024} | options)
    return SimVQImageModel(config)


def test_use_stands_beside_what_so_many_tokens_could_reach():
    metrics = {"utilisation": 0.119, "reachable_utilisation": 0.221}
    text = str(make_model_card(tiny(), "me/x", evaluations=[Evaluation("Photos", metrics)]))
    assert "| in use on Photos | 11.9% (so many tokens could reach 22.1%) |" in text
    metrics["reachable_utilisation"] = 1.0
    text = str(make_model_card(tiny(), "me/x", evaluations=[Evaluation("Photos", metrics)]))
    assert "| in use on Photos | 11.9% |" in text


def test_no_sentence_promises_what_the_model_does_not_do():
    text = str(make_model_card(tiny(), "me/x"))
    assert "frozen random basis" in text and "left to die" not in text
    assert "patch by patch" not in text and "over the whole image" in text
    text = str(make_model_card(tiny(quantizer="fsq", codebook_size=1000), "me/x"))
    assert "frozen random basis" not in text and "FSQ (finite scalar quantization)" in text


@pytest.mark.parametrize(
    "value",
    [
        *("/home/someone/clip.safetensors", "~/clip.safetensors", "../clip.safetensors"),
        *(r"C:\Users\someone\clip.safetensors", "file:///srv/clip.safetensors", "clip.safetensors"),
        *("features/clip.safetensors", "runs/features/clip.safetensors"),
    ],
)
def test_no_path_of_this_machine_is_published(value):
    assert public_settings({"codebook_features": value}) == {"codebook_features": "(local files)"}


def test_paths_are_found_wherever_they_stand():
    settings = {
        "dataset": "/data/photos",
        "tokenizer": "me/tokenizer",
        "config_name": "/srv/x",
        "quantizer_options": {"basis_init": "/home/someone/c.pt", "rotation_trick": True},
        "downsampling_ratios": [2, 4],
        "train_split": "train[:95%]+train.other",
        "learning_rate": 1e-4,
    }
    assert public_settings(settings) == settings | {
        "dataset": "(local files)",
        "config_name": "(local files)",
        "quantizer_options": {"basis_init": "(local files)", "rotation_trick": True},
    }


def test_model_index_keeps_the_data_apart():
    evaluations = [
        Evaluation("Photos of cats", {"psnr": 20.0}, split="train"),
        Evaluation("Photos of dogs", {"psnr": 30.0}, split="train"),
        Evaluation("Photos: of dogs", {"psnr": 31.0}, split="train"),
        Evaluation("On the Hub", {"psnr": 25.0}, dataset_id="org/x", split="test"),
        Evaluation("The same again", {"psnr": 26.0}, dataset_id="org/x", split="test"),
    ]
    kinds = [result.dataset_type for result in eval_results(evaluations, "a", "b")]
    assert kinds == [
        "local-photos-of-cats",
        "local-photos-of-dogs",
        "local-photos-of-dogs-2",
        "org/x",
    ]
    card = make_model_card(tiny(), "me/x", evaluations=evaluations)
    read = ModelCard(str(card)).data.eval_results
    assert {(r.dataset_name, r.metric_value) for r in read} == {
        (e.dataset, e.metrics["psnr"]) for e in evaluations[:4]
    }


def test_cards_of_codes_name_only_what_resolves():
    options = {"splits": {"train": 3}, "columns": ["image_codes"], "codebook_size": 16}
    text = str(make_dataset_card("codes", "model", **options))
    # Datasets refuses ".", which has no name.
    assert 'load_dataset(str(Path.cwd()), split="train")' in text and "# in this folder" in text
    assert 'from_pretrained("NAME OF THE TOKENIZER"' in text and "is not on the Hub" in text
    text = str(make_dataset_card("me/codes", "me/tokenizer", **options))
    assert 'load_dataset("me/codes", split="train")' in text
    assert 'from_pretrained("me/tokenizer"' in text


def test_the_page_of_the_space_names_its_limits():
    tokenizer, page = ((SPACE / name).read_text() for name in ("tokenizer.py", "README.md"))
    (side,) = re.findall(r"^LONGEST_SIDE = (\d+)", tokenizer, re.MULTILINE)
    (seconds,) = re.findall(r"^LONGEST_SECONDS = (\d+)", tokenizer, re.MULTILINE)
    assert f"above {side} pixels" in page and f"above {seconds} seconds" in page


def test_samples_of_a_card_are_read_as_the_processor_reads_them(tmp_path):
    """A 16-bit image is no white one; what is no common image is refused, whatever its name."""
    level = np.full((16, 16), 32_896, np.uint16)
    Image.fromarray(level).save(tmp_path / "deep.png")
    processor = SimVQImageProcessor(size_divisor=2, do_resize=False, do_center_crop=False)
    write_samples(tiny(), processor, tmp_path / "deep.png", tmp_path / "made")
    sheet = np.asarray(Image.open(tmp_path / "made/reconstructions.png"))
    assert sheet[0, 0].tolist() == [128, 128, 128]
    Image.new("RGB", (16, 16)).save(tmp_path / "other.eps")
    (tmp_path / "other.eps").rename(tmp_path / "other.png")
    with pytest.raises(SamplesError, match=r"other\.png"):
        write_samples(tiny(), processor, tmp_path / "other.png", tmp_path / "made")


def test_sizes_on_a_card_are_those_of_the_processor_and_of_the_training():
    settings = {"resolution": 64, "dataset": "a/b"}
    text = str(make_model_card(tiny(), "me/x", resolution=32, short_side=40, settings=settings))
    assert "image of 32 x 32 pixels becomes 16 x 16 codes" in text
    assert "short side to 40 pixels and crops the centre of 32 x 32" in text
    assert "Trained at 64 x 64 pixels" in text
    text = str(make_model_card(tiny(), "me/x"))  # nobody says
    assert "Trained at" not in text and "128" not in text and "crops" not in text


def test_use_of_how_many_tokens_is_said_to_be_unknown_where_it_is():
    evaluations = [Evaluation("Photos", {"utilisation": 0.119})]
    text = str(make_model_card(tiny(), "me/x", evaluations=evaluations))
    assert "| in use on Photos | 11.9% (of how many tokens is not recorded) |" in text
