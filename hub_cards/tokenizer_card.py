"""Model cards: metadata that the Hub understands, and a page that answers a reader's questions."""

import json
import re
from pathlib import Path

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from transformers import PreTrainedModel

from hub_cards.evaluation import SOURCES, Evaluation, metric_name
from hub_cards.spectral_rank import spectral_rank
from modeling_simvq.several_quantizers import levels_of

TEMPLATES = Path(__file__).resolve().parent / "templates"
# Owner and name; neither begins with a dot, so that "../x" is none.
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
PAPER = "https://arxiv.org/abs/2411.02038"
TRAINING_SETTINGS = "training_settings.json"
QUANTIZER_NAMES = {
    "vq": "that of VQGAN (a codebook trained by gradients)",
    "vq_ema": "that of VQGAN-EMA (codes are running means of latents)",
    "fc": "that of VQGAN-FC (few dimensions, l2-normalised)",
    "fsq": "FSQ (finite scalar quantization)",
    "lfq": "LFQ (lookup-free quantization)",
    "lc": "that of VQGAN-LC (frozen features of another network behind a trained linear layer)",
}
PROJECT_TAGS = ["simvq", "vector-quantization", "tokenizer", "arxiv:2411.02038"]
# Settings that say something about the machine or its owner and nothing about the model.
PRIVATE_SETTINGS = {
    "output_dir",
    "resume",
    "num_workers",
    "tracker",
    "push_to_hub",
    "hub_model_id",
    "hub_private",
    "hub_license",
}
# Settings whose value is a name on the Hub or a path here, and those whose value is always a path.
SOURCE_SETTINGS = {"dataset", "tokenizer", "init_from"}
FILE_SETTINGS = {"codebook_features"}
LOCAL_FILES = "(local files)"
# What only a path or a local address has: a home or parent folder, a drive, file:// or two separators.
PATH = re.compile(r"^(~|\.{1,2}[/\\])|^[A-Za-z]:[/\\]|^file:|[/\\].*[/\\]")


def make_model_card(
    model: PreTrainedModel,
    repo_id: str,
    *,
    evaluations: list[Evaluation] = (),
    settings: dict | None = None,
    resolution: int | None = None,
    short_side: int | None = None,
    sample_names: list[str] | None = None,
    with_code: bool = False,
    license: str = "other",
    base_model: str | None = None,
    origin: str = "",
) -> ModelCard:
    """Fill the card of an image or audio tokenizer.

    Args:
        model: the loaded model; its type chooses the template.
        repo_id: where it will live.
        evaluations: figures, which also become the card's model-index.
        settings: the training run's settings. Paths and machine settings are left out.
        resolution: of images, the side that the processor crops to; None if it does not.
        short_side: of images, what the processor resizes the short side to before; None if it does not.
        sample_names: what samples/ shows; None if there are no samples.
        with_code: the repository holds the model's code.
        license: of the weights, by its name on the Hub; "other" says that none was named.
        base_model: Hub id of the checkpoint that this one was made from.
        origin: a paragraph on where the weights come from.
    """
    config = model.config
    is_image = config.model_type == "simvq_image"
    bits = config.code_bits
    settings = public_settings(settings or {})
    begun_from = settings.get("init_from")
    if base_model is None and begun_from and is_hub_id(begun_from):
        base_model = begun_from
    numbers = {"bits": bits, "resolution": resolution, "short_side": short_side}
    if is_image:
        numbers["trained_at"] = settings.get("resolution")
        numbers["tokens"] = (resolution or 0) // config.downsample_factor
        numbers["bits_per_pixel"] = bits / config.downsample_factor**2
    else:
        numbers["tokens_per_second"] = config.sampling_rate / config.hop_length
        numbers["kilobits_per_second"] = bits * numbers["tokens_per_second"] / 1000
    modality = "image" if is_image else "audio"
    title = repo_id.split("/")[-1]
    # In the order of first mention, each once.
    datasets = list(dict.fromkeys(training_datasets(settings, evaluations)))
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-to-image" if is_image else "audio-to-audio",
        tags=[*PROJECT_TAGS, f"{modality}-tokenizer", *(["custom_code"] if with_code else [])],
        datasets=datasets or None,
        base_model=base_model,
        model_name=title,
        eval_results=eval_results(
            evaluations, f"{modality}-to-{modality}", f"{modality.capitalize()} reconstruction"
        )
        or None,
    )
    template = load_templates().get_template(f"{modality}_model_card.md")
    return ModelCard(
        template.render(
            card_data=data.to_yaml(),
            title=title,
            repo_id=repo_id,
            config=config,
            quantizer_name=QUANTIZER_NAMES.get(config.quantizer, config.quantizer),
            parameters=model.num_parameters(),
            codebook=codebook_statistics(model, evaluations),
            evaluations=evaluations,
            sources=SOURCES,
            settings=yaml.safe_dump(settings, sort_keys=False).strip() if settings else "",
            samples=sample_names is not None,
            sample_names=", ".join(plain(name) for name in sample_names or []),
            with_code=with_code,
            license=license,
            remote=", trust_remote_code=True" if with_code else "",
            origin=origin,
            **numbers,
        )
    )


