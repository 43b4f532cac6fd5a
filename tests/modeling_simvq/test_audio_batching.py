"""A clip's result does not depend on its batch, nor on how many pieces it is worked through in."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modeling_simvq import SimVQAudioConfig, SimVQAudioModel, attention_in_pieces
from modeling_simvq import modeling_simvq_audio as modeling

# Frames at a clip's end that may differ from what the clip gives alone: none.
FRAMES_THAT_MAY_DIFFER = 0


def small_model(**changes) -> SimVQAudioModel:
    torch.manual_seed(0)
    config = dict(
        num_filters=4,
        downsampling_ratios=[2, 3, 4],
        codebook_size=64,
        codebook_dim=16,
        hidden_size=128,  # with fewer, groups of one value make GroupNorm magnify rounding
        intermediate_size=64,
        num_decoder_layers=2,
        n_fft=96,
    )
    return SimVQAudioModel(SimVQAudioConfig(**{**config, **changes})).eval()


MODELS = {
    "causal": small_model(),
    "not causal": small_model(causal=False),
    "dilated, no LSTM": small_model(num_residual_layers=2, num_lstm_layers=0),
    "not causal, dilated": small_model(causal=False, num_residual_layers=3),
}


def ragged(lengths: list[int], garbage: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded noise; the padding holds large numbers to show that nobody reads it."""
    torch.manual_seed(sum(lengths))
    values = torch.randn(len(lengths), 1, max(lengths)) * 0.3
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    values[~mask[:, None]] = 50.0 if garbage else 0.0
    return values, mask.long()


def worst_differences(model: SimVQAudioModel, lengths: list[int]) -> dict[str, float]:
    """Largest difference of latents, loss and reconstruction between batch and single clips."""
    values, padding_mask = ragged(lengths)
    hop = model.config.hop_length
    with torch.no_grad():
        batch = model.encode(values, padding_mask)
        decoded = model.decode(
            audio_codes=batch.audio_codes, audio_codes_mask=batch.audio_codes_mask
        )
        both = model(values, padding_mask)
    assert torch.equal(both.audio_values, decoded.audio_values)
    assert batch.audio_codes_mask.sum(-1).flatten().tolist() == [-(-n // hop) for n in lengths]
    worst = {"latents": 0.0, "audio": 0.0}
    for i, length in enumerate(lengths):
        frames = -(-length // hop) - FRAMES_THAT_MAY_DIFFER
        with torch.no_grad():
            alone = model.encode(values[i : i + 1, :, :length])
            quantized = alone.quantized_latents
            one = model.decode(audio_codes=batch.audio_codes[i : i + 1, :, :frames])
        latents = batch.latents[i : i + 1, :, :frames]
        worst["latents"] = max(worst["latents"], float((latents - alone.latents).abs().max()))
        same = torch.equal(batch.audio_codes[i, 0, :frames], alone.audio_codes[0, 0])
        if not same:  # only where two codes are equally near
            chosen = batch.quantized_latents[i : i + 1, :, :frames]
            gap = (latents - chosen).norm(dim=1) - (latents - quantized).norm(dim=1)
            assert gap.abs().max() < 1e-5
        audio = decoded.audio_values[i : i + 1, :, : frames * hop]
        worst["audio"] = max(worst["audio"], float((audio - one.audio_values).abs().max()))
        assert (decoded.audio_values[i, :, frames * hop :] == 0).all()
    return worst


@pytest.mark.parametrize("name", MODELS)
def test_clips_give_in_a_batch_what_they_give_alone(name):
    worst = worst_differences(MODELS[name], [1, 2, 7, 23, 24, 25, 100, 500, 777, 961])
    print(f"{name}: batch against alone, every frame: {worst}")
    assert worst["latents"] < 1e-5 and worst["audio"] < 1e-4


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@example(lengths=[1, 2], name="causal")  # clips of a single frame
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=5), name=st.sampled_from([*MODELS])
)
def test_any_ragged_batch(lengths, name):
    worst = worst_differences(MODELS[name], lengths)
    assert worst["latents"] < 1e-5 and worst["audio"] < 1e-4


def test_commitment_loss_is_of_the_real_frames():
    model = MODELS["causal"]
    values, mask = ragged([240, 480])
    with torch.no_grad():
        both = model.encode(values, mask).commitment_loss
        first = model.encode(values[:1, :, :240]).commitment_loss
        second = model.encode(values[1:]).commitment_loss
    torch.testing.assert_close(both, (10 * first + 20 * second) / 30)


def test_gradients_of_a_padded_batch_are_those_of_its_clips():
    model = MODELS["causal"]
    values, mask = ragged([250, 480])
    parameters = [p for n, p in model.named_parameters() if not n.startswith("quantizer.")]

    def gradients(*outputs):
        return torch.autograd.grad(sum(o.square().sum() for o in outputs), parameters)

    together = gradients(model(values, mask).audio_values)
    alone = gradients(model(values[:1, :, :250]).audio_values, model(values[1:]).audio_values)
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [24 * 100, 24 * 100 + 1, 24 * 101 - 1, 24 * 96 + 11, 30])
def test_encoding_in_chunks_equals_the_whole_clip(name, length):
    model = MODELS[name]
    torch.manual_seed(length)
    values = torch.randn(2, 1, length)
    with torch.no_grad():
        whole, _ = model.encoder(values)
        worst = 0.0
        for chunk in (1, 7, 16, 100, 1000):
            pieces, _ = model.encoder(values, chunk_frames=chunk)
            worst = max(worst, float((pieces - whole).abs().max()))
    print(f"{name}, {length} samples: chunks against whole, worst latent difference {worst:.1e}")
    assert worst < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_encoding_a_ragged_batch_in_chunks(name):
    model = MODELS[name]
    values, mask = ragged([2400, 1, 50, 500, 1999, 2391])
    lengths = mask.sum(1)
    with torch.no_grad():
        whole, frames = model.encoder(values, lengths)
        for chunk in (1, 10, 33):
            pieces, same_frames = model.encoder(values, lengths, chunk)
            assert torch.equal(frames, same_frames)
            for one, other, count in zip(pieces, whole, frames, strict=True):
                torch.testing.assert_close(one[:, :count], other[:, :count], rtol=1e-5, atol=1e-5)


