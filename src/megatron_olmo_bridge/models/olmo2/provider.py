"""Build OLMo-2 in megatron-core."""

from __future__ import annotations

from dataclasses import asdict, dataclass, make_dataclass

from megatron.core.transformer import ModuleSpec

from megatron_olmo_bridge.models.provider import DecoderProvider

from .bridge import Olmo2Bridge
from .config import Olmo2Config
from .layer_specs import olmo2_layer_spec


@dataclass
class Olmo2ModelProvider(DecoderProvider):
    """Provider of OLMo-2."""

    normalization: str = "RMSNorm"
    qk_layernorm: bool = True
    layernorm_epsilon: float = 1e-6
    rotary_base: float = 500000.0

    def layer_spec(self) -> ModuleSpec:
        return olmo2_layer_spec(self, self.backend)


def _of_size(name: str, size: str) -> type[Olmo2ModelProvider]:
    """Return a provider class whose defaults are the values of a published size."""
    numbers = asdict(Olmo2Config.from_hf(Olmo2Bridge.sizes[size]))
    fields = [(key, type(value), value) for key, value in numbers.items()]
    cls = make_dataclass(name, fields, bases=(Olmo2ModelProvider,))
    cls.__module__ = __name__
    cls.__doc__ = f"{size} as published; its values are in ``Olmo2Bridge.sizes``."
    return cls


Olmo2ModelProvider1B = _of_size("Olmo2ModelProvider1B", "olmo2-1b")
Olmo2ModelProvider7B = _of_size("Olmo2ModelProvider7B", "olmo2-7b")
Olmo2ModelProvider13B = _of_size("Olmo2ModelProvider13B", "olmo2-13b")
Olmo2ModelProvider32B = _of_size("Olmo2ModelProvider32B", "olmo2-32b")
