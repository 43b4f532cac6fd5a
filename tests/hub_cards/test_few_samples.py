"""Figures that few samples do not settle: marked where they stand, and not beside those of other systems."""

import json

import yaml

from hub_cards.evaluation import FEWEST_SAMPLES, Evaluation, read_evaluations, write_evaluations
from hub_cards.tokenizer_card import make_model_card
from modeling_simvq import SimVQImageConfig, SimVQImageModel
from training.evaluation.report import markdown

FIGURES = {"rfid": 11.25, "psnr": 20.5, "utilisation": 0.12, "perplexity": 90.0}
FIGURES |= {"reachable_utilisation": 0.22}


def evaluation(samples: int | None, **changes) -> Evaluation:
    options = {"metrics": FIGURES, "samples": samples, "extra": {"intervals": {"psnr": 0.123}}}
    return Evaluation("held_out", **(options | changes))


def test_what_is_biased_says_so_and_is_not_indexed(tmp_path):
    few = evaluation(56)
    assert few.indexed == {"psnr": 20.5}
    assert few.warnings() == [
        "rFID: of 56 samples it is biased, to be compared with the same samples alone.",
        "utilisation and perplexity: so many tokens could reach 22.0% of the codes.",
    ]
    for warning in few.warnings():
        assert warning in markdown(few, "image")
    write_evaluations(tmp_path / "evaluation.json", [few])
    assert set(json.loads((tmp_path / "evaluation.json").read_text())["too_few_samples"]) == {
        "rfid",
        "utilisation",
        "perplexity",
    }
    (read,) = read_evaluations(tmp_path / "evaluation.json")
    assert read == few


def test_many_samples_are_indexed():
    many = evaluation(FEWEST_SAMPLES, metrics=FIGURES | {"reachable_utilisation": 0.999})
    assert many.indexed == {k: v for k, v in FIGURES.items() if k != "reachable_utilisation"}
    assert not many.warnings()
    assert evaluation(None, metrics={"rfid": 2.0}).indexed == {"rfid": 2.0}  # how many is not known
    assert evaluation(7, source="authors").indexed.keys() >= {"rfid", "utilisation"}
    made = {"gfid": 9.0, "inception_score": 3.0, "nearest_pixel": 1.0}
    against = evaluation(50_000, metrics=made, extra={"reference_samples": 16})
    assert against.indexed == {"nearest_pixel": 1.0} and "of 16 samples" in against.warnings()[0]


def test_the_card_shows_them_with_intervals_and_the_warning():
    options = {"hidden_size": 8, "channel_multipliers": [1, 1], "num_res_blocks": 1}
    config = SimVQImageConfig(codebook_size=16, codebook_dim=8, norm_groups=4, **options)
    text = str(make_model_card(SimVQImageModel(config), "me/mine", evaluations=[evaluation(56)]))
    assert "| rFID ↓ | 11.25 |" in text and "| PSNR, dB ↑ | 20.5 ± 0.12 |" in text
    assert "of 56 samples it is biased" in text
    front = yaml.safe_load(text.split("---")[1])
    (result,) = front["model-index"][0]["results"]
    assert [metric["type"] for metric in result["metrics"]] == ["psnr"]


def test_figures_of_each_quantizer_stand_beside_those_of_all_under_a_name_of_their_own():
    metrics = {"utilisation_10": 0.5, "utilisation_2": 1.0, "perplexity_1": 7, "my_2": 1.0}
    rows = Evaluation(dataset={}, metrics=metrics | {"utilisation": 0.75}).rows()
    assert rows == [
        ("utilisation ↑", "75.0%"),
        ("utilisation of quantizer 2 ↑", "100.0%"),
        ("utilisation of quantizer 10 ↑", "50.0%"),
        ("perplexity of quantizer 1", "7.0"),
        ("my_2", "1.0"),
    ]
