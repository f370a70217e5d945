"""Files of a model on the Hugging Face hub, at one commit, read without downloading the model."""

from __future__ import annotations

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.formats.remote_path import Status

from .http_files import HTTPFiles
from .hub_errors import why_not_fetched


class HubFiles(HTTPFiles):
    """Transport for ``hf://owner/name@revision``: huggingface_hub lists the files and names their
    addresses, as for a download."""

    is_immutable = True

    def __init__(self, repo: str, revision: str | None) -> None:
        """Resolve a revision to its commit, and list the files.

        Raises:
            InputError: the hub has no such model or revision, refuses it, or can't be reached.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        api = HfApi()
        try:
            commit = api.model_info(repo, revision=revision).sha
            tree = list(api.list_repo_tree(repo, recursive=True, revision=commit))
        except Exception as error:  # of the HTTP library, which depends on the version
            raise InputError(f"hf://{repo}: {why_not_fetched(error, repo, revision)}") from error
        super().__init__(f"hf://{repo}@{commit}")
        self.repo, self.commit = repo, commit
        self._files = {f.path: Status(f.size, f.blob_id) for f in tree if isinstance(f, RepoFile)}
        self._authorization = build_hf_headers()
        self._tags: dict[str, str] = {}
        """ETag of the first answer for each file, which comes from wherever the hub keeps it."""

    def listing(self) -> dict[str, Status]:
        return self._files

    def _url_of(self, key: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo, key, revision=self.commit)

    def _login(self) -> dict[str, str]:
        names = ("authorization", "user-agent")
        return {k: v for k, v in self._authorization.items() if k.lower() in names}

    def _is_same(self, key: str, status: Status, now: Status) -> bool:
        tag = self._tags.setdefault(key, now.tag)
        return (now.st_size, now.tag) == (status.st_size, tag)
