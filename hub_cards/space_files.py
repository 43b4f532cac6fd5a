"""The files of a Space that shows given checkpoints."""

import json
import shutil
from pathlib import Path

SPACE = Path(__file__).resolve().parent / "space"


def space_files(checkpoints: list[str], made: Path) -> dict[str, Path]:
    """Path in the Space to file here: a copy of the app with the list of checkpoints, in made/space."""
    folder = made / "space"
    folder.mkdir()
    for path in SPACE.iterdir():
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    (folder / "checkpoints.json").write_text(json.dumps(checkpoints, indent=2) + "\n")
    return {path.name: path for path in sorted(folder.iterdir())}
