"""Streams of speech: however they are cut, codes and samples are those of the whole clip."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from modeling_simvq import SimVQAudioConfig, SimVQAudioModel, SimVQAudioStream
from modeling_simvq.latent_whitening import whitening_map

SMALL = {"num_filters": 4, "downsampling_ratios": [2, 4], "codebook_size": 300, "codebook_dim": 16}
SMALL |= {"hidden_size": 32, "intermediate_size": 64, "num_decoder_layers": 2, "n_fft": 32}
SMALL |= {"attention_window": 5, "streaming": True, "whiten_latents": True}
HOP = 8


def make_model(**changes) -> SimVQAudioModel:
    torch.manual_seed(0)
    model = SimVQAudioModel(SimVQAudioConfig(**(SMALL | changes))).eval()
    if (
        model.whitening is not None
    ):  # latents that fill the space of the codes, so that many are used
        with torch.no_grad():
            latents = model.encoder(noise(8000))[0]
            weight, bias = whitening_map(latents[0].mT)
            model.whitening.weight.copy_(weight), model.whitening.bias.copy_(bias)
    return model


@pytest.fixture(scope="module")
def model() -> SimVQAudioModel:
    return make_model()


def noise(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch, 1, length, generator=torch.Generator().manual_seed(seed)).tanh()


def whole(model: SimVQAudioModel, samples: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        codes = model.encode(samples).audio_codes
        return codes, model.decode(codes).audio_values


def through(stream: SimVQAudioStream, samples: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Send samples in chunks of these sizes, and the rest at once; decode the codes as they come."""
    codes, decoded, start = [], [], 0
    for size in [*sizes, samples.shape[-1]]:
        codes.append(stream.encode(samples[..., start : start + size]))
        decoded.append(stream.decode(codes[-1]))
        start = min(start + size, samples.shape[-1])
    last = stream.flush()
    return torch.cat([*codes, last[0]], dim=-1), torch.cat([*decoded, last[1]], dim=-1)


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], expected[0])
    assert found[1].shape == expected[1].shape
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-6)


CUT = given(st.integers(1, 150), st.lists(st.integers(0, 60), max_size=12), st.integers(0, 9))


def check_a_cut(model, length, sizes, seed):
    samples = noise(length, seed=seed)
    assert_same(through(model.stream(), samples, sizes), whole(model, samples))


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@CUT
def test_any_cut_gives_the_whole(model, length, sizes, seed):
    check_a_cut(model, length, sizes, seed)


@pytest.mark.soak
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@CUT
def test_any_of_many_cuts_gives_the_whole(model, length, sizes, seed):
    check_a_cut(model, length, sizes, seed)


def test_sample_by_sample_and_with_all_kinds_of_layers():
    for changes in ({"num_lstm_layers": 0}, {"whiten_latents": False}, {"num_residual_layers": 2}):
        model = make_model(**changes)
        samples = noise(203)
        expected = whole(model, samples)
        assert len(expected[0].unique()) > (10 if model.whitening else 2)
        assert_same(through(model.stream(), samples, [1] * 202), expected)


def test_streams_of_a_batch_and_beside_each_other(model):
    samples, other = noise(331, batch=3), noise(150, seed=5)
    together = SimVQAudioStream(model, batch_size=3)
    beside = model.stream()
    codes = [together.encode(samples[..., :100])]
    begun = beside.encode(other[..., :77])
    codes += [together.encode(samples[..., 100:]), together.flush()[0]]
    assert torch.equal(torch.cat(codes, dim=-1), whole(model, samples)[0])
    rest = beside.encode(other[..., 77:])
    last, sound = beside.flush()
    assert sound.shape[-1] == 0  # it has decoded nothing
    assert torch.equal(torch.cat([begun, rest, last], dim=-1), whole(model, other)[0])


def test_codes_and_samples_depend_on_the_past_alone(model):
    samples = noise(20 * HOP)
    changed = samples.clone()
    changed[..., 10 * HOP :] = noise(10 * HOP, seed=1)
    codes, sound = whole(model, samples)
    other_codes, _ = whole(model, changed)
    assert torch.equal(codes[..., :10], other_codes[..., :10])
    assert not torch.equal(codes, other_codes)
    codes[..., 10:] = (codes[..., 10:] + 1) % 300
    with torch.no_grad():
        other = model.decode(codes).audio_values
    settled = 10 * HOP - model.decoder.inverse_stft.lag
    torch.testing.assert_close(sound[..., :settled], other[..., :settled], rtol=0, atol=1e-6)
    assert not torch.allclose(sound[..., settled:], other[..., settled:], atol=1e-3)
    assert model.stream().latency == HOP + model.decoder.inverse_stft.lag == 20


