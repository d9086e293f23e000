"""Tensor-parallel linear layers and embedding (arXiv 1909.08053).

Shapes: b micro-batch, s sequence, i input channels, o output channels, v padded vocabulary, h hidden, t tensor-parallel
size. Under sequence parallelism (arXiv 2205.05198) activations outside a column/row pair are [b, s/t, h].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_lite.parallel.collectives import (
    Started,
    all_gather_sequence,
    finished,
    gathered_sequence,
    start_all_gather_sequence,
    start_all_reduce,
    start_reduce_scatter_sequence,
    sum_gradients,
    sum_partial,
)
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.gradient_sink import GradientSink
from megatron_lite.parallel.sharding import Init, PartialGradient, ShardSpec, sharded_parameter


class _Linear(torch.autograd.Function):
    """x [b, s, i] times weight [..., o, i] (leading dimensions are stacked matrices), plus bias.

    Why not just F.linear: the all-reduce of the input's gradient overlaps with computing the weight's gradient; under
    sequence parallelism only this rank's slice of x is saved, and gathered again in the backward pass, which overlaps
    with computing the input's gradient; and the weight itself (a leaf, not a view) is saved, so that ZeRO-3 can free it
    between forward and backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup | None, gather: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        # Found here, because recomputation restores a detached weight. A graph of torch.compile has no side effects, so
        # it returns the gradient.
        ctx.sink = None if torch.compiler.is_compiling() else getattr(weight, "gradient_sink", None)
        ctx.group, ctx.gather, ctx.bias_shape = group, gather, None if bias is None else bias.shape
        if gather:
            x = all_gather_sequence(x, group)
        return F.linear(x, weight.view(-1, weight.shape[-1]), None if bias is None else bias.view(-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        rows = grad.reshape(-1, grad.shape[-1])  # [b s, o]
        summed = gathered = grad_x = grad_weight = grad_bias = None
        # Each collective starts before the matrix product that it overlaps with.
        if needs_weight and ctx.gather:
            gathered = start_all_gather_sequence(x, ctx.group, after=grad)
        if needs_x:
            grad_x = grad @ weight.view(-1, weight.shape[-1])
            summed = None if ctx.group is None else start_sum(grad_x, ctx.group, ctx.gather)
        if needs_weight:
            x = x if gathered is None else gathered_sequence(gathered, ctx.group)
            grad_weight = _weight_gradient(ctx.sink, rows, x.reshape(-1, x.shape[-1]), weight)
        if needs_bias:
            grad_bias = rows.sum(0).view(ctx.bias_shape)
        return grad_x if summed is None else finished(summed), grad_weight, grad_bias, None, None


def _weight_gradient(sink: GradientSink | None, rows: Tensor, x: Tensor, weight: Tensor) -> Tensor | None:
    """rows^T x for rows [b s, o] and x [b s, i]; None if the sink has taken it."""
    if sink is None or not sink.in_use:
        return (rows.t() @ x).view_as(weight)
    sink.add_product(rows, x)
    return None


def start_sum(grad: Tensor, group: dist.ProcessGroup, scatter: bool) -> Started:
    """Start the sum of the ranks' partial gradients of an input [b, s, i]."""
    return start_reduce_scatter_sequence(grad, group) if scatter else start_all_reduce(grad, group)


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the output channels split: [b, s, i] (or [b, s/t, i]) -> [b, s, stacked * o/t]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        context: ParallelContext,
        *,
        bias: bool,
        init: Init,
        stacked: int | None = None,
    ) -> None:
        """
        Args:
            stacked: number of matrices of out_features rows that are fused into one parameter [stacked, o, i] and one
                product; each is split by itself. None = a plain matrix [o, i].
        """
        super().__init__()
        self.context = context
        stack = () if stacked is None else (stacked,)
        dim = len(stack)
        self.weight = sharded_parameter(ShardSpec((*stack, out_features, in_features), dim, init), context)
        self.bias = None
        if bias:
            self.bias = sharded_parameter(ShardSpec((*stack, out_features), dim, Init.zeros()), context)

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.weight, self.bias, self.context.tensor_group, self.context.sequence_parallel)


class RowParallelLinear(nn.Module):
    """y = x W^T + b with the input channels split: [b, s, i/t] -> [b, s, o] (or [b, s/t, o])."""

    def __init__(
        self, in_features: int, out_features: int, context: ParallelContext, *, bias: bool, init: Init
    ) -> None:
        super().__init__()
        self.context = context
        self.weight = sharded_parameter(ShardSpec((out_features, in_features), 1, init), context)
        bias_spec = ShardSpec((out_features,), None, Init.zeros(), partial_gradient="sequence")
        self.bias = sharded_parameter(bias_spec, context) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.context.tensor_group is None:
            return _Linear.apply(x, self.weight, self.bias, None, False)
        y = sum_partial(_Linear.apply(x, self.weight, None, None, False), self.context)
        if self.bias is None:
            return y
        (bias,) = sum_gradients(self.context, self.bias)
        return y.add_(bias)  # after the sum over the ranks, or it would be added once per rank


