"""The kernels of Transformer Engine's C++ extension that the models call, in PyTorch.

Each takes the arguments that Transformer Engine's Python (2.6 to 2.20) gives it, by position.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

Tensor = torch.Tensor


def _product(a: Tensor, transa: bool, b: Tensor, transb: bool) -> Tensor:
    """Matrix product as cuBLAS has it, column by column: op(b) @ op(a) of PyTorch's rows."""
    b = b.reshape(-1, b.shape[-1]).T if transb else b
    return b @ (a.T if transa else a.reshape(-1, a.shape[-1]))


def generic_gemm(
    a: Tensor,
    transa: bool,
    b: Tensor,
    transb: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: Any,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    *rest: Any,
    **overlap: Any,
) -> tuple[Tensor, Tensor | None, None, None]:
    assert quantizer is None
    assert not gelu
    product = _product(a, transa, b, transb)
    bias_grad = None
    if grad and bias is not None:
        bias_grad = b.reshape(-1, b.shape[-1]).sum(0).to(bias.dtype)
    elif bias is not None:
        product = product + bias
    if out is None:
        return product, bias_grad, None, None
    _write(out, product, accumulate)
    return out, bias_grad, None, None


def te_general_grouped_gemm(
    a: list[Tensor],
    transa: bool,
    b: list[Tensor],
    transb: bool,
    out: list[Tensor],
    out_dtype: Any,
    m_splits: list[int],
    bias: list[Tensor],
    bias_dtype: Any,
    single_output: bool,
    gelu_in: Any,
    grad: bool,
    workspaces: Any,
    workspace_size: int,
    accumulate: bool,
    *rest: Any,
) -> list[Tensor]:
    outputs = out[0].split(list(m_splits)) if single_output else out
    for output, left, right in zip(outputs, a, b, strict=True):
        _write(output, _product(left, transa, right, transb), accumulate)
    return bias


def _write(out: Tensor, value: Tensor, accumulate: bool) -> None:
    out.copy_(out + value.view_as(out) if accumulate else value.view_as(out))


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, *rest: Any
) -> tuple[Tensor, None, Tensor]:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1) + eps)
    return (wide * scale[:, None] * weight.float()).to(x.dtype), None, scale


def rmsnorm_bwd(
    grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    grad, normed, of_x = grad.float(), x.float() * scale[:, None], x.dtype
    inner = grad * weight.float()
    dx = scale[:, None] * (inner - normed * (inner * normed).mean(-1, keepdim=True))
    return dx.to(of_x), (grad * normed).sum(0).to(weight.dtype)


def layernorm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out: Any,
    quantizer: Any,
    dtype: Any,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.float()
    mean = wide.mean(-1)
    scale = torch.rsqrt(wide.var(-1, correction=0) + eps)
    normed = (wide - mean[:, None]) * scale[:, None]
    return (normed * weight.float() + bias.float()).to(x.dtype), mean, scale


def layernorm_bwd(
    grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grad, normed = grad.float(), (x.float() - mean[:, None]) * scale[:, None]
    inner = grad * weight.float()
    inner = inner - inner.mean(-1, keepdim=True)
    dx = scale[:, None] * (inner - normed * (inner * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (grad * normed).sum(0).to(weight.dtype), grad.sum(0).to(weight.dtype)


def fused_rope_forward(t: Tensor, freqs: Tensor, *rest: Any) -> Tensor:
    return _rotated(t, freqs, 1.0)


def fused_rope_backward(grad: Tensor, freqs: Tensor, *rest: Any) -> Tensor:
    return _rotated(grad, freqs, -1.0)


def _rotated(t: Tensor, freqs: Tensor, sign: float) -> Tensor:
    """t [s, b, heads, d] by the angles [s, 1, 1, d], in float32."""
    assert freqs.shape[-1] == t.shape[-1]
    first, second = t.float().chunk(2, -1)
    freqs = freqs[: len(t)]
    turned = torch.cat([-second, first], -1) * (freqs.sin() * sign)
    return (t.float() * freqs.cos() + turned).to(t.dtype)


def multi_tensor_adam(
    chunk: int,
    skip: Tensor,
    lists: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
    *rest: Any,
) -> None:
    assert mode == 1, "decoupled weight decay"
    first = 1 - beta1 ** int(step) if bias_correction else 1.0
    second = 1 - beta2 ** int(step) if bias_correction else 1.0
    with torch.no_grad():
        for grad, parameter, average, square in zip(*lists, strict=True):
            average.mul_(beta1).add_(grad.float(), alpha=1 - beta1)
            square.mul_(beta2).addcmul_(grad.float(), grad.float(), value=1 - beta2)
            update = (average / first) / ((square / second).sqrt() + eps)
            parameter.sub_(lr * (update + weight_decay * parameter.float()))


def multi_tensor_l2norm(
    chunk: int, skip: Tensor, lists: list[list[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    norm = torch.stack([t.float().norm() for t in lists[0]]).norm().reshape(1)
    return norm, norm


def multi_tensor_scale(chunk: int, skip: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def scaled_masked_softmax_forward(scores: Tensor, mask: Tensor, scale: float) -> Tensor:
    wide = (scores.float() * scale).masked_fill(mask, -10000.0)
    return wide.softmax(-1).to(scores.dtype)


def scaled_masked_softmax_backward(grad: Tensor, softmax: Tensor, scale: float) -> Tensor:
    grad, wide = grad.float(), softmax.float()
    return (scale * wide * (grad - (grad * wide).sum(-1, keepdim=True))).to(softmax.dtype)


def get_fused_attn_backend(*args: Any, **kwargs: Any) -> Any:
    """cuDNN's, for whatever Transformer Engine's Python has not ruled out before it asks.

    Newer versions give one object with all parameters, and take a reason back, too.
    """
    extension = sys.modules["transformer_engine_torch"]
    backend = extension.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen
    return (backend, "") if len(args) == 1 else backend


def fused_attention(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    qkv_layout: str,
    attn_mask_type: str,
    window_size: tuple[int, int],
    **unused: Any,
) -> Tensor:
    """``FusedAttention.forward``: causal, in a window or not. cuDNN's kernel takes no mask, so
    that an ``attention_mask`` is ignored, as it is on a GPU."""
    assert query.dtype in (torch.bfloat16, torch.float16)
    assert qkv_layout.startswith("sb")
    assert attn_mask_type == "causal"
    left, right = window_size
    assert right == 0
    seen = torch.ones(len(query), len(key), dtype=torch.bool).tril()
    if left >= 0:
        seen = seen.triu(-left)
    heads = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        *heads, attn_mask=seen, scale=self.softmax_scale, enable_gqa=True
    )
    return out.permute(2, 0, 1, 3).flatten(2)


def get_cudnn_version() -> int:
    return 91200  # 9.12


def get_cublasLt_version() -> int:  # noqa: N802
    return 130000  # CUDA 13


KERNELS = (
    generic_gemm,
    te_general_grouped_gemm,
    rmsnorm_fwd,
    rmsnorm_bwd,
    layernorm_fwd,
    layernorm_bwd,
    fused_rope_forward,
    fused_rope_backward,
    multi_tensor_adam,
    multi_tensor_l2norm,
    multi_tensor_scale,
    scaled_masked_softmax_forward,
    scaled_masked_softmax_backward,
    get_fused_attn_backend,
    get_cudnn_version,
    get_cublasLt_version,
)
