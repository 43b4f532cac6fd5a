"""Models, processors and converter under inputs that nobody would give: a clean error, or a right answer."""

import json
import random
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel

from modeling_simvq import (
    SimVQAudioConfig,
    SimVQAudioFeatureExtractor,
    SimVQImageConfig,
    SimVQImageProcessor,
)
from modeling_simvq.convert_simvq_checkpoint import convert_simvq_checkpoint
from tests.fuzzing import NASTY, fuzz, mutated_bytes, mutated_tree, tries

# Fields of transformers itself fail inside it, in its own ways, before this project sees them.
NOT_OURS = {"auto_map", "architectures", "dtype", "transformers_version", "model_type"}
NOT_OURS |= {"image_processor_type", "feature_extractor_type", "return_attention_mask"}
CONFIGS = {"image": SimVQImageConfig, "audio": SimVQAudioConfig}
DTYPES = [
    "uint8",
    "int8",
    "int16",
    "uint16",
    "int32",
    "int64",
    "bool",
    "float16",
    "float32",
    "float64",
    "complex64",
]
MODES = [
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
]


def some_array(source: random.Random, axes: int) -> np.ndarray:
    """An array of any type and shape, values from sensible to not finite."""
    if source.random() < 0.5:
        shape = [source.choice([1, 3, 4, 8, 40]) for _ in range(axes)]
    else:
        shape = [source.choice([0, 1, 2, 3, 5, 17]) for _ in range(source.randrange(5))]
    random_numbers = np.random.default_rng(source.randrange(2**32))
    values = random_numbers.random(shape) * source.choice([0.9, 1.0, 2.0, 255.0, 1e30])
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array = values.astype(source.choice(DTYPES))
    if array.size and array.dtype.kind == "f" and source.random() < 0.2:
        array.flat[source.randrange(array.size)] = source.choice([np.nan, np.inf, -np.inf])
    return np.asarray(array)


def some_picture(source: random.Random):
    kind = source.randrange(8)
    if kind == 0:
        size = source.choice([0, 1, 7, 8, 33]), source.choice([0, 1, 8, 40, 5000])
        return Image.new(source.choice(MODES), size)
    if kind == 1:
        return source.choice([*NASTY, b"bytes", object(), Path("photo.png")])
    if kind == 2:
        return [some_picture(source) for _ in range(source.randrange(4))]
    if kind == 3:
        return some_array(source, 4)
    array = some_array(source, 3)
    if kind == 4 and array.dtype != np.uint16:
        return torch.from_numpy(array)
    return np.asfortranarray(array) if kind == 5 else array


@pytest.mark.slow
@tries(300, 20_000)
def test_image_processor(count):
    source = random.Random(0)
    names = [
        "do_resize",
        "size",
        "resample",
        "do_center_crop",
        "crop_size",
        "do_rescale",
        "rescale_factor",
    ]
    names += ["do_normalize", "image_mean", "image_std", "do_pad", "size_divisor"]

    def inputs():
        for _ in range(count):
            changes = {}
            if source.random() < 0.4:
                changes = {
                    source.choice(names): source.choice([*NASTY, {"height": 10**6, "width": 10**6}])
                }
            yield some_picture(source), changes

    def use(one):
        picture, changes = one
        pixels = SimVQImageProcessor()(picture, return_tensors="pt", **changes).pixel_values
        assert pixels.ndim == 4 and pixels.shape[1] == 3 and pixels.dtype == torch.float32
        if not changes:
            assert pixels.isfinite().all() and pixels.abs().max() <= 1 + 1e-6

    account = fuzz("image processor", inputs(), use)
    assert account.accepted > count // 50 and account.refused > count // 50


@tries(300, 20_000)
def test_feature_extractor(count):
    source = random.Random(1)

    def clip():
        kind = source.randrange(6)
        if kind == 0:
            return source.choice([*NASTY, b"bytes", object()])
        if kind == 1:
            return [
                source.choice([0, 0.5, -1.0, True, None, "x", 1e400, 1 << 70]) for _ in range(5)
            ]
        array = some_array(source, 1)
        return torch.from_numpy(array) if kind == 2 and array.dtype != np.uint16 else array

    def inputs():
        for _ in range(count):
            audio = (
                clip() if source.random() < 0.6 else [clip() for _ in range(source.randrange(4))]
            )
            options = {"sampling_rate": source.choice([24_000, 24_000, 16_000, None, "x"])}
            if source.random() < 0.3:
                options |= {
                    "max_length": source.choice([1, 7, 10**5]),
                    "truncation": source.random() < 0.5,
                }
                options["padding"] = source.choice(["max_length", "longest", True])
            yield audio, options

    def use(one):
        audio, options = one
        found = SimVQAudioFeatureExtractor()(audio, return_tensors="pt", **options)
        assert found.input_values.ndim == 3 and found.input_values.shape[1] == 1
        assert found.input_values.isfinite().all()
        assert found.padding_mask.shape == found.input_values.shape[::2]

    account = fuzz("feature extractor", inputs(), use)
    assert account.accepted > count // 50 and account.refused > count // 50


