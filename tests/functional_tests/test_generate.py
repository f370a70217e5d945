"""`generate` continues a prompt as transformers does, from a Megatron checkpoint alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from launching import olmo_bridge
from slow import slow_but
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from megatron_olmo_bridge import import_checkpoint, synth
from megatron_olmo_bridge.inference.generation import Generation

PROMPT = [17, 4, 256, 999, 3]
NEW = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A Megatron checkpoint whose Hugging Face source was deleted, and transformers' tokens."""
    folder = tmp_path_factory.mktemp("model")
    hf = synth("olmo2-tiny", folder / "hf", dtype="float32")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(1024)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(hf)
    reference = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    tokens = reference.generate(torch.tensor([PROMPT]), max_new_tokens=NEW, do_sample=False)
    import_checkpoint(hf, folder / "megatron")
    shutil.rmtree(hf)
    expected = tokens[0, len(PROMPT) :].tolist()
    assert len(expected) == NEW
    assert len(set(expected)) > 5  # not one repeated token
    return folder / "megatron", expected


@pytest.mark.parametrize(
    "layout", slow_but([{"tp": 2}], [{"tp": 2}, {"pp": 2}]), ids=["tp2", "pp2"]
)
def test_greedy_tokens_equal_those_of_transformers(
    model: tuple[Path, list[int]], layout: dict[str, int]
) -> None:
    checkpoint, expected = model
    run = Generation(str(checkpoint), prompt=None, tokens=PROMPT, **layout)

    assert "".join(run.stream(max_new_tokens=NEW)).split() == [str(t) for t in expected]
    assert run.tokens == expected


@pytest.mark.slow
def test_a_text_prompt_is_continued_as_text(model: tuple[Path, list[int]]) -> None:
    checkpoint, expected = model
    prompt = " ".join(f"w{token}" for token in PROMPT)
    done = olmo_bridge("generate", checkpoint, "--prompt", prompt, "--max-new-tokens", NEW)

    assert done.stdout.split() == [f"w{token}" for token in expected]


@pytest.mark.slow
def test_sampled_tokens_are_printed_as_json(model: tuple[Path, list[int]]) -> None:
    checkpoint, expected = model
    tokens = ",".join(map(str, PROMPT))
    sampling = ("--temperature", 1.5, "--top-p", 0.9, "--seed", 1)
    done = olmo_bridge(
        "generate", checkpoint, "--tokens", tokens, *sampling, "--max-new-tokens", 12, "--json"
    )
    found = json.loads(done.stdout)["result"]

    assert found["prompt"] == PROMPT
    assert len(found["tokens"]) == 12
    assert found["tokens"] != expected[:12]


@pytest.mark.slow
def test_another_tokenizer_can_be_used(model: tuple[Path, list[int]], tmp_path: Path) -> None:
    """The checkpoint has no tokenizer, but another one encodes and decodes the text."""
    checkpoint, expected = model
    bare = synth("olmo2-tiny", tmp_path / "bare", dtype="float32")
    prompt = ("--prompt", " ".join(f"w{token}" for token in PROMPT))
    refused = olmo_bridge("generate", bare, *prompt)
    assert refused.exit_code == 2
    assert "has no tokenizer" in refused.stderr
    assert "--tokenizer" in refused.stderr

    done = olmo_bridge(
        "generate",
        bare,
        *prompt,
        "--tokenizer",
        checkpoint / "iter_0000000/hf",
        "--max-new-tokens",
        8,
    )

    assert done.stdout.split() == [f"w{token}" for token in expected[:8]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1,x"], "is not a list of token ids"),
        (["--tokens", "1024"], "token 1024 is not in the model's vocabulary of 1024"),
        ([], "give either --prompt TEXT or --tokens 1,2,3"),
        (["--tokens", "1", "--max-new-tokens", "5000"], "more than the model's 4096 positions"),
        (["--tokens", "1", "--tokenizer", "nowhere"], "nowhere: no such folder"),
        (["--tokens", "1", "--top-p", "1.5"], "top-p above 0 and at most 1"),
    ],
)
def test_bad_input(model: tuple[Path, list[int]], arguments: list[str], message: str) -> None:
    done = olmo_bridge("generate", model[0], *arguments)

    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 25
