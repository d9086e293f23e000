"""Operators of compiled blocks: torch.compile puts a call into its graph and does not look inside.

Dropout inside a graph cannot seed torch's generator as `RngStates` does, so these operators do it when they run. A mask
has the value that it has without compilation. The key is a tensor: a graph is traced once for all micro-batches and
layers. `tensor_rank` is -1 for masks that all ranks of a tensor-parallel group share.

Shapes: b micro-batch, s queries, k keys, n query heads, g query groups, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.parallel.rng import DropoutKey, seeded, stable_hash


@contextmanager
def _drawing(key: Tensor, seed: int, site: str, tensor_rank: int, device: torch.device) -> Iterator[None]:
    rank = () if tensor_rank < 0 else (tensor_rank,)
    with seeded(device, stable_hash(seed, *DropoutKey.unpacked(key), site, *rank)):
        yield


@torch.library.custom_op("megatron_lite::dropout_mask", mutates_args=())
def dropout_mask(
    key: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    probability: float,
    seed: int,
    site: str,
    tensor_rank: int,
) -> Tensor:
    """Bool [*shape]: the elements that F.dropout keeps of a tensor of this dtype on this device."""
    with _drawing(key, seed, site, tensor_rank, device):
        return F.dropout(torch.ones(shape, dtype=dtype, device=device), probability) > 0


@dropout_mask.register_fake
def _(key, shape, dtype, device, probability, seed, site, tensor_rank):  # type: ignore[no-untyped-def]
    return torch.empty(shape, dtype=torch.bool, device=device)


@torch.library.custom_op("megatron_lite::start_all_gather_after", mutates_args=())
def start_all_gather_after(x: Tensor, after: Tensor, size: int, group_name: str) -> Tensor:
    """torch's functional all-gather of x along dimension 0, not before `after` is there; to be waited for."""
    return torch.ops._c10d_functional.all_gather_into_tensor(x, size, group_name)


@start_all_gather_after.register_fake
def _(x, after, size, group_name):  # type: ignore[no-untyped-def]
    return x.new_empty(size * x.shape[0], *x.shape[1:])


@torch.library.custom_op("megatron_lite::dropping_attention", mutates_args=())
def dropping_attention(
    query: Tensor,
    key_heads: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key: Tensor,
    causal: bool,
    scale: float | None,
    probability: float,
    seed: int,
    site: str,
    tensor_rank: int,
) -> Tensor:
    """Attention with dropout of its probabilities: query [b, n, s, d], keys and values [b, g, k, d] -> [b, s, n, d].

    Args:
        mask: bool or float, broadcastable to [b, n, s, k].
        causal: used where there is no mask.
        scale: None = 1 / sqrt(d).
    """
    with _drawing(key, seed, site, tensor_rank, query.device):
        out, _ = _attended(query, key_heads, value, mask, causal, scale, probability)
    return out.detach()


@dropping_attention.register_fake
def _(query, key_heads, value, mask, key, causal, scale, probability, seed, site, tensor_rank):  # type: ignore[no-untyped-def]
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1])


@torch.library.custom_op("megatron_lite::dropping_attention_backward", mutates_args=())
def dropping_attention_backward(
    grad: Tensor,
    query: Tensor,
    key_heads: Tensor,
    value: Tensor,
    mask: Tensor | None,
    needs_mask: bool,
    key: Tensor,
    causal: bool,
    scale: float | None,
    probability: float,
    seed: int,
    site: str,
    tensor_rank: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key_heads, value and mask (empty unless `needs_mask`).

    It computes the attention again, with the same dropout: what torch's kernels save for their backward passes differs
    from device to device. That costs one more forward pass of the attention.
    """
    with _drawing(key, seed, site, tensor_rank, query.device):
        out, inputs = _attended(query, key_heads, value, mask, causal, scale, probability, needs_mask=needs_mask)
    grads = [one.contiguous() for one in torch.autograd.grad(out, inputs, grad)]
    grad_mask = grads[3] if needs_mask else query.new_empty(0)
    return grads[0], grads[1], grads[2], grad_mask


@dropping_attention_backward.register_fake
def _(grad, query, key_heads, value, mask, needs_mask, *_):  # type: ignore[no-untyped-def]
    parts = (query, key_heads, value, mask if needs_mask else query.new_empty(0))
    return tuple(torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts)


def _attended(
    query: Tensor,
    key_heads: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    probability: float,
    *,
    needs_mask: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """[b, s, n, d] with its graph, and the leaves of that graph.

    Always with a graph: torch may choose another kernel without one, whose dropout draws other masks.
    """
    autograd = torch._C.DispatchKey.AutogradFunctionality  # which an operator runs without
    views = torch._C.DispatchKey.ADInplaceOrView
    with (
        torch._C._SetExcludeDispatchKeyGuard(autograd, False),
        torch._C._SetExcludeDispatchKeyGuard(views, False),
        torch.enable_grad(),
    ):
        inputs = [part.detach().requires_grad_() for part in (query, key_heads, value)]
        if needs_mask:
            assert mask is not None
            mask = mask.detach().requires_grad_()
            inputs.append(mask)
        out = F.scaled_dot_product_attention(
            *inputs[:3],
            attn_mask=mask,
            dropout_p=probability,
            is_causal=causal and mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != key_heads.shape[1],
        )
        return out.transpose(1, 2).contiguous(), inputs


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, causal, scale, probability, seed, site, tensor_rank = inputs
    ctx.save_for_backward(*tensors)
    ctx.settings = causal, scale, probability, seed, site, tensor_rank


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    query, key_heads, value, mask, key = ctx.saved_tensors
    needs_mask = ctx.needs_input_grad[3]
    *grads, grad_mask = dropping_attention_backward(
        grad.contiguous(), query, key_heads, value, mask, needs_mask, key, *ctx.settings
    )
    return *grads, grad_mask if needs_mask else None, *[None] * 7


dropping_attention.register_autograd(_backward, setup_context=_save_for_backward)
