"""Files of a folder that make up a dataset and its splits: by literal rules, none left out in silence.

Files: those that the decoder reads, by extension or, where the extension does not tell, by content. Links are
followed; a zip archive counts as a folder of its name.
Splits: the folders directly below the root (or below the one folder that holds everything), if all of them are
named like splits, or if the settings ask for one of them by name. Otherwise everything is one split, "train".
Words in a file's name never matter. Only tables and tar archives, which hold many samples each, may have names
of splits: train.parquet, validation-00000-of-00002.parquet, test-0001.tar.
"""

import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

# Names of splits, and what else they go by, as on the Hub.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
USUAL_NAMES = {name for names in SPLITS.values() for name in names}
TABLES = {".parquet": "parquet", ".arrow": "arrow"}
TEXT_TABLES = {".csv": "csv", ".json": "json", ".jsonl": "json"}
ARCHIVES = {".tar": "webdataset"}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Not opened to see what they hold: texts that often accompany every sample, copies and unfinished downloads.
PLAIN = {
    ".bak",
    ".crdownload",
    ".csv",
    ".download",
    ".html",
    ".json",
    ".jsonl",
    ".lab",
    ".md",
    ".npy",
}
PLAIN |= {".orig", ".part", ".py", ".srt", ".tmp", ".tsv", ".txt", ".vtt", ".xml", ".yaml", ".yml"}
_SHARD = re.compile(r"(.+?)(?:[-_.]\d+(?:[-_]of[-_]\d+)?)?(?:-[0-9a-f]{16})?")


@dataclass
class FolderFiles:
    """Files of a folder by what they are: paths below the root with "/", sorted.

    Attributes:
        media: files of the kind that was looked for; members of a zip archive as ARCHIVE/MEMBER.
        members: of those in archives, what a cell holds.
        tables, text_tables, archives: files of many samples; archives are tar files of WebDataset.
        metadata: tables beside the files that describe them.
        left_out: everything else.
        sizes: of the media, in bytes.
    """

    root: str
    media: list[str] = field(default_factory=list)
    members: dict[str, str] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    text_tables: list[str] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)

    def cell_path(self, path: str) -> str:
        """Return what the cell of a file holds as its path."""
        return self.members.get(path) or f"{self.root}/{path}"


def list_folder(
    root: Path, extensions: frozenset[str], reads: Callable[[BinaryIO], bool]
) -> FolderFiles:
    """Sort the files of a folder.

    Args:
        extensions: of files of the kind, lower case.
        reads: whether an open file, whose extension does not tell, is of the kind.
    """
    found = FolderFiles(str(root))
    places = [(name, found.tables) for name in TABLES]
    places += [(name, found.text_tables) for name in TEXT_TABLES]
    places += [(name, found.archives) for name in ARCHIVES]
    by_extension = dict(places)
    for path, size in _walk(str(root), found.left_out):
        name = path.rpartition("/")[2]
        extension = os.path.splitext(name)[1].lower()
        if name.startswith(".") or not _is_text(path):
            found.left_out.append(path)
        elif name in METADATA:
            found.metadata.append(path)
        elif extension == ".zip" and (members := _members(root, path, extensions)) is not None:
            for member, cell, member_size in members:
                if cell is None:
                    found.left_out.append(member)
                else:
                    found.media.append(member)
                    found.members[member] = cell
                    found.sizes[member] = member_size
        elif extension in extensions or _reads(root / path, extension, reads, by_extension):
            found.media.append(path)
            found.sizes[path] = size
        else:
            by_extension.get(extension, found.left_out).append(path)
    for paths in (found.media, found.metadata, found.left_out, *by_extension.values()):
        paths.sort()
    return found


def _walk(root: str, left_out: list[str]) -> Iterator[tuple[str, int]]:
    """Regular files below a folder, and their sizes; unreadable folders and circles of links are left out."""
    # A list instead of recursion: folders may lie deeper than Python's stack reaches.
    folders: list[tuple[str, frozenset]] = [("", frozenset())]
    while folders:
        below, above = folders.pop()
        try:
            status = os.stat(f"{root}/{below}")
            here = (status.st_dev, status.st_ino)
            if here in above:  # a link to a folder above
                left_out.append(below)
                continue
            with os.scandir(f"{root}/{below}") as entries:
                for entry in entries:
                    path = f"{below}{entry.name}"
                    if entry.is_dir():
                        if entry.name.startswith(".") or entry.name == "__MACOSX":
                            left_out.append(f"{path}/")
                        else:
                            folders.append((f"{path}/", above | {here}))
                    elif entry.is_file():
                        yield path, entry.stat().st_size
                    else:  # a pipe, a device, a link to nothing
                        left_out.append(path)
        except OSError:
            if not below:
                raise
            left_out.append(below)


