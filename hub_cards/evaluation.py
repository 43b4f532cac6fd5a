"""Result of an evaluation, as evaluation.json beside a model holds it and its card shows it.

The file holds one object, or a list of them, one a dataset::

    {"dataset": {"name": "LibriTTS test-clean", "id": "mythicinfinity/libritts", "config": "clean",
                 "split": "test.clean", "samples": 4837},
     "metrics": {"pesq": 2.54, "utilisation": 0.994},
     "protocol": "whole clips at 24 kHz",
     "source": "measured"}

Only the name of the dataset and the metrics are needed.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from hub_cards.user_error import UserError

FILE_NAME = "evaluation.json"

# Key in "metrics": name on a card, most decimals, and which way is better (+1 up, -1 down, 0 neither).
METRICS = {
    "rfid": ("rFID", 2, -1),
    "gfid": ("gFID", 2, -1),
    "inception_score": ("Inception Score", 1, 1),
    "nearest_feature": ("nearest training image, Inception features, median", 2, 0),
    "nearest_feature_held_out": ("the same of held-out images", 2, 0),
    "nearer_feature": ("nearer than 95 % of held-out images, Inception features", 3, 0),
    "nearest_pixel": ("nearest training image, grey levels, median", 2, 0),
    "nearest_pixel_held_out": ("the same of held-out images, grey levels", 2, 0),
    "nearer_pixel": ("nearer than 95 % of held-out images, grey levels", 3, 0),
    "lpips": ("LPIPS", 3, -1),
    "lpips_alex": ("LPIPS (AlexNet)", 3, -1),
    "lpips_vgg": ("LPIPS (VGG)", 3, -1),
    "psnr": ("PSNR, dB", 2, 1),
    "psnr_batch": ("PSNR over batches of 64, dB", 2, 1),
    "ssim": ("SSIM", 3, 1),
    "l1": ("L1", 4, -1),
    "utmos": ("UTMOS", 2, 1),
    "pesq": ("PESQ", 2, 1),
    "stoi": ("STOI", 3, 1),
    "vuv_f1": ("V/UV F1", 3, 1),
    "distillmos": ("DistillMOS", 2, 1),
    "dnsmos": ("DNSMOS (overall)", 2, 1),
    "dnsmos_p808": ("DNSMOS (P.808)", 2, 1),
    "wer": ("word error rate", 3, -1),
    "speaker_similarity": ("speaker similarity", 3, 1),
    "mel_distance": ("mel distance", 3, -1),
    "si_sdr": ("SI-SDR, dB", 2, 1),
    "utilisation": ("utilisation", 3, 1),
    "reachable_utilisation": ("utilisation that so many tokens could reach", 3, 0),
    "perplexity": ("perplexity", 1, 0),
    "bitrate": ("kbit/s", 3, 0),
    "bits_per_pixel": ("bits per pixel", 4, 0),
    "loss": ("loss of a code, nats", 3, -1),
    "bits_per_code": ("bits for a code", 3, -1),
    "code_perplexity": ("perplexity of a code", 1, -1),
}
# Distances between distributions of Inception's 2,048 features are biased upwards with few samples, about as
# 1 / N: below some thousands the bias is as large as what systems differ by (Chong and Forsyth 2020), and below
# 2,049 a covariance is not even of full rank. The Inception Score is biased downwards for the same reason.
FEWEST_SAMPLES = 5_000
OF_DISTRIBUTIONS = {"rfid", "gfid", "inception_score"}
# Utilisation and perplexity say something of the codebook where the tokens could reach nearly all of it.
LEAST_REACHABLE = 0.99
OF_CODES = {"utilisation", "perplexity"}
SOURCES = {
    "measured": "measured with this repository's code",
    "training": "measured by the training run's own validation",
    "authors": "reported by the authors of the paper, not measured by us",
}


class EvaluationError(UserError):
    """An evaluation is missing or cannot be used. The message names the file and the fault."""


@dataclass
class Evaluation:
    """Figures of a model on one dataset.

    Attributes:
        dataset: its name for people.
        metrics: key to value, finite. Keys of METRICS are shown by their names there, others as they are.
        dataset_id: on the Hub, or None; with config and split.
        samples: how many were evaluated, or None.
        protocol: what was done to the samples, in words.
        source: a key of SOURCES.
    """

    dataset: str
    metrics: dict[str, float]
    dataset_id: str | None = None
    config: str | None = None
    split: str | None = None
    samples: int | None = None
    protocol: str = ""
    source: str = "measured"
    extra: dict = field(default_factory=dict, repr=False)

    @property
    def too_few(self) -> dict[str, str]:
        """Metrics that so few samples do not settle, with the reason; nothing of the authors' figures."""
        if self.source == "authors":
            return {}
        found = {}
        counts = [self.samples, self.extra.get("reference_samples")]
        count = min((n for n in counts if isinstance(n, int)), default=FEWEST_SAMPLES)
        if count < FEWEST_SAMPLES:
            reason = (
                f"of {count:,} samples it is biased, to be compared with the same samples alone"
            )
            found |= {key: reason for key in self.metrics if key in OF_DISTRIBUTIONS}
        reachable = self.metrics.get("reachable_utilisation", 1)
        if reachable < LEAST_REACHABLE:
            reason = (
                f"so many tokens could reach {format_value('utilisation', reachable)} of the codes"
            )
            found |= {key: reason for key in self.metrics if key in OF_CODES}
        return found

    @property
    def indexed(self) -> dict[str, float]:
        """The metrics that may stand beside those of other systems, in a card's model-index."""
        left_out = {
            *self.too_few,
            "reachable_utilisation",
        }  # the latter is the data's, not the model's
        return {key: value for key, value in self.metrics.items() if key not in left_out}

    def warnings(self) -> list[str]:
        """Sentences about the metrics that too few samples do not settle."""
        reasons: dict[str, list[str]] = {}
        for key, reason in self.too_few.items():
            reasons.setdefault(reason, []).append(METRICS[key][0])
        return [f"{' and '.join(names)}: {reason}." for reason, names in reasons.items()]

    def ordered_keys(self) -> list[str]:
        """Keys of the metrics in the order of METRICS, unknown ones at the end."""
        order = list(METRICS)

        def place(key: str) -> tuple[int, int, str]:
            metric, number = of_quantizer(key)
            return (order.index(metric) if metric in order else len(order), number, key)

        return sorted(self.metrics, key=place)

    def rows(self, intervals: bool = False) -> list[tuple[str, str]]:
        """Metric names and values as text, in the order of METRICS.

        Args:
            intervals: with the half width of the 95 % interval, where there is one.
        """
        rows, halves = [], self.extra.get("intervals") if intervals else None
        for key in self.ordered_keys():
            value = format_value(key, self.metrics[key])
            half = halves.get(key) if isinstance(halves, dict) else None
            if isinstance(half, (int, float)) and not isinstance(half, bool):
                value += f" ± {half:.2g}"
            rows.append((metric_name(key), value))
        return rows


