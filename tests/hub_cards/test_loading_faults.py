"""What a stranger meets when Hub, line or token are not in order, and what the cache holds afterwards."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoModel

from hub_cards.push_to_hub import push_to_hub
from modeling_simvq import verified_download

REPO = "org/tiny"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(verified_download, "PAUSE_SECONDS", 0.01)


@pytest.fixture
def published(hub, image_folder, tmp_path):
    """Loads the published model into a cache of its own; keyword arguments as of from_pretrained."""
    api = HfApi()
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=image_folder, ignore_patterns="*.py")
    codebook = AutoModel.from_pretrained(image_folder).quantizer.codebook()
    hub.requests.clear()

    def load(**more) -> None:
        model = AutoModel.from_pretrained(REPO, cache_dir=tmp_path / "cache", **more)
        assert torch.equal(model.eval().quantizer.codebook(), codebook)

    return load


def weights_in(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.name == "model.safetensors"]


@pytest.mark.parametrize(
    ("token", "private", "gated", "says"),
    [
        (False, True, False, "not a valid model identifier"),
        ("hf_reader", True, False, "not a valid model identifier"),
        ("hf_wrong", False, False, "Invalid credentials"),
        (False, False, True, "gated repo"),
        ("hf_reader", False, True, "gated repo"),
    ],
)
def test_who_may_not_load(hub, published, tmp_path, token, private, gated, says):
    hub.repository(REPO).private, hub.repository(REPO).gated = private, gated
    with pytest.raises(OSError, match=says):
        published(token=token)
    assert not weights_in(tmp_path / "cache")
    hub.repository(REPO).granted.add("reader")
    if gated and token:
        published(token=token)


def test_what_is_not_there(hub, published):
    with pytest.raises(OSError, match="not a valid model identifier"):
        AutoModel.from_pretrained("org/nothing")
    with pytest.raises(OSError, match="not a valid git identifier"):
        published(revision="v9")
    HfApi().create_commit(
        "org/tiny", [CommitOperationAdd("notes.txt", b"x")], commit_message="more"
    )
    published(revision=HfApi().repo_info(REPO).sha)


def test_server_errors_that_go_away(hub, published):
    hub.fail("GET", "/store/", times=2, status=503)
    published()


def test_a_server_error_that_stays_leaves_nothing(hub, published, tmp_path):
    hub.fail("GET", "/store/", times=99, status=503)
    with pytest.raises(OSError):
        published()
    assert not weights_in(tmp_path / "cache")
    hub.faults.clear()
    published()


@pytest.mark.slow
def test_a_download_cut_in_the_middle_goes_on(hub, published):
    hub.fail("GET", "/store/", cut_after=1_500_000)
    published()
    assert sum(method == "GET" and "/store/" in path for method, path in hub.requests) == 2


def test_a_damaged_download_is_fetched_again(hub, published, caplog):
    hub.fail("GET", "/store/", corrupt=True)
    published()
    assert "fetching it again" in caplog.text


def test_damaged_weights_never_load(hub, published, tmp_path):
    hub.fail("GET", "/store/", times=2, corrupt=True)
    with pytest.raises(OSError, match="does not have the sha256"):
        published()
    assert not weights_in(tmp_path / "cache")
    published()


def test_a_cache_that_rots_is_noticed_offline_and_mended_online(hub, published, tmp_path):
    published()
    (weights,) = weights_in(tmp_path / "cache")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.resolve().write_bytes(content)
    with pytest.raises(OSError):
        published(local_files_only=True)
    published()
    published(local_files_only=True)


@pytest.mark.slow
def test_shards_are_verified_too(hub, image_folder, published, tmp_path):
    model = AutoModel.from_pretrained(image_folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="1MB")
    for name in ("preprocessor_config.json", "evaluation.json"):
        (tmp_path / "sharded" / name).write_bytes((image_folder / name).read_bytes())
    push_to_hub(tmp_path / "sharded", REPO)
    names = set(hub.files(REPO))
    assert "model.safetensors" not in names and "model.safetensors.index.json" in names
    hub.fail("GET", "/store/", times=2, corrupt=True)
    with pytest.raises(OSError, match="does not have the sha256"):
        published()
    published()


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_the_methods_that_every_model_of_transformers_has(hub, converted, modality, tmp_path):
    """model.push_to_hub and processor.push_to_hub, without this project's command."""
    auto = AutoImageProcessor if modality == "image" else AutoFeatureExtractor
    model = AutoModel.from_pretrained(converted[modality])
    model.push_to_hub(f"org/plain-{modality}")
    auto.from_pretrained(converted[modality]).push_to_hub(f"org/plain-{modality}")
    again = AutoModel.from_pretrained(f"org/plain-{modality}", cache_dir=tmp_path)
    assert torch.equal(again.quantizer.basis, model.quantizer.basis)
    auto.from_pretrained(f"org/plain-{modality}", cache_dir=tmp_path)


def test_damage_that_snapshot_download_let_in_is_found(hub, published, tmp_path):
    """As diffusers downloads a pipeline: it hands a folder to from_pretrained, and no name."""
    hub.fail("GET", "/store/", corrupt=True)
    folder = snapshot_download(REPO, cache_dir=tmp_path / "cache")
    with pytest.raises(OSError, match="model.safetensors is damaged.*download again"):
        AutoModel.from_pretrained(folder)
    assert not weights_in(tmp_path / "cache")
    AutoModel.from_pretrained(snapshot_download(REPO, cache_dir=tmp_path / "cache"))
