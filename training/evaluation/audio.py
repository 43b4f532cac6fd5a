"""Evaluation of an audio tokenizer by the paper's protocol: UTMOS, PESQ, STOI, V/UV F1, utilisation."""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hub_cards.evaluation import Evaluation, metric_name
from hub_cards.tokenizer_card import is_hub_id
from training.codebook.usage import CodeCounter
from training.data.loader import build_dataloader, sample_counts
from training.data.reader import Decoder
from training.data.recordings import AudioDataConfig, decode_audio
from training.data.source import open_split
from training.evaluation.evaluated_data import evaluated_on, join_sentences, measured_on
from training.evaluation.report import (
    Findings,
    Fingerprint,
    Mean,
    intervals,
    model_label,
    prefix_note,
    report_folder,
    sample_hashes,
    versions,
    write_report,
)
from training.metrics.speakers import load_speaker_similarity
from training.metrics.speech import KEYS, LOADERS, SpeechPair, as_written
from training.metrics.transcripts import load_wer
from training.peers.face import bits_of
from training.peers.opening import open_audio_tokenizer
from training.runtime.errors import MissingWeights
from training.runtime.settings import SettingsError, setting


@dataclass
class SpeechMetricSettings:
    """Metrics of reconstructed recordings."""

    metrics: list[str] = setting(
        list(LOADERS), f"of {', '.join(LOADERS)}; vuv_f1 takes longest without a GPU"
    )
    utmos_weights: str | None = setting(None, "file of UTMOS's weights; downloaded by default")
    asr_model: str | None = setting(
        None, "recogniser for the word error rate, such as openai/whisper-large-v3; without, none"
    )
    speaker_model: str | None = setting(
        None, "model of x-vectors for the speaker similarity, such as a WavLMForXVector"
    )

    def __post_init__(self):
        for name in self.metrics:
            if name not in LOADERS:
                raise SettingsError(f"metrics: there are {', '.join(LOADERS)}, got {name!r}")
        if self.utmos_weights and not Path(self.utmos_weights).is_file():
            raise SettingsError(f"utmos_weights: there is no file {self.utmos_weights}")


@dataclass
class AudioEvaluationSettings(SpeechMetricSettings):
    """The evaluation."""

    model: str = setting(
        "", "folder, or name on the Hub; also another library's, see docs/evaluation.md"
    )
    num_quantizers: int | None = setting(
        None, "of a model with several, how many, the first ones; give another output then"
    )
    data_name: str | None = setting(
        None, "what to call the evaluated data; by default their Hub id, or their folder's name"
    )
    output: str | None = setting(
        None, "folder of evaluation.json and evaluation.md; a local model's own by default"
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.model:
            raise SettingsError("model: name a folder or a Hub repository, model=...")


@dataclass
class EvaluatedAudio(AudioDataConfig):
    """The recordings."""

    validation_split: str | None = setting(
        "test.clean", "split to evaluate on; the paper's other is test.other"
    )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    recordings: Iterable[dict[str, Tensor]],
    accelerator: Accelerator,
    metrics: dict[str, Callable[[SpeechPair], dict[str, float]]],
    num_quantizers: int | None = None,
) -> Findings | None:
    """Measure the recordings of all ranks.

    Args:
        model: with the face of SimVQAudioModel (training/peers/face.py), in evaluation mode, on the
            accelerator's device.
        recordings: those of this rank alone, {"input_values": (1, 1, L), "valid": (1,)}.
        metrics: of load_metrics.
        num_quantizers: of several, how many, the first ones; all by default.

    Returns:
        The findings on the main process, None on the others.

    Raises:
        ValueError: if no recording can be read.
    """
    config = model.config
    used, size = num_quantizers or config.num_quantizers, config.codebook_size
    counter = CodeCounter(size or 1, accelerator.device, used if size else 1)
    kilobits, seconds = Mean(), Mean()
    fingerprint, counts = Fingerprint(), torch.zeros(2, dtype=torch.int64)  # read, unreadable
    means = {key: Mean() for name in metrics for key in KEYS.get(name, (name,))}
    hidden = not accelerator.is_local_main_process
    for batch in tqdm(recordings, desc="evaluating", unit="recording", disable=hidden):
        if not batch["valid"].all():
            counts[1] += 1
            continue
        waveform = batch["input_values"]
        output = model(waveform.to(accelerator.device), num_quantizers=num_quantizers)
        if output.audio_codes is not None:
            counter.update(output.audio_codes)
        spent = bits_of(output, output.audio_codes, size)
        if spent is not None:
            kilobits.add(spent.cpu() / 1000)
            seconds.add(torch.tensor([waveform.shape[-1] / config.sampling_rate]))
        fingerprint.add(sample_hashes(waveform))
        counts[0] += 1
        decoded = as_written(output.audio_values[0, 0].float().cpu().numpy())
        pair = SpeechPair(waveform[0, 0].numpy(), decoded, config.sampling_rate)
        for metric in metrics.values():
            for key, value in _measured(metric, pair).items():
                if math.isfinite(value):
                    means[key].add(torch.tensor([value]))
    # Only here do the ranks meet: their recordings differ in number and length.
    for mean in (*means.values(), kilobits, seconds):
        mean.reduce(accelerator)
    fingerprint.reduce(accelerator)
    usage = counter.read(accelerator)
    count, unreadable = accelerator.reduce(counts.to(accelerator.device)).tolist()
    if count == 0:
        raise ValueError("no recording of the dataset can be read")
    if not accelerator.is_main_process:
        return None
    failures = {key: count - mean.count for key, mean in means.items() if mean.count < count}
    wer = {}
    if "words" in means:  # of all recordings together, as is usual: long ones count for more
        errors, words = means.pop("word_errors"), means.pop("words")
        wer = {"wer": errors.sum / words.sum} if words.sum else {}
        if failures.pop("word_errors", 0):
            failures["wer"] = failures.pop("words")
    found = {key: mean.mean for key, mean in means.items() if mean.count} | wer
    if size:
        found |= usage.metrics()
    if config.target_bandwidths:
        found["bitrate"] = config.target_bandwidths[used - 1]
    elif kilobits.count:  # of files, whose size depends on what they hold
        found["bitrate"] = kilobits.sum / seconds.sum
    return Findings(found, intervals(means), count, str(fingerprint), failures, unreadable)


