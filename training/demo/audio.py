"""Reconstruct a sentence with the shipped speech tokenizer, and fine-tune it to a few voices.

  python -m training.demo.audio OUTPUT_DIR

Everything is real: speakers whom the tokenizer never heard, the trainer, the checkpoint, and a new process that
loads the fine-tuned model with AutoModel.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np

from training.demo.launcher import (
    CHECKPOINTS,
    REPOSITORY,
    clear,
    clear_run,
    launch_trainer,
    run_demo,
    steps_of_a_minute,
)

SHIPPED = CHECKPOINTS / "simvq-speech-small"
SPEECH = REPOSITORY / "training" / "demo" / "speech"
# Of speakers whom training never heard. Fine-tuning hears the other clips, one of them of the second voice.
SENTENCE = SPEECH / "train" / "6128_63244_000002_000000_libritts.flac"
VOICE = SPEECH / "train" / "5717_100145_000000_000003.flac"


def reconstruct(model_dir: Path, recordings: list[Path]) -> tuple[list[tuple], int]:
    """Load with AutoModel; return original, reconstruction and codes of each recording, and the rate in Hz."""
    import soundfile
    import soxr
    import torch
    from transformers import AutoFeatureExtractor, AutoModel
    from transformers.utils import logging

    import modeling_simvq  # noqa: F401  (registers the Auto classes)

    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(model_dir).eval()
    extractor = AutoFeatureExtractor.from_pretrained(model_dir)
    wanted, found = model.config.sampling_rate, []
    for recording in recordings:
        speech, rate = soundfile.read(recording, dtype="float32")
        speech = soxr.resample(speech, rate, wanted)
        inputs = extractor(speech, sampling_rate=wanted, return_tensors="pt")
        with torch.no_grad():
            codes = model.encode(**inputs).audio_codes
            decoded = model.decode(audio_codes=codes).audio_values[0, 0, : len(speech)]
        found.append((torch.from_numpy(speech), decoded.clamp(-1, 1), codes.numpy()))
    return found, wanted


def mel_distance(original, decoded, rate: int) -> float:
    """Return the mean distance of two waveforms' log-mel spectrograms."""
    from training.losses.mel import LogMelSpectrogram

    mel = LogMelSpectrogram(rate)
    return float((mel(decoded[None]) - mel(original[None])).abs().mean())


def show_shipped(output_dir: Path) -> dict:
    """Reconstruct the sentence; write audio, spectrograms and codes, and return the figures."""
    import soundfile
    from pystoi import stoi
    from torchvision.utils import save_image

    from hub_cards.sheets import spectrogram_sheet
    from training.codebook.usage import reachable_utilisation
    from training.losses.mel import LogMelSpectrogram

    clips = sorted(SPEECH.rglob("*.flac"))
    found, rate = reconstruct(SHIPPED, clips)
    original, decoded, codes = found[clips.index(SENTENCE)]
    soundfile.write(output_dir / "original.wav", original.numpy(), rate)
    soundfile.write(output_dir / "reconstruction.wav", decoded.numpy(), rate)
    shown = {"original": original, "from its codes": decoded}
    save_image(spectrogram_sheet(shown, rate), output_dir / "spectrograms.png")
    np.save(output_dir / "codes.npy", codes)
    size = json.loads((SHIPPED / "config.json").read_text())["codebook_size"]
    target = LogMelSpectrogram(rate)(original[None])
    seconds = len(original) / rate
    scores = [stoi(before.numpy(), after.numpy(), rate) for before, after, _ in found]
    everything = np.concatenate([each.ravel() for *_, each in found])
    return {
        "seconds": seconds,
        "kilobits_per_second": codes.size * math.log2(size) / seconds / 1000,
        "mel_distance": mel_distance(original, decoded, rate),
        # What a code that knows the speaker's average sound, but no word, would reach.
        "mel_distance_mean_spectrum": float(
            (target.mean(dim=2, keepdim=True) - target).abs().mean()
        ),
        "stoi": float(scores[clips.index(SENTENCE)]),
        "stoi_mean": float(np.mean(scores)),
        "codebook_size": size,
        "clips": len(clips),
        "tokens": everything.size,
        "used": len(np.unique(everything)) / size,
        "reachable": reachable_utilisation(everything.size, size),
    }


def train(output_dir: Path) -> None:
    """Fine-tune the shipped tokenizer with the real trainer, as a user would."""
    voice, run = output_dir / "voice", output_dir / "run"
    clear_run(run)
    ours = sorted((SPEECH / "train").glob("*.flac"))
    files = [path for path in voice.rglob("*") if not path.is_dir()]
    clear(voice, all(path.name in [clip.name for clip in ours] for path in files))
    clips = {
        "train": [clip for clip in ours if clip not in (SENTENCE, VOICE)],
        "validation": [VOICE],
    }
    for split, chosen in clips.items():
        (voice / split).mkdir(parents=True)
        for clip in chosen:
            shutil.copy(clip, voice / split)
    steps = steps_of_a_minute(SHIPPED, (8, 1, 12_800))
    print(f"\nfine-tuning on {len(clips['train'])} clips, {voice}: {steps} steps, about a minute")
    words = [f"init_from={SHIPPED}", f"output_dir={run}", f"dataset={voice}", f"max_steps={steps}"]
    launch_trainer("train_audio.py", "demo_audio.yaml", *words)


def show_tuned(output_dir: Path) -> dict:
    """Reconstruct the voice's other clip with both tokenizers; write audio, and return the figures."""
    import soundfile

    found = {}
    for name, model_dir in (("before", SHIPPED), ("after", output_dir / "run" / "model")):
        ((original, decoded, _),), rate = reconstruct(model_dir, [VOICE])
        soundfile.write(output_dir / f"voice_{name}.wav", decoded.numpy(), rate)
        found[f"mel_distance_{name}"] = mel_distance(original, decoded, rate)
    soundfile.write(output_dir / "voice_original.wav", original.numpy(), rate)
    return found


def show(output_dir: Path, tuned: bool) -> None:
    """Reconstruct, before or after fine-tuning; write figures.json and print what it says."""
    path = output_dir / "figures.json"
    if not tuned:
        figures = show_shipped(output_dir)
        print(
            f"\nA sentence of a speaker whom training never heard ({figures['seconds']:.1f} seconds):"
        )
        print(
            f"  {figures['kilobits_per_second']:.2f} kbit/s; STOI {figures['stoi']:.3f}, of {figures['clips']} "
            f"clips {figures['stoi_mean']:.3f} on average; log-mel distance "
            f"{figures['mel_distance']:.3f}, that of the sentence's mean spectrum "
            f"{figures['mel_distance_mean_spectrum']:.3f}"
        )
        print(
            f"  {figures['used']:.1%} of {figures['codebook_size']:,} codes used by {figures['tokens']:,} "
            f"tokens of {figures['clips']} clips, which could reach {figures['reachable']:.1%}"
        )
        print(f"  to listen to: {output_dir / 'original.wav'}, {output_dir / 'reconstruction.wav'}")
    else:
        figures = json.loads(path.read_text()) | {"voice": show_tuned(output_dir)}
        voice = figures["voice"]
        print("\nA clip that fine-tuning did not hear, of one of its voices:")
        print(
            f"  log-mel distance before {voice['mel_distance_before']:.3f}, after "
            f"{voice['mel_distance_after']:.3f}"
        )
        print(f"  the model, for AutoModel: {output_dir / 'run' / 'model'}")
    path.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    run_demo(__spec__.name, __doc__.splitlines()[0], train, show)
