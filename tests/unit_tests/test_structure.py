"""The shape of the source: what is imported when, what depends on what, what is said where."""

import ast
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import megatron_olmo_bridge

PACKAGE = Path(megatron_olmo_bridge.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"torch", "transformers", "megatron", "numpy", "safetensors", "huggingface_hub"}


def relative(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


# ---------------------------------------------------------------------------- what is imported when


def loaded_by(code: str, *args: object) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running some code."""
    code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import megatron_olmo_bridge"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "megatron_olmo_bridge" in names
    assert not names & HEAVY


@pytest.mark.parametrize("args", [["--help"], ["import", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys\nfrom megatron_olmo_bridge.cli import main\n"
        "try: main()\nexcept SystemExit as e: assert e.code == 0"
    )
    assert not loaded_by(code, *args) & HEAVY


CONVERT = """
import sys
from pathlib import Path
from megatron_olmo_bridge import ExportOptions, ImportOptions
from megatron_olmo_bridge import import_checkpoint, export_checkpoint, verify, inspect
hf, out, dtype = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
import_checkpoint(hf, out / "m", ImportOptions(dtype=dtype))
export_checkpoint(out / "m", out / "back", ExportOptions(dtype=dtype))
verify(hf, out / "m") if dtype == "keep" else inspect(out / "m")
"""


def test_conversion_as_is_loads_not_even_torch(tiny_hf: Path, tmp_path: Path) -> None:
    assert not loaded_by(CONVERT, tiny_hf, tmp_path, "keep") & {"torch", "transformers", "megatron"}


def test_a_change_of_dtype_loads_torch_alone(tiny_hf: Path, tmp_path: Path) -> None:
    loaded = loaded_by(CONVERT, tiny_hf, tmp_path, "float32")
    assert "torch" in loaded
    assert not loaded & {"transformers", "megatron"}


# ------------------------------------------------------------------------- what depends on what

LAYERS = (
    "mapping", "formats", "storage", "runtime", "nn", "models", "checkpoints", "convert", "tools",
    "data", "live", "inference", "training", "tasks", "recipes", "cli",
)  # fmt: skip
"""The folders from the bottom up: each may import those before it."""
LEANS_ON_LESS = {
    "runtime": set(),
    "nn": {"runtime"},
    "models": {"mapping", "formats", "runtime", "nn"},
    "data": {"formats", "storage"},
}
BELOW = {
    folder: LEANS_ON_LESS.get(folder, set(LAYERS[:place])) for place, folder in enumerate(LAYERS)
}
"""Folders that each folder may import. All may import errors and the version."""


def imports(file: Path) -> Iterator[str]:
    """Modules of this package that a file imports, wherever in it."""
    package = ["megatron_olmo_bridge", *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", BELOW)
def test_dependencies_point_downwards(folder: str) -> None:
    files = sorted((PACKAGE / folder).rglob("*.py"))
    assert files
    for file in files:
        for name in imports(file):
            if name.startswith("megatron_olmo_bridge."):
                other = name.split(".")[1]
                allowed = BELOW[folder] | {folder, "errors", "_version"}
                assert other in allowed, f"{relative(file)} imports {name}"


def test_contributing_lists_the_folders_from_the_bottom_up() -> None:
    text = (TESTS.parent / "CONTRIBUTING.md").read_text()
    assert tuple(re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE)) == LAYERS


def imported_modules(file: Path) -> set[str]:
    """Return the modules of this package that a file imports, by their path in it."""
    found = set()
    for name in imports(file):
        place = PACKAGE.joinpath(*name.split(".")[1:])
        while name.startswith("megatron_olmo_bridge.") and place != PACKAGE:
            if place.with_suffix(".py") in MODULES:
                found.add(relative(place.with_suffix(".py")))
                break
            place = place.parent
    return found - {relative(file)}


def test_no_files_import_each_other_in_a_circle() -> None:
    """Also not for type checkers alone, or inside functions: whoever reads one would read all."""
    TopologicalSorter({relative(file): imported_modules(file) for file in MODULES}).prepare()


def test_every_folder_has_its_rule() -> None:
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert folders == BELOW.keys()


@pytest.mark.parametrize("folder", ["mapping", "formats"])
def test_mapping_and_formats_need_no_torch(folder: str) -> None:
    for file in (PACKAGE / folder).rglob("*.py"):
        assert not {name.partition(".")[0] for name in imports(file)} & HEAVY, relative(file)


# ------------------------------------------------------------------------------ what is said where

SIZES = {1024, 2048, 4096, 5120, 8192, 11008, 13824, 27648, 100352, 100278, 100277, 100257}


def tokens(file: Path) -> Iterator[tokenize.TokenInfo]:
    with file.open("rb") as handle:
        yield from tokenize.tokenize(handle.readline)


@pytest.mark.parametrize("folder", ["convert", "formats", "mapping", "cli"])
def test_no_size_of_a_model_is_written_down(folder: str) -> None:
    for file in (PACKAGE / folder).rglob("*.py"):
        for token in tokens(file):
            if token.type == tokenize.NUMBER:
                value = ast.literal_eval(token.string)
                assert value not in SIZES, f"{relative(file)}:{token.start[0]}: {token.string}"


def test_a_mapping_knows_nothing_of_sharding() -> None:
    words = re.compile(
        r"(?<![a-z])(rank|ranks|world_?size|tp|pp|vpp|ep|tensor_(model_)?parallel\w*|"
        r"pipeline_(model_)?parallel\w*|shard|shards)(?![a-z])",
        re.IGNORECASE,
    )
    for file in (PACKAGE / "mapping").rglob("*.py"):
        found = words.search(file.read_text())
        assert not found, f"{relative(file)}: {found}"


LAYOUT = re.compile(r"(^|_)(rank|ranks|world|tp|pp|vpp|vp|ep|sp|parallel)(_|$)", re.IGNORECASE)


def layout_arithmetic(tree: ast.AST) -> Iterator[ast.BinOp | ast.AugAssign]:
    """Yield calculations that a rank, a parallel size or a call that returns one takes part in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp | ast.AugAssign):
            names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
            names += [n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)]
            if any(LAYOUT.search(name) for name in names):
                yield node


