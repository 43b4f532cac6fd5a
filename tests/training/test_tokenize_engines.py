"""Files of codes that Ray writes, a task each, are those of the command, which ends the job."""

import pytest

from tests.support.programs import REPOSITORY
from tests.training.test_tokenize_again import (  # noqa: F401
    contents,
    model,
    tokenize,
    write_folder,
    write_parquet,
)
from training.runtime.settings import SettingsError
from training.tokenization.engines import FileTokenizer, list_files


@pytest.mark.soak
def test_ray_writes_the_same_files(tokenize, model, tmp_path, monkeypatch):  # noqa: F811
    source = write_folder(tmp_path / "source", list(range(20)))
    words = [f"model={model}", f"dataset={source}", "splits=[train]", "resolution=4"]
    words += [f"output={tmp_path / 'codes'}", "num_workers=1", "rows_per_file=8", "flips=true"]
    tasks = list_files(words)
    assert tasks == [{"split": "train", "index": index} for index in range(3)]

    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    variables = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    ray.init(
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100_000_000,
        runtime_env={"env_vars": variables},
    )
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        mapped = ray.data.from_items(tasks).map(
            FileTokenizer, fn_constructor_args=(words,), concurrency=1
        )
        done = mapped.take_all()
    finally:
        ray.shutdown()
    assert sorted((row["index"], row["rows"]) for row in done) == [(0, 8), (1, 8), (2, 4)]
    ended = tokenize(source, "flips=true")
    assert ended.startswith("0 images encoded") and "train: 40 rows" in ended
    tokenize(source, "flips=true", output="whole")
    assert contents(tmp_path / "codes") == contents(tmp_path / "whole")
    assert (tmp_path / "codes/README.md").is_file()


def test_a_task_goes_on_and_streams_have_none(model, tmp_path):  # noqa: F811
    source = write_parquet(tmp_path / "source", list(range(10)))
    words = [f"model={model}", f"dataset={source}", "splits=[train]", "resolution=4"]
    words += [f"output={tmp_path / 'codes'}", "num_workers=1", "rows_per_file=8"]
    tasks = list_files(words)
    write = FileTokenizer(words)
    assert [write(task)["rows"] for task in tasks] == [8, 2]
    before = contents(tmp_path / "codes")
    assert [FileTokenizer(words)(task)["rows"] for task in tasks] == [8, 2]  # all are there
    assert contents(tmp_path / "codes") == before
    with pytest.raises(SettingsError, match="streaming: "):
        list_files(
            [*words[:-3], f"output={tmp_path / 'other'}", "rows_per_file=8", "streaming=true"]
        )
    with pytest.raises(SettingsError, match="codes of other settings"):
        list_files([*words[:-1], "rows_per_file=9"])
