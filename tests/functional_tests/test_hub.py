"""Import from the hub: the real huggingface_hub against a small local server."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from launching import served, with_hub
from slow import slow_but

from megatron_olmo_bridge import synth, verify

REPO = "org/tiny"
REVISION = "stage1-step10-tokens1B"
REFUSED = {
    "org/gated": (403, "GatedRepo", "Access to model org/gated is restricted."),
    "org/private": (401, "RepoNotFound", ""),
    "org/expired": (401, "", "Invalid credentials in Authorization header"),
    "org/forbidden": (403, "", "Forbidden"),
    "org/broken": (501, "", "Out of order"),
}
"""Replies of the real hub for these models: status, code and message."""
COMMITS = {"main": "a" * 40, REVISION: "b" * 40}


@dataclass
class Hub:
    """Two revisions of one model, and the requests received."""

    folders: dict[str, Path]
    """Folder of each commit."""
    url: str = ""
    asked: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    """Headers with which ranges were asked for."""

    def commit(self, revision: str) -> str | None:
        commit = COMMITS.get(revision, revision)
        return commit if commit in self.folders else None


class Handler(BaseHTTPRequestHandler):
    """The three endpoints of the hub that a snapshot download needs."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/").split("/")
        self.hub.asked.append(f"{self.command} {self.path}")
        match path:
            case ["api", "models", owner, name, "revision" | "tree" as what, revision, *_]:
                pass
            case ["api", "models", owner, name]:
                what, revision = "revision", "main"
            case [owner, name, "resolve", revision, *rest]:
                what = "/".join(rest)
            case _:
                return self.fail("EntryNotFound")
        if refusal := REFUSED.get(f"{owner}/{name}"):
            status, code, message = refusal
            return self.fail(code, status=status, message=message)
        if f"{owner}/{name}" != REPO:
            return self.fail("RepoNotFound")
        commit = self.hub.commit(revision)
        if commit is None:
            return self.fail("RevisionNotFound")
        folder = self.hub.folders[commit]
        files = sorted(p for p in folder.iterdir() if p.is_file())
        if what == "revision":
            siblings = [{"rfilename": p.name} for p in files]
            return self.answer({"id": REPO, "sha": commit, "siblings": siblings})
        if what == "tree":
            return self.answer(
                [
                    {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": tag(p)}
                    for p in files
                ]
            )
        if not (folder / what).is_file():
            return self.fail("EntryNotFound", commit)
        data, etag = (folder / what).read_bytes(), tag(folder / what)
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not found:
            return self.send(200, data, commit, etag=etag)
        if what.endswith(".safetensors") and "signature" not in self.path:
            return self.send(302, b"", commit, location=f"{self.path}?signature=1")
        self.hub.tokens.add(self.headers.get("Authorization"))
        begin, end = int(found[1]), min(int(found[2]) + 1, len(data))
        self.range = f"bytes {begin}-{end - 1}/{len(data)}"
        return self.send(206, data[begin:end], commit, etag=etag)

    do_HEAD = do_GET  # noqa: N815

    def answer(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), None, kind="application/json")

    def fail(
        self, code: str, commit: str | None = None, status: int = 404, message: str = ""
    ) -> None:
        self.send(status, b"{}", commit, code=code, message=message)

    def send(
        self,
        status: int,
        body: bytes,
        commit: str | None,
        etag: str = "",
        code: str = "",
        kind: str = "application/octet-stream",
        message: str = "",
        location: str = "",
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", kind)
        for name, value in (
            ("X-Repo-Commit", commit),
            ("ETag", etag and f'"{etag}"'),
            ("X-Error-Code", code),
            ("X-Error-Message", message),
            ("Location", location),
            ("Content-Range", self.range if status == 206 else ""),
        ):
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def tag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    folders = {}
    for seed, commit in enumerate(COMMITS.values()):
        folders[commit] = synth(
            "olmo2-tiny", root / commit, seed=seed, layers=2, max_shard_size="500KB"
        )
        (folders[commit] / "tokenizer.json").write_text('{"a": "tokenizer"}')
        (folders[commit] / "pytorch_model.bin").write_bytes(b"not to be fetched")
    hub = Hub(folders)
    with served(type("HubHandler", (Handler,), {"hub": hub})) as hub.url:
        yield hub


@pytest.mark.parametrize(
    ("revision", "commit"),
    [(None, COMMITS["main"]), (REVISION, COMMITS[REVISION]), ("b" * 40, COMMITS[REVISION])],
)
def test_a_revision_is_pinned_to_its_commit(
    hub: Hub, tmp_path: Path, revision: str | None, commit: str
) -> None:
    flags = ["--revision", revision] if revision else []
    done = with_hub(tmp_path, hub.url, "import", REPO, "m", *flags)
    assert done.returncode == 0, done.stderr
    recorded = json.loads((tmp_path / "m/iter_0000000/olmo_bridge.json").read_text())
    assert (recorded["source"], recorded["revision"]) == (REPO, commit)
    assert verify(hub.folders[commit], tmp_path / "m").equal
    assert (tmp_path / "m/iter_0000000/hf/tokenizer.json").exists()
    shown = with_hub(tmp_path, hub.url, "inspect", "m").stdout
    assert f"{REPO} at {commit}" in shown
    assert not [a for a in hub.asked if "pytorch_model.bin" in a]


def test_the_cache_is_used_when_the_hub_is_unreachable(hub: Hub, tmp_path: Path) -> None:
    first = with_hub(tmp_path, hub.url, "import", REPO, "a", "--revision", REVISION)
    assert first.returncode == 0, first.stderr
    nowhere = "http://127.0.0.1:9"
    for name, environment in (("b", {}), ("c", {"HF_HUB_OFFLINE": "1"})):
        done = with_hub(
            tmp_path, nowhere, "import", REPO, name, "--revision", REVISION, **environment
        )
        assert done.returncode == 0, done.stderr
        texts = [(tmp_path / n / "iter_0000000/olmo_bridge.json").read_text() for n in ("a", name)]
        assert texts[0] == texts[1]
    done = with_hub(tmp_path, nowhere, "import", "org/other", "d", HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    cache = f"not in the cache {tmp_path}/cache/hub (HF_HOME says where that is)"
    assert done.stderr == (
        f"olmo-bridge: org/other: no such folder here, and {cache}. HF_HUB_OFFLINE is set, so the "
        "hub is not asked: unset it, or bring the cache from where there is a network\n"
    )
    done = with_hub(tmp_path, nowhere, "import", "org/other", "d")
    assert done.returncode == 2
    assert done.stderr == (
        f"olmo-bridge: org/other: no such folder here, {cache}, and the hub at {nowhere} "
        "(HF_ENDPOINT) can't be reached\n"
    )


def test_a_model_is_converted_without_a_download(hub: Hub, tmp_path: Path) -> None:
    done = with_hub(tmp_path, hub.url, "import", f"hf://{REPO}@{REVISION}", "m", HF_TOKEN="hf_any")
    assert done.returncode == 0, done.stderr
    recorded = json.loads((tmp_path / "m/iter_0000000/olmo_bridge.json").read_text())
    assert (recorded["source"], recorded["revision"]) == (f"hf://{REPO}", COMMITS[REVISION])
    assert verify(hub.folders[COMMITS[REVISION]], tmp_path / "m").equal
    assert (tmp_path / "m/iter_0000000/hf/tokenizer.json").exists()
    assert hub.tokens == {"Bearer hf_any"}
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    done = with_hub(tmp_path, hub.url, "verify", f"hf://{REPO}", "m")
    assert (done.returncode, "NOT equal" in done.stdout) == (1, True), done.stderr


ABSENT = [
    (
        ("hf://org/absent",),
        "hf://org/absent: no such folder here, and the hub at URL shows no",
    ),
    (("hf://org/gated",), "hf://org/gated: gated: accept its conditions at URL/org/gated, then"),
    ((f"hf://{REPO}@no-such",), f"hf://{REPO}: the hub at URL has no revision 'no-such' of it"),
    ((f"hf://{REPO}", "--revision", "main"), "--revision is for a hub id such as allenai/OLMo-2"),
    ((REPO, "--revision", "no-such"), f"{REPO}: the hub at URL has no revision 'no-such' of"),
    ((f"{REPO}@no-such",), f"{REPO}: the hub at URL has no revision 'no-such' of it"),
    ((f"{REPO}@main", "--revision", "no-such"), "names another revision than --revision"),
    (("org/absent",), "org/absent: no such folder here, and the hub at URL shows no such"),
    (("org/private",), "Where it is private, run `hf auth login`, or set HF_TOKEN"),
    (("org/gated",), "org/gated: gated: accept its conditions at URL/org/gated, then run"),
    (("org/expired",), "org/expired: the hub at URL refuses the token (401)"),
    (("org/forbidden",), "org/forbidden: the hub at URL refuses the token (403)"),
    (("org/broken",), "org/broken: the hub at URL answers 501: "),
]


@pytest.mark.parametrize(("args", "says"), slow_but([*ABSENT[:4], ABSENT[5]], ABSENT))
def test_a_missing_model_is_reported(
    hub: Hub, tmp_path: Path, args: tuple[str, ...], says: str
) -> None:
    done = with_hub(tmp_path, hub.url, "import", args[0], "m", *args[1:])
    assert (done.returncode, done.stdout) == (2, "")
    assert says.replace("URL", hub.url) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "m").exists()


def test_a_dry_run_accepts_a_hub_id(hub: Hub, tmp_path: Path) -> None:
    done = with_hub(tmp_path, hub.url, "import", REPO, "m", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["result"]["plans"][0]["operation"] == "import"
    assert not (tmp_path / "m").exists()


def test_a_hub_id_is_accepted_wherever_a_checkpoint_is_read(hub: Hub, tmp_path: Path) -> None:
    at = f"{REPO}@{REVISION}"
    done = with_hub(tmp_path, hub.url, "verify", at, hub.folders[COMMITS[REVISION]])
    assert (done.returncode, "Equal" in done.stdout) == (0, True), done.stderr
    done = with_hub(tmp_path, hub.url, "verify", hub.folders[COMMITS[REVISION]], REPO)
    assert (done.returncode, "NOT equal" in done.stdout) == (1, True), done.stderr
    for flags in ((at,), (REPO, "--revision", REVISION)):
        done = with_hub(tmp_path, hub.url, "inspect", *flags)
        assert done.returncode == 0, done.stderr
        assert COMMITS[REVISION] in "".join(done.stdout.split())
    done = with_hub(tmp_path, hub.url, "average", REPO, at, "mean", "--quiet")
    assert done.returncode == 0, done.stderr
    recorded = json.loads((tmp_path / "mean/olmo_bridge.json").read_text())["source"]
    assert recorded == f"{REPO} at {COMMITS['main']}, {REPO} at {COMMITS[REVISION]}"
    done = with_hub(tmp_path, hub.url, "inspect", "mean", "--revision", "main")
    assert done.returncode == 2
    assert "mean: is a path; --revision is for a hub id" in done.stderr
