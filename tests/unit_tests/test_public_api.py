"""What the package offers, by name."""

import ast
import importlib
import importlib.resources
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_olmo_bridge

FUNCTIONS = {
    "average_checkpoints",
    "compare",
    "doctor",
    "export_checkpoint",
    "fingerprint",
    "generate",
    "hf_as_megatron",
    "import_checkpoint",
    "inspect",
    "prepare_data",
    "synth",
    "train",
    "verify",
    "verify_against",
}
CLASSES = {
    "AutoBridge",
    "AverageOptions",
    "PrepareOptions",
    "BridgeError",
    "ExpectedWeights",
    "ExportOptions",
    "ImportOptions",
    "Olmo2ModelProvider",
    "Olmo2ModelProvider1B",
    "Olmo2ModelProvider7B",
    "Olmo2ModelProvider13B",
    "Olmo2ModelProvider32B",
    "ReadOptions",
    "TrainingConfig",
    "WriteOptions",
}
WITHOUT_MEGATRON = "import sys; sys.modules['megatron'] = None; import megatron_olmo_bridge\n"


def run(code: str) -> str:
    """Return what a fresh interpreter prints that runs some code."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_names_are_these() -> None:
    assert set(megatron_olmo_bridge.__all__) == FUNCTIONS | CLASSES | {"__version__"}


def test_dir_lists_the_public_names() -> None:
    assert set(dir(megatron_olmo_bridge)) == set(megatron_olmo_bridge.__all__)


def test_type_checkers_see_the_same_names_in_the_same_modules() -> None:
    package = Path(str(megatron_olmo_bridge.__file__))
    (block,) = [node for node in ast.parse(package.read_text()).body if isinstance(node, ast.If)]
    imported = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == megatron_olmo_bridge._OFFLINE | megatron_olmo_bridge._WITH_MEGATRON


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_each_function_is_documented_and_typed(name: str) -> None:
    function = getattr(megatron_olmo_bridge, name)
    assert inspect.isfunction(function)
    assert inspect.getdoc(function)
    signature = inspect.signature(function)
    assert signature.return_annotation is not signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not parameter.empty


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_each_class_is_documented(name: str) -> None:
    found = getattr(megatron_olmo_bridge, name)
    assert inspect.isclass(found)
    assert found.__doc__
    assert found.__name__ == name


def test_help_shows_the_public_names() -> None:
    text = run("import megatron_olmo_bridge\nhelp(megatron_olmo_bridge)")
    assert [name for name in FUNCTIONS if f"\n    {name}(" not in text] == []
    assert [name for name in CLASSES if f"\n    class {name}(" not in text] == []


def test_without_megatron_core_help_shows_the_others() -> None:
    text = run(f"{WITHOUT_MEGATRON}help(megatron_olmo_bridge)")
    assert "    verify(" in text
    assert "AutoBridge" not in text


def test_without_megatron_core_dir_leaves_out_what_needs_it() -> None:
    names = run(f"{WITHOUT_MEGATRON}print(*dir(megatron_olmo_bridge))").split()
    assert {"import_checkpoint", "verify", "BridgeError", "TrainingConfig"} <= set(names)
    assert not {"AutoBridge", "train", "compare", "generate"} & set(names)


@pytest.mark.parametrize("name", ["AutoBridge", "compare", "generate", "train"])
def test_without_megatron_core_a_live_name_says_what_to_install(name: str) -> None:
    code = f"try: print(megatron_olmo_bridge.{name})\nexcept ImportError as error: print(error)"
    assert run(WITHOUT_MEGATRON + code) == (
        f"{name} needs megatron-core: pip install 'megatron-olmo-bridge[megatron]' "
        "(in a clone: pip install -e '.[megatron]')"
    )


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'convert_checkpoint'"):
        _ = megatron_olmo_bridge.convert_checkpoint


def test_every_error_is_a_bridge_error() -> None:
    errors = importlib.import_module("megatron_olmo_bridge.errors")
    found = [
        error
        for error in vars(errors).values()
        if isinstance(error, type) and error.__module__ == errors.__name__
    ]
    assert len(found) > 5
    assert all(issubclass(error, errors.BridgeError) for error in found)


def test_types_are_shipped() -> None:
    files = importlib.resources.files("megatron_olmo_bridge")
    assert (files / "py.typed").is_file()
