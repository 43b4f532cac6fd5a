"""The analysis of a codebook: known values, and the command on models of both modalities."""

import json
from pathlib import Path

import pytest
import skimage.data
import torch
from PIL import Image

from modeling_simvq import (
    SimVQ,
    SimVQAudioConfig,
    SimVQAudioModel,
    SimVQImageConfig,
    SimVQImageModel,
    SimVQImageProcessor,
)
from modeling_simvq.nearest_code import nearest_code
from modeling_simvq.several_quantizers import GroupedQuantizer, ResidualQuantizer
from tests.support.programs import run
from training.analyze_codebook import (
    TokenSample,
    analyse,
    code_distances,
    figures_of,
    find_model,
    nearest_other_distances,
    read_history,
    seen_by,
)
from training.codebook.spectra import ranks_of, rounded_values, spectra, spectrum
from training.runtime.settings import SettingsError

REPOSITORY = Path(__file__).parents[2]


def image_model(**changes) -> SimVQImageModel:
    torch.manual_seed(0)
    small = {"base_channels": 32, "channel_multipliers": [1, 2], "num_res_blocks": 1}
    config = small | {"codebook_size": 256, "codebook_dim": 16} | changes
    return SimVQImageModel(SimVQImageConfig(**config)).eval()


def random_rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens_of(codes: torch.Tensor, latents: torch.Tensor, size: int):
    sample = TokenSample(len(codes), latents.shape[1])
    sample.add(latents.T[None], codes[None])
    return codes.bincount(minlength=size), sample


def test_uniform_use_is_all_of_the_codebook():
    model = image_model()
    codebook = model.quantizer.codebook().detach()
    codes = torch.arange(256).repeat(4)
    usage = analyse(model, "m", tokens_of(codes, codebook[codes], 256), []).usage()
    assert usage["utilisation"] == 1 and usage["dead_codes"] == 0 and usage["tokens"] == 1024
    assert usage["perplexity"] == pytest.approx(256)
    assert usage["lost_variance"] == pytest.approx(0, abs=1e-6)  # the latents are the codes
    assert usage["scale_ratio"] == pytest.approx(1, rel=1e-4)
    assert usage["utilisation_by_chance"] == pytest.approx(1 - (255 / 256) ** 1024)


def test_a_collapsed_codebook_is_called_that():
    model = image_model()
    codes = torch.tensor([3, 7]).repeat(500)
    far = model.quantizer.codebook().detach()[codes] * 100
    findings = analyse(model, "m", tokens_of(codes, far, 256), [])
    assert findings.usage()["dead_codes"] == 254
    assert findings.verdict().startswith("**Collapsed**: only 0.78% of the codes are used")


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_ranks_are_those_of_the_matrix(rank):
    matrix = random_rows(40, rank) @ random_rows(rank, 16, seed=1)
    found = spectrum(matrix, centred=False)
    assert found.numerical_rank == rank == int(torch.linalg.matrix_rank(matrix))
    values = torch.linalg.svdvals(matrix.double())
    torch.testing.assert_close(found.values, values / values[0], atol=1e-7, rtol=1e-5)
    assert 1 <= found.effective_rank <= rank + 1e-3
    assert found.variance_rank <= rank


def test_a_spectrum_about_the_mean_ignores_an_offset():
    rows = random_rows(500, 8)
    torch.testing.assert_close(
        spectrum(rows).values, spectrum(rows + 100).values, atol=1e-4, rtol=0
    )
    assert spectrum(torch.eye(8), centred=False).effective_rank == pytest.approx(8)
    with pytest.raises(ValueError, match="diverged"):
        spectrum(rows * torch.nan)


def test_what_the_trainer_logs_of_them():
    model = image_model()
    found = spectra(model.quantizer, most_rows=64)
    assert found["codebook"].shape == (64, 16) and found["W"].shape == (16, 16)
    ranks, values = ranks_of(found), rounded_values(found)
    assert ranks["numerical_rank_w"] == 16 >= ranks["rank_w"] > 10 and ranks["rank_codebook"] > 10
    assert values["spectrum_w"][0] == 1 and len(values["spectrum_codebook"]) == 16
    plain = image_model(quantizer_options={"train_basis": True, "train_projection": False})
    assert set(ranks_of(spectra(plain.quantizer))) == {"rank_codebook"}


def test_distances_to_the_nearest_other_code_are_those_of_all_pairs():
    codebook = random_rows(300, 6)
    codebook[17] = codebook[23]  # two codes may coincide
    for count in (300, 40, 1):
        chosen = torch.randperm(300, generator=torch.Generator().manual_seed(1))[:count]
        everything = torch.cdist(codebook.double(), codebook.double()).fill_diagonal_(torch.inf)
        found = nearest_other_distances(codebook, chosen)
        torch.testing.assert_close(
            found, everything.min(dim=1).values[chosen], atol=1e-6, rtol=1e-6
        )


def test_used_and_dead_codes_are_told_apart():
    counts = torch.zeros(300, dtype=torch.int64)
    counts[:20] = 5
    found = code_distances(random_rows(300, 6), counts)
    assert set(found["used"][0].tolist()) == set(range(20)) and len(found["dead"][0]) == 280
    assert list(code_distances(random_rows(300, 6), None)) == ["code"]


def test_the_sample_of_tokens_is_bounded_and_drawn_from_all():
    sample = TokenSample(100, 2)
    for start in range(0, 1000, 50):
        codes = torch.arange(start, start + 50)
        sample.add(codes.float().expand(1, 2, 50), codes[None])
    assert len(sample.codes) == 100 == len(sample.codes.unique())
    assert torch.equal(sample.latents[:, 0], sample.codes.float())
    assert 300 < sample.codes.float().mean() < 700