def of_quantizer(key: str) -> tuple[str, int]:
    """Return the metric that utilisation_2 is of, and the number of its quantizer; 0 if it is of all."""
    metric, _, number = key.rpartition("_")
    return (metric, int(number)) if metric in OF_CODES and number.isdecimal() else (key, 0)


def metric_name(key: str) -> str:
    """Name of a metric on a card, with an arrow to where better is."""
    metric, number = of_quantizer(key)
    name, _, better = METRICS.get(metric, (metric, 4, 0))
    if number:
        name += f" of quantizer {number}"
    return name + {1: " ↑", -1: " ↓", 0: ""}[better]


def format_value(key: str, value: float) -> str:
    """A metric's value as people read it."""
    key = of_quantizer(key)[0]
    if key in ("utilisation", "reachable_utilisation"):
        return f"{value:.1%}"
    # No more digits than the value has: 0.12 is not 0.120.
    return f"{round(float(value), METRICS.get(key, (key, 4, 0))[1]):,}"


def read_evaluations(path: Path) -> list[Evaluation]:
    """Read evaluation.json.

    Raises:
        EvaluationError: if the file is not there, is no JSON, or lacks what it must hold.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise EvaluationError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise EvaluationError(f"{path} is not valid JSON: {error}") from error
    found = [_parse(item, path) for item in (content if isinstance(content, list) else [content])]
    if not found:
        raise EvaluationError(f"{path} holds no evaluation")
    return found


def write_evaluations(path: Path, evaluations: list[Evaluation]) -> None:
    """Write evaluation.json."""
    items = []
    for evaluation in evaluations:
        dataset = {
            "name": evaluation.dataset,
            "id": evaluation.dataset_id,
            "config": evaluation.config,
            "split": evaluation.split,
            "samples": evaluation.samples,
        }
        items.append(
            {
                "dataset": {key: value for key, value in dataset.items() if value is not None},
                "metrics": evaluation.metrics,
                "protocol": evaluation.protocol,
                "source": evaluation.source,
                **({"too_few_samples": evaluation.too_few} if evaluation.too_few else {}),
                **evaluation.extra,
            }
        )
    content = items[0] if len(items) == 1 else items
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def _parse(item, path: Path) -> Evaluation:
    dataset = item.get("dataset") if isinstance(item, dict) else None
    metrics = item.get("metrics") if isinstance(item, dict) else None
    if not isinstance(dataset, dict) or not isinstance(dataset.get("name"), str):
        raise EvaluationError(f'{path}: "dataset" must be an object with a "name"')
    if not isinstance(metrics, dict) or not metrics:
        raise EvaluationError(f'{path}: "metrics" must be an object with at least one figure')
    for key, value in metrics.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not -1e300 < value < 1e300  # math.isfinite fails on integers of 400 digits
        ):
            raise EvaluationError(f"{path}: metric {key} must be a finite number, got {value!r}")
    source = item.get("source", "measured")
    if not isinstance(source, str) or source not in SOURCES:
        raise EvaluationError(
            f'{path}: "source" must be one of {", ".join(SOURCES)}, got {source!r}'
        )
    return Evaluation(
        dataset=dataset["name"],
        metrics=metrics,
        dataset_id=dataset.get("id"),
        config=dataset.get("config"),
        split=dataset.get("split"),
        samples=dataset.get("samples"),
        protocol=str(item.get("protocol", "")),
        source=source,
        extra={
            key: value
            for key, value in item.items()
            if key not in ("dataset", "metrics", "protocol", "source", "too_few_samples")
        },
    )
