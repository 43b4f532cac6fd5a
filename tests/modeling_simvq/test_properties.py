"""What holds for every size, layout and batch of either model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel

from modeling_simvq import SimVQAudioFeatureExtractor, SimVQImageProcessor
from tests.fuzzing import tries

K, FACTOR, HOP = 64, 2, 320  # of the tiny tokenizers


@pytest.fixture(scope="module")
def image_model(tiny_folder):
    return AutoModel.from_pretrained(tiny_folder).eval()


@pytest.fixture(scope="module")
def audio_model(tiny_audio_folder):
    return AutoModel.from_pretrained(tiny_audio_folder).eval()


def same_codes(quantizer, latents, codes, others) -> None:
    """Codes are equal; where two are as near to the latent as rounding goes, either will do."""
    if torch.equal(codes, others):
        return
    table = quantizer.codebook()
    rows = latents.movedim(1, -1).reshape(-1, latents.shape[1])
    distances = [(rows - table[c.flatten()]).norm(dim=1) for c in (codes, others)]
    torch.testing.assert_close(*distances, rtol=1e-4, atol=1e-5)


def layouts(pixels: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "channels_last":
        return pixels.to(memory_format=torch.channels_last)
    if layout == "strided":
        return pixels.repeat_interleave(2, dim=3)[..., ::2]
    return pixels.mT.contiguous().mT if layout == "transposed" else pixels


PICTURES = {
    "height": st.integers(FACTOR, 40),
    "width": st.integers(FACTOR, 40),
    "batch": st.integers(1, 3),
    "layout": st.sampled_from(["contiguous", "channels_last", "strided", "transposed"]),
    "scale": st.sampled_from([0.0, 0.1, 1.0, 100.0]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "seed": st.integers(0, 2**32 - 1),
}


@pytest.mark.slow
@tries(30, 1_000)
def test_pictures(count, image_model):
    @settings(max_examples=count, deadline=None, derandomize=True)
    @given(**PICTURES)
    def holds(height, width, batch, layout, scale, dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.rand(batch, 3, height, width, generator=generator) * 2 * scale - scale
        pixels = layouts(pixels.to(dtype).float(), layout)
        with torch.no_grad():
            encoded = image_model.encode(pixels)
            h, w = -(-height // FACTOR), -(-width // FACTOR)
            assert encoded.image_codes.shape == (batch, h, w)
            assert encoded.image_codes.dtype == torch.int64
            assert encoded.image_codes.min() >= 0 and encoded.image_codes.max() < K
            assert encoded.latents.shape == encoded.quantized_latents.shape == (batch, 16, h, w)
            assert encoded.latents.isfinite().all() and encoded.commitment_loss.isfinite()
            decoded = image_model.decode(image_codes=encoded.image_codes).pixel_values
            assert decoded.shape == (batch, 3, h * FACTOR, w * FACTOR) and decoded.isfinite().all()
            again = image_model.decode(quantized_latents=encoded.quantized_latents).pixel_values
            torch.testing.assert_close(again, decoded, rtol=1e-4, atol=1e-4)
            # In images of one token a norm's group is one value: there is nothing but rounding to divide by.
            if h * w < 4:
                return
            alone = image_model.encode(pixels[-1:])
            torch.testing.assert_close(alone.latents, encoded.latents[-1:], rtol=1e-3, atol=1e-3)
            same_codes(
                image_model.quantizer, alone.latents, alone.image_codes, encoded.image_codes[-1:]
            )

    holds()


@pytest.mark.slow
@tries(20, 500)
def test_sound(count, audio_model):
    extractor = SimVQAudioFeatureExtractor(hop_length=HOP)

    @settings(max_examples=count, deadline=None, derandomize=True)
    @given(
        lengths=st.lists(st.integers(1, 3_000), min_size=1, max_size=3),
        scale=st.sampled_from([0.0, 1e-4, 0.3, 1.0]),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.float16]),
        seed=st.integers(0, 2**32 - 1),
    )
    def holds(lengths, scale, dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        clips = [((torch.rand(n, generator=generator) * 2 - 1) * scale).to(dtype) for n in lengths]
        inputs = extractor(clips, sampling_rate=24_000, return_tensors="pt")
        with torch.no_grad():
            encoded = audio_model.encode(**inputs)
            tokens = [-(-n // HOP) for n in lengths]
            assert encoded.audio_codes.shape == (len(clips), 1, max(tokens))
            assert encoded.audio_codes_mask.sum(dim=-1).flatten().tolist() == tokens
            assert encoded.audio_codes.min() >= 0 and encoded.audio_codes.max() < K
            assert encoded.latents.isfinite().all() and encoded.commitment_loss.isfinite()
            decoded = audio_model.decode(
                encoded.audio_codes, audio_codes_mask=encoded.audio_codes_mask
            ).audio_values
            assert decoded.shape == (len(clips), 1, max(tokens) * HOP) and decoded.isfinite().all()
            shortest = lengths.index(min(lengths))
            real = tokens[shortest]
            alone = audio_model.encode(
                **extractor(clips[shortest], sampling_rate=24_000, return_tensors="pt")
            )
            together = encoded.latents[shortest : shortest + 1, :, :real]
            torch.testing.assert_close(alone.latents, together, rtol=1e-3, atol=1e-4)
            codes = encoded.audio_codes[shortest, 0, :real]
            same_codes(audio_model.quantizer, alone.latents, alone.audio_codes[0, 0], codes)

    holds()


@tries(40, 2_000)
def test_pixels_come_back_through_the_processor(count):
    """Bytes to pixel values and back are the same bytes, whatever the size and the form of the picture."""
    processor = SimVQImageProcessor(do_resize=False, do_center_crop=False)

    @settings(max_examples=count, deadline=None, derandomize=True)
    @given(
        height=st.integers(8, 50),
        width=st.integers(8, 50),
        form=st.sampled_from(["last", "first", "tensor", "float"]),
        seed=st.integers(0, 2**32 - 1),
    )
    def holds(height, width, form, seed):
        generator = torch.Generator().manual_seed(seed)
        levels = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        given_as = {
            "last": levels.permute(1, 2, 0).numpy(),
            "first": levels.numpy(),
            "tensor": levels,
            "float": levels / 255,
        }
        pixels = processor(given_as[form], return_tensors="pt").pixel_values
        assert pixels.shape == (1, 3, -(-height // 8) * 8, -(-width // 8) * 8)
        (picture,) = processor.post_process(pixels, [(height, width)])
        back = torch.tensor(list(picture.convert("RGB").tobytes()), dtype=torch.uint8)
        assert torch.equal(back.view(height, width, 3).permute(2, 0, 1), levels)

    holds()
