"""The Space as visitors meet it: a server of its own, and a browser."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.hub_cards.artefacts import BROWSER, browser_path

SPACE = Path(__file__).parents[2] / "hub_cards" / "space"


@contextmanager
def running_space(checkpoints: list[str], folder: Path) -> Iterator[str]:
    """Serve the Space from a copy of its files, with nothing of this repository to import; give its address."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    copy = folder / "space"
    shutil.copytree(SPACE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "checkpoints.json").write_text(json.dumps(checkpoints))
    blocked = folder / "blocked"
    blocked.mkdir()
    for name in ("modeling_simvq", "hub_cards", "training"):
        (blocked / f"{name}.py").write_text("raise ImportError('blocked in this test')")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(blocked),
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "GRADIO_TEMP_DIR": str(folder / "gradio"),
    }
    log = folder / "log.txt"
    command = [sys.executable, "app.py", "--port", str(port)]
    with log.open("w") as stream:
        server = subprocess.Popen(command, cwd=copy, env=environment, stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + 120
        while "The page is at" not in log.read_text():
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(20)
    # Bad input is told on the page: the log stays quiet.
    assert len(log.read_text().splitlines()) == 1, log.read_text()


@contextmanager
def chromium(*arguments: str) -> Iterator:
    """Start Debian's Chromium, headless; skip the test where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = browser_path()
    if program is None:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=[*BROWSER, *arguments])
        yield browser
        browser.close()
