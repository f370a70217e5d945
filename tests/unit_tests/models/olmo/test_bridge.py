"""OlmoConfig.from_hf: what no config says, and what some do."""

from megatron_olmo_bridge.models.olmo.bridge import OlmoBridge, OlmoConfig


def test_the_epsilon_is_fixed_and_the_clamp_the_configs() -> None:
    config = OlmoBridge.sizes["olmo-7b"] | {"rms_norm_eps": 1e-6, "layer_norm_eps": 1e-6}
    assert OlmoConfig.from_hf(config).layernorm_epsilon == 1e-5
    assert OlmoConfig.from_hf(config).clip_qkv is None
    assert OlmoConfig.from_hf(config | {"clip_qkv": 8.0}).clip_qkv == 8.0


def test_the_1b_is_tied_and_the_7b_is_not() -> None:
    tied = {
        size: OlmoConfig.from_hf(OlmoBridge.sizes[size]).share_embeddings_and_output_weights
        for size in ("olmo-1b", "olmo-7b")
    }
    assert tied == {"olmo-1b": True, "olmo-7b": False}
