"""A text classifier in transformers, loaded from a folder or made from an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.nn.problem_types import SINGLE_LABEL
from megatron_olmo_bridge.tasks.classification.problems import head_labels

BATCH = 32
"""Default number of texts in a batch."""


def device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """Return the device in words, for a report."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


@dataclass(frozen=True)
class HFClassifier:
    """A model and its tokenizer."""

    model: Any
    """``AutoModelForSequenceClassification``."""
    tokenizer: Any
    length: int
    """Longest text, in tokens; longer ones are cut."""

    @classmethod
    def load(
        cls,
        path: str | Path,
        length: int,
        *,
        dtype: torch.dtype = torch.float32,
        classes: Sequence[str] | None = None,
        problem_type: str = SINGLE_LABEL,
    ) -> HFClassifier:
        """Load a checkpoint from a folder or the hub.

        Args:
            path: Folder or hub id.
            length: Longest text, in tokens; the model's own limit where that is less.
            dtype: Dtype of the weights.
            classes: Names of a new head's outputs, for an encoder without a head.
            problem_type: Problem type of the new head.

        Raises:
            InputError: The checkpoint can't be loaded, or has no token to pad with.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        head: dict[str, Any] = {}
        if classes is not None:
            head = head_labels(classes, problem_type) | {"id2label": dict(enumerate(classes))}
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path))
            model = AutoModelForSequenceClassification.from_pretrained(
                str(path), dtype=dtype, **head
            )
        except (OSError, ValueError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise InputError(f"{path}: transformers can't load it: {first}") from error
        if tokenizer.pad_token_id is None:
            raise InputError(f"{path}: its tokenizer has no pad_token, which batches need")
        most = getattr(model.config, "max_position_embeddings", length)
        length = min(length, most, tokenizer.model_max_length)
        return cls(model.to(device()), tokenizer, length)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def logits(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the logits of one batch, padded to its longest text: [len(texts), classes]."""
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        )
        kept = {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        return self.model(**kept).logits  # type: ignore[no-any-return]

    def outputs(self, texts: Sequence[str], batch_size: int = BATCH) -> torch.Tensor:
        """Return the logits of all texts, [len(texts), classes], float32 on the CPU."""
        self.model.eval()
        with torch.inference_mode():
            batches = [
                self.logits(texts[first : first + batch_size]).float()
                for first in range(0, len(texts), batch_size)
            ]
        return torch.cat(batches).cpu()
