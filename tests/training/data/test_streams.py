"""Streams by parts: every row once, any order found again from anywhere, whatever the source."""

import json
import multiprocessing
import tarfile
from io import BytesIO
from itertools import islice
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.data.test_sources import config, found, own_datasets, shade, table  # noqa: F401
from training.data.images import build_image_dataloader
from training.data.loader import first_batch
from training.data.order import key_of
from training.data.shards import shard_bytes, shard_lengths, whole_shards
from training.data.source import open_split
from training.data.stream import BlockShuffle, PartRows
from training.data.stream_loader import StreamLoader
from training.runtime.settings import SettingsError

ROWS = 23


def numbers(shards: list[list[int]]):
    for shard in shards:
        for number in shard:
            yield {"number": number}


def stream_of(sizes: list[int]) -> datasets.IterableDataset:
    """A stream of 0, 1, 2, ... in shards of these sizes."""
    rows = iter(range(sum(sizes)))
    shards = [list(islice(rows, size)) for size in sizes]
    return datasets.IterableDataset.from_generator(numbers, gen_kwargs={"shards": shards})


def parquet(folder: Path) -> Path:
    folder.mkdir()
    for name, rows in (("a", range(10)), ("b", range(10, ROWS))):
        part = table([shade(i) for i in rows])
        part.to_parquet(folder / f"{name}.parquet", batch_size=4)
    return folder


def saved(folder: Path) -> Path:
    table([shade(i) for i in range(ROWS)]).save_to_disk(folder, num_shards=3)
    return folder


def lines(folder: Path) -> Path:
    folder.mkdir()
    for i in range(ROWS):
        (folder / f"{i}.png").write_bytes(shade(i))
    rows = [json.dumps({"image": f"{i}.png"}) for i in range(ROWS)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return folder / "rows.jsonl"


def tar(path: Path, numbers) -> None:
    with tarfile.open(path, "w") as opened:
        for i in numbers:
            info = tarfile.TarInfo(f"{i:03}.png")
            info.size = len(shade(i))
            opened.addfile(info, BytesIO(shade(i)))


def csv(folder: Path) -> Path:
    lines(folder)
    (folder / "rows.csv").write_text("\n".join(["image", *(f"{i}.png" for i in range(ROWS))]))
    return folder / "rows.csv"


def tars(folder: Path) -> Path:
    folder.mkdir()
    for shard in range(3):
        tar(folder / f"{shard}.tar", range(shard, ROWS, 3))
    return folder


SOURCES = (parquet, saved, lines, csv, tars)


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=9),
    st.integers(1, 7),
    st.none() | st.integers(1, 20),
    st.sampled_from(["lengths", "sizes", ""]),
)
@settings(max_examples=100, deadline=None)
def test_parts_share_out_every_row_once(sizes, parts, limit, known):
    source = stream_of(sizes)
    order = list(range(len(sizes)))[::-1]
    options = {"limit": limit} | ({known: sizes} if known else {})
    shares = [
        [row["number"] for row in PartRows(source, order, part, parts, **options).read()]
        for part in range(parts)
    ]
    total = min(sum(sizes), limit or sum(sizes))
    assert sorted(sum(shares, [])) == list(range(total))
    by_rows = not whole_shards(order, parts, options.get("sizes"))
    if known == "lengths" or limit is not None or by_rows:
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("parts", [1, 2])
def test_rows_go_on_from_any_mark(source, parts, tmp_path):
    """Of Parquet the second part begins and ends within a row group."""
    stream = open_split(config(source(tmp_path / "data"), streaming=True), "train").reshard()
    order = list(range(stream.num_shards))

    def rows() -> PartRows:
        sizes = {"lengths": shard_lengths(stream), "sizes": shard_bytes(stream)}
        return PartRows(stream, order, parts - 1, parts, **sizes)

    reader, marks, whole = rows(), [], []
    for row in reader.read():
        whole.append(row["image"])
        marks.append(json.loads(json.dumps(reader.mark())))  # as a checkpoint holds it
    assert len(whole) >= ROWS // parts
    for done, mark in enumerate(marks, 1):
        assert [row["image"] for row in rows().read(mark)] == whole[done:], done


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 12), st.data())
@settings(max_examples=60, deadline=None)
def test_a_shuffle_begins_anywhere_and_reads_two_blocks_for_it(sizes, block, data):
    source = stream_of(sizes)

    def shuffle(place=None) -> BlockShuffle:
        return BlockShuffle(PartRows(source, list(range(len(sizes))), 0, 1), block, 7, place)

    whole, places, shuffled = [], [None], shuffle()
    for number, row in shuffled:
        assert number == len(whole)
        whole.append(row["number"])
        places.append(shuffled.place)
    assert sorted(whole) == list(range(sum(sizes)))
    shortest = 1 + key_of(7) % block
    for number, row in enumerate(whole):  # a row stays in its block
        assert (row - shortest) // block == (number - shortest) // block
    done = data.draw(st.integers(0, len(whole)))
    resumed = shuffle(places[done])
    passed = 0
    read = resumed.rows.read

    def counted(mark=None):
        nonlocal passed
        for row in read(mark):
            passed += 1
            yield row

    resumed.rows.read = counted
    rest = iter(resumed)
    first = next(rest, None)
    assert passed <= 2 * block + 1
    assert ([first] if first else []) + list(rest) == [
        (number, {"number": row}) for number, row in enumerate(whole) if number >= done
    ]


