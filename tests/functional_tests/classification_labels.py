"""Classify texts with a Megatron checkpoint of a classifier, at a tensor parallel size.

    classification_labels.py CHECKPOINT TEXTS.jsonl LENGTH TP OUT.json

Runs ``family_model.classify`` with an attention mask, not the forward pass of the training task.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist
from family_model import classify
from transformers import AutoTokenizer

from megatron_olmo_bridge import AutoBridge
from megatron_olmo_bridge.runtime.process_groups import destroy_process_groups


def main() -> None:
    checkpoint, texts, length, tp, out = sys.argv[1:]
    provider = AutoBridge.from_checkpoint(checkpoint).to_megatron_provider()
    provider.tensor_model_parallel_size = int(tp)
    chunks = provider.provide_distributed_model(wrap_with_ddp=False)
    tokenizer = AutoTokenizer.from_pretrained(Path(checkpoint) / "hf")
    lines = [json.loads(line)["text"] for line in Path(texts).read_text().splitlines()]
    batch = tokenizer(
        lines, padding="max_length", truncation=True, max_length=int(length), return_tensors="pt"
    )
    logits = classify(provider, chunks, batch["input_ids"])
    assert logits is not None
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(logits.argmax(-1).tolist()))
    dist.barrier()
    destroy_process_groups()


if __name__ == "__main__":
    main()
