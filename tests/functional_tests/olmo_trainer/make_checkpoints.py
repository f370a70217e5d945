"""Make the checkpoints in checkpoints.tar.xz with OLMo's first trainer, on a CPU.

    python make_checkpoints.py FOLDER

Needs ``ai2-olmo==0.6.0`` and ``datasets``. FOLDER/KIND is a checkpoint of step 3, with
``logits.pt``: token ids and the trainer's own logits of them. ``olmo2-safetensors`` has the weights
of ``olmo2`` as the trainer's other format.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
from pathlib import Path

KINDS = {
    "olmo2": {
        "n_kv_heads": 2, "rope_theta": 500000, "norm_after": True, "layer_norm_type": "rms",
        "attention_layer_norm": True, "attention_layer_norm_with_affine": True,
        "layer_norm_with_affine": True, "layer_norm_eps": 1e-6, "weight_tying": False,
    },
    "olmo": {
        "clip_qkv": 0.3, "layer_norm_type": "default", "layer_norm_with_affine": False,
        "attention_layer_norm_with_affine": False, "weight_tying": True,
    },
}  # fmt: skip


def main(folder: Path) -> None:
    for name, value in {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29602",
    }.items():  # fmt: skip
        os.environ.setdefault(name, value)
    import torch
    import torch.distributed as dist
    from olmo.checkpoint import FullCheckpointer
    from olmo.config import DDPConfig, ModelConfig, OptimizerConfig, TrainConfig
    from olmo.model import OLMo
    from olmo.optim import build_optimizer
    from olmo.safetensors_util import state_dict_to_safetensors_file

    dist.init_process_group("gloo")
    shutil.rmtree(folder, ignore_errors=True)
    generator = torch.Generator().manual_seed(0)
    for kind, options in KINDS.items():
        torch.manual_seed(1)
        config = TrainConfig(
            model=ModelConfig(
                d_model=16, n_heads=4, n_layers=2, mlp_hidden_size=48, vocab_size=60,
                embedding_size=64, max_sequence_length=32, eos_token_id=0, pad_token_id=1,
                rope=True, include_bias=False, bias_for_layer_norm=False, init_device="cpu",
                attention_dropout=0, residual_dropout=0, embedding_dropout=0, **options,
            ),
            optimizer=OptimizerConfig(learning_rate=1e-2),
            save_folder=str(folder),
            ddp=DDPConfig(),
            distributed_strategy="ddp",
        )  # fmt: skip
        model = OLMo(config.model)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = build_optimizer(config, wrapped)
        for _ in range(3):
            ids = torch.randint(2, 60, (4, 24), generator=generator)
            logits = wrapped(ids).logits
            torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
            ).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or "ln_f" in name:  # trained gains are nearly equal
                    parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
        step = folder / kind
        FullCheckpointer(config).save_checkpoint(
            step, wrapped, optimizer, {"global_step": 3, "epoch": 0}
        )
        (step / "optim.pt").unlink()
        model.eval()
        with torch.no_grad():
            torch.save({"ids": ids, "logits": model(ids).logits}, step / "logits.pt")
        if kind == "olmo2":
            other = folder / "olmo2-safetensors"
            other.mkdir()
            shutil.copy(step / "config.yaml", other)
            weights = torch.load(step / "model.pt", weights_only=True)
            state_dict_to_safetensors_file(weights, other / "model.safetensors")
    with tarfile.open(Path(__file__).with_name("checkpoints.tar.xz"), "w:xz") as archive:
        archive.add(folder, ".")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
