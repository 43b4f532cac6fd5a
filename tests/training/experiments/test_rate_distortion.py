"""Rate and distortion: the command on small models, file formats against their files, points and tables."""

import io
import json

import numpy as np
import pytest
import skimage.data
import soundfile
import torch
from accelerate import Accelerator
from PIL import Image

from modeling_simvq import (
    SimVQAudioConfig,
    SimVQAudioModel,
    SimVQImageConfig,
    SimVQImageModel,
    SimVQImageProcessor,
)
from tests.modeling_simvq.tiny import AUDIO, IMAGE
from tests.support.programs import REPOSITORY, run
from tests.training.support import tiny_peers
from training.evaluation.audio import EvaluatedAudio
from training.experiments.rate_curves import Point, at_rate, rows_of
from training.experiments.rate_distortion import (
    ComparedAudio,
    ComparedImages,
    compare,
    prefixes,
)
from training.peers import audio_files, image_files
from training.peers.face import Peer, PeerConfig
from training.runtime.errors import SettingsError


def photograph(side: int) -> Image.Image:
    return Image.fromarray(skimage.data.astronaut()).resize((side, side))


@pytest.mark.slow
def test_image_tokenizers_beside_file_formats(tmp_path):
    torch.manual_seed(0)
    config = SimVQImageConfig(**IMAGE, num_quantizers=2)
    SimVQImageModel(config).save_pretrained(tmp_path / "ours")
    size = {"shortest_edge": 32}, {"height": 32, "width": 32}
    SimVQImageProcessor(size=size[0], crop_size=size[1]).save_pretrained(tmp_path / "ours")
    tiny_peers.save(tiny_peers.vq_model(), tmp_path / "theirs")
    tiny_peers.save(tiny_peers.autoencoder_kl(), tmp_path / "continuous" / "vae")
    (tmp_path / "photos").mkdir()
    for angle in (0, 90):
        photograph(40).rotate(angle).save(tmp_path / "photos" / f"{angle}.png")
    names = f"[{tmp_path}/ours,{tmp_path}/theirs,{tmp_path}/continuous:vae]"
    words = [f"tokenizers={names}", f"dataset={tmp_path}/photos", f"output={tmp_path}/found"]
    words += ["lpips=[]", "qualities=[10,90]", "num_workers=0"]
    done = run("-m", "training.experiments.rate_distortion", "images", *words, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found" / "results.json").read_text())["points"]
    points = {(point["system"], point["setting"]): point for point in found}
    assert points["ours", "the first 1 of 2 quantizers"]["rate"] == pytest.approx(6 / 4)
    assert points["ours", "the first 2 of 2 quantizers"]["rate"] == pytest.approx(12 / 4)
    assert points["theirs", ""]["rate"] == pytest.approx(5 / 4)
    assert (
        points["continuous", ""]["rate"] is None and "psnr" in points["continuous", ""]["metrics"]
    )
    assert "utilisation" not in points["continuous", ""]["metrics"]
    for name in image_files.FORMATS:
        low, high = points[name, "quality 10"], points[name, "quality 90"]
        assert low["rate"] < high["rate"] and low["metrics"]["psnr"] < high["metrics"]["psnr"]
        assert 0 < low["header"] < low["rate"]
    page = (tmp_path / "found" / "README.md").read_text()
    assert "| **continuous** |  | no discrete code |" in page and "JPEG" in page
    assert "Scale: 2 images of photos at 32 x 32 pixels." in page
    assert str(tmp_path) not in page + json.dumps(found)
    assert Image.open(tmp_path / "found" / "figure.png").width > 500


@pytest.mark.slow
def test_audio_tokenizers_at_their_own_rates_beside_opus(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    SimVQAudioModel(SimVQAudioConfig(**AUDIO)).save_pretrained(tmp_path / "run" / "model")
    tiny_peers.save(tiny_peers.dac(), tmp_path / "dac")
    (tmp_path / "speech").mkdir()
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000)
    soundfile.write(tmp_path / "speech" / "a.flac", noise, 16_000)
    settings = ComparedAudio(
        tokenizers=[str(tmp_path / "run" / "model"), str(tmp_path / "dac")],
        metrics=["stoi"],
        kilobits=[8.0, 32.0],
        num_quantizers=[1, 3],
        output=str(tmp_path / "found"),
    )
    data = EvaluatedAudio(dataset=str(tmp_path / "speech"), num_workers=0)
    compare("audio", settings, data, Accelerator())
    found = json.loads((tmp_path / "found" / "results.json").read_text())["points"]
    rates = {(point["system"], point["setting"]): point["rate"] for point in found}
    assert rates["run", ""] == pytest.approx(24_000 / 8 * 6 / 1000)
    assert rates["dac", "the first 1 of 3 quantizers"] == pytest.approx(16_000 / 8 * 5 / 1000)
    assert rates["dac", "the first 3 of 3 quantizers"] == pytest.approx(3 * 16_000 / 8 * 5 / 1000)
    assert rates["Opus", "8 kbit/s"] < rates["Opus", "32 kbit/s"] < 64


@pytest.mark.parametrize("name", image_files.FORMATS)
def test_a_file_has_the_bits_and_pixels_of_the_file(name):
    if not image_files.available(name):
        pytest.skip(f"this Pillow was built without {name}")
    image = photograph(48)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    output = image_files.ImageFile(name, 30)(pixels)
    file = io.BytesIO()
    image.save(file, format=name, quality=30, **image_files.FORMATS[name])
    assert output.bits.tolist() == [8 * len(file.getvalue())]
    decoded = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)[None]
    torch.testing.assert_close(output.pixel_values, decoded / 127.5 - 1)


