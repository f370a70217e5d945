"""GPT-2 of OLM's blocks: every element at its place in the Hugging Face model, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_olmo_bridge.checkpoints import olm
from megatron_olmo_bridge.checkpoints.checkpoint import Checkpoint, ReadOptions
from megatron_olmo_bridge.checkpoints.olm import OLMCheckpoint
from megatron_olmo_bridge.checkpoints.open import open_checkpoint
from megatron_olmo_bridge.errors import BridgeError, InputError, MappingError
from megatron_olmo_bridge.formats.tensors import TensorView
from megatron_olmo_bridge.storage.transfer import Transfer

VOCAB, POSITIONS, WIDTH, FFN, LAYERS, HEADS = 29, 14, 12, 40, 3, 2
HEAD = "blocks.2.blocks.1.weight"
Tensors = dict[str, torch.Tensor]


def state_dict(tied: bool = True, ffn: int = FFN, dtype: torch.dtype = torch.float32) -> Tensors:
    """Random weights under the names that OLM gives them."""
    shapes: dict[str, tuple[int, ...]] = {
        "blocks.0.blocks.0.embedding.weight": (VOCAB, WIDTH),
        "blocks.0.blocks.1.pos_embedding.weight": (POSITIONS, WIDTH),
    }
    for i in range(LAYERS):
        a, f = (f"blocks.1.stack.{i}.blocks.{k}.block.blocks" for k in (0, 1))
        for name, rows, columns in (
            *((f"{a}.1.{x}_proj", WIDTH, WIDTH) for x in ("q", "k", "v", "out")),
            (f"{f}.1.up_proj", ffn, WIDTH),
            (f"{f}.1.down_proj", WIDTH, ffn),
        ):
            shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
        shapes |= {f"{b}.0.{n}": (WIDTH,) for b in (a, f) for n in ("gamma", "beta")}
    shapes |= {"blocks.2.blocks.0.gamma": (WIDTH,), "blocks.2.blocks.0.beta": (WIDTH,)}
    shapes[HEAD] = (VOCAB, WIDTH)
    generator = torch.Generator().manual_seed(0)
    state = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    if tied:
        state[HEAD] = state["blocks.0.blocks.0.embedding.weight"]
    return state


def hf_state_dict(state: Tensors, tied: bool) -> Tensors:
    """The same weights as Hugging Face has them, arranged by torch."""
    out = {
        "transformer.wte.weight": state["blocks.0.blocks.0.embedding.weight"],
        "transformer.wpe.weight": state["blocks.0.blocks.1.pos_embedding.weight"],
        "transformer.ln_f.weight": state["blocks.2.blocks.0.gamma"],
        "transformer.ln_f.bias": state["blocks.2.blocks.0.beta"],
    }
    for i in range(LAYERS):
        a, f = (f"blocks.1.stack.{i}.blocks.{k}.block.blocks" for k in (0, 1))
        h = f"transformer.h.{i}"
        qkv = [f"{a}.1.{x}_proj" for x in "qkv"]
        out |= {
            f"{h}.ln_1.weight": state[f"{a}.0.gamma"],
            f"{h}.ln_1.bias": state[f"{a}.0.beta"],
            f"{h}.attn.c_attn.weight": torch.cat([state[f"{x}.weight"].T for x in qkv], dim=1),
            f"{h}.attn.c_attn.bias": torch.cat([state[f"{x}.bias"] for x in qkv]),
            f"{h}.attn.c_proj.weight": state[f"{a}.1.out_proj.weight"].T,
            f"{h}.attn.c_proj.bias": state[f"{a}.1.out_proj.bias"],
            f"{h}.ln_2.weight": state[f"{f}.0.gamma"],
            f"{h}.ln_2.bias": state[f"{f}.0.beta"],
            f"{h}.mlp.c_fc.weight": state[f"{f}.1.up_proj.weight"].T,
            f"{h}.mlp.c_fc.bias": state[f"{f}.1.up_proj.bias"],
            f"{h}.mlp.c_proj.weight": state[f"{f}.1.down_proj.weight"].T,
            f"{h}.mlp.c_proj.bias": state[f"{f}.1.down_proj.bias"],
        }
    return out if tied else out | {"lm_head.weight": state[HEAD]}


def saved(tmp_path: Path, state: Tensors) -> Path:
    torch.save({"step": 1, "model_state_dict": state}, tmp_path / "step_1.pt")
    return tmp_path / "step_1.pt"


def opened(tmp_path: Path, change: Callable[[Tensors], object], **options: Any) -> Checkpoint:
    """The checkpoint after a change of its state dict."""
    state = state_dict()
    change(state)
    options = {"kind_options": {"heads": HEADS}} | options
    return open_checkpoint(saved(tmp_path, state), ReadOptions(**options))


def values(view: TensorView) -> torch.Tensor:
    with Transfer() as transfer:
        data = bytearray().join(bytes(block) for _, _, block in transfer.blocks(view))
    return torch.frombuffer(data, dtype=getattr(torch, view.dtype)).view(view.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ffn", [FFN, 4 * WIDTH])
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_equals_the_hugging_face_one(
    tmp_path: Path, tied: bool, ffn: int, dtype: torch.dtype
) -> None:
    state = state_dict(tied, ffn, dtype)
    source = open_checkpoint(saved(tmp_path, state), ReadOptions(kind_options={"heads": HEADS}))
    expected = hf_state_dict(state, tied)

    assert isinstance(source, OLMCheckpoint)
    assert source.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(values(source.tensors[name]), tensor), name
    assert source.hf_config["tie_word_embeddings"] is tied
    assert source.hf_config["n_inner"] == (ffn if ffn == FFN else None)
    assert source.bridge.config.ffn_hidden_size == ffn


def test_the_config_follows_from_shapes_and_olms_constants(tmp_path: Path) -> None:
    source = open_checkpoint(
        saved(tmp_path, state_dict()), ReadOptions(kind_options={"heads": HEADS})
    )
    assert source.hf_config == {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_positions": POSITIONS,
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_inner": FFN,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu",
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    assert source.config_from == source.path == tmp_path / "step_1.pt"


def test_a_head_that_only_equals_the_embedding_is_kept(tmp_path: Path) -> None:
    """Only a shared storage says that training keeps the two equal."""
    source = opened(tmp_path, lambda s: s.update({HEAD: s[HEAD].clone()}))
    assert source.hf_config["tie_word_embeddings"] is False
    assert "lm_head.weight" in source.tensors


def test_the_table_names_every_tensor_once(tmp_path: Path) -> None:
    table = [name for names in olm.OLM_TENSORS.values() for name in names]
    assert len(table) == len(set(table))
    assert olm.OLM_TENSORS.keys() > olm.TRANSPOSED
    assert {
        n.replace(".0.blocks.0.block", ".*.blocks.0.block").replace(
            ".0.blocks.1.block", ".*.blocks.1.block"
        )
        for n in state_dict()
        if ".stack.0." in n or ".stack." not in n
    } == set(table)


def test_the_number_of_heads_must_be_stated(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"how many attention heads.*--heads, or --hf-config"):
        opened(tmp_path, lambda _: None, kind_options={})
    with pytest.raises(InputError, match=r"step_1\.pt: n_embd 12 cannot be divided by 5"):
        opened(tmp_path, lambda _: None, kind_options={"heads": 5})


NEEDLESS: dict[str, Any] = {"iteration": 3, "vocab_size": 9, "num_labels": 2}


@pytest.mark.parametrize("option", NEEDLESS)
def test_options_for_other_checkpoints_are_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(InputError, match=f"--{option.replace('_', '-')} is for "):
        opened(tmp_path, lambda _: None, **{option: NEEDLESS[option]})


def test_the_option_heads_is_for_olm_only(tiny_hf: Path) -> None:
    with pytest.raises(InputError, match="--heads is for OLM checkpoints; this is Hugging Face"):
        open_checkpoint(tiny_hf, ReadOptions(kind_options={"heads": 2}))


def q(i: int) -> str:
    return f"blocks.1.stack.{i}.blocks.0.block.blocks.1.q_proj.weight"


def drop_layer(state: Tensors) -> None:
    for name in [n for n in state if ".stack.1." in n]:
        del state[name]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop(q(1)), [f"missing (1):\n  - {q(1)}"]),
        (lambda s: s.update({"mask": torch.ones(2)}), ["unexpected (1):\n  - mask"]),
        (lambda s: s.update({HEAD.replace("weight", "bias"): torch.ones(VOCAB)}),
         ["unexpected (1):\n  - blocks.2.blocks.1.bias"]),
        (lambda s: s.update({q(2): torch.ones(WIDTH, 7)}),
         [f"wrong shape (1):\n  - {q(2)} has shape [12, 7], the config asks for [12, 12]"]),
        (lambda s: s.update({HEAD: torch.ones(5, WIDTH)}), [f"  - {HEAD} has shape [5, 12]"]),
        (drop_layer, ["missing (16):", ".stack.1.", "unexpected (16):", "and 11 more"]),
        (lambda s: s.pop(HEAD), ["not GPT-2 as OLM's GPT2Model", HEAD]),
        (lambda s: s.pop("blocks.0.blocks.1.pos_embedding.weight"),
         ["not GPT-2 as OLM's GPT2Model", "pos_embedding"]),
        (lambda s: s.update({"blocks.0.blocks.0.embedding.weight": torch.ones(VOCAB)}),
         ["not GPT-2 as OLM's GPT2Model", "embedding.weight"]),
        (lambda s: s.clear(), ["not GPT-2 as OLM's GPT2Model"]),
        (lambda s: s.update({q(0): s[q(0)].half()}),
         ["transformer.h.0.attn.c_attn.weight: its parts have different dtypes"]),
    ],
)  # fmt: skip
def test_other_models_are_refused_with_the_names_of_their_tensors(
    tmp_path: Path, change: Callable[[Tensors], object], says: list[str]
) -> None:
    with pytest.raises(BridgeError) as caught:
        opened(tmp_path, change)
    message = str(caught.value)
    for text in (str(tmp_path / "step_1.pt") if "dtypes" not in message else "", *says):
        assert text in message
    assert message.count("\n") < 24


@pytest.mark.parametrize("name", ["embedding", "up_proj", "pos_embedding"])
def test_tensors_without_elements_are_refused(tmp_path: Path, name: str) -> None:
    def empty(state: Tensors) -> None:
        for n in [n for n in state if name in n and n.endswith("weight")]:
            state[n] = torch.zeros(0, *state[n].shape[1:])

    with pytest.raises(BridgeError):
        opened(tmp_path, empty)


# -------------------------------------------------------------------------- with a config.json


def config(tmp_path: Path, **changes: Any) -> Path:
    """A folder with a config.json that fits, but for the changes."""
    said = opened(tmp_path, lambda _: None).hf_config | {"eos_token_id": 5} | changes
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def test_a_config_states_the_heads_and_the_token_ids(tmp_path: Path) -> None:
    folder = config(tmp_path)
    for heads in (None, HEADS):
        source = open_checkpoint(
            tmp_path / "step_1.pt", ReadOptions(hf_config=folder, kind_options={"heads": heads})
        )
        assert source.bridge.config.num_attention_heads == HEADS
        assert source.hf_config["eos_token_id"] == 5
        assert source.config_from == folder / "config.json"
        assert source.artifacts_folder == folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"activation_function": "gelu_new"}, "activation is gelu_new, not gelu"),
        ({"n_layer": 4}, "num_layers is 4, not 3"),
        ({"tie_word_embeddings": False}, "share_embeddings_and_output_weights is False, not True"),
        ({"layer_norm_epsilon": 1e-6}, "layernorm_epsilon is 1e-06, not 1e-05"),
        ({"n_head": 4, "vocab_size": 99}, "vocab_size is 99, not 29"),
        ({"n_head": "two"}, "n_head"),
        ({"architectures": ["LlamaForCausalLM"]}, "architecture LlamaForCausalLM is not known"),
    ],
)
def test_a_config_of_another_model_is_refused(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    folder = config(tmp_path, **changes)
    with pytest.raises(BridgeError) as caught:
        open_checkpoint(tmp_path / "step_1.pt", ReadOptions(hf_config=folder))
    assert str(caught.value).startswith(f"{folder / 'config.json'}: ")
    assert says in str(caught.value)


def test_a_config_of_another_number_of_heads_is_refused(tmp_path: Path) -> None:
    folder = config(tmp_path)
    with pytest.raises(InputError, match="num_attention_heads is 2, not 4"):
        open_checkpoint(
            tmp_path / "step_1.pt", ReadOptions(hf_config=folder, kind_options={"heads": 4})
        )


def test_a_config_of_another_family_is_refused(tmp_path: Path, tiny_hf: Path) -> None:
    saved(tmp_path, state_dict())
    with pytest.raises(InputError, match="is the config of olmo2"):
        open_checkpoint(
            tmp_path / "step_1.pt", ReadOptions(hf_config=tiny_hf, kind_options={"heads": HEADS})
        )


# ------------------------------------------------------------------------------ the real package


@pytest.mark.parametrize("tied", [True, False])
def test_names_and_shapes_are_those_of_the_package(tied: bool) -> None:
    gpt2 = pytest.importorskip("olm.models.openai.gpt2")
    model = gpt2.GPT2Model(VOCAB, WIDTH, LAYERS, HEADS, POSITIONS, tie_weights=tied)
    found = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert found == {n: t.shape for n, t in state_dict(ffn=4 * WIDTH).items()}
    state = model.state_dict()
    assert (state[HEAD].data_ptr() == next(iter(state.values())).data_ptr()) is tied


def test_the_constants_are_those_of_the_installed_package() -> None:
    gpt2 = pytest.importorskip("olm.models.openai.gpt2")
    model = gpt2.GPT2Model(VOCAB, WIDTH, LAYERS, HEADS, POSITIONS)
    norms = [m for m in model.modules() if type(m).__name__ == "LayerNorm"]
    assert {norm.eps for norm in norms} == {olm.OLM_CONSTANTS["layer_norm_epsilon"]}
    assert len(norms) == 2 * LAYERS + 1
    approximations = {m.approximate for m in model.modules() if isinstance(m, torch.nn.GELU)}
    assert approximations == {"none"}  # what transformers calls "gelu"
    assert olm.OLM_CONSTANTS["activation_function"] == "gelu"


def test_another_model_of_the_package_is_refused(tmp_path: Path) -> None:
    blocks = pytest.importorskip("olm.nn.blocks")
    model = blocks.LM(VOCAB, WIDTH, HEADS, LAYERS, POSITIONS)
    with pytest.raises(MappingError, match="not GPT-2 as OLM's GPT2Model"):
        open_checkpoint(
            saved(tmp_path, model.state_dict()), ReadOptions(kind_options={"heads": HEADS})
        )
