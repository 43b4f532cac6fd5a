"""tokenize_dataset on a data set that has changed: rows added at the end are taken, all else is refused."""

import io
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from modeling_simvq import SimVQImageConfig, SimVQImageModel
from training import tokenize_dataset
from training.data.codes import TokenDataConfig, open_codes
from training.runtime.folder_lock import hold_folder
from training.tokenization.code_files import Record, RowDigests
from training.tokenization.file_writer import FileWriter


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    small = {"base_channels": 32, "channel_multipliers": [1, 1], "num_res_blocks": 1}
    folder = tmp_path_factory.mktemp("tokenizer") / "model"
    config = SimVQImageConfig(**small, codebook_size=64, codebook_dim=8)
    SimVQImageModel(config).save_pretrained(folder)
    return folder


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    random = np.random.default_rng(number)
    Image.fromarray(random.integers(0, 255, (4, 4, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(root: Path, numbers: list[int], first: int = 0) -> Path:
    (root / "photos/train").mkdir(parents=True, exist_ok=True)
    for place, number in enumerate(numbers, start=first):
        (root / f"photos/train/{place:03}.png").write_bytes(png(number))
    return root / "photos"


def write_parquet(root: Path, numbers: list[int], first: int = 0) -> Path:
    root.mkdir(exist_ok=True)
    names = [f"{n:03}.png" for n in range(first, first + len(numbers))]
    cells = [{"bytes": png(n), "path": name} for n, name in zip(numbers, names, strict=True)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": cells, "label": list(range(len(cells)))}
    path = root / "train.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return path


WRITERS = {"folder": write_folder, "parquet": write_parquet}


@pytest.fixture
def tokenize(model, tmp_path, monkeypatch, capsys):
    """The command in this process, into tmp_path/codes; gives back what it printed."""

    def run(data: Path, *more: str, output: str = "codes") -> str:
        words = ["tokenize_dataset.py", f"model={model}", f"dataset={data}", "splits=[train]"]
        words += [f"output={tmp_path / output}", "resolution=4", "num_workers=1"]
        monkeypatch.setattr(sys, "argv", [*words, "rows_per_file=8", *more])
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        tokenize_dataset.main()
        return capsys.readouterr().out

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "data").iterdir())}


def age(*folders: Path, seconds: float = 7200) -> None:
    """Let the codes be so much younger than their source that files need not be read again."""
    for folder in folders:
        for path in folder.glob("data/*"):
            os.utime(path, (time.time() + seconds,) * 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "streaming"),
    [("folder", "false"), pytest.param("parquet", "true", marks=pytest.mark.soak)],
)
def test_a_source_that_has_grown_gives_all_its_rows(tokenize, tmp_path, kind, streaming):
    options = ("flips=true", f"streaming={streaming}")
    source = WRITERS[kind](tmp_path / "source", list(range(20)))
    assert "train: 40 rows" in tokenize(source, *options)
    age(tmp_path / "codes")
    again = tokenize(source, *options)
    assert again.startswith("0 images encoded") and "train: 40 rows" in again
    source = WRITERS[kind](tmp_path / "source", list(range(40)))
    grown = tokenize(source, *options)
    assert "48 images encoded" in grown and "train: 80 rows" in grown  # the file of 4 rows, and on
    tokenize(source, *options, output="whole")
    assert contents(tmp_path / "codes") == contents(tmp_path / "whole")
    about = json.loads((tmp_path / "codes/tokenization.json").read_text())
    assert about["source"]["train"]["rows"] == 40
    assert about == json.loads((tmp_path / "whole/tokenization.json").read_text())


