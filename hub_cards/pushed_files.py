"""The list, kept in a repository, of the files that our pushes wrote there: no other is ever deleted."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from huggingface_hub.hf_api import RepoSibling

# A dot in front: Datasets takes such a file for no data.
LIST_FILE = ".simvq_pushed_files.json"
MOST_LIST_BYTES = 10 << 20
# What the Hub itself puts into a repository.
OF_THE_HUB = {".gitattributes", LIST_FILE}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Beside a tokenizer: the discriminator that it was trained against.
DISCRIMINATOR, DISCRIMINATOR_SIZES = f"discriminator/{SINGLE}", "discriminator/config.json"


class Fingerprint(NamedTuple):
    """Identity of a file: its size, sha256 (the Hub's name of a large file) and git's hash (of a small one)."""

    size: int
    sha256: str
    blob_id: str

    @classmethod
    def of_file(cls, path: Path) -> "Fingerprint":
        size = path.stat().st_size
        sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                sha256.update(block)
                git.update(block)
        return cls(size, sha256.hexdigest(), git.hexdigest())

    def is_of(self, sibling: RepoSibling) -> bool:
        """Tell whether a file on the Hub has this content."""
        if sibling.lfs:
            return sibling.lfs.sha256 == self.sha256
        return sibling.blob_id == self.blob_id and sibling.size in (None, self.size)


@dataclass
class Changes:
    """Changes that a push makes to a repository.

    Attributes:
        send: paths whose content is not there yet.
        delete: paths that an earlier push wrote, that are unchanged since, and that are not sent any more; and
            weights in one file that are sent sharded now.
        notes: lines on everything that the push replaces or leaves although one might not expect it.
    """

    send: list[str]
    delete: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def write_list(path: Path, fingerprints: dict[str, Fingerprint]) -> None:
    """Write the list of a push: path in the repository to the fingerprint of what was sent."""
    about = (
        "Files that a push by this tool wrote. A later push deletes those that it no longer sends, if they "
        "are unchanged, and nothing else."
    )
    files = {name: fingerprints[name]._asdict() for name in sorted(fingerprints)}
    path.write_text(json.dumps({"about": about, "files": files}, indent=1) + "\n")


def read_list(path: Path) -> dict[str, Fingerprint]:
    """Read the list of an earlier push.

    Raises:
        ValueError: if it is damaged.
    """
    if path.stat().st_size > MOST_LIST_BYTES:
        raise ValueError("it is larger than any such list")
    try:
        files = json.loads(path.read_text())["files"]
        found = {name: Fingerprint(**entry) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("it is no list of files") from error
    if not all(isinstance(print_.sha256, str) for print_ in found.values()):
        raise ValueError("it is no list of files")
    return found


def plan_changes(
    there: dict[str, RepoSibling],
    wanted: dict[str, Fingerprint],
    listed: dict[str, Fingerprint] | None,
) -> Changes:
    """Decide what to send and what to delete.

    Args:
        there: path to what the repository holds.
        wanted: path to what it is to hold.
        listed: what an earlier push wrote; None if the repository has no list, or a damaged one.
    """
    changes = Changes(
        [
            name
            for name, print_ in wanted.items()
            if name not in there or not print_.is_of(there[name])
        ]
    )
    before = listed or {}
    for name in sorted(there.keys() - wanted.keys() & before.keys()):
        if before[name].is_of(there[name]):
            changes.delete.append(name)
        else:
            changes.notes.append(f"keeps {name}, which was changed on the Hub since it was pushed")
    for name in wanted:
        folder, slash, last = name.rpartition("/")
        single = folder + slash + SINGLE
        if last == INDEX and single in there and single not in {*wanted, *changes.delete}:
            # Sharded weights replace those in one file, which every loader would prefer to them.
            changes.delete.append(single)
            changes.notes = [
                note for note in changes.notes if not note.startswith(f"keeps {single},")
            ]
            changes.notes.append(f"replaces {single} by {name}")
    for name in sorted(set(changes.send) & there.keys() - OF_THE_HUB):
        if name not in before:
            changes.notes.append(f"replaces {name}, which no push listed there wrote")
        elif not before[name].is_of(there[name]):
            changes.notes.append(
                f"replaces {name}, which was changed on the Hub since it was pushed"
            )
    left = sorted(there.keys() - wanted.keys() - OF_THE_HUB - set(changes.delete))
    if listed is None and left:
        shown = ", ".join(left[:8]) + (f" and {len(left) - 8} more" if len(left) > 8 else "")
        changes.notes.append(
            f"deletes nothing, as there is no list of what earlier pushes wrote, and leaves {shown}"
        )
    return changes
