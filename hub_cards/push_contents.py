"""Contents of a push: models loaded back as a stranger would, and the files of a tokenizer."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_relative_imports

import modeling_simvq  # noqa: F401  registers the models
from hub_cards.card_samples import write_samples
from hub_cards.evaluation import Evaluation
from hub_cards.pushed_files import DISCRIMINATOR, DISCRIMINATOR_SIZES, INDEX, SINGLE
from hub_cards.tokenizer_card import make_model_card
from hub_cards.user_error import UserError

PROCESSOR_FILE = "preprocessor_config.json"
TOKENIZERS = ("simvq_image", "simvq_audio")


class PushError(UserError):
    """The folder cannot be published. The message says why, and what to do."""


@dataclass
class Contents:
    """Files by their path in the repository, the card, and what to call them in the commit."""

    files: dict[str, Path]
    card: ModelCard
    name: str


def tokenizer_contents(
    model_dir: Path,
    repo_id: str,
    made: Path,
    *,
    evaluations: list[Evaluation],
    settings: dict,
    with_code: bool,
    samples: Path | None,
    card_options: dict,
) -> Contents:
    """Collect the contents of a folder with a tokenizer and its processor.

    Args:
        made: folder for files that are made for the push.
        evaluations, settings, with_code, card_options: as of make_model_card.
        samples: as `given` of write_samples.

    Raises:
        PushError: if the folder holds no tokenizer that loads.
    """
    model, processor = load_tokenizer(model_dir)
    pictures, names = write_samples(model, processor, samples, made / "samples")
    card = make_model_card(
        model,
        repo_id,
        evaluations=evaluations,
        settings=settings,
        resolution=_resolution(processor),
        short_side=_short_side(processor),
        sample_names=names,
        with_code=with_code,
        **card_options,
    )
    files = {f"samples/{path.name}": path for path in pictures}
    files |= weight_files(model_dir)
    for name in ("config.json", PROCESSOR_FILE):
        files[name] = with_or_without_code(model_dir / name, made, with_code)
    if with_code:
        files |= code_files(model_dir)
    return Contents(files, card, type(model).__name__)


def load_tokenizer(folder: Path):
    """Tokenizer and processor of a folder. Raises PushError as load_model does."""
    model = load_model(folder, TOKENIZERS, "no SimVQ tokenizer", also=(PROCESSOR_FILE,))
    is_image = model.config.model_type == "simvq_image"
    return model, load_processor(folder, AutoImageProcessor if is_image else AutoFeatureExtractor)


def load_processor(folder: Path, auto: type):
    """The processor of a folder.

    Raises:
        PushError: if it does not load.
    """
    try:
        return auto.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise PushError(f"the processor in {folder} does not load: {error}") from error


def load_model(
    folder: Path, types: tuple[str, ...], otherwise: str, also: tuple[str, ...] = ()
) -> PreTrainedModel:
    """The model of a folder, as a stranger would load it.

    Args:
        types: model types that will do; `otherwise` says what a model of another type is not.
        also: further files that must be there.

    Raises:
        PushError: if it cannot be loaded, is of another type, or lacks weights.
    """
    for name in ("config.json", *also):
        if not (folder / name).is_file():
            raise PushError(
                f"{folder} holds no {name}: is it the folder that save_pretrained wrote?"
            )
    if not list(folder.glob("*.safetensors")):
        raise PushError(f"{folder} holds no safetensors weights")
    try:
        config = AutoConfig.from_pretrained(folder)
        if config.model_type not in types:
            raise PushError(f"{folder} holds a {config.model_type} model, {otherwise}")
        model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    except PushError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise PushError(f"the model in {folder} does not load: {error}") from error
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(fault):
            names = ", ".join(sorted(map(str, report[fault]))[:3])
            raise PushError(f"the weights in {folder} do not fit the model: {fault}: {names}")
    broken = [name for name, value in model.named_parameters() if not value.isfinite().all()]
    if broken:
        raise PushError(f"the weights in {folder} hold NaN or infinity: {', '.join(broken[:3])}")
    return model.eval()


def _resolution(processor) -> int | None:
    """Side that an image processor crops to; None if it leaves images whole, or is none."""
    crop = getattr(processor, "crop_size", None)
    return int(crop["height"]) if crop and processor.do_center_crop else None


def _short_side(processor) -> int | None:
    """Return what an image processor resizes the short side to; None if it does not."""
    size = getattr(processor, "size", None)
    return size.get("shortest_edge") if size and processor.do_resize else None


def with_or_without_code(path: Path, made: Path, with_code: bool) -> Path:
    """The file itself, or a copy that does not point to code which is not sent."""
    content = json.loads(path.read_text())
    if with_code or "auto_map" not in content:
        return path
    del content["auto_map"]
    (made / path.name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    return made / path.name


def weight_files(folder: Path) -> dict[str, Path]:
    """The weights that save_pretrained wrote, in one file or sharded, and no other tensors that lie there."""
    index = folder / INDEX
    names = [SINGLE] if (folder / SINGLE).is_file() else []
    if not names and index.is_file():
        shards = set(json.loads(index.read_text())["weight_map"].values())
        names = [INDEX, *sorted(shards & {path.name for path in folder.glob("*.safetensors")})]
    return {name: folder / name for name in names}


def discriminator_files(model_dir: Path) -> dict[str, Path]:
    """The discriminator that the trainer saved beside a tokenizer.

    Raises:
        PushError: if there is none.
    """
    names = (DISCRIMINATOR, DISCRIMINATOR_SIZES)
    if not all((model_dir / name).is_file() for name in names):
        raise PushError(
            f"{model_dir} has no discriminator/, which a trainer writes once the discriminator has taken part: "
            "leave out --with-discriminator"
        )
    return {name: model_dir / name for name in names}


def code_files(model_dir: Path, *configs: str) -> dict[str, Path]:
    """The modules that a folder's configurations name for trust_remote_code, and those that these import.

    Args:
        configs: paths in the folder; by default the model's and the processor's configuration.

    Raises:
        PushError: if there are none, or one that is named is not there.
    """
    named = set()
    for name in configs or ("config.json", PROCESSOR_FILE):
        if (model_dir / name).is_file():
            content = json.loads((model_dir / name).read_text())
            named |= set(
                re.findall(r"(\w+)\.\w+", " ".join(map(str, _values(content.get("auto_map")))))
            )
    if not named:
        raise PushError(
            f"{model_dir} holds no code to publish: save the model with modeling_simvq imported, or leave "
            "out --with-code"
        )
    return with_imports(model_dir, {f"{name}.py" for name in named})


def with_imports(folder: Path, names: set[str]) -> dict[str, Path]:
    """Modules of a folder and the neighbours that they import.

    Raises:
        PushError: if one is not there.
    """
    found, waiting = {}, sorted(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        if not (folder / name).is_file():
            raise PushError(f"{folder} lacks {name}, which its configuration or its code names")
        found[name] = folder / name
        waiting += [f"{module}.py" for module in get_relative_imports(folder / name)]
    return found


def _values(content) -> list:
    """The texts in nested lists and dicts."""
    if isinstance(content, dict):
        content = list(content.values())
    return (
        [x for item in content for x in _values(item)] if isinstance(content, list) else [content]
    )
