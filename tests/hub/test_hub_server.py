"""The test Hub against the real clients: what the other tests rely on."""

import http.client
import json
import os
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard, constants
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, hf_raise_for_status

from tests.hub.hub_server import HubServer
from tests.support.programs import run

SMALL, MEDIUM, LARGE = b"small", bytes(range(256)) * 100, bytes(range(256)) * 10_000
FILES = {"a.txt": SMALL, "folder/b.safetensors": LARGE, "folder/deep/c.png": MEDIUM}
REPO = "org/thing"

# huggingface_hub hands file objects to its HTTP client in a way that client calls out of date.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def api(hub) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.token)


@pytest.fixture
def repo(hub) -> str:
    """A repository with a small file and two large ones, one of them for an upload in three parts."""
    hub.add_repo(REPO, FILES)
    return REPO


def put(path: str, content: bytes) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path, content)]


def sent(hub, method: str, path: str = "") -> list:
    return [request for request in hub.requests if request[0] == method and path in request[1]]


def test_what_goes_up_comes_down_and_goes_up_only_once(hub, api, tmp_path):
    folder = tmp_path / "up"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    api.create_repo(REPO)
    first = api.upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.files(REPO) == FILES
    assert len(sent(hub, "PUT")) == 4  # three parts of one file, the other whole
    assert len(sent(hub, "POST", "/commit/")) == 1
    down = Path(api.snapshot_download(REPO, cache_dir=tmp_path / "cache"))
    assert down.name == first.oid
    assert {name: (down / name).read_bytes() for name in FILES} == FILES

    hub.requests.clear()
    again = api.upload_folder(repo_id=REPO, folder_path=folder)
    assert again.oid == first.oid  # told by the client: it sends no commit
    assert not sent(hub, "PUT") and not sent(hub, "POST", "/commit/")


def test_tokens_stay_with_the_hub(hub, api, tmp_path):
    api.create_repo(REPO, private=True)
    api.create_commit(REPO, put("b.safetensors", LARGE), commit_message="x")
    api.hf_hub_download(REPO, "b.safetensors", cache_dir=tmp_path)
    assert all(request.has_token for request in hub.requests if "/store/" not in request[1])
    assert not any(request.has_token for request in hub.requests if "/store/" in request[1])
    headers = {"Authorization": f"Bearer {hub.token}"}
    (fetched,) = sent(hub, "GET", "/store/")
    assert get_session().get(hub.store_url + fetched[1], headers=headers).status_code == 400


@pytest.mark.parametrize("kind", ["model", "dataset", "space"])
def test_repositories_of_every_kind(hub, api, kind):
    sdk = "gradio" if kind == "space" else None
    url = api.create_repo(REPO, repo_type=kind, space_sdk=sdk)
    assert (url.repo_id, url.repo_type) == (REPO, kind)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO, repo_type=kind, space_sdk=sdk)
    api.create_repo(REPO, repo_type=kind, space_sdk=sdk, exist_ok=True)
    done = api.create_commit(REPO, put("a.txt", SMALL), commit_message="x", repo_type=kind)
    assert done.repo_url.repo_type == kind
    info = api.repo_info(REPO, repo_type=kind, files_metadata=True)
    assert info.sha == done.oid and [file.size for file in info.siblings] == [len(SMALL)]
    listed = {"model": api.list_models, "dataset": api.list_datasets, "space": api.list_spaces}
    assert [found.id for found in listed[kind](author="org")] == [REPO]
    assert not list(listed[kind](author="maker"))
    assert not any(api.repo_exists(REPO, repo_type=k) for k in listed if k != kind)
    api.delete_repo(REPO, repo_type=kind)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(REPO, repo_type=kind)


def test_a_long_tree_comes_in_pages(hub, api, repo):
    hub.page_items = 9
    many = [operation for i in range(40) for operation in put(f"many/{i:02}.txt", b"%d" % i)]
    done = api.create_commit(repo, many, commit_message="many")
    assert len(list(api.list_repo_tree(repo, recursive=True))) == 46  # with three folders
    assert len(sent(hub, "GET", "/tree/")) == 6
    shown = {item.path: item for item in api.list_repo_tree(repo, expand=True)}
    assert set(shown) == {"a.txt", "folder", "many"}
    assert shown["many"].last_commit.oid == done.oid != shown["a.txt"].last_commit.oid
    assert {item.path for item in api.list_repo_tree(repo, "folder/deep")} == {"folder/deep/c.png"}
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(repo, "nowhere"))
    large, folder = api.get_paths_info(repo, ["folder/b.safetensors", "folder", "nothing"])
    assert large.lfs.size == len(LARGE) and folder.path == "folder"


