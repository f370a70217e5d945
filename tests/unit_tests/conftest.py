"""Small OLMo-2 checkpoints, written without this package: names and shapes by hand."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import _create_write_items

from megatron_olmo_bridge.convert.to_megatron import import_checkpoint
from megatron_olmo_bridge.tools.synth import synth

# Every number differs from the others, and nothing is a multiple of 64.
SMALL: dict[str, Any] = {
    "architectures": ["Olmo2ForCausalLM"],
    "model_type": "olmo2",
    "num_hidden_layers": 3,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}

Tensors = dict[str, torch.Tensor]


def state_dict_of(config: dict[str, Any], dtype: torch.dtype, seed: int) -> Tensors:
    """Random weights under the names that transformers gives them."""
    c = config
    hidden, ffn, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    kv = hidden // c["num_attention_heads"] * c["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": (kv, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.q_norm.weight": (hidden,),
            f"{layer}.self_attn.k_norm.weight": (kv,),
            f"{layer}.mlp.gate_proj.weight": (ffn, hidden),
            f"{layer}.mlp.up_proj.weight": (ffn, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, ffn),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.post_feedforward_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (1.0 if "norm" in name else 0.0)
        + 0.1 * torch.randn(shape, generator=generator).to(dtype)
        for name, shape in shapes.items()
    }


HFFactory = Callable[..., Path]


@pytest.fixture
def make_hf(tmp_path: Path) -> HFFactory:
    """Writes a small Hugging Face folder with the safetensors library."""

    def make(
        name: str = "hf",
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        change: Callable[[Tensors], object] = lambda _: None,
        **config: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        values = SMALL | {"torch_dtype": str(dtype).removeprefix("torch.")} | config
        tensors = state_dict_of(values, dtype, seed)
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(values))
        (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
        (folder / "tokenizer.json").write_text('{"a": "tokenizer"}')
        (folder / "README.md").write_text("not a file that save_pretrained writes")
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """olmo2-tiny in bfloat16, in several shards. For reading only."""
    return synth("olmo2-tiny", tmp_path_factory.mktemp("tiny") / "hf", max_shard_size="500KB")


@pytest.fixture(scope="session")
def tiny_megatron(tiny_hf: Path) -> Path:
    """The import of :func:`tiny_hf`. For reading only."""
    import_checkpoint(tiny_hf, tiny_hf.parent / "megatron")
    return tiny_hf.parent / "megatron"


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU runtime, and the process groups of a single process as soon as a model is built."""
    pytest.importorskip("megatron.core")
    from megatron_olmo_bridge.runtime.cpu import cpu_runtime
    from megatron_olmo_bridge.runtime.process_groups import destroy_process_groups

    for name in ("RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    with cpu_runtime():
        yield
        destroy_process_groups()


def megatron_parameters(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """The same weights as megatron-core holds them, arranged by torch; layers apart."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    hidden = config["hidden_size"]
    head_dim = hidden // heads
    out = {
        "embedding.word_embeddings.weight": tensors["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": tensors["model.norm.weight"],
    }
    if "lm_head.weight" in tensors:
        out["output_layer.weight"] = tensors["lm_head.weight"]
    for i in range(config["num_hidden_layers"]):
        hf, layer = f"model.layers.{i}", f"decoder.layers.{i}"
        q, k, v = (
            tensors[f"{hf}.self_attn.{x}_proj.weight"].view(groups, width * head_dim, hidden)
            for x, width in (("q", heads // groups), ("k", 1), ("v", 1))
        )
        gate, up = (tensors[f"{hf}.mlp.{x}_proj.weight"] for x in ("gate", "up"))
        attention, mlp = f"{layer}.self_attention", f"{layer}.mlp"
        attention_norm = tensors[f"{hf}.post_attention_layernorm.weight"]
        out |= {
            f"{attention}.linear_qkv.weight": torch.cat([q, k, v], dim=1).reshape(-1, hidden),
            f"{attention}.q_layernorm.weight": tensors[f"{hf}.self_attn.q_norm.weight"],
            f"{attention}.k_layernorm.weight": tensors[f"{hf}.self_attn.k_norm.weight"],
            f"{attention}.linear_proj.weight": tensors[f"{hf}.self_attn.o_proj.weight"],
            f"{attention}.linear_proj.post_layernorm.weight": attention_norm,
            f"{mlp}.linear_fc1.weight": torch.cat([gate, up]),
            f"{mlp}.linear_fc2.weight": tensors[f"{hf}.mlp.down_proj.weight"],
            f"{mlp}.linear_fc2.post_layernorm.weight": tensors[
                f"{hf}.post_feedforward_layernorm.weight"
            ],
        }
    return out


def stacked(parameters: Tensors, config: dict[str, Any]) -> Tensors:
    """Layers stacked along a first axis, under the key without the layer's number."""
    layers = range(config["num_hidden_layers"])
    out = {n: t for n, t in parameters.items() if ".layers." not in n}
    for name in parameters:
        if name.startswith("decoder.layers.0."):
            rest = name.removeprefix("decoder.layers.0.")
            out[f"decoder.layers.{rest}"] = torch.stack(
                [parameters[f"decoder.layers.{i}.{rest}"] for i in layers]
            )
    return out


class ChunkPlanner(DefaultSavePlanner):
    """Has torch save each tensor in chunks, as tensor and pipeline parallelism leave it."""

    def __init__(self, cut: Callable[[str, torch.Size], list[tuple[slice, ...]]]) -> None:
        super().__init__(flatten_state_dict=False)
        self._cut = cut
        self._chunks: dict[MetadataIndex, torch.Tensor] = {}

    def create_local_plan(self) -> SavePlan:
        items = []
        for key, value in self.state_dict.items():
            if not isinstance(value, torch.Tensor):
                items += _create_write_items(key, value)
                continue
            for at in self._cut(key, value.shape):
                offsets = torch.Size(s.start for s in at)
                index = MetadataIndex(key, offsets)
                chunk = value[at].contiguous()
                self._chunks[index] = chunk
                data = TensorWriteData(
                    ChunkStorageMetadata(offsets, chunk.shape),
                    TensorProperties.create_from_tensor(chunk),
                    value.shape,
                )
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.index in self._chunks:
            return self._chunks[write_item.index]
        return super().resolve_data(write_item)


def random_cut(seed: int) -> Callable[[str, torch.Size], list[tuple[slice, ...]]]:
    """Cuts every dimension in one to three."""
    rng = random.Random(seed)

    def cut(_: str, shape: torch.Size) -> list[tuple[slice, ...]]:
        sides = []
        for extent in shape:
            inner = rng.sample(range(1, extent), min(rng.randrange(3), extent - 1))
            ends = [0, *sorted(inner), extent]
            sides.append([slice(a, b) for a, b in itertools.pairwise(ends)])
        return list(itertools.product(*sides))

    return cut


SaveTorchDist = Callable[..., Path]


@pytest.fixture
def save_torch_dist(tmp_path: Path) -> SaveTorchDist:
    """Saves tensors as a ``torch_dist`` checkpoint, by torch's own code."""

    def save(name: str, state_dict: dict[str, Any], seed: int | None = None) -> Path:
        whole = lambda _, shape: [tuple(slice(0, n) for n in shape)]  # noqa: E731
        folder = tmp_path / name
        dcp.save(
            state_dict,
            storage_writer=dcp.FileSystemWriter(folder, thread_count=2),
            planner=ChunkPlanner(whole if seed is None else random_cut(seed)),
            no_dist=True,
        )
        (folder / "metadata.json").write_text(
            '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
        )
        return folder

    return save


@pytest.fixture
def reference() -> SimpleNamespace:
    """What megatron-core's arrangement is, by code that shares nothing with the package."""
    return SimpleNamespace(
        config=SMALL,
        state_dict=state_dict_of,
        parameters=megatron_parameters,
        stacked=stacked,
    )