def test_clips_of_a_padded_batch_are_as_alone(model):
    samples = noise(90, batch=2)
    mask = torch.ones(2, 90, dtype=torch.int64)
    mask[1, 45:] = 0
    with torch.no_grad():
        encoded = model.encode(samples, mask)
        decoded = model.decode(encoded.audio_codes, audio_codes_mask=encoded.audio_codes_mask)
    codes, sound = whole(model, samples[1:, :, :45])
    assert torch.equal(encoded.audio_codes[1:, :, :6], codes)
    torch.testing.assert_close(decoded.audio_values[1:, :, :48], sound, rtol=0, atol=1e-6)
    assert not decoded.audio_values[1, :, 48:].any()


def test_training_computes_the_same_and_every_weight_learns():
    model = make_model()
    samples = noise(200, batch=2)
    codes, sound = whole(model, samples)
    output = model(samples)
    assert torch.equal(output.audio_codes, codes)
    torch.testing.assert_close(output.audio_values.detach(), sound, rtol=0, atol=1e-6)
    (output.audio_values.square().mean() + output.commitment_loss).backward()
    for name, parameter in model.named_parameters():
        assert (
            not parameter.requires_grad or parameter.grad.abs().sum() > 0 or "key.bias" in name
        ), name


def test_the_state_does_not_grow(model):
    stream = model.stream()
    sizes = []
    for seed in range(6):
        stream.decode(stream.encode(noise(80, seed=seed)))
        pasts = (stream._encoder, stream._decoder)
        sizes.append([(name, t.shape) for past in pasts for name, t in past.layers.items()])
    assert all(size == sizes[0] for size in sizes[1:])


def test_a_chunk_that_is_refused_leaves_the_stream_as_it_was(model):
    samples = noise(100)
    stream = model.stream()
    codes = [stream.encode(samples[..., :33])]
    with pytest.raises(ValueError, match="NaN"):
        stream.encode(torch.full((1, 1, 20), torch.nan))
    with pytest.raises(ValueError, match="2 streams, but this stream was made with batch_size=1"):
        stream.encode(noise(20, batch=2))
    with pytest.raises(ValueError, match="code 300 is out of range"):
        stream.decode(torch.tensor([[[300]]]))
    codes += [stream.encode(samples[..., 33:]), stream.flush()[0]]
    assert torch.equal(torch.cat(codes, dim=-1), whole(model, samples)[0])


def test_reset_and_flush_begin_anew(model):
    samples = noise(77)
    stream = model.stream()
    through(stream, noise(50, seed=3), [])
    assert_same(through(stream, samples, [10]), whole(model, samples))
    stream.encode(samples)
    stream.reset()
    assert [part.shape[-1] for part in stream.flush()] == [0, 0]


def test_a_clip_within_a_frame_is_decoded_by_flush(model):
    samples = noise(5)
    stream = model.stream()
    assert stream.encode(samples).shape == (1, 1, 0)
    assert_same(stream.flush(), whole(model, samples))


def test_the_api_of_transformers_codecs(model):
    samples = noise(160)
    codes, sound = whole(model, samples)
    with torch.no_grad():
        first = model.encode(samples[..., :83], use_streaming=True)
        second = model.encode(
            samples[..., 83:], encoder_past_key_values=first.encoder_past_key_values
        )
        found = torch.cat([first.audio_codes, second.audio_codes], dim=-1)
        assert torch.equal(found, codes)
        begun = model.decode(codes[..., :7], use_cache=True)
        again = [
            model.decode(codes[..., 7:], decoder_past_key_values=begun.decoder_past_key_values)
            for _ in range(2)
        ]
    assert torch.equal(again[0].audio_values, again[1].audio_values)  # a past is not changed
    joined = torch.cat([begun.audio_values, again[0].audio_values], dim=-1)
    settled = 160 - model.decoder.inverse_stft.lag
    torch.testing.assert_close(joined, sound[..., :settled], rtol=0, atol=1e-6)


def test_what_cannot_stream_says_so(model):
    ordinary = make_model(streaming=False)
    with pytest.raises(ValueError, match="streaming=True"):
        SimVQAudioStream(ordinary)
    with pytest.raises(ValueError, match="streaming=True"):
        ordinary.encode(noise(80), use_streaming=True)
    with pytest.raises(ValueError, match="streaming=True needs causal=True"):
        SimVQAudioConfig(streaming=True, causal=False)
    with pytest.raises(ValueError, match="evaluation mode"):
        make_model().train().encode(noise(80), use_streaming=True)
    with pytest.raises(ValueError, match="take no mask"):
        model.encode(noise(80), (torch.arange(80) < 70)[None], use_streaming=True)
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1"):
        SimVQAudioStream(model, batch_size=0)


def test_weights_of_the_twin_fit(model):
    assert make_model(streaming=False).load_state_dict(model.state_dict())


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    samples = noise(120)
    loaded = SimVQAudioModel.from_pretrained(tmp_path).eval()
    assert loaded.config.streaming and loaded.config.attention_window == 5
    assert_same(through(loaded.stream(), samples, [50]), whole(model, samples))