def loader_of(path: Path, epoch: int = 0, **options) -> StreamLoader:
    cfg = config(path, streaming=True, **options)
    loader = build_image_dataloader(cfg, "train", batch_size=4, train=True, seed=3)
    loader.set_epoch(epoch)
    return loader


@pytest.mark.parametrize("source", SOURCES)
def test_a_resume_gives_the_very_batches_and_so_does_the_next(source, tmp_path):
    path = source(tmp_path / "data")
    loader, states, whole = loader_of(path, epoch=1), [], []
    for batch in loader:
        whole.append(batch["pixel_values"])
        states.append(loader.state_dict())
    assert len(whole) == ROWS // 4
    resumed = loader_of(path, epoch=1)
    resumed.load_state_dict(states[1])
    resumed.skip(1, 2)
    batches = iter(resumed)
    assert torch.equal(next(batches)["pixel_values"], whole[2])
    again = loader_of(path, epoch=1)
    again.load_state_dict(resumed.state_dict())
    again.skip(1, 3)
    rest = [batch["pixel_values"] for batch in again]
    assert torch.equal(torch.cat(rest), torch.cat(whole[3:]))
    again.set_epoch(2)
    whole_epoch = [batch["pixel_values"] for batch in again]
    assert torch.equal(
        torch.cat(whole_epoch),
        torch.cat([batch["pixel_values"] for batch in loader_of(path, epoch=2)]),
    )


@pytest.mark.slow
def test_workers_share_the_rows_and_put_their_last_ones_together(tmp_path):
    path = parquet(tmp_path / "data")
    loader, states, whole = loader_of(path, num_workers=3), [], []
    for batch in loader:
        whole.append(found([batch]))
        states.append(loader.state_dict())
    seen = sum(whole, [])
    assert len(whole) == ROWS // 4 and len(set(seen)) == len(seen)  # 23 rows: 8, 8 and 7
    for done in range(1, len(whole)):
        resumed = loader_of(path, num_workers=3)
        resumed.load_state_dict(states[done - 1])
        resumed.skip(0, done)
        assert [found([batch]) for batch in resumed] == whole[done:], done


def test_a_state_of_other_workers_is_read_up_to(tmp_path, caplog):
    path = parquet(tmp_path / "data")
    whole = [found([batch]) for batch in loader_of(path)]
    loader = loader_of(path)
    next(iter(loader))
    other = loader_of(path, shuffle_buffer=9)
    other.load_state_dict(loader.state_dict())
    with caplog.at_level("INFO"):
        other.skip(0, 1)
    assert "read again up to batch 1" in caplog.text
    unlike = [found([batch]) for batch in loader_of(path, shuffle_buffer=9)]
    assert [found([batch]) for batch in other] == unlike[1:]
    again = loader_of(path)
    again.skip(0, 2)  # a checkpoint without any state of the stream
    assert [found([batch]) for batch in again] == whole[2:]


def test_validation_keeps_order_and_the_last_samples(tmp_path):
    cfg = config(parquet(tmp_path / "data"), streaming=True)
    loader = build_image_dataloader(cfg, "train", batch_size=4, train=False, seed=0)
    assert found(loader) == found(loader) == list(range(ROWS))


@pytest.mark.slow
def test_a_first_look_leaves_no_workers_behind_and_changes_nothing(tmp_path):
    loader = loader_of(parquet(tmp_path / "data"), num_workers=2)
    first = first_batch(loader)["pixel_values"]
    assert not multiprocessing.active_children()
    assert torch.equal(next(iter(loader))["pixel_values"], first)


def test_few_files_are_read_by_row_groups_whose_lengths_are_known(tmp_path):
    stream = loader_of(parquet(tmp_path / "data")).dataset
    assert stream.source.num_shards == 7 and stream.lengths == [4, 4, 2, 4, 4, 4, 1]
    both = datasets.concatenate_datasets([stream.source, stream.source])
    assert shard_lengths(both) == stream.lengths * 2
    of_two_workers = loader_of(saved(tmp_path / "saved"), num_workers=2)
    assert of_two_workers.dataset.lengths == [12, 11]
    assert loader_of(lines(tmp_path / "lines")).dataset.lengths is None


