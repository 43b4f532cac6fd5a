"""Cards as people see them: a page, and a picture of it where there is a browser. Kept after the test run."""

import os
import re
import shutil
from pathlib import Path

from markdown_it import MarkdownIt

STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 50em; margin: 2em auto; color: #222; }
pre { background: #f4f4f6; padding: 1em; overflow-x: auto; } code { font-size: 14px; }
table { border-collapse: collapse; } td, th { border: 1px solid #ccc; padding: .3em .8em; }
img { max-width: 100%; } .metadata { color: #777; font-size: 13px; }
"""
# Without these a browser started by root, or without the internet, does not start or keeps asking for updates.
BROWSER = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
BROWSER += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


def artefacts() -> Path:
    """Folder that outlives the test run."""
    default = Path(__file__).parents[2] / "test_artefacts"
    folder = Path(os.environ.get("SIMVQ_ARTEFACTS", default))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def browser_path() -> str | None:
    """Chromium, if the machine has one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


def keep_card(name: str, files: dict[str, bytes]) -> Path:
    """Render a repository's README.md with its pictures to NAME/card.html, and to card.png by a browser."""
    folder = artefacts() / name
    shutil.rmtree(folder, ignore_errors=True)
    for path, content in files.items():
        if path == "README.md" or path.startswith("samples/"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
    metadata, text = re.match(r"---\n(.*?)\n---\n(.*)", files["README.md"].decode(), re.S).groups()
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    page = f"<meta charset=utf-8><style>{STYLE}</style><pre class=metadata>{metadata}</pre>{html}"
    (folder / "card.html").write_text(page)
    if chromium := browser_path():
        from playwright.sync_api import sync_playwright

        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=chromium, args=BROWSER)
            tab = browser.new_page(viewport={"width": 1000, "height": 800})
            tab.goto((folder / "card.html").as_uri())
            tab.screenshot(path=folder / "card.png", full_page=True)
            browser.close()
    return folder
