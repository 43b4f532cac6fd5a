"""What can go wrong at a push: a clear error, and nothing on the Hub or all of it."""

import json
import resource
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi
from safetensors.torch import load_file, save_file

from hub_cards import hub_commit
from hub_cards.evaluation import EvaluationError
from hub_cards.hub_commit import HubError
from hub_cards.push_to_hub import PushError, push_to_hub

REPO = "org/tiny"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(hub_commit, "PAUSE_SECONDS", 0.01)


def writes(hub) -> list[str]:
    return [path for method, path in hub.requests if method in ("POST", "PUT")]


@pytest.mark.slow
def test_pushing_again_changes_nothing(hub, image_folder):
    first = push_to_hub(image_folder, REPO)
    before = hub.files(REPO)
    hub.requests.clear()
    assert push_to_hub(image_folder, REPO) == first
    assert hub.files(REPO) == before
    assert not any("commit" in path or "lfs" in path for path in writes(hub))


@pytest.mark.slow
def test_a_second_push_removes_what_it_no_longer_sends_and_nothing_else(hub, image_folder):
    push_to_hub(image_folder, REPO, with_code=True)
    theirs = CommitOperationAdd("notes.txt", b"kept")
    HfApi().create_commit(REPO, [theirs], commit_message="notes")
    push_to_hub(image_folder, REPO)
    names = set(hub.files(REPO))
    assert not any(name.endswith(".py") for name in names) and "notes.txt" in names
    assert "auto_map" not in json.loads(hub.files(REPO)["config.json"])


def test_a_dry_run_sends_nothing(hub, image_folder, capsys):
    folder = Path(push_to_hub(image_folder, REPO, dry_run=True))
    assert not writes(hub) and not hub.repositories
    assert {method for method, _ in hub.requests} <= {
        "GET",
        "HEAD",
    }  # it asks what would be deleted
    assert (folder / "README.md").is_file() and (folder / "samples/reconstructions.png").is_file()
    assert "model.safetensors" in capsys.readouterr().out


def test_a_space_needs_the_code(hub, image_folder):
    with pytest.raises(PushError, match="--with-code"):
        push_to_hub(image_folder, REPO, space="org/demo")
    assert not hub.requests


def spoil_missing(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("quantizer.projection.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["quantizer.basis"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def spoil_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_missing, "missing_keys: quantizer.projection.weight"),
        (spoil_nan, "NaN"),
        (spoil_cut, "does not load"),
        (spoil_pickle, "no safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "does not load"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "bert"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json"),
        (lambda folder: (folder / "evaluation.json").unlink(), "--without-evaluation"),
    ],
)
def test_a_model_that_does_not_work_is_not_published(hub, image_folder, spoil, says):
    spoil(image_folder)
    with pytest.raises(PushError, match=says):
        push_to_hub(image_folder, REPO)
    assert not writes(hub)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "JSON"),
        ("[]", "no evaluation"),
        ('{"metrics": {"psnr": 20}}', "dataset"),
        ('{"dataset": {"name": "x"}, "metrics": {}}', "metrics"),
        ('{"dataset": {"name": "x"}, "metrics": {"psnr": NaN}}', "psnr must be a finite number"),
        ('{"dataset": {"name": "x"}, "metrics": {"psnr": 1}, "source": "rumour"}', "rumour"),
    ],
)
def test_an_evaluation_must_make_sense(hub, image_folder, content, says):
    (image_folder / "evaluation.json").write_text(content)
    with pytest.raises(EvaluationError, match=says):
        push_to_hub(image_folder, REPO)
    assert not writes(hub)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("token", "repo", "says"),
    [
        ("", REPO, "hf auth login"),
        ("hf_wrong", REPO, "hf auth login"),
        ("hf_reader", REPO, "may not write"),
        ("hf_maker", "elsewhere/tiny", "may not write"),
        ("hf_maker", "no/good/name", "no/good/name"),
    ],
)
def test_who_may_not_push(hub, image_folder, monkeypatch, token, repo, says):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=says) as caught:
        push_to_hub(image_folder, repo)
    assert not hub.repositories
    assert "hf_wrong" not in str(caught.value) and "hf_reader" not in str(caught.value)


REFUSED = [
    ("", REPO, None, "hf auth login"),
    ("hf_wrong", REPO, None, "hf auth login"),
    ("hf_reader", "reader/tiny", None, "may not write to reader/tiny"),
    ("hf_reader", REPO, None, "may not write"),
    ("hf_maker", "elsewhere/tiny", None, "may not write to elsewhere/tiny"),
    ("hf_maker", "org/hidden", "org/demo", "a Space cannot read org/hidden"),
    ("hf_maker", "hidden", "org/demo", "a Space cannot read maker/hidden"),
    ("hf_maker", "org/gated", "org/demo", "a Space cannot read org/gated"),
    ("hf_maker", REPO, "elsewhere/demo", "may not write to elsewhere/demo"),
    ("hf_maker", REPO, "no/good/name", "no/good/name"),
    ("hf_maker", "no/good/name", None, "no/good/name"),
    ("hf_maker", "org/tiny.git", None, "tiny.git"),
]


