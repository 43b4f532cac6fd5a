"""Folders as they are found: a file comes out as a person would expect, or is named, counted and left out."""

import io
import json
import re
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import torch
from PIL import Image

from modeling_simvq import (
    SimVQAudioConfig,
    SimVQAudioFeatureExtractor,
    SimVQAudioModel,
    SimVQImageConfig,
    SimVQImageModel,
    SimVQImageProcessor,
)
from tests.support.programs import launch
from tests.training.support.dirty_files import (
    Dirty,
    colours,
    dirty_pictures,
    dirty_recordings,
    quarters,
    saved,
)
from training import evaluate_audio, evaluate_image, tokenize_dataset
from training.data.images import (
    ImageDataConfig,
    build_image_dataloader,
    decode_image,
    decode_pixels,
    to_values,
)
from training.data.reader import Decoder, RowReader, UnreadableSample
from training.data.recordings import decode_audio
from training.runtime.settings import SettingsError

REPOSITORY = Path(__file__).parents[3]
PICTURES, RECORDINGS = dirty_pictures(), dirty_recordings()
LAUNCH = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]
IMAGE_MODEL = {"base_channels": 32, "channel_multipliers": [1, 2], "num_res_blocks": 1}
IMAGE_MODEL |= {"codebook_size": 64, "codebook_dim": 16}
AUDIO_MODEL = {"num_filters": 2, "codebook_size": 64, "codebook_dim": 16, "hidden_size": 32}
AUDIO_MODEL |= {"intermediate_size": 64, "num_decoder_layers": 1}


def names(files: dict[str, Dirty], sound: bool) -> list[str]:
    return [name for name, file in files.items() if (file.expected is not None) == sound]


def folder(path: Path, files: dict[str, Dirty]) -> Path:
    for split in ("train", "validation"):
        (path / split).mkdir(parents=True)
        for name, file in files.items():
            (path / split / name).write_bytes(file.content)
    return path


# One by one


@pytest.mark.parametrize("name", names(PICTURES, True))
def test_odd_pictures_look_as_they_should(name):
    size, expected = PICTURES[name].expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = decode_image({"bytes": PICTURES[name].content, "path": name})
    assert read.size == size and read.mode == "RGB"
    np.testing.assert_allclose(colours(read), expected, atol=3)


@pytest.mark.parametrize("name", names(PICTURES, False))
def test_broken_pictures_are_named(name):
    with pytest.raises(
        UnreadableSample, match=f"(?s)^{re.escape(name)}.*({PICTURES[name].reason})"
    ):
        decode_pixels({"bytes": PICTURES[name].content, "path": name}, name, None, 128)


@pytest.mark.slow
def test_the_processor_sees_what_training_sees():
    """PIL.Image.open and the processor give the pixels of training, or an error that says why not."""
    processor = SimVQImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    refused = set()
    for name, file in PICTURES.items():
        if name == "script.jpg":  # Pillow itself takes it for an image
            continue
        try:
            pixels = processor(
                Image.open(io.BytesIO(file.content)), return_tensors="pt"
            ).pixel_values
        except (ValueError, OSError, Image.DecompressionBombError) as error:
            assert str(error)
            refused.add(name)
            continue
        trained = decode_pixels({"bytes": file.content, "path": name}, name, None, 32)
        torch.testing.assert_close(pixels[0], to_values(trained), rtol=0, atol=1e-6)
    # At 32 pixels the long strip is still small enough.
    assert refused == set(names(PICTURES, False)) - {"script.jpg", "very-long-strip.png"}


def test_sizes_that_only_a_configuration_declares_are_refused_at_once():
    picture = quarters()
    for sizes in ({"size": {"shortest_edge": 10**6}}, {"size": {"height": 10**6, "width": 10**6}}):
        with pytest.raises(ValueError, match="^size.*MAX_IMAGE_PIXELS"):
            SimVQImageProcessor(**sizes)(picture)
    with pytest.raises(ValueError, match="^crop_size.*MAX_IMAGE_PIXELS"):
        SimVQImageProcessor(crop_size={"height": 10**6, "width": 10**6})(picture)
    for divisor in (0, -8, 2.5):
        with pytest.raises(ValueError, match="size_divisor must be a whole number"):
            SimVQImageProcessor(size_divisor=divisor)(picture)
    with pytest.raises(ValueError, match="^size, for an image of 200000 x 1"):
        SimVQImageProcessor()(Image.new("L", (200_000, 1)))