def test_commits_branches_and_tags(hub, api, repo, tmp_path):
    first = api.repo_info(repo).sha
    api.create_tag(repo, tag="v1")
    api.create_branch(repo, branch="in/work")
    api.create_branch(repo, branch="in/work", exist_ok=True)
    delete = [CommitOperationDelete("a.txt"), CommitOperationDelete("folder/deep/")]
    second = api.create_commit(repo, delete, commit_message="less", revision="in/work").oid
    assert set(hub.files(repo, "in/work")) == {"folder/b.safetensors"}
    assert hub.files(repo) == hub.files(repo, "v1") == hub.files(repo, first) == FILES
    assert {branch.name for branch in api.list_repo_refs(repo).branches} == {"main", "in/work"}
    history = [commit.commit_id for commit in api.list_repo_commits(repo, revision="in/work")]
    assert history[:2] == [second, first] and len(api.list_repo_commits(repo)) == 2
    assert api.repo_info(repo, revision="in/work").sha == second
    with pytest.raises(EntryNotFoundError):  # it is gone already
        api.create_commit(repo, [delete[0]], commit_message="x", revision="in/work")
    api.delete_branch(repo, branch="in/work")
    api.delete_tag(repo, tag="v1")
    for revision in ("in/work", "v1", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            api.hf_hub_download(repo, "a.txt", revision=revision, cache_dir=tmp_path)
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(repo, "nothing.txt", cache_dir=tmp_path)
    assert list(tmp_path.glob(f"*/.no_exist/{first}/nothing.txt"))  # remembered by the client


def test_of_two_commits_on_one_parent_the_second_is_refused(hub, api, repo):
    head = api.repo_info(repo).sha
    hub.fail(
        "POST",
        "/commit/",
        before=lambda: api.upload_file(path_or_fileobj=b"mine", path_in_repo="x.txt", repo_id=repo),
    )
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(repo, put("x.txt", b"yours"), commit_message="x", parent_commit=head)
    assert hub.files(repo) == FILES | {"x.txt": b"mine"}


def test_who_may_do_what(hub, api, repo, tmp_path):
    hub.add_repo("org/secret", FILES, private=True)
    friend = HfApi(endpoint=hub.url, token=hub.add_user("friend"))
    reader, nobody, wrong = (
        HfApi(endpoint=hub.url, token=token) for token in (hub.reader_token, False, "hf_wrong")
    )
    for stranger in (friend, reader, nobody):
        with pytest.raises(RepositoryNotFoundError):
            stranger.repo_info("org/secret")
        with pytest.raises(RepositoryNotFoundError):
            stranger.hf_hub_download("org/secret", "a.txt", cache_dir=tmp_path)
        assert [model.id for model in stranger.list_models()] == [repo]
    hub.gate(repo, granted=("friend",))
    for stranger in (reader, nobody):
        with pytest.raises(GatedRepoError):
            stranger.hf_hub_download(repo, "a.txt", cache_dir=tmp_path)
        with pytest.raises(GatedRepoError):
            stranger.auth_check(repo)
    friend.hf_hub_download(repo, "a.txt", cache_dir=tmp_path)
    for stranger in (reader, friend):
        with pytest.raises(HfHubHTTPError, match="403"):
            stranger.create_commit(repo, put("c.txt", b"c"), commit_message="no")
    with pytest.raises(HfHubHTTPError, match="401"):
        nobody.create_repo("org/other")
    with pytest.raises(HfHubHTTPError, match="401"):
        wrong.repo_info(repo)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        wrong.whoami()
    told = reader.whoami()
    assert told["name"] == "reader" and told["auth"]["accessToken"]["role"] == "read"
    assert [org["name"] for org in api.whoami()["orgs"]] == ["org"]


METRIC = "model-index: [{name: x, results: [{task: {type: t}, dataset: {name: n, type: d}, %s}]}]"


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ("license: mit\nlicense_name: x", None),
        (METRIC % "metrics: [{type: psnr, value: 20.5}]", None),
        (METRIC % "metrics: [{type: psnr}]", r"results\[0\].metrics\[0\].value"),
        (METRIC % "source: {}", r"results\[0\].metrics"),
        ("model-index: [{name: x}]", r"model-index\[0\].results"),
        ("license: made-up", "license"),
        ("tags: one", "tags"),
        ("sdk: gradio\ncolorFrom: beige", "colorFrom"),
        ("a: [", "yaml"),
    ],
)
def test_cards_are_checked(hub, api, metadata, says):
    api.create_repo(REPO)
    card = f"---\n{metadata}\n---\n# Text"
    if says is None:
        api.create_commit(REPO, put("README.md", card.encode()), commit_message="x")
        RepoCard(card).validate()
        assert api.model_info(REPO).card_data
        return
    with pytest.raises(ValueError, match=f"(?s)Invalid metadata.*{says}"):
        api.create_commit(REPO, put("README.md", card.encode()), commit_message="x")
    assert not hub.files(REPO)


def test_uploads_are_checked(hub, api, repo):
    """A large file that arrives damaged, or never did, is in no commit."""
    hub.fail("PUT", "/store/", corrupt=True)
    with pytest.raises(RuntimeError, match=r"c\.safetensors") as caught:
        api.create_commit(repo, put("c.safetensors", MEDIUM[1:]), commit_message="x")
    assert isinstance(caught.value.__cause__, BadRequestError)
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
    assert hub.files(repo) == FILES


