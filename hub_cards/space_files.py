"""The files of a Space that shows given checkpoints."""

import json
from pathlib import Path

SPACE = Path(__file__).resolve().parent / "space"


def space_files(space_id: str, checkpoints: list[str], made: Path) -> dict[str, Path]:
    """Path in the Space to file here: the app, and the list of checkpoints written to the folder `made`."""
    listed = made / "checkpoints.json"
    listed.write_text(json.dumps(checkpoints, indent=2) + "\n")
    files = {
        path.name: path for path in SPACE.iterdir() if path.is_file() and path.name != listed.name
    }
    return files | {listed.name: listed}