def test_the_history_of_one_of_several_quantizers_is_its_own():
    figures = {"step": 3, "utilisation": 0.6, "reachable_utilisation": 0.9, "perplexity": 8.0}
    figures |= {"utilisation_1": 1.0, "utilisation_2": 0.2, "rank_w": 5.0}
    shared = {"step": 3, "reachable_utilisation": 0.9}
    first, second = (figures_of(number, figures) for number in (0, 1))
    assert second == shared | {"utilisation": 0.2}
    assert {"utilisation": 1.0, "rank_w": 5.0, **shared}.items() <= first.items()
    assert "perplexity" not in first
    # Runs of before each quantizer was counted for itself.
    assert figures_of(1, {"step": 3, "utilisation": 0.6}) == {"step": 3}


def test_a_history_survives_a_cut_line_and_a_resume(tmp_path):
    (tmp_path / "model").mkdir()
    lines = [
        '{"step": 10, "rank_w": 3}',
        '{"step": 20, "rank_w": 2}',
        '{"step": 10, "rank_w": 4}',
        '{"st',
    ]
    (tmp_path / "figures.jsonl").write_text("\n".join(lines))
    history = read_history(str(tmp_path / "model"))
    assert history == [{"step": 10, "rank_w": 4}, {"step": 20, "rank_w": 2}]
    assert read_history(str(tmp_path)) == []


def command(*words: str):
    return run("training/analyze_codebook.py", *words, cwd=REPOSITORY)


@pytest.mark.slow
def test_the_command_on_a_run(tmp_path):
    """Pictures, a history beside the model, and a second system compared with it."""
    folder = tmp_path / "photos" / "validation"
    folder.mkdir(parents=True)
    for index in range(5):
        tile = skimage.data.astronaut()[64 * index : 64 * index + 64, 100:164]
        Image.fromarray(tile).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes(b"no image")
    for name, quantizer in (("ours", "simvq"), ("bits", "lfq")):
        if quantizer != "simvq":
            pytest.importorskip("vector_quantize_pytorch")
        model = tmp_path / name / "model"
        image_model(quantizer=quantizer).save_pretrained(model)
        SimVQImageProcessor(size_divisor=2).save_pretrained(model)
    history = [
        {
            "spectrum_w": [1.0, 0.5 / n],
            "step": n,
            "rank_w": 16 - n,
            "utilisation": n / 10,
            "perplexity": n,
        }
        for n in (1, 2)
    ]
    (tmp_path / "ours" / "figures.jsonl").write_text("\n".join(map(json.dumps, history)))
    data = [f"dataset={tmp_path / 'photos'}", "resolution=32", "batch_size=2", "num_workers=0"]
    done = command(
        str(tmp_path / "ours"), str(tmp_path / "bits"), *data, f"output={tmp_path / 'out'}"
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "codebook.md").read_text()
    assert page in done.stdout and "# Codebooks compared" in page and "photos, validation" in page
    for name in ("usage", "spectra", "distances", "training", "training_spectra"):
        assert f"![]({name}.png)" in page
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert picture.width > 400
    ours, bits = json.loads((tmp_path / "out" / "codebook.json").read_text())["models"]
    assert ours["usage"]["tokens"] == bits["usage"]["tokens"] == 5 * 16 * 16
    assert set(ours["spectra"]) == {"W", "C", "codebook", "latents"} and ours["history"] == history
    assert set(bits["spectra"]) == {"codebook", "latents"}
    assert "latent_to_code" in ours["distances"] and "latent_to_code" not in bits["distances"]


@pytest.mark.slow
def test_the_command_without_data_on_sound(tmp_path):
    torch.manual_seed(0)
    small = {"num_filters": 4, "downsampling_ratios": [4, 5, 8], "num_lstm_layers": 0, "n_fft": 640}
    small |= {"hidden_size": 32, "intermediate_size": 32, "num_decoder_layers": 1}
    SimVQAudioModel(SimVQAudioConfig(**small, codebook_size=64, codebook_dim=16)).save_pretrained(
        tmp_path / "model"
    )
    done = command(str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "model/codebook_analysis/codebook.json").read_text())["models"][
        0
    ]
    assert found["usage"] is None and list(found["distances"]) == ["code_to_code"]
    assert found["spectra"]["W"]["numerical_rank"] == 16
    assert not (tmp_path / "model/codebook_analysis/usage.png").exists()


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SettingsError, match="holds no config.json"):
        find_model(str(tmp_path))
    with pytest.raises(SettingsError, match="nowhere/at/all does not exist: name a model"):
        find_model("nowhere/at/all")
    assert find_model("someone/tokenizer") == "someone/tokenizer"


@pytest.mark.parametrize("kind", [ResidualQuantizer, GroupedQuantizer])
def test_each_quantizer_is_analysed_on_what_it_saw(kind):
    """Its codes are then the nearest to what it is given, whichever of several it is."""
    torch.manual_seed(0)
    width = 6 if kind is ResidualQuantizer else 2
    several = kind([SimVQ(64, width) for _ in range(3)]).eval()
    latents = torch.randn(2, 6, 4, 5)
    with torch.no_grad():
        codes = several(latents)[1]
        for number, level in enumerate(several.levels):
            seen, own = seen_by(several, number, latents, codes)
            rows = seen.movedim(1, -1).reshape(-1, width)
            assert torch.equal(nearest_code(rows, level.codebook()), own.flatten())
        seen, own = seen_by(several.levels[0], 0, latents, codes[:, 0])
        assert seen is latents and torch.equal(own, codes[:, 0])
