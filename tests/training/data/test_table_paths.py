"""Tables that name files: relative paths count from the table's folder."""

import io
import json
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
from PIL import Image

from training.data.images import ImageDataConfig, decode_image
from training.data.source import open_split


@pytest.fixture(autouse=True)
def own_datasets(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), level).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def cells(dataset: Path | str) -> list:
    """Of the whole dataset, which are those of a stream."""
    found = []
    for streaming in (False, True):
        config = ImageDataConfig(dataset=str(dataset), streaming=streaming)
        found.append([row["image"] for row in open_split(config, "train")])
    assert found[0] == found[1]
    return found[0]


def write_table(path: Path, named: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name == "struct.jsonl":
        named = [name and {"path": name} for name in named]
    table = datasets.Dataset.from_dict({"image": named, "number": list(range(len(named)))})
    if path.suffix == ".parquet":
        if path.stem == "images":
            table = table.cast_column("image", datasets.Image(decode=False))
        # As it is: to_parquet would put the files in.
        pyarrow.parquet.write_table(table.with_format("arrow")[:], path)
    elif path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_json(path)
    return path


TABLES = ["list.csv", "struct.jsonl", "images.parquet"]
SIMILAR_TABLES = ["list.jsonl", "list.parquet"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *TABLES,
        *(pytest.param(name, marks=pytest.mark.soak) for name in SIMILAR_TABLES),
    ],
)
def test_relative_paths_count_from_the_folder_of_their_table(name, tmp_path, monkeypatch):
    """Neither from the working directory, nor from the folder of another table; all others stay as they are."""
    write(tmp_path / "here/photos/1.png", png(0))
    monkeypatch.chdir(tmp_path / "here")
    wanted = {}
    for number, folder in enumerate(("one", "two"), 1):
        first = write(tmp_path / "set" / folder / "photos/1.png", png(number))
        second = write(tmp_path / "set" / folder / "2 ::.png", png(number))
        named = [None, "photos/1.png", "2 ::.png", str(first)]
        write_table(tmp_path / "set" / folder / name, named)
        named[1:3] = [f"../../set/{folder}/{path}" for path in named[1:3]]
        write_table(tmp_path / "lists" / folder / name, named)
        wanted[folder] = [None, first, second, first]

    def check(dataset: Path, *folders: str) -> None:
        found = [cell and cell["path"] and Path(cell["path"]).resolve() for cell in cells(dataset)]
        assert found == [path for folder in folders for path in wanted[folder]]
        for cell in cells(dataset):
            if cell and cell["path"]:
                assert decode_image(cell).getpixel((0, 0))[0] in (1, 2)

    check(tmp_path / "set/one" / name, "one")
    check(tmp_path / "lists/two", "two")
    check(tmp_path / "lists", "one", "two")
    files = [{"split": "train", "path": name}]
    card = json.dumps({"configs": [{"config_name": "default", "data_files": files}]})
    write(tmp_path / "set/one/README.md", f"---\n{card}\n---\n".encode())
    check(tmp_path / "set/one", "one")


def test_they_may_be_of_the_working_directory(tmp_path, monkeypatch):
    write(tmp_path / "photos/1.png", png(1))
    write(tmp_path / "lists/a.csv", b"image\nphotos/1.png\n")
    monkeypatch.chdir(tmp_path)
    (cell,) = cells("lists/a.csv")
    assert decode_image(cell).size == (4, 4)


def test_addresses_stay(tmp_path):
    path = write(tmp_path / "a.csv", b"image\nhttps://host.example/1.png\n")
    assert [cell["path"] for cell in cells(path)] == ["https://host.example/1.png"]


@pytest.mark.parametrize("all_columns", [False, True])
def test_a_stream_of_text_that_was_never_stored_is_opened(all_columns, tmp_path):
    """Datasets knows its columns only once it has read it whole."""
    path = write_table(tmp_path / "list.csv", [None, "1.png"])
    config = ImageDataConfig(dataset=str(path), streaming=True)
    found = list(open_split(config, "train", all_columns=all_columns))
    assert [row["image"] for row in found] == [None, {"bytes": None, "path": f"{tmp_path}/1.png"}]
    assert all(("number" in row) == all_columns for row in found)


def split_lists(folder: Path, names=("train.csv", "validation.csv")) -> Path:
    for number, name in enumerate(names):
        write(folder / f"images/{number}.png", png(number))
        write_table(folder / name, [f"images/{number}.png"])
    return folder


def test_tables_named_like_splits_go_before_the_files_that_they_list(tmp_path, caplog):
    dataset = split_lists(tmp_path / "set")
    assert [Path(cell["path"]).name for cell in cells(dataset)] == ["0.png"]
    config = ImageDataConfig(dataset=str(dataset))
    assert Path(open_split(config, "validation")[0]["image"]["path"]).name == "1.png"
    assert "left out" not in caplog.text


@pytest.mark.parametrize("names", [("boxes.csv", "points.csv"), ("train.csv", "other.csv")])
def test_other_tables_beside_files_describe_nothing(names, tmp_path):
    assert len(cells(split_lists(tmp_path / "set", names))) == 2


def test_tables_named_like_splits_that_list_no_files_are_no_lists(tmp_path):
    dataset = split_lists(tmp_path / "set")
    write_table(dataset / "train.csv", ["nowhere.png"])
    assert len(cells(dataset)) == 2


@pytest.mark.parametrize(
    "content", ["", "null", '[{"image": 3}, 1]', '{"image": "images/0.png"}', "image\nimages/0.png"]
)
def test_a_table_of_one_split_beside_files_changes_nothing(content, tmp_path):
    """A train.json may be anything: annotations, no JSON at all; a lone validation.csv is no training set."""
    dataset = split_lists(tmp_path / "set", ())
    write(dataset / "images/0.png", png(0))
    name = "validation.csv" if content.startswith("image") else "train.json"
    (dataset / name).write_text(content)
    assert len(cells(dataset)) == 1


def test_folders_named_like_splits_go_before_tables(tmp_path):
    for number, split in enumerate(("train", "validation")):
        write(tmp_path / f"{split}/{number}.png", png(number))
    write_table(tmp_path / "train.csv", ["train/0.png"])
    assert len(cells(tmp_path)) == 1
    assert len(open_split(ImageDataConfig(dataset=str(tmp_path)), "validation")) == 1


@pytest.mark.parametrize("row", ["photos/1.png,7,", "photos/1.png,7,,"])
def test_commas_at_the_end_of_rows_move_no_columns(row, tmp_path):
    write(tmp_path / "photos/1.png", png(3))
    (tmp_path / "list.csv").write_text(f"image,number\n{row}\n")
    assert [Path(cell["path"]).name for cell in cells(tmp_path / "list.csv")] == ["1.png"]
    card = "---\nconfigs:\n- config_name: default\n  data_files: '*.csv'\n---\n"
    (tmp_path / "README.md").write_text(card)
    assert [Path(cell["path"]).name for cell in cells(tmp_path)] == ["1.png"]
