"""Checkpoints of stock megatron-core, at any layout and with optimizer state, export bit for bit.

The script that saves them gathers the expected tensors from the model's own parameters, without the
bridge's mapping.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from damage import edit_json
from launching import olmo_bridge, stock
from safetensors.torch import load_file
from slow import slow_but

from megatron_olmo_bridge import (
    AutoBridge,
    export_checkpoint,
    import_checkpoint,
    inspect,
    synth,
)
from megatron_olmo_bridge.checkpoints.checkpoint import ReadOptions
from megatron_olmo_bridge.convert.options import ExportOptions
from megatron_olmo_bridge.errors import InputError

TP_PP = ("--tp", 2, "--pp", 2)
SAVES = {
    "one process": ((), 1),
    "tp2 pp2, optimizer, stacked keys": ((*TP_PP, "--optimizer"), 4),
    "tp2 pp2, optimizer, a key for each layer": ((*TP_PP, "--optimizer", "--per-layer-keys"), 4),
    "tp2, singleton shards": (("--tp", 2, "--per-layer-keys", "singleton_local_shards"), 2),
    "fully reshardable optimizer": (("--tp", 2, "--optimizer", "fully_reshardable"), 2),
    "pp2 vpp2": (("--pp", 2, "--vpp", 2), 2),
    "bfloat16 tp2": (("--tp", 2, "--dtype", "bfloat16"), 2),
}

QUICK = ("one process", "tp2 pp2, optimizer, stacked keys")


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth("olmo2-tiny", tmp_path_factory.mktemp("hf") / "tiny", dtype="float32")


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("save", slow_but(QUICK, SAVES))
def test_export_equals_the_models_weights(hf: Path, tmp_path: Path, save: str) -> None:
    arguments, processes = SAVES[save]
    root = tmp_path / "run"
    stock("save", "--hf", hf, "--out", root, *arguments, processes=processes)
    export_checkpoint(root, tmp_path / "hf", ExportOptions(hf_config=hf, max_shard_size="1MB"))
    assert_same(load_folder(tmp_path / "hf"), load_file(root / "expected.safetensors"))
    assert ("optimizer state" in inspect(root, ReadOptions(hf_config=hf)).layout) == (
        "--optimizer" in arguments
    )


@pytest.mark.slow
def test_padded_vocabulary_is_trimmed_to_the_config(hf: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    stock("save", "--hf", hf, "--out", root, "--vocab-divisible-by", 768, "--tp", 2, processes=2)
    export_checkpoint(root, tmp_path / "hf", ExportOptions(hf_config=hf))
    found = load_folder(tmp_path / "hf")
    assert found["lm_head.weight"].shape == (1024, 128)
    assert_same(found, load_file(root / "expected.safetensors"))


def test_config_comes_from_megatron_lms_args(hf: Path, tmp_path: Path) -> None:
    """Megatron-LM records its args, but often only the padded vocabulary size."""
    root = tmp_path / "run"
    stock("save", "--hf", hf, "--out", root)
    with pytest.raises(InputError, match="--vocab-size"):
        export_checkpoint(root, tmp_path / "hf")
    export_checkpoint(root, tmp_path / "hf", ExportOptions(vocab_size=1024))
    assert_same(load_folder(tmp_path / "hf"), load_file(root / "expected.safetensors"))


OTHER_MODELS = {
    "fewer heads": ({"num_attention_heads": 4, "num_key_value_heads": 2},
                    "num_query_groups is 4 in the checkpoint, 2 in the config"),
    "another theta": ({"rope_theta": 10000.0},
                      "rotary_base is 500000.0 in the checkpoint, 10000.0 in the config"),
    "another epsilon": ({"rms_norm_eps": 1e-5},
                        "norm_epsilon is 1e-06 in the checkpoint, 1e-05 in the config"),
    "another family": ({"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3"},
                       "spec is megatron_olmo_bridge.models.olmo2.layer_specs in the checkpoint, "
                       "the config is of olmo3"),
}  # fmt: skip


@pytest.mark.parametrize("layout", [(), pytest.param(("--optimizer",), marks=pytest.mark.slow)])
def test_a_config_that_contradicts_megatron_lms_args_is_refused(
    hf: Path, tmp_path: Path, layout: tuple[str, ...]
) -> None:
    """All these configs give tensors of the same shapes, so the weights would be misread."""
    root, config = tmp_path / "run", tmp_path / "hf" / "config.json"
    stock("save", "--hf", hf, "--out", root, *layout)
    config.parent.mkdir()
    for change, line in OTHER_MODELS.values():
        config.write_text(json.dumps(json.loads((hf / "config.json").read_text()) | change))
        for command in (("export", root, tmp_path / "out"), ("inspect", root)):
            done = olmo_bridge(*command, "--hf-config", config.parent)
            assert done.exit_code == 2
            said = " ".join(done.stderr.split())
            assert f"{config} contradicts {root}/iter_0000007/" in said
            assert f"- {line}" in said
            assert "Pass --hf-config with the folder of the model" in said
    assert not (tmp_path / "out").exists()


def test_a_config_that_contradicts_the_weights_is_refused_by_every_command(
    hf: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "m" / "iter_0000000"
    import_checkpoint(hf, tmp_path / "m")
    edit_json(folder / "hf" / "config.json", lambda c: c.update(num_key_value_heads=2, head_dim=32))
    for command in (
        ("export", tmp_path / "m", tmp_path / "out"), ("inspect", tmp_path / "m"),
        ("verify", hf, tmp_path / "m"), ("compare", hf, tmp_path / "m"),
        ("generate", tmp_path / "m", "--tokens", "1,2"),
        ("average", tmp_path / "m", hf, tmp_path / "out"),
    ):  # fmt: skip
        done = olmo_bridge(*command)
        assert done.exit_code == 2, command
        said = " ".join(done.stderr.split())
        assert f"{folder}/hf/config.json contradicts {folder}/run_config.yaml:" in said, command
        assert "- num_query_groups is 4 in the checkpoint, 2 in the config" in said, command
    with pytest.raises(InputError, match="contradicts"):
        AutoBridge.from_checkpoint(tmp_path / "m")

    # The config that was saved here is correct.
    for record in ("run_config.yaml", "hf/config.json"):
        (folder / record).unlink()
    assert inspect(tmp_path / "m").numbers["num_query_groups"] == 4


def test_every_iteration_is_exported(hf: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    stock("save", "--hf", hf, "--out", root)
    shutil.copytree(root / "iter_0000007", root / "iter_0000014")
    export_checkpoint(root, tmp_path / "hf", ExportOptions(iteration="all", hf_config=hf))
    for name in ("iter_0000007", "iter_0000014"):
        found = load_folder(tmp_path / "hf" / name)
        assert_same(found, load_file(root / "expected.safetensors"))
