"""Estimate of a run's resources: parameters, FLOPs, and memory by component.

Arithmetic on the family's mapping table; neither torch nor megatron-core is needed. Parameter
counts are exact, also per rank; memory is an estimate, which lists what it leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_olmo_bridge.errors import UnsupportedError
from megatron_olmo_bridge.models.bridge import ModelBridge

from .config import TrainingConfig
from .layout import Layout
from .monitor.gpu_peaks import peak_flops

PEAK_FLOPS = peak_flops("NVIDIA H100 80GB HBM3") or math.nan
UTILISATION = 0.4
"""Fraction of an H100 SXM's peak assumed for GPU-days; good runs reach it."""
LEFT_OUT = "CUDA's context, NCCL's buffers, workspaces, fragmentation: some GB on a GPU"
"""What the memory estimate does not count."""

_COLUMN = ("linear_qkv", "linear_fc1", "word_embeddings", "output_layer")
_ROW = ("linear_proj", "linear_fc2")
_UNEVEN = (
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


@dataclass(frozen=True)
class StageMemory:
    """A rank of one pipeline stage; all counts but the first three are bytes."""

    stage: int
    layers: int
    parameters: int
    """Number of parameters on the rank."""
    weights: int
    gradients: int
    """float32, in bfloat16 runs too: ``grad_reduce_in_fp32``."""
    optimizer: int
    """Two moments in float32, and float32 weights beside bfloat16 ones."""
    activations: int
    """Activations kept for the backward pass, over all micro-batches in flight."""
    logits: int
    """The last stage's: logits of one micro-batch, in float32 again, and their gradient."""
    total: int
    """Sum of the above: GPU memory."""
    save: int
    """Host memory for saving a checkpoint before the last step."""
    last_save: int
    """Host memory for saving the checkpoint of the last step."""


@dataclass(frozen=True)
class Estimate:
    """Resources that a run needs."""

    processes: int
    data_parallel_size: int
    micro_batches: int
    """Micro-batches per process and step."""
    parameters: int
    """Number of parameters of the Hugging Face model."""
    parameters_without_embeddings: int
    """Without the embeddings of tokens and positions; an untied output layer counts."""
    active_parameters: int
    """Parameters active per token (routed experts only)."""
    padded_vocab_size: int
    steps: int
    sequences: int
    tokens: int
    tokens_per_step: int
    flops_per_token: float
    """Forward and backward; see :func:`flops_per_token`."""
    flops: float
    gpu_days: float
    """Days on one H100 at 40 % utilisation: a rough guide."""
    stages: list[StageMemory]
    """One entry per pipeline stage."""

    @property
    def worst(self) -> StageMemory:
        """The stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.total)


def estimate(config: TrainingConfig, bridge: ModelBridge, layout: Layout) -> Estimate:
    """Estimate the resources of a run; :func:`.resolve.resolve` checks that the run is possible.

    Raises:
        UnsupportedError: the stages have unequal depths, which are not supported here.
    """
    per_token = flops_per_token(bridge, config.train.sequence_length)
    sequences = config.train.steps * config.train.global_batch_size
    tokens = sequences * config.train.sequence_length
    return Estimate(
        processes=layout.processes,
        data_parallel_size=layout.dp,
        micro_batches=layout.micro_batches,
        parameters=parameter_count(bridge),
        parameters_without_embeddings=_count(bridge, embeddings=False),
        active_parameters=_count(bridge, active=True),
        padded_vocab_size=padded_vocab_size(config, bridge),
        steps=config.train.steps,
        sequences=sequences,
        tokens=tokens,
        tokens_per_step=config.tokens_per_step,
        flops_per_token=per_token,
        flops=per_token * tokens,
        gpu_days=per_token * tokens / (UTILISATION * PEAK_FLOPS) / 86400,
        stages=[_Rank(config, bridge, layout, stage).memory() for stage in range(layout.pp)],
    )


def parameter_count(bridge: ModelBridge) -> int:
    """Return the number of parameters of the Hugging Face model; tied weights count once."""
    return _count(bridge)


def flops_per_token(bridge: ModelBridge, sequence_length: int) -> float:
    """Return forward and backward FLOPs per token of a full sequence.

    Count 6 per matrix element that a token is multiplied by: the output layer and the routed
    experts, but not the embedding, which is a look-up. Count 12 per query element and visible key,
    on average half of the sequence (causal mask), or fewer in layers with a window. Source: PaLM
    (Chowdhery et al. 2022), appendix B, which counts masked keys too; leaving them out follows
    Megatron-LM (``num_floating_point_operations`` in ``megatron/training/training.py``).
    Recomputation is not counted.
    """
    config = bridge.config
    matrices = sum(
        row.size * row.layers * row.used
        for row in _rows(bridge)
        if len(row.shape) == 2 and row.module not in ("word_embeddings", "position_embeddings")
    )
    if config.share_embeddings_and_output_weights and not bridge.num_labels:
        matrices += config.vocab_size * config.hidden_size
    width = config.num_attention_heads * config.kv_channels
    keys = sum(
        seen * (1 - seen / (2 * sequence_length))
        for window in _windows(bridge)
        for seen in [min(window or sequence_length, sequence_length)]
    )
    return float(6 * matrices + 12 * width * keys)


def padded_vocab_size(config: TrainingConfig, bridge: ModelBridge) -> int:
    """Return the rows of Megatron's embedding; by default padded to a multiple of ``tp``."""
    multiple = int(config.provider.get("make_vocab_size_divisible_by", config.parallel.tp))
    return -(-bridge.vocab_size // multiple) * multiple


def shards(name: str, tp: int) -> int:
    """Return the number of equal parts that tensor parallelism splits a parameter into.

    Column-parallel linears are split with their biases, row-parallel ones without; norms, routers
    and the embedding of positions are whole on every rank.
    """
    *_, module, kind = name.split(".")
    column = module in _COLUMN and kind in ("weight", "bias")
    return tp if column or (module in _ROW and kind == "weight") else 1


@dataclass(frozen=True)
class _Row:
    """A Megatron parameter of the family's table, for all layers and experts at once."""

    name: str
    shape: tuple[int, ...]
    layers: int
    """Number of occurrences over all layers: 1 outside of layers."""
    experts: int
    """Number of occurrences per layer."""
    used: int
    """Number of these that a token is routed to."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def module(self) -> str:
        return self.name.split(".")[-2]


def _rows(bridge: ModelBridge, padded_vocab_size: int | None = None) -> Iterator[_Row]:
    for mapping in bridge.mapping_registry(padded_vocab_size).mappings:
        wildcards = mapping.megatron_param.count("*")
        layers = bridge.num_layers if wildcards else 1
        experts, used = 1, 1
        if wildcards > 1:
            experts, used = bridge.num_experts or 1, int(bridge.config.moe_router_topk)
        yield _Row(mapping.megatron_param, mapping.megatron_shape, layers, experts, used)


def _count(bridge: ModelBridge, *, embeddings: bool = True, active: bool = False) -> int:
    return sum(
        row.size * row.layers * (row.used if active else row.experts)
        for row in _rows(bridge)
        if embeddings or not row.name.startswith("embedding.")
    )


def _windows(bridge: ModelBridge) -> list[int | None]:
    """Return the tokens that a query of each layer sees, itself included; None for all."""
    window = getattr(bridge.config, "window_size", None)
    every = getattr(bridge.config, "window_attn_skip_freq", None)
    if window is None:
        return [None] * bridge.num_layers
    if isinstance(every, list):
        windowed = [bool(flag) for flag in every]
    else:
        windowed = [not every or (i + 1) % every != 0 for i in range(bridge.num_layers)]
    return [window[0] + 1 if flag else None for flag in windowed]


@dataclass(frozen=True)
class _Rank:
    """One rank of a pipeline stage."""

    config: TrainingConfig
    bridge: ModelBridge
    layout: Layout
    stage: int

    @property
    def last(self) -> bool:
        return self.stage == self.layout.pp - 1

    @property
    def value_bytes(self) -> int:
        return 2 if self.config.train.precision == "bfloat16" else 4

    @property
    def layers(self) -> int:
        """Number of layers of this stage, by megatron-core's ``get_num_layers_to_build``."""
        fields, stages = self.config.provider, self.layout.pp
        if odd := [name for name in _UNEVEN if fields.get(name)]:
            raise UnsupportedError(f"the estimate can't count stages made by {', '.join(odd)}")
        ends = {
            stage: int(layers)
            for stage, name in ((0, "first"), (stages - 1, "last"))
            if (layers := fields.get(f"num_layers_in_{name}_pipeline_stage"))
        }
        rest = (self.bridge.num_layers - sum(ends.values())) // max(stages - len(ends), 1)
        return ends.get(self.stage, rest)

    def parameters(self) -> tuple[int, int]:
        """Number of parameters on the rank: without experts, and of experts."""
        dense = experts = 0
        tied = self.bridge.config.share_embeddings_and_output_weights and not self.bridge.num_labels
        padded = padded_vocab_size(self.config, self.bridge)
        for row in _rows(self.bridge, padded):
            if row.experts > 1:
                size = row.size // shards(row.name, self.layout.etp)
                experts += size * self.layers * (row.experts // self.layout.ep)
                continue
            size = row.size // shards(row.name, self.layout.tp)
            if row.name.startswith("decoder.layers."):
                dense += size * self.layers
            elif row.name.startswith("embedding."):
                copied = tied and self.last and row.module == "word_embeddings"
                dense += size if self.stage == 0 or copied else 0
            else:
                dense += size if self.last else 0
        return dense, experts

    def memory(self) -> StageMemory:
        dense, experts = self.parameters()
        parameters = dense + experts
        state = 12 if self.value_bytes == 2 else 8
        if self.config.parallel.distributed_optimizer:
            optimizer = state * (dense / self.layout.dp + experts / self.layout.expert_dp)
        else:
            optimizer = float(state * parameters)
        weights, gradients = self.value_bytes * parameters, 4 * parameters
        activations, logits = round(self.activations()), round(self.logits())
        save, last_save = self.saves()
        return StageMemory(
            stage=self.stage,
            layers=self.layers,
            parameters=parameters,
            weights=weights,
            gradients=gradients,
            optimizer=round(optimizer),
            activations=activations,
            logits=logits,
            total=weights + gradients + round(optimizer) + activations + logits,
            save=save,
            last_save=last_save,
        )

    def saves(self) -> tuple[int, int]:
        """Host bytes of a checkpoint on the way and of the last one, in the first data-parallel
        rank, which writes the weights too.

        What a rank writes is staged on the host. To be fully reshardable, the state of all
        data-parallel ranks is gathered there first: 12 bytes a parameter, and while that is under
        way three times a third of it and the rank's own part; later, staged as a copy, with the
        weights. Source: ``get_parameter_state_dp_zero`` and ``FileSystemWriterAsync`` of
        megatron-core; measured by ``benchmarks/saving.py``.
        """
        dense, experts = self.parameters()
        weights = self.value_bytes * (dense + experts)
        if not self.config.parallel.distributed_optimizer:
            state = 12 if self.value_bytes == 2 else 8  # float32 weights are the model's own
            return (weights + state * (dense + experts),) * 2
        part = round(12 * (dense / self.layout.dp + experts / self.layout.expert_dp))
        fully = 2 * 12 * (dense + experts) + max(weights, part)
        wanted = self.config.checkpoint.fully_reshardable
        return (
            fully if wanted == "all" else weights + part,
            weights + part if wanted == "none" else fully,
        )

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.config.train.micro_batch_size * self.config.train.sequence_length

    @property
    def whole(self) -> float:
        """Bytes of one hidden state on this rank; sequence parallelism divides it."""
        ranks = self.layout.tp if self.config.parallel.sp else 1
        return self.value_bytes * int(self.bridge.config.hidden_size) / ranks

    def activations(self) -> float:
        """Bytes kept for the backward pass.

        After Korthikanti et al. 2022 (Reducing Activation Recomputation in Large Transformer
        Models), for Transformer Engine's modules with flash attention, which keeps no scores,
        without dropout, and with gated MLPs. Left out: masks, rope's tables, norms' statistics.
        Selective recomputation saves nothing that is counted here. Without Transformer Engine
        norms and activation functions keep float32 values and intermediate ones: up to 1.6 times as
        much was counted.
        """
        layer = self.tokens * self.layer_bytes()
        under_way = self._in_flight() * self.layers
        if self.config.parallel.recompute == "full":  # each layer's input, and one layer at work
            kept = under_way * self.tokens * self.whole + layer
        else:
            kept = under_way * layer
        ends = 2 * self.tokens * self.whole if self.last else 0.0  # final norm, output layer
        return kept + ends

    def layer_bytes(self) -> float:
        """Bytes that one layer keeps per token.

        Whole on each tensor-parallel rank: the inputs of both halves of the layer, and of their
        norms. Sharded: queries, keys, values and the output of attention; the MLP's hidden states
        before and after its activation. The QK norm calculates in float32 and keeps its input and
        its result in that. A token's experts keep their inputs and outputs as well.
        """
        kept = 4 * self.whole
        width = self.bridge.config.hidden_size
        for row in _rows(self.bridge):
            if row.name.endswith(("linear_qkv.weight", "linear_fc1.weight")):
                values = row.shape[0]
            elif row.name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                values = row.shape[1]
            elif row.name.endswith(("q_layernorm.weight", "k_layernorm.weight")):
                kept += 8 * row.size / self.layout.tp
                continue
            else:
                continue
            ranks = self.layout.tp if row.experts == 1 else self.layout.etp
            kept += self.value_bytes * row.used * values / ranks
            kept += self.value_bytes * row.used * width if row.experts > 1 else 0
        return kept

    def _in_flight(self) -> float:
        """Micro-batches of which this stage keeps activations at once; under the interleaved
        schedule parts of them: Megatron's 1F1B fills the pipeline before its first backward."""
        stages, chunks, behind = self.layout.pp, self.layout.vpp, self.layout.pp - self.stage - 1
        if chunks == 1:
            return min(behind + 1, self.layout.micro_batches)
        begun = 2 * behind + (chunks - 1) * stages + 1
        return min(begun, chunks * self.layout.micro_batches) / chunks

    def logits(self) -> float:
        """Bytes needed by the loss: the logits, and in float32 their softmax and gradient."""
        if not self.last or self.bridge.num_labels:
            return 0.0
        columns = padded_vocab_size(self.config, self.bridge) / self.layout.tp
        return self.tokens * columns * (self.value_bytes + 8)
