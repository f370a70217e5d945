"""Verify: equal checkpoints of any two kinds are equal, and each kind of difference is found."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_olmo_bridge.convert.options import ImportOptions
from megatron_olmo_bridge.convert.to_hf import export_checkpoint
from megatron_olmo_bridge.convert.to_megatron import import_checkpoint
from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.formats.torch_archive import read_tensor
from megatron_olmo_bridge.formats.torch_dist import TorchDistFolder
from megatron_olmo_bridge.storage.execute import WriteOptions
from megatron_olmo_bridge.tools.verify import Verification, verify

HF = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
WEIGHT = "model.layers.1.self_attn.k_proj.weight"


def kinds(result: Verification) -> set[tuple[str, str]]:
    return {(d.kind, d.name) for d in result.differences}


def as_megatron(hf: Path, **options: Any) -> Path:
    target = hf.with_name(hf.name + "-megatron")
    import_checkpoint(hf, target, ImportOptions(**options))
    return target


@pytest.fixture
def pair(make_hf: HF, request: pytest.FixtureRequest) -> Callable[..., tuple[Path, Path]]:
    """Two checkpoints, the second changed; each of the kind that the test asks for."""

    def make(kinds: str, **changed: Any) -> tuple[Path, Path]:
        paths = [make_hf("first"), make_hf("second", **changed)]
        a, b = (as_megatron(p) if kind == "M" else p for p, kind in zip(paths, kinds, strict=True))
        return a, b

    return make


ALL_KINDS = pytest.mark.parametrize("which", ["HH", "HM", "MH", "MM"])


@ALL_KINDS
def test_the_same_model_is_equal_in_any_kind(
    pair: Callable[..., tuple[Path, Path]], which: str
) -> None:
    a, b = pair(which)
    layer = 2 * 36 * 36 + 2 * 12 * 36 + 36 + 12 + 3 * 50 * 36 + 2 * 36
    count = 2 * 101 * 36 + 36 + 3 * layer
    result = verify(a, b, workers=2)
    assert result.equal
    assert result.differences == []
    assert result.compared == 3 + 3 * 11
    assert result.nbytes == 4 * count


def change(tensors: Tensors) -> None:
    tensors[WEIGHT][3, 5] += 1
    tensors[WEIGHT][11, 35] = torch.nan


@ALL_KINDS
def test_a_changed_value_is_found(pair: Callable[..., tuple[Path, Path]], which: str) -> None:
    a, b = pair(which, change=change)
    for first, second in ((a, b), (b, a)):
        (difference,) = verify(first, second).differences
        assert (difference.kind, difference.name) == ("values", WEIGHT)
        assert difference.detail.startswith("2 of 432 differ; first at [3, 5]: ")


def test_values_are_counted_over_all_blocks(make_hf: HF, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_olmo_bridge.storage.transfer.BLOCK", 3 * 36 * 4)  # 3 rows

    def changed(tensors: Tensors) -> None:
        for row, column in ((7, 2), (8, 35), (40, 0), (100, 35)):
            tensors["lm_head.weight"][row, column] += 1

    (difference,) = verify(make_hf("a"), make_hf("b", change=changed)).differences
    assert difference.detail.startswith("4 of 3636 differ; first at [7, 2]: ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_compared_as_bits(make_hf: HF, dtype: torch.dtype) -> None:
    # Zero and minus zero are equal numbers, NaN is unequal to itself.
    def fill(value: float) -> Callable[[Tensors], object]:
        return lambda tensors: tensors["model.norm.weight"].fill_(value)

    zero = make_hf("zero", dtype=dtype, change=fill(0.0))
    minus = make_hf("minus", dtype=dtype, change=fill(-0.0))
    nan = make_hf("nan", dtype=dtype, change=fill(torch.nan))
    also_nan = make_hf("also", dtype=dtype, change=fill(torch.nan))
    assert kinds(verify(zero, minus)) == {("values", "model.norm.weight")}
    assert verify(nan, also_nan).equal


@ALL_KINDS
def test_dtype(pair: Callable[..., tuple[Path, Path]], which: str) -> None:
    a, b = pair(which, dtype=torch.bfloat16)
    result = verify(a, b)
    assert len(result.differences) == 36
    assert {d.kind for d in result.differences} == {"dtype"}
    assert result.differences[0].detail == "float32 and bfloat16"
    assert result.compared == 0


@ALL_KINDS
def test_fewer_layers(pair: Callable[..., tuple[Path, Path]], which: str) -> None:
    a, b = pair(which, num_hidden_layers=2)
    gone = {f"model.layers.2.{n}" for n in (
        "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight",
        "self_attn.o_proj.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight",
        "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight",
        "post_attention_layernorm.weight", "post_feedforward_layernorm.weight")}  # fmt: skip
    layers = ("config", "num_layers")
    there = kinds(verify(a, b))
    assert {("missing", name) for name in gone} | {layers} == {k for k in there if k[0] != "values"}
    back = kinds(verify(b, a))
    assert {("unexpected", name) for name in gone} | {layers} == {
        k for k in back if k[0] != "values"
    }


@ALL_KINDS
def test_another_shape_is_found(pair: Callable[..., tuple[Path, Path]], which: str) -> None:
    a, b = pair(which, intermediate_size=40)
    result = verify(a, b)
    assert ("config", "ffn_hidden_size") in kinds(result)
    names = {n for kind, n in kinds(result) if kind == "shape"}
    assert names == {f"model.layers.{i}.mlp.{n}_proj.weight" for i in range(3)
                     for n in ("gate", "up", "down")}  # fmt: skip
    details = {d.detail for d in result.differences if d.kind == "shape"}
    assert details == {"[50, 36] and [40, 36]", "[36, 50] and [36, 40]"}


@ALL_KINDS
def test_a_changed_config_value_is_found(
    pair: Callable[..., tuple[Path, Path]], which: str
) -> None:
    a, b = pair(which, rope_theta=10000)
    (difference,) = verify(a, b).differences
    assert (difference.kind, difference.name) == ("config", "rotary_base")
    assert difference.detail == "500000.0 and 10000.0"


@ALL_KINDS
def test_a_changed_key_without_effect_on_the_model_is_found(
    pair: Callable[..., tuple[Path, Path]], which: str
) -> None:
    a, b = pair(which, eos_token_id=5)
    (difference,) = verify(a, b).differences
    assert (difference.kind, difference.name) == ("config", "eos_token_id")
    assert difference.detail == "absent and 5"


# ------------------------------------------------------------------ config and tokenizer files


def side_folder(checkpoint: Path) -> Path:
    beside = checkpoint / "iter_0000000" / "hf"
    return beside if beside.is_dir() else checkpoint


@ALL_KINDS
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("generation_config.json", '{"eos_token_id": 8}',
         ("generation_config.json: eos_token_id", "7 and 8")),
        ("generation_config.json", '{"eos_token_id": 7, "temperature": 0.6}',
         ("generation_config.json: temperature", "absent and 0.6")),
        ("generation_config.json", '{"eos_token_id": true}',
         ("generation_config.json: eos_token_id", "7 and True")),
        ("tokenizer.json", '{"a": ["tokenizer"]}',
         ("tokenizer.json: a", "'tokenizer' and ['tokenizer']")),
        ("tokenizer.json", "not JSON", ("tokenizer.json", "other bytes: 18 and 8")),
        ("merges.txt", "a b", ("merges.txt", "only in the second")),
        ("chat_template.jinja", "{{ a }}", ("chat_template.jinja", "only in the second")),
        ("additional_chat_templates/rag.jinja", "",
         ("additional_chat_templates/rag.jinja", "only in the second")),
    ],
)  # fmt: skip
def test_a_changed_artifact_is_found(
    pair: Callable[..., tuple[Path, Path]], which: str, name: str, content: str,
    expected: tuple[str, str],
) -> None:  # fmt: skip
    a, b = pair(which)
    file = side_folder(b) / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)

    (difference,) = verify(a, b).differences

    assert difference.kind == "file"
    assert (difference.name, difference.detail) == expected


def test_a_changed_binary_artifact_is_found(make_hf: HF) -> None:
    a, b = make_hf("a"), make_hf("b")
    (a / "tokenizer.model").write_bytes(b"\x00\xff")
    (b / "tokenizer.model").write_bytes(b"\x00\xfe")
    (difference,) = verify(a, b).differences
    assert (difference.name, difference.detail) == ("tokenizer.model", "other bytes: 2 and 2")


@pytest.mark.parametrize(
    "content",
    [
        '{\n  "eos_token_id": 7.0\n}\n',
        '{"transformers_version": "9.9", "_name_or_path": "elsewhere", "eos_token_id": 7}',
    ],
)
def test_json_files_with_the_same_values_are_equal(make_hf: HF, content: str) -> None:
    a, b = make_hf("a"), make_hf("b")
    (b / "generation_config.json").write_text(content)
    result = verify(a, b)
    assert result.equal
    assert result.notes == []


def test_nan_equals_nan(make_hf: HF) -> None:
    a, b = make_hf("a", embd_pdrop=math.nan), make_hf("b", embd_pdrop=math.nan)
    for folder in (a, b):
        (folder / "generation_config.json").write_text('{"x": [NaN, {"y": Infinity}]}')
    assert verify(a, b).equal
    (b / "generation_config.json").write_text('{"x": [NaN, {"y": NaN}]}')
    (difference,) = verify(a, b).differences
    assert difference.name == "generation_config.json: x"


@pytest.mark.parametrize(
    ("name", "what"),
    [("generation_config.json", "generation_config.json"), ("tokenizer.json", "tokenizer files")],
)
def test_artifacts_that_only_one_has_are_noted(make_hf: HF, name: str, what: str) -> None:
    a, b = make_hf("a"), make_hf("b")
    (b / name).unlink()
    for first, second in ((a, b), (b, a)):
        result = verify(first, second)
        assert result.equal
        assert result.notes == [f"{b}: has no {what}, so the other's were not compared"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["Olmo2Model"]}, ("architectures", "a language model and Olmo2Model")),
        ({"problem_type": None, "id2label": {"0": "no"}}, ("id2label", "absent and {'0': 'no'}")),
        ({"auto_map": {"AutoModel": "x.Y"}}, ("auto_map", "absent and {'AutoModel': 'x.Y'}")),
    ],
)
def test_other_settings_of_the_model(
    make_hf: HF, config: dict[str, Any], expected: tuple[str, str]
) -> None:
    differences = verify(make_hf("a"), make_hf("b", **config)).differences
    assert expected in [(d.name, d.detail) for d in differences]


def test_a_classifier_and_a_language_model(make_hf: HF) -> None:
    def score(tensors: Tensors) -> None:
        tensors["score.weight"] = torch.randn(2, 36)
        del tensors["lm_head.weight"]

    classifier = make_hf("b", architectures=["Olmo2ForSequenceClassification"], change=score)
    a = make_hf("a")
    for first, second, detail in (
        (a, classifier, "a language model and a classifier"),
        (classifier, a, "a classifier and a language model"),
    ):
        details = {d.name: d.detail for d in verify(first, second).differences}
        assert details["architectures"] == detail
        assert details["num_labels"] in ("absent and 2", "2 and absent")


@pytest.mark.parametrize(
    "spelling",
    [
        {"transformers_version": "5.0"},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"architectures": ["Olmo1124ForCausalLM"], "model_type": "olmo_1124"},
        {"architectures": "Olmo2ForCausalLM"},
        {"num_hidden_layers": 3, "head_dim": 6},
    ],
)
def test_spellings_of_the_same_config_are_equal(make_hf: HF, spelling: dict[str, Any]) -> None:
    assert verify(make_hf("a"), make_hf("b", **spelling)).equal


def test_the_dtype_may_have_either_key(make_hf: HF) -> None:
    a, b = make_hf("a"), make_hf("b")
    config = json.loads((b / "config.json").read_text())
    config["dtype"] = config.pop("torch_dtype")
    (b / "config.json").write_text(json.dumps(config))
    assert verify(a, b).equal


@pytest.mark.parametrize("names", [[WEIGHT], ["model.norm.weight", "lm_head.weight"]])
def test_a_missing_tensor_in_a_hugging_face_folder_is_found(make_hf: HF, names: list[str]) -> None:
    a = make_hf("a")
    b = make_hf("b", change=lambda t: [t.pop(name) for name in names])
    assert kinds(verify(a, b)) == {("missing", name) for name in names}
    assert kinds(verify(b, a)) == {("unexpected", name) for name in names}
    assert kinds(verify(as_megatron(a), b)) == {("missing", name) for name in names}


def test_an_unexpected_tensor_in_a_hugging_face_folder_is_found(make_hf: HF) -> None:
    a = make_hf("a")
    b = make_hf("b", change=lambda t: t.update({"extra": torch.zeros(2)}))
    assert kinds(verify(a, b)) == {("unexpected", "extra")}


def test_what_is_ignored_by_the_mapping_is_not_compared(make_hf: HF) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    b = make_hf("b", change=lambda t: t.update({name: torch.zeros(2)}))
    assert verify(make_hf("a"), b).equal


def test_a_megatron_checkpoint_that_does_not_fit_its_config_is_found(make_hf: HF) -> None:
    a, b = make_hf("a"), as_megatron(make_hf("b"))
    config = b / "iter_0000000/hf/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 4}))
    with pytest.raises(InputError, match="num_layers is 3 in the checkpoint, 4 in the config"):
        verify(a, b)
    for record in ("common.pt", "run_config.yaml"):
        (b / "iter_0000000" / record).unlink()
    (difference,) = verify(a, b).differences
    assert (difference.kind, difference.name) == ("mapping", str(b))
    assert "has shape [3, 36], the config asks for [4, 36]" in difference.detail


# ---------------------------------------------------------------------------------- padding rows


def flip_last_row(megatron: Path) -> None:
    """Change the last padding row of the output layer."""
    folder = TorchDistFolder.read(megatron / "iter_0000000")
    at = folder.tensors["output_layer.weight"].chunks[0].stored
    array = read_tensor(folder.path / at.file, at.offset, at.length)
    data = bytearray(array.file.read_bytes())
    data[array.offset + 127 * 36 * 4] ^= 1
    array.file.write_bytes(data)


def test_padding_rows_of_an_import_are_zero(make_hf: HF) -> None:
    hf = make_hf()
    megatron = as_megatron(hf, make_vocab_size_divisible_by=128)
    assert verify(hf, megatron).equal
    assert verify(hf, megatron).compared == 36 + 2
    flip_last_row(megatron)
    for first, second in ((hf, megatron), (megatron, hf)):
        (difference,) = verify(first, second).differences
        assert (difference.kind, difference.name) == ("values", "output_layer.weight padding rows")
        assert difference.detail.startswith("1 of 972 differ; first at [26, 0]: ")


def test_padding_rows_of_two_megatron_checkpoints_are_compared(make_hf: HF) -> None:
    a = as_megatron(make_hf("a"), make_vocab_size_divisible_by=128)
    b = as_megatron(make_hf("b"), make_vocab_size_divisible_by=128)
    assert verify(a, b).equal
    flip_last_row(b)
    assert kinds(verify(a, b)) == {("values", "output_layer.weight padding rows")}


def test_padding_rows_that_were_trained_are_noted(make_hf: HF) -> None:
    hf = make_hf()
    megatron = as_megatron(hf, make_vocab_size_divisible_by=128)
    flip_last_row(megatron)
    (megatron / "iter_0000000/olmo_bridge.json").unlink()  # as if another tool had written it
    result = verify(hf, megatron)
    assert result.equal
    assert len(result.notes) == 2
    assert "padding rows were not compared" in result.notes[0]


# ------------------------------------------------------------------------- against what is recorded


@pytest.fixture
def recorded(make_hf: HF, tmp_path: Path) -> Path:
    import_checkpoint(make_hf(), tmp_path / "m", write=WriteOptions(checksum=True))
    return tmp_path / "m"


def test_recorded_files_are_as_recorded(recorded: Path, tmp_path: Path) -> None:
    result = verify(recorded)
    assert result.equal
    assert result.notes == []
    assert (result.compared, result.checked) == (8, "checksums")
    assert verify(recorded / "iter_0000000").equal
    export_checkpoint(recorded, tmp_path / "back", write=WriteOptions(checksum=True))
    assert verify(tmp_path / "back").equal


def test_without_checksums_the_result_states_that_only_sizes_were_compared(
    make_hf: HF, tmp_path: Path
) -> None:
    import_checkpoint(make_hf(), tmp_path / "m")
    result = verify(tmp_path / "m")
    assert result.equal
    assert result.checked == "sizes"
    (note,) = result.notes
    assert note.startswith("no checksums were recorded: only names and sizes were compared")


def test_without_checksums_damaged_bytes_are_not_called_equal(make_hf: HF, tmp_path: Path) -> None:
    export_checkpoint(as_megatron(make_hf()), tmp_path / "hf2")
    damaged_at("model.safetensors", -1)(tmp_path / "hf2")
    assert verify(tmp_path / "hf2").checked == "sizes"


def damaged_at(name: str, position: int) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[position] ^= 1
        (folder / name).write_bytes(data)

    return damage


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (damaged_at("__0_0.distcp", 5000), {("checksum", "__0_0.distcp")}),
        (damaged_at("__0_0.distcp", -1), {("checksum", "__0_0.distcp")}),
        (damaged_at("hf/tokenizer.json", 2), {("checksum", "hf/tokenizer.json")}),
        (lambda f: (f / "common.pt").unlink(), {("missing", "common.pt")}),
        (lambda f: (f / "common.pt").write_bytes(b"x"),
         {("file", "common.pt"), ("checksum", "common.pt")}),
        (lambda f: (f / "__0_9.distcp").write_bytes(b"x"), {("unexpected", "__0_9.distcp")}),
        (lambda f: (f / "hf/more.txt").write_bytes(b"x"), {("unexpected", "hf/more.txt")}),
    ],
)  # fmt: skip
def test_files_that_are_not_as_recorded(
    recorded: Path, damage: Callable[[Path], object], expected: set[tuple[str, str]]
) -> None:
    damage(recorded / "iter_0000000")
    assert kinds(verify(recorded)) == expected


def test_a_checkpoint_without_a_record_needs_a_second_one(make_hf: HF) -> None:
    with pytest.raises(InputError, match="nothing was recorded to check it against"):
        verify(make_hf())


def test_the_tracker_chooses_the_iteration(recorded: Path) -> None:
    shutil.copytree(recorded / "iter_0000000", recorded / "iter_0000005")
    damaged_at("__0_0.distcp", 5000)(recorded / "iter_0000005")
    assert verify(recorded).equal
    (recorded / "latest_checkpointed_iteration.txt").write_text("5")
    assert not verify(recorded).equal
