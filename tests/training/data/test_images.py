import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from training.data.images import (
    ImageDataConfig,
    UnreadableImage,
    build_image_dataloader,
    decode_image,
    image_to_pixels,
    to_values,
)
from training.data.source import open_split
from training.runtime.settings import SettingsError

FIXTURE = Path(__file__).parents[2] / "fixtures" / "data_image"
FILES = sorted(FIXTURE.glob("img/*"))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": f"picture.{kind.lower()}"}


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_pictures_equal_those_of_the_original_data_set(file):
    expected = load_file(FIXTURE / "outputs.safetensors")
    picture = decode_image({"bytes": None, "path": str(file)})
    ours = image_to_pixels(picture, 32)
    assert torch.allclose(ours.permute(1, 2, 0), expected[f"val.{file.stem}"], atol=1e-6)
    order = ["land", "port", "gray", "small", "rgba"]
    torch.manual_seed(100 + order.index(file.stem))
    ours = image_to_pixels(picture, 32, torch.default_generator)
    assert torch.allclose(ours.permute(1, 2, 0), expected[f"train.{file.stem}"], atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 200), width=st.integers(1, 200), train=st.booleans())
def test_any_size_becomes_a_square_in_range(height, width, train):
    pixels = image_to_pixels(noise(height, width), 24, torch.default_generator if train else None)
    assert pixels.shape == (3, 24, 24) and pixels.dtype == torch.float32
    assert pixels.min() >= -1 and pixels.max() <= 1


@pytest.mark.parametrize(
    "cell",
    [
        encoded(noise(20, 30).convert("CMYK"), "JPEG"),
        encoded(noise(20, 30).convert("P")),
        encoded(noise(20, 30).convert("LA")),
        encoded(noise(20, 30).convert("1")),
        encoded(noise(20, 30), "GIF", save_all=True, append_images=[noise(20, 30, 1)]),
    ],
    ids=["cmyk", "palette", "grey-alpha", "bilevel", "animated"],
)
def test_unusual_modes_become_rgb(cell):
    picture = decode_image(cell)
    assert picture.mode == "RGB" and picture.size == (30, 20)


def test_sixteen_bits_are_scaled_and_orientation_is_applied():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, axis=0)
    picture = np.asarray(decode_image(encoded(Image.fromarray(ramp))))
    assert picture[0, :, 0].tolist() == pytest.approx(list(range(256)), abs=1)
    upright = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert decode_image(encoded(upright, "JPEG", exif=exif)).size == (20, 40)


def broken_files() -> dict[str, bytes]:
    whole = encoded(noise(64, 64), "JPEG")["bytes"]
    return {"cut.jpg": whole[: len(whole) // 2], "empty.jpg": b"", "text.jpg": b"not an image"}


@pytest.mark.parametrize("name", list(broken_files()))
def test_broken_files_are_named(name):
    with pytest.raises(UnreadableImage, match=name):
        decode_image({"bytes": broken_files()[name], "path": f"/somewhere/{name}"})


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImage, match="bomb"):
        decode_image(encoded(noise(64, 64)))
    with pytest.raises(UnreadableImage):
        decode_image(None)


@pytest.fixture
def folder(tmp_path) -> Path:
    """An image folder with twelve pictures and three broken files in train, five and one in validation."""
    for split, count in (("train", 12), ("validation", 5)):
        (tmp_path / split).mkdir()
        for index in range(count):
            noise(40, 50, index).save(tmp_path / split / f"{index:02}.png")
    for name, content in broken_files().items():
        (tmp_path / "train" / name).write_bytes(content)
    (tmp_path / "validation" / "cut.jpg").write_bytes(broken_files()["cut.jpg"])
    return tmp_path


def loader(path, split="train", batch_size=4, train=True, seed=0, **options):
    defaults = {"resolution": 16, "num_workers": 0}
    config = ImageDataConfig(dataset=str(path), **defaults | options)
    return build_image_dataloader(config, split, batch_size=batch_size, train=train, seed=seed)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_broken_files_of_a_folder_are_skipped_and_counted(folder, streaming, workers):
    batches = list(loader(folder, streaming=streaming, num_workers=workers))
    assert batches and all(batch["pixel_values"].shape == (4, 3, 16, 16) for batch in batches)
    assert all(batch["valid"].all() for batch in batches)
    assert sum(int(batch["unreadable"].sum()) for batch in batches) >= 1
    options = {"streaming": streaming, "num_workers": workers}
    batches = list(loader(folder, "validation", train=False, **options))
    assert sum(len(batch["valid"]) for batch in batches) == 6
    assert sum(int(batch["valid"].sum()) for batch in batches) == 5
    assert sum(int(batch["unreadable"].sum()) for batch in batches) == 1


def test_parquet_arrow_and_saved_sets_give_the_same_pictures(folder, tmp_path):
    rows = [
        {"photo": {"bytes": (folder / "train" / f"{i:02}.png").read_bytes(), "path": None}}
        for i in range(8)
    ]
    features = datasets.Features({"photo": datasets.Image(decode=False)})
    table = datasets.Dataset.from_list(rows, features=features)
    (tmp_path / "tables").mkdir()
    table.to_parquet(tmp_path / "tables" / "train-0.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "dict")
    options = {"image_column": "photo", "batch_size": 8}
    sources = [tmp_path / "tables", tmp_path / "tables" / "train-0.parquet", tmp_path / "saved"]
    sources += [tmp_path / "dict"]
    results = [next(iter(loader(s, train=False, **options)))["pixel_values"] for s in sources]
    results.append(
        next(iter(loader(sources[0], train=False, streaming=True, **options)))["pixel_values"]
    )
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "tset"}, ["tset", "validation_split"]),
        ({"image_column": "photo"}, ["photo", "image"]),
        ({"batch_size": 100}, ["15", "100"]),
    ],
)
def test_mistakes_are_named(folder, options, words):
    with pytest.raises(SettingsError) as caught:
        loader(folder, **options)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_path_is_named():
    with pytest.raises(SettingsError, match="./no/such/folder"):
        loader("./no/such/folder")


def test_a_folder_of_rubbish_ends_with_an_error(tmp_path):
    (tmp_path / "train").mkdir()
    for index in range(8):
        (tmp_path / "train" / f"{index}.jpg").write_bytes(b"rubbish")
    with pytest.raises(UnreadableImage, match="in a row"):
        next(iter(loader(tmp_path)))


def test_an_unreachable_hub_set_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    config = ImageDataConfig(dataset="ILSVRC/imagenet-1k-of-nowhere")
    with pytest.raises(SettingsError, match="hf auth login") as caught:
        open_split(config, "train")
    assert "\n" not in str(caught.value)


def test_sample_limits(folder):
    assert len(loader(folder, max_train_samples=8).dataset) == 8
    assert len(loader(folder, streaming=True, max_train_samples=8).dataset) == 8


def test_training_order_follows_the_seed(folder):
    def first(seed):
        return next(iter(loader(folder, seed=seed)))["pixel_values"]

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))


def test_values_of_bytes_are_those_of_the_original():
    levels = torch.arange(256, dtype=torch.uint8)
    wanted = (np.arange(256) / 127.5 - 1.0).astype(np.float32)
    assert torch.equal(to_values(levels), torch.from_numpy(wanted))
    values = torch.rand(3)
    assert to_values(values) is values  # they are no bytes any more
