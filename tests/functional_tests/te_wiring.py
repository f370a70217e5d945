"""Builds, loads, runs and saves the Transformer Engine spec on a stand-in for its modules.

    te_wiring.py HF MEGATRON TOKENS OUT

Started with ``te_stand_in`` on the path. Writes what it finds to OUT; no test is in here.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.extensions import transformer_engine as extensions
from megatron.core.utils import unwrap_model
from stock_megatron import no_strides

from megatron_olmo_bridge import AutoBridge
from megatron_olmo_bridge.inference.forward import forward
from megatron_olmo_bridge.inference.generate import generate
from megatron_olmo_bridge.nn import backends
from megatron_olmo_bridge.runtime.process_groups import destroy_process_groups

Chunks = list[torch.nn.Module]
MADE_OF = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "core_attention",
           "post_layernorm", "q_layernorm", "k_layernorm", "final_layernorm")  # fmt: skip


def kinds(chunks: Chunks) -> dict[str, str]:
    """Class of each module by the last part of its name."""
    modules = unwrap_model(chunks)[0].named_modules()
    found = ((name.rpartition(".")[2], type(module).__name__) for name, module in modules)
    return {name: kind for name, kind in found if name in MADE_OF}


def load_by_stock(chunks: Chunks, checkpoint: Path, strict: str) -> dict[str, Any]:
    """Stock megatron-core into a model full of NaN; what was asked for, and what was not there."""
    (model,) = unwrap_model(chunks)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    asked = model.sharded_state_dict()
    with no_strides():
        state = dist_checkpointing.load(asked, str(checkpoint), strict=StrictHandling(strict))
    names = set(model.state_dict())
    # As Megatron-LM does: not strict, since the attention's state is in no checkpoint.
    left = model.load_state_dict({n: v for n, v in state.items() if n in names}, strict=False)
    assert not left.unexpected_keys
    return {
        "states": sorted(n for n in names if n.endswith("_extra_state")),
        "missing": sorted(left.missing_keys),
        "nan": [name for name, p in model.named_parameters() if p.isnan().any()],
    }


def main(hf: str, megatron: str, tokens: str, out: Path) -> None:
    assert extensions.HAVE_TE
    backends.why_no_transformer_engine = lambda: None  # though there is no CUDA
    batch, found = torch.tensor(json.loads(tokens)), {}
    for dtype in (torch.float32, torch.bfloat16):
        bridge = AutoBridge.from_hf_pretrained(hf)
        for backend in ("auto", "local"):
            name = f"{backend} {str(dtype).removeprefix('torch.')}"
            provider = bridge.to_megatron_provider(dtype=dtype)
            provider.backend = backend
            chunks = provider.provide_distributed_model(wrap_with_ddp=False)
            vocab = bridge.bridge.vocab_size
            logits = forward(chunks, batch, vocab_size=vocab)
            torch.save(logits, out / f"{name}.pt")
            (model,) = unwrap_model(chunks)
            found[name] = {
                "made of": kinds(chunks),
                "eps": sorted({m.eps for m in model.modules() if hasattr(m, "eps")}),
                "generated": list(
                    generate(chunks, batch[0].tolist(), vocab_size=vocab, max_new_tokens=8)
                ),
                **{
                    strict: load_by_stock(chunks, Path(megatron) / "iter_0000000", strict)
                    for strict in ("raise_all", "raise_unexpected")
                    if backend == "auto" or strict == "raise_unexpected"
                },
            }
            if backend == "auto" and dtype is torch.float32:
                bridge.save_hf_pretrained(chunks, out / "hf")
                bridge.save_megatron_model(chunks, out / "megatron")
    (out / "found.json").write_text(json.dumps(found))
    destroy_process_groups()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