class ReplicatedLinear(nn.Module):
    """y = x W^T + b with the full matrix replicated on every rank: [..., i] -> [..., o]."""

    def __init__(
        self, in_features: int, out_features: int, context: ParallelContext, *, init: Init, on_slices: bool
    ) -> None:
        """
        Args:
            on_slices: under sequence parallelism x is this rank's slice [b, s/t, i], so the gradient is partial;
                False = all ranks get the same x.
        """
        super().__init__()
        self.context = context
        partial: PartialGradient | None = "sequence" if on_slices else None
        weight = ShardSpec((out_features, in_features), None, init, partial_gradient=partial)
        self.weight = sharded_parameter(weight, context)
        bias = ShardSpec((out_features,), None, Init.zeros(), partial_gradient=partial)
        self.bias = sharded_parameter(bias, context)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = sum_gradients(self.context, self.weight, self.bias)
        return F.linear(x, weight, bias)


class HeadWeights(NamedTuple):
    """The parameters of the output head on this rank."""

    context: ParallelContext
    weight: Tensor  # [v/t, h]
    bias: Tensor | None = None  # [v/t]
    shared: SharedGradient | None = None
    """Through which the word embedding adds its gradient, if it is the same module."""


HeadUse: TypeAlias = Callable[[Tensor, HeadWeights], Any]
"""What is computed from hidden states [b, s, h] (or [b, s/t, h]) and the head: logits, or the loss without them."""


def vocab_parallel_logits(hidden: Tensor, head: HeadWeights) -> Tensor:
    """[b, s, h] (or [b, s/t, h]) -> this rank's logits [b, s, v/t], all of them at once."""
    context = head.context
    return _Linear.apply(hidden, head.weight, head.bias, context.tensor_group, context.sequence_parallel)


class VocabParallelEmbedding(nn.Module):
    """The word embedding [v, h], or the output head, or both if they are tied; split by rows (vocabulary).

    Embedding: token ids [b, s] -> [b, s, h] (or [b, s/t, h]). Head: a hidden state and what to do with it; the weight
    is passed on within `forward`, because ZeRO-3 has it only there.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, context: ParallelContext, *, padded_vocab_size: int, init: Init
    ) -> None:
        super().__init__()
        self.context = context
        self.weight = sharded_parameter(ShardSpec((vocab_size, hidden_size), 0, init, padded_vocab_size), context)
        self._shared = SharedGradient()

    def forward(self, x: Tensor, use: HeadUse | None = None) -> Any:
        if use is not None:
            shared, self._shared = self._shared, SharedGradient()  # the next one belongs to the next forward pass
            return use(x, HeadWeights(self.context, self.weight, shared=shared))
        if self.context.tensor_group is None:
            return _Lookup.apply(x, self.weight, self._shared)
        rows = self.weight.shape[0]
        local = x - self.context.tensor_rank * rows
        # Tokens of other ranks give zeros here; the sum over the group then has the owner's row alone.
        elsewhere = (local < 0) | (local >= rows)
        embedded = _Lookup.apply(local.masked_fill_(elsewhere, 0), self.weight, self._shared)
        return sum_partial(embedded.masked_fill_(elsewhere.unsqueeze(-1), 0.0), self.context)


class SharedGradient:
    """The gradient of a tied weight in one backward pass: the head gives it, embeddings then add their rows in place.

    Autograd would make the embedding's gradient a tensor of the whole table, almost all zeros, and add it to the
    head's.
    """

    def __init__(self) -> None:
        self._lookups = 0
        self._of_head: Tensor | None = None

    def expect(self) -> None:
        """An embedding of this forward pass will add its gradient."""
        self._lookups += 1

    def offer(self, gradient: Tensor) -> None:
        """Called in the head's backward pass, which comes before those of the embeddings.

        Args:
            gradient: [v/t, h], which the caller also returns to autograd. Autograd uses it after the last embedding.
        """
        if self._lookups:
            self._of_head = gradient

    def add(self, tokens: Tensor, gradient: Tensor) -> bool:
        """Add gradient [..., h] to the rows `tokens` [...]; False if there is no gradient of a head."""
        of_head = self._of_head
        self._lookups -= 1
        if self._lookups == 0:
            self._of_head = None  # a gradient that is still held here would be copied by autograd
        if of_head is None:
            return False
        tokens, gradient = tokens.reshape(-1), gradient.reshape(-1, gradient.shape[-1])
        if of_head.dtype is not torch.float32:
            tokens, gradient = _sum_of_each_token(tokens, gradient)
        of_head.index_add_(0, tokens, gradient.to(of_head.dtype))
        return True


def _sum_of_each_token(tokens: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """One row for each distinct token [r] with the fp32 sum of its gradients [r, h]; the rows left over are zero.

    In 16 bits a token that occurs often would lose its later, comparatively small gradients. The sizes do not depend on
    the tokens, so a GPU need not be waited for.
    """
    tokens, order = tokens.sort(stable=True)
    is_first = torch.ones_like(tokens)
    is_first[1:] = (tokens[1:] != tokens[:-1]).to(tokens.dtype)
    place = is_first.cumsum(0) - 1  # [r]
    sums = torch.zeros(gradient.shape, dtype=torch.float32, device=gradient.device)
    sums.index_add_(0, place, gradient[order].float())
    return torch.zeros_like(tokens).scatter_(0, place, tokens), sums


class _Lookup(torch.autograd.Function):
    """Rows of the weight [v/t, h] by tokens [...]: [..., h]."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, shared: SharedGradient) -> Tensor:
        if ctx.needs_input_grad[1]:
            shared.expect()
        ctx.save_for_backward(tokens)
        ctx.shared, ctx.rows = shared, weight.shape[0]
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None]:
        (tokens,) = ctx.saved_tensors
        if ctx.shared.add(tokens, grad):
            return None, None, None
        return None, torch.ops.aten.embedding_dense_backward(grad, tokens, ctx.rows, -1, False), None
