"""A small tokenizer for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_tokenizer import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained here. For reading only."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small")