@pytest.mark.soak
@pytest.mark.slow
def test_a_step_exports_and_compiles_with_fixed_shapes(model):
    """A frame of samples to latents, and a code's vector to samples; the state is a dict of tensors."""

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = model.encoder, model.decoder

        def forward(self, samples, latents, state):
            state = dict(state)
            return self.encoder.step(samples, state), self.decoder(latents, state=state), state

    step = Step().eval()
    with torch.no_grad():
        _, _, state = step(noise(HOP), torch.zeros(1, 16, 1), {})  # makes all parts of the state
        inputs = (noise(HOP, seed=2), torch.randn(1, 16, 1), state)
        exported = torch.export.export(step, inputs, strict=False).module()
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        expected = step(*inputs)
        # Without it torch.compile leaves every LSTM to Python.
        with torch._dynamo.config.patch(allow_rnn=True):
            found = compiled(*inputs)
        for values in (exported(*inputs), found):
            torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)
    assert {k: v.shape for k, v in expected[2].items()} == {k: v.shape for k, v in state.items()}


@pytest.mark.parametrize("num_filters", [1, 3, 4, 8])
@pytest.mark.parametrize("num_lstm_layers", [0, 1])
def test_latents_are_the_very_same_however_a_stream_is_cut(num_filters, num_lstm_layers):
    """Bit for bit, also where a width fills no vector of the processor."""
    model = make_model(num_filters=num_filters, num_lstm_layers=num_lstm_layers)
    samples = noise(25 * HOP)
    with torch.no_grad():
        expected = model.encode(samples).latents
        for size in (1, 3, HOP, 5 * HOP):
            past, found = None, []
            for chunk in samples.split(size, dim=-1):
                output = model.encode(chunk, encoder_past_key_values=past, use_streaming=True)
                past = output.encoder_past_key_values
                found.append(output.latents)
            assert torch.equal(torch.cat(found, dim=-1), expected), size


def test_a_stream_that_begins_with_less_than_a_frame_has_the_present_weights():
    model, samples = make_model(), noise(200)
    whole(model, samples)  # keeps its codebook
    torch.nn.init.normal_(model.quantizer.projection.weight)
    assert_same(through(model.stream(), samples, [3]), whole(model, samples))


def test_a_stream_of_several_quantizers_keeps_the_codebooks_that_it_began_with():
    """One that it comes to use later too, with the weights of then."""
    model, samples = make_model(num_quantizers=3), noise(400)
    assert_same(through(model.stream(), samples, [3, 100]), whole(model, samples))
    first, rest = samples[..., : 10 * HOP], samples[..., 10 * HOP :]
    expected = model.encode(samples).audio_codes
    past = model.encode(first, num_quantizers=2, use_streaming=True).encoder_past_key_values
    assert [book is None for book in past.books] == [False, False, True]
    for level in model.quantizer.levels[:2]:
        torch.nn.init.normal_(level.projection.weight)
    found = model.encode(rest, encoder_past_key_values=past)
    assert torch.equal(found.audio_codes[:, :2], expected[:, :2, 10:])
    assert all(book is not None for book in found.encoder_past_key_values.books)
    with pytest.raises(ValueError, match="of a model of 3 quantizers, this one has 1"):
        make_model().encode(rest, encoder_past_key_values=past)


def test_layers_that_are_more_than_their_weights_are_not_left_out():
    model, samples = make_model(), noise(80)
    for layer in (model.decoder.blocks[0].expand, model.encoder.lstm, model.encoder.conv_in.conv):
        handle = layer.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="has hooks, an adapter"):
            model.stream()
        handle.remove()
    model.encoder.conv_out.conv.register_forward_hook(lambda _, __, output: output + 1)
    with torch.no_grad():
        assert not torch.equal(model.encode(samples).latents, make_model().encode(samples).latents)


def test_pasts_of_others_are_refused(model):
    past = model.encode(noise(80), use_streaming=True).encoder_past_key_values
    codes = model.encode(noise(80)).audio_codes
    with pytest.raises(ValueError, match="decoder_past_key_values is the other side's"):
        model.decode(codes, decoder_past_key_values=past)
    with pytest.raises(ValueError, match="of 1 streams, and the chunk of 2"):
        model.encode(noise(80, batch=2), encoder_past_key_values=past)
    after = model.decode(codes, use_cache=True).decoder_past_key_values
    with pytest.raises(ValueError, match="encoder_past_key_values is the other side's"):
        model.encode(noise(80), encoder_past_key_values=after)
    assert not any(part.requires_grad for kept in (past, after) for part in kept.layers.values())


def test_samples_beyond_the_type_leave_a_stream_as_it_was(model):
    stream, samples = model.stream(), noise(40)
    first = stream.encode(samples[..., :3])
    with pytest.raises(ValueError, match="too large for torch.float32"):
        stream.encode(torch.full((1, 1, 3), 1e300, dtype=torch.float64))
    rest = stream.encode(samples[0, :, 3:].numpy())
    assert torch.equal(torch.cat([first, rest], dim=-1), whole(model, samples)[0])
