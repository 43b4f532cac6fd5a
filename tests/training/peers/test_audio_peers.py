"""Audio tokenizers of other libraries behind the face of ours."""

import math

import pytest
import torch

from tests.training.support import tiny_peers
from training.peers.face import bits_of
from training.peers.opening import open_audio_tokenizer
from training.runtime.errors import SettingsError

SAMPLES = torch.randn(1, 1, 2501, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def opened(model, folder):
    return open_audio_tokenizer(tiny_peers.save(model, folder))


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "used", "options"),
    [
        (tiny_peers.dac, 2, {"n_quantizers": 2}),
        (tiny_peers.mimi, 2, {"num_quantizers": 2}),
        (tiny_peers.encodec, 1, {"bandwidth": 15.0}),
    ],
)
def test_the_first_codes_are_what_the_library_reconstructs_from(tmp_path, make, used, options):
    model = make().eval()
    peer = opened(model, tmp_path)
    output = peer(SAMPLES, num_quantizers=used)
    padded = torch.nn.functional.pad(SAMPLES, (0, 3))  # DAC's extractor gives whole positions
    theirs = model(padded if "n_quantizers" in options else SAMPLES, **options).audio_values
    assert output.audio_values.shape == SAMPLES.shape
    expected = theirs.view(1, 1, -1)[..., : SAMPLES.shape[-1]]
    torch.testing.assert_close(output.audio_values, expected, atol=1e-5, rtol=1e-4)
    assert output.audio_codes.shape[:2] == (1, used) and output.audio_codes.unique().numel() > 1
    seconds = SAMPLES.shape[-1] / peer.config.sampling_rate
    spent = float(bits_of(output, output.audio_codes, peer.config.codebook_size)) / 1000
    assert spent / seconds == pytest.approx(peer.config.target_bandwidths[used - 1], rel=0.01)


@torch.no_grad()
def test_stereo_in_chunks(tmp_path):
    model = tiny_peers.encodec(**tiny_peers.STEREO).eval()
    peer = opened(model, tmp_path)
    output = peer(SAMPLES)
    assert output.audio_values.shape == SAMPLES.shape
    chunks = 3  # two of 1,200 samples that overlap by 12, and the rest
    assert float(output.bits) > output.audio_codes.numel() * math.log2(32) + 32 * (chunks - 1)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "rate"), [(tiny_peers.xcodec2, 16_000), (tiny_peers.neucodec, 24_000)]
)
def test_semantic_features_and_a_rate_for_each_side(tmp_path, make, rate):
    peer = opened(make(), tmp_path)
    assert peer.config.sampling_rate == rate and peer.config.codebook_size == 65_536
    samples = torch.randn(1, 1, rate // 4 + 7, generator=torch.Generator().manual_seed(0)) * 0.1
    output = peer(samples)
    assert output.audio_values.shape == samples.shape
    # 50 a second; the extractors' extra sample opens a position of its own.
    assert output.audio_codes.shape == (1, 1, 13) and output.audio_codes.unique().numel() > 1
    assert peer.config.target_bandwidths == (pytest.approx(0.8),)
    decoded = peer.model.decode(audio_codes=output.audio_codes).audio_values.view(1, 1, -1)
    if rate == 16_000:
        torch.testing.assert_close(output.audio_values, decoded[..., : samples.shape[-1]])


def test_more_quantizers_than_there_are(tmp_path):
    peer = opened(tiny_peers.dac(), tmp_path)
    with pytest.raises(SettingsError, match="num_quantizers: DAC has 3, got 4"):
        peer(SAMPLES, num_quantizers=4)


def test_an_image_tokenizer_is_no_audio_tokenizer(tmp_path):
    with pytest.raises(SettingsError, match="no audio tokenizer.*DAC"):
        opened(tiny_peers.vq_model(), tmp_path)
