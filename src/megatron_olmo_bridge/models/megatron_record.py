"""Write a model's settings into Megatron's own files, and recover a ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import Any

from megatron_olmo_bridge.errors import UnsupportedError

from .record_check import RecordedModel


class MegatronRecord:
    """Settings of a model in Megatron's files: by default its config values.

    A family that stock Megatron-LM can build adds Megatron-LM's arguments in a subclass.
    """

    def __init__(self, bridge: RecordedModel) -> None:
        self.bridge = bridge

    def args(self, padded_vocab_size: int, dtype: str) -> dict[str, Any]:
        """Return a checkpoint's ``args``, which Megatron-LM's ``--use-checkpoint-args`` reads."""
        return self.bridge.config_values | {
            "padded_vocab_size": padded_vocab_size,
            "bf16": dtype == "bfloat16",
            "fp16": dtype == "float16",
            "no_save_optim": True,
            "no_save_rng": True,
        }

    def flags(self, padded_vocab_size: int, dtype: str) -> list[str]:
        """Return the flags that stock Megatron-LM needs besides ``--load``; [] if it can't build
        the model."""
        return []

    def run_config(self, padded_vocab_size: int, dtype: str) -> dict[str, Any]:
        """Return the ``model`` section of ``run_config.yaml``: ``_target_`` and its fields."""
        # A divisor that pads the vocabulary to exactly padded_vocab_size rows.
        divisor = gcd(padded_vocab_size, 128)
        if padded_vocab_size - self.bridge.vocab_size >= divisor:
            divisor = padded_vocab_size
        return {
            "_target_": self.bridge.provider_class.replace(":", "."),
            **self.bridge.config_values,
            "make_vocab_size_divisible_by": divisor,
            "params_dtype": {"_target_": f"torch.{dtype}", "_call_": False},
            "bf16": dtype == "bfloat16",
            "fp16": dtype == "float16",
        }

    @classmethod
    def hf_config(cls, record: Mapping[str, Any], vocab_size: int | None) -> dict[str, Any]:
        """Return a ``config.json`` for Megatron-LM's ``args`` or a ``model`` section.

        Args:
            record: ``args`` or ``model`` section.
            vocab_size: rows of the Hugging Face embedding; None takes the recorded number.

        Raises:
            InputError: A value that the config needs is missing.
            UnsupportedError: The record is of a model that this family doesn't have.
        """
        raise UnsupportedError(
            "the family can't be told from these settings: pass --hf-config with a folder that has "
            "the model's config.json"
        )
