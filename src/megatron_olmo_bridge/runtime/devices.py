"""Choose the GPU of a process, and tell when float32 products are computed in TF32."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_olmo_bridge.errors import InputError

NO_TF32 = {"NVIDIA_TF32_OVERRIDE": "0"}
"""Environment variables that keep a process from computing float32 products in TF32.

Transformer Engine asks cuBLAS for TF32 in all float32 products (``CUBLAS_COMPUTE_32F_FAST_TF32`` in
``common/gemm/cublaslt_gemm.cu``), whatever ``torch.backends.cuda.matmul.allow_tf32`` says. Only
this variable stops it, and it is read when the CUDA libraries are loaded.
"""


def gpu_of(device_count: int, env: Mapping[str, str]) -> int | None:
    """Return the index of the GPU that a process uses; None without a GPU.

    Args:
        device_count: number of GPUs visible to the process.
        env: environment of the process, with the variables of torchrun or srun.

    Raises:
        InputError: there are more processes on this machine than GPUs.
    """
    if device_count == 0:
        return None
    rank = int(env.get("LOCAL_RANK", "0"))
    processes = max(int(env.get("LOCAL_WORLD_SIZE", "1")), rank + 1)
    if processes <= device_count:
        return rank
    # srun --gpus-per-task=1 shows each task its own GPU alone. Under torchrun within a batch step
    # SLURM_LOCALID is the batch step's, 0.
    if device_count == 1 and env.get("SLURM_LOCALID") == str(rank):
        return 0
    gpus = "1 GPU is" if device_count == 1 else f"{device_count} GPUs are"
    raise InputError(
        f"at least {processes} processes were started on this machine, and {gpus} visible: each "
        f"process takes a GPU of its own. Start at most {device_count} here, or compute on the CPU "
        "with CUDA_VISIBLE_DEVICES= before the command."
    )


def tf32_notice(precision: str, *, transformer_engine: bool, env: Mapping[str, str]) -> str | None:
    """Return a notice if a float32 training run computes its products in TF32; else None."""
    exact = all(env.get(name) == value for name, value in NO_TF32.items())
    if precision != "float32" or not transformer_engine or exact:
        return None
    return (
        "float32 products are computed in TF32 here (10 bits of mantissa instead of 23), which is "
        "how Transformer Engine multiplies. For float32 start with NVIDIA_TF32_OVERRIDE=0."
    )
