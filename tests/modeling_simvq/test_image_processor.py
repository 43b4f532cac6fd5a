"""The image processor: the paper's protocol by default, every kind of picture, exact round trips."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from transformers import AutoImageProcessor

from modeling_simvq import SimVQImageProcessor

OWN_SIZE = {"do_resize": False, "do_center_crop": False}


def picture(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(array).convert(mode)


def smooth(height: int, width: int) -> Image.Image:
    return picture(6, 5).resize((width, height), Image.Resampling.BICUBIC)


def protocol(image: Image.Image, side: int = 128) -> torch.Tensor:
    """What the authors' data set returns for a validation picture."""
    steps = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(side)])
    array = np.array(steps(image.convert("RGB"))).astype(np.float32) / 127.5 - 1
    return torch.from_numpy(array).permute(2, 0, 1)


@pytest.mark.parametrize(
    "size", [(128, 128), (375, 500), (501, 333), (129, 128), (128, 301), (40, 31), (1, 1), (9, 200)]
)
def test_the_defaults_are_the_papers_protocol(size):
    image = picture(*size)
    ours = SimVQImageProcessor()(image, return_tensors="pt").pixel_values
    assert ours.shape == (1, 3, 128, 128) and ours.dtype == torch.float32
    torch.testing.assert_close(ours[0], protocol(image), rtol=0, atol=1e-6)
    assert ours.min() >= -1 and ours.max() <= 1


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "YCbCr", "PA", "I;16"])
def test_every_mode_of_pil_becomes_rgb(mode):
    if mode == "I;16":
        grey = np.asarray(picture(50, 60, "L"))
        image = Image.fromarray(grey.astype(np.uint16) * 257)
        expected = Image.fromarray(grey)
        assert image.mode.startswith("I;16")
    else:
        image = expected = picture(50, 60, mode)
    ours = SimVQImageProcessor()(image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(ours, protocol(expected), rtol=0, atol=1e-6)
    if mode in ("L", "LA", "1", "I;16"):
        assert torch.equal(ours[0], ours[1]) and torch.equal(ours[0], ours[2])


def forms(image: Image.Image) -> dict:
    array = np.array(image)
    first = np.ascontiguousarray(array.transpose(2, 0, 1))
    return {
        "uint8 HWC": array,
        "uint8 CHW": first,
        "torch uint8": torch.from_numpy(first),
        "float32 HWC": array.astype(np.float32) / 255,
        "float64 CHW": first / 255,
        "torch float": torch.from_numpy(first).float() / 255,
        "RGBA HWC": np.concatenate([array, array[..., :1]], axis=-1),
    }


@pytest.mark.parametrize("form", list(forms(picture(8, 8))))
def test_arrays_and_tensors_are_taken_like_pictures(form):
    processor, image = SimVQImageProcessor(), smooth(150, 200)
    ours = processor(forms(image)[form], return_tensors="pt").pixel_values[0]
    # Floating-point images are resized by torch, which rounds to no byte.
    tolerance = 0.02 if "float" in form else 1e-6
    torch.testing.assert_close(ours, protocol(image), rtol=0, atol=tolerance)
    whole = processor(forms(image)[form], **OWN_SIZE, return_tensors="pt").pixel_values[0]
    exact = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(whole[:, :150, :200], exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(50, 60), (50, 60, 1), (1, 50, 60)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_grey_arrays_become_rgb(shape, dtype):
    grey = np.asarray(picture(50, 60, "L"))
    array = (grey if dtype == np.uint8 else grey.astype(dtype) / 255).reshape(shape)
    ours = SimVQImageProcessor()(array, **OWN_SIZE, return_tensors="pt").pixel_values[0]
    expected = torch.from_numpy(grey / 127.5 - 1).float().expand(3, -1, -1)
    torch.testing.assert_close(ours[:, :50, :60], expected, rtol=0, atol=1e-6)


SIDES = [(1, 200), (3, 200), (4, 200), (3, 64), (200, 1), (200, 3), (64, 4), (3, 3), (4, 3), (1, 4)]
LARGE = {"size": {"height": 16, "width": 24}, "do_center_crop": False}


@pytest.mark.parametrize("size", SIDES)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("scale", [1, 255])
def test_channels_are_last_in_arrays_and_first_in_tensors_whatever_the_size(size, mode, scale):
    def prepared(images, **settings):
        return SimVQImageProcessor()(images, **LARGE, **settings, return_tensors="pt").pixel_values

    image = picture(*size, mode)
    last = np.array(image).reshape(*size, -1)
    if scale != 1:
        last = (last / scale).astype(np.float32)
    first = np.ascontiguousarray(np.moveaxis(last, -1, 0))
    same = [last, torch.from_numpy(first)]
    expected = prepared(last, input_data_format="channels_last")
    if scale == 1:
        assert torch.equal(expected, prepared(image))
    if mode == "L":
        same += [last[..., 0], torch.from_numpy(first[0])]
        assert torch.equal(prepared([[last[..., 0]]]), expected)
    for one in same:
        assert torch.equal(prepared(one), expected)
        assert torch.equal(prepared([one, one]), torch.cat([expected] * 2))
    assert torch.equal(prepared(np.stack([last, last])), torch.cat([expected] * 2))
    assert torch.equal(prepared(torch.from_numpy(first)[None]), expected)
    # An explicit order is obeyed, by arrays and by tensors.
    assert torch.equal(prepared(first, input_data_format="channels_first"), expected)
    tensor = torch.from_numpy(last)
    assert torch.equal(prepared(tensor, input_data_format="channels_last"), expected)
    if mode == "L":
        for order in ("channels_first", "channels_last"):
            assert torch.equal(prepared(last[..., 0], input_data_format=order), expected)
            assert torch.equal(prepared(tensor[..., 0], input_data_format=order), expected)


def test_the_other_order_is_read_only_where_the_usual_one_does_not_fit():
    array = np.array(picture(20, 30))
    processor = SimVQImageProcessor()
    expected = processor(array, **OWN_SIZE, return_tensors="pt").pixel_values
    for other in (np.moveaxis(array, -1, 0), torch.from_numpy(array)):
        assert torch.equal(processor(other, **OWN_SIZE, return_tensors="pt").pixel_values, expected)
    with pytest.raises(ValueError, match=r"channels, first, got shape \(20, 30, 3\)"):
        processor(array, **OWN_SIZE, input_data_format="channels_first")


def test_batches_keep_their_order():
    images = [picture(130, 140, seed=seed) for seed in range(3)] + [picture(200, 150, seed=3)]
    processor = SimVQImageProcessor()
    batch = processor(images, return_tensors="pt").pixel_values
    assert batch.shape == (4, 3, 128, 128)
    for image, ours in zip(images, batch, strict=True):
        assert torch.equal(ours, processor(image, return_tensors="pt").pixel_values[0])
    stacked = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images[:3]])
    assert torch.equal(processor(stacked, return_tensors="pt").pixel_values, batch[:3])
    as_numpy = processor(images[:2], return_tensors="np").pixel_values
    assert isinstance(as_numpy, np.ndarray) and as_numpy.shape == (2, 3, 128, 128)


