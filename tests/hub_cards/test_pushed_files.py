"""What a push deletes: files of an earlier push that it sends no longer, and never anything else."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from hub_cards import hub_commit
from hub_cards.dataset_card import push_code_files, push_tokens
from hub_cards.hub_commit import commit_files
from hub_cards.push_to_hub import PushError, push_to_hub
from hub_cards.pushed_files import LIST_FILE, read_list
from modeling_simvq import (
    SimVQForImageGeneration,
    SimVQImageConfig,
    SimVQImageGenerationConfig,
    SimVQImageModel,
    SimVQImagePipeline,
    SimVQImageProcessor,
)

REPO = "org/tiny"
# Names that patterns of a push's own files, such as *.py or samples/*, would take for its own.
THEIRS = (
    "handler.py", "scripts/train.py", "onnx/model.safetensors", "discriminator/model.safetensors",
    "samples/mine.png", "samples/deep/er/mine.png", "evaluation/notes.json", "data/mine.parquet",
)  # fmt: skip


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(hub_commit, "PAUSE_SECONDS", 0.01)


def put(repo: str, files: dict[str, bytes], repo_type: str = "model") -> None:
    """A commit by somebody else."""
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    HfApi().create_commit(repo, operations, commit_message="theirs", repo_type=repo_type)


def send(folder: Path, files: dict[str, str], **options) -> str:
    """A push of small files."""
    paths = {}
    for name, content in files.items():
        paths[name] = folder / name
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        paths[name].write_text(content)
    return commit_files(REPO, paths, message="push", **options)


@pytest.mark.parametrize("repo_type", ["model", "dataset", "space"])
def test_files_of_others_stay(hub, tmp_path, capsys, repo_type):
    options = {"repo_type": repo_type}
    send(tmp_path, {"app.py": "1", "samples/a.png": "2", "data/train-0.parquet": "3"}, **options)
    put(REPO, {name: b"theirs" for name in THEIRS}, repo_type)
    capsys.readouterr()
    send(tmp_path, {"app.py": "1"}, **options)
    assert set(hub.files(REPO, repo_type=repo_type)) == {"app.py", LIST_FILE, *THEIRS}
    printed = capsys.readouterr().out
    assert "deleted samples/a.png" in printed and "deleted data/train-0.parquet" in printed
    assert not any(name in printed for name in THEIRS)
    # What was deleted is no longer listed: somebody may use the name now.
    put(REPO, {"samples/a.png": b"theirs"}, repo_type)
    send(tmp_path, {"app.py": "2"}, **options)
    assert hub.files(REPO, repo_type=repo_type)["samples/a.png"] == b"theirs"


def test_what_was_changed_since_stays_and_is_named(hub, tmp_path, capsys):
    send(tmp_path, {"README.md": "ours", "a.py": "1", "b.safetensors": "2"})
    put(REPO, {"README.md": b"edited", "a.py": b"edited", "b.safetensors": b"edited"})
    send(tmp_path, {"README.md": "new"})
    files = hub.files(REPO)
    assert files["a.py"] == files["b.safetensors"] == b"edited" and files["README.md"] == b"new"
    printed = capsys.readouterr().out
    assert "keeps a.py, which was changed" in printed and "keeps b.safetensors" in printed
    assert "replaces README.md, which was changed" in printed
    listed = json.loads(files[LIST_FILE])["files"]
    assert set(listed) == {"README.md"}


@pytest.mark.parametrize("content", [None, b"{", b"[]", b'{"files": {"old.py": {"sha256": 1}}}'])
def test_without_a_list_nothing_is_deleted(hub, tmp_path, capsys, content):
    """A repository of the version before, and one whose list is damaged."""
    send(tmp_path, {"old.py": "1"})
    operation = [CommitOperationDelete(LIST_FILE)]
    HfApi().create_commit(REPO, operation, commit_message="no list")
    if content is not None:
        put(REPO, {LIST_FILE: content})
    send(tmp_path, {"new.py": "2"})
    assert {"old.py", "new.py"} < set(hub.files(REPO))
    assert "deletes nothing" in (printed := capsys.readouterr().out) and "leaves old.py" in printed
    send(tmp_path, {"newer.py": "3"})  # from here on there is a list
    assert set(hub.files(REPO)) == {"old.py", "newer.py", LIST_FILE}


def test_sharded_weights_replace_those_in_one_file(hub, tmp_path, capsys):
    """Whoever wrote them: a loader would take the one file, and so the old weights."""
    send(tmp_path, {"README.md": "x"})
    put(REPO, {"model.safetensors": b"old", "onnx/model.safetensors": b"theirs"})
    send(tmp_path, {"model.safetensors.index.json": "{}", "model-1.safetensors": "1"})
    assert "model.safetensors" not in hub.files(REPO)
    assert hub.files(REPO)["onnx/model.safetensors"] == b"theirs"
    assert "replaces model.safetensors by model.safetensors.index.json" in capsys.readouterr().out


def test_a_branch_begins_with_the_list_of_main(hub, tmp_path):
    send(tmp_path, {"a.py": "1"})
    put(REPO, {"handler.py": b"theirs"})
    send(tmp_path, {"b.py": "1"}, revision="v2")
    assert set(hub.files(REPO, "v2")) == {"b.py", "handler.py", LIST_FILE}
    assert set(hub.files(REPO, "main")) == {"a.py", "handler.py", LIST_FILE}


@pytest.mark.slow
def test_a_dry_run_shows_what_goes_of_model_and_space(hub, image_folder, capsys):
    push_to_hub(image_folder, REPO, with_code=True, space="org/demo")
    before = hub.files(REPO), hub.files("org/demo", repo_type="space")
    put(REPO, {"handler.py": b"theirs"})
    put("org/demo", {"mine.py": b"theirs"}, "space")
    capsys.readouterr()
    push_to_hub(image_folder, REPO, dry_run=True)
    printed = capsys.readouterr().out
    assert "would delete modeling_simvq_image.py" in printed and "handler.py" not in printed
    folder = push_to_hub(image_folder, REPO, with_code=True, dry_run=True, space="org/demo")
    model, space = capsys.readouterr().out.split("Space org/demo:")
    assert "would delete nothing" in model and "mine.py" not in space
    assert "app.py" in space and "would delete nothing" in space
    assert json.loads(Path(folder, "space/checkpoints.json").read_text()) == [REPO]
    assert hub.files(REPO) == before[0] | {"handler.py": b"theirs"}
    assert hub.files("org/demo", repo_type="space") == before[1] | {"mine.py": b"theirs"}


def test_codes_of_another_number_of_files(hub, capsys):
    rows = Dataset.from_dict({"image_codes": np.zeros((6, 2, 2), int).tolist()})
    options = {"codebook_size": 4}
    push_tokens({"train": rows, "validation": rows}, "org/codes", "org/tok", **options)
    put("org/codes", {"data/train-mine.parquet": b"theirs"}, "dataset")
    push_tokens({"train": rows}, "org/codes", "org/tok", **options)
    files = hub.files("org/codes", repo_type="dataset")
    assert set(files) == {
        "README.md", "data/train-00000-of-00001.parquet", "data/train-mine.parquet", LIST_FILE
    }  # fmt: skip
    assert "deleted data/validation-00000-of-00001.parquet" in capsys.readouterr().out
    # The card names its files: those of others in the same folder are no rows of it.
    assert "data/train-00000-of-00001.parquet" in files["README.md"].decode()
    assert "*" not in files["README.md"].decode().split("---")[1]


@pytest.mark.slow
def test_files_of_others_beside_the_model_are_not_sent(hub, image_folder):
    """Of the folder itself only what save_pretrained wrote goes: scripts and notes may be private."""
    for name in ("train_secret.py", "optimizer.safetensors", "model.safetensors.bak", "notes.json"):
        (image_folder / name).write_text("private")
    push_to_hub(image_folder, REPO, with_code=True)
    files = hub.files(REPO)
    assert not any(content == b"private" for content in files.values())
    assert {"modeling_simvq_image.py", "verified_download.py", "nearest_code_triton.py"} < set(
        files
    )


def test_files_of_others_in_a_pipeline_are_not_sent(hub, tmp_path):
    torch.manual_seed(0)
    small = {"base_channels": 32, "channel_multipliers": [1], "num_res_blocks": 1}
    tokenizer = SimVQImageModel(SimVQImageConfig(**small, codebook_size=8, codebook_dim=8))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = SimVQImageGenerationConfig(
        **small, num_attention_heads=2, codebook_size=8, grid_size=(2, 2), num_classes=2
    )
    folder = tmp_path / "pipeline"
    parts = (tokenizer, SimVQForImageGeneration(config), SimVQImageProcessor(size_divisor=1))
    SimVQImagePipeline(*parts).save_pretrained(folder)
    wrote = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    for name in ("private.py", "private.json", "checkpoints/private.py", "tokenizer/private.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    push_to_hub(folder, REPO, without_evaluation=True)
    assert set(hub.files(REPO)) == wrote | {"README.md", "samples/samples.png", LIST_FILE}


def test_a_space_that_could_not_read_its_model_is_not_made(hub, image_folder):
    with pytest.raises(PushError, match="a Space cannot read a private model.*HF_TOKEN"):
        push_to_hub(image_folder, REPO, with_code=True, private=True, space="org/demo")
    with pytest.raises(PushError, match="main branch, not v2"):
        push_to_hub(image_folder, REPO, with_code=True, revision="v2", space="org/demo")
    assert not hub.repositories
    hub.add_repo(REPO, {}, private=True)
    with pytest.raises(PushError, match="a Space cannot read org/tiny"):
        push_to_hub(image_folder, REPO, with_code=True, space="org/demo")
    assert not hub.files(REPO)


@pytest.mark.slow
def test_a_bare_name_is_one_of_this_account(hub, image_folder):
    """The card's program and the Space load it by the whole name."""
    push_to_hub(image_folder, "tiny", with_code=True, space="demo")
    assert 'name = "maker/tiny"' in hub.files("maker/tiny")["README.md"].decode()
    shown = hub.files("maker/demo", repo_type="space")
    assert json.loads(shown["checkpoints.json"]) == ["maker/tiny"]


