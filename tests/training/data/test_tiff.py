"""TIFF files of few and of many bits, whichever level is white: training and the processor see the same."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from modeling_simvq import SimVQImageProcessor
from modeling_simvq.image_processing_simvq import pil_to_rgb
from training.data.images import decode_image

LEVELS = np.tile(np.arange(0, 256, 17), (4, 1))  # 16 greys


def tiff(bits: int, white_is_zero: bool, order: str = "<", orientation: int = 1) -> bytes:
    """A grey picture of LEVELS, uncompressed, in one strip."""
    levels = LEVELS[::-1, ::-1] if orientation == 3 else LEVELS
    values = (255 - levels if white_is_zero else levels) * (2**bits - 1) // 255
    if bits == 16:
        data = values.astype(f"{order}u2").tobytes()
    else:
        text = "".join(f"{value:0{bits}b}" for value in values.flat)
        data = int(text, 2).to_bytes(len(text) // 8, "big")
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 8}
    tags |= {274: orientation, 277: 1, 278: height, 279: len(data)}
    head = b"II" if order == "<" else b"MM"
    content = head + struct.pack(f"{order}HI", 42, 8 + len(data)) + data
    content += struct.pack(f"{order}H", len(tags))
    for tag, value in sorted(tags.items()):
        content += struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0)
    return content + bytes(4)


# Pillow opens no others of these kinds.
KINDS = [(bits, white, "<") for bits in (1, 2, 4, 8, 16) for white in (False, True)]
KINDS += [(12, False, "<"), (16, False, ">"), (8, True, ">")]


@pytest.mark.parametrize("orientation", [1, 3])
@pytest.mark.parametrize(("bits", "white_is_zero", "order"), KINDS)
def test_levels_are_those_that_a_viewer_shows(bits, white_is_zero, order, orientation):
    content = tiff(bits, white_is_zero, order, orientation)
    wanted = LEVELS * (2**bits - 1) // 255 * 255 // (2**bits - 1) if bits < 8 else LEVELS
    if bits < 8 and white_is_zero:  # rounded from the other side
        wanted = 255 - (255 - LEVELS) * (2**bits - 1) // 255 * 255 // (2**bits - 1)
    seen = np.asarray(decode_image({"bytes": content}))
    assert np.abs(seen[..., 0].astype(int) - wanted).max() <= 1
    processor = SimVQImageProcessor(do_resize=False, do_center_crop=False, size_divisor=1)
    pixels = processor(Image.open(io.BytesIO(content)), return_tensors="np").pixel_values[0]
    assert np.array_equal(((pixels + 1) * 127.5).round().transpose(1, 2, 0), seen)
    if orientation == 1:  # as metrics take an image
        assert np.array_equal(pil_to_rgb(Image.open(io.BytesIO(content))), seen)
