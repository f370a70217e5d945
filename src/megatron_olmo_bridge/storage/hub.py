"""The Hugging Face hub: ids, downloads, uploads, and explanations of its errors."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_olmo_bridge.errors import InputError, OutputError
from megatron_olmo_bridge.formats.hf_folder import HUB_PATTERNS, refuse_outside

from .provenance import PROVENANCE

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""``owner/name``"""
_HUB_ID_AT = re.compile(rf"(?P<repo>{HUB_ID.pattern})(@(?P<revision>\S+))?")


def fetch(source: str, revision: str | None) -> tuple[Path, str, str | None]:
    """Return a local folder for a path or a hub id, its name to record, and the hub's commit.

    Args:
        source: a path, or a hub id such as ``allenai/OLMo-2-0425-1B``, which may name a branch, tag
            or commit: ``owner/name@revision``.
        revision: branch, tag or commit, if the id does not name one.

    Raises:
        InputError: there is no such folder, repository or revision, or the download fails.
    """
    path, on_hub = Path(source).expanduser(), _on_hub(source)
    if on_hub is None:
        if revision is not None:
            raise InputError(
                f"{source}: is a path; --revision is for a hub id such as allenai/OLMo-2-0425-1B"
            )
        if not path.exists():
            raise InputError(f"{source}: no such folder, and not a hub id (owner/name)")
        return path, str(path.resolve()), None
    repo, named = on_hub["repo"], on_hub["revision"]
    if named and revision and named != revision:
        raise InputError(f"{source}: names another revision than --revision {revision}")
    revision = revision or named
    from huggingface_hub import snapshot_download

    try:
        # This uses the cache if the hub can't be reached.
        folder = snapshot_download(repo, revision=revision, allow_patterns=list(HUB_PATTERNS))
    except Exception as error:  # of the HTTP library, which depends on the version
        raise InputError(f"{repo}: {why_not_fetched(error, repo, revision)}") from error
    return Path(folder), repo, Path(folder).name  # the cache names a snapshot by its commit


def local_path(source: str | Path, revision: str | None = None) -> Path:
    """Return a path unchanged, or the downloaded folder of a hub id.

    Raises:
        InputError: as :func:`fetch`, but not for a path that doesn't exist.
    """
    if _on_hub(str(source)) or revision:
        return fetch(str(source), revision)[0]
    return Path(source).expanduser()


def hub_repository(source: str) -> str | None:
    """Return ``owner/name`` of a hub id, which may name a revision; None for a path."""
    on_hub = _on_hub(source)
    return on_hub["repo"] if on_hub else None


def _on_hub(source: str) -> re.Match[str] | None:
    return None if Path(source).expanduser().exists() else _HUB_ID_AT.fullmatch(source)


def check_can_push(repo: str) -> None:
    """Raise InputError if a push must fail, without contacting the hub."""
    from huggingface_hub import get_token

    if not HUB_ID.fullmatch(repo):
        raise InputError(f"--push-to-hub {repo}: is not a hub id; write owner/name")
    if not get_token():
        raise InputError(
            f"--push-to-hub {repo}: the hub wants a token. Run `hf auth login`, or set HF_TOKEN; "
            "https://huggingface.co/settings/tokens makes one that may write."
        )


def push_to_hub(
    folder: Path, repo: str, *, private: bool = False, revision: str | None = None
) -> str:
    """Upload a Hugging Face folder; create the repository and the branch if they don't exist.

    Everything is uploaded except the record of the conversion, which names local paths; a link to a
    file outside the folder is refused. Files that are already on the hub are not sent again, so an
    interrupted push can simply be repeated.

    Args:
        folder: what ``export`` wrote.
        repo: ``owner/name``.
        private: make a new repository private; an existing one is not changed.
        revision: the branch; ``main`` by default.

    Returns:
        The address of the model.

    Raises:
        InputError: there is no token, or ``repo`` is not a hub id.
        FormatError: a link in the folder points outside it.
        OutputError: the hub refuses or can't be reached. It then has no checkpoint, or the previous
            one.
    """
    check_can_push(repo)
    for file in folder.rglob("*"):
        refuse_outside(file, folder)
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            ignore_patterns=[PROVENANCE],
            commit_message=f"Upload {folder.resolve().name}",
        )
    except Exception as error:  # of the HTTP library, which depends on the version
        raise OutputError(f"{repo}: {_reason(error, api.endpoint)}") from error
    return f"{url}/tree/{revision}" if revision is not None else str(url)


def why_not_fetched(error: Exception, repo: str, revision: str | None) -> str:
    """Return why the hub did not deliver a model, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = f"the hub at {constants.ENDPOINT}"
    status, last = _answer(error)
    if isinstance(error, GatedRepoError):
        return (
            f"gated: accept its conditions at {constants.ENDPOINT}/{repo}, then run "
            "`hf auth login`, or set HF_TOKEN to a token of that account"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{hub} has no revision {revision!r} of it"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"no such folder here, and {hub} shows no such model. Where it is private, run "
            "`hf auth login`, or set HF_TOKEN to a token that may read it"
        )
    if status in (401, 403):
        return (
            f"{hub} refuses the token ({status}). Run `hf auth login`, or set HF_TOKEN to one that "
            "may read the model"
        )
    if status is not None:
        return f"{hub} answers {status}: {last}"
    if isinstance(error, LocalEntryNotFoundError):
        cache = f"not in the cache {constants.HF_HUB_CACHE} (HF_HOME says where that is)"
        if constants.HF_HUB_OFFLINE:
            return (
                f"no such folder here, and {cache}. HF_HUB_OFFLINE is set, so the hub is not "
                "asked: unset it, or bring the cache from where there is a network"
            )
        return f"no such folder here, {cache}, and {hub} (HF_ENDPOINT) can't be reached"
    return f"{hub} could not deliver it: {last}"


def _answer(error: Exception) -> tuple[int | None, str]:
    """Return the HTTP status behind an error, None if the hub gave none, and its last line."""
    from huggingface_hub.errors import HfHubHTTPError

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__  # huggingface_hub wraps it
    lines = str(cause or error).strip().splitlines()
    status = cause.response.status_code if cause is not None else None
    return status, lines[-1] if lines else type(error).__name__


def _reason(error: Exception, endpoint: str) -> str:
    """Return what the hub's answer means, and what to do."""
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    status, last = _answer(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the hub is not asked"
    if isinstance(error, HFValidationError):
        return last
    if status is None:
        return f"the hub at {endpoint} could not be reached, or broke off: {last}"
    return {
        401: "the hub does not accept the token. Run `hf auth login`, or set HF_TOKEN anew",
        403: "the token may not write here: it lacks the permission, or the owner is another",
        404: "the hub has no such owner, or the token may not see it",
    }.get(status, f"the hub answers {status}: {last}")
