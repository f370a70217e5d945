"""``AutoBridge``: from a Hugging Face checkpoint to a live Megatron model and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule

from megatron_olmo_bridge.checkpoints.checkpoint import Checkpoint, ReadOptions
from megatron_olmo_bridge.checkpoints.hf import HFCheckpoint
from megatron_olmo_bridge.checkpoints.hf_files import MAX_SHARD_SIZE
from megatron_olmo_bridge.checkpoints.open import open_checkpoint
from megatron_olmo_bridge.errors import BridgeError, InputError, quote
from megatron_olmo_bridge.formats.dtypes import parse_dtype
from megatron_olmo_bridge.formats.hf_folder import read_config
from megatron_olmo_bridge.formats.remote_path import AnyPath
from megatron_olmo_bridge.formats.tensors import ITEM_SIZE
from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.models.families import bridge_for, known_architectures
from megatron_olmo_bridge.models.megatron_bridge import (
    BRIDGE_NAMES,
    LOADING,
    check_keywords,
    missing_name,
)
from megatron_olmo_bridge.models.provider import GPTModelProvider
from megatron_olmo_bridge.storage.hub import fetch
from megatron_olmo_bridge.storage.progress import Reporter

from .export import stream_weights
from .load import load_weights
from .offline import OfflineMethods
from .save import save_hf, save_megatron

Model = torch.nn.Module | Sequence[torch.nn.Module]
"""A live model: its chunks, or the only one."""


class AutoBridge(OfflineMethods):
    """Convert one model between Hugging Face and live Megatron.

    Names and keywords are Megatron-Bridge's; those that are not supported are refused with a
    sentence that says what to do (docs/megatron-bridge.md)::

        provider = AutoBridge.from_hf_pretrained(path).to_megatron_provider()
        provider.tensor_model_parallel_size = 2
        model = provider.provide_distributed_model(wrap_with_ddp=False)

    Attributes:
        model_bridge: config values and mapping of the model.
        source: the checkpoint; None if there is only a config.
    """

    def __init__(self, model_bridge: ModelBridge, source: Checkpoint | None = None) -> None:
        self.model_bridge = model_bridge
        self.source = source
        self.dtype: torch.dtype | None = None
        """Dtype of the providers' parameters; None takes the checkpoint's."""

    def __repr__(self) -> str:
        where = self.source.path if self.source is not None else "a config, without weights"
        head = f", {self.model_bridge.num_labels} labels" if self.model_bridge.num_labels else ""
        size = (
            self.model_bridge.size_name()
            or f"{self.model_bridge.family}, {self.model_bridge.num_layers} layers"
        )
        return f"AutoBridge({size}{head}, from {where})"

    def __getattr__(self, name: str) -> Any:
        """Raise an error that says what to use instead of Megatron-Bridge's ``name``."""
        raise missing_name("AutoBridge", name, BRIDGE_NAMES)

    @classmethod
    def from_hf_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        num_labels: int | None = None,
        problem_type: str | None = None,
        torch_dtype: str | torch.dtype | None = None,
        **megatron_bridge: Any,
    ) -> AutoBridge:
        """Open a Hugging Face checkpoint; read its headers, but not its weights yet.

        Args:
            path: a folder, or a hub id such as ``allenai/OLMo-2-0425-1B``.
            revision: branch, tag or commit on the hub.
            num_labels: number of classes of a new head, all zeros, that replaces the language
                model's.
            problem_type: problem type of the new head: ``regression``,
                ``single_label_classification`` or ``multi_label_classification``.
            torch_dtype: dtype of the providers' parameters; by default the checkpoint's.
            megatron_bridge: further keywords of Megatron-Bridge, if they have no effect here.

        Raises:
            BridgeError: there is no checkpoint, it is damaged, or its family is not supported.
        """
        check_keywords("from_hf_pretrained", megatron_bridge, LOADING)
        folder, _, _ = fetch(str(path), revision)
        source = open_checkpoint(folder, ReadOptions(num_labels=num_labels))
        if not isinstance(source, HFCheckpoint):
            raise InputError(
                f"{folder}: is a {source.kind} checkpoint; use AutoBridge.from_checkpoint()"
            )
        if problem_type is not None:
            if num_labels is None:
                raise InputError("problem_type belongs to a new head: pass num_labels too")
            config = source.hf_config | {"problem_type": problem_type}
            source = replace(source, bridge=bridge_for(config, source.config_from))
        bridge = cls(source.bridge, source)
        if torch_dtype not in (None, "auto"):
            bridge.dtype = _as_dtype(torch_dtype)
        return bridge

    @classmethod
    def from_checkpoint(cls, path: str | Path, **options: Any) -> AutoBridge:
        """Open a checkpoint of any kind; ``options`` are those of :class:`ReadOptions`.

        Raises:
            BridgeError: there is no checkpoint, it is damaged, or it doesn't say which model it
                holds.
        """
        source = open_checkpoint(path, ReadOptions(**options))
        return cls(source.bridge, source)

    @classmethod
    def from_hf_config(cls, config: Any) -> AutoBridge:
        """Describe a model by its config alone; there are no weights to load.

        Args:
            config: a ``config.json`` as a dictionary, its folder, or a transformers config.

        Raises:
            BridgeError: the config is invalid, or its family is not supported.
        """
        if isinstance(config, str | Path):
            return cls(bridge_for(read_config(Path(config)), config))
        values = config if isinstance(config, dict) else config.to_dict()
        return cls(bridge_for(values, "the config"))

    @staticmethod
    def supports(config: Any) -> bool:
        """Return whether a config, as in :meth:`from_hf_config`, names a supported architecture."""
        values = config if isinstance(config, dict) else config.to_dict()
        return any(name in known_architectures() for name in values.get("architectures") or [])

    @classmethod
    def can_handle(
        cls, path: str | Path, trust_remote_code: bool = False, *, revision: str | None = None
    ) -> bool:
        """Return whether :meth:`from_hf_pretrained` can open ``path``; never run its code."""
        try:
            cls.from_hf_pretrained(path, revision=revision)
        except BridgeError:
            return False
        return True

    @staticmethod
    def list_supported_models() -> list[str]:
        """Return the ``architectures`` of ``config.json`` that are supported."""
        return [name for name in known_architectures() if name[0].isupper()]

    @property
    def transformer_config(self) -> GPTModelProvider:
        """Model config for megatron-core: a finalized provider that loads no weights."""
        provider = self.to_megatron_provider(load_weights=False)
        provider.finalize()
        return provider

    def to_megatron_provider(
        self,
        load_weights: bool = True,
        hf_path: str | Path | None = None,
        *,
        dtype: str | torch.dtype | None = None,
    ) -> GPTModelProvider:
        """Return the model's config for megatron-core, which also builds it.

        Args:
            load_weights: load the weights when ``provide_distributed_model`` builds the model.
            hf_path: another checkpoint of the same shape to load from.
            dtype: dtype of the parameters, a torch dtype or a name; by default the checkpoint's.

        Raises:
            InputError: there are no weights to load, or they have several dtypes.
        """
        chosen = self._dtype() if dtype is None else _as_dtype(dtype)
        provider = self.model_bridge.provider(params_dtype=chosen)
        if load_weights:
            if self.source is None and hf_path is None:
                raise InputError(
                    "made from a config, there are no weights: pass load_weights=False, or hf_path"
                )
            # Every parameter is overwritten from the checkpoint: skip random initialization.
            provider.initialize = False
            provider.register_pre_wrap_hook(partial(self.load_hf_weights, hf_path=hf_path))
        return provider

    def to_megatron_model(
        self, load_weights: bool = True, hf_path: str | Path | None = None, **options: Any
    ) -> list[MegatronModule]:
        """Build the model; pass ``options`` to the provider's ``provide_distributed_model``."""
        return self.to_megatron_provider(load_weights, hf_path).provide_distributed_model(**options)

    def load_hf_weights(
        self,
        model: Model,
        hf_path: str | Path | None = None,
        *,
        reporter: Reporter | None = None,
        **megatron_bridge: Any,
    ) -> list[Any]:
        """Set every parameter of a live model and return its chunks.

        Each process reads only the parts of the files that its shards need.

        Args:
            model: the chunks, wrapped or not.
            hf_path: another checkpoint of the same shape to load from.

        Raises:
            MappingError: the model does not match the checkpoint.
            InputError: there is no checkpoint.
        """
        check_keywords("load_hf_weights", megatron_bridge, LOADING)
        source = self.source if hf_path is None else open_checkpoint(fetch(str(hf_path), None)[0])
        if source is None:
            raise InputError("made from a config: there is no checkpoint to load from")
        chunks = _chunks(model)
        load_weights(chunks, source, reporter)
        return chunks

    def export_hf_weights(
        self, model: Model, cpu: bool = False, *, rank: int | None = None, **megatron_bridge: Any
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Return an iterator over the Hugging Face tensors of a live model and their names.

        Tensors come in the order of the checkpoint's files. All processes must iterate to the end.

        Args:
            model: the chunks, wrapped or not.
            cpu: return tensors on the CPU instead of the model's device.
            rank: the only process that receives the tensors; by default all do.
        """
        check_keywords("export_hf_weights", megatron_bridge, LOADING)
        names = None
        if isinstance(self.source, HFCheckpoint):
            names = [n for n in self.source.hf_folder.arrays if n in self.source.mapping.hf_shapes]
            names += self.source.new_tensors
        return stream_weights(_chunks(model), self.model_bridge, names=names, to=rank, cpu=cpu)

    def save_hf_pretrained(
        self,
        model: Model,
        path: str | Path,
        *,
        max_shard_size: str | int = MAX_SHARD_SIZE,
        overwrite: bool = False,
        reporter: Reporter | None = None,
        **megatron_bridge: Any,
    ) -> None:
        """Write a live model as a Hugging Face checkpoint, with config and tokenizer.

        Raises:
            OutputError: ``path`` exists already, or there is not enough disk space.
        """
        check_keywords("save_hf_pretrained", megatron_bridge, LOADING)
        save_hf(
            _chunks(model),
            self.model_bridge,
            path,
            artifacts_folder=self._artifacts_folder(),
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            reporter=reporter,
        )

    def save_megatron_model(
        self,
        model: Model,
        path: str | Path,
        hf_tokenizer_path: str | Path | None = None,
        *,
        iteration: int = 0,
        **megatron_bridge: Any,
    ) -> None:
        """Write a live model as a Megatron checkpoint, by stock megatron-core.

        Args:
            model: the chunks, wrapped or not.
            path: the checkpoint root to create.
            hf_tokenizer_path: folder or hub id of the tokenizer to save; by default the source's.
            iteration: number of training steps behind the weights.

        Raises:
            OutputError: ``path`` exists already.
        """
        check_keywords("save_megatron_model", megatron_bridge, LOADING)
        folder = (
            self._artifacts_folder()
            if hf_tokenizer_path is None
            else fetch(str(hf_tokenizer_path), None)[0]
        )
        save_megatron(
            _chunks(model), self.model_bridge, path, artifacts_folder=folder, iteration=iteration
        )

    def load_megatron_model(
        self,
        path: str | Path,
        *,
        wrap_with_ddp: bool = False,
        mp_overrides: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> list[MegatronModule]:
        """Build a live model at any layout from a Megatron checkpoint saved at any other.

        Args:
            path: a checkpoint root or an iteration's folder.
            wrap_with_ddp: wrap the model for training.
            mp_overrides: fields of the provider.
            fields: further fields as keywords, ``tensor_model_parallel_size=2`` for example.

        Raises:
            InputError: the provider has no such field.
        """
        provider = AutoBridge.from_checkpoint(path).to_megatron_provider()
        for name, value in {**(mp_overrides or {}), **fields}.items():
            setattr(provider, name, value)
        return provider.provide_distributed_model(wrap_with_ddp=wrap_with_ddp)

    def _dtype(self) -> torch.dtype:
        if self.dtype is not None:
            return self.dtype
        if self.source is not None:
            dtypes = self.source.dtypes
            if len(dtypes) > 1:
                raise InputError(f"the weights are {' and '.join(dtypes)}: pass dtype=")
            return getattr(torch, dtypes[0])  # type: ignore[no-any-return]
        config = self.model_bridge.hf_config
        name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        name = name.removeprefix("torch.")
        if name not in ITEM_SIZE:
            raise InputError(f"the config's dtype {quote(name)} is none of {', '.join(ITEM_SIZE)}")
        return getattr(torch, name)  # type: ignore[no-any-return]

    def _artifacts_folder(self) -> AnyPath | None:
        return self.source.artifacts_folder if self.source is not None else None


def _chunks(model: Model) -> list[Any]:
    """Return the chunks as a list, also for a single one."""
    return [model] if isinstance(model, torch.nn.Module) else list(model)


def _as_dtype(dtype: object) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    return getattr(torch, parse_dtype(dtype, keep=False))  # type: ignore[no-any-return]
