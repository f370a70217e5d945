"""Where a language model, its weights and its tokenizer come from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.models.families import published_sizes
from megatron_olmo_bridge.tasks.language_modelling import check_prepared, with_model
from megatron_olmo_bridge.training.config import (
    DataConfig,
    InitConfig,
    StepsConfig,
    TrainingConfig,
)
from megatron_olmo_bridge.training.recipes import apply_overrides
from megatron_olmo_bridge.training.resolve import resolve

END = 7


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    """A new model, on data whose documents end with token 7."""
    prefix = tmp_path / "text"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_item(torch.tensor([*range(20, 90), END]))
    builder.end_document()
    builder.finalize(f"{prefix}.idx")
    record = {"documents": 1, "tokens": 71, "dtype": "uint16", "eos_id": END}
    Path(f"{prefix}.json").write_text(json.dumps(record))
    return TrainingConfig(
        model=dict(published_sizes()["olmo2-tiny"].sizes["olmo2-tiny"]),
        train=StepsConfig(steps=1, sequence_length=32, precision="float32"),
        data=DataConfig(path=[str(prefix)]),
    )


def test_a_new_model_ends_texts_as_its_data_does(config: TrainingConfig) -> None:
    filled_in, source = with_model(config)
    assert source is None
    assert filled_in.model == config.model | {"eos_token_id": END}


def test_a_model_that_ends_texts_otherwise_is_refused(config: TrainingConfig) -> None:
    config.model["eos_token_id"] = 8
    with pytest.raises(InputError, match=r"token 7.*eos_token_id is 8.*model\.eos_token_id=7"):
        with_model(config)


def test_the_model_is_that_of_the_checkpoint_to_begin_with(
    config: TrainingConfig, tiny_hf: Path
) -> None:
    config.model, config.init = {}, InitConfig(hf=str(tiny_hf))
    filled_in, source = with_model(config)
    assert source is not None
    assert source.path == tiny_hf
    assert filled_in.model == source.bridge.hf_config

    overridden = apply_overrides(filled_in, ["model.num_hidden_layers=1"])
    with pytest.raises(InputError, match=r"model\.num_hidden_layers.*as the model comes from"):
        with_model(overridden)


def test_a_hugging_face_checkpoint_has_no_optimizer_state(
    config: TrainingConfig, tiny_hf: Path
) -> None:
    config.init = InitConfig(checkpoint=str(tiny_hf), optimizer=True)
    with pytest.raises(InputError, match=r"no optimizer state.*leave out init\.optimizer"):
        with_model(config)


def test_data_and_tokenizer_are_checked_before_the_data_is_opened(config: TrainingConfig) -> None:
    check_prepared(resolve(config, None, processes=1))

    config.data.tokenizer = f"{config.data.path[0]}.bin"
    with pytest.raises(InputError, match=r"data\.tokenizer=.*is a file"):
        check_prepared(resolve(config, None, processes=1))

    config.data.path = ["nowhere/text"]
    with pytest.raises(InputError, match="nowhere/text"):
        check_prepared(resolve(config, None, processes=1))
