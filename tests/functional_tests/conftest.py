"""One small model for all: as Hugging Face in one file and in several, and its import."""

from pathlib import Path

import pytest

from megatron_olmo_bridge import import_checkpoint, synth


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """olmo2-tiny as Hugging Face, in several shards with an index. Not to be changed."""
    folder = tmp_path_factory.mktemp("tiny") / "sharded"
    return synth("olmo2-tiny", folder, seed=1, max_shard_size="600KB")


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in one file. Not to be changed."""
    return synth("olmo2-tiny", tmp_path_factory.mktemp("tiny") / "single", seed=1)


@pytest.fixture(scope="session")
def megatron(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a Megatron checkpoint. Not to be changed."""
    folder = tmp_path_factory.mktemp("tiny") / "megatron"
    import_checkpoint(sharded, folder)
    return folder