def test_encode_itself_works_in_chunks(monkeypatch):
    model = MODELS["causal"]
    values = torch.randn(1, 1, 5000)
    seen = []
    hook = model.encoder.conv_in.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].shape[-1])
    )
    with torch.no_grad():
        whole = model.encode(values)
        monkeypatch.setattr(modeling, "ENCODER_CHUNK_SECONDS", 0.02)
        pieces = model.encode(values)
    hook.remove()
    assert seen[0] == 5000 and len(seen) > 5 and max(seen[1:]) < 1000
    assert torch.equal(whole.audio_codes, pieces.audio_codes)


def test_decoding_in_chunks_is_close_and_seamless(tiny_audio_model, waveform):
    """A real checkpoint of the authors; random weights, so the error only bounds a trained model's."""
    model = tiny_audio_model
    with torch.no_grad():
        codes = model.encode(waveform).audio_codes
        whole = model.decode(audio_codes=codes).audio_values
        errors = {}
        for seconds in (0.5, 1.0, 2.0):
            model.enable_chunking(seconds, seconds / 4)
            pieces = model.decode(audio_codes=codes).audio_values
            errors[seconds] = float((pieces - whole).norm() / whole.norm())
        model.enable_chunking(100, 1)
        assert torch.equal(model.decode(audio_codes=codes).audio_values, whole)
        model.disable_chunking()
    print(f"decoding in chunks of so many seconds, relative error: {errors}")
    assert pieces.shape == whole.shape and pieces.isfinite().all()
    assert errors[2.0] < errors[0.5] + 0.05 and errors[2.0] < 0.5


def test_chunks_have_sensible_sizes():
    for chunk, overlap in ((1, 0), (1, 0.6), (0, 0)):
        with pytest.raises(ValueError, match="overlap_seconds"):
            MODELS["causal"].enable_chunking(chunk, overlap)


@pytest.mark.parametrize("lengths", [[2400], [2400, 600]])
def test_attention_in_pieces_is_attention(lengths, monkeypatch):
    model = MODELS["causal"]
    values, mask = ragged(lengths)
    with torch.no_grad():
        whole = model(values, mask).audio_values
        monkeypatch.setattr(attention_in_pieces, "QUERIES_AT_A_TIME", 7)
        pieces = model(values, mask).audio_values
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)