@pytest.mark.parametrize("name", names(RECORDINGS, True))
def test_odd_recordings_have_the_right_level(name):
    cell = {"bytes": RECORDINGS[name].content, "path": name}
    whole = decode_audio(cell, 24_000)
    crop = decode_audio(cell, 24_000, 2_400, torch.Generator().manual_seed(0))
    assert whole.shape[1] in (1, 24_000) and crop.shape == (1, 2_400)
    for wave in (whole, crop):
        middle = wave[0, wave.shape[1] // 4 : wave.shape[1] // 4 * 3 + 1]
        torch.testing.assert_close(
            middle, torch.full_like(middle, RECORDINGS[name].expected), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("name", names(RECORDINGS, False))
def test_broken_recordings_are_named(name):
    pattern = f"(?s)^{re.escape(name)}.*({RECORDINGS[name].reason})"
    with pytest.raises(UnreadableSample, match=pattern):
        decode_audio({"bytes": RECORDINGS[name].content, "path": name}, 24_000)


def test_a_declared_length_is_not_allocated(monkeypatch):
    """Of a file that says it holds 2^36 samples nothing is made room for but what is there."""
    asked, read = [], soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda self, n, **o: asked.append(n) or read(self, n, **o)
    )
    for name in ("huge-header.flac", "from-a-pipe.flac", "from-a-pipe.wav"):
        for clip in (None, 2_400):
            try:
                decode_audio({"bytes": RECORDINGS[name].content, "path": name}, 24_000, clip)
            except UnreadableSample:
                assert name == "huge-header.flac"
    assert max(asked) <= 1 << 20


def test_the_extractor_takes_what_is_sound_and_says_what_to_do_with_the_rest():
    extractor = SimVQAudioFeatureExtractor()
    advice = {"six-channels.wav": "to_mono=True", "96khz.wav": "resample them"}
    advice |= {"no-samples.wav": "empty", "nan.wav": "NaN", "infinite.wav": "infinite"}
    for name, file in RECORDINGS.items():
        try:
            samples, rate = soundfile.read(io.BytesIO(file.content), dtype="float32")
        except (soundfile.LibsndfileError, ValueError, MemoryError):  # soundfile itself
            continue
        if name in advice:
            with pytest.raises(ValueError, match=advice[name]):
                extractor(samples, sampling_rate=rate, return_tensors="pt")
        elif file.expected is not None:
            values = extractor(samples, sampling_rate=rate, return_tensors="pt").input_values
            assert values.shape[:2] == (1, 1) and values.isfinite().all()
            assert float(values.mean()) == pytest.approx(file.expected, abs=1e-4)


# Tables


def table(path: Path, cells: list) -> Path:
    cell = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array(cells, cell)}), path)
    return path


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_tables_with_holes(streaming, tmp_path, caplog):
    good = {"bytes": saved(quarters(), "PNG"), "path": None}
    holes = [None, {"bytes": None, "path": None}, {"bytes": b"", "path": None}]
    holes += [{"bytes": b"no image", "path": None}, {"bytes": None, "path": "/no/such/file.png"}]
    path = table(tmp_path / "holes.parquet", [good, *holes, good])
    options = {"resolution": 16, "num_workers": 0, "streaming": streaming}
    config = ImageDataConfig(dataset=str(path), **options)
    (batch,) = build_image_dataloader(config, "train", batch_size=8, train=False, seed=0)
    assert batch["valid"].tolist() == [True, *[False] * len(holes), True]
    for row in range(1, 5):
        assert f"row {row}" in caplog.text
    assert "/no/such/file.png" in caplog.text
    with pytest.raises(SettingsError, match="no column 'photo', it has image"):
        config = ImageDataConfig(dataset=str(path), image_column="photo", **options)
        build_image_dataloader(config, "train", batch_size=1, train=False, seed=0)


def test_a_row_of_a_stream_without_its_column_is_skipped(tmp_path):
    """Of WebDataset archives and JSON lines rows may lack what the first row had."""
    decoder = Decoder(
        "image", "pixel_values", (3, 16, 16), partial(decode_pixels, resolution=16), torch.uint8
    )
    reader = RowReader(ImageDataConfig(dataset="unused"), decoder)
    rows = [{"image": {"bytes": PICTURES["alpha.png"].content, "path": None}}, {"label": 1}]
    read = [reader.read(row, f"row {n}", None) is not None for n, row in enumerate(rows)]
    assert read == [True, False] and reader.named == {"row 1: no bytes and no path"}


