"""The examples run as their docstrings say, in one process and in several."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from slow import slow_but

from megatron_olmo_bridge import synth, verify

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth("olmo2-tiny", tmp_path_factory.mktemp("hf") / "tiny", dtype="float32")


def run(processes: int, name: str | Path, *arguments: object, cwd: Path | None = None) -> str:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes)]
    command += [str(EXAMPLES / name), *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("processes", slow_but([1], [1, 2]))
def test_convert(hf: Path, tmp_path: Path, processes: int) -> None:
    assert run(processes, "convert.py", hf, tmp_path / "out") == "47 tensors: equal\n"
    assert verify(hf, tmp_path / "out/hf").equal


@pytest.mark.slow
def test_load_and_save(hf: Path, tmp_path: Path) -> None:
    said = run(2, "load_and_save.py", hf, tmp_path / "out", "--tp", 2)

    assert "largest tensor: model.embed_tokens.weight, 131,072 elements" in said
    assert verify(hf, tmp_path / "out/hf").equal
    assert verify(hf, tmp_path / "out/megatron").equal


@pytest.mark.slow
def test_inference(hf: Path) -> None:
    said = run(1, "inference.py", hf, "1,2,3")

    assert "rank 0: logits [1, 3, 1024]" in said
    continued = next(line for line in said.splitlines() if "continued" in line)
    assert len(continued.split()) == 17


@pytest.mark.slow
def test_hf_as_megatron(hf: Path) -> None:
    said = run(2, "hf_as_megatron.py", hf, "--tp", 2)

    assert "rank 0: " in said and "rank 1: " in said


def test_the_python_of_the_readme_runs(hf: Path, tmp_path: Path) -> None:
    """Only the checkpoint's name is replaced; a block that sets TP 2 runs in two processes."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        script = tmp_path / f"{number}.py"
        body = textwrap.indent(block.replace("allenai/OLMo-2-0425-1B", str(hf)), "    ")
        script.write_text(f"def main():\n{body}\n    print('ran')\n\nmain()\n")
        processes = 2 if "tensor_model_parallel_size = 2" in block else 1
        assert run(processes, script, cwd=tmp_path).count("ran") == processes
