"""Write one page of what both demos found, images and audio players in it: index.html.

python -m training.demo.sheet OUTPUT_DIR
"""

import argparse
import base64
import json
from pathlib import Path

from jinja2 import Environment

TEMPLATE = Path(__file__).with_name("sheet.html")
TYPES = {".png": "image/png", ".wav": "audio/wav"}


def write_sheet(folder: Path) -> Path:
    """Write index.html from what the demos left in image/ and audio/, and return it. It stands alone."""

    def file(name: str) -> str:
        path = folder / name
        content = base64.b64encode(path.read_bytes()).decode()
        return f"data:{TYPES[path.suffix]};base64,{content}"

    def figures(name: str) -> dict | None:
        path = folder / name / "figures.json"
        return json.loads(path.read_text()) if path.is_file() else None

    page = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text())
    path = folder / "index.html"
    path.write_text(page.render(image=figures("image"), audio=figures("audio"), file=file))
    return path


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.demo.sheet", description=__doc__.splitlines()[0]
    )
    parser.add_argument("output_dir", type=Path, help="folder with image/ and audio/ of the demos")
    options = parser.parse_args()
    print(f"\nto look at and listen to: {write_sheet(options.output_dir)}")


if __name__ == "__main__":
    main()
