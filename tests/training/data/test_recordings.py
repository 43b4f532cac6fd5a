"""Every kind of source, whole and streamed; broken files; order and crops that survive a resume."""

import logging
import multiprocessing
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration

from tests.training.support.recordings import RATE, broken_recordings, encoded, noise
from training.data.loader import first_batch
from training.data.reader import UnreadableSample
from training.data.recordings import AudioDataConfig, build_audio_dataloader
from training.loop.batches import rest_of_epoch
from training.runtime.settings import SettingsError

CLIP = 400  # samples of the tests' crops
BOTH = pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])


@pytest.fixture(autouse=True)
def own_datasets(tmp_path, monkeypatch):
    """Datasets prepares its tables in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # It waits five seconds for pyarrow's threads at the end of a shuffled parquet stream.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)


def level(number: int, samples: int = 1000, **options) -> bytes:
    """A recording of one level, by which it is known again after any crop."""
    return encoded(np.full(samples, number / 128, np.float32), **options)


def found(batches) -> list[int]:
    return [round(float(wave.mean()) * 128) for b in batches for wave in b["input_values"]]


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def table(cells: list[bytes], column: str = "audio") -> datasets.Dataset:
    rows = {column: [{"bytes": c, "path": None} for c in cells], "speaker": [1] * len(cells)}
    return datasets.Dataset.from_dict(rows).cast_column(column, datasets.Audio(decode=False))


def config(dataset: Path | str, **options) -> AudioDataConfig:
    defaults = {"train_split": "train", "validation_split": "validation", "config_name": None}
    defaults |= {"sampling_rate": RATE, "clip_seconds": CLIP / RATE}
    return AudioDataConfig(
        **{"dataset": str(dataset), "num_workers": 0, "shuffle_buffer": 8} | defaults | options
    )


def load(cfg: AudioDataConfig, split: str = "train", **options) -> list[dict]:
    defaults = {"batch_size": 4, "train": False, "seed": 0}
    return list(build_audio_dataloader(cfg, split, **defaults | options))


# Broken recordings


@BOTH
@pytest.mark.parametrize("workers", [0, 1])
def test_broken_files_are_skipped_and_counted(streaming, workers, tmp_path, caplog):
    good = {f"train/{i:02}.wav": level(i) for i in range(12)}
    bad = {f"train/{name}": content for name, (content, _) in broken_recordings().items()}
    held_out = {"validation/0.wav": level(7), "validation/1.wav": b"", "validation/2.wav": level(9)}
    folder = write_folder(tmp_path / "speech", good | bad | held_out)
    cfg = config(folder, streaming=streaming, num_workers=workers)
    with caplog.at_level(logging.WARNING):
        batches = load(cfg, train=True)
    assert batches and all(b["input_values"].shape == (4, 1, CLIP) for b in batches)
    assert all(b["valid"].all() and b["input_values"].isfinite().all() for b in batches)
    # A crop before the cut, or beside the NaN, is noise.
    assert set(found(batches)) <= set(range(-1, 12))
    assert sum(int(b["unreadable"].sum()) for b in batches) >= 5
    if not workers:
        assert any("zero.wav: the file is empty" in record.message for record in caplog.records)
    (batch,) = load(cfg, "validation")
    assert batch["valid"].tolist() == [True, False, True]
    assert batch["unreadable"].tolist() == [0, 1, 0]
    assert found([batch]) == [7, 0, 9]


@BOTH
@pytest.mark.parametrize("train, count", [(True, 5), (True, 120), (False, 120)])
def test_nothing_readable_is_an_error(streaming, train, count, tmp_path):
    table([b"broken"] * count).to_parquet(tmp_path / "bad.parquet")
    cfg = config(tmp_path / "bad.parquet", streaming=streaming)
    with pytest.raises(UnreadableSample, match=f"{min(count, 100)} recordings in a row.*'audio'"):
        load(cfg, train=train)


# Sources


def audio_folder(path: Path) -> tuple[Path, dict]:
    kinds = ["wav", "flac", "ogg", "wav", "flac", "wav"]
    files = {f"{i}.{kind}": level(i, kind=kind.upper()) for i, kind in enumerate(kinds)}
    return write_folder(path / "speech", files | {"notes.txt": b"no recording"}), {}


def speaker_folders(path: Path) -> tuple[Path, dict]:
    files = {f"speaker{i // 3}/{i}.wav": level(i) for i in range(6)}
    return write_folder(path / "speech", files), {}


def transcribed_folder(path: Path) -> tuple[Path, dict]:
    lines = "file_name,text\n" + "".join(f"{i}.wav,word\n" for i in range(6))
    files = {f"{i}.wav": level(i) for i in range(6)} | {"metadata.csv": lines.encode()}
    return write_folder(path / "speech", files), {}


def parquet_file(path: Path) -> tuple[Path, dict]:
    table([level(i) for i in range(6)], "speech").to_parquet(path / "some.parquet")
    return path / "some.parquet", {"audio_column": "speech"}


def arrow_file(path: Path) -> tuple[Path, dict]:
    return next(saved(path)[0].glob("*.arrow")), {}


def saved(path: Path) -> tuple[Path, dict]:
    table([level(i) for i in range(6)]).save_to_disk(path / "saved")
    return path / "saved", {}


def saved_splits(path: Path) -> tuple[Path, dict]:
    parts = {f"part.{k}": table([level(3 * k + i) for i in range(3)]) for k in (0, 1)}
    datasets.DatasetDict(parts).save_to_disk(path / "saved")
    return path / "saved", {"train_split": "part.0+part.1"}


def dotted_splits(path: Path) -> tuple[Path, dict]:
    """As LibriTTS on the Hub: configurations with splits whose names have dots."""
    names = ["train.clean.100", "train.clean.360", "train.other.500"]
    card = "---\nconfigs:\n- config_name: all\n  data_files:\n"
    for number, name in enumerate(names):
        card += f"  - split: {name}\n    path: data/{name}/*.parquet\n"
        (path / "libritts" / "data" / name).mkdir(parents=True)
        rows = table([level(2 * number + i) for i in range(2)])
        rows.to_parquet(path / "libritts" / "data" / name / f"{name}-0.parquet")
    (path / "libritts" / "README.md").write_text(card + "---\n")
    default = AudioDataConfig()
    return path / "libritts", {"config_name": "all", "train_split": default.train_split}


SOURCES = [audio_folder, speaker_folders, transcribed_folder, parquet_file, arrow_file, saved]
SOURCES += [saved_splits, dotted_splits]


@BOTH
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_every_source(source, streaming, tmp_path):
    path, options = source(tmp_path)
    cfg = config(path, streaming=streaming, **options)
    batches = load(cfg, cfg.train_split)
    assert [b["input_values"].shape for b in batches] == [(4, 1, CLIP), (2, 1, CLIP)]
    assert found(batches) == list(range(6))
    assert all(b["valid"].all() and not b["unreadable"].any() for b in batches)
    assert batches[0]["valid"].dtype == torch.bool
    (batch,) = load(cfg, cfg.train_split, train=True)
    assert batch["input_values"].dtype == torch.float32 and len(set(found([batch]))) == 4


def test_a_part_of_a_file_as_split(tmp_path):
    table([level(i) for i in range(10)]).to_parquet(tmp_path / "some.parquet")
    cfg = config(tmp_path / "some.parquet", train_split="train[:80%]")
    assert found(load(cfg, cfg.train_split)) == list(range(8))
    assert found(load(cfg, "train[80%:]")) == [8, 9]


@BOTH
def test_mistakes_are_named(streaming, tmp_path):
    folder = audio_folder(tmp_path)[0]
    for path in (folder, saved(tmp_path)[0]):
        cfg = config(path, streaming=streaming, validation_split="dev.clean")
        with pytest.raises(SettingsError, match=r"'dev.clean'.*'train'.*validation_split=null"):
            load(cfg, "dev.clean")
        with pytest.raises(SettingsError, match="audio_column.*'speech'.*audio"):
            load(config(path, streaming=streaming, audio_column="speech"))
    with pytest.raises(SettingsError, match="'speaker'.*not recordings"):
        load(config(tmp_path / "saved", streaming=streaming, audio_column="speaker"))
    with pytest.raises(SettingsError, match="'none'.*'all'.*config_name"):
        path, options = dotted_splits(tmp_path)
        load(config(path, streaming=streaming, **options | {"config_name": "none"}))
    for options in ({"clip_seconds": 0.0}, {"clip_seconds": float("nan")}, {"sampling_rate": 0}):
        with pytest.raises(SettingsError, match=next(iter(options))):
            config(folder, **options)


# Order and crops


def test_crops_follow_from_seed_and_epoch_alone(tmp_path):
    table([encoded(noise(4000))] * 8).to_parquet(tmp_path / "same.parquet")

    def epochs(workers: int, seed: int) -> list[torch.Tensor]:
        cfg = config(tmp_path / "same.parquet", num_workers=workers)
        loader = build_audio_dataloader(cfg, "train", batch_size=4, train=True, seed=seed)
        waves = []
        for epoch in (0, 1):
            torch.manual_seed(workers + epoch)  # must not matter
            loader.sampler.set_epoch(epoch)
            waves.append(torch.cat([batch["input_values"] for batch in loader]))
        return waves

    first, second = epochs(0, seed=1)
    assert len({wave.numpy().tobytes() for wave in torch.cat([first, second])}) > 10
    for again, wanted in zip(epochs(2, seed=1), (first, second), strict=True):
        assert torch.equal(again, wanted)
    assert not torch.equal(epochs(0, seed=2)[0], first)


@BOTH
def test_resuming_gives_the_same_crops(streaming, tmp_path):
    table([encoded(noise(3000, seed)) for seed in range(24)]).save_to_disk(tmp_path / "saved")
    accelerator = Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True)
    )

    def prepared():
        cfg = config(tmp_path / "saved", streaming=streaming)
        loader = build_audio_dataloader(cfg, "train", batch_size=4, train=True, seed=0)
        return accelerator.prepare(loader)

    loader, epochs = prepared(), []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        epochs.append([batch["input_values"] for batch in loader])
    assert [len(epoch) for epoch in epochs] == [6, 6]
    assert not torch.equal(epochs[0][0], epochs[1][0])
    loader = prepared()
    loader.set_epoch(1)
    resumed = [batch["input_values"] for batch in rest_of_epoch(loader, accelerator, 1, 2)]
    assert torch.equal(torch.cat(resumed), torch.cat(epochs[1][2:]))


@pytest.mark.slow
@BOTH
def test_a_first_look_leaves_no_workers_behind(tmp_path, streaming):
    """And sees the batch that the training begins with."""
    folder = tmp_path / "audio"
    write_folder(folder, {f"train/{n}.wav": level(n) for n in range(1, 13)})
    cfg = config(folder, streaming=streaming, num_workers=2)
    loader = build_audio_dataloader(cfg, "train", batch_size=4, train=True, seed=0)
    first = first_batch(loader)
    assert not multiprocessing.active_children()
    batches = iter(loader)
    assert torch.equal(next(batches)["input_values"], first["input_values"])
    assert len(multiprocessing.active_children()) == 2


def test_the_feature_of_datasets_is_left_as_it_is(tmp_path):
    """Opening needs another way to encode; nothing else in the process may get it."""
    theirs = datasets.Audio.encode_example
    assert theirs.__module__ == datasets.Audio.__module__
    path, _ = transcribed_folder(tmp_path)
    assert len(load(config(path))) == 2
    assert datasets.Audio.encode_example is theirs
