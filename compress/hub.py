"""Put an emitted folder on the hub: one atomic commit, retried only while it is known not to have landed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from json import JSONDecodeError
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from compress.card import PLACE
from compress.checkpoint import check_files
from compress.errors import CompressError
from compress.report import Report

ATTEMPTS = 6
WEIGHTS = (".safetensors", ".index.json", ".bin")  # old ones would be loaded instead of ours, or mixed with them
FAILURES = (HTTPError, JSONDecodeError)  # a gateway's page instead of the hub's JSON is as good as a 5xx


def push(
    folder: str | Path,
    repo: str,
    private: bool = False,
    pr: bool = False,
    message: str | None = None,
    token: str | None = None,
    *,
    api: HfApi | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Commit the folder to the repository, made where it is missing; the address of the repository or pull request."""
    folder = Path(folder)
    report = Report.read(folder)
    if report.verified.get("passed") is not True:
        raise CompressError(f"{folder}: the reload check has not passed; `compress verify {folder}` must pass first")
    check_files(folder)  # what is pushed is what was verified
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise CompressError(f"hub: {error} It must be NAME or OWNER/NAME") from error
    api = api or HfApi(token=token)
    try:
        repo = _patiently(lambda: api.create_repo(repo, private=private or None, exist_ok=True).repo_id, sleep)
        info = _patiently(lambda: api.model_info(repo), sleep)
        if private and not info.private:
            raise CompressError(f"hub: {repo} exists and is public; make it private there, or push without --private")
        operations = _operations(folder, repo, {file.rfilename for file in info.siblings})
        message = message or f"{report.model} compressed by {report.recipe}"
        return _commit(api, repo, operations, info.sha, message, pr, sleep)
    except (HTTPError, OfflineModeIsEnabled, ValueError) as error:  # ValueError: the hub refuses the card's metadata
        raise CompressError(_told(error, repo)) from error


def _operations(folder: Path, repo: str, there: set[str]) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Add what the folder holds, with the repository's name in the card, and delete weights that it does not hold."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in name.parts):
            files[name.as_posix()] = path
    card = files.get("README.md")
    if card:
        text = card.read_text("utf-8").replace(f'from_pretrained("{PLACE}"', f'from_pretrained("{repo}"')
        files["README.md"] = text.encode()
    stale = sorted(name for name in there - set(files) if name.endswith(WEIGHTS))
    return [CommitOperationAdd(name, content) for name, content in files.items()] + [
        CommitOperationDelete(name) for name in stale
    ]


def _commit(api: HfApi, repo: str, operations: list, parent: str, message: str, pr: bool, sleep) -> str:
    """Exactly one commit on `parent`: a lost answer is looked up in the repository before anything is sent again."""

    def refs() -> dict[str, str]:
        if not pr:
            return {"main": api.model_info(repo).sha}
        pulls = api.list_repo_refs(repo, include_pull_requests=True).pull_requests
        return {pull.ref: pull.target_commit for pull in pulls}

    additions = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
    try:
        _patiently(lambda: api.preupload_lfs_files(repo, additions, create_pr=pr, free_memory=False), sleep)
    except RuntimeError as error:  # what the hub's client makes of an upload that broke off for good
        reason = " ".join(str(error.__cause__ or error).split())
        raise CompressError(f"hub: {error} {reason}; nothing was committed, push again to go on") from error
    before = _patiently(refs, sleep) if pr else {"main": parent}

    def attempt() -> str:
        try:
            commit = api.create_commit(repo, operations, commit_message=message, parent_commit=parent, create_pr=pr)
        except FAILURES as error:
            if not (_transient(error) or _status(error) == 412):
                raise
            moved = [ref for ref, sha in _patiently(refs, sleep).items() if before.get(ref) != sha]
            for ref in moved:
                if _patiently(lambda ref=ref: _holds(api, repo, ref, operations), sleep):
                    return f"{api.endpoint}/{repo}" + (f"/discussions/{ref.rpartition('/')[2]}" if pr else "")
            if moved and not pr:
                raise CompressError(
                    f"hub: somebody else committed to {repo} meanwhile; look at it and push again, or push with --pr"
                ) from error
            raise
        return commit.pr_url or f"{api.endpoint}/{repo}"

    return _patiently(attempt, sleep)


def _holds(api: HfApi, repo: str, ref: str, operations: list) -> bool:
    """Is the tree at `ref` what our operations make?"""
    tree = api.list_repo_tree(repo, recursive=True, revision=ref)
    files = {file.path: file for file in tree if isinstance(file, RepoFile)}
    return all(
        operation.path_in_repo not in files
        if isinstance(operation, CommitOperationDelete)
        else _same(files.get(operation.path_in_repo), operation)
        for operation in operations
    )


def _same(file: RepoFile | None, addition: CommitOperationAdd) -> bool:
    if file is None:
        return False
    if file.lfs:
        return file.lfs.sha256 == addition.upload_info.sha256.hex()
    with addition.as_file() as stream:
        return file.blob_id == hashlib.sha1(b"blob %d\0" % file.size + stream.read()).hexdigest()


def _patiently(call: Callable, sleep: Callable[[float], None]):
    """The call's answer, asked for again with growing pauses while the hub is out of order."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return call()
        except FAILURES as error:
            if not _transient(error):
                raise
        sleep(2.0**attempt)
    return call()


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _transient(error: Exception) -> bool:
    """No answer at all, or one that says `later`."""
    status = _status(error)
    return status is None or status >= 500 or status in (408, 429)


def _told(error: Exception, repo: str) -> str:
    """One line that says what to do."""
    if _status(error) == 401:
        return f"hub: it does not accept the token for {repo}; log in with `hf auth login` or give one that may write"
    if _status(error) == 403:
        return f"hub: the token may not write to {repo}; it must have write access there, or push with --pr"
    reason = " ".join(str(error).split()) or type(error).__name__
    later = f"; it was tried {ATTEMPTS} times" if isinstance(error, FAILURES) and _transient(error) else ""
    return f"hub: {repo} cannot be pushed: {reason}{later}"
