"""The static Space, served and opened in a browser."""

import base64
import functools
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from hub_cards import browser_runtime, browser_space
from tests.hub_cards.artefacts import artefacts


@contextmanager
def served(folder: Path, headers: dict[str, str]) -> Iterator[str]:
    """Serve a folder with further headers; give its address."""

    class Handler(SimpleHTTPRequestHandler):
        def end_headers(self):
            for name, value in headers.items():
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Tab:
    """One tab of the page, in a browser."""

    def __init__(self, page, kind: str):
        self.page, self.root = page, page.locator(f"#{kind}")

    def give(self, where: str, path: Path) -> None:
        """Put in a file and wait until it is worked on."""
        self.root.locator(f"input.{where}").set_input_files(path)
        self.wait()

    def wait(self) -> None:
        self.page.wait_for_function("!document.querySelector('[aria-busy=true]')", timeout=60_000)

    def told(self) -> str:
        """Return the error that is shown, if any."""
        error = self.root.locator(".error")
        return error.inner_text() if error.is_visible() else ""

    def figures(self) -> dict[str, str]:
        names, values = (
            self.root.locator(f".figures {tag}").all_inner_texts() for tag in ("dt", "dd")
        )
        return dict(zip(names, values, strict=True))

    def picture(self, name: str) -> np.ndarray:
        """Return the pixels (H, W, 3) of a canvas."""
        address = self.root.locator(f"canvas.{name}").evaluate("canvas => canvas.toDataURL()")
        content = base64.b64decode(address.partition(",")[2])
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

    def saved(self, name: str, path: Path) -> Path:
        """Click on a link and save what it gives."""
        with self.page.expect_download() as download:
            self.root.locator(f".save-{name}").click()
        download.value.save_as(path)
        return path


@contextmanager
def visited(browser, folder: Path, kind: str, model: str, isolated: bool) -> Iterator[Tab]:
    """Assemble a Space of one tokenizer and open it, with or without the headers that it asks for."""
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    try:
        browser_space.assemble(folder / "space", {kind: model})
    except browser_runtime.RuntimeMissing as error:
        pytest.skip(str(error))
    front = (folder / "space" / "README.md").read_text().split("---\n")[1]
    headers = yaml.safe_load(front)["custom_headers"] if isolated else {}
    with served(folder / "space", headers) as address:
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        requested, said = [], []
        page.on("request", lambda request: requested.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(address)
        assert page.evaluate("crossOriginIsolated") == isolated
        cores = page.evaluate("navigator.hardwareConcurrency")
        yield Tab(page, kind)
        page.screenshot(path=artefacts() / f"browser_space_{Path(model).name}.png", full_page=True)
        page.set_viewport_size({"width": 390, "height": 844})
        page.screenshot(
            path=artefacts() / f"browser_space_{Path(model).name}_phone.png", full_page=True
        )
        assert not [text for text in said if "503" not in text]
        # Each thread reads the runtime; without the headers there is one.
        read = sum(url.endswith("/runtime/ort.js") for url in requested)
        assert read == (min(4, cores) if isolated else 1)
        assert not [url for url in requested if not url.startswith((address, "data:", "blob:"))]
