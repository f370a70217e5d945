"""The model card: what the hub reads of it, what people read, and what it does not tell."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from megatron_olmo_bridge import average_checkpoints, export_checkpoint, import_checkpoint
from megatron_olmo_bridge._version import __version__
from megatron_olmo_bridge.convert import to_megatron
from megatron_olmo_bridge.convert.options import ExportOptions
from megatron_olmo_bridge.errors import UnsupportedError
from megatron_olmo_bridge.models.families import as_classifier, published_sizes
from megatron_olmo_bridge.storage.execute import WriteOptions
from megatron_olmo_bridge.tools.fingerprint import fingerprint
from megatron_olmo_bridge.tools.model_card import model_card, write_model_card

HFFactory = Callable[..., Path]
CONFIG: dict[str, Any] = published_sizes()["olmo2-1b"].sizes["olmo2-1b"]


def test_the_front_matter_is_what_the_hub_reads() -> None:
    card = ModelCard(model_card(CONFIG, name="me/mine"))
    assert card.data.to_dict() == {
        "library_name": "transformers", "pipeline_tag": "text-generation"
    }  # fmt: skip
    text = model_card(CONFIG, name="me/mine", base="allenai/OLMo-2-0425-1B", license="apache-2.0")
    data = ModelCard(text).data
    assert (data.base_model, data.license) == ("allenai/OLMo-2-0425-1B", "apache-2.0")


def test_the_card_states_the_facts_of_the_model() -> None:
    text = model_card(CONFIG, name="me/mine")
    assert "\n# mine\n" in text
    for row in ("| family | OLMo-2 |", "| size | olmo2-1b |", "| parameters | 1,484,916,736 |",
                "| layers | 16 |", "| positions | 4,096 |"):  # fmt: skip
        assert row in text
    assert 'AutoModelForCausalLM.from_pretrained("me/mine")' in text
    assert text.rstrip().endswith(f"Written by megatron-olmo-bridge {__version__}.")
    for absent in ("How it was trained", "None", "license", "base_model"):
        assert absent not in text


def test_the_code_is_sound_python() -> None:
    for config in (CONFIG, as_classifier(CONFIG, 3)):
        text = model_card(config, name="me/mine")
        code = text.partition("```python\n")[2].partition("```")[0]
        compile(code, "card", "exec")


def test_the_card_of_a_classifier_has_its_labels() -> None:
    text = model_card(as_classifier(CONFIG, 3), name="complaints")
    assert ModelCard(text).data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification" in text
    assert "| labels | LABEL_0, LABEL_1, LABEL_2 |" in text
    assert "LABEL_0" not in model_card(as_classifier(CONFIG, 113), name="complaints")


def test_the_card_states_how_the_model_was_trained() -> None:
    text = model_card(CONFIG, name="mine", training={
        "steps": 20_000, "final loss": 2.31456789, "data": ["wiki", "a|b"], "z-loss": None,
        "hyper-parameters": {"learning rate": 4e-4, "distributed": True},
    })  # fmt: skip
    trained = text.partition("## How it was trained")[2].partition("## How to load it")[0]
    for row in ("| steps | 20,000 |", "| final loss | 2.31457 |", r"| data | wiki, a\|b |",
                "| z-loss | none |", "### Hyper-parameters", "| learning rate | 0.0004 |",
                "| distributed | yes |"):  # fmt: skip
        assert row in trained


def test_a_model_of_no_family_is_refused() -> None:
    with pytest.raises(UnsupportedError):
        model_card({"architectures": ["BertModel"]}, name="mine")


def made_from(folder: Path) -> str:
    (folder / "README.md").unlink(missing_ok=True)
    assert write_model_card(folder)
    text = (folder / "README.md").read_text()
    assert str(folder.parent) not in text, "local paths are nobody's business"
    return text.rstrip().splitlines()[-1]


def test_the_card_states_where_the_model_is_from(make_hf: HFFactory, tmp_path: Path) -> None:
    hf = make_hf()
    import_checkpoint(hf, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    by = f"by megatron-olmo-bridge {__version__} from"
    assert made_from(tmp_path / "back") == (
        f"Converted {by} `megatron/iter_0000000`, which was made from `hf`."
    )
    average_checkpoints([hf, tmp_path / "megatron"], tmp_path / "mean")
    assert made_from(tmp_path / "mean") == f"Averaged {by} `hf`, `megatron`."
    # Trained on with stock Megatron: no record, and no claim.
    shutil.copytree(tmp_path / "megatron/iter_0000000", tmp_path / "megatron/iter_0000005")
    (tmp_path / "megatron/iter_0000005/olmo_bridge.json").unlink()
    export_checkpoint(tmp_path / "megatron", tmp_path / "trained", ExportOptions(iteration=5))
    assert made_from(tmp_path / "trained") == f"Converted {by} `megatron/iter_0000005`."


def test_the_card_states_the_fingerprint_if_it_was_recorded(
    make_hf: HFFactory, tmp_path: Path
) -> None:
    import_checkpoint(make_hf(), tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", write=WriteOptions(checksum=True))
    assert write_model_card(tmp_path / "back", name="me/mine")
    text = (tmp_path / "back" / "README.md").read_text()
    root = fingerprint(tmp_path / "back").root
    assert f"```\nolmo-bridge verify me/mine --fingerprint {root}\n```" in text


def test_a_hub_model_is_named_by_id_and_commit(
    make_hf: HFFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = make_hf()
    monkeypatch.setattr(to_megatron, "fetch", lambda *_: (hf, "allenai/OLMo-2-0425-1B", "abc"))
    import_checkpoint("allenai/OLMo-2-0425-1B", tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    last = made_from(tmp_path / "back")
    assert last.endswith(", which was made from `allenai/OLMo-2-0425-1B` at abc.")
    card = ModelCard.load(tmp_path / "back" / "README.md")
    assert card.data.base_model == "allenai/OLMo-2-0425-1B"


def test_an_existing_card_is_kept(make_hf: HFFactory) -> None:
    hf = make_hf()
    before = (hf / "README.md").read_text()
    assert not write_model_card(hf)
    assert (hf / "README.md").read_text() == before
