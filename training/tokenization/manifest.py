"""tokenization.json: how a folder of codes was made, and of what; checked when a command continues there."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pyarrow.parquet

from hub_cards.tokenizer_card import is_hub_id
from training.data.source import DataSettings
from training.runtime.settings import SettingsError
from training.tokenization.code_files import list_code_files, read_record
from training.tokenization.encoders import MANIFEST

# Settings that older manifests do not have, and what they meant.
NEWER = {"dtype": "float32", "compile": False, "num_quantizers": 1}


def make_plan(settings, data: DataSettings, weights: str) -> dict:
    """Plan of a tokenization: what must be the same for two runs to write the same files.

    Args:
        settings: TokenizeSettings.
        weights: weights_hash of the model.
    """
    own = dataclasses.asdict(settings)
    names = ("splits", "batch_size", "rows_per_file", "flips", "crops", "seed", *NEWER)
    kept = {name: own[name] for name in names}
    kept |= {"dataset": data.dataset if is_hub_id(data.dataset) else Path(data.dataset).name}
    names = (
        "config_name",
        "revision",
        "max_train_samples",
        "resolution",
        "sampling_rate",
        "streaming",
    )
    kept |= {k: getattr(data, k) for k in names if hasattr(data, k)}
    return kept | {"weights": weights}


def check_manifest(folder: Path, plan: dict) -> None:
    """Begin or continue in a folder.

    Raises:
        SettingsError: if it holds codes of other settings, or files of another origin.
    """
    path = folder / MANIFEST
    if path.is_file():
        try:
            before = NEWER | dict(json.loads(path.read_text()))
        except (ValueError, TypeError):
            raise SettingsError(
                f"output: {path}, which tells how the codes there were made, is damaged: delete the "
                "folder, or take another"
            ) from None
        differing = [k for k in plan if before.get(k) != plan[k]]
        if differing:
            changes = ", ".join(f"{k} was {before.get(k)!r}, is {plan[k]!r}" for k in differing)
            raise SettingsError(
                f"output: {folder} holds codes of other settings ({changes}): take another"
            )
    elif (folder / "README.md").exists() or (folder / "data").exists():
        raise SettingsError(
            f"output: {folder} holds files that this command did not write: take another"
        )
    write_manifest(folder, plan)


def write_manifest(folder: Path, content: dict) -> None:
    """Write the manifest whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(unfinished, path)


def account_for(folder: Path, split: str, count: int) -> tuple[dict, int, int]:
    """Check that each row of the source is in the files of a split, or among those that could not be read.

    Returns:
        Length and digest of the source for the manifest, rows of codes, and rows that could not be read.

    Raises:
        ValueError: if rows are missing or double.
    """
    files = list_code_files(folder, split)
    records = [read_record(path) for path in files.values()]
    rows = sum(record.rows for record in records)
    if rows != count or list(files) != list(range(len(files))):
        raise ValueError(
            f"{folder}: the files of {split} account for {rows:,} rows of the source, which has {count:,}: it "
            "was changed meanwhile. Give the same command again"
        )
    digest = hashlib.blake2b("".join(r.contents for r in records).encode(), digest_size=16)
    made = sum(pyarrow.parquet.read_metadata(path).num_rows for path in files.values())
    unreadable = sum(record.unreadable for record in records)
    return {"rows": count, "digest": digest.hexdigest()}, made, unreadable
