"""Look into a tokenizer's codebook: use of the codes, ranks and spectra, distances; with figures and a page.

python training/analyze_codebook.py runs/mine dataset=path/to/photos validation_split=train resolution=128
python training/analyze_codebook.py runs/a runs/b output=comparison

A model is a folder, a run of the trainer (whose validations are then shown over training) or a name on the Hub;
several are compared. Without a dataset the page holds what needs none: ranks, spectra, distances of codes. The
results are codebook.md, figures and codebook.json, in codebook_analysis in the model's folder or in `output`.
"""

import dataclasses
import json
import logging
import sys
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path

# Started as a script, this file's folder is on the path, but training is imported from the one above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModel

import modeling_simvq  # noqa: F401  (registers the models)
from hub_cards.tokenizer_card import is_hub_id
from modeling_simvq.nearest_code import nearest_code
from modeling_simvq.several_quantizers import SeveralQuantizers, levels_of
from training.codebook.figures import CodebookFindings, write_results
from training.codebook.predictability import SampleOfCodes, predictability
from training.codebook.spectra import spectra, spectrum
from training.codebook.usage import CodeCounter, latent_statistics
from training.data.images import build_image_dataloader, to_values
from training.data.loader import sample_counts
from training.data.model_images import EvaluatedImages, at_trained_resolution
from training.data.recordings import AudioDataConfig, build_audio_dataloader
from training.data.source import DataSettings
from training.evaluation.evaluated_data import evaluated_on
from training.loop.validation import measured_batches
from training.runtime.console import command
from training.runtime.setting_values import convert
from training.runtime.settings import (
    SettingsError,
    at_least,
    parse_overrides,
    setting,
)

# Distances and the spectrum of the latents are those of so many tokens, drawn at random.
SAMPLED_TOKENS = 16_384
# Distances between codes are those of at most so many, half of them used and half dead where there are data.
SAMPLED_CODES = 4096


@dataclass
class AnalysisSettings:
    """The analysis."""

    model: str | list[str] = setting("", "folder, run, or name on the Hub; [a, b] for several")
    batch_size: int = setting(64, "samples at a time, per process")
    output: str | None = setting(None, "folder of the results; needed for several models")

    def __post_init__(self):
        at_least(self, 1, "batch_size")
        if not self.model:
            raise SettingsError("model: name a folder, a run or a Hub repository, model=...")


@dataclass
class AnalysedImages(EvaluatedImages):
    """The images."""

    dataset: str = setting("", "Hub id, folder, parquet or arrow file or folder; none by default")


@dataclass
class AnalysedAudio(AudioDataConfig):
    """The recordings; their sampling rate becomes the model's."""

    dataset: str = setting("", "Hub id, folder, parquet or arrow file or folder; none by default")
    config_name: str | None = setting(None, "configuration of a dataset that has several")
    validation_split: str | None = setting("validation", "split to encode")


class TokenSample:
    """Latents and codes of tokens drawn at random from all that were seen, at most `size` of them.

    Attributes:
        latents: (n, d) float32.
        codes: (n,) int64.
        whole: the codes of whole samples, at random too.
    """

    def __init__(self, size: int, width: int):
        self.size, self.generator = size, torch.Generator().manual_seed(0)
        self.keys, self.latents = torch.empty(0), torch.empty(0, width)
        self.codes = torch.empty(0, dtype=torch.int64)
        self.whole = SampleOfCodes()

    def add(self, latents: Tensor, codes: Tensor) -> None:
        """Add latents (B, d, *spatial) and codes of the same tokens, (B, ...)."""
        self.whole.add(codes)
        rows = latents.movedim(1, -1).reshape(-1, latents.shape[1])
        keys = torch.rand(len(rows), generator=self.generator)
        if (
            len(self.keys) == self.size
        ):  # only tokens with the largest keys stay: few, after a while
            chosen = keys > self.keys.min()
        else:
            chosen = torch.ones_like(keys, dtype=torch.bool)
        there = chosen.to(rows.device)
        self.latents = torch.cat([self.latents, rows[there].float().cpu()])
        self.codes = torch.cat([self.codes, codes.flatten()[there].cpu()])
        self.keys = torch.cat([self.keys, keys[chosen]])
        if len(self.keys) > self.size:
            self.keys, kept = self.keys.topk(self.size)
            self.latents, self.codes = self.latents[kept], self.codes[kept]


