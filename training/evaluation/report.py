"""Report of an evaluation: means with intervals, fingerprint of the data, versions; JSON, Markdown."""

import contextlib
import hashlib
import importlib.metadata
import logging
import math
import platform
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

import modeling_simvq
from hub_cards.evaluation import FILE_NAME, Evaluation, metric_name, write_evaluations
from hub_cards.tokenizer_card import is_hub_id
from training.runtime.float64 import float64_device, to_float64
from training.runtime.settings import SettingsError

# The sum of the samples' hashes is kept below this, so that adding two never overflows.
_MODULUS = 2**62


class Mean:
    """Mean of per-sample values with its 95 % interval, from sums: memory does not grow."""

    def __init__(self):
        self.count, self.sum, self.squares = 0, 0.0, 0.0

    def add(self, values: Tensor) -> None:
        """Add values (B,)."""
        values = to_float64(values)
        self.count += len(values)
        self.sum += float(values.sum())
        self.squares += float(values.square().sum())

    @property
    def mean(self) -> float:
        return self.sum / self.count

    @property
    def interval(self) -> float:
        """Half width of the 95 % interval of the mean."""
        if self.count < 2:
            return math.nan
        variance = max(0.0, self.squares - self.count * self.mean**2) / (self.count - 1)
        return 1.96 * math.sqrt(variance / self.count)

    def reduce(self, accelerator: Accelerator) -> None:
        """Take in the values of all ranks; a collective call."""
        device = float64_device(accelerator.device)
        sums = torch.tensor(
            [self.count, self.sum, self.squares], dtype=torch.float64, device=device
        )
        count, self.sum, self.squares = accelerator.reduce(sums, reduction="sum").tolist()
        self.count = round(count)


class Fingerprint:
    """Tells whether two evaluations saw the same samples: a sum of hashes, in whatever order or shards."""

    def __init__(self):
        self.total = 0

    def add(self, hashes: Tensor) -> None:
        """Add hashes (B,) of sample_hashes."""
        self.total = (self.total + sum(hashes.tolist())) % _MODULUS

    def reduce(self, accelerator: Accelerator) -> None:
        """Take in the samples of all ranks; a collective call."""
        totals = torch.tensor([self.total], device=accelerator.device)
        self.total = sum(accelerator.gather(totals).tolist()) % _MODULUS

    def __str__(self) -> str:
        return f"{self.total:016x}"


@dataclass
class Findings:
    """Result of an evaluation.

    Attributes:
        metrics: key to value.
        intervals: half widths of the 95 % intervals, of the metrics that are means.
        samples: how many were evaluated.
        fingerprint: of the samples, see Fingerprint.
        failures: metric to the number of samples of which it could not be had, where there are any.
        unreadable: samples left out because they cannot be read.
        reference_samples: of generated samples, how many real ones they were held against.
    """

    metrics: dict[str, float]
    intervals: dict[str, float]
    samples: int
    fingerprint: str
    failures: dict[str, int] = field(default_factory=dict)
    unreadable: int = 0
    reference_samples: int | None = None


def sample_hashes(samples: Tensor) -> Tensor:
    """Hashes (B,) int64 of samples (B, ...), of their decoded values as the model sees them."""
    digests = (
        hashlib.blake2b(row.numpy().tobytes(), digest_size=8).digest()
        for row in samples.contiguous().cpu()
    )
    return torch.tensor([int.from_bytes(digest, "big") % _MODULUS for digest in digests])


def intervals(means: dict[str, Mean]) -> dict[str, float]:
    """Half widths of the 95 % intervals, of the means that have one."""
    return {name: mean.interval for name, mean in means.items() if mean.count > 1}


def prefix_note(config, num_quantizers: int | None) -> str:
    """Say in a protocol that only some of a model's quantizers were used; "" if all were."""
    if num_quantizers in (None, config.num_quantizers):
        return ""
    return f"With the first {num_quantizers} of {config.num_quantizers} quantizers."


def versions(*packages: str) -> dict[str, str]:
    """Versions of what the figures depend on: Python, this project, torch, transformers and `packages`."""
    found = {}
    for name in ("torch", "transformers", *packages):
        with contextlib.suppress(
            importlib.metadata.PackageNotFoundError
        ):  # its metric was left out
            found[name] = importlib.metadata.version(name)
    return {
        "modeling_simvq": modeling_simvq.__version__,
        "python": platform.python_version(),
        **found,
    }


def report_folder(model: str, output: str | None, setting: str = "model") -> Path:
    """Return where the results go: a local model's own folder unless told otherwise.

    Args:
        setting: that names the model.

    Raises:
        SettingsError: if the model is neither a folder nor a name on the Hub, or is the latter and there is
            no output.
    """
    if not Path(model).is_dir():
        if not is_hub_id(model):
            raise SettingsError(
                f"{setting}: there is no folder {model}, and it is no name on the Hub"
            )
        if output is None:
            raise SettingsError("output: name a folder for the results of a model on the Hub")
    return Path(output or model)


def model_label(name: str) -> str:
    """Return a model's name on the Hub, or of a folder the name alone: of a run's model, the run's."""
    if not Path(name).exists():
        return name
    path = Path(name).resolve()
    return path.parent.name if path.name == "model" else path.name


def markdown(evaluation: Evaluation, noun: str) -> str:
    """Return an evaluation as a Markdown page.

    Args:
        noun: what was evaluated, "image" or "recording".
    """
    extra = evaluation.extra
    lines = [f"# {evaluation.dataset}", "", "| metric | value | ± (95 %) |", "|---|---|---|"]
    for (name, value), key in zip(evaluation.rows(), evaluation.ordered_keys(), strict=True):
        half = extra.get("intervals", {}).get(key)
        lines.append(f"| {name} | {value} | {'' if half is None else f'{half:.2g}'} |")
    count = f"{evaluation.samples:,} {noun}{'' if evaluation.samples == 1 else 's'}."
    lines += ["", *evaluation.warnings(), "", evaluation.protocol, "", count, ""]
    if extra.get("unreadable"):
        lines.append(f"{extra['unreadable']:,} more cannot be read and are left out.")
    for key, failed in extra.get("failures", {}).items():
        lines.append(
            f"{metric_name(key)} has no value for {failed:,} of them, which its mean leaves out."
        )
    for note in extra.get("notes", []):
        lines.append(note)
    lines += ["", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in extra.get("settings", {}).items()]
    if "fingerprint" in extra:
        lines.append(f"| dataset fingerprint | `{extra['fingerprint']}` |")
    lines += [f"| {name} | {version} |" for name, version in extra.get("versions", {}).items()]
    return "\n".join(lines) + "\n"


def write_report(folder: Path, evaluation: Evaluation, noun: str) -> None:
    """Write evaluation.json, which cards show, and evaluation.md; print the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    write_evaluations(folder / FILE_NAME, [evaluation])
    for warning in evaluation.warnings():
        logging.warning(warning)
    text = markdown(evaluation, noun)
    (folder / "evaluation.md").write_text(text)
    print(text)
