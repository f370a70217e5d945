"""Checkpoints that are somewhere else: converted by ranges, from a server that fails."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import olmo_bridge
from range_server import Site, serving

from megatron_olmo_bridge import import_checkpoint, synth, verify
from megatron_olmo_bridge.storage import execute, remote_files

FAULTS = ["slow", "short", "503", "", "drop", "429", "drop", "short", "429", "503", "", "drop"]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    made = synth("olmo2-tiny", folder / "hf", layers=24, max_shard_size="8MB", dtype="float32")
    (made / "tokenizer.json").write_text('{"a": "tokenizer"}')
    return made


@pytest.fixture
def site(hf: Path) -> Iterator[Site]:
    with serving(hf.parent) as site:
        yield site


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "FIRST_WAIT", 0.001)


def files(folder: Path) -> dict[str, bytes]:
    """Return the files of a conversion, without the record that names its source."""
    paths = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {n: p.read_bytes() for n, p in paths.items() if not n.endswith("olmo_bridge.json")}


def refused(*arguments: object) -> str:
    """Return the sentence that a command ends with."""
    done = olmo_bridge(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


# ------------------------------------------------------------------------------------ conversions


def test_an_import_from_a_server_that_fails_is_the_same_as_from_here(
    hf: Path, site: Site, tmp_path: Path
) -> None:
    plan = import_checkpoint(hf, tmp_path / "here")
    site.faults = list(FAULTS)
    two = threading.Barrier(2, timeout=60)  # the first is answered when there is a second
    site.before_large = lambda number: number <= 2 and two.wait()
    done = olmo_bridge("import", f"{site.url}/hf", tmp_path / "there", "--max-connections", "4")
    assert done.exit_code == 0, done.stderr
    assert site.faults == []
    assert files(tmp_path / "there") == files(tmp_path / "here")
    small = sum(f.stat().st_size for f in hf.iterdir() if f.suffix != ".safetensors")
    assert plan.source_bytes <= site.sent <= 1.01 * (plan.source_bytes + small)
    assert 2 <= site.most_open <= 4
    record = json.loads((tmp_path / "there/iter_0000000/olmo_bridge.json").read_text())
    assert record["source"] == f"{site.url}/hf"


def test_a_megatron_checkpoint_is_exported_and_verified_from_there(
    hf: Path, site: Site, tmp_path: Path
) -> None:
    import_checkpoint(hf, hf.parent / "megatron")
    site.faults = list(FAULTS)
    done = olmo_bridge("export", f"{site.url}/megatron", tmp_path / "back")
    assert done.exit_code == 0, done.stderr
    assert verify(hf, tmp_path / "back").equal
    done = olmo_bridge("verify", f"{site.url}/megatron", f"{site.url}/hf")
    assert (done.exit_code, "Equal" in done.stdout) == (0, True), done.stderr
    done = olmo_bridge("inspect", f"{site.url}/megatron", "--json")
    result = json.loads(done.stdout)["result"]
    assert result["folder"] == f"{site.url}/megatron/iter_0000000"
    there = hf.parent / "megatron/iter_0000000"
    sizes = {name: (there / name).stat().st_size for name in result["files"]}
    assert result["files"] == sizes and "__0_0.distcp" in sizes
    shutil.rmtree(hf.parent / "megatron")


def test_an_olmo_core_checkpoint_is_imported_from_there(
    hf: Path, site: Site, tmp_path: Path
) -> None:
    done = olmo_bridge("export", hf, hf.parent / "step0", "--to", "olmo-core")
    assert done.exit_code == 0, done.stderr
    done = olmo_bridge("import", f"{site.url}/step0", tmp_path / "m")
    assert done.exit_code == 0, done.stderr
    assert verify(hf.parent / "step0", tmp_path / "m").equal
    shutil.rmtree(hf.parent / "step0")


def test_the_mean_of_checkpoints_there_is_that_of_those_here(
    hf: Path, site: Site, tmp_path: Path
) -> None:
    other = synth("olmo2-tiny", hf.parent / "other", layers=24, seed=1, dtype="float32")
    assert olmo_bridge("average", hf, other, tmp_path / "here").exit_code == 0
    there = [f"{site.url}/hf", f"{site.url}/other"]
    done = olmo_bridge("average", *there, tmp_path / "there")
    assert done.exit_code == 0, done.stderr
    assert files(tmp_path / "there") == files(tmp_path / "here")
    shutil.rmtree(other)


# ------------------------------------------------------------------------------ what goes wrong


def test_a_file_that_changes_ends_the_conversion(hf: Path, tmp_path: Path) -> None:
    shutil.copytree(hf, tmp_path / "site/hf")
    with serving(tmp_path / "site") as site:
        last = sorted((site.root / "hf").glob("*.safetensors"))[-1]

        def change(number: int) -> None:
            if number == 2:
                last.write_bytes(last.read_bytes())  # the same bytes at another time

        site.before_large = change
        said = refused("import", f"{site.url}/hf", tmp_path / "m")
    assert f"{site.url}/hf/{last.name}: changed while the checkpoint was read" in said
    assert not list(tmp_path.glob("m*"))


def test_a_config_that_changes_is_noticed_at_the_end(hf: Path, tmp_path: Path) -> None:
    shutil.copytree(hf, tmp_path / "site/hf")
    with serving(tmp_path / "site") as site:
        config = site.root / "hf/config.json"
        site.before_large = lambda number: number == 2 and config.write_bytes(config.read_bytes())
        said = refused("import", f"{site.url}/hf", tmp_path / "m")
    assert f"{site.url}/hf/config.json: changed while the checkpoint was read" in said
    assert not list(tmp_path.glob("m*"))


def test_a_server_that_never_recovers_is_given_up(site: Site, tmp_path: Path) -> None:
    site.faults = ["503"] * 1000
    said = refused("import", f"{site.url}/hf", tmp_path / "m")
    assert "given up after 6 attempts without progress: the server answers 503" in said


def test_an_interrupted_import_is_resumed(
    hf: Path, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_olmo_bridge.convert.to_megatron.FILE_BYTES", 4 << 20)
    import_checkpoint(hf, tmp_path / "here")

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("megatron_olmo_bridge.storage.stage.Stage.commit", interrupt)
        done = olmo_bridge("import", f"{site.url}/hf", tmp_path / "there")
    assert done.exit_code == 130
    before = site.sent
    done = olmo_bridge("import", f"{site.url}/hf", tmp_path / "there", "--resume")
    assert done.exit_code == 0, done.stderr
    assert site.sent - before < before / 10  # headers alone
    assert files(tmp_path / "there") == files(tmp_path / "here")


LOGIN = "user:pass-word@"
WRONG = [
    ({}, "ftp://host/hf", "ftp://: unknown; an address begins with https://, hf://, s3:// or gs"),
    ({}, "URL/absent", "URL/absent: there is no checkpoint (none of config.json, "),
    ({"forbidden": 403}, "URL/hf", "URL/hf: the server refuses access (403). Is a login missing"),
    ({"forbidden": 401}, "URL/hf", "URL/hf: the server refuses access (401). Is a login missing"),
    ({"forbidden": 418}, "URL/hf", "config.json: the server answers 418"),
    ({"has_ranges": False}, "URL/hf", "the server does not serve ranges of files. Download the"),
    ({"redirect": "file:///etc/passwd"}, "URL/hf", "redirects to file, which is not followed"),
    ({"redirect": "/hf/config.json"}, "URL/hf", "redirected more than 5 times"),
    (
        {},
        "http://127.0.0.1:9/hf",
        "http://127.0.0.1:9/hf/config.json: can't be reached: Connection",
    ),
    ({}, "http://no-such-host.invalid/hf", "can't be reached: "),
    ({}, "hf://owner", "hf://owner: write hf://owner/name or hf://owner/name@revision"),
]


@pytest.mark.parametrize(("settings", "source", "says"), WRONG)
def test_what_can_not_be_read_is_one_sentence(
    site: Site, tmp_path: Path, settings: dict[str, object], source: str, says: str
) -> None:
    for name, value in settings.items():
        setattr(site, name, value)
    said = refused("import", source.replace("URL", site.url), tmp_path / "m")
    assert says.replace("URL", site.url) in said
    assert not list(tmp_path.iterdir())


def test_secrets_are_sent_but_never_shown(site: Site, tmp_path: Path) -> None:
    site.login = "Basic dXNlcjpwYXNzLXdvcmQ="
    address = site.url.replace("//", f"//{LOGIN}") + "/hf?signature=secret"
    done = olmo_bridge("import", address, tmp_path / "m", "--log-file", tmp_path / "log")
    assert done.exit_code == 0, done.stderr
    assert all(path.endswith("?signature=secret") for path in site.asked)
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    site.login = "another"
    said = refused("import", address, tmp_path / "n")
    assert f"{site.url}/hf" in said
    for secret in ("pass-word", "signature", "dXNlcj"):
        assert secret not in done.stdout + done.stderr + said
        assert secret.encode() not in written


def test_a_login_is_not_sent_to_where_a_redirect_leads(
    hf: Path, site: Site, tmp_path: Path
) -> None:
    with serving(hf.parent) as elsewhere:
        site.login = "Basic dXNlcjpwYXNzLXdvcmQ="
        site.redirect = elsewhere.url + "{path}"
        elsewhere.login = "none"
        address = site.url.replace("//", f"//{LOGIN}") + "/hf"
        done = olmo_bridge("import", address, tmp_path / "m")
    assert done.exit_code == 0, done.stderr
    assert verify(hf, tmp_path / "m").equal
    assert site.sent == 0 < elsewhere.sent
    small = {"/hf/" + name for name in ("config.json", "model.safetensors.index.json")}
    assert small <= set(elsewhere.asked)
    assert len(site.asked) < len(elsewhere.asked)  # where it leads is asked again, not the first


def test_a_proxy_is_asked_for_the_whole_address(
    hf: Path, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", site.url)
    monkeypatch.setenv("no_proxy", "")
    done = olmo_bridge("import", "http://far-away.invalid/hf", tmp_path / "m")
    assert done.exit_code == 0, done.stderr
    assert all(path.startswith("http://far-away.invalid/hf/") for path in site.asked)


# ------------------------------------------------------------------------------- object stores


@pytest.fixture
def bucket(hf: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield a client of moto's S3, on loopback, whose bucket has the model."""
    pytest.importorskip("obstore", reason="obstore is not installed: pip install obstore")
    moto = pytest.importorskip("moto.server", reason="not installed: pip install 'moto[server]'")
    import boto3

    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {
        "AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true", "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=url)
    client.create_bucket(Bucket="models")
    for file in hf.iterdir():
        client.upload_file(str(file), "models", f"tiny/hf/{file.name}")
    yield client
    server.stop()


def test_a_model_in_a_bucket_is_converted(hf: Path, bucket: Any, tmp_path: Path) -> None:
    done = olmo_bridge("import", "s3://models/tiny/hf", tmp_path / "there")
    assert done.exit_code == 0, done.stderr
    import_checkpoint(hf, tmp_path / "here")
    assert files(tmp_path / "there") == files(tmp_path / "here")
    done = olmo_bridge("verify", "s3://models/tiny/hf", tmp_path / "there")
    assert (done.exit_code, "Equal" in done.stdout) == (0, True), done.stderr


def test_an_object_that_changes_ends_the_conversion(
    hf: Path, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change_and_write(*arguments: Any, **options: Any) -> None:
        bucket.put_object(Bucket="models", Key="tiny/hf/tokenizer.json", Body=b"another")
        write_files(*arguments, **options)

    write_files = execute._write_files
    monkeypatch.setattr(execute, "_write_files", change_and_write)
    said = refused("import", "s3://models/tiny/hf", tmp_path / "m")
    assert "s3://models/tiny/hf/tokenizer.json: changed while the checkpoint was read" in said


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("s3://models/absent", "s3://models/absent: there are no files"),
        ("s3://no-such-bucket/hf", "s3://no-such-bucket/hf: the server answers 404 Not Found"),
    ],
)
def test_what_is_not_in_a_bucket_is_one_sentence(
    bucket: Any, tmp_path: Path, source: str, says: str
) -> None:
    assert says in refused("import", source, tmp_path / "m")
