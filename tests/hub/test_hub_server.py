"""The test Hub against the real client: what the other tests rely on."""

import json
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, hf_raise_for_status

SMALL, LARGE = b"small", bytes(range(256)) * 10_000  # 2.5 MB: three parts


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token=hub.token)


@pytest.fixture
def repo(api):
    api.create_repo("org/thing")
    files = {"a.txt": SMALL, "folder/b.safetensors": LARGE}
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    api.create_commit("org/thing", operations, commit_message="first")
    return "org/thing"


def test_what_goes_up_comes_down(hub, api, repo, tmp_path):
    assert hub.files(repo) == {"a.txt": SMALL, "folder/b.safetensors": LARGE}
    assert sum(method == "PUT" for method, _ in hub.requests) == 3
    folder = tmp_path / "down"
    api.snapshot_download(repo, cache_dir=tmp_path / "cache", local_dir=folder)
    assert (folder / "a.txt").read_bytes() == SMALL
    assert (folder / "folder" / "b.safetensors").read_bytes() == LARGE


def test_listing_pages_through_a_long_tree(hub, api, repo):
    operations = [CommitOperationAdd(f"many/{i:03}.txt", b"%d" % i) for i in range(120)]
    api.create_commit(repo, operations, commit_message="many")
    assert len(list(api.list_repo_tree(repo, recursive=True))) == 124  # with two folders
    assert {item.path for item in api.list_repo_tree(repo)} == {"a.txt", "folder", "many"}
    (info,) = api.get_paths_info(repo, ["folder/b.safetensors"])
    assert info.lfs.size == len(LARGE)


def test_commits_branches_and_tags(hub, api, repo, tmp_path):
    first = api.repo_info(repo).sha
    api.create_tag(repo, tag="v1")
    api.create_branch(repo, branch="other")
    delete = [CommitOperationDelete("a.txt")]
    second = api.create_commit(repo, delete, commit_message="less", revision="other").oid
    assert set(hub.files(repo, "other")) == {"folder/b.safetensors"}
    assert set(hub.files(repo)) == set(hub.files(repo, "v1")) == set(hub.files(repo, first))
    assert {branch.name for branch in api.list_repo_refs(repo).branches} == {"main", "other"}
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(repo, delete, commit_message="x", revision="other", parent_commit=first)
    assert api.repo_info(repo, revision="other").sha == second
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(repo, revision="nowhere")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(repo, "nothing.txt", cache_dir=tmp_path)


def test_who_may_do_what(hub, api, repo, tmp_path):
    api.create_repo("org/secret", private=True)
    reader, nobody = (HfApi(endpoint=hub.url, token=token) for token in (hub.reader_token, False))
    for stranger in (reader, nobody):
        with pytest.raises(RepositoryNotFoundError):
            stranger.repo_info("org/secret")
    hub.repository(repo).gated = True
    with pytest.raises(GatedRepoError):
        reader.hf_hub_download(repo, "a.txt", cache_dir=tmp_path)
    hub.repository(repo).granted.add("reader")
    reader.hf_hub_download(repo, "a.txt", cache_dir=tmp_path)
    with pytest.raises(HfHubHTTPError, match="403"):
        reader.create_commit(repo, [CommitOperationAdd("c.txt", b"c")], commit_message="no")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(endpoint=hub.url, token="hf_wrong").whoami()
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(repo)
    assert api.create_repo(repo, exist_ok=True).repo_id == repo


def test_a_pointer_to_nothing_is_no_commit(hub, api, repo):
    value = {"path": "c.safetensors", "oid": "0" * 64, "size": 3, "algo": "sha256"}
    lines = [{"key": "header", "value": {"summary": "x"}}, {"key": "lfsFile", "value": value}]
    with pytest.raises(BadRequestError):
        hf_raise_for_status(
            get_session().post(
                f"{hub.url}/api/models/{repo}/commit/main",
                content="\n".join(map(json.dumps, lines)).encode(),
                headers={"Authorization": f"Bearer {hub.token}"},
            )
        )
    assert set(hub.files(repo)) == {"a.txt", "folder/b.safetensors"}


def test_faults_happen_when_told(hub, api, repo, tmp_path):
    hub.fail("HEAD", "resolve/main/a.txt", times=2, status=503)
    hub.fail("GET", "/store/", cut_after=1000)
    path = api.hf_hub_download(repo, "folder/b.safetensors", cache_dir=tmp_path)
    assert Path(path).read_bytes() == LARGE  # resumed by Range
    assert sum(m == "GET" and p.startswith("/store/") for m, p in hub.requests) == 2
    # The client takes damaged bytes for good: why the project compares hashes.
    hub.fail("GET", "/store/", corrupt=True)
    path = api.hf_hub_download(repo, "folder/b.safetensors", cache_dir=tmp_path / "other")
    damaged = Path(path).read_bytes()
    assert len(damaged) == len(LARGE) and damaged != LARGE
    hub.fail("POST", "/commit/", status=500)
    with pytest.raises(HfHubHTTPError, match="500"):
        api.create_commit(repo, [CommitOperationAdd("c.txt", b"c")], commit_message="x")
