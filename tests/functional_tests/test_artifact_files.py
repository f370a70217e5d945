"""Import and export keep every config and tokenizer file that save_pretrained writes."""

from __future__ import annotations

import ast
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models
from transformers import (
    AutoTokenizer,
    CTRLTokenizer,
    GenerationConfig,
    GPT2Tokenizer,
    PreTrainedTokenizerFast,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)
from transformers.tokenization_utils_base import (
    ADDED_TOKENS_FILE,
    FULL_TOKENIZER_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    TOKENIZER_CONFIG_FILE,
)
from transformers.utils import (
    AUDIO_TOKENIZER_NAME,
    CHAT_TEMPLATE_DIR,
    CHAT_TEMPLATE_FILE,
    CONFIG_NAME,
    FEATURE_EXTRACTOR_NAME,
    GENERATION_CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
    MODEL_CARD_NAME,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
)

from megatron_olmo_bridge import export_checkpoint, import_checkpoint, synth

WEIGHTS = "model.safetensors"


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return synth("olmo2-tiny", tmp_path / "hf", layers=1)


def files(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files except weights and conversion record, by name."""
    return {
        name: file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and (name := file.relative_to(folder).as_posix()) not in (WEIGHTS, "olmo_bridge.json")
    }


def there_and_back(hf: Path) -> Path:
    import_checkpoint(hf, hf.parent / "m")
    export_checkpoint(hf.parent / "m", hf.parent / "back")
    return hf.parent / "back"


def vocabulary_files() -> set[str]:
    """Return the file names in ``VOCAB_FILES_NAMES`` of every tokenizer of transformers."""
    found: set[str] = set()
    for source in Path(transformers.__file__).parent.rglob("tokenization_*.py"):
        for node in ast.parse(source.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VOCAB_FILES_NAMES":
                found |= {
                    c.value
                    for c in ast.walk(node.value)
                    if isinstance(c, ast.Constant) and "." in str(c.value)
                }
    return found


def test_every_artifact_name_of_transformers_is_kept(hf: Path) -> None:
    vocabularies = vocabulary_files()
    assert {"vocab.json", "merges.txt", "spiece.model", "source.spm"} <= vocabularies
    names = vocabularies | {
        ADDED_TOKENS_FILE,
        AUDIO_TOKENIZER_NAME,
        CHAT_TEMPLATE_FILE,
        FEATURE_EXTRACTOR_NAME,
        FULL_TOKENIZER_FILE,
        GENERATION_CONFIG_NAME,
        IMAGE_PROCESSOR_NAME,
        LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
        MODEL_CARD_NAME,
        PROCESSOR_NAME,
        SPECIAL_TOKENS_MAP_FILE,
        TOKENIZER_CONFIG_FILE,
        VIDEO_PROCESSOR_NAME,
        f"{CHAT_TEMPLATE_DIR}/tool_use.jinja",
    }
    for name in names:
        (hf / name).parent.mkdir(exist_ok=True)
        (hf / name).write_text(f"of {name}")
    assert files(there_and_back(hf)) == files(hf)
    assert files(hf).keys() == names | {CONFIG_NAME}


def fast() -> Any:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.chat_template = {"default": "D", "tool_use": "T"}
    tokenizer.add_tokens(["<new>"])
    return tokenizer


def byte_pairs(tokenizer: Any) -> Any:
    def made(folder: Path) -> Any:
        (folder / "v.json").write_text('{"a": 0, "b": 1, "ab": 2, "<unk>": 3}')
        (folder / "m.txt").write_text("#version: 0.2\na b\n")
        return tokenizer(str(folder / "v.json"), str(folder / "m.txt"))

    return made


def processor(folder: Path) -> Any:
    (folder / "v.json").write_text('{"a": 0, "<pad>": 1, "<unk>": 2, "|": 3, "<s>": 4, "</s>": 5}')
    return Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), Wav2Vec2CTCTokenizer(folder / "v.json"))


@pytest.mark.parametrize(
    "make",
    [
        lambda _: fast(),
        byte_pairs(GPT2Tokenizer),
        byte_pairs(CTRLTokenizer),
        processor,
        lambda _: GenerationConfig(temperature=0.5, do_sample=True),
    ],
    ids=["fast", "byte-level BPE", "slow BPE", "processor", "generation config"],
)
def test_every_file_of_save_pretrained_is_kept(hf: Path, tmp_path: Path, make: Any) -> None:
    before = files(hf)
    (tmp_path / "parts").mkdir()
    make(tmp_path / "parts").save_pretrained(hf)
    assert files(hf) != before
    assert files(there_and_back(hf)) == files(hf)


def test_several_chat_templates_are_read_again(hf: Path) -> None:
    fast().save_pretrained(hf)
    assert AutoTokenizer.from_pretrained(there_and_back(hf)).chat_template == {
        "default": "D",
        "tool_use": "T",
    }


CODE = """
from transformers import Olmo2Config, Olmo2ForCausalLM
from .helper_of_own import NOTHING

class OwnConfig(Olmo2Config):
    model_type = "olmo2"

class OwnOlmo2ForCausalLM(Olmo2ForCausalLM):
    config_class = OwnConfig
"""


def test_a_models_own_code_is_kept(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "modeling_own.py").write_text(CODE)
    (package / "helper_of_own.py").write_text("NOTHING = None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_package", raising=False)
    own = __import__("own_package.modeling_own", fromlist=["modeling_own"])
    own.OwnConfig.register_for_auto_class()
    own.OwnOlmo2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    shutil.rmtree(hf)
    own.OwnOlmo2ForCausalLM(
        own.OwnConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            pad_token_id=None,
            eos_token_id=None,
        )
    ).save_pretrained(hf)
    assert {"modeling_own.py", "helper_of_own.py"} <= files(hf).keys()
    assert files(there_and_back(hf)) == files(hf)


def test_a_live_model_is_saved_with_its_artifacts(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    from megatron_olmo_bridge.live.save import write_texts

    write_texts(tmp_path, {f"hf/{CHAT_TEMPLATE_DIR}/tool_use.jinja": b"T"})
    assert files(tmp_path) == {f"hf/{CHAT_TEMPLATE_DIR}/tool_use.jinja": b"T"}
