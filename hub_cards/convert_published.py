"""Convert the authors' checkpoints, once they are downloaded, with cards that hold the figures they report.

  hf download zyx123/SimVQ --local-dir authors
  python hub_cards/convert_published.py authors converted                    all that are there
  python hub_cards/convert_published.py authors converted --push-to me      and publish them in this name
  python hub_cards/convert_published.py authors converted --only simvq-imagenet128-k65536

Every checkpoint becomes converted/NAME with model, processor, code, card, samples and evaluation.json, in which
the figures are marked as the authors'. We have not measured them.
"""

import argparse
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# As a command this file's folder is on the path, but hub_cards is imported from the one above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import transformers
import yaml
from tqdm import tqdm

from hub_cards.evaluation import FILE_NAME, Evaluation, write_evaluations
from hub_cards.push_to_hub import prepare_push, push_to_hub
from hub_cards.user_error import UserError
from modeling_simvq.convert_simvq_checkpoint import convert_simvq_checkpoint

MANIFEST = Path(__file__).resolve().parent / "published_checkpoints.yaml"


@dataclass
class Published:
    """One of the authors' checkpoints.

    Attributes:
        name: what the converted model is called.
        modality: "image" or "audio".
        folder: where it lies in the authors' repository.
        evaluations: the figures that the authors report.
        source: Hub id of the authors' repository.
    """

    name: str
    modality: str
    codebook_size: int
    folder: str
    evaluations: list[Evaluation]
    source: str
    license: str


def read_manifest(path: Path = MANIFEST) -> list[Published]:
    """The authors' checkpoints."""
    content = yaml.safe_load(path.read_text())
    return [_entry(item, content) for item in content["checkpoints"]]


def _entry(item: dict, content: dict) -> Published:
    evaluations = []
    for index, dataset in enumerate(content["datasets"][item["modality"]]):
        evaluations.append(
            Evaluation(
                dataset=dataset["name"],
                metrics={
                    key: value[index] if isinstance(value, list) else value
                    for key, value in item["metrics"].items()
                },
                dataset_id=dataset["id"],
                config=dataset.get("config"),
                split=dataset["split"],
                samples=dataset.get("samples"),
                protocol=content["protocols"][item["modality"]],
                source="authors",
            )
        )
    fields = {key: item[key] for key in ("name", "modality", "codebook_size", "folder")}
    return Published(
        **fields, evaluations=evaluations, source=content["source"], license=content["license"]
    )


def convert_published(
    published: Published, downloaded: Path, folder: Path, push_to: str | None = None
) -> str | None:
    """Convert one checkpoint, write its card, and publish it if asked.

    Args:
        downloaded: copy of the authors' repository.
        folder: where the model is written.
        push_to: account or organisation.

    Returns:
        Address of the commit, or None if it was not to be published.

    Raises:
        FileNotFoundError: if the checkpoint is not there.
        ValueError: if there are several, it is damaged, or it is another one than the manifest says.
    """
    found = sorted((downloaded / published.folder).rglob("*.ckpt"))
    if not found:
        raise FileNotFoundError(f"no .ckpt in {downloaded / published.folder}")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{downloaded / published.folder} holds several checkpoints: {names}")
    configs = sorted((downloaded / published.folder).rglob("config.yaml"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder first: what lies there already stays as it is if this is the wrong checkpoint.
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=folder.parent) as beside:
        model = convert_simvq_checkpoint(
            found[0], beside, original_config=configs[0] if configs else None
        )
        is_right = model.config.model_type == f"simvq_{published.modality}"
        if not is_right or model.config.codebook_size != published.codebook_size:
            raise ValueError(
                f"{found[0]} is a {model.config.model_type} model of {model.config.codebook_size} codes, "
                f"and not simvq_{published.modality} of {published.codebook_size}"
            )
        folder.mkdir(exist_ok=True)
        for path in Path(beside).iterdir():
            path.replace(folder / path.name)
    write_evaluations(folder / FILE_NAME, published.evaluations)
    origin = (
        "The weights are the authors' (averaged, as they evaluate them), converted from "
        f"`{published.folder}` of [{published.source}](https://huggingface.co/{published.source})."
    )
    options = {
        "with_code": True,
        "card_options": {
            "license": published.license,
            "base_model": published.source,
            "origin": origin,
        },
    }
    name = f"{push_to}/{published.name}" if push_to else published.name
    with tempfile.TemporaryDirectory(prefix="simvq-card-") as made:
        prepare_push(folder, name, Path(made), **options)
        shutil.copy(Path(made, "README.md"), folder / "README.md")
        shutil.copytree(Path(made, "samples"), folder / "samples", dirs_exist_ok=True)
    return push_to_hub(folder, name, **options) if push_to else None


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("downloaded", type=Path, help="copy of the authors' repository")
    parser.add_argument("output_dir", type=Path, help="folder of the converted models")
    parser.add_argument("--push-to", metavar="NAME", help="publish in this account or organisation")
    parser.add_argument("--only", metavar="NAME", help="only this checkpoint")
    parser.add_argument("--manifest", type=Path, default=MANIFEST, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    wanted = read_manifest(options.manifest)
    if options.only:
        names = [published.name for published in wanted]
        wanted = [published for published in wanted if published.name == options.only]
        if not wanted:
            parser.error(f"no checkpoint {options.only}: there are {', '.join(names)}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    faults = 0
    for published in tqdm(wanted, desc="checkpoints"):
        folder = options.output_dir / published.name
        try:
            address = convert_published(published, options.downloaded, folder, options.push_to)
            tqdm.write(f"{published.name}: {address or folder}")
        except FileNotFoundError as error:
            tqdm.write(f"{published.name}: skipped, {error}")
        except (UserError, ValueError, OSError) as error:
            tqdm.write(f"{published.name}: error: {error}")
            faults += 1
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
