"""What is not sent to the hub."""

from pathlib import Path

import pytest

from megatron_olmo_bridge.errors import FormatError
from megatron_olmo_bridge.storage.hub import push_to_hub


@pytest.mark.parametrize("name", ["notes.txt", "folder/notes.txt"])
def test_a_link_that_leads_out_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_any")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "secret").touch()
    (tmp_path / "hf" / name).parent.mkdir(parents=True)
    (tmp_path / "hf" / name).symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError, match=r"notes\.txt: is a link to .*secret, outside"):
        push_to_hub(tmp_path / "hf", "owner/name")