def seen_by(
    quantizer: nn.Module, number: int, latents: Tensor, codes: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what one of several quantizers saw of latents (B, d, *spatial), and its codes.

    Args:
        number: of the quantizer, from 0 on; where there is but one, everything is its own.
        codes: (B, Q, *spatial).
    """
    if not isinstance(quantizer, SeveralQuantizers):
        return latents, codes
    return next(islice(quantizer.seen(latents), number, None)), codes[:, number]


def encode_all(
    model: nn.Module, loader: DataLoader, accelerator: Accelerator, number: int = 0
) -> tuple[Tensor, TokenSample]:
    """Pass the data through the encoder.

    Args:
        model: in evaluation mode, on the accelerator's device.
        loader: prepared.
        number: as of seen_by.

    Returns:
        How often each code was chosen, (K,) int64, and a sample of the tokens; on the main process.

    Raises:
        ValueError: if no sample can be read.
    """
    counter = CodeCounter(model.config.codebook_size, accelerator.device)
    sample = TokenSample(SAMPLED_TOKENS, model.config.quantizer_dim)

    def measure(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        encoded = model.encode(to_values(batch[model.main_input_name]), return_dict=True)
        # encoded[0] are the codes, whatever the modality calls them.
        latents, codes = seen_by(model.quantizer, number, encoded.latents.float(), encoded[0])
        return {"latents": latents}, codes

    for measured, codes, _ in measured_batches(loader, accelerator, measure, "encoding"):
        if accelerator.is_main_process:
            counter.update(codes)
            sample.add(measured["latents"], codes)
    if accelerator.is_main_process and not len(sample.codes):
        raise ValueError("no sample of the dataset can be read")
    return counter.counts.cpu(), sample


def nearest_other_distances(codebook: Tensor, chosen: Tensor) -> Tensor:
    """Distance of some codes to the nearest other code.

    Args:
        codebook: (K, d). chosen: (n,) indices, none twice.

    Returns:
        (n,) float64, infinite if there is no other code.
    """
    queries, best = codebook[chosen], torch.full((len(chosen),), torch.inf, dtype=torch.float64)

    def search(of: Tensor, others: Tensor) -> None:
        if len(others) and of.any():
            found = others[nearest_code(queries[of], others)]
            best[of] = torch.minimum(best[of], _distances(queries[of], found))

    rest = torch.ones(len(codebook), dtype=torch.bool)
    rest[chosen] = False
    search(torch.ones(len(chosen), dtype=torch.bool), codebook[rest])
    # A search among themselves would find every code itself. But two different places differ in some bit.
    places = torch.arange(len(chosen))
    for bit in range(len(chosen).bit_length()):
        one = (places >> bit) & 1 == 1
        search(one, queries[~one])
        search(~one, queries[one])
    return best


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows.double() - others.double(), dim=1)


def code_distances(codebook: Tensor, counts: Tensor | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Codes drawn at random, used and dead ones apart, and their distances to the nearest other code.

    Args:
        codebook: (K, d). counts: (K,) tokens of every code; None puts all codes together.

    Returns:
        "used" and "dead", or "code", to indices (n,) and distances (n,).
    """
    order = torch.randperm(len(codebook), generator=torch.Generator().manual_seed(0))
    groups = {"code": order[:SAMPLED_CODES]}
    if counts is not None:
        used = counts[order] > 0
        groups = {"used": order[used][: SAMPLED_CODES // 2]}
        groups["dead"] = order[~used][: SAMPLED_CODES // 2]
    groups = {name: chosen for name, chosen in groups.items() if len(chosen) and len(codebook) > 1}
    return {name: (some, nearest_other_distances(codebook, some)) for name, some in groups.items()}


@torch.no_grad()
def analyse(
    model: nn.Module,
    name: str,
    tokens: tuple[Tensor, TokenSample] | None,
    history: list[dict],
    number: int = 0,
) -> CodebookFindings:
    """Everything about one codebook of a model.

    Args:
        name: what to call it in figures.
        tokens: of encode_all; None without data.
        history: of read_history.
        number: as of seen_by.
    """
    config, quantizer = model.config, levels_of(model.quantizer)[number]
    findings = CodebookFindings(
        name, config.quantizer, config.codebook_size, config.quantizer_dim, {}
    )
    findings.spectra, findings.history = spectra(quantizer), history
    codebook = quantizer.codebook().float().cpu()
    counts, sample = tokens or (None, None)
    codes = code_distances(codebook, counts)
    if sample is not None:
        findings.counts = counts.sort(descending=True).values
        if len(sample.whole.codes) > 1:
            findings.predictability = predictability(sample.whole.codes, codebook)
        z = sample.latents
        findings.spectra["latents"] = spectrum(z)
        # Some quantizers compare latents with codes after a projection (fc, fsq, lfq): of those distances
        # in this space mean nothing.
        some = z[:1024]
        if (nearest_code(some, codebook) == sample.codes[:1024]).double().mean() > 0.99:
            findings.scale_ratio = latent_statistics(z, codebook)["scale_ratio"]
            findings.distances["latent_to_code"] = _distances(z, codebook[sample.codes])
            findings.distances["latent_to_mean"] = _distances(z, z.double().mean(dim=0))
            for group, (chosen, _) in codes.items():
                nearest = z[nearest_code(codebook[chosen], z)]
                findings.distances[f"{group}_to_latent"] = _distances(codebook[chosen], nearest)
    findings.distances |= {f"{group}_to_code": found for group, (_, found) in codes.items()}
    return findings


def read_history(model: str) -> list[dict[str, float]]:
    """Validations of the run that made a model, from figures.jsonl beside its folder; [] if there are none."""
    path = Path(model).resolve().parent / "figures.jsonl"
    steps = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            figures = json.loads(line)
            steps[figures["step"]] = figures  # a resumed run repeats steps: the later counts
        except (ValueError, KeyError, TypeError):  # the last line of a run that was killed
            continue
    return [steps[step] for step in sorted(steps)]


def figures_of(number: int, figures: dict[str, float]) -> dict[str, float]:
    """Return what a validation says of one of several quantizers: of the first also the ranks."""
    means = ("utilisation", "reachable_utilisation", "perplexity")
    kept = {k: v for k, v in figures.items() if k not in means} if number == 0 else {}
    if (own := f"utilisation_{number + 1}") in figures:
        kept |= {"utilisation": figures[own]}
        kept |= {"reachable_utilisation": figures["reachable_utilisation"]}
    return {"step": figures["step"]} | kept


def find_model(given: str) -> str:
    """The model's folder, also of a run of the trainer, or its name on the Hub.

    Raises:
        SettingsError: if there is none.
    """
    for folder in (Path(given), Path(given) / "model"):
        if (folder / "config.json").is_file():
            return str(folder)
    if Path(given).exists() or not is_hub_id(given):
        reason = "holds no config.json" if Path(given).exists() else "does not exist"
        raise SettingsError(
            f"model: {given} {reason}: name a model's folder, a finished run's or a Hub repository"
        )
    return given


def names_of(models: list[str]) -> list[str]:
    """Short names: a folder's, or the run's if that is "model"; the whole path where these are alike."""
    paths = [Path(model).resolve() if Path(model).is_dir() else Path(model) for model in models]
    short = [path.parent.name if path.name == "model" else path.name for path in paths]
    return short if len(set(short)) == len(short) else models


def choose_groups(words: list[str]) -> tuple[dict[str, type], list[str]]:
    """Turn leading words that name models into `model=[...]`, and choose data settings for the first model."""
    named = list(
        takewhile(lambda w: not w.startswith("-") and ("=" not in w or Path(w).is_dir()), words)
    )
    words = ([f"model={json.dumps(named)}"] if named else []) + words[len(named) :]
    given = parse_overrides([word for word in words if word != "-h"]).get("model")
    models = convert("model", given, AnalysisSettings.__annotations__["model"]) if given else []
    first = models[0] if isinstance(models, list) and models else models
    audio = first and AutoConfig.from_pretrained(find_model(str(first))).model_type == "simvq_audio"
    return {"settings": AnalysisSettings, "data": AnalysedAudio if audio else AnalysedImages}, words


def run(settings: AnalysisSettings, data: DataSettings, accelerator: Accelerator) -> None:
    """Analyse and write the results."""
    given = [settings.model] if isinstance(settings.model, str) else settings.model
    models = [find_model(name) for name in given]
    if settings.output is None and (len(models) > 1 or not Path(models[0]).is_dir()):
        raise SettingsError("output: name a folder for the results, output=...")
    on = evaluated_on(data) if data.dataset else None
    if on is not None:
        data.validation_split = on.split
    if on is not None and data.validation_split is None:
        raise SettingsError("validation_split: name the split to encode")
    kind = "simvq_audio" if isinstance(data, AudioDataConfig) else "simvq_image"
    findings, notes = [], []
    for folder, name in zip(models, names_of(models), strict=True):
        model = AutoModel.from_pretrained(folder).eval().to(accelerator.device)
        if model.config.model_type != kind:
            raise SettingsError(
                f"model: {folder} is {model.config.model_type}, the settings are for {kind}"
            )
        loader = None
        if data.dataset:
            used, note = _data_of(data, model, folder)
            if note:
                notes.append(f"{name} at {note}")
            loader = accelerator.prepare(_loader(used, settings.batch_size))
            if accelerator.is_main_process and not findings:
                logging.info(
                    sample_counts(data, {f"{{}} of split {data.validation_split}": loader})
                )
        quantizers = model.config.num_quantizers
        for number in range(quantizers):
            tokens = loader and encode_all(model, loader, accelerator, number)
            if accelerator.is_main_process:
                which = name if quantizers == 1 else f"{name}, quantizer {number + 1}"
                history = read_history(folder)
                if quantizers > 1:
                    history = [figures_of(number, figures) for figures in history]
                findings.append(analyse(model, which, tokens, history, number))
    if accelerator.is_main_process:
        folder = Path(settings.output or Path(models[0]) / "codebook_analysis")
        source = ", ".join([on.name, *notes]) if on is not None else None
        print(write_results(folder, findings, source))
        print(f"codebook.md, codebook.json and the figures are in {folder}")


def _data_of(data: DataSettings, model: nn.Module, folder: str) -> tuple[DataSettings, str]:
    """The data at the model's sampling rate, or at its resolution; and words for the latter."""
    if isinstance(data, AudioDataConfig):
        return dataclasses.replace(data, sampling_rate=model.config.sampling_rate), ""
    data = dataclasses.replace(data)  # each model has its own
    trained, used = at_trained_resolution(data, folder), data.resolution
    note = f" (trained at {trained} x {trained})" if trained not in (None, used) else ""
    return data, f"{used} x {used} pixels{note}"


def _loader(data: DataSettings, batch_size: int) -> DataLoader:
    build = build_audio_dataloader if isinstance(data, AudioDataConfig) else build_image_dataloader
    return build(data, data.validation_split, batch_size=batch_size, train=False, seed=0)


def main() -> None:
    """Command line."""
    command(choose_groups, run, __doc__)


if __name__ == "__main__":
    main()