def test_the_list_names_what_was_sent(hub, tmp_path):
    send(tmp_path, {"a.py": "1"})
    (tmp_path / "list").write_bytes(hub.files(REPO)[LIST_FILE])
    listed = read_list(tmp_path / "list")
    assert set(listed) == {"a.py"} and listed["a.py"].size == 1


@pytest.mark.slow
def test_no_licence_is_named_unasked(hub, image_folder, tmp_path):
    folder = push_to_hub(image_folder, REPO, dry_run=True, with_code=True)
    card = Path(folder, "README.md").read_text()
    assert "license: other" in card and "No licence is named for these weights" in card
    named = {"card_options": {"license": "cc-by-4.0"}}
    folder = push_to_hub(image_folder, REPO, dry_run=True, **named)
    card = Path(folder, "README.md").read_text()
    assert "license: cc-by-4.0" in card and "No licence" not in card


def test_files_of_codes_are_pushed_as_they_lie(hub, tmp_path):
    features = Features({"image_codes": List(List(Value("uint8"), length=2), length=2)})
    files = {}
    for split, count in (("train", 2), ("validation", 1)):
        files[split] = [tmp_path / f"{split}-{number:05}.parquet" for number in range(count)]
        for path in files[split]:
            codes = np.random.default_rng(0).integers(0, 64, (5, 2, 2)).tolist()
            Dataset.from_dict({"image_codes": codes}, features=features).to_parquet(path)
    push_code_files(files, "org/lying", "org/tok", codebook_size=64)
    pushed = hub.files("org/lying", repo_type="dataset")
    for path in sum(files.values(), []):
        assert pushed[f"data/{path.name}"] == path.read_bytes()
    card = pushed["README.md"].decode()
    assert "data/train-00001.parquet" in card and "10" in card and "*" not in card.split("---")[1]
    with pytest.raises(
        ValueError, match="image_codes holds .*; codes of this tokenizer are 0 to 7"
    ):
        push_code_files(files, "org/other", "org/tok", codebook_size=8)
    with pytest.raises(ValueError, match="a tokenised dataset has a column"):
        push_code_files({"train": []}, "org/other", "org/tok", codebook_size=64)