@pytest.mark.parametrize(
    "code",
    [
        "dist.get_rank() * rows",
        "rows // get_world_size()",
        "rows * parallel_state.get_tensor_model_parallel_rank()",
        "first = get_pipeline_model_parallel_rank(group) + 1",
        "config.tensor_model_parallel_size * rows",
        "start += tp_rank",
    ],
)
def test_arithmetic_over_a_parallel_layout_is_found(code: str) -> None:
    assert list(layout_arithmetic(ast.parse(code)))


@pytest.mark.parametrize("code", ["dist.get_rank() == 0", "ranked + step", "grouped_rows * 2"])
def test_other_arithmetic_is_not_found(code: str) -> None:
    assert not list(layout_arithmetic(ast.parse(code)))


@pytest.mark.parametrize("folder", ["live", "mapping"])
def test_no_arithmetic_over_a_parallel_layout(folder: str) -> None:
    """Which part of a tensor a process holds is megatron-core's own knowledge, not ours."""
    for file in (PACKAGE / folder).rglob("*.py"):
        tree = ast.parse(file.read_text())
        assert "parallel_state" not in ast.unparse(tree), relative(file)
        for node in layout_arithmetic(tree):
            pytest.fail(f"{relative(file)}:{node.lineno}: {ast.unparse(node)}")


# ------------------------------------------------------------------------------- what tests which

