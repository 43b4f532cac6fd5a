"""Weights from the Hub are compared with their sha256 before they are loaded.

The Hub's client takes whatever bytes arrive if their number is right. It stores a large file under the sha256
that the Hub told, so the comparison needs no further request and works offline too.
"""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

logger = logging.getLogger(__name__)

_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
TRIES = 3
PAUSE_SECONDS = 1.0
_PLACE = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


class VerifiedDownload:
    """Mixin of PreTrainedModel classes: from_pretrained refuses damaged weights, and those of another model."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load as PreTrainedModel does. Damaged weights are fetched again, once; only safetensors are read.

        No weight starts at random under a report alone: weights that lack a tensor, or have one too many, are
        refused unless ``output_loading_info=True`` asks for the report, or ``ignore_mismatched_sizes=True``
        for new weights.

        Raises:
            OSError: if what the Hub sends does not have the sha256 that the Hub names, if the weights are
                damaged; also as of PreTrainedModel.
            ValueError: if they are not the weights of the model that the configuration describes.
        """
        name = pretrained_model_name_or_path
        kwargs.setdefault("use_safetensors", True)  # pickled weights could run code
        file, variant = None, kwargs.get("variant")
        if name is not None and os.path.isdir(name):
            folder = Path(name) / (kwargs.get("subfolder") or "")
            verify_snapshot(folder)
            single, index = (folder / _with_variant(file, variant) for file in _FILES)
            file = single if single.is_file() else index if index.is_file() else None
            if file == index:
                _shards(index, str(name))
        elif name is not None and not os.path.exists(name) and kwargs.get("state_dict") is None:
            place = {key: kwargs[key] for key in _PLACE if kwargs.get(key) is not None}
            # The commit of the configuration, where there is one: a branch may move in between.
            commit = kwargs.get("_commit_hash") or getattr(
                kwargs.get("config"), "_commit_hash", None
            )
            place |= {"revision": commit} if commit else {}
            file = verify_weights(str(name), variant, **place)
            kwargs.pop("force_download", None)  # it is done
        report_wanted = kwargs.pop("output_loading_info", False)
        try:
            stored = kwargs.get("state_dict")
            stored = _names(file) if stored is None and file is not None else stored
            model, report = cls._load(stored, name, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(f"the weights of {name} are damaged: {error}") from error
        if report_wanted:
            return model, report
        if not kwargs.get("ignore_mismatched_sizes"):
            _refuse_other_weights(name, report)
        return model

    @classmethod
    def _load(cls, stored: Iterable[str] | None, name, *args, **kwargs) -> tuple:
        """Model and report; ``stored`` are the names of the tensors that will be read, where they are known."""
        return super().from_pretrained(name, *args, output_loading_info=True, **kwargs)


def _refuse_other_weights(name: str | os.PathLike | None, report: dict) -> None:
    faults = []
    for key, what in (
        ("missing_keys", "{} missing, which would start at random"),
        ("unexpected_keys", "{} that the model has no place for"),
    ):
        names = sorted(map(str, report.get(key) or ()))
        if names:
            more = ", ..." if len(names) > 3 else ""
            faults.append(f"{what.format(len(names))} ({', '.join(names[:3])}{more})")
    if faults:
        raise ValueError(
            f"the weights of {name or 'state_dict'} do not fit the configuration: {' and '.join(faults)}. "
            "To load them nevertheless, pass output_loading_info=True, which returns (model, report)"
        )


def _names(file: str | Path) -> list[str]:
    """Names of the tensors in a file of weights, or of those that an index lists."""
    if str(file).endswith(".json"):
        return list(json.loads(Path(file).read_text())["weight_map"])
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def verify_weights(repo_id: str, variant: str | None = None, **place) -> str | None:
    """Download a repository's safetensors files, unless they are in the cache, and check all of them.

    Args:
        place: cache_dir, force_download, local_files_only, revision, subfolder, token.

    Returns:
        Path of the file, or of the index where the weights are sharded; None if there is neither.

    Raises:
        OSError: if a file is damaged even when it is fetched again, or cannot be fetched. A repository
            without safetensors is left to from_pretrained.
    """
    single, index = (_with_variant(name, variant) for name in _FILES)
    whole = _verified(repo_id, single, place)
    if whole is not None:
        return whole
    listed = _verified(repo_id, index, place)
    if listed is not None:
        for shard in _shards(Path(listed), repo_id):
            _verified(repo_id, shard, place)
    return listed


def verify_snapshot(folder: Path) -> None:
    """Check weights in a folder that snapshot_download, or diffusers, made: links into the client's cache.

    Raises:
        OSError: if one is damaged. It is removed, so that the next download fetches it.
    """
    for path in folder.glob("*.safetensors"):
        if path.is_symlink() and not _intact(str(path)):
            _remove(str(path))
            raise OSError(
                f"{path} is damaged: it does not have the sha256 that the Hub names. It is removed from the "
                "cache; download again"
            )


def _shards(index: Path, repo_id: str) -> list[str]:
    """Names of the files that an index lists; they lie beside it."""
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise OSError(f"{index.name} of {repo_id} is damaged: {error!r}") from error
    for shard in shards:
        if not isinstance(shard, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard):
            raise OSError(
                f"{index.name} of {repo_id} names {shard!r}, which is no file of weights beside it"
            )
    return shards


def _with_variant(name: str, variant: str | None) -> str:
    return name if variant is None else name.replace(".safetensors", f".{variant}.safetensors", 1)


def _verified(repo_id: str, name: str, place: dict) -> str | None:
    path = _fetch(repo_id, name, place)
    if path is None or _intact(path):
        return path
    _remove(path)
    logger.warning(f"{name} of {repo_id} is damaged: fetching it again")
    path = _fetch(repo_id, name, place)
    if path is None or _intact(path):
        return path
    _remove(path)
    raise OSError(
        f"{name} of {repo_id} is damaged: it does not have the sha256 that the Hub names. It is removed from "
        "the cache; load again when the connection, or the Hub, is in order"
    )


def _fetch(repo_id: str, name: str, place: dict) -> str | None:
    """Path in the cache, or None if the repository has no such file."""
    for number in range(TRIES):
        try:
            return cached_file(repo_id, name, _raise_exceptions_for_missing_entries=False, **place)
        except OSError as error:  # the client retries HEAD, but not GET
            response = getattr(error.__cause__, "response", None)
            if number + 1 == TRIES or response is None or response.status_code < 500:
                raise
            time.sleep(PAUSE_SECONDS * 2**number)


def _intact(path: str) -> bool:
    """False if the file's name in the cache is a sha256, and not its own."""
    blob = Path(os.path.realpath(path))
    if not re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return True  # a small file, or a cache without links: there is nothing to compare with
    with blob.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == blob.name


def _remove(path: str) -> None:
    for part in (os.path.realpath(path), path):
        Path(part).unlink(missing_ok=True)
