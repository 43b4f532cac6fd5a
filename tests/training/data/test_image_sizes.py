"""Images that are too small for a network are refused before anything runs, and no others."""

import lpips
import pytest
import torch

from training.data import image_sizes
from training.data.images import ImageDataConfig
from training.evaluation import image as evaluate_image
from training.losses.patch_discriminator import PatchDiscriminator
from training.metrics.images import image_figures
from training.recipes.image import (
    ImageLossSettings,
    ImageModelSettings,
    build_image_recipe,
)
from training.runtime.settings import SettingsError


def takes(network, side: int) -> bool:
    try:
        network(torch.zeros(2, 3, side, side))
    except (RuntimeError, ValueError):
        return False
    return True


def is_smallest(network, side: int) -> bool:
    return takes(network, side) and not takes(network, side - 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_sizes_are_those_at_which_the_networks_work():
    for layers in (1, 2, 3):
        discriminator = PatchDiscriminator(base_channels=2, num_layers=layers)
        assert is_smallest(discriminator, image_sizes.smallest_for_discriminator(layers))
    for net, side in image_sizes.LPIPS.items():
        network = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
        assert is_smallest(lambda x, network=network: network(x, x), side)
    assert is_smallest(lambda x: image_figures(x, x), image_sizes.SSIM)


@pytest.mark.parametrize(
    "resolution, options, words",
    [
        (
            16,
            {},
            r"^resolution is 16, but the discriminator \(discriminator_layers=3\) needs .* 24",
        ),
        (24, {"perceptual": "alex"}, r"^resolution is 24, but LPIPS \(perceptual=alex\) .* 31"),
        (
            8,
            {"perceptual": "vgg", "discriminator_layers": 1},
            r"perceptual=vgg.* 16 pixels a side$",
        ),
    ],
)
def test_training_refuses_small_images(resolution, options, words, tmp_path):
    model = ImageModelSettings(base_channels=32, channel_multipliers=[1, 1], num_res_blocks=1)
    data = ImageDataConfig(dataset=str(tmp_path), resolution=resolution)
    with pytest.raises(SettingsError, match=words):
        build_image_recipe(model, data, ImageLossSettings(**options), batch_size=1, seed=0)


def test_evaluation_refuses_small_images(tmp_path):
    settings = evaluate_image.ImageEvaluationSettings(model=str(tmp_path))
    data = ImageDataConfig(dataset=str(tmp_path), resolution=24)
    with pytest.raises(SettingsError, match=r"^resolution is 24, but LPIPS \(lpips=\[alex\]\)"):
        evaluate_image.run(settings, data, None)
