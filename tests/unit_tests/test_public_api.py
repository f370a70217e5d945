"""What the package offers, by name."""

import importlib
import importlib.resources
import inspect

import pytest

import megatron_olmo_bridge

NAMES = {"__version__", "doctor", "export_checkpoint", "import_checkpoint", "inspect", "synth",
         "verify"}  # fmt: skip


def test_the_names_are_these() -> None:
    assert set(megatron_olmo_bridge.__all__) == NAMES


@pytest.mark.parametrize("name", sorted(NAMES - {"__version__"}))
def test_each_name_is_a_documented_and_typed_function(name: str) -> None:
    function = getattr(megatron_olmo_bridge, name)
    assert inspect.isfunction(function)
    assert inspect.getdoc(function)
    signature = inspect.signature(function)
    assert signature.return_annotation is not signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not parameter.empty


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'convert_checkpoint'"):
        _ = megatron_olmo_bridge.convert_checkpoint


def test_every_error_is_a_bridge_error() -> None:
    errors = importlib.import_module("megatron_olmo_bridge.errors")
    found = [e for e in vars(errors).values() if isinstance(e, type)]
    assert len(found) > 5
    assert all(issubclass(e, errors.BridgeError) for e in found)


def test_types_are_shipped() -> None:
    files = importlib.resources.files("megatron_olmo_bridge")
    assert (files / "py.typed").is_file()
