"""From a folder to the Hub, and on to a stranger's machine: real commands, real clients, fresh caches."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from skimage import data

from hub_cards.push_to_hub import push_to_hub
from tests.hub_cards.artefacts import keep_card
from tests.support import programs
from training.losses.discriminator_files import save_discriminator
from training.losses.patch_discriminator import PatchDiscriminator

REPOSITORY = Path(__file__).parents[2]

BLOCK_THE_PACKAGE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_simvq", "training", "hub_cards"):
            raise ImportError(f"{name} is blocked in this test")

sys.meta_path.insert(0, Blocked())
"""


def push(hub, home: Path, *arguments) -> str:
    command = [REPOSITORY / "hub_cards" / "push_to_hub.py", *arguments]
    done = run(command, hub.environment(home))
    assert hub.token not in done.stdout + done.stderr
    return done.stdout


def run(command: list[str], environment: dict, folder: Path | None = None):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k != "PYTHONPATH"}
    done = programs.run(*command, env=kept | environment, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


def example(card: str) -> str:
    """The program on a card."""
    (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(program.strip().splitlines()) <= 14
    return program


@pytest.mark.slow
def test_a_picture_tokenizer_with_its_code(hub, image_folder, tmp_path):
    """Published with the code; loaded without the package, by the card's own lines, then offline."""
    repo, space = "org/tiny-pictures", "org/tiny-demo"
    settings = {
        "dataset": "/home/zebedee/faces",
        "output_dir": "/home/zebedee",
        "codebook_size": 64,
    }
    (image_folder / "training_settings.json").write_text(json.dumps(settings))
    sizes = {"base_channels": 8, "num_layers": 3}
    discriminator = PatchDiscriminator(**sizes)
    save_discriminator(discriminator, sizes, image_folder)
    options = ("--with-code", "--with-discriminator", "--space", space)
    out = push(hub, tmp_path / "push", image_folder, repo, *options)
    files = hub.files(repo)
    assert f"published: {hub.url}/{repo}" in out
    assert {"README.md", "model.safetensors", "config.json", "preprocessor_config.json"} <= set(
        files
    )
    assert {"modeling_simvq_image.py", "verified_download.py", "evaluation.json"} <= set(files)
    assert {"discriminator/model.safetensors", "discriminator/config.json"} <= set(files)
    assert not any(b"zebedee" in content for content in files.values())
    assert len(hub.repository(repo).commits) == 2  # the empty one, and this
    card = files["README.md"].decode()
    keep_card("image_card", files)
    assert "21.53" in card and "custom_code" in card and "codebook_size: 64" in card

    shown = hub.files(space, repo_type="space")
    assert json.loads(shown["checkpoints.json"]) == [repo] and b"sdk: gradio" in shown["README.md"]
    assert {"app.py", "requirements.txt"} <= set(shown)

    stranger, home = tmp_path / "stranger", tmp_path / "home"
    stranger.mkdir()
    Image.fromarray(data.astronaut()).save(stranger / "photo.png")
    report = "\nimport json; print(json.dumps([type(model).__module__, list(codes.shape)]))"
    program = BLOCK_THE_PACKAGE + example(card) + report
    online = hub.environment(home, token=None)
    done = run(["-c", program], online, stranger)
    module, shape = json.loads(done.stdout.splitlines()[-1])
    assert module.startswith("transformers_modules.") and shape == [1, 64, 64]
    first = np.asarray(Image.open(stranger / "reconstruction.png"))
    assert first.shape == (128, 128, 3)

    # A fine-tuning goes on with the discriminator, by the repository's name.
    fetch = f"""
from accelerate import PartialState
from training.losses.discriminator_files import load_discriminator
from training.losses.patch_discriminator import PatchDiscriminator
PartialState(cpu=True)
discriminator, sizes = PatchDiscriminator(base_channels=8), {sizes}
assert load_discriminator(discriminator, sizes, {repo!r})
print(float(discriminator.main[0].weight.double().sum()))
"""
    with_package = online | {"PYTHONPATH": str(REPOSITORY)}
    found = float(run(["-c", fetch], with_package, stranger).stdout)
    assert found == float(discriminator.main[0].weight.double().sum())

    asked = len(hub.requests)
    offline = online | {"HF_HUB_OFFLINE": "1"}
    (stranger / "reconstruction.png").unlink()
    run(["-c", program], offline, stranger)
    assert len(hub.requests) == asked
    assert np.array_equal(np.asarray(Image.open(stranger / "reconstruction.png")), first)


@pytest.mark.slow
def test_a_sound_tokenizer_private_on_a_branch(hub, audio_folder, tmp_path):
    """Published without code; loaded with the package, by a member, from a branch and from a tag."""
    repo = "org/tiny-voices"
    push(hub, tmp_path / "push", audio_folder, repo, "--private", "--revision", "v2")
    assert hub.repository(repo).private and not hub.files(repo, "main")
    files = hub.files(repo, "v2")
    assert not any(name.endswith(".py") for name in files)
    for name in ("original.wav", "reconstruction.wav", "spectrograms.png"):
        assert f"samples/{name}" in files
    keep_card("audio_card", files)
    hub.repository(repo).tags["final"] = hub.repository(repo).branches["v2"]

    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "speech.wav").write_bytes(files["samples/original.wav"])
    program = example(files["README.md"].decode())
    program = "".join(
        program.replace("from_pretrained(name", f"from_pretrained(name, revision={revision!r}")
        for revision in ("v2", "final")
    )
    program += "\nprint(type(model).__module__, codes.shape[-1])"
    done = run(["-c", program], hub.environment(tmp_path / "home"), stranger)
    module, frames = done.stdout.split()
    sound, rate = soundfile.read(stranger / "reconstruction.wav")
    assert module == "modeling_simvq.modeling_simvq_audio"
    assert rate == 24_000 and len(sound) == int(frames) * 320


DATASET = """
import sys
from datasets import Dataset, load_dataset
from hub_cards.dataset_card import push_tokens
import torch

torch.manual_seed(0)
codes = torch.randint(0, 64, (10, 16, 16))
tokens = Dataset.from_dict({"image_codes": codes.tolist(), "label": list(range(10))})
push_tokens({"train": tokens}, "org/tokens", "org/tiny-pictures", codebook_size=64, source="org/photographs")
push_tokens({"train": tokens}, "org/tokens", "org/tiny-pictures", codebook_size=64, source="org/photographs")
loaded = load_dataset("org/tokens", split="train").with_format("torch")
assert torch.equal(loaded["image_codes"][:], codes), loaded
streamed = list(load_dataset("org/tokens", split="train", streaming=True))
assert [row["label"] for row in streamed] == list(range(10))
assert torch.equal(torch.tensor([row["image_codes"] for row in streamed]), codes)
print(loaded.features)
"""


@pytest.mark.slow
def test_a_tokenised_data_set(hub, image_folder, tmp_path):
    """Published twice; loaded whole and streamed; decoded by the card's own lines."""
    push_to_hub(image_folder, "org/tiny-pictures", with_code=True)
    environment = hub.environment(tmp_path / "home")
    done = run(["-c", DATASET], environment, REPOSITORY)
    assert "uint8" in done.stdout
    card = hub.files("org/tokens", repo_type="dataset")["README.md"].decode()
    program = BLOCK_THE_PACKAGE + example(card) + "print(tuple(decoded.shape))"
    assert "(4, 3, 32, 32)" in run(["-c", program], environment, tmp_path).stdout
    files = hub.files("org/tokens", repo_type="dataset")
    keep_card("dataset_card", files)
    assert "org/tiny-pictures" in card and "10" in card
    assert (
        len(hub.repository("org/tokens", "dataset").commits) == 2
    )  # the second push changed nothing