def codebook_statistics(
    model: PreTrainedModel, evaluations: list[Evaluation] = ()
) -> list[tuple[str, str]]:
    """Return what the weights and the evaluations say of the codebook: names and values."""
    levels = levels_of(model.quantizer.eval())
    rows = []
    for evaluation in evaluations:
        used = evaluation.metrics.get("utilisation")
        if used is not None:
            rows.append((f"in use on {evaluation.dataset}", _use(used, evaluation)))
        perplexity = evaluation.metrics.get("perplexity")
        if perplexity is not None:
            rows.append((f"perplexity on {evaluation.dataset}", f"{perplexity:,.0f}"))
    for number, quantizer in enumerate(levels, 1):
        which = f" of quantizer {number}" if len(levels) > 1 else ""
        norms = torch.linalg.vector_norm(quantizer.codebook(), dim=1)
        length = f"{norms.mean():.3f} ± {norms.std():.3f}"
        rows.append((f"length of a code{which}, mean ± deviation", length))
        if isinstance(getattr(quantizer, "projection", None), torch.nn.Linear):
            spectrum = torch.linalg.svdvals(quantizer.projection.weight.detach().float())
            rank = f"{spectral_rank(spectrum):.1f} of {len(spectrum)}"
            rows.append((f"effective rank of W{which}", rank))
    return rows


def _use(used: float, evaluation: Evaluation) -> str:
    """Share of codes in use, beside the share that so many tokens could have reached where that is less."""
    reachable = evaluation.metrics.get("reachable_utilisation")
    if reachable is None:  # of the authors' data there are tokens enough
        beside = "" if evaluation.source == "authors" else " (of how many tokens is not recorded)"
    else:
        beside = "" if reachable >= 0.9995 else f" (so many tokens could reach {reachable:.1%})"
    return f"{used:.1%}{beside}"


def public_settings(settings: dict) -> dict:
    """Settings without paths of this machine, nulls and what does not concern the model."""
    kept = {
        key: _without_paths(key, value)
        for key, value in settings.items()
        if key not in PRIVATE_SETTINGS and value is not None
    }
    if "changes" in kept:
        kept["changes"] = _public_changes(kept["changes"])
        if not kept["changes"]:
            del kept["changes"]
    return kept


def _without_paths(key: str, value):
    """The value of a setting, whatever names files of this machine replaced, inside lists and mappings too."""
    if isinstance(value, dict):
        return {
            _without_paths("", name): _without_paths(str(name), inner)
            for name, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_without_paths(key, item) for item in value]
    if not isinstance(value, str):
        return value
    if key in FILE_SETTINGS or (key in SOURCE_SETTINGS and not is_hub_id(value)):
        return LOCAL_FILES
    if key not in SOURCE_SETTINGS and (PATH.search(value) or Path(value).is_absolute()):
        return LOCAL_FILES
    return value


def _public_changes(changes) -> list[dict]:
    """Return what a run's resumes changed, by step, each [before, after]; local paths are left out."""
    found = []
    for change in changes if isinstance(changes, list) else []:
        if not isinstance(change, dict):
            continue
        pairs = {k: v for k, v in change.items() if isinstance(v, list) and len(v) == 2}
        before, after = (public_settings({k: v[i] for k, v in pairs.items()}) for i in (0, 1))
        shown = {k: [before.get(k), after.get(k)] for k in pairs if k in before or k in after}
        if shown:
            found.append({"step": change.get("step"), **shown})
    return found


