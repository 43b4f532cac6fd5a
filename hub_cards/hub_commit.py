"""One commit to the Hub, safe against races, server errors and damage on the way."""

import fnmatch
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

Result = TypeVar("Result")

TRIES = 4
PAUSE_SECONDS = 1.0  # before the second try; doubled at each further one


class HubError(Exception):
    """The Hub refused, could not be reached, or holds something other than what was sent."""


def commit_files(
    repo_id: str,
    files: dict[str, Path],
    *,
    message: str,
    owned: tuple[str, ...] = (),
    card: RepoCard | None = None,
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
) -> str:
    """Make a repository hold these files, by one commit or none at all.

    Nothing is visible before the commit, which names its parent: of two pushes that race, one is refused.
    At the end the weights are read back and compared.

    Args:
        files: path in the repository to file here.
        owned: patterns of paths that are deleted if they are not among the files.
        card: checked by the Hub's own rules first.

    Returns:
        Address of the commit, or of the one that held these files already.

    Raises:
        HubError: with what to do about it.
    """
    api = HfApi()
    with hub_errors(repo_id):
        if card is not None:
            _retrying(
                lambda: card.validate(repo_type="model" if repo_type == "model" else repo_type)
            )
        repo_id = _retrying(
            lambda: api.create_repo(
                repo_id,
                repo_type=repo_type,
                private=private,
                exist_ok=True,
                space_sdk="gradio" if repo_type == "space" else None,
            )
        ).repo_id
        if revision:
            _retrying(
                lambda: api.create_branch(
                    repo_id, branch=revision, repo_type=repo_type, exist_ok=True
                )
            )
        place = {"repo_id": repo_id, "repo_type": repo_type, "revision": revision}
        info = _retrying(lambda: api.repo_info(**place, files_metadata=True))
        there = {sibling.rfilename: sibling for sibling in info.siblings or []}
        wanted = {name: _fingerprint(path) for name, path in files.items()}
        operations = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
            for name, path in files.items()
            if name not in there or not _same(there[name], wanted[name])
        ]
        operations += [
            CommitOperationDelete(path_in_repo=name)
            for name in there
            if name not in files and any(fnmatch.fnmatch(name, pattern) for pattern in owned)
        ]
        commit = info.sha
        if operations:
            commit = _commit(api, place, operations, message, info.sha, wanted)
        _read_back(api, {**place, "revision": commit}, wanted)
    return (
        f"{api.endpoint}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}/tree/{commit}"
    )


def _commit(
    api: HfApi, place: dict, operations: list, message: str, parent: str, wanted: dict
) -> str:
    def attempt() -> str:
        try:
            return api.create_commit(
                **place, operations=operations, commit_message=message, parent_commit=parent
            ).oid
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code != 412:
                raise
            # Someone else was faster, or our own commit arrived although its answer did not.
            info = api.repo_info(**place, files_metadata=True)
            there = {sibling.rfilename: sibling for sibling in info.siblings or []}
            if all(name in there and _same(there[name], print_) for name, print_ in wanted.items()):
                return info.sha
            raise HubError(
                f"{place['repo_id']} changed while this push was under way: nothing of it is there. "
                "Look at what changed and push again"
            ) from error

    return _retrying(attempt)


def _retrying(call: Callable[[], Result]) -> Result:
    """Call again after server errors, which huggingface_hub does not do for commits and new repositories."""
    for number in range(TRIES - 1):
        try:
            return call()
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code < 500:
                raise
        except HTTPError:  # no answer at all
            pass
        time.sleep(PAUSE_SECONDS * 2**number)
    return call()


def _fingerprint(path: Path) -> tuple[int, str, str]:
    """Size, sha256 (how the Hub names large files) and git's own hash (how it names small ones)."""
    size = path.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            git.update(block)
    return size, sha256.hexdigest(), git.hexdigest()


def _same(sibling, fingerprint: tuple[int, str, str]) -> bool:
    size, sha256, git = fingerprint
    if sibling.lfs:
        return sibling.lfs.sha256 == sha256
    return sibling.blob_id == git and sibling.size in (None, size)


def _read_back(api: HfApi, place: dict, wanted: dict[str, tuple[int, str, str]]) -> None:
    """Compare the repository with what was sent; weights are downloaded, as a stranger would."""
    info = _retrying(lambda: api.repo_info(**place, files_metadata=True))
    there = {sibling.rfilename: sibling for sibling in info.siblings or []}
    wrong = [
        name
        for name, print_ in wanted.items()
        if name not in there or not _same(there[name], print_)
    ]
    with tempfile.TemporaryDirectory(prefix="simvq-read-back-") as folder:
        for name in wanted:
            if name in wrong or not name.endswith(".safetensors"):
                continue
            path = _retrying(
                lambda name=name: api.hf_hub_download(**place, filename=name, local_dir=folder)
            )
            if _fingerprint(Path(path)) != wanted[name]:
                wrong.append(name)
    if wrong:
        raise HubError(
            f"{place['repo_id']} does not hold what was sent: {', '.join(sorted(wrong))} came back different. "
            "Push again"
        )


@contextmanager
def hub_errors(repo_id: str = "the Hub") -> Iterator[None]:
    """Turn the client's exceptions into one line that says what to do. Tokens are never part of it."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise HubError(_LOG_IN) from error
    except GatedRepoError as error:
        raise HubError(f"access to {repo_id} is gated: ask for it on its page") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo_id} has no such revision") from error
    except RepositoryNotFoundError as error:
        if error.response is not None and error.response.status_code == 401:
            raise HubError(_LOG_IN) from error
        raise HubError(f"{repo_id} is not there, or this account may not see it") from error
    except HFValidationError as error:
        raise HubError(str(error)) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status == 401:
            raise HubError(_LOG_IN) from error
        if status == 403:
            raise HubError(
                f"this account may not write to {repo_id}: use a token with write access, or another name"
            ) from error
        said = error.server_message or error
        raise HubError(f"the Hub answered {status} for {repo_id}: {said}") from error
    except RuntimeError as error:
        # What huggingface_hub makes of a large file that cannot be sent.
        if not isinstance(error.__cause__, HTTPError):
            raise
        raise HubError(f"{error}: nothing was published. Push again") from error
    except HTTPError as error:
        raise HubError(f"cannot reach the Hub ({type(error).__name__}): {error}") from error


_LOG_IN = "the Hub knows no such user: run `hf auth login` with a token that may write"
