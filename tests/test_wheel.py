"""The wheel alone, with nothing but what it depends on: the command line on a photograph and a recording."""

import subprocess
import sys
import zipfile
from importlib.metadata import distribution, requires
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import soundfile
import soxr
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from tests.support.programs import REPOSITORY

CHECKPOINTS = REPOSITORY / "hub_cards" / "checkpoints"
PROGRAM = """
import sys

wheel, packages, *arguments = sys.argv[1:]
sys.path[:0] = [wheel, packages]
import modeling_simvq.__main__ as program
assert program.__file__.startswith(wheel), program.__file__
sys.exit(program.main(arguments))
"""


def dependencies(name: str, found: set[str]) -> set[str]:
    """Names of what a distribution needs without extras, and what that needs."""
    for text in requires(name) or ():
        needed = Requirement(text)
        wanted = needed.marker is None or needed.marker.evaluate({"extra": ""})
        if wanted and canonicalize_name(needed.name) not in found:
            found.add(canonicalize_name(needed.name))
            dependencies(needed.name, found)
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel's content."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    source = folder / "source"  # building leaves files behind
    source.mkdir()
    for name in ("modeling_simvq", "pyproject.toml", "README.md"):
        (source / name).symlink_to(REPOSITORY / name)
    subprocess.run([*build, "--wheel-dir", str(folder), str(source)], check=True)
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "content")
    return folder / "content"


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """A folder that has the packages on which the wheel depends, and no others."""
    folder = tmp_path_factory.mktemp("packages")
    for name in dependencies("modeling-simvq", set()):
        for file in distribution(name).files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(distribution(name).locate_file(top))
    return folder


@pytest.mark.slow
def test_the_command_line_needs_the_wheel_and_its_dependencies_only(wheel, packages, tmp_path):
    (entry_points,) = wheel.glob("*.dist-info/entry_points.txt")
    assert "simvq = modeling_simvq.__main__:main" in entry_points.read_text()
    assert not (packages / "soundfile.py").exists() and not (packages / "datasets").exists()
    Image.fromarray(skimage.data.chelsea()[:200, :200]).save(tmp_path / "cat.png")
    samples, rate = soundfile.read(REPOSITORY / "hub_cards" / "speech_sample.flac")
    samples = soxr.resample(samples, rate, 16_000)
    soundfile.write(tmp_path / "speech.wav", samples, 16_000)

    def simvq(*arguments) -> None:
        # -S: without the packages that are installed.
        words = [sys.executable, "-S", "-c", PROGRAM, wheel, packages, *arguments]
        subprocess.run([*map(str, words)], check=True, cwd=tmp_path)

    for model, name in (("simvq-image-small", "cat.png"), ("simvq-speech-small", "speech.wav")):
        simvq("reconstruct", name, "--model", CHECKPOINTS / model, "--output", "out")
    assert Image.open(tmp_path / "out/cat.png").size == (200, 200)
    error = (
        np.asarray(Image.open(tmp_path / "out/cat.png")) - skimage.data.chelsea()[:200, :200] / 1
    )
    assert 20 * np.log10(255 / np.sqrt(np.square(error).mean())) > 22  # dB
    assert soundfile.info(tmp_path / "out/speech.wav").frames == len(samples)
