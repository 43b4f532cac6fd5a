"""Graphs of torch.export that take any number of images or clips, of any size or length."""

import pytest
import torch
from torch.export import Dim, export

BATCH = Dim("batch", min=1, max=64)


class Part(torch.nn.Module):
    """One method of a model, of one tensor to one."""

    def __init__(self, model, method: str, name: str):
        super().__init__()
        self.model, self.method, self.name = model, method, name

    def forward(self, values):
        return getattr(getattr(self.model, self.method)(values), self.name)


def check(part: Part, example: torch.Tensor, dynamic: dict, others: list[torch.Tensor]) -> None:
    with torch.no_grad():
        exported = export(part, (example,), dynamic_shapes=(dynamic,), strict=False).module()
        for values in others:
            torch.testing.assert_close(exported(values), part(values), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_images_of_any_number_and_size(tiny_model):
    """Fewer latents than codes in the example, and more in another: one graph for both."""
    height, width = Dim("height", min=2, max=128), Dim("width", min=2, max=128)
    images = [torch.rand(2, 3, 8, 12), torch.rand(1, 3, 16, 8), torch.rand(3, 3, 32, 32)]
    check(
        Part(tiny_model, "encode", "image_codes"),
        images[0],
        {0: BATCH, 2: 2 * height, 3: 2 * width},
        images,
    )
    codes = [torch.randint(64, (2, 4, 6)), torch.randint(64, (1, 9, 3))]
    check(
        Part(tiny_model, "decode", "pixel_values"), codes[0], {0: BATCH, 1: height, 2: width}, codes
    )


@pytest.mark.slow
def test_clips_of_any_number_and_length_are_decoded(tiny_audio_model):
    frames = Dim("frames", min=4, max=10_000)
    codes = [torch.randint(64, (2, 1, 10)), torch.randint(64, (1, 1, 23))]
    check(Part(tiny_audio_model, "decode", "audio_values"), codes[0], {0: BATCH, 2: frames}, codes)
