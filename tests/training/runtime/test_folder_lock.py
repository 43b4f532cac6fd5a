"""One command at a time writes to a folder, and however that ends, the next one may."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.runtime import folder_lock
from training.runtime.folder_lock import LOCK, clear_folder, hold_folder
from training.runtime.settings import SettingsError

# Holds a folder, forks a worker that outlives it, and says both process ids.
HOLDER = """
import multiprocessing, sys, time
from pathlib import Path
from training.runtime.folder_lock import hold_folder
with hold_folder(Path(sys.argv[1])):
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/run, and the id of its worker."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3])
    worker = int(process.stdout.readline())
    yield process, worker
    process.kill()
    process.wait()
    process.stdout.close()
    os.kill(worker, signal.SIGKILL)


@pytest.mark.slow
def test_the_second_is_refused_by_the_name_of_the_first(holder, tmp_path):
    process, _ = holder
    where = f"output: process {process.pid} on {socket.gethostname()}, started 20.* is writing to"
    with pytest.raises(SettingsError, match=where), hold_folder(tmp_path / "run", "output"):
        pytest.fail("two hold it")
    (tmp_path / "run" / "kept").write_text("")
    with pytest.raises(SettingsError, match="is writing to"):
        clear_folder(tmp_path / "run")
    assert (tmp_path / "run" / "kept").exists()


@pytest.mark.slow
def test_a_kill_frees_the_folder_though_a_worker_lives_on(holder, tmp_path):
    process, worker = holder
    process.kill()
    process.wait()
    os.kill(worker, 0)
    assert (tmp_path / "run" / LOCK).exists()
    with hold_folder(tmp_path / "run"):
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_it_is_free_at_the_end_of_the_block_and_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), hold_folder(tmp_path):
            with pytest.raises(SettingsError, match=f"process {os.getpid()}"):
                hold_folder(tmp_path).__enter__()
            1 / 0  # noqa: B018
        assert list(tmp_path.iterdir()) == []
    assert not folder_lock._held
    clear_folder(tmp_path / "none")
    clear_folder(tmp_path)
    assert not tmp_path.exists()


def test_a_forked_child_holds_nothing_and_frees_nothing(tmp_path):
    with hold_folder(tmp_path):
        child = os.fork()
        if child == 0:
            status = 0 if not folder_lock._held else 1
            os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(SettingsError):
            hold_folder(tmp_path).__enter__()


def test_a_file_that_its_holder_deletes_meanwhile_locks_nothing(tmp_path, monkeypatch):
    """The first ends between the second's opening of the file and its lock."""
    real, calls = folder_lock.fcntl.flock, []

    def flock(lock, how):
        calls.append(lock)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        real(lock, how)

    monkeypatch.setattr(folder_lock.fcntl, "flock", flock)
    with hold_folder(tmp_path):
        assert len(calls) == 2
        monkeypatch.undo()
        with pytest.raises(SettingsError):
            hold_folder(tmp_path).__enter__()


def test_a_folder_that_was_deleted_meanwhile_is_the_next_one_s(tmp_path):
    with hold_folder(tmp_path / "run"):
        (tmp_path / "run" / LOCK).unlink()
        with hold_folder(tmp_path / "run"):
            pass
        (tmp_path / "run" / LOCK).write_text("the next one's")
    assert (tmp_path / "run" / LOCK).exists()


def test_a_lock_that_is_a_link_writes_nowhere(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(SettingsError, match="cannot write"):
        hold_folder(tmp_path / "run").__enter__()
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_file_system_without_locks_costs_a_warning(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(folder_lock.fcntl, "flock", none)
    with hold_folder(tmp_path):
        assert "has no locks" in caplog.text


def test_all_processes_hear_of_it(tmp_path, monkeypatch):
    class Ranks:
        num_processes = 2

        def __init__(self, first: bool):
            self.is_main_process = first

    sent = []
    monkeypatch.setattr(folder_lock, "broadcast_object_list", lambda values: sent or values)
    with (
        hold_folder(tmp_path, accelerator=Ranks(True)),
        hold_folder(tmp_path, accelerator=Ranks(False)),
    ):
        assert (tmp_path / LOCK).exists()
    sent.append("output_dir: process 7 on another machine is writing there")
    with pytest.raises(SettingsError, match="process 7"):
        hold_folder(tmp_path, accelerator=Ranks(False)).__enter__()


def test_the_record_is_readable_while_it_is_held(tmp_path):
    with hold_folder(tmp_path):
        record = folder_lock.json.loads((tmp_path / LOCK).read_text())
    assert record["pid"] == os.getpid() and abs(record["since"] - time.time()) < 60