def rewritten(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder


@pytest.mark.slow
@tries(150, 3_000)
@pytest.mark.parametrize("modality", ["image", "audio"])
def test_configurations(modality, count, tiny_folder, tiny_audio_folder, tmp_path):
    """config.json: no size that it declares is made room for, whatever becomes of it."""
    model = tiny_folder if modality == "image" else tiny_audio_folder
    content = (model / "config.json").read_text()
    source = random.Random(2)

    def inputs():
        for _ in range(count):
            if source.random() < 0.15:
                yield mutated_bytes(content.encode(), source)
            else:
                yield json.dumps(mutated_tree(json.loads(content), source, NOT_OURS)).encode()

    def use(one):
        config = CONFIGS[modality].from_pretrained(rewritten(tmp_path, "config.json", one))
        with torch.device("meta"):
            AutoModel.from_config(config)

    account = fuzz(f"{modality} config.json", inputs(), use)
    assert account.accepted > count // 50 and account.refused > count // 50


@tries(100, 2_000)
@pytest.mark.parametrize("modality", ["image", "audio"])
def test_processor_files(modality, count, tiny_folder, tiny_audio_folder, tmp_path):
    model = tiny_folder if modality == "image" else tiny_audio_folder
    shutil.copy(model / "config.json", tmp_path)
    content = json.loads((model / "preprocessor_config.json").read_text())
    source = random.Random(3)
    picture, clip = Image.new("RGB", (40, 50)), np.zeros(700, np.float32)

    def use(one):
        rewritten(tmp_path, "preprocessor_config.json", json.dumps(one).encode())
        if modality == "image":
            SimVQImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")
        else:
            SimVQAudioFeatureExtractor.from_pretrained(tmp_path)(clip, return_tensors="pt")

    fuzz(
        f"{modality} preprocessor_config.json",
        (mutated_tree(content, source, NOT_OURS) for _ in range(count)),
        use,
    )


@tries(60, 1_000)
def test_safetensors(count, tiny_folder, tmp_path):
    """Damaged weights; weights that fit are NaN or not, but of the right shape."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    content = (tiny_folder / "model.safetensors").read_bytes()
    source = random.Random(4)

    def use(one):
        model = AutoModel.from_pretrained(rewritten(tmp_path / "model", "model.safetensors", one))
        assert model.quantizer.basis.shape == (64, 16)

    fuzz("safetensors", (mutated_bytes(content, source) for _ in range(count)), use)


def mutated_state(state: dict, source: random.Random) -> dict:
    state = dict(state)
    for _ in range(source.choice([1, 1, 2, 5])):
        name = source.choice(list(state))
        tensor = state[name]
        kind = source.randrange(9)
        if kind == 0:
            del state[name]
        elif kind == 1:
            state[
                source.choice(
                    [name + "x", "../" + name, "encoder.down.99999999.block.0.conv1.weight"]
                )
            ] = tensor
        elif kind == 2:
            state[name] = source.choice(NASTY)
        elif not isinstance(tensor, torch.Tensor) or tensor.ndim == 0:
            continue
        elif kind == 3:
            state[name] = tensor.flatten() if source.random() < 0.5 else tensor[None]
        elif kind == 4:
            state[name] = tensor[..., :0]
        elif kind == 5:
            # Without memory of its own: a stride of 0.
            state[name] = tensor.flatten()[:1].expand(*tensor.shape[:-1], 10**9)
        elif kind == 6:
            state[name] = tensor.to(
                source.choice([torch.int64, torch.float16, torch.complex64, torch.bool])
            )
        elif kind == 7:
            state[name] = torch.full_like(tensor, source.choice([float("nan"), float("inf")]))
        else:
            state[name] = torch.cat([tensor, tensor], dim=source.randrange(max(1, tensor.ndim)))
    return state


@pytest.mark.slow
@tries(20, 600)
@pytest.mark.parametrize("modality", ["image", "audio"])
def test_checkpoints(modality, count, checkpoint, audio_checkpoint, tmp_path):
    """The converter: the file's bytes changed, and what is in it."""
    path = checkpoint if modality == "image" else audio_checkpoint
    content = path.read_bytes()
    whole = torch.load(path, map_location="cpu", weights_only=True)
    source = random.Random(5)

    def inputs():
        for _ in range(count):
            if source.random() < 0.4:
                (tmp_path / "some.ckpt").write_bytes(mutated_bytes(content, source))
            else:
                changed = whole | {"state_dict": mutated_state(whole["state_dict"], source)}
                torch.save(changed, tmp_path / "some.ckpt")
            yield tmp_path / "some.ckpt"

    def use(one):
        convert_simvq_checkpoint(one, tmp_path / "out", source.choice(["ema", "raw"]))

    fuzz(f"{modality} checkpoints", inputs(), use)
