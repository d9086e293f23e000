"""The rows of the plan on the model's sizes: parameters, FLOPs, and what each stage holds.

Where the vocabulary size is unknown, figures contain it as `v`: they all grow linearly with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_lite.config.derived import (
    ParameterCounts,
    StageContent,
    has_next_sentence_head,
    padded_vocabulary,
    parameter_counts,
    stage_contents,
)
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.files import size_text
from megatron_lite.planning.activations import stage_activations
from megatron_lite.planning.flops import PASSES, flops_of_run
from megatron_lite.planning.memory import model_states
from megatron_lite.planning.stages import layers_of_stages


def model_lines(config: ResolvedConfig, vocab_size: int | None) -> Iterator[tuple[str, str]]:
    """(name, text) of each row about the whole model."""
    yield "vocabulary", _vocabulary(config, vocab_size)
    yield "parameters", _parameters(config, vocab_size)
    if vocab_size is None:
        yield "FLOPs per token", linear_in_v(lambda v: flops_of_run(config, v).training, ".3e")
    else:
        yield from _flops(config, vocab_size)


def _vocabulary(config: ResolvedConfig, vocab_size: int | None) -> str:
    if vocab_size is None:
        return "v, known once the data is prepared (model.vocab_size=null)"
    rows, tensor = padded_vocabulary(config, vocab_size), config.parallel.tensor_parallel_size
    return (
        f"{vocab_size:,} padded to {rows:,} = {rows // tensor:,} rows x {tensor} tensor-parallel "
        f"(multiple of {config.model.vocab_pad_multiple})"
    )


def linear_in_v(figure: Callable[[int], float], style: str = ",", divisor: int = 1) -> str:
    """`constant + v x slope` of a figure that grows linearly with the vocabulary.

    Args:
        divisor: number of ranks that share the vocabulary; the slope is then that of v / divisor.
    """
    constant, slope = figure(0), figure(divisor) - figure(0)
    v = "v" if divisor == 1 else f"v/{divisor}"
    if not slope:
        return format(constant, style)
    product = v if slope == 1 else f"{v} x {slope:{style}}"
    return f"{constant:{style}} + {product}" if constant else product


def _counts(config: ResolvedConfig, vocabulary: int, tensor_parallel_size: int = 1) -> ParameterCounts:
    return parameter_counts(
        config.model, vocabulary, tensor_parallel_size, next_sentence=has_next_sentence_head(config)
    )


def _parameters(config: ResolvedConfig, vocab_size: int | None) -> str:
    """The total and its parts; parts that both stacks have are counted for both."""
    counts = _counts(config, vocab_size or 0)
    stacks = 2 if counts.decoder_layer else 1
    plural = "s" if stacks == 2 else ""

    def shown(figure: Callable[[ParameterCounts], int]) -> str:
        if vocab_size is not None:
            return f"{figure(counts):,}"
        return linear_in_v(lambda v: figure(_counts(config, v)))

    parts = [f"{config.model.num_layers} layers of {counts.layer:,}"]
    if stacks == 2:
        parts = [
            f"{config.model.num_layers} encoder layers of {counts.layer:,}",
            f"{config.model.decoder_layers} decoder layers of {counts.decoder_layer:,}",
        ]
    parts.append(f"embedding {shown(lambda c: c.embedding)}")
    parts += _named(
        ("positions", stacks * counts.position_embedding),
        ("relative positions", stacks * counts.relative_bias),
        ("segments", counts.segment_embedding),
        ("embedding norm" + plural, stacks * counts.embedding_norm),
        ("head transform", counts.head_transform),
    )
    parts.append("head tied" if counts.tied else f"head {shown(lambda c: c.head)}")
    if config.model.head_bias:
        parts.append(f"head bias {shown(lambda c: c.head_bias)}")
    parts += _named(
        ("pooler and next-sentence head", counts.next_sentence),
        ("final norm" + plural, stacks * counts.final_norm),
    )
    return f"{shown(lambda c: c.total)} = {', '.join(parts)}; padding not counted"


def _named(*sizes: tuple[str, int]) -> list[str]:
    """`name size` of the parts that exist."""
    return [f"{name} {size:,}" for name, size in sizes if size]


def _flops(config: ResolvedConfig, vocab_size: int) -> Iterator[tuple[str, str]]:
    terms = flops_of_run(config, vocab_size)
    tokens = config.train.global_batch_size * config.tokens_per_sample
    scores = {"decoder": "causal scores", "encoder": "scores", "encoder_decoder": "scores of both stacks"}
    cross = f"cross-attention {terms.cross_attention:.2e} + " if terms.cross_attention else ""
    yield (
        "FLOPs per token",
        f"{terms.training:.3e} = {PASSES} x (qkv {terms.query_key_value:.2e} + "
        f"{scores[config.model.architecture.value]} {terms.attention_scores:.2e} + projection {terms.projection:.2e} + "
        f"{cross}mlp {terms.mlp:.2e} + head {terms.head:.2e})",
    )
    parameters = _counts(config, vocab_size).total
    yield (
        "compute",
        f"{terms.training * tokens:.3e} FLOPs a step, {terms.training * tokens * config.train.steps:.3e} in all; "
        f"{tokens * config.train.steps / parameters:.3g} tokens per parameter",
    )


def stage_lines(config: ResolvedConfig, vocab_size: int | None) -> Iterator[str]:
    """One line per stage: its layers, the parameters that each of its ranks holds, the bytes of their states."""
    tensor = config.parallel.tensor_parallel_size
    for stage, content in enumerate(stage_contents(config.model, layers_of_stages(config, vocab_size))):
        line = f"  stage {stage}: {_what_lies_on(content, config)}; "
        if vocab_size is None:
            yield f"{line}{_held(config, content)} parameters a rank"
            continue
        parameters = _counts(config, padded_vocabulary(config, vocab_size), tensor).stage(content)
        states = model_states(config, parameters, config.parallel.data_parallel_size)
        active = stage_activations(config, content, stage, padded_vocabulary(config, vocab_size))
        optimizer = size_text(states.optimizer)
        if config.parallel.offload_optimizer:
            optimizer = f"none (its {optimizer} are in host memory)"
        logits = f" + logits and loss {size_text(active.logits + active.loss)}" if active.logits else ""
        yield (
            f"{line}{parameters:,} parameters a rank; {size_text(states.on_device(config) + active.total)} = weights "
            f"{size_text(states.weights)} + gradients {size_text(states.gradients)} + optimizer {optimizer} + "
            f"activations {size_text(active.total - active.logits - active.loss)} "
            f"({_plural(active.micro_batches, 'micro-batch', 'micro-batches')}){logits}"
        )


def _held(config: ResolvedConfig, content: StageContent) -> str:
    """Parameters of one rank of a stage, as a function of v, here the padded vocabulary."""
    tensor = config.parallel.tensor_parallel_size
    return linear_in_v(lambda v: _counts(config, v, tensor).stage(content), divisor=tensor)


def _what_lies_on(content: StageContent, config: ResolvedConfig) -> str:
    """The layers on a stage, in the order in which a sample passes through them."""
    counts = _counts(config, 0)
    encoder = "encoder layer" if counts.decoder_layer else "layer"
    positions = ", positions" if counts.position_embedding else ""
    parts = []
    if content.first:
        parts.append("embedding" + positions + (", segments" if counts.segment_embedding else ""))
    if content.layers:
        parts.append(_plural(content.layers, encoder))
    if content.begins_decoder:
        parts += ["encoder's final norm"] * bool(counts.final_norm)
        copy = "" if content.first else " (copy)"
        parts.append(f"decoder embedding{copy}{positions}")
    if content.decoder_layers:
        parts.append(_plural(content.decoder_layers, "decoder layer"))
    if content.last:
        parts += ["final norm"] * bool(counts.final_norm) + ["head"]
        parts += ["pooler and next-sentence head"] * bool(counts.next_sentence)
    return ", ".join(parts)


def _plural(count: int, name: str, names: str = "") -> str:
    return f"{count} {name if count == 1 else names or name + 's'}"