def uneven_tars(folder: Path) -> Path:
    folder.mkdir()
    tar(folder / "a.tar", range(3))
    tar(folder / "b.tar", range(3, ROWS))
    return folder


def uneven_parquet(folder: Path) -> Path:
    """Enough files for two parts that their footers are not read."""
    folder.mkdir()
    for i in range(15):
        table([shade(i)]).to_parquet(folder / f"{i:02}.parquet")
    table([shade(i) for i in range(15, 99)]).to_parquet(folder / "15.parquet")
    return folder


@pytest.mark.parametrize("rows, source", [(ROWS, uneven_tars), (99, uneven_parquet)])
def test_all_ranks_take_a_share_of_a_shard_much_longer_than_the_others(
    rows, source, tmp_path, caplog, monkeypatch
):
    cfg, seen = config(source(tmp_path / "data"), streaming=True), []
    for rank in range(2):
        monkeypatch.setattr("training.data.loader._ranks", lambda rank=rank: (rank, 2))
        with caplog.at_level("INFO"):
            loader = build_image_dataloader(cfg, "train", batch_size=1, train=True, seed=0)
        seen.append(found(batch for _, _, batch in loader.dataset))
    assert "shards are read by each of 2 workers" in caplog.text
    assert sorted(sum(seen, [])) == list(range(rows))
    assert abs(len(seen[0]) - len(seen[1])) <= 1 + rows // 20  # whole files of one row


def test_shards_of_about_equal_size_are_dealt_out_whole():
    assert whole_shards([3, 0, 1, 2], 2, [10, 11, 9, 10]) == [3, 0, 1, 2]
    assert whole_shards([4, 3, 0, 1, 2], 2, [10, 11, 9, 10, 50]) == [3, 0, 1, 2]
    assert whole_shards([4, 3, 0, 1, 2], 2, [10, 11, 9, 10, 0]) == [3, 0, 1, 2]
    assert whole_shards([0, 1, 2], 2, None) == []


@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_archive_is_a_shard_without_rows(streaming, tmp_path):
    tar(tmp_path / "0.tar", [])
    tar(tmp_path / "1.tar", range(9))
    loader = build_image_dataloader(
        config(tmp_path, streaming=streaming), "train", batch_size=4, train=False, seed=0
    )
    assert found(loader) == list(range(9))


def test_only_empty_archives_are_named(tmp_path):
    tar(tmp_path / "0.tar", [])
    with pytest.raises(SettingsError, match="holds nothing: 0.tar"):
        open_split(config(tmp_path), "train")


def test_rows_that_fill_no_batch_are_others_in_every_epoch(tmp_path):
    loader, left = loader_of(parquet(tmp_path / "data")), set(range(ROWS))
    for epoch in range(12):
        loader.set_epoch(epoch)
        left -= set(found(loader))
    assert not left


def test_a_state_does_not_fit_when_a_replaced_file_changes_the_shares(tmp_path):
    for number in range(4):
        tar(tmp_path / f"{number}.tar", [number])
    layout = loader_of(tmp_path, num_workers=2).state_dict()["layout"]
    assert loader_of(tmp_path, num_workers=2).state_dict()["layout"] == layout
    tar(tmp_path / "3.tar", range(3, 40))
    assert loader_of(tmp_path, num_workers=2).state_dict()["layout"] != layout


@pytest.mark.parametrize("damage", ["cut.tar", "bad.jsonl"])
def test_a_shard_that_cannot_be_read_on_is_named(damage, tmp_path):
    if damage == "cut.tar":
        tar(tmp_path / "a.tar", range(4))
        tar(tmp_path / damage, range(4, 20))
        whole = (tmp_path / damage).read_bytes()
        (tmp_path / damage).write_bytes(whole[:700])
    else:
        good = {"image": str(lines(tmp_path / "data").with_name("0.png"))}
        for name, text in (("a.jsonl", json.dumps(good)), (damage, json.dumps(good) + '\n{"im')):
            (tmp_path / "tables" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "tables" / name).write_text(text)
    dataset = tmp_path if damage == "cut.tar" else tmp_path / "tables"
    cfg = config(dataset, streaming=True)
    with pytest.raises(OSError, match=f"cannot be read any further.*{damage}"):
        found(build_image_dataloader(cfg, "train", batch_size=4, train=False, seed=0))


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_no_bytes_are_left_out(streaming, tmp_path, caplog):
    (tmp_path / "0.tar").touch()
    tar(tmp_path / "1.tar", range(9))
    cfg = config(tmp_path, streaming=streaming)
    loader = build_image_dataloader(cfg, "train", batch_size=4, train=False, seed=0)
    assert found(loader) == list(range(9))
    assert "1 file (0.tar): of 0 bytes" in caplog.text
