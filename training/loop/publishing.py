"""Records beside a run's models, and publication of the last model on the Hub."""

import json
from pathlib import Path

from huggingface_hub import HfApi

from hub_cards.evaluation import FILE_NAME, Evaluation, write_evaluations
from hub_cards.hub_commit import hub_errors
from hub_cards.push_to_hub import push_to_hub
from hub_cards.tokenizer_card import TRAINING_SETTINGS, is_hub_id, public_settings
from training.loop.settings import LoopSettings


def check_login() -> None:
    """Fail before the training, not after it.

    Raises:
        HubError: if nobody is logged in, or the Hub cannot be reached.
    """
    with hub_errors():
        HfApi().whoami()


def write_records(
    settings: dict, figures: dict[str, float] | None, step: int, model_dir: Path
) -> None:
    """Write the run's settings and a validation's figures beside the model.

    Args:
        settings: all of them, flat, and "changes", those of resumes.
        figures: of this model; None or empty if it was not validated.
        step: how far it is trained, which may be less than the settings meant.
    """
    content = json.dumps(public_settings(settings | {"trained_steps": step}), indent=2)
    (model_dir / TRAINING_SETTINGS).write_text(content + "\n")
    if figures:
        dataset, split = settings["dataset"], settings["validation_split"]
        on_hub = is_hub_id(dataset)
        evaluation = Evaluation(
            dataset=f"{dataset if on_hub else 'local files'}, {split}",
            metrics=figures,
            dataset_id=dataset if on_hub else None,
            config=settings["config_name"] if on_hub else None,
            split=split,
            source="training",
        )
        write_evaluations(model_dir / FILE_NAME, [evaluation])


def publish(settings: LoopSettings, model_dir: Path) -> str:
    """Push the final model with its code. Without a validation its card says so.

    Returns:
        Address of the commit.
    """
    return push_to_hub(
        model_dir,
        settings.hub_model_id or Path(settings.output_dir).resolve().name,
        private=settings.hub_private or None,
        with_code=True,
        without_evaluation=not (model_dir / FILE_NAME).is_file(),
        card_options={"license": settings.hub_license} if settings.hub_license else None,
    )