@pytest.mark.slow
@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(("token", "repo", "space", "says"), REFUSED)
def test_a_dry_run_refuses_what_the_push_refuses(
    hub, image_folder, monkeypatch, capsys, token, repo, space, says, dry_run
):
    for name, options in (("hidden", {"private": True}), ("gated", {"gated": "auto"})):
        for owner in ("org", "maker"):
            hub.add_repo(f"{owner}/{name}", {}, **options)
    before = set(hub.repositories)
    monkeypatch.setenv("HF_TOKEN", token)
    if dry_run and not token:  # a look at the card needs no account
        push_to_hub(image_folder, repo, space=space, with_code=bool(space), dry_run=dry_run)
        assert says in capsys.readouterr().out
    else:
        with pytest.raises((HubError, PushError), match=says):
            push_to_hub(image_folder, repo, space=space, with_code=bool(space), dry_run=dry_run)
    if dry_run:
        assert {method for method, _ in hub.requests} <= {"GET", "HEAD"}
    if space != "elsewhere/demo":  # of which only its own commit tells
        assert set(hub.repositories) == before


def test_a_dry_run_of_a_bare_name_means_this_account_s(hub, image_folder, capsys):
    hub.add_repo("tiny", {"README.md": b"a model of the Hub's own"})
    hub.add_repo("maker/tiny", {"README.md": b"mine"})
    folder = Path(push_to_hub(image_folder, "tiny", dry_run=True))
    assert capsys.readouterr().out.startswith("maker/tiny:")
    assert 'name = "maker/tiny"' in (folder / "README.md").read_text()


@pytest.mark.parametrize("path", ["/api/whoami-v2", "auth-check"])
def test_a_dry_run_needs_no_hub_that_answers(hub, image_folder, capsys, path):
    hub.fail("GET", path, times=99, status=503)
    assert Path(push_to_hub(image_folder, REPO, dry_run=True), "README.md").is_file()
    said = capsys.readouterr().out
    assert "cannot be asked" in said and "model.safetensors" in said


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/api/repos/create", "/commit/", "/api/validate-yaml"])
def test_server_errors_that_go_away(hub, image_folder, path):
    hub.fail("POST", path, times=2, status=503)
    push_to_hub(image_folder, REPO)
    assert "model.safetensors" in hub.files(REPO)


@pytest.mark.slow
def test_a_server_error_that_stays(hub, image_folder):
    hub.fail("POST", "/commit/", times=99, status=502)
    with pytest.raises(HubError, match="502"):
        push_to_hub(image_folder, REPO)
    assert not hub.files(REPO)


def test_weights_that_cannot_be_sent(hub, image_folder):
    hub.fail("PUT", "/store/", times=99, status=403)
    with pytest.raises(HubError, match="nothing was published"):
        push_to_hub(image_folder, REPO)
    assert not hub.files(REPO)


@pytest.mark.slow
def test_a_commit_whose_answer_is_lost_is_no_error(hub, image_folder):
    hub.fail("POST", "/commit/", status=504, applied=True)
    push_to_hub(image_folder, REPO)
    assert "model.safetensors" in hub.files(REPO)


@pytest.mark.slow
def test_of_two_pushes_one_wins_whole(hub, image_folder):
    def the_other_push():
        other = CommitOperationAdd("notes.txt", b"of the other push")
        HfApi().create_commit(REPO, [other], commit_message="other")

    hub.fail("POST", "/commit/", before=the_other_push)
    with pytest.raises(HubError, match="changed while this push"):
        push_to_hub(image_folder, REPO)
    assert hub.files(REPO) == {"notes.txt": b"of the other push"}
    push_to_hub(image_folder, REPO)
    assert "model.safetensors" in hub.files(REPO)


@pytest.mark.slow
def test_damage_is_seen_when_the_weights_are_read_back(hub, image_folder):
    hub.fail("GET", "/store/", corrupt=True)
    with pytest.raises(HubError, match=r"model\.safetensors came back different"):
        push_to_hub(image_folder, REPO)


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached(image_folder, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="cannot reach the Hub"):
        push_to_hub(image_folder, REPO)


def test_a_full_disk_publishes_nothing(hub, image_folder, monkeypatch):
    """Files may grow to 8 KiB here, which fails the samples as a full disk would."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            push_to_hub(image_folder, REPO)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not hub.repositories
