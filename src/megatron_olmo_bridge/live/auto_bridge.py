"""``AutoBridge``: from a Hugging Face checkpoint to a live Megatron model and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule

from megatron_olmo_bridge.convert.reporter import Reporter
from megatron_olmo_bridge.convert.source import Source, fetch, open_source
from megatron_olmo_bridge.convert.to_hf import MAX_SHARD_SIZE, export_checkpoint
from megatron_olmo_bridge.convert.to_megatron import import_checkpoint
from megatron_olmo_bridge.errors import BridgeError, InputError
from megatron_olmo_bridge.formats.detect import Kind
from megatron_olmo_bridge.formats.dtypes import parse_dtype
from megatron_olmo_bridge.formats.hf_folder import read_config
from megatron_olmo_bridge.formats.tensors import ITEM_SIZE
from megatron_olmo_bridge.models.bridge import ModelBridge, bridge_for, known_architectures
from megatron_olmo_bridge.models.provider import GPTModelProvider

from .export import stream_weights
from .load import load_weights
from .save import save_hf, save_megatron


class AutoBridge:
    """One model, between the two worlds. The names are those that Megatron-Bridge uses::

        provider = AutoBridge.from_hf_pretrained(path).to_megatron_provider()
        provider.tensor_model_parallel_size = 2
        model = provider.provide_distributed_model(wrap_with_ddp=False)

    Attributes:
        bridge: the family's numbers and mapping.
        source: the checkpoint; None if there is only a config.
    """

    def __init__(self, bridge: ModelBridge, source: Source | None = None) -> None:
        self.bridge = bridge
        self.source = source

    @classmethod
    def from_hf_pretrained(
        cls, path: str | Path, *, revision: str | None = None, num_labels: int | None = None
    ) -> AutoBridge:
        """Open a Hugging Face checkpoint; its headers are read, its weights not yet.

        Args:
            path: a folder, or a hub id such as ``allenai/OLMo-2-0425-1B``.
            revision: branch, tag or commit on the hub.
            num_labels: instead of a language model's head, a new one of so many classes, of zeros.

        Raises:
            BridgeError: there is none, it is damaged, or of a family that is not known.
        """
        source = open_source(fetch(str(path), revision)[0], num_labels=num_labels)
        if source.kind is not Kind.HF:
            raise InputError(f"{path}: is a Megatron checkpoint; use AutoBridge.from_checkpoint()")
        return cls(source.bridge, source)

    @classmethod
    def from_checkpoint(cls, path: str | Path, **options: Any) -> AutoBridge:
        """Open a checkpoint of either kind; ``options`` are those of ``open_source``.

        Raises:
            BridgeError: there is none, it is damaged, or it doesn't say what model it holds.
        """
        source = open_source(path, **options)
        return cls(source.bridge, source)

    @classmethod
    def from_hf_config(cls, config: Any) -> AutoBridge:
        """A model by its config alone: a ``config.json`` as a dictionary, its folder, or a
        transformers config. There are no weights to load then.

        Raises:
            BridgeError: the config is not sound, or of a family that is not known.
        """
        if isinstance(config, str | Path):
            return cls(bridge_for(read_config(Path(config)), config))
        values = config if isinstance(config, dict) else config.to_dict()
        return cls(bridge_for(values, "the config"))

    @classmethod
    def can_handle(cls, path: str | Path, *, revision: str | None = None) -> bool:
        """Whether :meth:`from_hf_pretrained` can open it."""
        try:
            cls.from_hf_pretrained(path, revision=revision)
        except BridgeError:
            return False
        return True

    @staticmethod
    def list_supported_models() -> list[str]:
        """The ``architectures`` of ``config.json`` that are known."""
        return [name for name in known_architectures() if name[0].isupper()]

    def to_megatron_provider(
        self, load_weights: bool = True, dtype: str | torch.dtype | None = None
    ) -> GPTModelProvider:
        """The model's config for megatron-core, which also builds it.

        Args:
            load_weights: fill the model when ``provide_distributed_model`` builds it.
            dtype: of its parameters, as torch has it or by name; by default the checkpoint's.

        Raises:
            InputError: there are no weights to load, or they have several dtypes.
        """
        chosen = self._dtype() if dtype is None else getattr(torch, parse_dtype(dtype, keep=False))
        provider = self.bridge.provider(params_dtype=chosen)
        if load_weights:
            if self.source is None:
                raise InputError(
                    "made from a config, there are no weights: pass load_weights=False"
                )
            # Every parameter is set from the checkpoint; random ones would be made for nothing.
            provider.initialize = False
            provider.register_pre_wrap_hook(self.load_hf_weights)
        return provider

    def load_hf_weights(
        self, model: Sequence[torch.nn.Module], *, reporter: Reporter | None = None
    ) -> None:
        """Set every parameter of a live model; each process reads its own share of the files.

        Raises:
            MappingError: the model is not the checkpoint's.
            InputError: there is no checkpoint.
        """
        if self.source is None:
            raise InputError("made from a config: there is no checkpoint to load from")
        load_weights(model, self.source, reporter)

    def export_hf_weights(
        self, model: Sequence[torch.nn.Module], *, rank: int | None = None, cpu: bool = False
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Every Hugging Face tensor of a live model, by name, one at a time.

        All processes must iterate to the end; they come in the order of the checkpoint's files.

        Args:
            model: the chunks, wrapped or not.
            rank: the only process that is given the tensors; by default all are.
            cpu: give them on the CPU instead of the model's device.
        """
        names = None
        if self.source is not None and self.source.hf_folder is not None:
            names = [n for n in self.source.hf_folder.arrays if n in self.source.mapping.hf_shapes]
            names += self.source.new
        return stream_weights(model, self.bridge, names=names, to=rank, cpu=cpu)

    def save_hf_pretrained(
        self,
        model: Sequence[torch.nn.Module],
        path: str | Path,
        *,
        max_shard_size: str | int = MAX_SHARD_SIZE,
        overwrite: bool = False,
        reporter: Reporter | None = None,
    ) -> None:
        """Write a live model as a Hugging Face checkpoint, config and tokenizer with it.

        Raises:
            OutputError: there is something at ``path``, or the disk is too small.
        """
        save_hf(
            model, self.bridge, path, beside=self._beside(), max_shard_size=max_shard_size,
            overwrite=overwrite, reporter=reporter,
        )  # fmt: skip

    def save_megatron_model(
        self, model: Sequence[torch.nn.Module], path: str | Path, *, iteration: int = 0
    ) -> None:
        """Write a live model as a Megatron checkpoint, by stock megatron-core.

        Raises:
            OutputError: there is something at ``path``.
        """
        save_megatron(model, self.bridge, path, beside=self._beside(), iteration=iteration)

    def load_megatron_model(
        self, path: str | Path, *, wrap_with_ddp: bool = False, **fields: Any
    ) -> list[MegatronModule]:
        """A live model from a Megatron checkpoint, saved at any layout, loaded at any other.

        Args:
            path: a checkpoint root or an iteration's folder.
            wrap_with_ddp: for training.
            fields: of the provider, ``tensor_model_parallel_size=2`` for example.
        """
        provider = AutoBridge.from_checkpoint(path).to_megatron_provider()
        for name, value in fields.items():
            setattr(provider, name, value)
        return provider.provide_distributed_model(wrap_with_ddp=wrap_with_ddp)

    import_ckpt = staticmethod(import_checkpoint)
    """Hugging Face to Megatron without a model: ``import_checkpoint``."""
    export_ckpt = staticmethod(export_checkpoint)
    """Megatron to Hugging Face without a model: ``export_checkpoint``."""

    def _dtype(self) -> torch.dtype:
        if self.source is not None:
            found = self.source.dtypes
            if len(found) > 1:
                raise InputError(f"the weights are {' and '.join(found)}: pass dtype=")
            return getattr(torch, found[0])  # type: ignore[no-any-return]
        config = self.bridge.hf_config
        named = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        named = named.removeprefix("torch.")
        if named not in ITEM_SIZE:
            raise InputError(f"the config's dtype {named!r} is none of {', '.join(ITEM_SIZE)}")
        return getattr(torch, named)  # type: ignore[no-any-return]

    def _beside(self) -> Path | None:
        return self.source.side_folder if self.source is not None else None
