"""One commit to the Hub, safe against races, server errors and damage on the way."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import validate_repo_id

from hub_cards.pushed_files import (
    LIST_FILE,
    Changes,
    Fingerprint,
    plan_changes,
    read_list,
    write_list,
)
from hub_cards.user_error import UserError

Result = TypeVar("Result")

TRIES = 4
PAUSE_SECONDS = 1.0  # before the second try; doubled at each further one


class HubError(UserError):
    """The Hub refused, could not be reached, or holds something other than what was sent."""


@dataclass
class _State:
    """A repository at one commit, and what a push would do to it."""

    commit: str
    there: dict[str, RepoSibling]
    changes: Changes


def commit_files(
    repo_id: str,
    files: dict[str, Path],
    *,
    message: str,
    card: RepoCard | None = None,
    repo_type: str = "model",
    space_sdk: str = "gradio",
    private: bool | None = None,
    revision: str | None = None,
) -> str:
    """Make a repository hold these files, by one commit or none at all.

    Of what else is there, exactly those files are deleted, and named, that an earlier push wrote and nobody
    changed since: LIST_FILE, in the repository, tells which. Nothing is visible before the commit, which names
    its parent: of two pushes that race, one is refused. At the end the weights are read back and compared.

    Args:
        files: path in the repository to file here.
        card: checked by the Hub's own rules first.
        space_sdk: of a new Space, "gradio" or "static".

    Returns:
        Address of the commit, or of the one that held these files already.

    Raises:
        HubError: with what to do about it.
    """
    api = HfApi()
    with hub_errors(repo_id), tempfile.TemporaryDirectory(prefix="simvq-push-list-") as made:
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
                space_sdk=space_sdk if repo_type == "space" else None,
            )
        ).repo_id
        if revision:
            _retrying(
                lambda: api.create_branch(
                    repo_id, branch=revision, repo_type=repo_type, exist_ok=True
                )
            )
        place = {"repo_id": repo_id, "repo_type": repo_type, "revision": revision}
        files, wanted = _with_list(files, Path(made))
        state = _look(api, place, wanted)
        changes, commit = state.changes, state.commit
        operations = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=files[name])
            for name in changes.send
        ]
        operations += [CommitOperationDelete(path_in_repo=name) for name in changes.delete]
        if operations:
            commit = _commit(api, place, operations, message, state.commit, wanted)
            for name in changes.delete:
                print(f"{repo_id}: deleted {name}, which this push no longer sends")
            for note in changes.notes:
                print(f"{repo_id}: this push {note}")
        _read_back(api, {**place, "revision": commit}, wanted)
    return (
        f"{api.endpoint}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}/tree/{commit}"
    )


def preview_commit(
    repo_id: str, files: dict[str, Path], *, repo_type: str = "model", revision: str | None = None
) -> list[str]:
    """Lines on what commit_files would send, replace and delete. Only reads from the Hub, and never fails."""
    lines = [f"{path.stat().st_size:>14,}  {name}" for name, path in sorted(files.items())]
    api = HfApi()
    try:
        with hub_errors(repo_id), tempfile.TemporaryDirectory(prefix="simvq-push-list-") as made:
            place = {"repo_id": repo_id, "repo_type": repo_type, "revision": revision}
            if revision:
                branches = api.list_repo_refs(repo_id, repo_type=repo_type).branches
                if revision not in [branch.name for branch in branches]:
                    place["revision"] = None  # a new branch begins where main is
            _, wanted = _with_list(files, Path(made))
            changes = _look(api, place, wanted, tries=1).changes
    except (HubError, OSError) as error:
        return [*lines, f"cannot tell what would be deleted: {error}"]
    lines += [f"would delete {name}, which this push no longer sends" for name in changes.delete]
    lines += [f"this push {note}" for note in changes.notes]
    return lines if changes.delete else [*lines, "would delete nothing"]


def full_name(repo_id: str) -> str:
    """Owner and name of a repository: a bare name is one in this account's own name.

    Raises:
        HubError: if nobody is logged in, or the Hub cannot be reached.
    """
    if "/" in repo_id:
        return repo_id
    with hub_errors(repo_id):
        return f"{_retrying(HfApi().whoami)['name']}/{repo_id}"


def check_name(repo_id: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        HubError: if it cannot.
    """
    with hub_errors(repo_id):
        validate_repo_id(repo_id)


