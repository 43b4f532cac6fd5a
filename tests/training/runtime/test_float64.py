"""All that is computed in float64 in training and evaluation, with values of a device that has none (MPS)."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from accelerate import Accelerator

from modeling_simvq import SimVQ
from modeling_simvq.code_prediction import order_by_similarity
from modeling_simvq.index_backpropagation import IndexBackpropagation
from tests.training.support.device_without_float64 import device_without_float64
from training.codebook.spectra import spectra
from training.codebook.start import match_codes_to_latents
from training.codebook.usage import CodeCounter, effective_rank, latent_statistics
from training.evaluation.image import BatchPsnr
from training.evaluation.report import Mean
from training.loop.reports import FigureMeans
from training.metrics.inception import frechet_distance
from training.metrics.neighbours import NearestPictures
from training.recipes.drawn_samples import SampleSettings
from training.recipes.generator import GeneratorRecipe
from training.runtime.float64 import to_float64


@pytest.fixture
def values() -> torch.Tensor:
    return torch.randn(3, 8, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def accelerator(one_process):
    return Accelerator(cpu=True)


def both(compute, device: torch.device) -> None:
    """What `compute` gives of a function that puts tensors on a device is the same on both."""
    ours = compute(lambda tensor: tensor.to(device))
    theirs = compute(lambda tensor: tensor)
    assert ours == pytest.approx(theirs, rel=1e-5), (ours, theirs)


def test_the_device_refuses_float64():
    with device_without_float64() as device:
        on_it = torch.ones(3, device=device) + torch.ones(3).to(device)
        assert on_it.device == device and float(on_it.sum()) == 6
        for wrong in (
            lambda: on_it.double(),
            lambda: torch.zeros(2, dtype=torch.float64).to(device),
        ):
            with pytest.raises(TypeError, match="float64"):
                wrong()
        assert to_float64(on_it).tolist() == [2.0] * 3


@pytest.mark.slow
def test_statistics_of_codes_and_latents(values, accelerator):
    codes = torch.arange(40) % 7

    def usage(on):
        counter = CodeCounter(16, on(codes).device)
        counter.update(on(codes))
        return counter.read(accelerator).metrics()

    with device_without_float64() as device:
        both(usage, device)
        both(lambda on: latent_statistics(on(values), on(values[:, :, 0, 0])), device)
        both(lambda on: effective_rank(on(values[0, 0])), device)
        both(lambda on: order_by_similarity(on(values[0].flatten(1)), 4).tolist(), device)


def test_codes_that_start_where_the_latents_are(values, accelerator):
    def weights(on):
        torch.manual_seed(0)
        quantizer = SimVQ(32, 8)
        match_codes_to_latents([quantizer], on(values), accelerator)
        return quantizer.projection.weight.flatten().tolist()

    with device_without_float64() as device:
        both(weights, device)


def test_codes_of_the_largest_product(values):
    torch.manual_seed(0)
    quantizer = IndexBackpropagation(32, 8, 0.25)
    table = quantizer._parameters.pop("table").detach()
    rows = values.movedim(1, -1).reshape(-1, 8)

    def codes(on):
        quantizer.table = on(table)
        return quantizer._largest_product(on(rows)).tolist()

    with device_without_float64() as device:
        both(codes, device)


def test_figures_and_distances(values, accelerator):
    def figures(on):
        mean, psnr, means = Mean(), BatchPsnr(), FigureMeans()
        mean.add(on(values.flatten()))
        psnr.add(on(values.flatten().abs()))
        means.add({"loss": on(values[0, 0, 0, 0])}, {"loss": on(values[0, 0, 0, 1].abs())})
        return [mean.mean, mean.interval, psnr.read(), means.read(accelerator)[0]["loss"]]

    def nearest(on):
        rows = values.flatten(1)
        search = NearestPictures(on(rows[:2]), kept=1)
        search.add(on(rows[1:]), on((rows[1:].abs() * 50).byte().view(2, 8, 6, 6)))
        return search.distances.tolist() + [float(search.pictures.float().mean())]

    def distance(on):
        found = frechet_distance(on(values).device, width=8)
        for index, real in enumerate((True, False)):
            found.update(to_float64(on(values[index].flatten(1).T)), real=real)
        return float(found.compute())

    with device_without_float64() as device:
        both(figures, device)
        both(nearest, device)
        both(distance, device)


def test_the_validation_of_a_generator(accelerator):
    mask = torch.tensor([[[1, 1, 0]], [[1, 0, 0]]])

    def figures(on):
        recipe = GeneratorRecipe(None, None, None, None, None, SampleSettings())
        batch = {"audio_codes": mask, "audio_codes_mask": mask, "valid": torch.ones(2) > 0}
        batch["unreadable"] = torch.zeros(2, dtype=torch.int64)
        loss = on(torch.tensor(1.25))
        here = SimpleNamespace(
            device=loss.device,
            process_index=0,
            is_main_process=True,
            is_local_main_process=False,
            gather_for_metrics=lambda x: x,
            reduce=lambda x: x,
        )
        batch = {name: on(value) for name, value in batch.items()}
        model = MagicMock(return_value=SimpleNamespace(loss=loss))
        model.config.num_quantizers = 1
        found = recipe.validate(model, [batch], here)
        return found.figures

    with device_without_float64() as device:
        both(figures, device)


def test_the_spectra_of_a_quantizer(values):
    quantizer = SimVQ(32, 8).eval()

    def ranks(on):
        held = SimpleNamespace(codebook=lambda: on(quantizer.codebook()))
        return spectra(held)["codebook"].effective_rank

    with device_without_float64() as device:
        both(ranks, device)