def read_settings(model_dir: Path) -> dict:
    """The training run's settings beside the model, or one folder up; empty if there are none."""
    for path in (model_dir / TRAINING_SETTINGS, model_dir.parent / "settings.json"):
        if path.is_file():
            try:
                content = json.loads(path.read_text())
            except ValueError as error:
                raise ValueError(f"{path} is not valid JSON: {error}") from error
            if isinstance(content, dict):
                return content
    return {}


def is_hub_id(name: str) -> bool:
    """Tell whether a dataset's name is one on the Hub, and not a local path."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def training_datasets(settings: dict, evaluations: list[Evaluation]) -> list[str]:
    """Hub ids of what the model was trained on; of evaluations of the run itself, and of the authors', too."""
    named = [settings.get("dataset")]
    named += [e.dataset_id for e in evaluations if e.source in ("training", "authors")]
    return [name for name in named if name and is_hub_id(name)]


def eval_results(evaluations: list[Evaluation], task_type: str, task_name: str) -> list[EvalResult]:
    """The figures as a card's model-index has them.

    There, data are told apart by type, configuration and split alone: local data get a type from their name,
    and of several evaluations of the same Hub data the first stands for them.
    """
    kinds: list[str | None] = []
    seen: set[tuple] = set()
    for evaluation in evaluations:
        kind = evaluation.dataset_id or _local_kind(evaluation.dataset, kinds)
        place = (kind, evaluation.config, evaluation.split)
        kinds.append(None if place in seen else kind)
        seen.add(place)
    return [
        EvalResult(
            task_type=task_type,
            task_name=task_name,
            dataset_type=kind,
            dataset_name=evaluation.dataset,
            dataset_config=evaluation.config,
            dataset_split=evaluation.split,
            metric_type=key,
            metric_name=metric_name(key),
            metric_value=value,
            # The Hub shows a source by its address: the paper's where the figures are its authors'.
            source_name="authors" if evaluation.source == "authors" else None,
            source_url=PAPER if evaluation.source == "authors" else None,
        )
        for evaluation, kind in zip(evaluations, kinds, strict=True)
        if kind is not None
        for key, value in evaluation.indexed.items()
    ]


def _local_kind(name: str, taken: list[str | None]) -> str:
    """A type for data that are not on the Hub: letters and digits of their name, different from those taken."""
    words = re.findall(r"[a-z0-9]+", name.casefold())
    kind = unique = "-".join(["local", *words])
    number = 1
    while unique in taken:
        number += 1
        unique = f"{kind}-{number}"
    return unique


def plain(text) -> str:
    """A name or sentence from elsewhere as one line of plain text in Markdown: no markup, links or HTML."""
    line = " ".join(str(text).split())
    line = "".join(letter for letter in line if letter.isprintable())
    line = re.sub(r"([\\`*_\[\]<>|~!$]|^[#+-](?=[#+ -]*(?: |$))|(?<=^\d)[.)])", r"\\\1", line)
    return line.replace("&", "&amp;").replace(
        "://", ":\u200b//"
    )  # GitHub and the Hub link bare addresses


def in_code(text) -> str:
    """A name from elsewhere as code within a line of Markdown."""
    return f"`{' '.join(str(text).replace('`', ' ').split())}`"


def fenced(text: str) -> str:
    """The fence around a block of code, longer than any in it."""
    return "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))


def hub_link(name: str) -> str:
    """A link to a model on the Hub, or its plain name if that is no Hub id."""
    if HUB_ID.fullmatch(name):
        return f"[{plain(name)}](https://huggingface.co/{name})"
    return plain(name)


def load_templates() -> Environment:
    """The cards' templates; a name that is not filled is an error."""
    # Values are escaped for Markdown by the filters below; they are never templates themselves.
    environment = Environment(  # noqa: S701  (autoescape is for HTML)
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "plain": plain,
        "in_code": in_code,
        "fenced": fenced,
        "hub_link": hub_link,
    }
    return environment
