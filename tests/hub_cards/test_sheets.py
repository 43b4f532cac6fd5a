"""Sheets of images: every image whole and in its place."""

import numpy as np
import torch
from PIL import Image
from torchvision.utils import save_image

from hub_cards.sheets import from_pil, from_pixels, image_sheet, write_titled_sheet


def test_images_stand_in_rows_on_white():
    images = torch.rand(3, 3, 5, 7) * 0.9
    sheet = image_sheet(images, columns=2, gap=2)
    assert sheet.shape == (3, 2 + 2 * (5 + 2), 2 + 2 * (7 + 2))
    assert torch.equal(sheet[:, 2:7, 2:9], images[0]) and torch.equal(
        sheet[:, 2:7, 11:18], images[1]
    )
    assert torch.equal(sheet[:, 9:14, 2:9], images[2]) and bool((sheet[:, 9:, 9:] == 1).all())
    inside = image_sheet(images, columns=2, gap=2, border=False)
    assert torch.equal(inside, sheet[:, 2:-2, 2:-2])
    assert image_sheet(images[:2], columns=2, gap=0).shape == (3, 5, 14)
    assert torch.equal(image_sheet(images[:1], columns=1, border=False), images[0])


def test_bytes_are_kept(tmp_path):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    image = Image.fromarray(values)
    save_image(image_sheet(from_pil([image, image]), 2, gap=0), tmp_path / "sheet.png")
    found = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert np.array_equal(found, np.concatenate([values, values], axis=1))


def test_values_of_a_model_are_clipped():
    pixels = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).expand(1, 3, 1, 5)
    assert from_pixels(pixels)[0, 0, 0].tolist() == [0, 0, 0.5, 1, 1]


def test_titled_sheets_leave_places_empty(tmp_path):
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    path = tmp_path / "made" / "sheet.png"
    write_titled_sheet(
        path, [[("first", image), None], [None, ("second", image)], [("third", image)]]
    )
    with Image.open(path) as sheet:
        assert sheet.size == (300, 495)
        dark = np.asarray(sheet.convert("L")) < 10
    halves = [
        dark[165 * row : 165 * row + 165, 150 * column : 150 * column + 150].mean() > 0.3
        for row in range(3)
        for column in range(2)
    ]
    assert halves == [True, False, False, True, True, False]
