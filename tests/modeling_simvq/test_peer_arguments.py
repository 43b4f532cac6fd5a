"""Code written for DAC, EnCodec and Mimi, with another name in it."""

import math

import numpy as np
import pytest
import torch
from transformers import (
    DacConfig,
    DacFeatureExtractor,
    DacModel,
    EncodecConfig,
    EncodecFeatureExtractor,
    EncodecModel,
    MimiConfig,
    MimiModel,
)

from modeling_simvq import SimVQAudioConfig, SimVQAudioFeatureExtractor, SimVQAudioModel

RATE, HOP = 24_000, 320
CLIPS = [np.sin(np.arange(n) / 9).astype(np.float32) / 2 for n in (4_000, 2_900)]


def ours(**options) -> SimVQAudioModel:
    torch.manual_seed(0)
    sizes = {"num_filters": 2, "hidden_size": 16, "intermediate_size": 32, "num_decoder_layers": 1}
    sizes |= {"norm_groups": 4, "codebook_size": 64, "codebook_dim": 8, "num_lstm_layers": 1}
    return SimVQAudioModel(SimVQAudioConfig(**sizes, **options)).eval()


def dac() -> DacModel:
    config = DacConfig(
        encoder_hidden_size=4,
        decoder_hidden_size=64,
        downsampling_ratios=[4, 8, 10],
        n_codebooks=2,
        codebook_size=64,
        hidden_size=32,
        sampling_rate=RATE,
    )
    return DacModel(config).eval()


def encodec() -> EncodecModel:
    sizes = {"num_filters": 2, "hidden_size": 32, "codebook_size": 64, "codebook_dim": 32}
    return EncodecModel(EncodecConfig(**sizes)).eval()


def mimi() -> MimiModel:
    config = MimiConfig(
        num_filters=2,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        codebook_size=64,
        codebook_dim=8,
        vector_quantization_hidden_dimension=8,
        upsample_groups=32,
        num_quantizers=2,
    )
    return MimiModel(config).eval()


def of_dac() -> DacFeatureExtractor:
    return DacFeatureExtractor(sampling_rate=RATE, hop_length=HOP)


def of_encodec() -> EncodecFeatureExtractor:
    return EncodecFeatureExtractor(sampling_rate=RATE)


def of_ours() -> SimVQAudioFeatureExtractor:
    return SimVQAudioFeatureExtractor(sampling_rate=RATE, hop_length=HOP)


@pytest.mark.parametrize(("model", "extractor"), [(dac(), of_dac()), (ours(), of_ours())])
@torch.no_grad()
def test_code_written_for_dac(model, extractor):
    inputs = extractor(raw_audio=CLIPS, sampling_rate=RATE, return_tensors="pt")
    encoded = model.encode(inputs["input_values"], n_quantizers=1)
    codes = encoded.audio_codes
    assert codes.shape[:2] == (2, 1) and codes.dtype == torch.int64
    vectors, _, again = model.quantizer.from_codes(codes)
    assert again is codes
    torch.testing.assert_close(vectors, encoded.quantized_representation)
    by_codes = model.decode(audio_codes=codes).audio_values
    torch.testing.assert_close(model.decode(vectors).audio_values, by_codes)
    torch.testing.assert_close(model.decode(None, codes).audio_values, by_codes)
    assert torch.equal(model.encode(inputs["input_values"], 1).audio_codes, codes)
    assert encoded.loss.isfinite().all() and encoded.projected_latents.shape[0] == 2
    by_vectors = model.decode(quantized_representation=vectors).audio_values
    torch.testing.assert_close(by_vectors, by_codes)
    assert by_codes.numel() == 2 * HOP * codes.shape[-1]
    audio = model(inputs["input_values"], n_quantizers=1).audio_values
    torch.testing.assert_close(audio, by_codes)


@pytest.mark.parametrize(("model", "extractor"), [(encodec(), of_encodec()), (ours(), of_ours())])
@torch.no_grad()
def test_code_written_for_encodec(model, extractor):
    inputs = extractor(raw_audio=CLIPS[0], sampling_rate=RATE, return_tensors="pt")
    encoded = model.encode(inputs["input_values"], inputs["padding_mask"])
    audio = model.decode(encoded.audio_codes, encoded.audio_scales, inputs["padding_mask"])[0]
    assert audio.shape == inputs["input_values"].shape
    codes = encoded.audio_codes.reshape(1, 1, -1, encoded.audio_codes.shape[-1])
    by_name = model.decode(
        codes, audio_scales=[None], padding_mask=inputs["padding_mask"]
    ).audio_values
    torch.testing.assert_close(by_name, audio)
    whole = model(inputs["input_values"], inputs["padding_mask"]).audio_values
    torch.testing.assert_close(whole[..., : audio.shape[-1]], audio)