@pytest.mark.slow
def test_codes_are_those_of_the_folder(tokenize, tmp_path, monkeypatch):
    """For the trainer, and by the line that the card prints: not those of another, nor older ones."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def check(output: str) -> None:
        files = sorted((tmp_path / output / "data").iterdir())
        own = pyarrow.parquet.read_table(files)["image_codes"].to_pylist()
        settings = TokenDataConfig(dataset=str(tmp_path / output), label_column=None)
        opened = open_codes(settings, "train")
        monkeypatch.chdir(tmp_path / output)
        card = Path("README.md").read_text()
        (line,) = re.findall(r"^tokens = (load_dataset\(.*\))\.with_format", card, re.MULTILINE)
        shown = eval(line, {"Path": Path, "load_dataset": datasets.load_dataset})
        for rows in (opened, shown):
            assert rows["image_codes"][:] == own

    for name, first in (("a", 0), ("b", 50)):
        source = write_folder(tmp_path / name, list(range(first, first + 10)))
        tokenize(source, output=f"{name}/codes")
        check(f"{name}/codes")
    write_folder(tmp_path / "b", list(range(50, 60)), first=10)
    tokenize(source, output="b/codes")
    check("b/codes")
    shutil.rmtree(tmp_path / "a/codes")
    tokenize(source, output="a/codes")  # another one in its place
    check("a/codes")


def write_classes(root: Path, *classes: str, split: str = "train") -> Path:
    for name in classes:
        folder = root / "photos" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(5):
            (folder / f"{number}.png").write_bytes(png(number + 10 * ord(name[0])))
    return root / "photos"


@pytest.mark.slow
@pytest.mark.parametrize("streaming", ["false", pytest.param("true", marks=pytest.mark.soak)])
def test_classes_behind_the_others_are_named_in_every_file(tokenize, tmp_path, streaming):
    options = ("splits=[train,test]", f"streaming={streaming}")
    write_classes(tmp_path, "ant", split="test")
    source = write_classes(tmp_path, "ant", "bee")
    tokenize(source, *options)
    age(tmp_path / "codes")
    write_classes(tmp_path, "cow")  # the finished files and the whole split of test lack its name
    grown = tokenize(source, *options)
    assert grown.startswith("7 images encoded")
    for split, labels in (("train", [0, 1, 2]), ("test", [0])):
        rows = open_codes(TokenDataConfig(dataset=str(tmp_path / "codes")), split)
        assert rows.features["label"].names == ["ant", "bee", "cow"]
        assert list(rows["label"]) == [label for label in labels for _ in range(5)]
    tokenize(source, *options, output="whole")
    assert contents(tmp_path / "codes") == contents(tmp_path / "whole")
    kept = contents(tmp_path / "codes"), os.stat(tmp_path / "codes/data/train-00000.parquet")
    tokenize(source, *options)  # nothing is left to be done
    assert kept[0] == contents(tmp_path / "codes")
    assert kept[1] == os.stat(tmp_path / "codes/data/train-00000.parquet")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["cat", "dog", "eel"], None),
        (["dog", "cat"], "column 'label' had the classes cat, dog and has dog, cat"),
        (["cat"], "column 'label' had the classes cat, dog and has cat"),
        (None, r"column 'label' was ClassLabel.*and is Value\('int64'\)"),
    ],
)
@pytest.mark.parametrize("streaming", ["false", pytest.param("true", marks=pytest.mark.soak)])
def test_labels_that_mean_something_else_are_refused(
    tokenize, tmp_path, change, message, streaming
):
    """The numbers of the rows are the same, so only the columns tell."""

    def write(classes: list[str] | None) -> Path:
        source = write_parquet(tmp_path / "source", list(range(9)))
        table = pyarrow.parquet.read_table(source)
        features = datasets.Features.from_arrow_schema(table.schema)
        features["label"] = datasets.ClassLabel(names=classes) if classes else features["label"]
        labels = pyarrow.array([0] * 9, pyarrow.int64())
        table = table.set_column(table.schema.get_field_index("label"), "label", labels)
        metadata = features.arrow_schema.metadata
        pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), source)
        return source

    source = write(["cat", "dog"])
    tokenize(source, f"streaming={streaming}")
    before = contents(tmp_path / "codes")
    write(change)
    if message is None:
        assert tokenize(source, f"streaming={streaming}").startswith("0 images encoded")
        return
    with pytest.raises(SystemExit, match=f"another state of the dataset .*{message}"):
        tokenize(source, f"streaming={streaming}")
    assert contents(tmp_path / "codes") == before


def test_a_class_between_the_others_is_refused_by_name(tokenize, tmp_path):
    source = write_classes(tmp_path, "ant", "cow")
    tokenize(source)
    write_classes(tmp_path, "bee")
    with pytest.raises(SystemExit, match="classes ant, cow and has ant, bee, cow"):
        tokenize(source)


CHANGES = {
    "shrunk": list(range(12)),
    "shrunk within the last file": list(range(18)),
    "reordered": [1, 0, *range(2, 20)],
    "changed": [99, *range(1, 20)],
    "changed in the last file": [*range(19), 99],
    "a row before the others": [99, *range(20)],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITERS)
def test_any_other_change_is_refused(tokenize, tmp_path, kind):
    source = WRITERS[kind](tmp_path / "source", list(range(20)))
    tokenize(source)
    before = contents(tmp_path / "codes")
    for change in list(CHANGES.values()) if kind == "folder" else list(CHANGES.values())[1:4]:
        shutil.rmtree(tmp_path / "source")
        WRITERS[kind](tmp_path / "source", change)
        with pytest.raises(SystemExit, match="another state of the dataset.*begin again"):
            tokenize(source)
    assert contents(tmp_path / "codes") == before


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [list(range(12)), [99, *range(1, 20)]])
def test_a_stream_that_is_another_is_refused(tokenize, tmp_path, numbers):
    source = write_parquet(tmp_path / "source", list(range(20)))
    tokenize(source, "streaming=true")
    write_parquet(tmp_path / "source", numbers)
    with pytest.raises(SystemExit, match="another state of the dataset"):
        tokenize(source, "streaming=true")


@pytest.mark.slow
def test_other_labels_are_refused(tokenize, tmp_path):
    source = write_parquet(tmp_path / "source", list(range(20)))
    tokenize(source)
    rows = datasets.Dataset.from_parquet(str(source), cache_dir=str(tmp_path / "cache"))
    rows = rows.map(lambda row: {"label": row["label"] + 1})
    rows.to_parquet(str(source))
    with pytest.raises(SystemExit, match="another state of the dataset"):
        tokenize(source)


@pytest.mark.slow
def test_a_folder_that_was_moved_or_copied_goes_on(tokenize, tmp_path):
    source = write_folder(tmp_path / "source", list(range(20)))
    tokenize(source)
    shutil.copytree(source, tmp_path / "elsewhere/photos")  # times of change are new as well
    again = tokenize(tmp_path / "elsewhere/photos")
    assert again.startswith("0 images encoded") and "train: 20 rows" in again


def test_old_files_are_not_read_again_and_young_ones_are(tmp_path, monkeypatch):
    source = write_folder(tmp_path, [1, 2])
    rows = [{"image": {"bytes": None, "path": str(p)}} for p in sorted(source.rglob("*.png"))]
    digests, codes = RowDigests("image", str(source)), tmp_path / "codes.parquet"
    codes.write_text("")
    names, contents = digests.names(), digests.contents()
    for row in rows:
        names.add(row)
        contents.add(row)
    record = Record(2, 0, names.value, contents.value)
    assert digests.still_hold(lambda: rows, record, codes)
    os.utime(codes, (time.time() + 7200,) * 2)
    monkeypatch.setattr(RowDigests, "contents", lambda *_: pytest.fail("read again"))
    assert digests.still_hold(lambda: rows, record, codes)
    (source / "train/001.png").write_bytes(b"longer than before" * 99)
    assert not digests.still_hold(lambda: rows, record, codes)


@pytest.mark.slow
def test_unreadable_rows_are_counted_in_every_run(tokenize, tmp_path):
    source = write_folder(tmp_path / "source", list(range(20)))
    (source / "train/005.png").write_bytes(b"no image")
    first, again = tokenize(source, "crops=2"), tokenize(source, "crops=2")
    for printed in (first, again):
        assert "train: 38 rows" in printed and "1 images could not be read" in printed


@pytest.mark.slow
def test_files_of_others_are_neither_counted_nor_deleted(tokenize, tmp_path):
    source = write_folder(tmp_path / "source", list(range(9)))
    tokenize(source)
    mine = {"train-mine.parquet", "notes.unfinished", "validation-00000.parquet"}
    for name in mine:
        (tmp_path / "codes/data" / name).write_text("theirs")
    assert "train: 9 rows" in tokenize(source)
    assert mine < set(contents(tmp_path / "codes"))
    (tmp_path / "photos/data").mkdir(parents=True)
    with pytest.raises(SystemExit, match="did not write"):
        tokenize(source, output="photos")


@pytest.mark.slow
def test_a_folder_that_another_command_writes_to_is_refused(tokenize, tmp_path):
    source = write_folder(tmp_path / "source", list(range(9)))
    tokenize(source)
    unfinished = tmp_path / "codes/data/train-00001.7.unfinished"
    unfinished.write_bytes(b"what the other is writing")
    with hold_folder(tmp_path / "codes", "output"):
        for more in ((), ("seed=5",)):
            with pytest.raises(
                SystemExit, match=r"output: process \d+ on .* is writing to .*codes"
            ):
                tokenize(source, *more)
        assert unfinished.exists()
    assert "train: 9 rows" in tokenize(source)
    assert not unfinished.exists() and not (tmp_path / "codes/.lock").exists()


@pytest.mark.slow
def test_codes_without_a_record_are_refused(tokenize, tmp_path):
    """Those of the version before; and rows that nobody accounts for."""
    source = write_parquet(tmp_path / "source", list(range(9)))
    tokenize(source)
    path = tmp_path / "codes/data/train-00000.parquet"
    rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    rows.to_parquet(str(path))
    with pytest.raises(SystemExit, match="does not tell which rows"):
        tokenize(source)


def test_rows_that_vanish_meanwhile_are_an_error(tokenize, tmp_path, monkeypatch):
    source = write_folder(tmp_path / "source", list(range(20)))
    write = FileWriter.write

    def lossy(self, rows, first, path, features):
        rows = list(rows)
        write(self, rows[:-1] if first == 8 else rows, first, path, features)
        return len(rows)

    monkeypatch.setattr(FileWriter, "write", lossy)
    with pytest.raises(SystemExit, match="account for 19 rows of the source, which has 20"):
        tokenize(source)


@pytest.mark.slow
def test_what_is_passed_on_names_no_folder_of_this_machine(tokenize, tmp_path):
    """Other media of a row go into the file of codes; texts that are paths count from the data set."""
    source = write_parquet(tmp_path / "source", list(range(3)))
    rows = datasets.Dataset.from_parquet(str(source), cache_dir=str(tmp_path / "cache"))
    (tmp_path / "source/depth.png").write_bytes(png(7))
    rows = rows.add_column("depth", [str(tmp_path / "source/depth.png")] * 3)
    rows = rows.cast_column("depth", datasets.Image())
    rows = rows.add_column("__url__", [str(tmp_path / "source/a.tar")] * 3)
    table = rows.with_format("arrow")[:]  # as it is: to_parquet would read the files
    pyarrow.parquet.write_table(table, source)
    tokenize(source)
    (path,) = (tmp_path / "codes/data").iterdir()
    made = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert made["__url__"] == ["a.tar"] * 3
    assert np.array_equal(np.asarray(made[0]["depth"]), np.asarray(Image.open(io.BytesIO(png(7)))))
    assert str(tmp_path).encode() not in path.read_bytes()
