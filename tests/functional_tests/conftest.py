"""A small model for all tests: as Hugging Face folders (one file, several shards) and imported."""

from pathlib import Path

import pytest

from megatron_olmo_bridge import import_checkpoint, synth


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face folder of olmo2-tiny in several shards with an index. Read-only."""
    folder = tmp_path_factory.mktemp("tiny") / "sharded"
    return synth("olmo2-tiny", folder, seed=1, max_shard_size="600KB")


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face folder of the same model in one file. Read-only."""
    return synth("olmo2-tiny", tmp_path_factory.mktemp("tiny") / "single", seed=1)


@pytest.fixture(scope="session")
def megatron(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Megatron checkpoint of the same model. Read-only."""
    folder = tmp_path_factory.mktemp("tiny") / "megatron"
    import_checkpoint(sharded, folder)
    return folder
