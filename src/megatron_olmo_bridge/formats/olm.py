"""Checkpoints of OLM's trainer, ``step_N.pt``: where the bytes of each tensor are, without torch.

OLM is the PyPI package ``openlanguagemodel``; what is said of it here is so in version 2.2.1.
"""

from __future__ import annotations

from pathlib import Path

from megatron_olmo_bridge.errors import InputError

from .tensors import StoredArray
from .torch_archive import array_of, read_archive

MODEL_KEYS = ("model_state_dict", "model")
"""Where the model's tensors are: olm/train/callbacks/checkpoint_cb.py has the first, FSDPTrainer in
olm/train/trainer/fsdp_trainer.py the second. Optimizer, scheduler and losses stand beside it."""
WRAPPERS = ("module.", "_orig_mod.")
"""What DDP (olm/train/trainer/ddp_trainer.py) and torch.compile put before every name."""


def read_olm(file: Path) -> dict[str, StoredArray]:
    """Every tensor of the model, by OLM's names, in the order of its state dict.

    Nothing of the file's pickle is run or imported, and no tensor is read. Dtypes are those of
    ``ITEM_SIZE``, shapes whatever the file says that lies within it.

    Raises:
        InputError: it is no checkpoint of OLM's trainer.
        FormatError: truncated, compressed or no archive of torch.save; or a tensor of the model is
            not contiguous, or of a dtype that is not converted.
        UnsafePickleError: its pickle names a global that has no place in a checkpoint.
    """
    value = read_archive(file)
    # Indexed only: a pickle may give an object attributes that hide its methods.
    found = [value[k] for k in MODEL_KEYS if k in value] if isinstance(value, dict) else []
    if not found or not isinstance(found[0], dict) or not all(isinstance(n, str) for n in found[0]):
        raise InputError(
            f"{file}: not a checkpoint of OLM's trainer: it has no {' or '.join(MODEL_KEYS)} with "
            "tensors by name"
        )
    tensors = found[0]
    arrays = {name: array_of(tensors[name], file, f"{file}: {name}") for name in tensors}
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in arrays):
            arrays = {name.removeprefix(wrapper): array for name, array in arrays.items()}
    return arrays
