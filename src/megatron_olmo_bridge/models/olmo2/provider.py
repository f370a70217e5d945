"""Builds OLMo-2 in megatron-core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.models.olmo2.config import Olmo2Config
from megatron_olmo_bridge.models.olmo2.layer_specs import olmo2_block_spec


@dataclass
class Olmo2ModelProvider(TransformerConfig):  # type: ignore[misc]
    """megatron-core's config of an OLMo-2 model, with what the model needs beside it.

    Every field of ``TransformerConfig`` can be set: dtypes, parallel sizes, recomputation.
    """

    normalization: str = "RMSNorm"
    add_bias_linear: bool = False
    gated_linear_unit: bool = True
    activation_func: Callable[[torch.Tensor], torch.Tensor] = torch.nn.functional.silu
    qk_layernorm: bool = True
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0

    vocab_size: int = 0
    """Rows of the embedding in the Hugging Face model."""
    make_vocab_size_divisible_by: int = 1
    """The embedding is padded to a multiple of this; 1 means no padding."""
    max_position_embeddings: int = 4096
    rotary_base: float = 500000.0
    share_embeddings_and_output_weights: bool = False

    def __post_init__(self) -> None:
        if self.pipeline_model_parallel_size > 1:
            # What the stages send each other is of the parameters' dtype unless said otherwise.
            self.pipeline_dtype: torch.dtype = self.pipeline_dtype or self.params_dtype
        super().__post_init__()

    @classmethod
    def from_config(cls, config: Olmo2Config, **overrides: Any) -> Olmo2ModelProvider:
        """A provider with the model's numbers; ``overrides`` are any of the fields."""
        return cls(**{**asdict(config), **overrides})

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in Megatron, over all tensor-parallel ranks."""
        multiple = self.make_vocab_size_divisible_by
        padded = -(-self.vocab_size // multiple) * multiple
        if padded % self.tensor_model_parallel_size:
            raise InputError(
                f"a vocabulary of {padded} rows cannot be shared out evenly over "
                f"{self.tensor_model_parallel_size} tensor-parallel ranks; set "
                "make_vocab_size_divisible_by to a multiple of that"
            )
        return padded

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """Build this rank's part of the model.

        Args:
            pre_process: with the embedding; by default as the pipeline stage says.
            post_process: with final norm and output layer; by default as the pipeline stage says.
            vp_stage: which of this rank's chunks, under virtual pipeline parallelism.
        """
        if pre_process is None:
            pre_process = parallel_state.is_pipeline_first_stage(
                ignore_virtual=False, vp_stage=vp_stage
            )
        if post_process is None:
            post_process = parallel_state.is_pipeline_last_stage(
                ignore_virtual=False, vp_stage=vp_stage
            )
        return GPTModel(
            self,
            olmo2_block_spec(self, vp_stage),
            vocab_size=self.padded_vocab_size,
            max_sequence_length=self.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=self.rotary_base,
            vp_stage=vp_stage,
        )
