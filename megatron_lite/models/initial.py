"""Initial distribution of each kind of matrix, by initialisation scheme. Biases start at 0, norm weights at 1.

Legend: h hidden size, n heads, d head size, f inner width of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite.config.resolved import ResolvedModel
from megatron_lite.config.schema import InitScheme
from megatron_lite.parallel.sharding import Init


@dataclass(frozen=True)
class StackInit:
    """One distribution for each kind of matrix in a stack of blocks."""

    embedding: Init
    """Word, position and segment embeddings."""
    head: Init
    """An output head that is not tied to the word embedding."""
    dense: Init
    """All other matrices with h input channels: the MLP's first, keys and values, the dense layers of heads."""
    query: Init
    qkv: Init
    """Fused query, key and value, rows ordered by query group: see `models.attention`."""
    projection: Init
    """Attention output projection, from n d channels to h."""
    down: Init
    """The MLP's last matrix, from f channels to h."""
    relative_bias: Init


def stack_init(model: ResolvedModel, num_layers: int, *, cross_attention: bool = False) -> StackInit:
    """The distributions in a stack of `num_layers` blocks."""
    if model.init is InitScheme.t5:
        return _by_fan_in(model)
    sums = num_layers * (3 if cross_attention else 2)  # additions to the residual stream
    plain = Init.normal(model.init_std)
    residual = Init.normal(model.init_std / sums**0.5) if model.init is InitScheme.normal else plain
    return StackInit(
        embedding=plain,
        head=plain,
        dense=plain,
        query=plain,
        qkv=plain,
        projection=residual,
        down=residual,
        relative_bias=plain,
    )


def _by_fan_in(model: ResolvedModel) -> StackInit:
    """T5's: variance 1 / inputs, and 1 / sqrt(d) in the query instead of in the scores (arXiv 1910.10683).

    The word table has variance 1, so that a tied head needs the factor h^-0.5 (`scale_tied_head`).
    """
    fan_in, head_size = model.hidden_size**-0.5, model.head_size
    queries = model.num_attention_heads // model.num_query_groups * head_size  # query rows of one group
    return StackInit(
        embedding=Init.normal(1.0),
        head=Init.normal(fan_in),
        dense=Init.normal(fan_in),
        query=Init.normal(fan_in * head_size**-0.5),
        qkv=Init.normal(fan_in, ((queries, head_size**-0.5), (2 * head_size, 1.0))),
        projection=Init.normal((model.num_attention_heads * head_size) ** -0.5),
        down=Init.normal(model.ffn_hidden_size**-0.5),
        relative_bias=Init.normal(fan_in),
    )
