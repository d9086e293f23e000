"""Bytes of activations that one rank keeps on a GPU between the forward and the backward pass.

Counted are the tensors that autograd saves, as flash attention keeps them: no scores, one logarithm per head and
position; and the fp32 buffers of the loss. Not counted: tokens, masks of dropout and of padding, relative biases, and
what other operations need while they run.

Legend: h hidden size, n heads, g query groups, d head size, f inner width of the MLP, v padded vocabulary, t
tensor-parallel size; T positions of a micro-batch, S those of this rank's slice under sequence parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite.config.derived import StageContent
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import (
    Architecture,
    Normalization,
    NormPlacement,
    PositionEmbedding,
    Precision,
    Recompute,
)
from megatron_lite.parallel.head_chunks import SOFTMAX_ELEMENTS, rows_per_chunk
from megatron_lite.planning.memory import FLOAT, HALF


@dataclass(frozen=True)
class StageActivations:
    """Bytes on one rank of a stage, at the moment when it holds the most."""

    micro_batches: int
    """Of which the stage holds activations at once under 1F1B."""
    layers: float
    """Of all layers and ends of the stage, for all these micro-batches."""
    recomputed: float
    """Of the layer that is being recomputed."""
    logits: float
    """Of one chunk of a micro-batch; their gradient takes their place."""
    loss: float
    """Of the fp32 buffers with which the loss is computed, and of the gradients of the head's weight and input, which
    are there with the loss."""

    @property
    def total(self) -> float:
        """The gradient of the logits is gone before a layer is recomputed."""
        return self.layers + max(self.logits + self.loss, self.recomputed)


def stage_activations(
    config: ResolvedConfig, content: StageContent, stage: int, padded_vocabulary: int
) -> StageActivations:
    """
    Args:
        stage: its number, from 0.
        padded_vocabulary: rows of the embedding, over all tensor-parallel ranks.
    """
    stages = config.parallel.pipeline_parallel_size
    held = min(stages - stage, config.num_micro_batches())
    encoder, decoder, last = layer_activations(config), layer_activations(config, decoder=True), _last(config)
    of_layers = content.layers * encoder.kept + content.decoder_layers * decoder.kept
    again = max(encoder.recomputed if content.layers else 0.0, decoder.recomputed if content.decoder_layers else 0.0)
    ends = last.head if content.last else 0.0
    if stages > 1:  # what was received, its copy with a gradient of its own, and what was sent
        ends += ((not content.first) + (not content.last)) * last.hidden
    logits, loss = head_activations(config, padded_vocabulary) if content.last else (0.0, 0.0)
    return StageActivations(held, held * (of_layers + ends), again, logits, loss)


def head_activations(config: ResolvedConfig, padded_vocabulary: int) -> tuple[float, float]:
    """Bytes of the logits and of the loss, as in `StageActivations`."""
    last, columns = _last(config), padded_vocabulary // config.parallel.tensor_parallel_size
    chunk = config.train.head_chunk or rows_per_chunk(last.positions, columns * last.width, "cuda")
    rows = min(last.positions, chunk)
    copies = 2 if last.width == HALF else 1  # the logits and their softmax; fp32 logits need no copy
    softmax = copies * FLOAT * min(rows * columns, SOFTMAX_ELEMENTS["cuda"])
    sum_width = FLOAT if rows < last.positions else last.width  # chunks in 16 bits are summed in fp32
    gradients = config.model.hidden_size * (columns * sum_width + last.positions * last.width)
    return rows * columns * last.width, softmax + gradients


def layer_activations(config: ResolvedConfig, *, decoder: bool = False) -> LayerActivations:
    """Of a layer of the single stack or the encoder, or of a decoder layer with cross-attention."""
    if decoder:
        return LayerActivations(config, config.decoder_length, config.data.seq_length)
    return LayerActivations(config, config.data.seq_length, 0)


def _last(config: ResolvedConfig) -> LayerActivations:
    """Of a layer of the stack with the head."""
    return layer_activations(config, decoder=config.model.architecture is Architecture.encoder_decoder)


class LayerActivations:
    """Bytes of one layer and one micro-batch."""

    def __init__(self, config: ResolvedConfig, length: int, memory_length: int) -> None:
        """
        Args:
            length: positions of its stack.
            memory_length: positions that it attends to in the encoder's output; 0 = no cross-attention.
        """
        model, parallel = config.model, config.parallel
        self._model, self._recompute = model, parallel.recompute
        tensor = parallel.tensor_parallel_size
        self.width = FLOAT if config.train.precision is Precision.fp32 else HALF
        self.positions = config.train.micro_batch_size * length  # T
        self._rows = self.positions // tensor if parallel.sequence_parallel else self.positions  # S
        self.hidden = self._rows * model.hidden_size * self.width  # [S, h]
        self._queries = self.positions * model.num_attention_heads * model.head_size // tensor * self.width
        self._keys = self.positions * model.num_query_groups * model.head_size // tensor * self.width
        self._sums = self.positions * model.num_attention_heads // tensor * FLOAT
        self._inner = self.positions * model.ffn_hidden_size // tensor * self.width
        self._memory = memory_length / length if length else 0.0

    @property
    def kept(self) -> float:
        """Between the layer's forward and backward pass."""
        if self._recompute is Recompute.full:
            return self.hidden
        return self._whole - (self._inside_attention if self._recompute is Recompute.selective else 0.0)

    @property
    def recomputed(self) -> float:
        """More of it while the layer's backward pass runs."""
        return self._whole + self.hidden - self.kept if self._recompute is not Recompute.none else 0.0

    @property
    def head(self) -> float:
        """Of the norm behind the last layer, of the head's transform if there is one, and the head's input."""
        norm = self._norm if self._model.norm_placement is NormPlacement.pre else 0.0
        transform = 2 * self.hidden + self._norm if self._model.head_transform else 0.0
        return norm + transform + self.hidden

    @property
    def _norm(self) -> float:
        """The norm's input and its statistics."""
        statistics = 1 if self._model.normalization is Normalization.rmsnorm else 2
        return self.hidden + self._rows * FLOAT * statistics

    @property
    def _whole(self) -> float:
        attention = self._norm + self.hidden + self._heads + self._inside_attention + self._queries
        mlp = self._norm + self.hidden + (4 if self._model.activation.is_gated else 2) * self._inner
        cross = 0.0
        if self._memory:
            cross = self._norm + self.hidden + 2 * self._queries + self._sums + 2 * self._memory * self._keys
        return attention + mlp + cross

    @property
    def _heads(self) -> float:
        """What the product for query, key and value leaves: one tensor, of which they are parts."""
        return self._queries + 2 * self._keys

    @property
    def _inside_attention(self) -> float:
        """What attention keeps besides its input and its output."""
        rotated = self._model.position_embedding is PositionEmbedding.rotary
        grouped = 1 < self._model.num_query_groups < self._model.num_attention_heads
        copies = (self._queries + self._keys) * rotated + self._queries * grouped
        return copies + self._sums
