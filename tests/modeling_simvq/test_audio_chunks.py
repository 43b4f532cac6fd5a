"""Chunks of ragged batches: each clip is cut by its own length, and no row is run without a real frame."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modeling_simvq import modeling_simvq_audio as modeling
from tests.modeling_simvq.test_audio_batching import ragged, small_model

CHUNK, OVERLAP = 20, 5  # frames, of 24 samples


MODELS = {
    "causal": small_model(),
    "not causal": small_model(causal=False),
    "dilated, no LSTM": small_model(num_residual_layers=2, num_lstm_layers=0),
}


@pytest.fixture(scope="module", autouse=True)
def in_chunks():
    """The models decode, and encode, so many frames at a time."""
    for model in MODELS.values():
        model.enable_chunking(CHUNK / 1000, OVERLAP / 1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "ENCODER_CHUNK_SECONDS", CHUNK / 1000)
        yield


def frames_in_chunks(model) -> list[tuple[str, int]]:
    """What the decoder, and the encoder's first layer, will see: the least real length of each call."""
    seen = []
    model.decoder.register_forward_pre_hook(
        lambda _, inputs: seen.append(
            ("decoder", inputs[0].shape[-1] if inputs[1] is None else int(inputs[1].sum(-1).min()))
        )
    )
    model.encoder.conv_in.register_forward_pre_hook(
        lambda _, inputs: seen.append(
            ("encoder", inputs[0].shape[-1] if inputs[1] is None else int(inputs[1].min()))
        )
    )
    return seen


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@example(lengths=[24 * 90, 24 * 20], name="causal")
@example(lengths=[24 * 90, 24 * 37], name="not causal")  # the end lies in the overlap of two chunks
@example(lengths=[1, 24 * 21], name="causal")
@given(
    lengths=st.lists(st.integers(1, 24 * 100), min_size=2, max_size=4),
    name=st.sampled_from([*MODELS]),
)
def test_a_clip_gives_in_any_batch_what_it_gives_alone(lengths, name):
    model = MODELS[name]
    values, padding_mask = ragged(lengths)
    seen = frames_in_chunks(model)
    try:
        with torch.no_grad():
            batch = model.encode(values, padding_mask)
            mask = batch.audio_codes_mask
            audio = model.decode(batch.audio_codes, audio_codes_mask=mask).audio_values
            assert min(count for _, count in seen) > 0
            assert audio.isfinite().all()
            for row, length in enumerate(lengths):
                frames = -(-length // 24)
                latents = model.encode(values[row : row + 1, :, :length]).latents
                codes = batch.audio_codes[row : row + 1, :, :frames]
                alone = model.decode(codes).audio_values[0]
                torch.testing.assert_close(
                    batch.latents[row : row + 1, :, :frames], latents, rtol=0, atol=1e-5
                )
                torch.testing.assert_close(
                    audio[row, :, : frames * 24], alone, rtol=1e-4, atol=1e-4
                )
                assert (audio[row, :, frames * 24 :] == 0).all()
    finally:
        model.decoder._forward_pre_hooks.clear()
        model.encoder.conv_in._forward_pre_hooks.clear()


def test_masks_of_any_type_and_padding_of_any_content():
    model = MODELS["causal"]
    values, mask = ragged([24 * 50, 24 * 8])
    values[mask[:, None] == 0] = 1e30
    with torch.no_grad():
        expected = model(values, mask)
        for dtype in (torch.bool, torch.uint8, torch.float32, torch.bfloat16):
            found = model(values, mask.to(dtype))
            assert torch.equal(found.audio_codes, expected.audio_codes)
            assert torch.equal(found.audio_values, expected.audio_values)
        real = expected.audio_codes_mask
        vectors = model.encode(values, mask).quantized_latents.masked_fill(~real, float("nan"))
        decoded = model.decode(quantized_latents=vectors, audio_codes_mask=real.float())
        assert torch.equal(decoded.audio_values, expected.audio_values)


@pytest.mark.parametrize(
    ("mask", "named"),
    [
        ([[1, 1, 1], [1, 0, 1]], "pad on the right"),
        ([[1, 1, 1], [0, 0, 0]], "clip 1 is empty"),
        ([[1, 1, 1], [0, 1, 1]], "pad on the right"),
        ([[0.0, 0.0, -1e9], [0.0, 0.0, 0.0]], "1 or 0.*-1"),
        ([[1.0, 1.0, float("nan")], [1.0, 1.0, 1.0]], "1 or 0.*nan"),
        ([[3], [2]], r"\(2, 3\)|\(2, 1, 3\)"),
    ],
)
def test_masks_that_are_no_right_padding_are_named(mask, named):
    model, mask = MODELS["causal"], torch.tensor(mask)
    with pytest.raises(ValueError, match=f"padding_mask.*{named}|{named}"):
        model.encode(torch.zeros(2, 1, 3), mask)
    with pytest.raises(ValueError, match=named):
        model.decode(torch.zeros(2, 1, 3, dtype=torch.int64), audio_codes_mask=mask[:, None])
