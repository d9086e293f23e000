"""Which transformer layers lie on which pipeline stage (`parallel.stages`), without torch: plan and ranks agree.

`balanced` compares stages by the time of a micro-batch's forward and backward pass, in FLOPs of matrix products:

    a transformer layer   3 x its forward pass; 4 x with parallel.recompute=full; with selective, its scores once more
    the head              3 x 2 h v per predicted position, and the softmax and loss of v logits
    the embedding         a look-up, and a gradient that fills a [v, h] table

Element-wise work (norms, residual sums, activations, softmax, loss) takes time without multiplying matrices; it counts
`ELEMENT_FLOPS` for each element that it reads or writes. Communication does not count. A tensor-parallel group shares
a stage's work evenly, so its size plays no part.

Memory decides between cuts that are equally fast: model states (`memory.py`), and the activations (`activations.py`)
that 1F1B holds at once: of `stages - i` micro-batches on stage i. See `parallel.stage_cut` for the rule.

Legend: b micro-batch, s positions, h hidden size, n heads, d head size, f inner width of the MLP, v padded vocabulary,
t tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_lite.config.derived import (
    ParameterCounts,
    all_layers,
    has_next_sentence_head,
    padded_vocabulary,
    parameter_counts,
    stage_content,
)
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import Recompute
from megatron_lite.parallel.stage_cut import LayerCosts, balanced_cut
from megatron_lite.parallel.topology import even_cut
from megatron_lite.planning.activations import head_activations, layer_activations
from megatron_lite.planning.flops import PASSES, FlopsPerToken, itemised_flops
from megatron_lite.planning.memory import model_states

ASSUMED_VOCAB_SIZE = 50_000
"""Where a plan is made before the vocabulary is known."""
ELEMENT_FLOPS = 40
"""FLOPs of matrix products that take as long as reading or writing one element. Measured on one thread of a CPU in
fp32 (93 GFLOP/s, 9 GB/s): softmax, loss and gradient of a logit take 232 FLOPs, 6 elements; what a transformer layer
does besides its products, 35 to 45 for each element."""
HIDDEN_ELEMENTS = 12  # read or written per position and h by a layer's forward pass: two norms, two residual sums, qkv
INNER_ELEMENTS = 2  # the same per position and f of each matrix that widens the MLP
SCORE_ELEMENTS = 2  # the same per score of the attention: the softmax
LOGIT_ELEMENTS = 2  # the same per logit: the softmax and the loss


def layers_of_stages(config: ResolvedConfig, vocab_size: int | None) -> list[int]:
    """Number of transformer layers of each pipeline stage: encoder and decoder layers in the order of the model.

    Args:
        vocab_size: true vocabulary; None = not known yet, so `ASSUMED_VOCAB_SIZE`.
    """
    chosen, stages = config.parallel.stages, config.parallel.pipeline_parallel_size
    if isinstance(chosen, list):
        return list(chosen)
    if chosen == "even" or stages == 1:
        return even_cut(all_layers(config.model), stages)
    return balanced_cut(layer_costs(config, vocab_size))


def imbalance(costs: LayerCosts, cut: Sequence[int]) -> float:
    """Work of the largest stage / mean work of a stage; 1.0 = all stages work all the time."""
    total = sum(costs.work) + costs.first_work + costs.last_work
    return costs.largest(costs.work_of, cut) * costs.stages / total


def layer_costs(config: ResolvedConfig, vocab_size: int | None) -> LayerCosts:
    """Work in FLOPs of a micro-batch, and memory in bytes of one rank."""
    rows = padded_vocabulary(config, vocab_size or ASSUMED_VOCAB_SIZE)
    work, memory = _Work(config, rows), _Memory(config, rows)
    encoder, decoder = config.model.num_layers, config.model.decoder_layers
    counts = {False: encoder, True: decoder}  # by whether a layer is one of a decoder with cross-attention

    def each(cost: Callable[[bool], int]) -> list[int]:
        return [one for kind, count in counts.items() if count for one in [cost(kind)] * count]

    work_of_layers, states = each(work.layer), each(memory.layer_states)
    if decoder:  # what lies on the stage where the decoder begins
        work_of_layers[encoder] += work.embedding
        states[encoder] += memory.decoder_embedding_states
    stages, micro_batches = config.parallel.pipeline_parallel_size, max(1, config.num_micro_batches())
    return LayerCosts(
        work=work_of_layers,
        first_work=work.embedding,
        last_work=work.head,
        states=states,
        activations=each(memory.layer_activations),
        first_memory=memory.first_states,
        last_memory=memory.last_states + memory.logits_and_loss,
        micro_batches=[min(stages - stage, micro_batches) for stage in range(stages)],
    )


@dataclass(frozen=True)
class _Work:
    """FLOPs of one micro-batch, forward and backward, in all ranks of a tensor-parallel group."""

    config: ResolvedConfig
    rows: int

    @property
    def embedding(self) -> int:
        """Its gradient fills the whole table once per micro-batch, however few rows were looked up."""
        return ELEMENT_FLOPS * self.rows * self.config.model.hidden_size

    @property
    def head(self) -> int:
        positions = self._positions(decoder=self.config.decoder_length > 0)
        elements = LOGIT_ELEMENTS * positions * self.rows
        return PASSES * (self._per_sample(self._terms(0, 0).head) + ELEMENT_FLOPS * elements) * self._samples

    def layer(self, decoder: bool) -> int:
        """Of one layer of the single stack or the encoder, or of one decoder layer with cross-attention."""
        terms = self._terms(0, 1) if decoder else self._terms(1, 0)
        products = self._per_sample(terms.forward - terms.head)
        heads, first, second = self._score_width, self.config.data.seq_length, self.config.decoder_length
        cross_scores = 4 * heads * first * second if decoder else 0
        scores = self._per_sample(terms.attention_scores) + cross_scores  # query key^T and P V, each 2 n d per score
        model, positions = self.config.model, self._positions(decoder)
        widening = 2 if model.activation.is_gated else 1
        outside = HIDDEN_ELEMENTS * model.hidden_size + INNER_ELEMENTS * widening * model.ffn_hidden_size
        softmax = SCORE_ELEMENTS * scores // (4 * model.head_size)
        forward = products + ELEMENT_FLOPS * (outside * positions + softmax)
        again = {
            Recompute.none: 0,
            Recompute.selective: scores + ELEMENT_FLOPS * softmax,
            Recompute.full: forward,
        }[self.config.parallel.recompute]
        return (PASSES * forward + again) * self._samples

    @property
    def _samples(self) -> int:
        return self.config.train.micro_batch_size

    @property
    def _score_width(self) -> int:
        return self.config.model.num_attention_heads * self.config.model.head_size

    def _positions(self, decoder: bool) -> int:
        return self.config.decoder_length if decoder else self.config.data.seq_length

    def _terms(self, layers: int, decoder_layers: int) -> FlopsPerToken:
        model = replace(self.config.model, num_layers=layers, num_decoder_layers=decoder_layers)
        return itemised_flops(
            model, self.config.data.seq_length, self.rows, decoder_seq_length=self.config.decoder_length
        )

    def _per_sample(self, flops_per_token: float) -> int:
        return round(flops_per_token * self.config.tokens_per_sample)


@dataclass(frozen=True)
class _Memory:
    """Bytes on one rank."""

    config: ResolvedConfig
    rows: int

    def layer_states(self, decoder: bool) -> int:
        first = self.config.model.num_layers if decoder else 0
        return self._states(first + decoder, first + decoder + 1)  # the decoder's first layer has an embedding, too

    @property
    def decoder_embedding_states(self) -> int:
        return self._bytes_of(self._counts.embedding + self._counts.position_embedding)

    @property
    def first_states(self) -> int:
        return self._states(0, 0, first=True)

    @property
    def last_states(self) -> int:
        return self._states(0, 0, last=True)

    def layer_activations(self, decoder: bool) -> int:
        """Of one micro-batch."""
        return round(layer_activations(self.config, decoder=decoder).kept)

    @property
    def logits_and_loss(self) -> int:
        """Of one micro-batch: the last stage computes its backward pass at once."""
        return round(sum(head_activations(self.config, self.rows)))

    @cached_property
    def _counts(self) -> ParameterCounts:
        config = self.config
        return parameter_counts(
            config.model,
            self.rows,
            config.parallel.tensor_parallel_size,
            next_sentence=has_next_sentence_head(config),
        )

    def _states(self, start: int, stop: int, *, first: bool = False, last: bool = False) -> int:
        return self._bytes_of(self._counts.stage(stage_content(self.config.model, start, stop, first=first, last=last)))

    def _bytes_of(self, parameters: int) -> int:
        return int(model_states(self.config, parameters, self.config.parallel.data_parallel_size).total)
