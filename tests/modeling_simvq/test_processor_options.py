"""Options of the processors: each does what it says, or is refused by name."""

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_simvq import SimVQAudioFeatureExtractor, SimVQImageProcessor

OWN_SIZE = {"do_resize": False, "do_center_crop": False}
IMAGES = [
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    for size in ((40, 50), (61, 44))
]


def test_images_of_several_sizes_are_padded_to_one_that_is_asked_for():
    """And an image's pixels do not depend on what it was batched with, nor on how it was padded."""
    processor = SimVQImageProcessor(pad_size={"height": 64, "width": 56}, **OWN_SIZE)
    both = processor(IMAGES, return_tensors="pt").pixel_values
    assert both.shape == (2, 3, 64, 56)
    again = SimVQImageProcessor(**processor.to_dict())(IMAGES[:1], return_tensors="pt")
    assert torch.equal(again.pixel_values, both[:1])
    sizes = [(image.height, image.width) for image in IMAGES]
    for image, back in zip(IMAGES, processor.post_process(both, sizes), strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(back))
    assert (both[0, :, 40:] == both[0, :, 39:40]).all()  # the border, repeated


def test_images_of_several_sizes_are_not_padded_by_their_neighbours():
    with pytest.raises(ValueError, match=r"pad_size=.'height': 64, 'width': 56."):
        SimVQImageProcessor()(IMAGES, **OWN_SIZE)
    with pytest.raises(ValueError, match=r"pad_size=.'height': 64, 'width': 56."):
        SimVQImageProcessor()(IMAGES, **OWN_SIZE, do_pad=False)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"pad_size": {"height": 64, "width": 52}}, "pad_size .*64 x 52"),
        ({"pad_size": {"height": 56, "width": 56}}, "61 x 44 .*pad_size 56 x 56"),
        ({"pad_size": {"height": 10**6, "width": 10**6}}, "pad_size.*MAX_IMAGE_PIXELS"),
        ({"pad_size": {"height": 64, "width": 56}, "do_pad": False}, "pad_size .*do_pad"),
        ({"data_format": "channels_last"}, "data_format = 'channels_last'"),
        ({"device": "cuda"}, "device = 'cuda'"),
        ({"do_convert_rgb": False}, "do_convert_rgb = False"),
        ({"image_seq_length": 3}, "image_seq_length = 3"),
        ({"do_centre_crop": False}, "'do_centre_crop'.*'do_center_crop'"),
        ({"padding_mask": 1}, "'padding_mask'"),
    ],
)
def test_options_that_would_do_nothing_are_refused_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        SimVQImageProcessor()(IMAGES, **(OWN_SIZE | options))


def test_misspelt_settings_of_processors_are_refused():
    with pytest.raises(ValueError, match="'crop_sise'.*'crop_size'"):
        SimVQImageProcessor(crop_sise=64)
    with pytest.raises(TypeError, match="'sampling_rat'.*'sampling_rate'"):
        SimVQAudioFeatureExtractor(sampling_rat=16_000)
    clip = np.zeros(100, np.float32)
    with pytest.raises(TypeError, match="'samplingrate'"):
        SimVQAudioFeatureExtractor()(clip, samplingrate=24_000)
