"""Names and keywords of Megatron-Bridge: each does what docs/megatron-bridge.md says of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig

from megatron_olmo_bridge import AutoBridge, Olmo2ModelProvider, verify
from megatron_olmo_bridge.errors import BridgeError, InputError, UnsupportedError
from megatron_olmo_bridge.models.megatron_bridge import (
    BRIDGE_NAMES,
    BUILDING,
    LOADING,
    PROVIDER_NAMES,
    check_keywords,
)

PAGE = (Path(__file__).parents[3] / "docs/megatron-bridge.md").read_text()
PUBLIC_0_3_1 = {
    "AutoBridge": {
        "can_handle",
        "export_adapter_weights",
        "export_ckpt",
        "export_hf_weights",
        "from_hf_config",
        "from_hf_pretrained",
        "get_conversion_tasks",
        "get_hf_model_id_from_checkpoint",
        "hf_pretrained",
        "import_ckpt",
        "list_supported_models",
        "load_hf_weights",
        "load_megatron_model",
        "mla_transformer_config",
        "push_to_hub",
        "save_hf_pretrained",
        "save_hf_weights",
        "save_megatron_model",
        "supports",
        "to_megatron_model",
        "to_megatron_provider",
        "transformer_config",
    },
    "Providers": {
        "from_hf_pretrained",
        "initialize_model_parallel",
        "meta_model",
        "post_wrap_hook",
        "pre_wrap_hook",
        "provide",
        "provide_distributed_model",
        "register_post_wrap_hook",
        "register_pre_wrap_hook",
        "save_hf_pretrained",
    },
}
"""Public names of ``AutoBridge`` and ``ModelProviderMixin`` of megatron-bridge 0.3.1."""


def table(section: str) -> dict[str, str]:
    """Name to ``same``, ``differs`` or ``refused`` of a section of the page."""
    body = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", body, re.MULTILINE))


ROWS = [(s, name, here) for s in PUBLIC_0_3_1 for name, here in table(s).items()]


@pytest.mark.parametrize("section", PUBLIC_0_3_1)
def test_the_page_has_every_public_name(section: str) -> None:
    assert set(table(section)) == PUBLIC_0_3_1[section]


@pytest.mark.parametrize(("section", "name", "here"), ROWS)
def test_each_name_is_what_the_page_says(
    section: str, name: str, here: str, bridge: AutoBridge
) -> None:
    owner = bridge if section == "AutoBridge" else bridge.to_megatron_provider(load_weights=False)
    refused = BRIDGE_NAMES if section == "AutoBridge" else PROVIDER_NAMES
    assert here in ("same", "differs", "refused")
    assert hasattr(owner, name) == (here != "refused") == (name not in refused)
    if here == "refused":
        with pytest.raises(BridgeError, match=re.escape(refused[name])):
            getattr(owner, name)


@pytest.fixture
def bridge(tiny_hf: Path) -> AutoBridge:
    return AutoBridge.from_hf_pretrained(tiny_hf)


def test_refused_keywords_are_on_the_page_and_say_what_to_do() -> None:
    for refused in (LOADING, BUILDING):
        for name, instead in refused.items():
            assert f"`{name}`" in PAGE
            check_keywords("f", {name: None}, refused)
            with pytest.raises(UnsupportedError, match=re.escape(instead)):
                check_keywords("f", {name: "something"}, refused)
    with pytest.raises(TypeError, match="no argument 'show_progres'; did you mean 'show_progress'"):
        check_keywords("f", {"show_progres": True}, LOADING)


def test_a_bridge_says_what_it_is(bridge: AutoBridge, tiny_hf: Path) -> None:
    size = bridge.model_bridge.size_name() or f"olmo2, {bridge.model_bridge.num_layers} layers"
    assert repr(bridge) == f"AutoBridge({size}, from {tiny_hf})"
    alone = AutoBridge.from_hf_config(bridge.model_bridge.hf_config)
    assert repr(alone) == f"AutoBridge({size}, from a config, without weights)"


def test_supports_goes_by_architectures() -> None:
    assert AutoBridge.supports({"architectures": ["Olmo2ForCausalLM"]})
    assert not AutoBridge.supports({"architectures": ["LlamaForCausalLM"]})
    assert not AutoBridge.supports({})


def test_checkpoints_are_converted_by_its_keywords(tiny_hf: Path, tmp_path: Path) -> None:
    megatron, hf = tmp_path / "megatron", tmp_path / "hf"
    AutoBridge.import_ckpt(
        hf_model_id=tiny_hf, megatron_path=megatron, trust_remote_code=True, device_map=None
    )
    bridge = AutoBridge.from_hf_pretrained(tiny_hf, trust_remote_code=True)
    bridge.export_ckpt(megatron_path=megatron, hf_path=hf, show_progress=False, strict=False)
    assert verify(tiny_hf, hf).equal
    assert AutoBridge.get_hf_model_id_from_checkpoint(megatron) == str(tiny_hf)
    with pytest.raises(InputError, match="is not a Megatron checkpoint"):
        AutoBridge.get_hf_model_id_from_checkpoint(tiny_hf)
    AutoBridge.import_ckpt(tiny_hf, tmp_path / "half", torch_dtype=torch.bfloat16)
    assert AutoBridge.from_checkpoint(tmp_path / "half").transformer_config.bf16


def test_the_dtype_of_the_weights_can_be_chosen_on_opening(tiny_hf: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(tiny_hf, torch_dtype=torch.bfloat16)
    assert bridge.to_megatron_provider().params_dtype is torch.bfloat16
    assert AutoBridge.from_hf_pretrained(tiny_hf, torch_dtype="auto").dtype is None
    with pytest.raises(UnsupportedError, match="attn_implementation is not taken here"):
        AutoBridge.from_hf_pretrained(tiny_hf, attn_implementation="eager")


def test_a_new_head_has_the_problem_type_that_is_asked_for(tiny_hf: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(tiny_hf, num_labels=1, problem_type="regression")
    assert bridge.to_megatron_provider().problem_type == "regression"
    with pytest.raises(InputError, match="pass num_labels too"):
        AutoBridge.from_hf_pretrained(tiny_hf, problem_type="regression")


def test_weights_are_loaded_from_another_path(
    tiny_hf: Path, bridge: AutoBridge, one_process: None
) -> None:
    alone = AutoBridge.from_hf_config(bridge.model_bridge.hf_config)
    (model,) = alone.to_megatron_model(hf_path=tiny_hf, wrap_with_ddp=False)
    right = dict(bridge.export_hf_weights([model], cpu=True, show_progress=False))
    assert alone.load_hf_weights(model, tiny_hf) == [model]
    found = dict(alone.export_hf_weights(model, True))
    assert all(torch.equal(found[name], tensor) for name, tensor in right.items())
    with pytest.raises(UnsupportedError, match="nothing is skipped"):
        alone.load_hf_weights(model, tiny_hf, allowed_mismatched_params=["*"])


def test_hooks_run_in_order_and_may_replace_the_chunks(
    bridge: AutoBridge, one_process: None
) -> None:
    provider = bridge.to_megatron_provider(load_weights=False)
    seen: list[str] = []
    provider.register_pre_wrap_hook(lambda chunks: seen.append("second"))
    provider.register_pre_wrap_hook(lambda chunks: seen.append("first"), prepend=True)
    provider.register_pre_wrap_hook(lambda chunks: [torch.nn.Sequential(*chunks)])
    provider.initialize_model_parallel(seed=1)
    assert parallel_state.model_parallel_is_initialized()
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
    assert seen == ["first", "second"]
    assert isinstance(getattr(model, "module", model), torch.nn.Sequential)


@dataclass
class TrainedProvider(Olmo2ModelProvider):  # type: ignore[misc]
    """The class of docs/megatron-bridge.md."""

    seq_length: int = 4096
    should_pad_vocab: bool = False


def test_a_provider_takes_what_pretrain_sets_and_calls(
    bridge: AutoBridge, one_process: None
) -> None:
    """The assignments and the call of ``setup()`` in megatron/bridge/training/setup.py, 0.3.1."""
    with pytest.raises(BridgeError, match="declare it in a subclass"):
        _ = bridge.to_megatron_provider(load_weights=False).seq_length
    provider: Any = TrainedProvider(**bridge.model_bridge.config_values)
    provider.vocab_size, provider.should_pad_vocab = provider.vocab_size, False
    provider.register_pre_wrap_hook(bridge.load_hf_weights)
    (model,) = provider.provide_distributed_model(
        ddp_config=DistributedDataParallelConfig(),
        use_megatron_fsdp=False,
        use_torch_fsdp2=False,
        overlap_param_gather_with_optimizer_step=False,
        data_parallel_random_init=False,
        pg_collection=None,
    )
    provider.timers = None
    weights = dict(bridge.export_hf_weights(model))
    assert bridge.source is not None and set(weights) == set(bridge.source.mapping.hf_shapes)
