"""What the image model promises about its calls, and how it refuses impossible inputs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_simvq import SimVQImageConfig, SimVQImageModel

SMALL = SimVQImageConfig(
    base_channels=32,
    channel_multipliers=[1, 1, 1],
    num_res_blocks=1,
    codebook_size=50,
    codebook_dim=8,
)


@pytest.fixture(scope="module")
def small_model() -> SimVQImageModel:
    """4 x down-sampling, random weights, evaluation mode. Do not change it."""
    torch.manual_seed(0)
    return SimVQImageModel(SMALL).eval()


@settings(max_examples=25, deadline=None)
@given(height=st.integers(4, 70), width=st.integers(4, 70), batch=st.integers(1, 2))
def test_any_size_works_and_comes_back_rounded_up(small_model, height, width, batch):
    pictures = torch.rand(batch, 3, height, width) * 2 - 1
    with torch.no_grad():
        output = small_model(pictures)
    rows, cols = -(-height // 4), -(-width // 4)
    assert output.image_codes.shape == (batch, rows, cols)
    assert output.image_codes.dtype == torch.int64
    assert output.pixel_values.shape == (batch, 3, 4 * rows, 4 * cols)
    assert output.latents.shape == (batch, 8, rows, cols)


@torch.no_grad()
def test_one_token_is_enough(small_model):
    output = small_model(torch.rand(1, 3, 4, 4) * 2 - 1)
    assert output.image_codes.shape == (1, 1, 1) and output.pixel_values.isfinite().all()


@torch.no_grad()
def test_encode_and_decode_are_the_two_halves_of_forward(tiny_model, pixels):
    whole, encoded = tiny_model(pixels), tiny_model.encode(pixels)
    assert torch.equal(encoded.image_codes, whole.image_codes)
    assert torch.equal(encoded.commitment_loss, whole.commitment_loss)
    assert torch.equal(encoded.latents, whole.latents)
    from_codes = tiny_model.decode(image_codes=encoded.image_codes)
    from_vectors = tiny_model.decode(quantized_latents=encoded.quantized_latents)
    assert torch.equal(from_codes.pixel_values, whole.pixel_values)
    assert torch.equal(from_vectors.pixel_values, whole.pixel_values)
    for dtype in (torch.int32, torch.uint8):  # codes kept small on disk
        stored = encoded.image_codes.to(dtype)
        assert torch.equal(tiny_model.decode(stored).pixel_values, whole.pixel_values)


@torch.no_grad()
def test_a_batch_is_its_pictures(tiny_model, pixels):
    whole = tiny_model(pixels)
    for index in range(len(pixels)):
        alone = tiny_model(pixels[index : index + 1])
        assert torch.equal(alone.image_codes[0], whole.image_codes[index])
        torch.testing.assert_close(alone.pixel_values[0], whole.pixel_values[index])


@torch.no_grad()
def test_return_dict_false_gives_tuples_in_the_same_order(tiny_model, pixels):
    for call, argument in (
        (tiny_model, pixels),
        (tiny_model.encode, pixels),
        (tiny_model.decode, torch.zeros(1, 4, 4, dtype=torch.long)),
    ):
        named, plain = call(argument), call(argument, return_dict=False)
        assert type(plain) is tuple and len(plain) == len(named)
        assert all(torch.equal(a, b) for a, b in zip(plain, named.to_tuple(), strict=True))
    tiny_model.config.return_dict = False
    assert type(tiny_model(pixels)) is tuple


@torch.no_grad()
def test_without_quantizing_the_latents_are_decoded_as_they_are(tiny_model, pixels):
    output = tiny_model(pixels, quantize=False)
    expected = tiny_model.decode(quantized_latents=output.latents).pixel_values
    assert torch.equal(output.pixel_values, expected)
    assert torch.equal(output.image_codes, tiny_model(pixels).image_codes)


def gradients(model, pictures):
    model.zero_grad()
    output = model(pictures)
    (F.mse_loss(output.pixel_values, pictures) + output.commitment_loss).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_no_gradient(tiny_model, pixels):
    tiny_model.train()
    plain = gradients(tiny_model, pixels)
    tiny_model.gradient_checkpointing_enable()
    assert tiny_model.encoder.mid[0].gradient_checkpointing
    saved = gradients(tiny_model, pixels)
    assert plain.keys() == saved.keys() and "quantizer.basis" not in plain
    assert len(plain) == len(list(tiny_model.parameters())) - 1  # every other weight learns
    for name in plain:
        torch.testing.assert_close(saved[name], plain[name])


@pytest.mark.slow
@torch.no_grad()
def test_torch_compile_takes_the_whole_graph(small_model):
    model = copy.deepcopy(small_model)
    pictures = torch.rand(1, 3, 16, 20) * 2 - 1
    expected = small_model(pictures)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(pictures)
    assert torch.equal(compiled.image_codes, expected.image_codes)
    torch.testing.assert_close(compiled.pixel_values, expected.pixel_values)
    encode = torch.compile(model.encode, backend="aot_eager", fullgraph=True)
    assert torch.equal(encode(pictures).image_codes, expected.image_codes)
    decode = torch.compile(model.decode, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(decode(expected.image_codes).pixel_values, expected.pixel_values)


@torch.no_grad()
def test_channels_last_changes_nothing_but_the_order_in_memory(tiny_model, pixels):
    expected = tiny_model(pixels)
    model = copy.deepcopy(tiny_model).to(memory_format=torch.channels_last)
    output = model(pixels.contiguous(memory_format=torch.channels_last))
    assert torch.equal(output.image_codes, expected.image_codes)
    torch.testing.assert_close(output.pixel_values, expected.pixel_values, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_autocast_searches_in_float32(tiny_model, pixels):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = tiny_model(pixels)
    assert output.commitment_loss.dtype == torch.float32
    assert torch.equal(output.image_codes, tiny_model.quantizer(output.latents.float())[1])


def test_inference_mode_then_training(tiny_model, pixels):
    """The codebook that inference keeps must not end up in autograd."""
    with torch.inference_mode():
        before = tiny_model(pixels).image_codes
    assert torch.equal(tiny_model(pixels).image_codes, before)
    gradients(tiny_model, pixels)
    gradients(tiny_model.train(), pixels)


@pytest.mark.parametrize(
    ("pictures", "named"),
    [
        (torch.zeros(1, 4, 16, 16), r"\(1, 4, 16, 16\)"),
        (torch.zeros(1, 1, 16, 16), r"\(B, 3, H, W\)"),
        (torch.zeros(3, 16, 16), r"\(3, 16, 16\)"),
        (torch.zeros(1, 16, 16, 3), r"\(1, 16, 16, 3\)"),
        (torch.zeros(0, 3, 16, 16), "empty"),
        (torch.zeros(1, 3, 3, 16), "3 x 16"),
        (torch.zeros(1, 3, 16, 0), "16 x 0"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "uint8"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.int64), "int64"),
        (torch.full((1, 3, 16, 16), float("nan")), "768 NaN"),
        (torch.full((1, 3, 16, 16), float("inf")), "infinite"),
    ],
)
def test_impossible_pictures_are_named(small_model, pictures, named):
    for call in (small_model, small_model.encode):
        with pytest.raises(ValueError, match=named):
            call(pictures)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "exactly one"),
        (
            {
                "image_codes": torch.zeros(1, 2, 2, dtype=torch.long),
                "quantized_latents": torch.zeros(1, 8, 2, 2),
            },
            "exactly one",
        ),
        ({"image_codes": torch.full((1, 2, 2), 50)}, "50.*0 to 49"),
        ({"image_codes": torch.full((1, 2, 2), -1)}, "-1"),
        ({"image_codes": torch.zeros(2, 2, dtype=torch.long)}, r"\(2, 2\)"),
        ({"image_codes": torch.zeros(1, 1, 2, 2, dtype=torch.long)}, r"\(1, 1, 2, 2\)"),
        ({"image_codes": torch.zeros(1, 0, 2, dtype=torch.long)}, "empty"),
        ({"image_codes": torch.zeros(1, 2, 2)}, "float32"),
        ({"quantized_latents": torch.zeros(1, 7, 2, 2)}, r"\(1, 7, 2, 2\)"),
        ({"quantized_latents": torch.zeros(8, 2, 2)}, r"\(8, 2, 2\)"),
        ({"quantized_latents": torch.zeros(0, 8, 2, 2)}, "empty"),
        ({"quantized_latents": torch.zeros(1, 8, 2, 2, dtype=torch.long)}, "int64"),
    ],
)
def test_impossible_codes_and_latents_are_named(small_model, arguments, named):
    with pytest.raises(ValueError, match=named):
        small_model.decode(**arguments)
