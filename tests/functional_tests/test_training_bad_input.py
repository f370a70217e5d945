"""Bad training input is refused: one short message that says what to do, exit code 2, no changes.

The tables below are the specification. HERE is the folder of the test, which must stay unchanged;
DATA is the folder with recipes and valid data; RUN, in HERE, is a copy of a run that finished after
4 steps. Unless a case says otherwise, a run would save into HERE/new.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("omegaconf")

from launching import olmo_bridge
from megatron.core.models.gpt import GPTModel
from slow import slow_but
from training_runs import Place
from trees import tree_hash
from typer.testing import Result

from megatron_olmo_bridge import import_checkpoint, synth
from megatron_olmo_bridge.runtime.cpu import cpu_runtime
from megatron_olmo_bridge.runtime.process_groups import destroy_process_groups

SCREEN = 14
"""Maximum number of lines of a message."""
TRACKER = "latest_checkpointed_iteration.txt"
LAST = "iter_0000004"
SHORT = "train.steps=4 schedule.warmup_steps=1 checkpoint.interval=2"
AGAIN = f"checkpoint.save=HERE/run {SHORT}"
"""Arguments with which the run in HERE/run was started."""


@dataclass(frozen=True)
class Case:
    """Arguments of ``olmo-bridge train``, and what the message must contain."""

    words: str
    """Overrides and options; a first word that ends in ``.py`` is the recipe."""
    says: tuple[str, ...]
    damage: Callable[[Path], object] = lambda here: None
    """Called with HERE before the command."""
    late: bool = False
    """Whether only the run finds it, while it reads tokens, weights or optimizer state, or writes.
    A dry run accepts these cases, also missing data: it can estimate a run without data."""


def each(says: str, *words: str) -> list[Case]:
    """Return cases for values that are refused with the same message."""
    return [Case(word, (*word.split(" ")[:1], says)) for word in words]


# ------------------------------------------------------------------------------ recipes, overrides


def recipe(text: str) -> Callable[[Path], object]:
    return lambda here: (here / "mine.py").write_text(text)


RECIPES = [
    Case("HERE/mine.py", ("mine.py: no such recipe", "`olmo-bridge recipes` lists")),
    Case("HERE/mine.py", ("mine.py: can't be run", "SyntaxError", "line 1"), recipe("def x(:")),
    Case("HERE/mine.py", ("mine.py: can't be run", "No module named 'nowhere'"),
         recipe("import nowhere")),
    Case("HERE/mine.py", ("mine.py: has no function 'config'", "it has none"), recipe("x = 1")),
    Case("HERE/mine.py", ("returns a int, not a TrainingConfig",),
         recipe("def config(): return 3")),
    Case("HERE/mine.py", ("the recipe fails: KeyError: 'x'",),
         recipe("def config(): return {}['x']")),
    Case("DATA/olmo2.py:confg", ("no function 'confg'", "did you mean 'config'?")),
    Case("train.stepz=3", ("no field 'train.stepz'", "did you mean 'train.steps'?")),
    Case("steps=3", ("no field 'steps'", "did you mean 'train.steps'?")),
    Case("learning_rate_scale_factor=3", ("no field", "--dry-run")),
    Case("train=3", ("no field 'train'",)),
    Case("train.steps", ("'train.steps': an override reads section.field=value",)),
    Case("train.steps=some", ("train.steps", "'some'", "Integer")),
    Case("train.steps=1.5", ("train.steps", "'1.5'", "Integer")),
    Case("train.steps=", ("train.steps", "None")),
    Case("train.steps=[1", ("train.steps=[1",)),
    Case("data.path=", ("data.path",)),
    Case("checkpoint.save=[1,2]", ("checkpoint.save", "string")),
    Case("model.hiden_size=64", ("no field 'model.hiden_size'", "'model.hidden_size'")),
    Case("provider.init_std=0.1", ("provider.init_std: the provider has no such field",)),
    Case("provider.sequence_paralel=true", ("did you mean 'sequence_parallel'?",)),
]  # fmt: skip

# ------------------------------------------------------------------------------------------ values

VALUES = [
    *each(
        "must be at least 1",
        "train.steps=0", "train.steps=-1", "train.global_batch_size=0", "train.micro_batch_size=-2",
        "train.sequence_length=0", "checkpoint.interval=0", "checkpoint.keep_last=0",
        "checkpoint.keep_last=-1", "evaluation.interval=0", "evaluation.batches=0",
        "logging.interval=0", "export.interval=0", "schedule.end_step=0", "parallel.tp=0",
        "parallel.pp=-1", "parallel.ep=0", "parallel.vpp=0",
        "provider.make_vocab_size_divisible_by=0",
    ),
    *each(
        "must be at least 0",
        "optimizer.lr=-0.1", "optimizer.lr=nan", "optimizer.lr=inf", "optimizer.weight_decay=-0.1",
        "optimizer.clip_grad=-1.0", "optimizer.z_loss=-1.0", "schedule.warmup_steps=-1",
        "data.workers=-1", "provider.init_method_std=-1", "provider.init_method_std=some",
    ),
    *each(
        "must be more than 0",
        "optimizer.eps=0.0", "stability.sigma=0.0", "provider.init_truncation=0",
    ),
    *each(
        "must be at least 0 and less than 1",
        "optimizer.beta1=1.0", "optimizer.beta2=-0.1", "provider.hidden_dropout=1",
    ),
    *each("must be at least 2", "stability.window=1"),
    *each("must be from 0 to 1", "schedule.min_lr_ratio=1.1"),
    *each("must be from 0 to 4294967295", "train.seed=-1", "train.seed=4294967296"),
    Case("train.precision=float16", ("'float16' is none of float32, bfloat16",)),
    Case("schedule.decay=exp", ("schedule.decay='exp' is none of cosine, linear, wsd, constant",)),
    Case("optimizer.decayed=some", ("'some' is none of all_but_embeddings, matrices, all",)),
    Case("stability.on_spike=halt", ("'halt' is none of stop, skip, ignore",)),
    Case("parallel.recompute=half", ("'half' is none of none, selective, full",)),
    Case("train.steps=12 schedule.warmup_steps=12", ("=12 must be less than the 12 steps",)),
    Case("schedule.decay=wsd train.steps=12 schedule.warmup_steps=4",
         ("wsd_decay_steps=0", "at most the 8 steps after the warmup")),
    Case("schedule.decay=wsd schedule.wsd_decay_steps=12 train.steps=12", ("at most the",)),
    Case("train.sequence_length=5000", ("5000 is more than the model's 4096 positions",)),
    Case("model.hidden_size=100", ("hidden_size 100 cannot be divided by 8 attention heads",)),
    Case("model.vocab_size=0", ("vocab_size must be a positive whole number, not 0",)),
    Case("model.architectures=[Foo]", ("architecture Foo is not known", "Olmo2ForCausalLM")),
    Case("model={}", ("no model", "init.hf=FOLDER")),
    Case("provider.hidden_size=64", ("provider.hidden_size: is set by the model's config",)),
    Case("provider.tensor_model_parallel_size=2", ("is set by parallel.tp",)),
    Case("provider.num_moe_experts=two", ("is set by the model's config",)),
    Case("provider.backend=nope", ("'nope' is none of auto, transformer_engine, local",)),
    Case("provider.context_parallel_size=2", ("context_parallel_size=2 is not supported",)),
]  # fmt: skip

LAYOUTS = [
    Case("parallel.tp=3 --processes 3", ("num_attention_heads (8)", "(3)")),
    Case("parallel.tp=8 --processes 8", ("4 key/value heads cannot be divided evenly over 8",)),
    Case("parallel.pp=9 --processes 9", ("4 layers cannot be divided evenly over 9",)),
    Case("parallel.pp=2 parallel.vpp=4 --processes 2",
         ("4 layers cannot be divided evenly", "4 chunks")),
    Case("parallel.pp=2 parallel.vpp=2 train.global_batch_size=6 --processes 2",
         ("3 micro-batches", "a multiple of parallel.pp=2")),
    Case("parallel.vpp=2", ("parallel.vpp=2", "set parallel.pp")),
    Case("parallel.sp=true", ("parallel.sp=true", "parallel.tp, which is 1")),
    Case("parallel.tp=2 parallel.sp=true train.sequence_length=31 --processes 2",
         ("sequence_length=31", "a multiple of parallel.tp=2")),
    Case("parallel.ep=2 --processes 2", ("num_moe_experts",)),
    Case("parallel.pp=2 provider.num_layers_in_first_pipeline_stage=two --processes 2",
         ("megatron-core refuses the fields of provider",)),
    Case("parallel.tp=2 --processes 3", ("parallel.tp=2 takes 2 processes or a multiple", "not 3")),
    Case("train.micro_batch_size=3 train.global_batch_size=4",
         ("train.global_batch_size=4", "a multiple of 3 can")),
    Case("train.global_batch_size=4 --processes 3",
         ("train.global_batch_size=4", "over 3 data-parallel ranks")),
]  # fmt: skip

# -------------------------------------------------------------------------------------------- data


def dataset(length: int, token: int, dtype: Any = np.uint16) -> Callable[[Path], None]:
    """Write the dataset HERE/mine with one document in which every token is the same."""

    def write(here: Path) -> None:
        from megatron_olmo_bridge.data.indexed import write_index

        np.full(length, token, dtype).tofile(here / "mine.bin")
        write_index(here / "mine.idx", np.array([length] * bool(length), "i4"), np.dtype(dtype))

    return write


def recorded(**record: Any) -> Callable[[Path], None]:
    """Write the dataset HERE/mine with a record of ``prepare-data``."""
    import json

    def write(here: Path) -> None:
        dataset(400, 7)(here)
        facts = {"documents": 1, "tokens": 400, "dtype": "uint16"} | record
        (here / "mine.json").write_text(json.dumps(facts))

    return write


def cut(name: str) -> Callable[[Path], None]:
    def damage(here: Path) -> None:
        dataset(400, 7)(here)
        os.truncate(here / name, 40)

    return damage


MINE = "data.path=HERE/mine"
UNSAVED = "checkpoint.save=null"
DATA = [
    Case("data.path=[]", ("no data", "data.path=PREFIX", "prepare-data"), late=True),
    Case(MINE, ("HERE/mine.idx: no such file",)),
    Case("data.validation=HERE/mine", ("HERE/mine.idx: no such file",)),
    Case("data.path=DATA/olmo2.py", ("olmo2.py.idx: no such file",)),
    Case(MINE, ("HERE/mine.bin: cut short: 40 bytes", "800"), cut("mine.bin")),
    Case(MINE, ("HERE/mine.idx: cut short: 40 bytes",), cut("mine.idx")),
    Case("data.validation=HERE/mine", ("HERE/mine.bin: cut short",), cut("mine.bin")),
    Case(MINE, ("HERE/mine", "0 tokens", "too few"), dataset(0, 7)),
    Case(f"{MINE} train.sequence_length=32",
         ("HERE/mine: has 32 tokens", "train.sequence_length=32"), dataset(32, 7)),
    Case("data.path=[DATA/train,HERE/mine]", ("HERE/mine: has 9 tokens",), dataset(9, 7)),
    Case("data.validation=HERE/mine", ("HERE/mine: has 9 tokens",), dataset(9, 7)),
    Case(MINE, ("prepared with a tokenizer of 1100 tokens", "has 1024", "model.vocab_size"),
         recorded(vocab_size=1100)),
    Case(MINE, ("has token 1050, the model has 1024",), recorded(max_token_id=1050)),
    Case(MINE, ("HERE/mine.json", "next to it in tokens"), recorded(tokens=399)),
    # Without a record the largest token is unknown until it is read.
    Case(f"{MINE} {UNSAVED}", ("token 1024, the model has 1024", "another tokenizer"),
         dataset(400, 1024), late=True),
    Case(f"{MINE} {UNSAVED}", ("token -3, the model has 1024",), dataset(400, -3, np.int32),
         late=True),
    Case("data.weights=[1,2]", ("data.weights has 2 values for 1 paths",)),
    *(Case(f"data.path=[DATA/train,DATA/valid] data.weights=[{weights}]",
           ("data.weights", "must be more than 0"))
      for weights in ("0,0", "1,-1", "1,0", ".nan,1", ".inf,1")),
    Case("data.cache=DATA/olmo2.py", ("DATA/olmo2.py", "index of samples", "data.cache=DIR"),
         late=True),
    Case("data.tokenizer=nowhere", ("nowhere: no such folder",)),
    Case("data.tokenizer=DATA/olmo2.py", ("olmo2.py: is a file", "folder")),
]  # fmt: skip

# -------------------------------------------------------------------------- where weights come from

INIT = [
    Case("init.hf=HERE/none", ("HERE/none: no such folder",)),
    Case("init.hf=DATA/olmo2.py", ("olmo2.py: is a file, not a checkpoint",)),
    Case("init.checkpoint=HERE/none", ("HERE/none: no such file or folder",)),
    Case("init.hf=DATA/hf init.checkpoint=HERE/run", ("either init.hf or init.checkpoint",)),
    Case("init.revision=main", ("init.revision=main", "init.hf")),
    Case("init.optimizer=true", ("init.checkpoint: name it",)),
    Case("init.optimizer=true init.checkpoint=DATA/hf",
         ("DATA/hf: no optimizer state is read from Hugging Face checkpoints",)),
    Case("init.optimizer=true init.checkpoint=DATA/imported",
         ("imported/iter_0000000: has no optimizer state", "leave out init.optimizer"),
         late=True),
    Case("init.hf=DATA/hf model.hidden_size=64",
         ("model.hidden_size", "the model comes from init.hf")),
    Case("init.hf=DATA/classifier", ("a classifier of 5 labels", "the recipe complaints")),
    Case("init.hf=HERE/copy", ("model.safetensors: truncated",),
         lambda here: os.truncate(copy("hf", here) / "model.safetensors", 999)),
    Case("init.hf=HERE/copy", ("lm_head.weight", "missing"),
         lambda here: without_tensor(copy("hf", here) / "model.safetensors", "lm_head.weight")),
]  # fmt: skip


def copy(name: str, here: Path) -> Path:
    return shutil.copytree(DATA_FOLDER[0] / name, here / "copy")


def without_tensor(file: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file)


# ----------------------------------------------------------------------------- where it is saved to


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda here: (here / name).write_text(text)


def removed(name: str) -> Callable[[Path], object]:
    return lambda here: (here / name).unlink()


def without_common_state(here: Path) -> None:
    file = here / "run" / LAST / "common.pt"
    if not file.is_file():
        pytest.skip("this megatron-core keeps the common state among the other objects")
    file.unlink()


def unrecorded(damage: Callable[[Path], object]) -> Callable[[Path], object]:
    """Do the same damage to a checkpoint without checksums."""

    def both(here: Path) -> None:
        damage(here)
        (here / "run" / LAST / "olmo_bridge.json").unlink()

    return both


FOLDERS = [
    Case("checkpoint.save=DATA/olmo2.py", ("checkpoint.save=", "olmo2.py is a file")),
    Case("checkpoint.save=DATA/olmo2.py/x", ("checkpoint.save=", "olmo2.py is a file")),
    Case("checkpoint.save=/proc/none", ("checkpoint.save=/proc/none: can't be written",),
         late=True),
    Case("export.hf=DATA/olmo2.py", ("export.hf=", "olmo2.py is a file")),
    Case("checkpoint.save=DATA/hf", ("is a Hugging Face checkpoint", "another folder")),
    Case("checkpoint.save=DATA/imported", ("no run of this command saved", "init.checkpoint")),
    Case("checkpoint.save=HERE/run init.checkpoint=HERE/run", ("would mix",)),
    Case(f"checkpoint.save=HERE/run init.checkpoint=HERE/run/{LAST}", ("would mix",)),
    Case(f"export.hf=HERE/run init.checkpoint=HERE/run/{LAST}", ("would mix", "export.hf")),
    Case(f"{AGAIN} optimizer.lr=1e-4",
         ("folder of another run", "optimizer.lr: was 0.00", "is 0.0001", "init.checkpoint=HERE")),
    Case(f"{AGAIN} train.steps=8", ("extends a run of 4 steps", "schedule.end_step=8")),
    Case(f"DATA/gpt2.py {AGAIN}",
         ("another run", "['Olmo2ForCausalLM'], is ['GPT2LMHeadModel']", "more")),
    Case(f"{AGAIN} init.hf=DATA/hf", ("another run", "init.hf: was None")),
    Case(AGAIN, ("run.yaml: damaged", "another folder"), written("run/run.yaml", "a: [")),
    Case(AGAIN, ("run.yaml: damaged", "another folder"), written("run/run.yaml", "- a")),
    Case(AGAIN, ("run.yaml: damaged", "another folder"), written("run/run.yaml", "")),
    Case(AGAIN, ("no run of this command saved",), removed("run/run.yaml")),
    Case(AGAIN, (TRACKER, "'banana' is not an iteration", "Write the number of one of them"),
         written(f"run/{TRACKER}", "banana")),
    Case(AGAIN, (TRACKER, "names iter_0000007", "Write the"), written(f"run/{TRACKER}", "7")),
    Case(AGAIN, (TRACKER, "is empty", "Write the number"), written(f"run/{TRACKER}", "")),
    Case(AGAIN, ("log.jsonl: no line", "Move the file away"), written("run/log.jsonl", '{"x\n{}\n'),
         late=True),
    *(Case(AGAIN, (LAST, what, "the checkpoint before it", "echo 2 >", TRACKER), damage, late=True)
      for what, damage in (
          ("__0_0.distcp has 0 bytes", written(f"run/{LAST}/__0_0.distcp", "")),
          ("__0_0.distcp is not there", removed(f"run/{LAST}/__0_0.distcp")),
          (".metadata has 5 bytes", written(f"run/{LAST}/.metadata", "hello")),
          (".metadata is not there", removed(f"run/{LAST}/.metadata")),
          ("common.pt is not there", without_common_state),
          ("metadata.json is not there", removed(f"run/{LAST}/metadata.json")),
          ("olmo_bridge.json", written(f"run/{LAST}/olmo_bridge.json", "{}")),
          ("truncated", unrecorded(written(f"run/{LAST}/__0_0.distcp", ""))),
          ("__0_0.distcp", unrecorded(removed(f"run/{LAST}/__0_0.distcp"))),
          ("not a readable pickle", unrecorded(written(f"run/{LAST}/.metadata", "hello"))),
          (".metadata", unrecorded(removed(f"run/{LAST}/.metadata"))),
          ("no optimizer state", unrecorded(without_common_state)),
          ("can't be loaded", unrecorded(removed(f"run/{LAST}/metadata.json"))),
      )),
    Case(f"logging.tensorboard=true {UNSAVED}", ("logging.tensorboard", "set checkpoint.save"),
         late=True),
    Case(f"logging.wandb_project=x {UNSAVED}", ("logging.wandb_project", "pip install wandb"),
         late=True),
]  # fmt: skip


# ----------------------------------------------------------------------------------------- the test

DATA_FOLDER: list[Path] = []


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Folder with data, recipes, a run of 4 steps, a language model and a classifier."""
    place = Place.made(tmp_path_factory.mktemp("bad-input"))
    DATA_FOLDER.append(place.folder)
    place.run("run", *SHORT.split()).done()
    synth("olmo2-tiny", place.folder / "hf", seed=1)
    import_checkpoint(place.folder / "hf", place.folder / "imported")
    classifier(place.folder)
    yield place
    DATA_FOLDER.clear()


