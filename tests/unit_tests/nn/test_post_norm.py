"""RMSNorm and the linear with a norm after it, on one process."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("megatron.core")
if torch.cuda.is_available():
    pytest.skip("written for the CPU runtime", allow_module_level=True)

from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import TransformerConfig
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from megatron_olmo_bridge.nn.post_norm import RMSNorm, RowParallelLinearPostLN
from megatron_olmo_bridge.runtime.cpu import cpu_runtime

DTYPES = [torch.float32, torch.bfloat16]


def config(dtype: torch.dtype = torch.float32, sp: bool = False) -> SimpleNamespace:
    return SimpleNamespace(params_dtype=dtype, sequence_parallel=sp)


@pytest.fixture
def one_process() -> Iterator[None]:
    with cpu_runtime():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        yield
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_transformers_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours, theirs = RMSNorm(config(dtype), 64, eps=1e-6), Olmo2RMSNorm(64, eps=1e-6).to(dtype)
    torch.nn.init.uniform_(ours.weight, 0.5, 1.5)
    theirs.load_state_dict(ours.state_dict())
    x, gradient = torch.randn(5, 2, 64, dtype=dtype), torch.randn(5, 2, 64, dtype=dtype)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [norm(tensor) for norm, tensor in zip((ours, theirs), inputs, strict=True)]
    assert torch.equal(*outputs)
    assert outputs[0].dtype is dtype
    for output in outputs:
        output.backward(gradient)
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert torch.equal(ours.weight.grad, theirs.weight.grad)


@pytest.mark.parametrize("sp", [False, True])
def test_weight_says_whether_its_gradient_is_to_be_summed(sp: bool) -> None:
    assert RMSNorm(config(sp=sp), 8).weight.sequence_parallel is sp


def linear(bias: bool) -> RowParallelLinearPostLN:
    return RowParallelLinearPostLN(
        8,
        16,
        config=TransformerConfig(
            num_layers=1, hidden_size=16, num_attention_heads=2, layernorm_epsilon=1e-6
        ),
        init_method=torch.nn.init.normal_,
        bias=bias,
        input_is_parallel=True,
        skip_bias_add=True,
    )


@pytest.mark.usefixtures("one_process")
def test_linear_is_normalised_after_the_product() -> None:
    module = linear(bias=False)
    torch.nn.init.uniform_(module.post_layernorm.weight, 0.5, 1.5)
    assert {name for name, _ in module.named_parameters()} == {"weight", "post_layernorm.weight"}
    x = torch.randn(3, 2, 8)
    output, bias = module(x)
    expected = torch.nn.functional.rms_norm(
        x @ module.weight.T, (16,), module.post_layernorm.weight, eps=1e-6
    )
    torch.testing.assert_close(output, expected)
    assert bias is None


@pytest.mark.usefixtures("one_process")
def test_checkpoint_holds_the_norm_beside_the_linear() -> None:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    states = linear(bias=False).sharded_state_dict(
        "mlp.linear_fc2.", metadata={"dp_cp_group": group}
    )
    assert set(states) == {
        "mlp.linear_fc2.weight",
        "mlp.linear_fc2.post_layernorm.weight",
        "mlp.linear_fc2._extra_state",
    }


@pytest.mark.usefixtures("one_process")
def test_refuses_a_bias() -> None:
    with pytest.raises(ValueError, match="bias"):
        linear(bias=True)