def check_may_push(repo_id: str, repo_type: str = "model") -> str | None:
    """Refuse what commit_files would refuse, as far as reading tells.

    Returns:
        Owner and name of the repository; None if the Hub cannot be asked, or nobody is logged in.

    Raises:
        HubError: if this account may not write there.
    """
    api = HfApi()
    with hub_errors(repo_id):
        try:
            account = api.whoami()
            owner, _, name = repo_id.rpartition("/")
            full = f"{owner or account['name']}/{name}"
            may = {account["name"], *(one["name"] for one in account.get("orgs", []))}
            token = account.get("auth", {}).get("accessToken", {})
            if token.get("role") == "read" or full.split("/")[0] not in may:
                raise HubError(_may_not_write(full))
            with suppress(RepositoryNotFoundError):  # it will be made
                api.auth_check(full, repo_type=repo_type, write=True)
        except LocalTokenNotFoundError:  # a look at the card needs no account
            return None
        except HfHubHTTPError as error:
            if error.response is not None and error.response.status_code < 500:
                raise
            return None
        except (HTTPError, OSError):
            return None
    return full


def is_hidden(repo_id: str) -> bool:
    """Tell whether a model is private or gated. One that does not exist yet is neither.

    Raises:
        HubError: if the Hub refuses or cannot be reached.
    """
    with hub_errors(repo_id):
        try:
            info = _retrying(lambda: HfApi().repo_info(repo_id))
        except RepositoryNotFoundError:
            return False
        return bool(info.private or info.gated)


def _with_list(
    files: dict[str, Path], made: Path
) -> tuple[dict[str, Path], dict[str, Fingerprint]]:
    """The files with the list of them, and their fingerprints."""
    wanted = {name: Fingerprint.of_file(path) for name, path in files.items()}
    write_list(made / LIST_FILE, wanted)
    wanted[LIST_FILE] = Fingerprint.of_file(made / LIST_FILE)
    return files | {LIST_FILE: made / LIST_FILE}, wanted


def _look(api: HfApi, place: dict, wanted: dict[str, Fingerprint], tries: int = TRIES) -> _State:
    """Read what a repository holds now."""
    info = _retrying(lambda: api.repo_info(**place, files_metadata=True), tries)
    there = {sibling.rfilename: sibling for sibling in info.siblings or []}
    listed = None
    if LIST_FILE in there:
        with tempfile.TemporaryDirectory(prefix="simvq-push-list-") as folder:
            at = {**place, "revision": info.sha}
            path = _retrying(
                lambda: api.hf_hub_download(**at, filename=LIST_FILE, local_dir=folder), tries
            )
            with suppress(ValueError):  # without it nothing is deleted, and plan_changes says so
                listed = read_list(Path(path))
    return _State(info.sha, there, plan_changes(there, wanted, listed))


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
            if all(name in there and print_.is_of(there[name]) for name, print_ in wanted.items()):
                return info.sha
            raise HubError(
                f"{place['repo_id']} changed while this push was under way: nothing of it is there. "
                "Look at what changed and push again"
            ) from error

    return _retrying(attempt)


def _retrying(call: Callable[[], Result], tries: int = TRIES) -> Result:
    """Call again after server errors, which huggingface_hub does not do for commits and new repositories."""
    for number in range(tries - 1):
        try:
            return call()
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code < 500:
                raise
        except HTTPError:  # no answer at all
            pass
        time.sleep(PAUSE_SECONDS * 2**number)
    return call()


def _read_back(api: HfApi, place: dict, wanted: dict[str, Fingerprint]) -> None:
    """Compare the repository with what was sent; weights are downloaded, as a stranger would."""
    info = _retrying(lambda: api.repo_info(**place, files_metadata=True))
    there = {sibling.rfilename: sibling for sibling in info.siblings or []}
    wrong = [
        name
        for name, print_ in wanted.items()
        if name not in there or not print_.is_of(there[name])
    ]
    with tempfile.TemporaryDirectory(prefix="simvq-read-back-") as folder:
        for name in wanted:
            if name in wrong or not name.endswith(".safetensors"):
                continue
            path = _retrying(
                lambda name=name: api.hf_hub_download(**place, filename=name, local_dir=folder)
            )
            if Fingerprint.of_file(Path(path)) != wanted[name]:
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
            raise HubError(_may_not_write(repo_id)) from error
        said = error.server_message or error
        raise HubError(f"the Hub answered {status} for {repo_id}: {said}") from error
    except RuntimeError as error:
        # What huggingface_hub makes of a large file that cannot be sent.
        if not isinstance(error.__cause__, HTTPError):
            raise
        raise HubError(f"{error}: nothing was published. Push again") from error
    except HTTPError as error:
        raise HubError(f"cannot reach the Hub ({type(error).__name__}): {error}") from error


def _may_not_write(repo_id: str) -> str:
    return (
        f"this account may not write to {repo_id}: use a token with write access, or another name"
    )


_LOG_IN = "the Hub knows no such user: run `hf auth login` with a token that may write"
