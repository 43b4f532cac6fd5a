"""Tokenised datasets on the Hub: a card, and codes in Parquet files, as the smallest integers that do."""

import hashlib
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value
from huggingface_hub import DatasetCard, DatasetCardData
from tqdm.auto import tqdm

from hub_cards.hub_commit import commit_files, full_name
from hub_cards.tokenizer_card import HUB_ID, PROJECT_TAGS, in_code, load_templates

CODE_COLUMNS = ("image_codes", "audio_codes")
SHARD_BYTES = 500_000_000
CHECKED_ROWS = 10_000  # at a time


def code_type(codebook_size: int) -> str:
    """Name of the smallest integer type that holds all codes: uint8, uint16 or uint32."""
    return np.min_scalar_type(codebook_size - 1).name


def content_digest(files: Iterable[Path]) -> str:
    """Return 32 hexadecimal digits of the names and the contents of files."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        digest.update(f"{path.name}\0{content.hexdigest()}\0".encode())
    return digest.hexdigest()


def make_dataset_card(
    repo_id: str,
    tokenizer: str,
    splits: dict[str, int],
    columns: list[str],
    *,
    codebook_size: int,
    num_quantizers: int = 1,
    of_quantizers: int | None = None,
    files: dict[str, list[str]] | None = None,
    digest: str | None = None,
    source: str | None = None,
    license: str | None = None,
) -> DatasetCard:
    """Fill the card of a tokenised dataset.

    Args:
        files: split to the paths of its files in the repository; by default all data/SPLIT-*.parquet.
        digest: content_digest of these files. Datasets keeps the rows of a local folder by its last name and by
            what its card says, so without one two folders called codes, or a folder before and after it has
            grown, would be the same to load_dataset.
        repo_id: Hub id; another name is that of a local folder, where the card's example is to be run.
        tokenizer: Hub id of the model that made the codes; another name is not shown.
        splits: name to number of rows.
        columns: of which one is image_codes or audio_codes.
        num_quantizers: Q, codes of a position; above 1 they are (Q, h, w) or (Q, T) in each row.
        of_quantizers: how many the tokenizer has, of which these are the first; Q by default.
        source: Hub id of the dataset that was tokenised.
        license: of the source.

    Raises:
        ValueError: if no column holds codes.
    """
    column = next((name for name in CODE_COLUMNS if name in columns), None)
    if column is None:
        raise ValueError(
            f"a tokenised dataset has a column {' or '.join(CODE_COLUMNS)}, got {columns}"
        )
    files = files or {name: [f"data/{name}-*.parquet"] for name in splits}
    data_files = [{"split": name, "path": paths} for name, paths in files.items()]
    config = {"config_name": "default", "data_files": data_files}
    if digest is not None:
        config["description"] = f"Codes with the digest {digest}"
    data = DatasetCardData(
        license=license,
        pretty_name=repo_id.split("/")[-1],
        source_datasets=[source] if source else None,
        tags=[*PROJECT_TAGS, column.replace("_codes", "-codes")],
        configs=[config],
    )
    text = (
        load_templates()
        .get_template("dataset_card.md")
        .render(
            card_data=data.to_yaml(),
            title=repo_id.split("/")[-1],
            place=repo_id if HUB_ID.fullmatch(repo_id) else None,
            tokenizer=tokenizer if HUB_ID.fullmatch(tokenizer) else None,
            source=source,
            codebook_size=codebook_size,
            num_quantizers=num_quantizers,
            of_quantizers=of_quantizers or num_quantizers,
            column=column,
            columns=", ".join(map(in_code, columns)),
            splits=list(splits.items()),
        )
    )
    return DatasetCard(text)


def push_tokens(
    splits: dict[str, Dataset],
    repo_id: str,
    tokenizer: str,
    *,
    codebook_size: int,
    num_quantizers: int = 1,
    of_quantizers: int | None = None,
    source: str | None = None,
    license: str | None = None,
    private: bool | None = None,
) -> str:
    """Publish a tokenised dataset in one commit. The same again changes nothing.

    Args:
        splits: name to rows with a column image_codes (h, w) or audio_codes (T,), and any others.
        num_quantizers: Q; above 1 the codes are (Q, h, w) or (Q, T).
        of_quantizers: how many the tokenizer has; Q by default.

    Returns:
        Address of the commit.

    Raises:
        ValueError: if no column holds codes, or one lies outside [0, codebook_size).
        HubError: as of commit_files.
    """
    repo_id = full_name(repo_id)  # before the files are written, which takes its time
    with tempfile.TemporaryDirectory(prefix="simvq-tokens-") as made:
        files = {
            name: _write_shards(_narrowed(rows, codebook_size), name, Path(made))
            for name, rows in splits.items()
        }
        return push_code_files(
            files,
            repo_id,
            tokenizer,
            codebook_size=codebook_size,
            num_quantizers=num_quantizers,
            of_quantizers=of_quantizers,
            source=source,
            license=license,
            private=private,
        )


def push_code_files(
    files: dict[str, list[Path]],
    repo_id: str,
    tokenizer: str,
    *,
    codebook_size: int,
    num_quantizers: int = 1,
    of_quantizers: int | None = None,
    source: str | None = None,
    license: str | None = None,
    private: bool | None = None,
) -> str:
    """Publish files of codes that tokenize_dataset wrote, as they are, in one commit: nothing is copied.

    Args:
        files: split to its Parquet files, whose codes have the type code_type.
        num_quantizers, of_quantizers: as of push_tokens.

    Returns:
        Address of the commit.

    Raises:
        ValueError: as of push_tokens, or if there is no file.
        HubError: as of commit_files.
    """
    repo_id = full_name(repo_id)
    names: list[str] = []
    sizes = dict.fromkeys(files, 0)
    paths = [(split, path) for split, some in files.items() for path in some]
    for split, path in tqdm(paths, desc="checking the codes", unit="file", leave=False):
        with pq.ParquetFile(path) as table:
            names = table.schema_arrow.names
            columns = [name for name in CODE_COLUMNS if name in names]
            for batch in table.iter_batches(CHECKED_ROWS, columns=columns):
                sizes[split] += batch.num_rows
                for name in columns:
                    _check_codes(batch.column(name), name, codebook_size)
    card = make_dataset_card(
        repo_id,
        tokenizer,
        sizes,
        names,
        codebook_size=codebook_size,
        num_quantizers=num_quantizers,
        of_quantizers=of_quantizers,
        # Others there, which may be anyone's, are not among the rows.
        files={split: [f"data/{path.name}" for path in some] for split, some in files.items()},
        digest=content_digest(path for _, path in paths),
        source=source,
        license=license,
    )
    with tempfile.TemporaryDirectory(prefix="simvq-card-") as made:
        page = Path(made) / "README.md"
        page.write_text(str(card))
        return commit_files(
            repo_id,
            {"README.md": page} | {f"data/{path.name}": path for _, path in paths},
            card=card,
            repo_type="dataset",
            private=private,
            message=f"Codes of {tokenizer}",
        )


def _check_codes(codes: pa.Array, name: str, codebook_size: int) -> None:
    """Raise ValueError if a code, in lists of any depth, is none of the tokenizer's."""
    while not pa.types.is_integer(codes.type):
        if not hasattr(codes, "flatten"):
            raise ValueError(f"{name} holds {codes.type}; codes are whole numbers")
        codes = codes.flatten()
    found = pc.min_max(codes).as_py()
    if len(codes) and not 0 <= (found["min"] or 0) <= (found["max"] or 0) < codebook_size:
        wrong = found["min"] if found["min"] < 0 else found["max"]
        raise ValueError(
            f"{name} holds {wrong}; codes of this tokenizer are 0 to {codebook_size - 1}"
        )


def _narrowed(rows: Dataset, codebook_size: int) -> Dataset:
    """The same rows with codes of the smallest type, each checked."""
    columns = [name for name in CODE_COLUMNS if name in rows.column_names]
    for batch in rows.select_columns(columns).with_format("arrow").iter(CHECKED_ROWS):
        for name in columns:
            for chunk in batch.column(name).chunks:
                _check_codes(chunk, name, codebook_size)

    def narrow(feature):
        if isinstance(feature, List):
            return List(narrow(feature.feature), length=feature.length)
        return Value(code_type(codebook_size))

    features = {k: narrow(v) if k in columns else v for k, v in rows.features.items()}
    return rows.cast(Features(features))


def _write_shards(rows: Dataset, split: str, folder: Path) -> list[Path]:
    count = max(1, -(-rows.data.nbytes // SHARD_BYTES))
    files = [folder / f"{split}-{index:05}-of-{count:05}.parquet" for index in range(count)]
    for index, file in enumerate(files):
        rows.shard(count, index, contiguous=True).to_parquet(file)
    return files