@pytest.mark.parametrize(
    ("model", "extractor"), [(mimi(), of_encodec()), (ours(streaming=True), of_ours())]
)
@torch.no_grad()
def test_code_written_for_mimi(model, extractor):
    inputs = extractor(raw_audio=CLIPS, sampling_rate=RATE, return_tensors="pt", padding=True)
    values, mask = inputs["input_values"], inputs["padding_mask"]
    encoded = model.encode(values, mask, num_quantizers=1)
    audio = model.decode(encoded.audio_codes, mask)[0]
    assert audio.shape == values.shape
    codes_mask = model.get_audio_codes_mask(mask)
    lengths = model.get_encoded_length(mask.sum(dim=-1))
    assert codes_mask.sum(dim=-1).tolist() == lengths.tolist()
    assert codes_mask.shape == encoded.audio_codes[:, 0].shape
    output = model(values, mask, num_quantizers=1)
    torch.testing.assert_close(output.audio_codes, encoded.audio_codes)
    again = model(values, mask, audio_codes=encoded.audio_codes)
    torch.testing.assert_close(again.audio_values, output.audio_values[..., : values.shape[-1]])
    past, cache, found = None, None, []
    for chunk in values[..., :3840].split(1920, dim=-1):
        step = model.encode(
            chunk,
            num_quantizers=1,
            encoder_past_key_values=past,
            padding_cache=cache,
            use_streaming=True,
        )
        past, cache = step.encoder_past_key_values, step.padding_cache
        found.append(step.audio_codes)
    assert 0 < torch.cat(found, dim=-1).shape[-1] <= encoded.audio_codes.shape[-1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_quantizers": 8}, "num_quantizers must be 1.*one codebook, of 64 codes"),
        ({"n_quantizers": 2}, "n_quantizers must be 1"),
        ({"bandwidth": 6.0}, "bandwidth must be left out, got 6.0.*0.45 kbit"),
        ({"padding_cache": object()}, "padding_cache.*encoder_past_key_values"),
        ({"encoder_past_key_values": torch.ones(1)}, "encoder_past_key_values.*Tensor"),
        ({"padding_mask": torch.ones(1, 99), "attention_mask": torch.ones(1, 99)}, "one of them"),
    ],
)
def test_what_a_codec_of_one_codebook_cannot_do_is_refused(options, named):
    with pytest.raises(ValueError, match=named):
        ours().encode(torch.zeros(1, 1, 99), **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"audio_scales": [torch.ones(1)]}, "audio_scales must be left out"),
        ({"audio_codes": torch.zeros(2, 1, 1, 3).long()}, "2 chunks.*join them"),
        ({"decoder_past_key_values": torch.ones(1, 99)}, "padding_mask=..."),
        ({"padding_mask": torch.ones(1, 9), "audio_codes_mask": torch.ones(1, 3)}, "not both"),
        ({"padding_mask": torch.ones(1, 30)}, "30 samples, which have 1 codes, and there are 3"),
        ({"padding_mask": torch.ones(960)}, "padding_mask must be .B, L."),
        ({"last_frame_pad_length": 3}, "last_frame_pad_length must be left out"),
    ],
)
def test_what_decode_cannot_do_is_refused(options, named):
    with pytest.raises(ValueError, match=named):
        ours().decode(**{"audio_codes": torch.zeros(1, 1, 3).long()} | options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "input_values or audio_codes"),
        ({"encoder_past_key_values": object()}, "use encode and decode for streams"),
        (
            {"audio_codes": torch.zeros(1, 1, 3).long(), "num_quantizers": 8},
            "num_quantizers must be 1",
        ),
        ({"audio_codes": torch.zeros(1, 1, 3).long(), "audio_scales": [1.0]}, "audio_scales"),
    ],
)
def test_what_forward_cannot_do_is_refused(options, named):
    with pytest.raises(ValueError, match=named):
        ours()(**options)


@pytest.mark.parametrize("n_fft", [321, 1280])
def test_windows_of_odd_lengths(n_fft):
    model = (
        ours(n_fft=n_fft) if n_fft % 2 == 0 else ours(n_fft=n_fft, downsampling_ratios=[5, 7, 9])
    )
    codes = torch.zeros(1, 1, 3).long()
    assert model.decode(codes).audio_values.shape[-1] == 3 * model.config.hop_length


def test_masks_are_tensors_arrays_or_lists():
    model, codes = ours(), torch.zeros(1, 1, 2).long()
    mask = torch.ones(1, 500)
    expected = model.decode(codes, mask).audio_values
    for same in (mask.numpy(), mask.tolist()):
        assert torch.equal(model.decode(codes, same).audio_values, expected)
        assert model.get_audio_codes_mask(same).shape == (1, 2)


def test_the_bandwidth_that_there_is_and_other_names_of_masks():
    model, values = ours(), torch.from_numpy(np.stack([CLIPS[0][:2900], CLIPS[1]]))
    mask = torch.ones_like(values)
    mask[1, 1500:] = 0
    bits = model.config.frame_rate * math.log2(64) / 1000
    expected = model.encode(values[:, None], mask)
    for options in (
        {"attention_mask": mask, "bandwidth": bits},
        {"attention_mask": mask, "bandwidth": np.float32(bits), "num_quantizers": np.int64(1)},
        {"padding_mask": mask[:, None]},
    ):
        found = model.encode(values, **options)
        assert torch.equal(found.audio_codes, expected.audio_codes)
    codes, real = expected.audio_codes, expected.audio_codes_mask
    whole = model.decode(codes, audio_codes_mask=real).audio_values
    assert torch.equal(model.decode(codes, audio_codes_mask=real[:, 0]).audio_values, whole)
    assert torch.equal(model.decode(codes, mask).audio_values, whole[..., :2900])
    with pytest.raises(ValueError, match="padding_side"):
        model.get_audio_codes_mask(mask, padding_side="left")
