"""Contents of a push of a code model: a pipeline with its tokenizer or the transformer alone, and the card."""

import json
import re
from pathlib import Path

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from torchvision.utils import save_image
from transformers import AutoImageProcessor, PreTrainedModel

from hub_cards.evaluation import SOURCES, Evaluation
from hub_cards.push_contents import (
    PROCESSOR_FILE,
    TOKENIZERS,
    Contents,
    PushError,
    code_files,
    load_model,
    load_processor,
    weight_files,
    with_imports,
    with_or_without_code,
)
from hub_cards.sheets import from_pil, image_sheet
from hub_cards.tokenizer_card import (
    PROJECT_TAGS,
    eval_results,
    is_hub_id,
    load_templates,
    public_settings,
    training_datasets,
)

GENERATORS = ("simvq_image_generation", "simvq_audio_generation")
PIPELINE_FILE = "model_index.json"
CONFIGS = ("config.json", "generation_config.json", PROCESSOR_FILE)  # of a pipeline's parts
GUIDANCE_SCALE = 2.0
SHOWN_CLASSES, SHOWN_OF_EACH = 4, 4


def is_generator(folder: Path) -> bool:
    """Tell whether a folder holds a code model, with or without a pipeline around it."""
    if (folder / PIPELINE_FILE).is_file():
        return True
    try:
        return json.loads((folder / "config.json").read_text()).get("model_type") in GENERATORS
    except (OSError, ValueError, AttributeError):
        return False


def generator_contents(
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
    """Collect the contents of a folder of train_generator, `pipeline` or `model`. See tokenizer_contents.

    A pipeline always goes with its code, by which diffusers knows it, and its card shows samples.

    Raises:
        PushError: if the folder holds no generator that loads, or images are given as samples.
    """
    if samples is not None:
        raise PushError("--samples is for tokenizers: a generator makes its own")
    is_pipeline = (model_dir / PIPELINE_FILE).is_file()
    if is_pipeline:
        model, files = load_model(model_dir / "transformer", GENERATORS, "no SimVQ generator"), {}
        sheet, names = _write_samples(model, model_dir, made / "samples")
        files["samples/samples.png"] = sheet
        files |= _pipeline_files(model_dir)
    else:
        model, names = load_model(model_dir, GENERATORS, "no SimVQ generator"), None
        files = weight_files(model_dir)
        files["config.json"] = with_or_without_code(model_dir / "config.json", made, with_code)
        files |= code_files(model_dir, "config.json") if with_code else {}
    card = make_generator_card(
        model,
        repo_id,
        evaluations=evaluations,
        settings=settings,
        sample_names=names,
        with_code=with_code or is_pipeline,
        **card_options,
    )
    return Contents(files, card, "pipeline" if is_pipeline else type(model).__name__)


def _pipeline_files(folder: Path) -> dict[str, Path]:
    """Collect what a pipeline's save_pretrained wrote, by its index, and nothing else in the folder.

    Raises:
        PushError: if the index cannot be read or a module that it names is not there.
    """
    try:
        index = json.loads((folder / PIPELINE_FILE).read_text())
        parts = {k: v[0] for k, v in index.items() if isinstance(v, list) and k != "_class_name"}
        modules = {str(name) for name in (index["_class_name"][0], *parts.values())}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise PushError(f"{folder / PIPELINE_FILE} is no index of a pipeline") from error
    files = {PIPELINE_FILE: folder / PIPELINE_FILE}
    for part, module in parts.items():
        inside = weight_files(folder / part)
        for name in (*CONFIGS, f"{module}.py"):
            if (folder / part / name).is_file():
                inside[name] = folder / part / name
        files |= {f"{part}/{name}": path for name, path in inside.items()}
    # A component of a library, such as transformers, has no module here.
    own = {f"{name}.py" for name in modules if (folder / f"{name}.py").is_file()}
    configs = [f"{part}/{name}" for part in parts for name in CONFIGS]
    return files | with_imports(folder, own) | code_files(folder, *configs)


def make_generator_card(
    model: PreTrainedModel,
    repo_id: str,
    *,
    evaluations: list[Evaluation] = (),
    settings: dict | None = None,
    sample_names: list[str] | None = None,
    with_code: bool = False,
    license: str = "other",
    base_model: str | None = None,
    origin: str = "",
) -> ModelCard:
    """Fill the card of a generator. Arguments as of make_model_card.

    Args:
        model: the transformer.
        sample_names: classes of the rows of samples/samples.png; None for a repository without a pipeline.
    """
    config = model.config
    is_image, is_pipeline = config.model_type == GENERATORS[0], sample_names is not None
    tokenizer = (settings or {}).get("tokenizer")
    tokenizer = tokenizer if tokenizer and is_hub_id(tokenizer) else None
    settings = public_settings(settings or {})
    classes = config.num_classes if is_image else 0
    data = ModelCardData(
        license=license,
        library_name="diffusers" if is_pipeline else "transformers",
        pipeline_tag="unconditional-image-generation" if is_image else None,
        tags=[*PROJECT_TAGS, "autoregressive", *(["custom_code"] if with_code else [])],
        datasets=training_datasets(settings, evaluations) or None,
        base_model=base_model or tokenizer,
        model_name=repo_id.split("/")[-1],
        eval_results=eval_results(evaluations, "unconditional-image-generation", "Generation")
        or None,
    )
    template = load_templates().get_template("generator_model_card.md")
    return ModelCard(
        template.render(
            card_data=data.to_yaml(),
            title=repo_id.split("/")[-1],
            repo_id=repo_id,
            config=config,
            is_image=is_image,
            is_pipeline=is_pipeline,
            classes=classes,
            example=_example(config.id2label[0]) if classes else "",
            guidance_scale=GUIDANCE_SCALE if classes else 1.0,
            tokenizer=tokenizer,
            parameters=model.num_parameters(),
            evaluations=evaluations,
            sources=SOURCES,
            settings=yaml.safe_dump(settings, sort_keys=False).strip() if settings else "",
            samples=is_pipeline,
            sample_names=", ".join(sample_names or []),
            with_code=with_code,
            license=license,
            remote=", trust_remote_code=True" if with_code else "",
            origin=origin,
        )
    )


def _example(name: str) -> str:
    """The first class as an argument in Python; by its number if its name could be anything but a name."""
    return f"{name!r}, " if re.fullmatch(r"[\w ,.'-]+", name) else "0, "


def _write_samples(model: PreTrainedModel, folder: Path, made: Path) -> tuple[Path, list[str]]:
    """Draw images of the first classes from the pipeline in a folder; the sheet, and the rows' classes."""
    from modeling_simvq import SimVQImagePipeline  # takes long to import

    pipeline = SimVQImagePipeline(
        load_model(folder / "tokenizer", TOKENIZERS, "no SimVQ tokenizer"),
        model,
        load_processor(folder / "processor", AutoImageProcessor),
    )
    pipeline.set_progress_bar_config(disable=True)
    classes = list(range(min(SHOWN_CLASSES, model.config.num_classes)))
    pictures = pipeline(
        classes or None,
        num_images=SHOWN_OF_EACH,
        guidance_scale=GUIDANCE_SCALE if classes else 1.0,
        generator=torch.Generator().manual_seed(0),
    ).images
    made.mkdir(parents=True)
    save_image(image_sheet(from_pil(pictures), SHOWN_OF_EACH, gap=0), made / "samples.png")
    return made / "samples.png", [model.config.id2label[label] for label in classes]
