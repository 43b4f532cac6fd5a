"""onnxruntime-web for a page: the files that a static Space carries."""

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from hub_cards.user_error import UserError

PACKAGE = "onnxruntime-web@1.30.0"
# Name on the page to name in the package's folder dist/ and its sha256. Not every server of static files knows
# the suffix .mjs, and browsers run no module that is sent as another type.
FILES = {
    "ort.js": (
        "ort.wasm.bundle.min.mjs",
        "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    ),
    "ort.wasm": (
        "ort-wasm-simd-threaded.wasm",
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    ),
}


class RuntimeMissing(UserError):
    """onnxruntime-web cannot be had. The message says why, and what to do."""


def copy_runtime(output: Path, folder: Path | None = None) -> None:
    """Write the files of onnxruntime-web to a new folder.

    Args:
        folder: dist/ of an installed package, of any version. By default npm fetches the version that this
            page was tested with.

    Raises:
        RuntimeMissing: if there is no npm, it cannot fetch the package, or a file is missing or another.
    """
    output.mkdir()
    if folder is not None:
        for name, (source, _) in FILES.items():
            if not (folder / source).is_file():
                raise RuntimeMissing(f"{folder} holds no {source}: give dist/ of onnxruntime-web")
            shutil.copyfile(folder / source, output / name)
        return
    with (
        tempfile.TemporaryDirectory(prefix="simvq-runtime-") as made,
        tarfile.open(_packed(Path(made))) as package,
    ):
        for name, (source, digest) in FILES.items():
            content = package.extractfile(f"package/dist/{source}").read()
            if hashlib.sha256(content).hexdigest() != digest:
                raise RuntimeMissing(f"{source} of {PACKAGE} is not the file that was tested")
            (output / name).write_bytes(content)


def _packed(folder: Path) -> Path:
    """Let npm fetch the package into a folder."""
    npm = shutil.which("npm")
    remedy = "or give --runtime, dist/ of an installed onnxruntime-web"
    if npm is None:
        raise RuntimeMissing(
            f"npm fetches {PACKAGE} and is not installed: install Node.js, {remedy}"
        )
    command = [npm, "pack", PACKAGE, "--pack-destination", str(folder), "--silent"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise RuntimeMissing(f"npm could not fetch {PACKAGE}: {said}. Try again, {remedy}")
    return next(folder.glob("*.tgz"))
