"""Make a model of a checkpoint: the averaged weights with processor and settings, as a finished run's model/.

python training/export_checkpoint.py runs/mine/checkpoints/step-00001000 output=exported
python training/export_checkpoint.py runs/mine output=exported

Of a run the newest whole checkpoint is taken. Neither the training data nor a GPU is needed, and no file is
unpickled. Of a generator of images whose tokenizer can still be opened, output/pipeline holds both.
"""

import logging
import os
import secrets
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

# Started as a script, this file's folder is on the path, but training is imported from the one above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import AutoImageProcessor, AutoModel, PreTrainedModel

from modeling_simvq import (
    SimVQAudioConfig,
    SimVQAudioGenerationConfig,
    SimVQAudioModel,
    SimVQForAudioGeneration,
    SimVQForImageGeneration,
    SimVQImageConfig,
    SimVQImageGenerationConfig,
    SimVQImageModel,
)
from training.loop.checkpoint_files import DamagedCheckpoint, load_tensors, verify
from training.loop.checkpoints import SHARED_STATE, list_checkpoints
from training.loop.publishing import write_records
from training.loop.run_record import MODEL_CONFIG, read_json, read_record
from training.loop.saved_models import MODEL
from training.recipes.audio import AudioModelSettings, save_audio_tokenizer
from training.recipes.generator import save_generator
from training.recipes.image import ImageModelSettings, save_image_tokenizer
from training.runtime.console import command
from training.runtime.settings import SettingsError, build_settings, setting

logger = logging.getLogger(__name__)

MODELS = {
    "simvq_image": (SimVQImageConfig, SimVQImageModel),
    "simvq_audio": (SimVQAudioConfig, SimVQAudioModel),
    "simvq_image_generation": (SimVQImageGenerationConfig, SimVQForImageGeneration),
    "simvq_audio_generation": (SimVQAudioGenerationConfig, SimVQForAudioGeneration),
}


@dataclass
class ExportSettings:
    """The export."""

    checkpoint: str = setting("", "checkpoint, or the folder of a run for its newest one")
    output: str = setting("", "new folder for the model")

    def __post_init__(self):
        if not self.checkpoint:
            raise SettingsError("checkpoint: name a checkpoint or a run, checkpoint=...")
        if not self.output:
            raise SettingsError("output: name a folder for the model, output=...")


def export_checkpoint(checkpoint: Path, output: Path) -> Path:
    """Write the averaged model of a checkpoint.

    Args:
        checkpoint: runs/NAME/checkpoints/step-*, or runs/NAME.
        output: a folder that does not exist, or is empty.

    Returns:
        The folder that the Auto classes load; of a generator with its pipeline, the pipeline's.

    Raises:
        SettingsError: if there is no checkpoint, or what it says of the model does not suffice.
        DamagedCheckpoint: if its files are not those that were written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SettingsError(f"output: {output} exists already: choose a new folder")
    checkpoint = _find(checkpoint)
    state = load_tensors(checkpoint / SHARED_STATE, mapped=True)
    settings = read_record(checkpoint) or {}
    model = _build(checkpoint, settings)
    average = {
        name.removeprefix("module."): values
        for name, values in state["average"].items()
        if name.startswith("module.")
    }
    try:
        model.load_state_dict(average)
    except RuntimeError as error:
        reason = str(error).split("\n")[1 if "\n" in str(error) else 0].strip()
        raise SettingsError(f"{checkpoint}: its settings are of another model: {reason}") from None
    progress = state["progress"]
    figures = progress["figures"] if progress["validated"] == progress["step"] else None
    # Two exports at once do not meet: each has its own folder, and the first to be renamed stays.
    staging = output.with_name(f".partial-{output.name}-{secrets.token_hex(4)}")
    staging.mkdir(parents=True)
    try:
        published = _save(model.eval(), staging / MODEL, settings)
        for folder in staging.iterdir():
            if settings:
                write_records(settings, figures, progress["step"], folder)
        if output.exists():
            output.rmdir()
        # A tokenizer is one folder; a pipeline stays beside its generator.
        os.replace(staging / MODEL if published.name == MODEL else staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return output if published.name == MODEL else output / published.name


def _find(given: Path) -> Path:
    found = [given]
    if not (given / SHARED_STATE).is_file() and (given / "checkpoints").is_dir():
        found = list_checkpoints(given)[::-1]
    if not found or not (found[0] / SHARED_STATE).is_file():
        raise SettingsError(f"checkpoint: there is none in {given}")
    for path in found:
        try:
            verify(path)
        except DamagedCheckpoint as error:
            if path is found[-1]:
                raise DamagedCheckpoint(f"{path} is damaged: {error}") from None
            logger.warning(f"{path} is damaged ({error}): taking an earlier one")
            continue
        return path
    raise AssertionError("the loop ends by itself")


def _build(checkpoint: Path, settings: dict) -> PreTrainedModel:
    """The model without its weights, by the configuration in the checkpoint or, if older, in its run."""
    run = checkpoint.resolve().parent.parent
    content = read_json(checkpoint / MODEL_CONFIG) or read_json(run / MODEL / MODEL_CONFIG)
    if content is not None:
        if content.get("model_type") not in MODELS:
            raise SettingsError(f"{checkpoint}: {content.get('model_type')} is no model of these")
        config_class, model_class = MODELS[content["model_type"]]
        return model_class(config_class.from_dict(content))
    group = AudioModelSettings if "sampling_rate" in settings else ImageModelSettings
    names = {name for name in settings if name in group.__dataclass_fields__}
    if not {"codebook_size", "codebook_dim"} <= names:
        raise SettingsError(
            f"{checkpoint} is of an earlier version that kept no configuration, and {run} has none either: "
            "resume the run, which then saves its model"
        )
    model = build_settings({"model": group}, {name: settings[name] for name in names})["model"]
    if group is AudioModelSettings:
        return SimVQAudioModel(model.config(settings["sampling_rate"]))
    return SimVQImageModel(model.config())


def _save(model: PreTrainedModel, folder: Path, settings: dict) -> Path:
    kind = model.config.model_type
    if kind == "simvq_audio":
        return save_audio_tokenizer(model, folder)
    if kind == "simvq_image":
        side = settings.get("resolution")
        if not isinstance(side, int):
            raise SettingsError("the checkpoint's settings.json names no resolution")
        return save_image_tokenizer(model, folder, side)
    name, tokenizer, processor = settings.get("tokenizer"), None, None
    if name is not None and kind == "simvq_image_generation":
        try:
            tokenizer = AutoModel.from_pretrained(name).eval()
            processor = AutoImageProcessor.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            logger.warning(f"no pipeline, for the tokenizer cannot be opened: {reason}")
            tokenizer = processor = None
    return save_generator(model, folder, tokenizer, processor)


def name_checkpoint(words: list[str]) -> tuple[dict[str, type], list[str]]:
    """Turn a leading word that names a checkpoint into `checkpoint=...`."""
    if words and not words[0].startswith("-") and ("=" not in words[0] or Path(words[0]).is_dir()):
        words = [f"checkpoint={words[0]}", *words[1:]]
    return {"settings": ExportSettings}, words


def run(settings: ExportSettings) -> None:
    """Export and say where the model is."""
    folder = export_checkpoint(Path(settings.checkpoint), Path(settings.output))
    logger.info(f"the averaged model is in {folder}")


def main() -> None:
    """Command line."""
    command(name_checkpoint, run, __doc__, with_processes=False)


if __name__ == "__main__":
    main()