@pytest.mark.skipif(not audio_files.available(), reason="this libsndfile was built without Opus")
def test_opus_counts_its_packets_alone():
    """Not its headers, where libsndfile leaves room for tags, nor 27 bytes of a page and one of each packet."""
    samples = torch.randn(1, 1, 24_000, generator=torch.Generator().manual_seed(0)) * 0.1
    codec = audio_files.OpusFile(24.0, 22_050)
    assert codec.config.sampling_rate == 24_000
    output = codec(samples)
    file = io.BytesIO()
    soundfile.write(
        file,
        samples[0, 0].numpy(),
        24_000,
        format="OGG",
        subtype="OPUS",
        compression_level=codec.level,
    )
    overhead = len(file.getvalue()) - float(output.bits) / 8
    assert 27 * 3 + 50 < overhead < 1200
    assert 12_000 < float(output.bits) < 48_000
    assert output.audio_values.shape == samples.shape
    assert float(output.audio_values.std()) == pytest.approx(0.1, rel=0.5)


def curve(system: str, *rates: float) -> list[Point]:
    return [Point(system, "", True, rate, {"psnr": 10 * rate}) for rate in rates]


def test_between_two_qualities_is_the_middle_of_their_logarithms():
    point = at_rate(curve("JPEG", 1.0, 4.0), 2.0)
    assert point.metrics["psnr"] == pytest.approx(25) and point.rate == 2.0
    assert at_rate(curve("JPEG", 1.0, 4.0), 0.5).metrics["psnr"] == 10
    assert "no larger file" in at_rate(curve("JPEG", 1.0, 4.0), 5.0).system


def test_each_tokenizer_stands_above_the_formats_at_its_rate():
    points = [Point("ours", "", False, 0.5, {"psnr": 20.0}), *curve("JPEG", 1.0, 4.0)]
    rows = rows_of(points, "bits_per_pixel", ["psnr"])
    assert rows[2:] == [
        "| **ours** |  | 0.5 | 20.0 |",
        "| JPEG: no smaller file |  | 1.0 | 10.0 |",
    ]


@pytest.mark.parametrize(
    ("most", "asked", "counts"),
    [(1, [], [1]), (3, [], [1, 2, 3]), (12, [], [1, 2, 4, 8, 12]), (4, [2, 8], [2]), (1, [4], [1])],
)
def test_prefixes(most, asked, counts):
    model = Peer(torch.nn.Identity(), PeerConfig("a codec", num_quantizers=most))
    assert prefixes(model, asked) == counts


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        (ComparedImages, {"tokenizers": []}, "tokenizers: name at least one"),
        (ComparedImages, {"tokenizers": ["me/a", "me/a"]}, "two would be called me/a"),
        (ComparedImages, {"formats": ["PNG"]}, "formats: there are JPEG, WebP, AVIF, got 'PNG'"),
        (ComparedImages, {"qualities": [101]}, "qualities lie between 0 and 100, got 101"),
        (ComparedAudio, {"kilobits": [1.0]}, "between 6 and 256 for Opus, got 1.0"),
        (ComparedAudio, {"metrics": ["mos"]}, "metrics: there are pesq"),
        (ComparedAudio, {"num_quantizers": [0]}, "num_quantizers must be at least 1"),
    ],
)
def test_mistakes_in_settings(settings, changes, message):
    with pytest.raises(SettingsError, match=message):
        settings(**({"tokenizers": ["x"]} | changes))