# The commands


def check_the_log(text: str, files: dict[str, Dirty]) -> None:
    assert "Traceback" not in text and "Warning:" not in text, text
    for name in names(files, False):
        assert f"skipped {name}: " in text, name
    assert f"{len(names(files, False))} samples of the validation set cannot be read" in text
    assert re.search(r"unreadable: \d+ samples since the last report", text)
    assert "of the time waiting for data" in text


def run(module, words: list[str], monkeypatch) -> None:
    """A command in this process: importing its libraries takes longer than its work."""
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    module.main()


@pytest.mark.slow
def test_pictures_through_every_command(tmp_path, monkeypatch, capsys):
    data = folder(tmp_path / "photos", PICTURES)
    torch.manual_seed(0)
    SimVQImageModel(SimVQImageConfig(**IMAGE_MODEL)).save_pretrained(tmp_path / "model")
    words = [f"{key}={value}".replace(" ", "") for key, value in IMAGE_MODEL.items()]
    words += ["discriminator_channels=8", "perceptual=none", "tracker=none", "batch_size=2"]
    words += ["resolution=32", "num_workers=1", "epochs=2", "log_every=4", f"dataset={data}"]
    script = REPOSITORY / "training/train_image.py"
    done = launch(script, *words, f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    # At 32 pixels the long strip is still small enough.
    files = {k: v for k, v in PICTURES.items() if k != "very-long-strip.png"}
    check_the_log(done.stderr, files)
    lines = (tmp_path / "run" / "figures.jsonl").read_text().splitlines()
    assert all(np.isfinite(v) for v in json.loads(lines[-1]).values() if isinstance(v, float))

    common = [f"dataset={data}", "resolution=32", "num_workers=0", f"model={tmp_path / 'model'}"]
    run(evaluate_image, ["x", *common, "fid=false", "lpips=[]", "batch_size=4"], monkeypatch)
    found = json.loads((tmp_path / "model" / "evaluation.json").read_text())
    good, bad = len(names(files, True)) + 1, len(names(files, False))
    assert found["dataset"]["samples"] == good and found["unreadable"] == bad
    assert f"{bad} more cannot be read and are left out." in capsys.readouterr().out
    run(
        tokenize_dataset,
        ["x", *common, f"output={tmp_path / 'codes'}", "splits=[train]"],
        monkeypatch,
    )
    printed = capsys.readouterr().out
    assert f"train: {good} rows" in printed and f"{bad} images could not be read" in printed


@pytest.mark.slow
def test_recordings_through_every_command(tmp_path, monkeypatch, capsys):
    data = folder(tmp_path / "speech", RECORDINGS)
    torch.manual_seed(0)
    SimVQAudioModel(SimVQAudioConfig(**AUDIO_MODEL)).save_pretrained(tmp_path / "model")
    words = [f"{key}={value}" for key, value in AUDIO_MODEL.items()]
    words += ["period_channels=1", "resolution_channels=1", "dac_channels=1", "tracker=none"]
    words += ["batch_size=2", "epochs=2", "warmup_steps=2", "log_every=4", "num_workers=1"]
    words += ["clip_seconds=0.2", "discriminator_start=100"]  # the data are what is tested
    words += [
        f"dataset={data}",
        "config_name=null",
        "train_split=train",
        "validation_split=validation",
    ]
    script = REPOSITORY / "training/train_audio.py"
    done = launch(script, *words, f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    check_the_log(done.stderr, RECORDINGS)
    lines = (tmp_path / "run" / "figures.jsonl").read_text().splitlines()
    assert all(np.isfinite(v) for v in json.loads(lines[-1]).values() if isinstance(v, float))

    common = [f"dataset={data}", "config_name=null", "num_workers=0", f"model={tmp_path / 'model'}"]
    evaluated = ["validation_split=validation", "metrics=[pesq,stoi]"]
    run(evaluate_audio, ["x", *common, *evaluated], monkeypatch)
    found = json.loads((tmp_path / "model" / "evaluation.json").read_text())
    good, bad = len(names(RECORDINGS, True)), len(names(RECORDINGS, False))
    assert found["dataset"]["samples"] == good and found["unreadable"] == bad
    capsys.readouterr()
    run(
        tokenize_dataset,
        ["x", *common, f"output={tmp_path / 'codes'}", "splits=[train]"],
        monkeypatch,
    )
    printed = capsys.readouterr().out
    assert f"train: {good} rows" in printed and f"{bad} recordings could not be read" in printed