def _measured(
    metric: Callable[[SpeechPair], dict[str, float]], pair: SpeechPair
) -> dict[str, float]:
    """Return a metric's values; none where its package fails, as some do on a recording of a few samples."""
    try:
        return metric(pair)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, IndexError, RuntimeError, ArithmeticError) as error:
        logging.warning(f"not defined for a recording of {len(pair.original)} samples: {error}")
        return {}


def _decode(cell: dict | None, name: str, generator, sampling_rate: int) -> Tensor:
    return decode_audio(cell, sampling_rate, name=name)


def whole_recordings(
    data: AudioDataConfig, split: str, rate: int, accelerator: Accelerator
) -> DataLoader:
    """Open a split as `evaluate` takes it: this rank's recordings, one by one, at a sampling rate in Hz."""
    decoder = Decoder(data.column, "input_values", (1, 1), partial(_decode, sampling_rate=rate))
    shard = (accelerator.process_index, accelerator.num_processes)
    return build_dataloader(
        open_split(data, split),
        split,
        data,
        decoder,
        batch_size=1,
        train=False,
        seed=0,
        shard=shard,
    )


def load_metrics(
    settings: SpeechMetricSettings, device: torch.device
) -> tuple[dict[str, Callable[[SpeechPair], dict[str, float]]], dict[str, str]]:
    """Load the metrics asked for, and say of each that cannot be had why: the rest of the table still comes."""
    metrics, missing = {}, {}
    for name in settings.metrics:
        options = {"weights": settings.utmos_weights} if name == "utmos" else {}
        try:
            metrics[name] = LOADERS[name](device, **options)
        except MissingWeights as error:
            missing[name] = str(error)
    if settings.asr_model:
        metrics["wer"] = load_wer(device, settings.asr_model)
    if settings.speaker_model:
        metrics["speaker_similarity"] = load_speaker_similarity(device, settings.speaker_model)
    return metrics, missing


def _model_notes(settings: SpeechMetricSettings) -> str:
    """Say in a protocol what the metrics were measured with whose models the user names."""
    notes = []
    if settings.asr_model:
        notes.append(
            f"Word error rate: {model_label(settings.asr_model)}, against its transcript of the original, all "
            "recordings together."
        )
    if settings.speaker_model:
        notes.append(
            f"Speaker similarity: cosine of the x-vectors of {model_label(settings.speaker_model)}."
        )
    return join_sentences(*notes)


def run(settings: AudioEvaluationSettings, data: AudioDataConfig, accelerator: Accelerator) -> None:
    """Evaluate and write the results."""
    on = evaluated_on(data, settings.data_name)
    data.validation_split = on.split
    if data.validation_split is None:
        raise SettingsError("validation_split: name the split to evaluate on")
    folder = report_folder(settings.model, settings.output)
    model = open_audio_tokenizer(settings.model).to(accelerator.device)
    metrics, missing = load_metrics(settings, accelerator.device)
    if accelerator.is_main_process:
        logging.info(f"{accelerator.num_processes} process(es) on {accelerator.device.type}")
        for line in missing.values():
            logging.warning(line)
    # The recordings' own rate does not matter, the model's does.
    rate = model.config.sampling_rate
    recordings = whole_recordings(data, data.validation_split, rate, accelerator)
    if accelerator.is_main_process:
        logging.info(sample_counts(data, {f"{{}} of split {data.validation_split}": recordings}))
    findings = evaluate(model, recordings, accelerator, metrics, settings.num_quantizers)
    if findings is not None:
        on_hub = is_hub_id(data.dataset)
        protocol = join_sentences(
            measured_on(on, data, findings.samples, "recording", settings.model),
            getattr(model.config, "note", ""),
            prefix_note(model.config, settings.num_quantizers),
            f"Whole recordings at {rate:,} Hz, mono. Reconstructions clipped at 0.99 and rounded to 16 bits. "
            "At 16 kHz (soxr HQ), except STOI; all but the MOS predictors on both signals cut to the "
            "shorter. PESQ: wide band, of the package pesq. STOI: pystoi, not extended. V/UV F1: CREPE "
            "(full), 50 to 550 Hz, periodicity 0.21, silence -60 dB, a mean over recordings. UTMOS: strong "
            "learner. Bitrate: tokens a second times log2 K.",
            _model_notes(settings),
        )
        evaluation = Evaluation(
            dataset=on.name,
            metrics=findings.metrics,
            dataset_id=data.dataset if on_hub else None,
            config=data.config_name if on_hub else None,
            split=on.named_split,
            samples=findings.samples,
            protocol=protocol,
            extra={
                "intervals": findings.intervals,
                "unreadable": findings.unreadable,
                "failures": findings.failures,
                "notes": [f"Not measured: {metric_name(name)}." for name in missing],
                "fingerprint": findings.fingerprint,
                "settings": {
                    "dtype": str(model.dtype).removeprefix("torch."),
                    "device": accelerator.device.type,
                    "seed": "none, nothing is drawn",
                },
                "versions": versions("pesq", "pystoi", "librosa", "soxr"),
            },
        )
        write_report(folder, evaluation, "recording")
