"""Batch norm over the batches of all processes, a setting for GPUs."""

import pytest
import torch
from PIL import Image
from torch import nn

from training.data.images import ImageDataConfig
from training.losses.patch_discriminator import PatchDiscriminator
from training.recipes.image import ImageLossSettings, ImageModelSettings, build_image_recipe
from training.runtime.settings import SettingsError


def build(folder):
    model = ImageModelSettings(
        base_channels=8, norm_groups=2, channel_multipliers=[1, 1], num_res_blocks=1
    )
    data = ImageDataConfig(dataset=str(folder), resolution=32, validation_split=None)
    loss = ImageLossSettings(perceptual="none", discriminator_channels=8, sync_batch_norm=True)
    return build_image_recipe(model, data, loss, batch_size=1, seed=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_it_is_refused_without_a_gpu(tmp_path, one_process):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    with pytest.raises(SettingsError, match="sync_batch_norm: torch has it for GPUs alone"):
        build(tmp_path)


def test_it_takes_the_place_of_every_batch_norm_and_keeps_the_names(
    tmp_path, one_process, monkeypatch
):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    discriminator = build(tmp_path).discriminator
    kinds = [
        type(m) for m in discriminator.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    assert kinds == [nn.SyncBatchNorm] * 3
    plain = PatchDiscriminator(base_channels=8)
    assert discriminator.state_dict().keys() == plain.state_dict().keys()