@settings(max_examples=40, deadline=None)
@given(height=st.integers(8, 70), width=st.integers(8, 70), seed=st.integers(0, 99))
def test_padding_is_taken_back_to_the_byte(height, width, seed):
    image, processor = picture(height, width, seed=seed), SimVQImageProcessor()
    pixels = processor(image, **OWN_SIZE, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, -(-height // 8) * 8, -(-width // 8) * 8)
    assert torch.equal(pixels[..., -1, -1], pixels[..., height - 1, width - 1])
    (back,) = processor.post_process(pixels, target_sizes=[(height, width)])
    assert back.mode == "RGB" and np.array_equal(np.array(back), np.array(image))


def test_post_process_clamps_and_takes_half_precision():
    processor = SimVQImageProcessor()
    values = torch.tensor([-3.0, -1.0, 0.0, 1.0, 7.0]).expand(1, 3, 2, 5)
    (image,) = processor.post_process(values.to(torch.bfloat16).requires_grad_())
    assert np.array(image)[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_saved_settings_come_back(tmp_path):
    processor = SimVQImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 48, "width": 56}, size_divisor=4
    )
    processor.save_pretrained(tmp_path)
    import transformers

    # The type alone does not lead to us: AutoImageProcessor asks the model's configuration.
    from modeling_simvq import SimVQImageConfig

    SimVQImageConfig().save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(again) is SimVQImageProcessor and transformers.__version__
    image = picture(100, 120)
    ours = again(image, return_tensors="pt").pixel_values
    assert ours.shape == (1, 3, 48, 56) and again.size_divisor == 4
    assert torch.equal(ours, processor(image, return_tensors="pt").pixel_values)


def test_settings_can_be_given_per_call():
    processor = SimVQImageProcessor()
    ours = processor(
        picture(90, 100),
        size={"height": 32, "width": 40},
        do_center_crop=False,
        return_tensors="pt",
    )
    assert ours.pixel_values.shape == (1, 3, 32, 40)
    assert processor(picture(90, 100), return_tensors="pt").pixel_values.shape[-1] == 128


@pytest.mark.parametrize(
    ("images", "named"),
    [
        ([], "empty list"),
        (np.zeros((20, 20, 5), np.uint8), r"\(20, 20, 5\)"),
        (np.zeros((20, 20, 2), np.uint8), r"\(20, 20, 2\)"),
        (np.zeros((20, 20, 3), np.int32), "int32"),
        (np.full((20, 20, 3), 1.5, np.float32), "1.5"),
        (np.full((20, 20, 3), -0.5, np.float32), "-0.5"),
        (np.full((20, 20, 3), 200.0), "200"),
        (np.full((20, 20, 3), np.nan, np.float32), "NaN"),
        (torch.full((3, 20, 20), float("inf")), "infinite"),
        (picture(7, 30), "7 x 30"),
        (picture(30, 7), "30 x 7"),
        ([picture(30, 40), picture(40, 30)], "different sizes"),
        ("no_such_picture.png", "no_such_picture"),
        (None, "None"),
    ],
)
def test_impossible_pictures_are_named(images, named):
    with pytest.raises((ValueError, TypeError), match=named):
        SimVQImageProcessor()(images, **OWN_SIZE, return_tensors="pt")


@pytest.mark.parametrize(
    ("values", "target_sizes", "named"),
    [
        (torch.zeros(2, 3, 16, 16), [(16, 16)], "1 target_sizes for 2"),
        (torch.zeros(1, 3, 16, 16), [(17, 16)], "17 x 16"),
        (torch.zeros(1, 3, 16, 16), [(16, 24)], "16 x 24"),
        (torch.zeros(1, 3, 16, 16), [(0, 16)], "0 x 16"),
        (torch.zeros(1, 3, 16, 16), [(-1, 16)], "-1 x 16"),
        (torch.zeros(3, 16, 16), None, r"\(3, 16, 16\)"),
        (torch.zeros(1, 1, 16, 16), None, r"\(1, 1, 16, 16\)"),
        (torch.full((1, 3, 16, 16), float("nan")), None, "NaN"),
    ],
)
def test_impossible_reconstructions_are_named(values, target_sizes, named):
    with pytest.raises(ValueError, match=named):
        SimVQImageProcessor().post_process(values, target_sizes)
