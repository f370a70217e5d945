"""Base providers of the families: build this rank's part of a model from a config."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Self

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch.nn.init import trunc_normal_

from megatron_olmo_bridge.errors import InputError, nearest
from megatron_olmo_bridge.models import fusions
from megatron_olmo_bridge.nn.backends import AUTO, Backend, backend_named
from megatron_olmo_bridge.nn.classification import GPTModelForSequenceClassification
from megatron_olmo_bridge.nn.problem_types import check_problem_type
from megatron_olmo_bridge.runtime.process_groups import SEED, ensure_process_groups

from .layout import check_layout
from .megatron_bridge import BUILDING, PROVIDER_NAMES, check_keywords, missing_name

PreWrapHook = Callable[[list[MegatronModule]], Sequence[MegatronModule] | None]
"""Called with this rank's chunks after they are built and before they are wrapped. If it returns
chunks, they replace these."""


@dataclass
class GPTModelProvider(TransformerConfig):  # type: ignore[misc]
    """megatron-core's config of a decoder, extended by what is needed to build the model.

    Every field of ``TransformerConfig`` can be set, also after construction: dtypes, parallel
    sizes, recomputation. They are checked when the model is built.
    """

    vocab_size: int = 0
    """Rows of the embedding in the Hugging Face model."""
    make_vocab_size_divisible_by: int = 1
    """The embedding is padded to a multiple of this; 1 means no padding. Megatron's training loss
    counts padding rows as tokens, so with padding it is not quite that of transformers."""
    max_position_embeddings: int = 4096
    """Longest sequence, in tokens."""
    rotary_base: float = 10000.0
    """Theta of the rotary embedding."""
    hidden_dropout: float = 0.0
    """Probability that a value of a layer's output is dropped in training."""
    attention_dropout: float = 0.0
    """Probability that an attention probability is dropped in training."""
    position_embedding_type: str = "rope"
    """``rope``, or ``learned_absolute`` for an embedding of positions."""
    share_embeddings_and_output_weights: bool = False
    """Whether the output layer is the embedding's matrix."""
    num_labels: int = 0
    """Rows of the classification head that replaces the output layer; 0 without one."""
    problem_type: str | None = None
    """Loss of the classification head: ``regression``, ``single_label_classification`` or
    ``multi_label_classification``. None infers it from ``num_labels`` and the labels, as
    transformers does."""
    pad_token_id: int | None = None
    """The token that a classifier's sequences are padded with."""
    backend: str = AUTO
    """Modules of the layers: ``transformer_engine``, ``local``, or ``auto`` for the best that runs
    here."""
    fusions: bool = True
    """Use the fused kernels that run with Transformer Engine, see ``models/fusions.py``."""
    init_truncation: float | None = None
    """Truncate initial weights, all normal with ``init_method_std``, at this many standard
    deviations; OLMo uses 3. None keeps megatron-core's initialization, which scales the output
    layers of each block down."""
    initialize: bool = True
    """False leaves weights uninitialized, to be loaded. Do not use ``perform_initialization=False``
    for this: with it megatron-core doesn't mark tensor-parallel weights as sharded, and so computes
    a wrong gradient norm."""
    pre_wrap_hooks: list[PreWrapHook] = field(default_factory=list, repr=False, compare=False)
    """Hooks that :meth:`provide_distributed_model` calls in order; one of them loads weights."""

    _derived: dict[str, tuple[Any, Any]] = field(default_factory=dict, repr=False, compare=False)
    """Derived fields by name, each with its value before and after the derivation. This is a field
    so that copies made with ``dataclasses.replace`` keep it."""

    def __post_init__(self) -> None:
        """Derive the fields that follow from others; called on construction and by finalize().

        A family that derives fields of its own sets them first, and then calls this.
        """
        self._restore_what_was_set()
        self.pre_wrap_hooks = list(self.pre_wrap_hooks)  # a copy's hooks are its own
        before = dict(vars(self))
        self._derive()
        self._derived = {
            name: (before[name], value)
            for name, value in vars(self).items()
            if value is not before[name]
        }

    def _restore_what_was_set(self) -> None:
        """Undo the derivation, since the fields that it started from may have changed."""
        derived, self._derived = self._derived, {}
        for name, (value, derived_value) in derived.items():
            # A different value was passed to dataclasses.replace: keep that one.
            if getattr(self, name) == derived_value:
                setattr(self, name, value)

    def _derive(self) -> None:
        half = bool(self.bf16 or self.fp16)
        if half and self.params_dtype is torch.float32:
            raise InputError("bf16 or fp16 is set, but params_dtype is float32: set params_dtype")
        self.bf16: bool = self.params_dtype is torch.bfloat16
        self.fp16: bool = self.params_dtype is torch.float16
        if self.pipeline_model_parallel_size > 1:
            # Stages send each other tensors of the parameters' dtype unless another is set.
            self.pipeline_dtype: torch.dtype = self.pipeline_dtype or self.params_dtype
        if self.virtual_pipeline_model_parallel_size is not None:
            # Otherwise two stages mix up what they send each other at the same time. Source:
            # Megatron-LM's arguments.py, which refuses other values.
            self.overlap_p2p_comm = True
            self.batch_p2p_comm = False
        if not self.initialize:
            self._initialize_with(_leave)
        elif self.init_truncation is not None:
            bound = self.init_truncation * self.init_method_std
            self._initialize_with(
                partial(trunc_normal_, std=self.init_method_std, a=-bound, b=bound)
            )
        if self.modules.transformer_engine:
            fusions.set_fused_fields(self)
        try:
            super().__post_init__()
        except (AssertionError, ValueError) as error:
            raise InputError(f"megatron-core refuses this config: {error}") from error

    def _initialize_with(self, method: Callable[[torch.Tensor], Any]) -> None:
        self.init_method = self.output_layer_init_method = self.embedding_init_method = method

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        """Refuse names of fields that don't exist, with the nearest one.

        Raises:
            InputError: There is no such field.
        """
        for name in fields:
            if not (name.startswith("_") or name in cls.field_names()):
                raise cls._unknown(name)
        provider: Self = super().__new__(cls)
        return provider

    def __getattr__(self, name: str) -> Any:
        """Raise an error that says what to use instead of Megatron-Bridge's ``name``."""
        raise missing_name(type(self).__name__, name, PROVIDER_NAMES)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a field that does not exist: a typo would have no effect.

        A field that is set keeps its value when other fields change.

        Raises:
            InputError: There is no such field.
        """
        if not (name.startswith("_") or hasattr(self, name) or name in self.field_names()):
            raise self._unknown(name)
        vars(self).get("_derived", {}).pop(name, None)
        super().__setattr__(name, value)

    @classmethod
    def field_names(cls) -> list[str]:
        """Return the names of all fields that can be set, megatron-core's and this package's."""
        return [f.name for f in fields(cls) if f.init and not f.name.startswith("_")]

    @classmethod
    def _unknown(cls, name: str) -> InputError:
        return InputError(f"{cls.__name__} has no field {name!r}{nearest(name, cls.field_names())}")

    @property
    def modules(self) -> Backend:
        """Modules that the layers are built from."""
        return backend_named(self.backend)

    @abstractmethod
    def layer_spec(self) -> ModuleSpec:
        """Return the spec of one layer."""

    def final_norm(self) -> Any:
        """Return the module of the norm after the last layer."""
        return self.modules.norm

    def block_spec(self, vp_stage: int | None) -> TransformerBlockSubmodules:
        """Return the specs of this stage's layers and of the final norm (last stage only).

        A bare layer spec would leave that norm to megatron-core, whose local one refuses sequence
        parallelism.
        """
        layers = [self.layer_spec()] * get_num_layers_to_build(self, vp_stage=vp_stage)
        return TransformerBlockSubmodules(layer_specs=layers, layer_norm=self.final_norm())

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the padded embedding, over all tensor-parallel ranks."""
        multiple = self.make_vocab_size_divisible_by
        padded = -(-self.vocab_size // multiple) * multiple
        if padded % self.tensor_model_parallel_size:
            raise InputError(
                f"a vocabulary of {padded} rows cannot be divided evenly over "
                f"{self.tensor_model_parallel_size} tensor-parallel ranks; set "
                "make_vocab_size_divisible_by to a multiple of that"
            )
        return padded

    def finalize(self) -> None:
        """Check that the current fields fit together, and derive the others.

        Raises:
            InputError: the combination is invalid.
            UnsupportedError: the combination is valid, but not supported.
        """
        self._restore_what_was_set()
        fusions.refuse_unsupported(self)
        check_layout(self)
        _ = self.padded_vocab_size  # raises where its rows do not divide
        check_problem_type(self.problem_type, self.num_labels)
        self.__post_init__()

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """Build this rank's part of the model; the process groups must exist.

        Args:
            pre_process: build the embedding; by default on the first pipeline stage.
            post_process: build final norm and output layer; by default on the last pipeline stage.
            vp_stage: index of the chunk on this rank, under virtual pipeline parallelism.

        Raises:
            InputError, UnsupportedError: as :meth:`finalize`.
        """
        self.finalize()
        stage: dict[str, Any] = {"ignore_virtual": False, "vp_stage": vp_stage}
        if pre_process is None:
            pre_process = parallel_state.is_pipeline_first_stage(**stage)
        if post_process is None:
            post_process = parallel_state.is_pipeline_last_stage(**stage)
        model = GPTModelForSequenceClassification if self.num_labels else GPTModel
        tied = self.share_embeddings_and_output_weights and not self.num_labels
        return model(
            self,
            self.block_spec(vp_stage),
            vocab_size=self.padded_vocab_size,
            max_sequence_length=self.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=tied,
            position_embedding_type=self.position_embedding_type,
            rotary_base=self.rotary_base,
            vp_stage=vp_stage,
        )

    def register_pre_wrap_hook(self, hook: PreWrapHook, prepend: bool = False) -> None:
        """Add a hook after those that are registered already, or before them if ``prepend``."""
        self.pre_wrap_hooks.insert(0 if prepend else len(self.pre_wrap_hooks), hook)

    def initialize_model_parallel(self, seed: int = SEED) -> None:
        """Create the process groups of the layout unless they exist.

        :meth:`provide_distributed_model` calls this.

        Raises:
            InputError: The processes are too few, or not a multiple of what the layout takes.
        """
        self.finalize()
        ensure_process_groups(self, seed)

    def provide_distributed_model(
        self,
        ddp_config: DistributedDataParallelConfig | None = None,
        *,
        wrap_with_ddp: bool = True,
        seed: int = SEED,
        **megatron_bridge: Any,
    ) -> list[MegatronModule]:
        """Build this rank's chunks of the model, on its GPU or on the CPU, and load their weights.

        Missing process groups are created. In bfloat16 and float16 the chunks are
        wrapped so that the logits come out in float32.

        Args:
            ddp_config: config of the gradient reduction; None for megatron-core's defaults.
            wrap_with_ddp: True for training, False for inference.
            seed: seed of dropout, and of the initial weights unless weights are loaded.
            megatron_bridge: keywords of Megatron-Bridge's provider that have no effect here.

        Returns:
            One chunk, or ``virtual_pipeline_model_parallel_size`` chunks. Call a chunk as
            ``chunk(input_ids [b, s], position_ids [b, s], attention_mask)``; the last stage returns
            the logits of this rank's part of the vocabulary, [b, s, padded_vocab_size / TP]. The
            mask is None for causal attention, or bool [b or 1, 1, s, s], True where attention is
            not allowed.

        Raises:
            InputError, UnsupportedError: the layout is invalid, or there are too few processes.
        """
        check_keywords("provide_distributed_model", megatron_bridge, BUILDING)
        self.initialize_model_parallel(seed)
        if self.fusions and self.modules.transformer_engine:
            self.gradient_accumulation_fusion = wrap_with_ddp and fusions.can_fuse_gradients()
        virtual = self.virtual_pipeline_model_parallel_size
        device = torch.cuda.current_device()
        chunks = []
        for stage in [None] if virtual is None else range(virtual):
            chunk = self.provide(vp_stage=stage).to(device)
            chunk.model_type = ModelType.encoder_or_decoder
            for parameter in chunk.parameters():
                tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
            chunks.append(chunk)
        for hook in self.pre_wrap_hooks:
            chunks = list(hook(chunks) or chunks)
        return self._wrapped(chunks, ddp_config or DistributedDataParallelConfig(), wrap_with_ddp)

    def _wrapped(
        self, chunks: list[Any], ddp_config: DistributedDataParallelConfig, wrap_with_ddp: bool
    ) -> list[MegatronModule]:
        if self.bf16 or self.fp16:
            chunks = [Float16Module(self, chunk) for chunk in chunks]
        if wrap_with_ddp:
            # As in Megatron-LM: buckets of later chunks would be reduced too early to overlap.
            chunks = [
                DistributedDataParallel(self, ddp_config, chunk, disable_bucketing=i > 0)
                for i, chunk in enumerate(chunks)
            ]
        return chunks


@dataclass
class DecoderProvider(GPTModelProvider):
    """Base provider of the OLMo families: a gated MLP and no biases."""

    add_bias_linear: bool = False
    """No linear has a bias."""
    gated_linear_unit: bool = True
    """The MLP is down(act(gate(x)) * up(x))."""
    activation_func: Callable[[torch.Tensor], torch.Tensor] = torch.nn.functional.silu
    """``act`` of the MLP."""


@dataclass
class MoEProvider(DecoderProvider):
    """Base provider of OLMoE and FlexOlmo: QK norm, and top-k routing by softmax."""

    normalization: str = "RMSNorm"
    qk_layernorm: bool = True
    moe_router_pre_softmax: bool = True
    """Take routing weights from the softmax over all experts; if False, they sum to one."""
    moe_router_load_balancing_type: str = "aux_loss"
    moe_aux_loss_coeff: float = 0.01
    """Weight of the load-balancing loss."""

    def __post_init__(self) -> None:
        # Transformer Engine computes all experts in one kernel; local experts run one by one.
        self.moe_grouped_gemm = self.modules.transformer_engine
        super().__post_init__()


def _leave(weight: torch.Tensor) -> None:
    """Leave the weight uninitialized."""
