"""Files of a checkpoint: a manifest that tells whole from damaged, safe loading, and the fit of weights."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hub_cards.user_error import UserError

MANIFEST = "manifest.json"
MOST_MANIFEST_BYTES = 1 << 20


class DamagedCheckpoint(UserError):
    """A checkpoint's files are not those that were written. The message names the first that is not."""


def let_others_read(folder: Path) -> None:
    """Give all files of a folder the permissions of new ones: safetensors writes for their owner alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~mask)


def seal(folder: Path) -> None:
    """Write the manifest of a folder and force all of it to the disk, so that a rename makes it final."""
    let_others_read(folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    with ThreadPoolExecutor(4) as pool:  # hashing leaves the interpreter free
        digests = list(pool.map(_digest, files))
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, digests, strict=True)
    }
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=1) + "\n")
    for path in [*folder.rglob("*"), folder]:
        flush_to_disk(path)


def verify(folder: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        DamagedCheckpoint: naming the file that is missing, short, changed, or not in the manifest.
    """
    entries = _read_manifest(folder)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    for name in sorted(found ^ {*entries, MANIFEST}):
        kind = "is missing" if name not in found else "is not in the manifest"
        raise DamagedCheckpoint(f"{name} {kind}")
    for name, entry in entries.items():
        path = folder / name
        # Only names that lie in the folder were found there; what they link to may lie elsewhere.
        if path.is_symlink() or not path.is_file():
            raise DamagedCheckpoint(f"{name} is no plain file")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise DamagedCheckpoint(f"{name} has {size:,} bytes instead of {entry['bytes']:,}")
    with ThreadPoolExecutor(4) as pool:
        digests = pool.map(_digest, [folder / name for name in entries])
    for (name, entry), digest in zip(entries.items(), digests, strict=True):
        if digest != entry["sha256"]:
            raise DamagedCheckpoint(f"{name} has other content than was written")


def unlisted(folder: Path) -> list[str]:
    """Files in a checkpoint's folder that its manifest does not name, so somebody else's."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    try:
        return sorted(found - {*_read_manifest(folder), MANIFEST})
    except DamagedCheckpoint:
        return sorted(found)


def _read_manifest(folder: Path) -> dict[str, dict]:
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MOST_MANIFEST_BYTES:
            raise DamagedCheckpoint(f"{MANIFEST} is larger than any manifest")
        entries = json.loads(path.read_text())["files"]
        for entry in entries.values():
            if not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
                raise TypeError
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, DamagedCheckpoint):
            raise
        raise DamagedCheckpoint(f"{MANIFEST} cannot be read") from None
    return entries


def check_fit(checkpoint: Path, modules: list[nn.Module]) -> None:
    """Compare names and shapes of weights with the modules of a run, from the headers of the files alone.

    Args:
        modules: in the order in which Accelerate numbers them.

    Raises:
        ValueError: naming the first tensor that does not fit.
        DamagedCheckpoint: if a file is no safetensors.
    """
    for number, module in enumerate(modules):
        path = checkpoint / f"model{f'_{number}' if number else ''}.safetensors"
        if not path.is_file():  # of a sharded model, which Accelerate writes in another way
            continue
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                saved = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise DamagedCheckpoint(f"{path.name} cannot be read: {error}") from None
        state = module.state_dict()
        kind, advice = type(module).__name__, "the model of this run is another one"
        for name, shape in saved.items():
            if name not in state:
                raise ValueError(f"{advice}: {kind} has no {name}, which is in the checkpoint")
            if tuple(state[name].shape) != shape:
                raise ValueError(
                    f"{advice}: {name} of {kind} is {tuple(state[name].shape)}, in the checkpoint {shape}. "
                    "Settings, tokenizer and classes of the data must give the same model"
                )
        # Of tensors that share their memory, one is saved.
        present = {state[name].data_ptr() for name in saved}
        for name, tensor in state.items():
            if name not in saved and tensor.numel() and tensor.data_ptr() not in present:
                raise ValueError(f"{advice}: {name} of {kind} is not in the checkpoint")


def load_tensors(path: Path, mapped: bool = False) -> dict:
    """A dict that torch.save wrote, of tensors, numbers and texts; objects that would run code are refused.

    Args:
        mapped: read tensors only when they are looked at.

    Raises:
        DamagedCheckpoint: if there is anything else in the file.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # unpicklers of hostile bytes raise nearly anything
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise DamagedCheckpoint(f"{path.name} cannot be loaded safely: {reason}") from None


def flush_to_disk(path: Path) -> None:
    """fsync of a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
