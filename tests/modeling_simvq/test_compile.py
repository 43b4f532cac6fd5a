"""Encode and decode as one graph of torch.compile, in both modalities."""

import pytest
import torch

from modeling_simvq import SimVQAudioConfig, SimVQAudioModel, SimVQImageConfig, SimVQImageModel
from modeling_simvq.lstm import LSTM
from tests.modeling_simvq.tiny import AUDIO, IMAGE


def models():
    torch.manual_seed(0)
    yield SimVQImageModel(SimVQImageConfig(**IMAGE))
    for streaming in (False, True):
        yield SimVQAudioModel(SimVQAudioConfig(streaming=streaming, **AUDIO))


@pytest.mark.slow
@pytest.mark.parametrize("model", models(), ids=["image", "audio", "streaming"])
@torch.no_grad()
def test_encode_and_decode_are_whole_graphs(model):
    """fullgraph raises where a graph breaks. The back end that compiles nothing suffices to see that."""
    torch._dynamo.reset()
    model.eval()
    image = model.main_input_name == "pixel_values"
    codes = "image_codes" if image else "audio_codes"
    encode = torch.compile(
        lambda values: model.encode(values)[codes], fullgraph=True, backend="eager"
    )
    decode = torch.compile(lambda values: model.decode(values)[0], fullgraph=True, backend="eager")
    for rows in (1, 2):
        values = torch.rand(rows, 3, 16, 24) if image else torch.rand(rows, 1, 160) - 0.5
        expected = model.encode(values)[codes]
        assert torch.equal(encode(values), expected)
        torch.testing.assert_close(decode(expected), model.decode(expected)[0], rtol=0, atol=1e-5)


def test_the_lstm_is_that_of_torch():
    torch.manual_seed(0)
    expected = torch.nn.LSTM(6, 6, 2, batch_first=True)
    torch.manual_seed(0)
    lstm = LSTM(6, 6, 2)
    assert list(lstm.state_dict()) == list(expected.state_dict())
    rows, state = torch.randn(2, 9, 6), tuple(torch.randn(2, 2, 2, 6))
    for given in (None, state):
        (made, after), (wanted, then) = lstm(rows, given), expected(rows, given)
        for own, other in zip((made, *after), (wanted, *then), strict=True):
            assert torch.equal(own, other)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_lstm_goes_on_from_its_state():
    """Also when it alone is compiled, and the encoder hands its state from piece to piece."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    lstm, rows = LSTM(6, 6, 2).eval(), torch.randn(2, 9, 6)
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    first, state = compiled(rows[:, :4])
    second, after = compiled(rows[:, 4:], state)
    expected, then = lstm(rows)
    torch.testing.assert_close(torch.cat([first, second], 1), expected)
    torch.testing.assert_close(after, then)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_lstm_under_autocast():
    torch._dynamo.reset()
    torch.manual_seed(0)
    lstm, rows = LSTM(6, 6, 1).eval(), torch.randn(2, 9, 6)
    with torch.autocast("cpu", torch.bfloat16):
        expected = lstm(rows)[0]
        found = torch.compile(lstm, backend="aot_eager")(rows)[0]
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


def test_a_quantizer_that_torchao_quantized_is_refused(tiny_model):
    class Quantized(torch.Tensor):
        pass

    Quantized.__module__ = "torchao.quantization"
    weight = tiny_model.quantizer.projection.weight
    tiny_model.quantizer.projection.weight = torch.nn.Parameter(weight.data.as_subclass(Quantized))
    with pytest.raises(ValueError, match="weight of the quantizer was quantized by torchao"):
        tiny_model.encode(torch.rand(1, 3, 8, 8))
