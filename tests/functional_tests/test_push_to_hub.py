"""Export to the hub: the real huggingface_hub against a local server that keeps the uploads.

Uploads use LFS: the hub's newer storage (xet) has another protocol and is switched off here.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from launching import served, with_hub
from slow import slow_but

from megatron_olmo_bridge import verify

TOKEN = "hf_a_token_that_may_write"
REPO = "org/new-model"


@dataclass
class Hub:
    """Repositories with their branches, and the uploaded objects."""

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    """Contents by repository, branch and file."""
    visibility: dict[str, str | None] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    refuse: tuple[str, int] = ("", 0)
    """Part of a URL, and the status to reply there."""
    asked: list[str] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    """Endpoints of the hub that an upload needs."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.read()
        if self.allowed():
            self.answer({}, 404)

    def do_PUT(self) -> None:
        data = self.read()
        self.hub.objects[self.path.rpartition("/")[2]] = data
        self.answer({})

    def do_POST(self) -> None:
        data = self.read()
        if not self.allowed():
            return
        match self.path.partition("?")[0].strip("/").split("/"):
            case ["api", "validate-yaml"]:
                self.answer({"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                self.create(json.loads(data))
            case ["api", "models", owner, name, "branch", branch]:
                branches = self.hub.repos[f"{owner}/{name}"]
                new = branch not in branches
                branches.setdefault(branch, dict(branches["main"]))
                self.answer({}, 201 if new else 409)
            case ["api", "models", _, _, "preupload", _]:
                self.answer(
                    {
                        "files": [
                            {
                                "path": f["path"],
                                "shouldIgnore": False,
                                "uploadMode": "lfs"
                                if f["path"].endswith(".safetensors")
                                else "regular",
                            }
                            for f in json.loads(data)["files"]
                        ]
                    }
                )
            case [_, _, "info", "lfs", "objects", "batch"]:
                self.answer(
                    {
                        "transfer": "basic",
                        "objects": [
                            {"oid": o["oid"], "size": o["size"]}
                            | (
                                {}
                                if o["oid"] in self.hub.objects
                                else {
                                    "actions": {
                                        "upload": {"href": f"{self.hub.url}/store/{o['oid']}"}
                                    }
                                }
                            )
                            for o in json.loads(data)["objects"]
                        ],
                    },
                    kind="application/vnd.git-lfs+json",
                )
            case ["api", "models", owner, name, "commit", branch]:
                self.commit(self.hub.repos[f"{owner}/{name}"][branch], data)
            case _:
                self.answer({}, 404)

    def create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        address = {"url": f"{self.hub.url}/{repo}"}
        if repo in self.hub.repos:
            return self.answer(address, 409)
        self.hub.repos[repo] = {"main": {}}
        self.hub.visibility[repo] = asked.get("visibility")
        return self.answer(address)

    def commit(self, branch: dict[str, bytes], lines: bytes) -> None:
        for line in map(json.loads, lines.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                branch[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                data = self.hub.objects[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                branch[value["path"]] = data
        self.answer(
            {"commitUrl": f"{self.hub.url}/{REPO}/commit/{'c' * 40}", "commitOid": "c" * 40}
        )

    def read(self) -> bytes:
        self.hub.asked.append(f"{self.command} {self.path}")
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def allowed(self) -> bool:
        place, status = self.hub.refuse
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status = 401
        elif not (status and place in self.path):
            return True
        self.answer({"error": "a reason"}, status)
        return False

    def answer(self, value: object, status: int = 200, kind: str = "application/json") -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    with served(type("HubHandler", (Handler,), {"hub": hub})) as hub.url:
        yield hub


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the files to upload: all except the record, which names local paths."""
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != "olmo_bridge.json"}


def test_an_export_is_pushed_to_a_new_repository(hub: Hub, megatron: Path, tmp_path: Path) -> None:
    command = ("export", megatron, "out", "--push-to-hub", REPO, "--max-shard-size", "1MB")
    done = with_hub(tmp_path, hub.url, *command, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"On the hub:  {hub.url}/{REPO}"
    assert hub.visibility == {REPO: None}
    uploaded = hub.repos[REPO]["main"]
    assert uploaded == files_of(tmp_path / "out")
    assert len([name for name in uploaded if name.endswith(".safetensors")]) > 2

    card = uploaded["README.md"].decode()
    assert f'from_pretrained("{REPO}")' in card
    assert str(tmp_path) not in card
    assert str(megatron.parent) not in card
    assert verify(tmp_path / "out").equal  # the model card is not damage
    assert verify(megatron, tmp_path / "out").equal


def test_an_export_is_pushed_to_a_private_branch_twice(
    hub: Hub, megatron: Path, tmp_path: Path
) -> None:
    command = ("export", megatron, "out", "--push-to-hub", REPO, "--private", "--revision", "v1")
    done = with_hub(tmp_path, hub.url, *command, "--json", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["result"]["url"] == f"{hub.url}/{REPO}/tree/v1"
    assert done.stderr == ""
    assert hub.visibility == {REPO: "private"}
    assert hub.repos[REPO] == {"main": {}, "v1": files_of(tmp_path / "out")}

    (tmp_path / "out" / "README.md").write_text("my own card")
    hub.asked.clear()
    again = with_hub(tmp_path, hub.url, *command, "--resume", HF_TOKEN=TOKEN)
    assert again.returncode == 0, again.stderr
    assert hub.repos[REPO]["v1"]["README.md"] == b"my own card"
    assert not [a for a in hub.asked if a.startswith("PUT")], "the weights were there already"


REFUSALS = [
    ("repos/create", 401, "the hub does not accept the token. Run `hf auth login`"),
    ("repos/create", 403, "the token may not write here"),
    ("repos/create", 404, "the hub has no such owner, or the token may not see it"),
    ("branch/", 403, "the token may not write here"),
    ("info/lfs", 403, "the token may not write here"),
    ("commit/", 413, "the hub answers 413"),
]


@pytest.mark.parametrize(
    ("place", "status", "says"), slow_but([REFUSALS[0], REFUSALS[-1]], REFUSALS)
)
def test_a_refusal_of_the_hub_is_explained(
    hub: Hub, megatron: Path, tmp_path: Path, place: str, status: int, says: str
) -> None:
    hub.refuse = (place, status)
    command = ("export", megatron, "out", "--push-to-hub", REPO, "--revision", "v1")
    done = with_hub(tmp_path, hub.url, *command, HF_TOKEN=TOKEN)
    assert (done.returncode, done.stdout) == (2, "")
    first, second = done.stderr.splitlines()[-2:]
    assert first.startswith(f"olmo-bridge: {REPO}: {says}")
    assert second == (
        "The export itself is complete: out. To push it, run the same command with --resume, which "
        "does not write the files again."
    )
    assert "Traceback" not in done.stderr
    assert verify(megatron, tmp_path / "out").equal

    hub.refuse = ("", 0)
    done = with_hub(tmp_path, hub.url, *command, "--resume", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert hub.repos[REPO]["v1"] == files_of(tmp_path / "out")


def test_a_wrong_token_and_a_missing_network_are_explained(
    hub: Hub, megatron: Path, tmp_path: Path
) -> None:
    command = ("export", megatron, "out", "--push-to-hub", REPO, "--resume")
    done = with_hub(tmp_path, hub.url, *command, HF_TOKEN="hf_another")
    assert done.returncode == 2
    assert "the hub does not accept the token" in done.stderr
    nowhere = "http://127.0.0.1:9"
    done = with_hub(tmp_path, nowhere, *command, HF_TOKEN=TOKEN)
    assert done.returncode == 2
    assert f"{REPO}: the hub at {nowhere} could not be reached" in done.stderr
    done = with_hub(tmp_path, hub.url, *command, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "HF_HUB_OFFLINE is set" in done.stderr
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("options", "token", "says"),
    [
        (("--push-to-hub", REPO), "", "the hub wants a token. Run `hf auth login`, or set"),
        (("--push-to-hub", "no-owner"), TOKEN, "no-owner: is not a hub id; write owner/name"),
        (("--push-to-hub", REPO, "--iteration", "all"), TOKEN, "uploads a single model"),
        (("--private",), TOKEN, "--private and --revision need --push-to-hub"),
        (("--revision", "v1"), TOKEN, "--private and --revision need --push-to-hub"),
    ],
)
def test_a_push_that_must_fail_is_refused_before_writing(
    hub: Hub, megatron: Path, tmp_path: Path, options: tuple[str, ...], token: str, says: str
) -> None:
    environment = {"HF_TOKEN": token} if token else {}
    done = with_hub(tmp_path, hub.url, "export", megatron, "out", *options, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert not (tmp_path / "out").exists()
    assert hub.asked == []
