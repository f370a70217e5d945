"""The Hugging Face hub: ids, downloads and uploads."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_olmo_bridge.errors import InputError, OutputError
from megatron_olmo_bridge.formats.hf_folder import HUB_PATTERNS, refuse_outside
from megatron_olmo_bridge.formats.remote_path import AnyPath, RemotePath

from .hub_errors import why_not_fetched, why_not_pushed
from .provenance import PROVENANCE
from .remote import HUB_ID, open_remote, scheme_of
from .remote_files import CONNECTIONS

_HUB_ID_AT = re.compile(rf"(?P<repo>{HUB_ID.pattern})(@(?P<revision>\S+))?")


def fetch(
    source: str, revision: str | None, connections: int = CONNECTIONS
) -> tuple[AnyPath, str, str | None]:
    """Return the folder of a source, its name to record, and the hub's commit.

    Args:
        source: a path; or an address, which is not downloaded; or a hub id such as
            ``allenai/OLMo-2-0425-1B``, which may name a branch, tag or commit:
            ``owner/name@revision``.
        revision: branch, tag or commit, if the id does not name one.
        connections: number of requests in flight, for an address.

    Raises:
        InputError: there is no such folder, repository or revision, or the download fails.
    """
    if scheme_of(source):
        if revision is not None:
            raise InputError("--revision is for a hub id such as allenai/OLMo-2-0425-1B")
        remote = open_remote(source, connections)
        name, _, commit = str(remote).partition("@")
        return remote, name, commit or None
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


def locate(
    source: str | AnyPath, revision: str | None = None, connections: int = CONNECTIONS
) -> AnyPath:
    """Return a path unchanged, the path at an address, or the downloaded folder of a hub id.

    Raises:
        InputError: as :func:`fetch`, but not for a path that doesn't exist.
    """
    if isinstance(source, RemotePath):
        return source
    if scheme_of(str(source)) or _on_hub(str(source)) or revision:
        return fetch(str(source), revision, connections)[0]
    return Path(source).expanduser()


def hub_repository(source: str) -> str | None:
    """Return ``owner/name`` of a hub id, which may name a revision; None for a path."""
    on_hub = _on_hub(source)
    return on_hub["repo"] if on_hub else None


def _on_hub(source: str) -> re.Match[str] | None:
    is_other = scheme_of(source) or Path(source).expanduser().exists()
    return None if is_other else _HUB_ID_AT.fullmatch(source)


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
        raise OutputError(f"{repo}: {why_not_pushed(error, api.endpoint)}") from error
    return f"{url}/tree/{revision}" if revision is not None else str(url)
