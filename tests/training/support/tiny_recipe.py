"""A small image recipe without data on disk, for tests of the loop."""

import torch
from torch.utils.data import DataLoader

from modeling_simvq import SimVQImageConfig, SimVQImageModel
from training.losses.image import ImageLoss
from training.losses.patch_discriminator import PatchDiscriminator
from training.recipes.image import ImageRecipe

TINY = SimVQImageConfig(
    base_channels=32,
    channel_multipliers=[1, 2],
    num_res_blocks=1,
    codebook_size=64,
    codebook_dim=16,
)


class Pictures(torch.utils.data.Dataset):
    """Random smooth pictures, the same at every access."""

    def __init__(self, count: int, side: int = 32):
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(count, 3, 4, 4, generator=generator) * 2 - 1
        self.pixels = torch.nn.functional.interpolate(coarse, size=side, mode="bilinear")

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict:
        return {
            "pixel_values": self.pixels[index],
            "valid": torch.tensor(True),
            "unreadable": torch.tensor(0),
        }


def build_tiny_recipe(
    count: int = 16, batch_size: int = 4, validation: int = 6, **loss
) -> ImageRecipe:
    torch.manual_seed(0)
    return ImageRecipe(
        SimVQImageModel(TINY),
        PatchDiscriminator(base_channels=8),
        ImageLoss(None, **loss),
        None,
        DataLoader(Pictures(count), batch_size, shuffle=True, drop_last=True),
        DataLoader(Pictures(validation), batch_size) if validation else None,
        32,
    )
