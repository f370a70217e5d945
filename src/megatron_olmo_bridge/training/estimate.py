"""Estimate of the resources that a run needs: parameters, FLOPs, and memory of each stage.

Neither torch nor megatron-core is needed. Parameter counts are exact, also those of a rank; memory
is an estimate without :data:`LEFT_OUT`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_olmo_bridge.errors import UnsupportedError
from megatron_olmo_bridge.models.bridge import ModelBridge

from .config import TrainingConfig
from .layout import Layout
from .model_size import flops_per_token, parameter_count, parameters_of
from .monitor.gpu_peaks import peak_flops

PEAK_FLOPS = peak_flops("NVIDIA H100 80GB HBM3") or math.nan
UTILISATION = 0.4
"""Fraction of an H100 SXM's peak assumed for GPU-days; good runs reach it."""
LEFT_OUT = "CUDA's context, NCCL's buffers, workspaces, fragmentation: some GB on a GPU"
"""What the memory estimate does not count."""

_COLUMN_PARALLEL = ("linear_qkv", "linear_fc1", "word_embeddings", "output_layer")
_ROW_PARALLEL = ("linear_proj", "linear_fc2")
_UNEVEN_STAGES = (
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
"""Fields of the provider that give stages different depths."""


@dataclass(frozen=True)
class StageMemory:
    """Memory of one rank of a pipeline stage; all fields but the first three are bytes."""

    stage: int
    layers: int
    parameters: int
    """Number of parameters on the rank."""
    weights: int
    gradients: int
    """float32, in bfloat16 runs too: ``grad_reduce_in_fp32``."""
    optimizer: int
    """Two moments in float32, and a float32 copy of bfloat16 weights."""
    activations: int
    """Activations kept for the backward pass, over all micro-batches in flight."""
    logits: int
    """On the last stage: logits of one micro-batch, the same in float32, and their gradient."""
    total: int
    """GPU memory: the sum of the fields from ``weights`` to ``logits``."""
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
    """Forward and backward; see :func:`.model_size.flops_per_token`."""
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
        parameters_without_embeddings=parameter_count(bridge, embeddings=False),
        active_parameters=parameter_count(bridge, active_only=True),
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


def padded_vocab_size(config: TrainingConfig, bridge: ModelBridge) -> int:
    """Return the rows of Megatron's embedding; by default padded to a multiple of ``tp``."""
    multiple = int(config.provider.get("make_vocab_size_divisible_by", config.parallel.tp))
    return -(-bridge.vocab_size // multiple) * multiple


def tensor_parallel_shards(name: str, tp: int) -> int:
    """Return the number of equal shards that tensor parallelism splits a parameter into.

    Column-parallel linears are split with their biases, row-parallel ones without; norms, routers
    and the embedding of positions are whole on every rank.
    """
    *_, module, kind = name.split(".")
    column = module in _COLUMN_PARALLEL and kind in ("weight", "bias")
    return tp if column or (module in _ROW_PARALLEL and kind == "weight") else 1


@dataclass(frozen=True)
class _Rank:
    """One rank of a pipeline stage."""

    config: TrainingConfig
    bridge: ModelBridge
    layout: Layout
    stage: int

    def memory(self) -> StageMemory:
        dense, experts = self.parameters()
        parameters = dense + experts
        optimizer = float(self.state_bytes * parameters)
        if self.config.parallel.distributed_optimizer:
            optimizer = self.state_bytes * self._per_data_parallel_rank(dense, experts)
        counted = {
            "weights": self.value_bytes * parameters,
            "gradients": 4 * parameters,
            "optimizer": round(optimizer),
            "activations": round(self.activations()),
            "logits": round(self.logits()),
        }
        save, last_save = self.saves()
        return StageMemory(
            stage=self.stage,
            layers=self.layers,
            parameters=parameters,
            **counted,
            total=sum(counted.values()),
            save=save,
            last_save=last_save,
        )

    @property
    def is_last(self) -> bool:
        return self.stage == self.layout.pp - 1

    @property
    def value_bytes(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.config.train.precision == "bfloat16" else 4

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state for a parameter; float32 weights are the model's own."""
        return 12 if self.value_bytes == 2 else 8

    @property
    def layers(self) -> int:
        """Number of layers of this stage, by megatron-core's ``get_num_layers_to_build``."""
        fields, stages = self.config.provider, self.layout.pp
        if uneven := [name for name in _UNEVEN_STAGES if fields.get(name)]:
            raise UnsupportedError(f"the estimate can't count stages made by {', '.join(uneven)}")
        ends = {
            stage: int(layers)
            for stage, name in ((0, "first"), (stages - 1, "last"))
            if (layers := fields.get(f"num_layers_in_{name}_pipeline_stage"))
        }
        rest = (self.bridge.num_layers - sum(ends.values())) // max(stages - len(ends), 1)
        return ends.get(self.stage, rest)

    def parameters(self) -> tuple[int, int]:
        """Return the number of parameters on the rank: outside of experts, and in experts."""
        dense = experts = 0
        for parameter in parameters_of(self.bridge, padded_vocab_size(self.config, self.bridge)):
            if parameter.experts > 1:
                size = parameter.size // tensor_parallel_shards(parameter.name, self.layout.etp)
                experts += size * self.layers * (parameter.experts // self.layout.ep)
                continue
            size = parameter.size // tensor_parallel_shards(parameter.name, self.layout.tp)
            if parameter.name.startswith("decoder.layers."):
                dense += size * self.layers
            elif parameter.name.startswith("embedding."):
                # A tied output layer on another stage than the embedding is a copy of it.
                is_output = parameter.module == "word_embeddings" and self.bridge.is_tied
                dense += size if self.stage == 0 or (is_output and self.is_last) else 0
            else:
                dense += size if self.is_last else 0
        return dense, experts

    def _per_data_parallel_rank(self, dense: int, experts: int) -> float:
        """Return the number of parameters whose state a distributed optimizer keeps on a rank."""
        return dense / self.layout.dp + experts / self.layout.expert_dp

    def saves(self) -> tuple[int, int]:
        """Return the host bytes for saving a checkpoint before the last step, and at the last.

        They are those of the first data-parallel rank, which also writes the weights. What a rank
        writes is staged on the host. To be fully reshardable, the state of all data-parallel ranks
        is gathered there first: 12 bytes a parameter, and at the same time three times a third of
        it and the rank's own part; later, staged as a copy, with the weights. Source:
        ``get_parameter_state_dp_zero`` and ``FileSystemWriterAsync`` of megatron-core; measured by
        ``benchmarks/saving.py``.
        """
        dense, experts = self.parameters()
        weights = self.value_bytes * (dense + experts)
        if not self.config.parallel.distributed_optimizer:
            return (weights + self.state_bytes * (dense + experts),) * 2
        part = round(12 * self._per_data_parallel_rank(dense, experts))
        by_data_parallel_size = weights + part
        fully_reshardable = 2 * 12 * (dense + experts) + max(weights, part)
        setting = self.config.checkpoint.fully_reshardable
        return (
            fully_reshardable if setting == "all" else by_data_parallel_size,
            by_data_parallel_size if setting == "none" else fully_reshardable,
        )

    @property
    def tokens(self) -> int:
        """Number of tokens of a micro-batch."""
        return self.config.train.micro_batch_size * self.config.train.sequence_length

    @property
    def hidden_bytes(self) -> float:
        """Bytes of a token's hidden state on this rank; sequence parallelism divides them."""
        ranks = self.layout.tp if self.config.parallel.sp else 1
        return self.value_bytes * int(self.bridge.config.hidden_size) / ranks

    def activations(self) -> float:
        """Return the bytes kept for the backward pass.

        After Korthikanti et al. 2022 (Reducing Activation Recomputation in Large Transformer
        Models), for Transformer Engine's modules with flash attention, which keeps no scores,
        without dropout, and with gated MLPs. Left out: masks, rope's tables, norms' statistics.
        Selective recomputation saves nothing that is counted here. Without Transformer Engine
        norms and activation functions keep float32 values and intermediate ones: up to 1.6 times as
        much was measured.
        """
        layer = self.tokens * self.layer_bytes()
        layers_in_flight = self._micro_batches_in_flight() * self.layers
        if self.config.parallel.recompute == "full":  # each layer's input, and one layer at work
            kept = layers_in_flight * self.tokens * self.hidden_bytes + layer
        else:
            kept = layers_in_flight * layer
        # The last stage also keeps the inputs of the final norm and of the output layer.
        return kept + (2 * self.tokens * self.hidden_bytes if self.is_last else 0.0)

    def layer_bytes(self) -> float:
        """Return the bytes that one layer keeps per token.

        Whole on each tensor-parallel rank: the inputs of both halves of the layer, and of their
        norms. Sharded: queries, keys, values and the output of attention; the MLP's hidden states
        before and after its activation. The QK norm computes in float32, and keeps its input and
        output in float32. Each expert that a token is routed to keeps its input and output as well.
        """
        kept = 4 * self.hidden_bytes
        for parameter in parameters_of(self.bridge):
            if parameter.name.endswith(("linear_qkv.weight", "linear_fc1.weight")):
                values = parameter.shape[0]
            elif parameter.name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                values = parameter.shape[1]
            elif parameter.name.endswith(("q_layernorm.weight", "k_layernorm.weight")):
                kept += 8 * parameter.size / self.layout.tp
                continue
            else:
                continue
            is_expert = parameter.experts > 1
            per_expert = values / (self.layout.etp if is_expert else self.layout.tp)
            if is_expert:
                per_expert += self.bridge.config.hidden_size
            kept += self.value_bytes * parameter.active_experts * per_expert
        return kept

    def _micro_batches_in_flight(self) -> float:
        """Return the number of micro-batches whose activations this stage keeps at once.

        Megatron's 1F1B schedule fills the pipeline before its first backward pass. With interleaved
        chunks the number is a fraction, as a stage keeps some chunks of a micro-batch only.
        """
        stages, chunks = self.layout.pp, self.layout.vpp
        stages_behind = stages - self.stage - 1
        if chunks == 1:
            return min(stages_behind + 1, self.layout.micro_batches)
        begun = 2 * stages_behind + (chunks - 1) * stages + 1
        return min(begun, chunks * self.layout.micro_batches) / chunks

    def logits(self) -> float:
        """Return the bytes of the logits and, in float32, of their softmax and gradient."""
        if not self.is_last or self.bridge.num_labels:
            return 0.0
        columns = padded_vocab_size(self.config, self.bridge) / self.layout.tp
        return self.tokens * columns * (self.value_bytes + 8)