TESTS = Path(__file__).parents[1]
TESTED_BY = {
    "unit_tests/tasks/classification/test_data.py": ["nn/problem_types"],
    "functional_tests/test_classification.py": ["tasks/classification/train"],
    "unit_tests/cli/test_command.py": ["cli/logs"],
    "unit_tests/training/monitor/test_report.py": [
        "training/monitor/drawing",
        "training/monitor/history",
        "training/monitor/page",
        "training/monitor/plots",
        "training/monitor/style",
    ],
    "functional_tests/test_olmo_core.py": [
        "checkpoints/megatron_optimizer",
        "checkpoints/olmo_core",
        "checkpoints/olmo_core_state",
        "convert/to_olmo_core",
        "formats/dcp_folder",
        "training/olmo_core_run",
    ],
    "functional_tests/test_olmo_trainer.py": [
        "checkpoints/olmo_trainer",
        "models/olmo_trainer_config",
    ],
    "unit_tests/models/test_olmo_core_config.py": [
        "models/olmo_core_export",
        "models/olmo_core_names",
    ],
    "functional_tests/test_training_bad_input.py": [
        "cli/training",
        "tasks/train",
    ],
    "functional_tests/test_compare_everywhere.py": [
        "cli/inference",
        "inference/compare",
        "inference/jobs",
        "inference/roundtrip",
        "inference/worker",
    ],
    "functional_tests/test_remote.py": [
        "formats/remote_path",
        "storage/http_files",
        "storage/hub_files",
        "storage/object_files",
        "storage/remote",
    ],
    "functional_tests/test_hub.py": ["storage/hub_errors"],
    "unit_tests/tools/test_verify.py": ["checkpoints/differences"],
    "unit_tests/checkpoints/test_new_kind.py": ["checkpoints/checkpoint"],
    "unit_tests/checkpoints/test_megatron.py": ["checkpoints/hf", "checkpoints/megatron_config"],
    "unit_tests/convert/test_to_hf.py": ["convert/options"],
    "unit_tests/convert/test_to_megatron.py": ["storage/progress"],
    "unit_tests/data/test_prepare.py": [
        "data/info",
        "data/partial",
        "data/parts",
        "data/options",
        "data/tokenizer",
    ],
    "unit_tests/data/test_indexed.py": ["data/prefix"],
    "unit_tests/formats/test_pickles.py": ["formats/inert", "formats/pickle_globals"],
    "unit_tests/formats/test_pickle_machine.py": ["formats/pickle_opcodes"],
    "functional_tests/test_generate.py": ["inference/generation", "inference/forward"],
    "functional_tests/test_live_weights.py": ["live/strategy"],
    "functional_tests/te_on_cpu/test_te_doctor.py": ["models/attention_kernels"],
    "unit_tests/models/test_families.py": [
        "models/catalogue",
        "models/flex_olmo/bridge",
        "models/olmo3/bridge",
        "models/tables",
    ],
    "unit_tests/models/test_hf_defaults.py": ["models/config", "models/hf_values"],
    "unit_tests/models/gpt2/test_bridge.py": ["models/gpt2/config"],
    "functional_tests/test_families_live.py": [
        "models/flex_olmo/provider",
        "models/gpt2/provider",
        "models/layer_specs",
        "models/olmo/provider",
        "models/olmo3/provider",
        "nn/post_norm_moe",
        "nn/self_attention",
    ],
    "unit_tests/models/test_provider.py": ["models/layout", "models/olmo2/layer_specs"],
    "unit_tests/live/test_megatron_bridge_names.py": ["live/offline", "models/megatron_bridge"],
    "functional_tests/te_on_cpu/test_te_models.py": ["nn/te_modules"],
    "functional_tests/test_training_resume.py": [
        "runtime/signals",
        "training/loop",
        "training/restore",
        "training/setup",
    ],
    "functional_tests/test_training_damage.py": ["training/checksums"],
    "unit_tests/training/monitor/test_run_log.py": [
        "training/monitor/gpu_peaks",
        "training/monitor/human",
        "training/monitor/log_file",
        "training/monitor/records",
        "training/monitor/trackers",
    ],
    "unit_tests/test_recipes.py": ["training/named_recipes"],
    "functional_tests/test_training_layouts.py": ["training/task"],
}
"""Modules without a test file of their own, by the file that tests them."""


def mirrored(module: Path) -> Path:
    """Return the test file that stands where a module stands."""
    place = module.relative_to(PACKAGE)
    return TESTS / "unit_tests" / place.parent / f"test_{place.stem}.py"


def test_tests_mirror_the_tree_or_say_where_they_are() -> None:
    elsewhere = {PACKAGE / f"{name}.py" for names in TESTED_BY.values() for name in names}
    modules = {m for m in MODULES if not m.name.startswith("_")}
    modules -= set((PACKAGE / "recipes").rglob("*.py"))  # read by test_recipes.py, all of them
    assert [file for file in TESTED_BY if not (TESTS / file).exists()] == []
    assert sorted(elsewhere - modules) == [], "TESTED_BY names modules that don't exist"
    twice = [relative(m) for m in elsewhere if mirrored(m).exists()]
    assert twice == [], "these have a test file of their own: take them out of TESTED_BY"
    missing = [relative(m) for m in modules - elsewhere if not mirrored(m).exists()]
    assert sorted(missing) == [], "write a test file beside the others, or a line in TESTED_BY"


# ---------------------------------------------------------------------------------- documentation


def overrides(node: ast.ClassDef) -> bool:
    """Whether a class has bases in this package, whose docstrings stand for its methods."""
    outside = {"ABC", "NamedTuple", "Enum", "Exception", "BaseException"}
    return any(ast.unparse(base) not in outside for base in node.bases)


def undocumented(body: list[ast.stmt], prefix: str, in_subclass: bool) -> Iterator[str]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        is_property = any("property" in ast.unparse(d) for d in node.decorator_list)
        if not (ast.get_docstring(node) or is_property or in_subclass):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body, f"{prefix}{node.name}.", overrides(node))


@pytest.mark.parametrize("file", MODULES, ids=relative)
def test_every_public_function_and_class_is_documented(file: Path) -> None:
    assert not list(undocumented(ast.parse(file.read_text()).body, "", False))


@pytest.mark.parametrize("file", [m for m in MODULES if m.read_text().strip()], ids=relative)
def test_every_module_is_documented(file: Path) -> None:
    if file.name != "_version.py":
        assert ast.get_docstring(ast.parse(file.read_text()))
