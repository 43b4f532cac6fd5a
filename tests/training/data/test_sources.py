"""Every kind of source, whole and streamed; broken files; order and crops that survive a resume."""

import io
import logging
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from PIL import Image
from safetensors.torch import load_file

from modeling_simvq import SimVQImageProcessor
from training.data.images import (
    ImageDataConfig,
    UnreadableImage,
    build_image_dataloader,
    decode_image,
    image_to_pixels,
)
from training.data.source import open_split
from training.loop.batches import rest_of_epoch
from training.runtime.settings import SettingsError

FIXTURE = Path(__file__).parents[2] / "fixtures" / "data_image"
SIDE = 16
BOTH = pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])


@pytest.fixture(autouse=True)
def own_datasets(tmp_path, monkeypatch):
    """Datasets prepares its tables in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # It waits five seconds for pyarrow's threads at the end of a shuffled parquet stream.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def shade(level: int) -> bytes:
    """A picture of one grey, by which it is known again after any crop."""
    return encoded(Image.new("RGB", (24, 18), (level,) * 3))


def shades(count: int, broken: tuple[int, ...] = ()) -> dict[str, bytes]:
    return {f"{i:03}.png": b"broken" if i in broken else shade(i) for i in range(count)}


def found(batches) -> list[int]:
    """The greys in batches."""
    return [round(float(p.float().mean())) for b in batches for p in b["pixel_values"]]


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def table(cells: list, column: str = "image") -> datasets.Dataset:
    rows = {column: cells, "label": list(range(len(cells)))}
    return datasets.Dataset.from_dict(rows).cast_column(column, datasets.Image())


def config(dataset: Path | str, **options) -> ImageDataConfig:
    options = {"resolution": SIDE, "num_workers": 0, "shuffle_buffer": 8} | options
    return ImageDataConfig(dataset=str(dataset), **options)


def load(cfg: ImageDataConfig, split: str = "train", **options) -> list[dict]:
    return list(
        build_image_dataloader(cfg, split, **{"batch_size": 4, "train": False, "seed": 0} | options)
    )


def image_folder(path: Path) -> tuple[Path, dict]:
    return write_folder(path / "photos", shades(6) | {"notes.txt": b"no image"}), {}


def class_folders(path: Path) -> tuple[Path, dict]:
    files = {f"{'ab'[int(name[:3]) // 3]}/{name}": data for name, data in shades(6).items()}
    return write_folder(path / "photos", files), {}


def split_folders(path: Path) -> tuple[Path, dict]:
    files = {f"train/c{int(name[:3]) // 3}/{name}": data for name, data in shades(6).items()}
    return write_folder(path / "photos", files | {"val/c0/x.png": shade(200)}), {}


def zip_folder(path: Path) -> tuple[Path, dict]:
    (path / "zipped").mkdir()
    with zipfile.ZipFile(path / "zipped" / "train.zip", "w") as archive:
        for name, data in shades(6).items():
            archive.writestr(name, data)
    return path / "zipped", {}


def parquet_file(path: Path) -> tuple[Path, dict]:
    table([shade(i) for i in range(6)], "picture").to_parquet(path / "some.parquet")
    return path / "some.parquet", {"image_column": "picture"}


def parquet_of_bytes(path: Path) -> tuple[Path, dict]:
    cells = {"image": [shade(i) for i in range(6)], "mask": [b"broken"] * 6}
    raw = datasets.Dataset.from_dict(cells).cast_column("mask", datasets.Image())
    raw.to_parquet(path / "some.parquet")  # another column's images must not be decoded
    return path / "some.parquet", {}


def parquet_folder(path: Path) -> tuple[Path, dict]:
    folder = write_folder(path / "tables", {"README.md": b"# Images\n"})
    for start, split in ((0, "train"), (200, "validation")):
        cells = [shade(start + i) for i in range(6)]
        table(cells).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder, {}


def arrow_file(path: Path) -> tuple[Path, dict]:
    return next(saved(path)[0].glob("*.arrow")), {}


def saved(path: Path) -> tuple[Path, dict]:
    table([shade(i) for i in range(6)]).save_to_disk(path / "saved")
    return path / "saved", {}


def saved_splits(path: Path) -> tuple[Path, dict]:
    splits = {"train": table([shade(i) for i in range(6)]), "validation": table([shade(200)])}
    datasets.DatasetDict(splits).save_to_disk(path / "saved")
    return path / "saved", {}


SOURCES = [image_folder, class_folders, split_folders, zip_folder, parquet_file, parquet_of_bytes]
SOURCES += [parquet_folder, arrow_file, saved, saved_splits]


@BOTH
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_every_source(source, streaming, tmp_path):
    path, options = source(tmp_path)
    cfg = config(path, streaming=streaming, **options)
    batches = load(cfg)
    assert [len(batch["pixel_values"]) for batch in batches] == [4, 2]
    assert found(batches) == list(range(6))
    assert all(batch["valid"].all() and not batch["unreadable"].any() for batch in batches)
    assert batches[0]["valid"].dtype == torch.bool
    assert batches[0]["unreadable"].dtype == torch.int64
    train = load(cfg, train=True)
    assert [batch["pixel_values"].shape for batch in train] == [(4, 3, SIDE, SIDE)]
    assert len(set(found(train))) == 4


def test_limits_and_slices(tmp_path):
    folder = write_folder(tmp_path / "photos", shades(10))
    for streaming in (False, True):
        cfg = config(folder, streaming=streaming, max_validation_samples=3, max_train_samples=5)
        assert found(load(cfg)) == [0, 1, 2]
        assert set(found(load(cfg, train=True))) < set(range(5))
    assert found(load(config(folder), "train[80%:]")) == [8, 9]


# Mistakes


@BOTH
def test_missing_split_and_column(streaming, tmp_path):
    folder = write_folder(tmp_path / "photos", {f"{c}/{c}.png": shade(0) for c in "ab"})
    for path in (folder, saved(tmp_path)[0]):
        cfg = config(path, streaming=streaming)
        with pytest.raises(SettingsError, match=r"'validation'.*'train'.*validation_split=null"):
            open_split(cfg, "validation")
        cfg = config(path, streaming=streaming, image_column="img")
        with pytest.raises(SettingsError, match="image_column.*'img'.*image, label"):
            open_split(cfg, "train")
        cfg = config(path, streaming=streaming, image_column="label")
        with pytest.raises(SettingsError, match="image_column.*'label'.*not images"):
            open_split(cfg, "train")


def test_missing_and_foreign_paths(tmp_path):
    for path in (tmp_path / "none", "./none", "none.parquet", "a/b/c"):
        with pytest.raises(SettingsError, match="no file or folder .*(none|a/b/c)"):
            open_split(config(path), "train")
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path, {"text/a.txt": b"x", "bad.parquet": b"not a table"})
    for name in ("empty", "text", "bad.parquet", "text/a.txt"):
        with pytest.raises(SettingsError, match=name) as caught:
            open_split(config(tmp_path / name), "train")
        assert "hf auth login" not in str(caught.value)


def test_a_gated_set_is_one_clear_line(monkeypatch):
    def refuse(*_, **__):
        text = "Dataset 'a/b' is a gated dataset on the Hub.\nVisit its page."
        raise datasets.exceptions.DatasetNotFoundError(text)

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(SettingsError, match="gated.*hf auth login.*local folder") as caught:
        open_split(config("a/b"), "train")
    assert "\n" not in str(caught.value)


# Decoding


@pytest.mark.parametrize("number, name", list(enumerate(["land", "port", "gray", "small", "rgba"])))
def test_pixels_equal_the_originals_to_the_bit(number, name):
    wanted = load_file(FIXTURE / "outputs.safetensors")
    image = decode_image({"bytes": None, "path": str(FIXTURE / "img" / f"{name}.png")})
    crop = image_to_pixels(image, 32, torch.Generator().manual_seed(100 + number))
    assert torch.equal(image_to_pixels(image, 32).permute(1, 2, 0), wanted[f"val.{name}"])
    assert torch.equal(crop.permute(1, 2, 0), wanted[f"train.{name}"])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
def test_training_and_use_see_the_same(mode):
    image = noise(40, 33).convert("L").convert(mode) if mode == "I;16" else noise(40, 33)
    image = Image.open(io.BytesIO(encoded(image.convert(mode))))
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    wanted = SimVQImageProcessor(**size)(image, return_tensors="pt").pixel_values[0]
    pixels = image_to_pixels(decode_image({"bytes": encoded(image)}), SIDE)
    torch.testing.assert_close(pixels, wanted, rtol=0, atol=1e-6)


def test_colours_transparency_and_frames():
    cmyk = encoded(Image.new("CMYK", (9, 9), (255, 0, 0, 0)), "JPEG")
    red, green, blue = decode_image({"bytes": cmyk}).getpixel((4, 4))
    assert red < 20 and green > 230 and blue > 230
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    see_through = {"bytes": encoded(palette, transparency=1)}
    assert decode_image(see_through).getpixel((0, 0)) == (10, 20, 30)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    animated = {"bytes": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])}
    assert decode_image(animated).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_spoilt_exif_does_not_cost_the_picture():
    spoilt = encoded(noise(30, 20), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert decode_image({"bytes": spoilt}).size == (30, 20)


@pytest.mark.parametrize("cell", [None, {}, {"bytes": None, "path": None}, 3, {"bytes": b"GIF89a"}])
def test_cells_without_a_picture_are_named_by_their_row(cell):
    with pytest.raises(UnreadableImage, match="row 7: ."):
        decode_image(cell, "row 7")


def test_extremely_elongated_pictures_are_unreadable():
    with pytest.raises(UnreadableImage, match="elongated"):
        image_to_pixels(Image.new("RGB", (60000, 1)), 128)


# Broken files in a dataset


@BOTH
def test_broken_files_in_training_are_replaced(streaming, tmp_path, caplog):
    """A folder has a length when streaming too; a table of its files has none."""
    folder = write_folder(tmp_path / "photos", shades(8, broken=(2, 3, 6)) | {"x.jpg": b""})
    source = folder
    if streaming:
        source = tmp_path / "paths.parquet"
        table([str(path) for path in sorted(folder.glob("*.*"))]).to_parquet(source)
    with caplog.at_level(logging.WARNING):
        batches = load(config(source, streaming=streaming), train=True, batch_size=1)
    unreadable = sum(int(batch["unreadable"].sum()) for batch in batches)
    assert all(batch["valid"].all() for batch in batches)
    assert set(found(batches)) == {0, 1, 4, 5, 7}
    if streaming:  # those after the last good image have no sample to be counted with
        assert len(batches) == 5 and unreadable <= 4
    else:  # index 2 meets 2 and 3; 3, 6 and x.jpg one each
        assert len(batches) == 9 and unreadable == 5
    assert sum("003.png: not an image" in record.message for record in caplog.records) == 1


@BOTH
def test_broken_files_in_validation_are_marked(streaming, tmp_path):
    folder = write_folder(tmp_path / "photos", shades(5, broken=(1, 4)))
    batches = load(config(folder, streaming=streaming))
    valid = torch.cat([batch["valid"] for batch in batches])
    assert valid.tolist() == [True, False, True, True, False]
    assert torch.cat([batch["unreadable"] for batch in batches]).tolist() == [0, 1, 0, 0, 1]
    assert not torch.cat([batch["pixel_values"] for batch in batches])[~valid].any()


@BOTH
@pytest.mark.parametrize("train, count", [(True, 5), (True, 120), (False, 120)])
def test_nothing_readable_is_an_error(streaming, train, count, tmp_path, caplog):
    table([b"broken"] * count).to_parquet(tmp_path / "bad.parquet")
    cfg = config(tmp_path / "bad.parquet", streaming=streaming)
    with pytest.raises(UnreadableImage, match=f"{min(count, 100)} images in a row"):
        load(cfg, train=train)
    assert sum("skipped" in record.message for record in caplog.records) <= 100


# Order and crops


def test_order_and_crops_follow_from_seed_and_epoch_alone(tmp_path):
    table([encoded(noise(200, 16))] * 8).to_parquet(tmp_path / "same.parquet")

    def epochs(workers: int, seed: int) -> list[torch.Tensor]:
        cfg = config(tmp_path / "same.parquet", num_workers=workers)
        loader = build_image_dataloader(cfg, "train", batch_size=4, train=True, seed=seed)
        pixels = []
        for epoch in (0, 1):
            torch.manual_seed(workers + epoch)  # must not matter
            loader.sampler.set_epoch(epoch)
            pixels.append(torch.cat([batch["pixel_values"] for batch in loader]))
        return pixels

    first, second = epochs(0, seed=1)
    assert len({pixels.numpy().tobytes() for pixels in torch.cat([first, second])}) > 10
    for again, wanted in zip(epochs(2, seed=1), (first, second), strict=True):
        assert torch.equal(again, wanted)
    assert not torch.equal(epochs(0, seed=-2)[0], first)


@pytest.mark.slow
def test_streams_with_workers(tmp_path):
    table([shade(i) for i in range(40)]).save_to_disk(tmp_path / "saved")
    cfg = config(tmp_path / "saved", streaming=True, num_workers=2, max_train_samples=32)
    orders = []
    for _ in range(2):
        loader = build_image_dataloader(cfg, "train", batch_size=4, train=True, seed=3)
        for epoch in (0, 1):
            loader.dataset.set_epoch(epoch)
            orders.append(found(loader))
    assert len(set(orders[0])) == len(orders[0]) == 32  # no image twice
    assert orders[0] == orders[2] and orders[1] == orders[3] and orders[0] != orders[1]


@BOTH
def test_resuming_gives_the_same_batches(streaming, tmp_path):
    table([encoded(noise(60, 16, seed)) for seed in range(24)]).save_to_disk(tmp_path / "saved")
    accelerator = Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True)
    )

    def prepared():
        cfg = config(tmp_path / "saved", streaming=streaming)
        return accelerator.prepare(
            build_image_dataloader(cfg, "train", batch_size=4, train=True, seed=0)
        )

    loader, epochs = prepared(), []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        epochs.append([batch["pixel_values"] for batch in loader])
    assert [len(epoch) for epoch in epochs] == [6, 6]
    assert not torch.equal(epochs[0][0], epochs[1][0])
    loader = prepared()
    loader.set_epoch(1)
    resumed = [batch["pixel_values"] for batch in rest_of_epoch(loader, accelerator, 1, 2)]
    assert torch.equal(torch.cat(resumed), torch.cat(epochs[1][2:]))
