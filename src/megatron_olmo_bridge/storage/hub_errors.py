"""Explain errors of the Hugging Face hub, and say what to do."""

from __future__ import annotations


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


def why_not_pushed(error: Exception, endpoint: str) -> str:
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
