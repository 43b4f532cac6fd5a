"""Train a small audio tokenizer on speech that comes with the project, and show what it does.

  python -m training.demo.audio OUTPUT_DIR

Everything is real: the trainer, the checkpoint, and a new process that loads it with AutoModel and
reconstructs a sentence of a speaker whom the training never heard.
"""

import json
import math
from pathlib import Path

import numpy as np

from training.demo.launcher import REPOSITORY, clear_run, launch_trainer, run_demo

SPEECH = REPOSITORY / "training" / "demo" / "speech"


def train(output_dir: Path) -> None:
    """Run the real trainer as a user would."""
    clear_run(output_dir / "run")
    dataset, run = f"dataset={SPEECH}", f"output_dir={output_dir / 'run'}"
    launch_trainer("train_audio.py", "demo_audio.yaml", dataset, run)


def show(model_dir: Path, output_dir: Path) -> None:
    """Load with AutoModel, reconstruct the held-out sentence from its codes alone, write the results."""
    import soundfile
    import torch
    from torchvision.utils import save_image
    from transformers import AutoFeatureExtractor, AutoModel
    from transformers.utils import logging

    import modeling_simvq  # noqa: F401  (registers the Auto classes)
    from hub_cards.sheets import spectrogram_sheet
    from training.losses.mel import LogMelSpectrogram

    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(model_dir).eval()
    extractor = AutoFeatureExtractor.from_pretrained(model_dir)
    clip = next((SPEECH / "validation").iterdir())
    speech, rate = soundfile.read(clip, dtype="float32")
    inputs = extractor(speech, sampling_rate=rate, return_tensors="pt")

    with torch.no_grad():
        codes = model.encode(**inputs).audio_codes
        decoded = model.decode(audio_codes=codes).audio_values[0, 0, : len(speech)]
        torch.manual_seed(0)
        untrained = type(model)(model.config).eval()
        before = untrained(**inputs).audio_values[0, 0, : len(speech)]

    mel = LogMelSpectrogram(rate)
    original = torch.from_numpy(speech)
    target = mel(original[None])
    figures = {
        "mel_distance": float((mel(decoded[None]) - target).abs().mean()),
        "mel_distance_untrained": float((mel(before[None]) - target).abs().mean()),
        # What a code that knows the speaker's average sound, but no word, would reach.
        "mel_distance_mean_spectrum": float(
            (target.mean(dim=2, keepdim=True) - target).abs().mean()
        ),
        "codes_used": int(codes.unique().numel()),
        "tokens": codes.numel(),
    }
    (output_dir / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    np.save(output_dir / "codes.npy", codes.numpy())
    soundfile.write(output_dir / "original.wav", speech, rate)
    soundfile.write(output_dir / "reconstruction.wav", decoded.clamp(-1, 1).numpy(), rate)
    picture = spectrogram_sheet({"original": original, "from its codes": decoded}, rate)
    save_image(picture, output_dir / "spectrograms.png")

    seconds = len(speech) / rate
    bits = codes.numel() * math.log2(model.config.codebook_size)
    print(f"\nA sentence by a speaker whom training never heard ({seconds:.1f} seconds):")
    print(
        f"  {codes.numel()} codes, {figures['codes_used']} different, "
        f"{bits / seconds / 1000:.2f} kbit/s"
    )
    print(f"  log-mel distance of the reconstruction  {figures['mel_distance']:6.3f}")
    print(f"  before training                         {figures['mel_distance_untrained']:6.3f}")
    print(f"  of the sentence's mean spectrum         {figures['mel_distance_mean_spectrum']:6.3f}")
    print(f"  spectrograms, one above the other:      {output_dir / 'spectrograms.png'}")
    print(f"  to listen to:                           {output_dir / 'original.wav'}")
    print(f"                                          {output_dir / 'reconstruction.wav'}")
    print(f"  codes:                                  {output_dir / 'codes.npy'}")
    print(f"  the model, for AutoModel:               {model_dir}")


if __name__ == "__main__":
    run_demo(__spec__.name, __doc__.splitlines()[0], train, show)
