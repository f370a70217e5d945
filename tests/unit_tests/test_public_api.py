"""What the package offers, by name."""

import importlib
import importlib.resources
import inspect
import subprocess
import sys

import pytest

import megatron_olmo_bridge

FUNCTIONS = {"average_checkpoints", "doctor", "export_checkpoint", "hf_as_megatron",
             "import_checkpoint", "inspect", "prepare_data", "synth", "train",
             "verify"}  # fmt: skip
CLASSES = {"AutoBridge", "Olmo2ModelProvider", "Olmo2ModelProvider1B", "Olmo2ModelProvider7B",
           "Olmo2ModelProvider13B", "Olmo2ModelProvider32B"}  # fmt: skip


def test_the_names_are_these() -> None:
    assert set(megatron_olmo_bridge.__all__) == FUNCTIONS | CLASSES | {"__version__"}


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


def test_without_megatron_core_a_live_name_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['megatron'] = None\n"
        "import megatron_olmo_bridge\n"
        "try: megatron_olmo_bridge.AutoBridge\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == (
        "AutoBridge needs megatron-core: pip install 'megatron-olmo-bridge[megatron]' "
        "(in a clone: pip install -e '.[megatron]')"
    )


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'convert_checkpoint'"):
        _ = megatron_olmo_bridge.convert_checkpoint


def test_every_error_is_a_bridge_error() -> None:
    errors = importlib.import_module("megatron_olmo_bridge.errors")
    found = [
        e for e in vars(errors).values()
        if isinstance(e, type) and e.__module__ == errors.__name__
    ]  # fmt: skip
    assert len(found) > 5
    assert all(issubclass(e, errors.BridgeError) for e in found)


def test_types_are_shipped() -> None:
    files = importlib.resources.files("megatron_olmo_bridge")
    assert (files / "py.typed").is_file()
