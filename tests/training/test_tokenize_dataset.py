"""Data sets to codes: the command killed and resumed, two ranks, streams, and what load_dataset makes of it."""

import hashlib
import io
import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import skimage.data
import soundfile
import torch
from PIL import Image
from transformers import AutoModel

from modeling_simvq import SimVQAudioConfig, SimVQAudioModel, SimVQImageConfig, SimVQImageModel
from tests.support.programs import TWO_RANKS, Program, launch
from training import tokenize_dataset
from training.data import images
from training.data.images import ImageDataConfig, decode_image, image_to_pixels
from training.runtime.settings import SettingsError
from training.tokenization.encoders import ImageTokens, Variant
from training.tokenize_dataset import TokenizeSettings

REPOSITORY = Path(__file__).parents[2]
ROWS = 23
OPTIONS = ["rows_per_file=4", "flips=true"]


@pytest.fixture(scope="module")
def image_model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    small = {"base_channels": 32, "channel_multipliers": [1, 2], "num_res_blocks": 1}
    folder = tmp_path_factory.mktemp("tokenizer") / "model"
    SimVQImageModel(SimVQImageConfig(**small, codebook_size=300, codebook_dim=16)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A parquet file with labels and names, one row of it broken."""
    folder = tmp_path_factory.mktemp("pictures")
    astronaut, cells = skimage.data.astronaut(), []
    for index in range(ROWS):
        Image.fromarray(astronaut[16 * index : 16 * index + 40, 90:150]).save(folder / "tile.png")
        cells.append({"bytes": (folder / "tile.png").read_bytes(), "path": f"{index}.png"})
    cells[5] = {"bytes": b"no image", "path": "5.png"}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    features["name"] = datasets.Value("string")
    rows = {
        "image": cells,
        "label": [n % 2 for n in range(ROWS)],
        "name": [f"n{n}" for n in range(ROWS)],
    }
    path = folder / "train.parquet"
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(str(path))
    return path


def arguments(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    words = [str(REPOSITORY / "training/tokenize_dataset.py"), f"model={model}", f"dataset={data}"]
    words += [
        f"output={output}",
        "splits=[train]",
        "resolution=32",
        "batch_size=4",
        "num_workers=1",
    ]
    return [*words, *more]


def tokenize(words: list[str], monkeypatch) -> None:
    """The command in this process: importing its libraries takes longer than its work."""
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    tokenize_dataset.main()


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def whole(image_model, pictures, tmp_path_factory) -> Path:
    """The codes of an undisturbed run, each picture also mirrored."""
    folder = tmp_path_factory.mktemp("whole") / "codes"
    with pytest.MonkeyPatch.context() as monkeypatch:
        tokenize(arguments(image_model, pictures, folder, *OPTIONS), monkeypatch)
    return folder


@pytest.mark.slow
def test_killed_and_resumed_is_the_same_to_the_byte(whole, image_model, pictures, tmp_path):
    """kill -9 in the middle; then the same command, on two ranks even, finishes what is missing."""
    words = arguments(image_model, pictures, tmp_path / "codes", *OPTIONS)
    with Program(*words) as process:
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "codes").glob("data/*.parquet"))) < 2:
            assert time.monotonic() < deadline and process.poll() is None, (
                "it ended before the kill"
            )
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    (tmp_path / "codes/data/train-00003.9.unfinished").write_bytes(b"half a file")
    before = digests(tmp_path / "codes")
    assert len(before) < len(digests(whole))
    done = launch(*words, launcher=TWO_RANKS)
    assert done.returncode == 0, done.stderr
    assert "train: 44 rows" in done.stdout
    encoded = re.search(r"(\d+) images encoded in .* by 2 process.* codes a second", done.stdout)
    assert 0 < int(encoded[1]) < 44  # those that the killed run had not written
    assert digests(tmp_path / "codes") == digests(whole)


@pytest.mark.slow
def test_the_codes_decode_as_when_encoded_live(whole, image_model, pictures, tmp_path):
    rows = datasets.load_dataset(str(whole), split="train", cache_dir=str(tmp_path)).with_format(
        "torch"
    )
    assert len(rows) == 2 * (ROWS - 1)
    assert rows.features["label"].names == ["cat", "dog"]
    assert rows.features["image_codes"].feature.feature.dtype == "uint16"  # 300 codes
    model = AutoModel.from_pretrained(image_model).eval()
    source = datasets.Dataset.from_parquet(str(pictures)).cast_column(
        "image", datasets.Image(decode=False)
    )
    assert [int(n) for n in rows["source_row"][::2]] == [n for n in range(ROWS) if n != 5]
    for row in rows.select([0, 1, 12, 13, 43]):
        cell = source[int(row["source_row"])]
        assert row["name"] == cell["name"] and row["label"] == cell["label"]
        pixels = image_to_pixels(decode_image(cell["image"]), 32)
        pixels = pixels.flip(-1) if row["flipped"] else pixels
        with torch.no_grad():
            live = model.encode(pixels[None]).image_codes
            assert torch.equal(live[0], row["image_codes"].long())
            stored = model.decode(image_codes=row["image_codes"].long()[None]).pixel_values
            torch.testing.assert_close(stored, model.decode(image_codes=live).pixel_values)
    card = (whole / "README.md").read_text()
    assert "| train | 44 |" in card and "`image_codes`" in card and "`flipped`" in card


@pytest.mark.slow
def test_a_stream_gives_the_same_codes(whole, image_model, pictures, tmp_path, monkeypatch, capsys):
    words = arguments(image_model, pictures, tmp_path / "codes", *OPTIONS)
    tokenize([*words, "streaming=true"], monkeypatch)
    printed = capsys.readouterr().out
    assert "train: 44 rows" in printed and "1 images could not be read" in printed
    left = {k: v for k, v in digests(tmp_path / "codes").items() if k.endswith("parquet")}
    assert left == {k: v for k, v in digests(whole).items() if k.endswith("parquet")}


def test_other_settings_do_not_mix_with_what_is_there(whole, image_model, pictures, monkeypatch):
    before = digests(whole)
    with pytest.raises(SystemExit, match="flips was True, is False"):
        tokenize(arguments(image_model, pictures, whole, "rows_per_file=4"), monkeypatch)
    assert digests(whole) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", ["dtype=bfloat16", pytest.param("compile=true", marks=pytest.mark.soak)]
)
def test_faster_encoders_are_the_models_own(
    way, whole, image_model, pictures, tmp_path, monkeypatch
):
    """Compiled codes are those of the plain model, but for ties; in bfloat16 those of autocast."""
    folder, cache = tmp_path / "codes", str(tmp_path / "cache")
    words = arguments(image_model, pictures, folder, "max_train_samples=4", way)
    tokenize(words, monkeypatch)
    files = [str(folder / "data/train-00000.parquet"), str(whole / "data/train-00000.parquet")]
    codes, plain = (
        torch.tensor(datasets.Dataset.from_parquet(file, cache_dir=cache)["image_codes"])
        for file in files
    )
    plain = plain[::2]  # without those that are mirrored
    if way == "compile=true":
        assert (codes == plain).float().mean() > 0.98
    else:
        source = datasets.Dataset.from_parquet(str(pictures), cache_dir=cache)
        pixels = torch.stack(
            [image_to_pixels(source[n]["image"].convert("RGB"), 32) for n in range(4)]
        )
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            live = AutoModel.from_pretrained(image_model).eval().encode(pixels).image_codes
        assert torch.equal(codes, live) and not torch.equal(codes, plain)
    with pytest.raises(SystemExit, match="compile was|dtype was"):
        tokenize(words[:-1], monkeypatch)


def test_a_folder_from_before_a_setting_continues(
    whole, image_model, pictures, tmp_path, monkeypatch
):
    """Manifests from before dtype and compile lack them, and mean their defaults."""
    folder = shutil.copytree(whole, tmp_path / "codes")
    plan = json.loads((folder / "tokenization.json").read_text())
    older = {key: value for key, value in plan.items() if key not in ("dtype", "compile")}
    (folder / "tokenization.json").write_text(json.dumps(older))
    with pytest.raises(SystemExit, match="dtype was 'float32', is 'bfloat16'"):
        tokenize(arguments(image_model, pictures, folder, *OPTIONS, "dtype=bfloat16"), monkeypatch)
    tokenize(arguments(image_model, pictures, folder, *OPTIONS), monkeypatch)
    assert digests(folder) == digests(whole)


@pytest.mark.slow
def test_a_file_of_broken_rows_alone_is_empty(image_model, pictures, tmp_path, monkeypatch):
    words = arguments(image_model, pictures, tmp_path / "codes", "rows_per_file=5")
    tokenize([*words, "max_train_samples=6"], monkeypatch)
    rows = datasets.load_dataset(
        str(tmp_path / "codes"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert rows["source_row"] == [0, 1, 2, 3, 4]
    assert len(list((tmp_path / "codes/data").iterdir())) == 2


def test_a_damaged_manifest_is_named(tmp_path, image_model, pictures, monkeypatch):
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes/tokenization.json").write_text('{"flips": tr')
    with pytest.raises(SystemExit, match=r"error: output: .*tokenization.json.* is damaged"):
        tokenize(arguments(image_model, pictures, tmp_path / "codes"), monkeypatch)


def test_random_crops_follow_the_seed_and_the_row(image_model, monkeypatch):
    model = AutoModel.from_pretrained(image_model).eval()
    cell = {"path": None, "bytes": None}
    picture = Image.fromarray(skimage.data.astronaut()[:80, :120])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    cell["bytes"] = buffer.getvalue()
    data = ImageDataConfig(dataset="x", resolution=32)
    one, same, other = (ImageTokens(model, data, seed) for seed in (0, 0, 1))
    first = one.decode(cell, 7, [Variant(crop=0)])[0]
    assert torch.equal(first, same.decode(cell, 7, [Variant(crop=0)])[0])
    others = [one.decode(cell, 7, [Variant(crop=1)])[0], one.decode(cell, 8, [Variant(crop=0)])[0]]
    others.append(other.decode(cell, 7, [Variant(crop=0)])[0])
    assert all(not torch.equal(first, x) for x in others)
    assert torch.equal(one.decode(cell, 7, [Variant(0, True)])[0], first.flip(-1))
    variants = [Variant(crop, flipped) for crop in range(3) for flipped in (False, True)]
    opened = []
    monkeypatch.setattr(images, "_picture", lambda file: opened.append(1) or picture)
    together = one.decode(cell, 7, variants)
    assert len(opened) == 1  # one decoding serves all variants
    for variant, pixels in zip(variants, together, strict=True):
        assert torch.equal(pixels, one.decode(cell, 7, [variant])[0]), variant


@pytest.mark.slow
def test_sound_becomes_codes_of_its_own_length(tmp_path, monkeypatch):
    torch.manual_seed(0)
    small = {"num_filters": 4, "downsampling_ratios": [4, 5, 8], "num_lstm_layers": 0, "n_fft": 640}
    small |= {"hidden_size": 32, "intermediate_size": 32, "num_decoder_layers": 1}
    SimVQAudioModel(SimVQAudioConfig(**small, codebook_size=64, codebook_dim=16)).save_pretrained(
        tmp_path / "model"
    )
    demo = REPOSITORY / "training" / "demo" / "speech"
    words = [str(REPOSITORY / "training/tokenize_dataset.py"), f"model={tmp_path / 'model'}"]
    words += [f"dataset={demo}", "config_name=null", "splits=[train]", "batch_size=3"]
    words += [f"output={tmp_path / 'codes'}", "num_workers=1", "max_train_samples=4"]
    tokenize(words, monkeypatch)
    rows = datasets.load_dataset(str(tmp_path / "codes"), split="train", cache_dir=str(tmp_path))
    model = AutoModel.from_pretrained(tmp_path / "model").eval()
    files = sorted((demo / "train").glob("*.flac"))[:4]
    lengths = set()
    for row, file in zip(rows, files, strict=True):
        samples, _ = soundfile.read(file, dtype="float32")
        with torch.no_grad():
            live = model.encode(torch.from_numpy(samples)[None, None]).audio_codes[0, 0]
        np.testing.assert_array_equal(row["audio_codes"], live.numpy())
        lengths.add(len(live))
    assert len(lengths) > 1 and rows.features["audio_codes"].feature.dtype == "uint8"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splits": ["train[:10]"]}, "splits: name whole splits"),
        ({"rows_per_file": 0}, "rows_per_file"),
        ({"output": ""}, "output: must be given"),
        ({"dtype": "int8"}, "dtype: 'int8' is not one of float32, bfloat16, float16"),
    ],
)
def test_mistakes_in_settings(changes, message):
    with pytest.raises(SettingsError, match=message):
        TokenizeSettings(**({"model": "m", "output": "o"} | changes))


def test_the_manifest_tells_how_the_codes_were_made(whole):
    plan = json.loads((whole / "tokenization.json").read_text())
    assert plan["flips"] is True and plan["resolution"] == 32 and len(plan["weights"]) == 16
    assert "/" not in plan["dataset"]
