"""Which files make up a data set: every image or recording, by literal paths; the rest is counted and named."""

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from training.data import left_out
from training.data.images import ImageDataConfig, build_image_dataloader, decode_image
from training.data.loader import build_dataloader, sample_counts
from training.data.reader import Decoder, open_cell
from training.data.recordings import AudioDataConfig, decode_audio
from training.data.source import open_split, open_splits
from training.runtime.settings import SettingsError


@pytest.fixture(autouse=True)
def own_datasets(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(left_out, "_said", set())


def encoded(kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (200, 30, 30)).save(buffer, kind)
    return buffer.getvalue()


PNG = encoded()


def write(folder: Path, *names: str, content: bytes = PNG) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def write_zip(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, PNG)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def config(folder: Path | str, **options) -> ImageDataConfig:
    return ImageDataConfig(dataset=str(folder), **{"num_workers": 0, "resolution": 16} | options)


def rows(folder: Path | str, split: str = "train", **options) -> list[dict]:
    """All rows, which are the same as of a stream."""
    found = list(open_split(config(folder, **options), split, all_columns=True))
    stream = open_split(config(folder, streaming=True, **options), split, all_columns=True)
    streamed = list(stream)
    for row in [*found, *streamed]:
        for cell in row.values():
            if isinstance(cell, dict) and cell.get("bytes"):
                cell["path"] = None  # of a member of a tar archive streams do not keep it
    assert streamed == found
    return found


def names(folder: Path, split: str = "train", **options) -> list[str]:
    found = rows(folder, split, **options)
    for row in found:
        decode_image(row["image"])
    return [os.path.relpath(row["image"]["path"], folder) for row in found]


# Splits


def test_words_in_names_of_files_and_classes_do_not_matter(tmp_path):
    flat = [*(f"holiday{i}.png" for i in range(9)), "train.png", "2024-dev-1.png", "old-test-2.jpg"]
    assert names(write(tmp_path / "flat", *flat)) == sorted(flat)
    classes = ["cat/a_train.jpg", "cat/b.png", "dog/val.png", "test/c.png", "train/d.png"]
    found = rows(write(tmp_path / "classes", *classes))
    assert [row["label"] for row in found] == [0, 0, 1, 2, 3]
    with pytest.raises(SettingsError, match="'validation'.*'train'; test, train beside cat, dog"):
        rows(tmp_path / "classes", "validation")


def test_folders_of_splits(tmp_path):
    write(tmp_path, "train/cat/1.png", "train/dog/2.png", "VAL/dog/3.png", "test/4.png", "5.png")
    assert names(tmp_path) == ["train/cat/1.png", "train/dog/2.png"]
    assert names(tmp_path, "validation") == names(tmp_path, "VAL") == ["VAL/dog/3.png"]
    assert names(tmp_path, "train[50%:]+val") == ["train/dog/2.png", "VAL/dog/3.png"]
    assert [row["label"] for row in rows(tmp_path, "train+validation+test")] == [0, 1, 1, None]
    features = [open_split(config(tmp_path), s, True).features for s in ("train", "val", "test")]
    assert features[0] == features[1] == features[2]
    assert features[0]["label"].names == ["cat", "dog"]


def test_folders_that_the_settings_name(tmp_path, caplog):
    write(tmp_path, "fit/1.png", "held-out/2.png", "other/3.png")
    asked = {"train_split": "fit[:100%]", "validation_split": "held-out"}
    assert names(tmp_path, "fit[:100%]", **asked) == ["fit/1.png"]
    assert names(tmp_path, "held-out", **asked) == ["held-out/2.png"]
    assert "left out: 1 file (other/3.png): in none of the splits fit, held-out" in caplog.text
    sources = open_splits(config(tmp_path), ["fit", "other"], "splits")
    assert [len(source) for source in sources] == [1, 1]


def test_one_folder_that_holds_everything_is_opened(tmp_path):
    write(tmp_path, "photos/v1/train/1.png", "photos/v1/val/2.png", "README.md")
    assert names(tmp_path) == ["photos/v1/train/1.png"]
    assert names(tmp_path, "validation") == ["photos/v1/val/2.png"]


def test_all_splits_are_opened_before_any_work(tmp_path):
    write(tmp_path, "1.png")
    with pytest.raises(
        SettingsError, match="'validation' .*'train'.*: set splits to those it has$"
    ):
        open_splits(config(tmp_path), ["train", "validation"], "splits")


# Files


def test_every_image_that_can_be_read_is_taken_and_the_rest_is_named(tmp_path, caplog):
    kinds = {"1.JPG": "JPEG", "2.jfif": "JPEG", "3.avif": "AVIF", "4.jp2": "JPEG2000"}
    kinds |= {"5.tga": "TGA", "6": "PNG", "7.heic": "WEBP", "8.pgm": "PPM", "9.jpg?w=100": "JPEG"}
    for name, kind in kinds.items():
        write(tmp_path, name, content=encoded(kind))
    write(tmp_path, "README", "a.heic", "b.svg", "c.mov", content=b"\0\0\0\x18ftypheic")
    write(tmp_path, ".hidden.png", ".git/a.png", "__MACOSX/1.JPG", "d.png.bak", "e.txt")
    (tmp_path / "link.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    assert names(tmp_path) == sorted(kinds)
    (line,) = [r.message for r in caplog.records]
    assert line.endswith(
        "left out: 11 files (.git/, .hidden.png, README, __MACOSX/, a.heic, ...): not readable as images"
    )


def test_every_recording_that_can_be_read_is_taken(tmp_path, caplog):
    kinds = {"aif": "AIFF", "au": "AU", "caf": "CAF", "flac": "FLAC", "mp3": "MP3", "oga": "OGG"}
    kinds |= {"ogg": "OGG", "rf64": "RF64", "snd": "AU", "sph": "NIST", "w64": "W64", "WAV": "WAV"}
    kinds |= {"wave": "WAV", "opus": "OGG", "dat": "FLAC"}
    tone = np.sin(np.arange(8000) / 10).astype("float32") / 2
    for name, kind in kinds.items():
        subtype = "OPUS" if name == "opus" else None
        soundfile.write(tmp_path / f"a.{name}", tone, 8000, format=kind, subtype=subtype)
    soundfile.write(tmp_path / "none", tone, 8000, format="WAV")
    write(tmp_path, "b.m4a", content=b"\0\0\0\x20ftypM4A \0\0\0\0")
    write(tmp_path, "c.png", "notes.txt")
    for streaming in (False, True):
        data = AudioDataConfig(str(tmp_path), config_name=None, streaming=streaming)
        found = list(open_split(data, "train"))
        assert len(found) == len(kinds) + 1
    for row in found:
        assert decode_audio(row["audio"], 8000).shape[1] >= 8000
    assert "left out: 3 files (b.m4a, c.png, notes.txt): not readable as recordings" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["set [v1]", "a*b?", "a::b", "s3:", "50%20 #1", "ä {x,y}", "new\nline", "~x", "-x"]
)
def test_paths_are_literal(name, tmp_path):
    folder = write(tmp_path / name, f"{name}/1 [a].png", f"{name}/zip:b.png", f"{name}/::.png")
    write(tmp_path / "set v", "neighbour.png")  # which the pattern of the first name would match
    assert len(names(folder)) == len(names(f"{folder}/")) == 3
    batches = build_image_dataloader(config(folder), "train", batch_size=3, train=True, seed=0)
    assert not next(iter(batches))["unreadable"].any()
    write(tmp_path / "meta" / name, "1.png", "2.png")
    write(tmp_path / "meta" / name, "metadata.csv", content=b"file_name,text\n2.png,two\n")
    assert [row["text"] for row in rows(tmp_path / "meta" / name)] == ["two"]
    write_tar(tmp_path / "tar" / name / "0.tar", {"1.png": PNG, "1.cls": b"3"})
    assert [row["cls"] for row in rows(tmp_path / "tar" / name)] == [3]
    table = datasets.Dataset.from_dict({"image": [PNG]})
    write(tmp_path / "table" / name, "README.md", content=b"# Images")
    with open(tmp_path / "table" / name / f"{name}.parquet", "wb") as file:
        table.to_parquet(file)
    assert len(rows(tmp_path / "table" / name)) == 1
    card = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: fit\n    path: 0.*\n---\n"
    os.rename(
        tmp_path / "table" / name / f"{name}.parquet", tmp_path / "table" / name / "0.parquet"
    )
    write(tmp_path / "table" / name, "README.md", content=card)
    assert len(rows(tmp_path / "table" / name, "fit")) == 1


def with_card(folder: Path, text: str, content: bytes, kind: str) -> Path:
    """A folder whose card names its files; the kind is parquet, csv or images."""
    name = {"parquet": "0.parquet", "csv": "0.csv", "images": "a/0.png"}[kind]
    files = [{"split": "train", "path": f"**/{name}"}]
    card = (
        f"---\n{json.dumps({'configs': [{'config_name': 'default', 'data_files': files}]})}\n---\n"
    )
    write(folder, "README.md", content=card.encode())
    if kind == "parquet":
        datasets.Dataset.from_dict({"image": [content], "text": [text]}).to_parquet(folder / name)
    elif kind == "csv":
        write(folder, name, content=f"image,text\n{folder}/a.png,{text}\n".encode())
    else:
        write(folder, name, content=content)
    return folder


@pytest.mark.parametrize("kind", ["parquet", "csv", "images"])
def test_a_folder_with_a_card_gives_the_files_that_are_there(kind, tmp_path):
    """Folders of one name, and a folder whose files were replaced: Datasets' cache takes them for the same."""

    def found(folder: Path) -> tuple:
        row = open_split(config(folder), "train", all_columns=True)[0]
        return row.get("text"), row["image"]["path"] or row["image"]["bytes"]

    for name in ("one", "two"):
        folder = with_card(tmp_path / name / "codes", name, PNG + name.encode(), kind)
        text, cell = found(folder)
        assert text in (name, None)
        assert cell in (PNG + name.encode(), f"{folder}/a.png", f"{folder}/a/0.png")
    if kind == "images":
        return
    # The same size and the time of change of the file before, as some copies have them.
    path = next(folder.glob("0.*"))
    before = path.stat()
    with_card(folder, "new", PNG + b"new", kind)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert found(folder)[0] == "new"


def test_relative_paths_and_home(tmp_path, monkeypatch):
    write(tmp_path / "photos", "1.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("photos", "./photos/", "photos/../photos", "~/photos"):
        assert len(rows(path)) == 1


def test_links_are_followed_but_not_in_circles(tmp_path, caplog):
    write(tmp_path / "elsewhere", "1.png")
    folder = write(tmp_path / "photos", "b/2.png")
    (folder / "a").symlink_to(tmp_path / "elsewhere")
    (folder / "b" / "up").symlink_to(folder)
    assert names(folder) == ["a/1.png", "b/2.png"]
    assert "left out: 1 file" in caplog.text and "(b/up/)" in caplog.text


def test_names_that_are_no_text_are_left_out(tmp_path, caplog):
    folder = os.fsencode(write(tmp_path / "photos", "1.png"))
    Path(os.fsdecode(folder + b"/\xff.png")).write_bytes(PNG)
    assert names(tmp_path / "photos") == ["1.png"]
    assert "\\udcff.png" in caplog.text


def test_archives_count_as_folders(tmp_path):
    write_zip(tmp_path / "classes" / "cat.zip", "1.png", "a/::2.png")
    write_zip(tmp_path / "classes" / "dog.zip", "3.png", "notes.txt", "__MACOSX/3.png")
    write(tmp_path / "classes" / "broken.zip")
    found = rows(tmp_path / "classes")
    assert [decode_image(row["image"]).size for row in found] == [(20, 20)] * 3
    assert "label" not in found[0]  # they do not lie equally deep
    for split in ("train", "val"):
        write_zip(tmp_path / "splits" / f"{split}.zip", f"{split}/cat/1.png", f"{split}/dog/2.png")
    assert [row["label"] for row in rows(tmp_path / "splits", "validation")] == [0, 1]


def test_cells_name_no_devices(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with (
        pytest.raises(ValueError, match=r"pipe\.png: a folder or a device"),
        open_cell({"path": str(tmp_path / "pipe.png"), "bytes": None}, "row 0"),
    ):
        pass


# Descriptions, tables, tar archives


def test_files_that_metadata_does_not_list_are_named(tmp_path, caplog):
    folder = write(tmp_path, *(f"{split}/{i}.png" for split in ("train", "val") for i in range(3)))
    lines = "".join(f"{name},{name[0]}\n" for name in ("val/1.png", "train/2.png", "train/0.png"))
    write(folder, "metadata.csv", content=f"file_name,text\n{lines}".encode())
    assert names(folder) == ["train/2.png", "train/0.png"]
    assert names(folder, "validation") == ["val/1.png"]
    assert "3 files (train/1.png, val/0.png, val/2.png): not listed in metadata.csv" in caplog.text


def test_tables_by_folder_or_shard(tmp_path, caplog):
    table = datasets.Dataset.from_dict({"image": [PNG, PNG], "label": [0, 1]})
    for name in ("hive/split=train/0.parquet", "hive/split=test/0.parquet", "data/dev.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(tmp_path / name)
    table.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    write(tmp_path / "data", "logo.png")
    assert len(rows(tmp_path / "hive", "test")) == len(rows(tmp_path / "data", "validation")) == 2
    assert "left out: 1 file (logo.png): beside its parquet files" in caplog.text
    # Words inside the names of tables do not matter either.
    (tmp_path / "words").mkdir()
    for name in ("my-train-set.parquet", "dev-kit.parquet"):
        table.to_parquet(tmp_path / "words" / name)
    assert len(rows(tmp_path / "words")) == 4
    # A table that does not have the column accompanies the images.
    table.remove_columns("image").to_parquet(tmp_path / "beside.parquet")
    write(tmp_path / "images", "1.png")
    os.rename(tmp_path / "beside.parquet", tmp_path / "images" / "beside.parquet")
    assert names(tmp_path / "images") == ["1.png"]


def test_tables_of_paths(tmp_path):
    write(tmp_path, "1.png")
    write(tmp_path / "lists", "a.csv", content=f"image,text\n{tmp_path}/1.png,one\n".encode())
    (row,) = rows(tmp_path / "lists")
    assert decode_image(row["image"]).size == (20, 20) and row["text"] == "one"


@pytest.mark.slow
def test_tar_archives(tmp_path, caplog):
    sample = {"a/1.JPG": encoded("JPEG"), "a/1.cls": b"7", "a/1.json": b'{"x": 1}'}
    for name in ("shards/0.tar", "splits/train-000.tar", "splits/val-000.tar", "mixed/0.tar"):
        write_tar(tmp_path / name, sample)
    (row,) = rows(tmp_path / "shards")
    assert decode_image(row["image"]).size == (20, 20)
    assert row["cls"] == 7 and row["json"] == {"x": 1}
    assert rows(tmp_path / "shards", image_column="JPG")[0]["JPG"] == row["image"]
    assert len(rows(tmp_path / "splits", "validation")) == 1
    assert len(rows(tmp_path / "shards" / "0.tar")) == 1
    write(tmp_path / "mixed", "2.png")
    with pytest.raises(SettingsError, match=r"both tar archives \(0.tar\) and 1 image \(2.png\)"):
        rows(tmp_path / "mixed")
    write_tar(tmp_path / "two" / "0.tar", {"1.jpg": encoded("JPEG"), "1.seg.png": PNG})
    with pytest.raises(SettingsError, match=r"image_column.*'image', it has .*jpg, seg\.png"):
        rows(tmp_path / "two")


# Numbers


@pytest.mark.parametrize("streaming", [False, True])
def test_ranks_without_samples_have_nothing_to_do(streaming, tmp_path):
    folder = write(tmp_path, "0.png", "1.png", "2.png")
    if streaming:
        paths = [str(path) for path in sorted(folder.glob("*.png"))]
        datasets.Dataset.from_dict({"image": paths}).to_parquet(tmp_path / "0.parquet")
        folder = tmp_path / "0.parquet"
    data = config(folder, streaming=streaming)
    decoder = Decoder("image", "cell", (1,), lambda cell, *_: torch.tensor([len(cell["path"])]))
    source = open_split(data, "train")
    loaders = [
        build_dataloader(
            source, "train", data, decoder, batch_size=1, train=False, seed=0, shard=(r, 5)
        )
        for r in range(5)
    ]
    numbers = [len(list(loader)) for loader in loaders]
    assert sorted(numbers) == [0, 0, 1, 1, 1]
    if not streaming:
        assert numbers == [1, 1, 1, 0, 0]
        assert sample_counts(data, {"{}": loaders[4]}) == "3 images"


def test_numbers_are_told(tmp_path):
    write(tmp_path, *(f"train/{i}.png" for i in range(3)), "val/1.png")
    data = config(tmp_path)
    loaders = {
        f"{text} {{}}": build_image_dataloader(data, split, batch_size=1, train=False, seed=0)
        for split, text in (("train", "training"), ("validation", "validation"))
    }
    numbers = sample_counts(data, {**loaders, "{} of no split": None})
    assert numbers == "3 training images, 1 validation image"
    data = config(tmp_path, streaming=True)  # as many: a folder of files is never a stream
    loader = build_image_dataloader(data, "train", batch_size=1, train=True, seed=0)
    assert sample_counts(data, {"training {}": loader}) == "3 training images"
    table = datasets.Dataset.from_dict({"image": [PNG]})
    table.to_parquet(tmp_path / "table.parquet")
    data = config(tmp_path / "table.parquet", streaming=True)
    loader = build_image_dataloader(data, "train", batch_size=1, train=True, seed=0)
    assert sample_counts(data, {"training {}": loader}) == (
        "training images streamed from 1 shard(s), number unknown"
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_folders_keep_the_order(workers, tmp_path):
    write(tmp_path, *(f"{i}.png" for i in range(5)))
    data = config(tmp_path, streaming=True, num_workers=workers, max_validation_samples=3)
    decoder = Decoder("image", "name", (1,), _number)
    source = open_split(data, "train")
    loader = build_dataloader(source, "train", data, decoder, batch_size=1, train=False, seed=0)
    assert [int(batch["name"]) for batch in loader] == [0, 1, 2]


def _number(cell: dict, *_) -> torch.Tensor:
    return torch.tensor([int(Path(cell["path"]).stem)])