def _is_text(path: str) -> bool:
    """Tell whether a name can be stored in a table, which needs Unicode."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _reads(path: Path, extension: str, reads: Callable[[BinaryIO], bool], known: Iterable) -> bool:
    if extension in PLAIN or extension in known or path.name.endswith("~"):
        return False
    try:
        with path.open("rb") as file:
            return reads(file)
    except OSError:
        return False


def _members(
    root: Path, path: str, extensions: frozenset[str]
) -> list[tuple[str, str | None, int]] | None:
    """Files in a zip archive, what their cells hold and their sizes; None if it is none."""
    found = []
    try:
        with zipfile.ZipFile(root / path) as archive:
            for member in archive.infolist():
                name = member.filename
                parts = name.split("/")
                if member.is_dir():
                    continue
                wanted = os.path.splitext(name)[1].lower() in extensions and not any(
                    part.startswith(".") or part == "__MACOSX" for part in parts
                )
                cell = f"zip://{name}::{root}/{path}" if wanted and _is_text(name) else None
                found.append((f"{path}/{name}", cell, member.file_size))
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return None
    return found


@dataclass
class Splits:
    """Files by split.

    Attributes:
        files: name of the split to its files.
        root: what they have in common with one another: the folder that holds the split folders.
        named: whether the names are those of folders or files.
        left_out: files that belong to none.
        note: why folders that are named like splits are not taken for such; empty if there are none.
    """

    files: dict[str, list[str]]
    root: str
    named: bool
    left_out: list[str]
    note: str = ""

    def find(self, name: str) -> str | None:
        """Name of the split that is meant: the same, in other letters, or the only one that means the same."""
        if name in self.files:
            return name
        same = [found for found in self.files if found.casefold() == name.casefold()]
        if len(same) != 1:
            names = next((names for names in SPLITS.values() if name in names), ())
            same = [found for found in self.files if found.casefold() in names]
        return same[0] if len(same) == 1 else None


def split_files(files: Iterable[str], asked: Iterable[str], many: bool, folders: dict) -> Splits:
    """Sort files by split.

    Args:
        asked: names of splits in the settings.
        many: whether each of the files holds many samples, so that its own name may be a split's.
        folders: what a folder is called in place of its name; an archive counts as a folder.
    """
    files, asked = list(files), set(asked)
    usual = USUAL_NAMES | {name.casefold() for name in asked}

    def unit(path: str, root: str) -> str:
        head, inside, _ = path[len(root) :].partition("/")
        if inside:
            return folders.get(root + head, head).removeprefix("split=")
        stem = os.path.splitext(head)[0] if many else ""
        shard = None if stem.casefold() in usual else _SHARD.fullmatch(stem)
        return shard.group(1) if shard else stem

    root = ""
    while True:
        units = [unit(path, root) for path in files]
        names = set(units)
        if len(names) != 1 or "" in names or units[0].casefold() in usual:
            break
        heads = {path[len(root) :].partition("/")[:2] for path in files}
        if len(heads) != 1 or not next(iter(heads))[1]:
            break
        root += f"{next(iter(heads))[0]}/"
    found = {name for name in names - {""} if name.casefold() in usual}
    named = bool(found) and (
        found == names - {""} or bool({n for n in found if n in asked and n not in USUAL_NAMES})
    )
    if not named:
        others = sorted(names - found - {""})[:3]
        note = (
            f"{', '.join(sorted(found))} beside {', '.join(others)}: not all are named like splits, so all "
            "together are one split, 'train'"
        )
        return Splits({"train": files}, root, False, [], note if found else "")
    splits: dict[str, list[str]] = {name: [] for name in sorted(found)}
    left_out = []
    for path, name in zip(files, units, strict=True):
        splits.get(name, left_out).append(path)
    return Splits(splits, root, True, left_out)


def label_names(splits: Splits, folders: dict) -> list[str]:
    """Classes: names of the folders of files, if there are several and all files lie equally deep.

    A split without folders, such as a test set whose classes nobody tells, does not count.
    """
    labels, depths = set(), set()
    for files in splits.files.values():
        own = {(label_of(path, splits, folders), path.count("/")) for path in files}
        if {label for label, _ in own} != {""}:
            labels |= {label for label, _ in own}
            depths |= {depth for _, depth in own}
    return sorted(labels) if len(labels) > 1 and len(depths) == 1 else []


def label_of(path: str, splits: Splits, folders: dict) -> str:
    """Name of a file's folder; empty directly in the folder of a split."""
    folder = path.rpartition("/")[0]
    inside = folder[len(splits.root) :]
    if not inside or (splits.named and "/" not in inside):
        return ""
    return folders.get(folder, folder.rpartition("/")[2])
