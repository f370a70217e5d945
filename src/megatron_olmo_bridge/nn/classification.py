"""Classification head: the class of a sequence from the hidden state of its last token."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule

from megatron_olmo_bridge.errors import InputError

from .sequence_loss import sequence_losses


class GPTModelForSequenceClassification(GPTModel):  # type: ignore[misc]
    """``GPTModel`` with ``score`` instead of the output layer, on the last pipeline stage.

    ``score`` has no bias and is replicated on every tensor-parallel rank: it is small, and each
    rank has the whole hidden state. ``config`` provides ``num_labels``, ``pad_token_id`` and
    ``problem_type``.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if self.post_process:
            del self.output_layer
            self.score = torch.nn.Linear(
                config.hidden_size, config.num_labels, bias=False, dtype=config.params_dtype
            )
            if config.perform_initialization:
                config.init_method(self.score.weight)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return MegatronModule's state dict: GPTModel's own expects an output layer."""
        return MegatronModule.sharded_state_dict(self, *args, **kwargs)

    def _postprocess(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        *unused: Any,
        **unused_too: Any,
    ) -> torch.Tensor:
        """Return logits [b, num_labels], or, with labels, losses [b] of float32, whose mean is the
        loss of transformers: see :func:`.sequence_loss.sequence_losses` for the labels. Stages
        before the last return hidden states [s, b, h].

        Raises:
            InputError: several sequences without a pad_token_id to find their ends by, or labels
                that don't match the problem type.
        """
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            # All ranks compute the same from here on: their gradients are equal, not partial sums.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False
            )
        last = last_tokens(input_ids, self.config.pad_token_id)
        pooled = hidden_states[last, torch.arange(len(last), device=last.device)]
        logits = self.score(pooled)
        if labels is None:
            return logits  # type: ignore[no-any-return]
        return sequence_losses(logits, labels, self.config.problem_type)


def last_tokens(input_ids: torch.Tensor, pad_token_id: int | None) -> torch.Tensor:
    """Return the position [b] of the last token that isn't padding in each sequence [b, s].

    Source: ``GenericForSequenceClassification.forward`` of transformers.

    Raises:
        InputError: several sequences without a ``pad_token_id``.
    """
    count, length = input_ids.shape
    if pad_token_id is None:
        if count > 1:
            raise InputError(
                "a batch of several sequences needs pad_token_id, to find their last tokens: set "
                "it on the provider, or in config.json"
            )
        return input_ids.new_full((1,), length - 1)
    positions = torch.arange(length, device=input_ids.device)
    return (positions * (input_ids != pad_token_id)).argmax(-1)


def padding_mask(input_ids: torch.Tensor, pad_token_id: int) -> torch.Tensor:
    """Return the attention mask [b, 1, s, s] of padded sequences, True where attention is hidden.

    Padding attends to itself alone: a query that sees no key would give NaN.
    """
    length = input_ids.shape[1]
    ones = torch.ones(length, length, dtype=torch.bool, device=input_ids.device)
    hidden = ones.triu(1) | (input_ids == pad_token_id)[:, None, None, :]
    return hidden & ~torch.eye(length, dtype=torch.bool, device=input_ids.device)