def classifier(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(folder / "hf", num_labels=5, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "classifier")


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with cpu_runtime():
        yield
        destroy_process_groups()


def named(cases: list[Case], *marks: pytest.MarkDecorator) -> list[Any]:
    names = [f"{case.words} {case.says[-1]}" for case in cases]
    return [pytest.param(case, id=n, marks=marks) for case, n in zip(cases, names, strict=True)]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("case", [*named([*RECIPES, *VALUES], pytest.mark.slow), *named(LAYOUTS)])
def test_is_refused_before_anything_is_planned(case: Case, place: Place, tmp_path: Path) -> None:
    refused(case, place, tmp_path, "--dry-run")


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("case", named([*RECIPES, *VALUES, *DATA, *INIT, *FOLDERS]))
def test_is_refused(case: Case, place: Place, tmp_path: Path) -> None:
    refused(case, place, tmp_path)


@pytest.mark.usefixtures("one_process")
@pytest.mark.slow
@pytest.mark.parametrize("case", named([c for c in [*DATA, *INIT, *FOLDERS] if not c.late]))
def test_a_dry_run_refuses_it_too(case: Case, place: Place, tmp_path: Path) -> None:
    refused(case, place, tmp_path, "--dry-run")


def refused(case: Case, place: Place, here: Path, *options: str) -> None:
    if "HERE/run" in case.words:
        again(place, here)
    case.damage(here)
    before, data = tree_hash(here), tree_hash(place.folder / "imported")

    said = message(train(case.words, place, here, *options))

    for piece in case.says:
        assert in_place(piece, place, here) in said
    assert tree_hash(here) == before
    assert tree_hash(place.folder / "imported") == data
    assert not (place.folder / "hf" / "run.yaml").exists()


def again(place: Place, here: Path) -> None:
    """Copy the run to HERE/run and adapt the paths in its config."""
    copy = shutil.copytree(place.folder / "run", here / "run")
    text = (copy / "run.yaml").read_text()
    (copy / "run.yaml").write_text(text.replace(str(place.folder / "run"), str(copy)))


def train(words: str, place: Place, here: Path, *options: str) -> Result:
    arguments = in_place(words, place, here).split()
    if not arguments or ".py" not in arguments[0].partition("=")[0]:
        arguments.insert(0, str(place.folder / "olmo2.py"))
    if "checkpoint.save" not in words:
        arguments.append(f"checkpoint.save={here / 'new'}")
    return olmo_bridge("train", *arguments, *options)


def in_place(words: str, place: Place, here: Path) -> str:
    return words.replace("HERE", str(here)).replace("DATA/", f"{place.folder}/")


def message(result: Result) -> str:
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.output.count("olmo-bridge: ") == 1
    said = result.stderr.partition("olmo-bridge: ")[2]
    assert len(said.splitlines()) <= SCREEN
    return said


SAID_ONCE = [
    ("train.steps=0", "train.steps=0 must be at least 1"),
    (f"{AGAIN} optimizer.lr=1", "folder of another run"),
]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("words", "says"), slow_but(SAID_ONCE[:1], SAID_ONCE))
def test_several_processes_print_an_error_once(
    words: str, says: str, place: Place, tmp_path: Path
) -> None:
    refused(Case(words, (says,)), place, tmp_path, "--processes", "2")