@pytest.mark.slow
def test_server_errors_that_the_client_sits_out(hub, api, repo, tmp_path):
    for method, path in (
        ("HEAD", "resolve/main/a.txt"),
        ("PUT", "/store/"),
        ("POST", "/preupload"),
    ):
        hub.fail(method, path, times=2 if method == "HEAD" else 1, status=503)
    assert Path(api.hf_hub_download(repo, "a.txt", cache_dir=tmp_path)).read_bytes() == SMALL
    assert len(sent(hub, "HEAD")) == 3
    api.create_commit(repo, put("c.safetensors", LARGE[1:]), commit_message="x")
    assert hub.files(repo)["c.safetensors"] == LARGE[1:]
    # It does not repeat a commit: why the project does.
    hub.fail("POST", "/commit/", status=500)
    with pytest.raises(HfHubHTTPError, match="500"):
        api.create_commit(repo, put("d.txt", b"d"), commit_message="x")
    assert "d.txt" not in hub.files(repo)


@pytest.mark.slow
def test_a_download_that_is_cut_goes_on(hub, api, repo, tmp_path, monkeypatch):
    # The client forgets what it has of a block: with its own 10 MiB it would begin again.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    hub.fail("GET", "/store/", cut_after=100_000)
    path = api.hf_hub_download(repo, "folder/b.safetensors", cache_dir=tmp_path)
    assert Path(path).read_bytes() == LARGE
    assert [request.range for request in sent(hub, "GET", "/store/")] == [None, f"bytes={1 << 16}-"]


def test_the_client_takes_damaged_bytes_for_good(hub, api, repo, tmp_path):
    """It compares the length only: why the project compares hashes."""
    hub.fail("GET", "/store/", corrupt=True)
    damaged = Path(api.hf_hub_download(repo, "folder/b.safetensors", cache_dir=tmp_path))
    assert damaged.stat().st_size == len(LARGE) and damaged.read_bytes() != LARGE


def test_plain_http(hub, repo):
    """One connection for all: errors with a body, bodies without a length, ranges."""
    line = http.client.HTTPConnection(hub.url.removeprefix("http://"))

    def ask(method, path, body=None, **headers):
        line.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        answer = line.getresponse()
        return answer, answer.read()

    answer, body = ask("POST", "/nowhere", b"x" * 100_000)
    assert answer.status == 404 and "error" in json.loads(body)
    here = line.sock
    authorization = f"Bearer {hub.token}"
    path = f"/api/models/{repo}/commit/main"
    commit = [{"key": "header", "value": {"summary": "none"}}]
    blocks = (json.dumps(item).encode() + b"\n" for item in commit)
    answer, body = ask("POST", path, blocks, Authorization=authorization)
    assert (
        answer.status == 200
        and json.loads(body)["commitOid"] == hub.repository(repo).branches["main"]
    )
    answer, body = ask("POST", path, b"no json", Authorization=authorization)
    assert answer.status == 500 and b"JSONDecodeError" in body
    whole = f"/{repo}/resolve/main/a.txt"
    answer, body = ask("GET", whole, Range="bytes=1-2")
    assert (answer.status, body) == (206, b"ma")
    assert answer.headers["Content-Range"] == "bytes 1-2/5"
    assert ask("GET", whole, Range="bytes=-2")[1] == b"ll"
    answer, body = ask("GET", whole, Range="bytes=5-")
    assert (answer.status, answer.headers["Content-Range"]) == (416, "bytes */5")
    answer, body = ask("HEAD", whole)
    assert (answer.headers["Content-Length"], body) == ("5", b"")
    assert line.sock is here
    line.close()


def test_delays_and_the_end():
    with HubServer() as hub:
        hub.add_repo(REPO, FILES)
        hub.fail("GET", "/api/", delay=1.0)
        address = f"{hub.url}/api/models/{REPO}"
        with pytest.raises(HTTPError):
            get_session().get(address, timeout=0.2)
        assert get_session().get(address).json()["id"] == REPO
    with pytest.raises(HTTPError):  # though the connection was open still
        get_session().get(address)


DATASET = """
from datasets import Dataset, load_dataset

Dataset.from_dict({"number": list(range(100))}).push_to_hub("org/numbers", private=True)
plain = load_dataset("org/numbers", split="train")
streamed = load_dataset("org/numbers", split="train", streaming=True)
assert plain["number"][:] == [row["number"] for row in streamed] == list(range(100))
"""


@pytest.mark.slow
def test_datasets_load_plain_and_streaming(hub, tmp_path):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = kept | hub.environment(tmp_path)
    done = run("-c", DATASET, env=environment)
    assert done.returncode == 0, done.stderr
    assert "data/train-00000-of-00001.parquet" in hub.files("org/numbers", repo_type="dataset")
    assert any(request.range for request in sent(hub, "GET", "/store/"))  # streaming