@pytest.mark.usefixtures("one_process")
def test_too_few_processes(place: Place, tmp_path: Path) -> None:
    refused(
        Case("parallel.tp=2", ("takes 2 processes", "--processes 2", "torchrun --nproc_per_node")),
        place,
        tmp_path,
    )


@pytest.mark.usefixtures("one_process")
def test_a_run_that_was_refused_can_be_started_again(place: Place, tmp_path: Path) -> None:
    """A refused run leaves nothing in its folder that belongs to a run."""
    short = "train.steps=1 schedule.warmup_steps=0 checkpoint.save=HERE/new"
    message(train(f"{short} data.path=HERE/none", place, tmp_path))
    message(train(f"{short} optimizer.lr=-1", place, tmp_path))
    destroy_process_groups()

    place.run(str(tmp_path / "new"), *short.split()[:-1]).done()


@pytest.mark.usefixtures("one_process")
def test_a_refused_run_leaves_nothing_in_memory(place: Place, tmp_path: Path) -> None:
    message(train("logging.wandb_project=x checkpoint.save=null", place, tmp_path))
    destroy_process_groups()
    assert not [value for value in gc.get_objects() if isinstance(value, GPTModel)]


@pytest.mark.usefixtures("one_process")
def test_overwriting_a_wrong_folder_is_refused(place: Place, tmp_path: Path) -> None:
    """A folder without a tracker, as after a kill during the first save, keeps its checkpoint, and
    the run resumes from it."""
    again(place, tmp_path)
    (tmp_path / "run" / TRACKER).unlink()
    before = tree_hash(tmp_path / "run" / LAST)

    result = train(AGAIN, place, tmp_path)

    assert result.exit_code == 0, result.output
    assert "resumed at step 4" in result.output
    assert tree_hash(tmp_path / "run" / LAST) == before
