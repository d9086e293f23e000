"""Rules between the sizes of a model, and between them and the layout, data or weights."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.changes import as_typed
from megatron_lite.config.derived import all_layers
from megatron_lite.config.hf.families import counterpart, model_types
from megatron_lite.config.hf.family import NoCounterpart
from megatron_lite.config.keys import choices_text, shown
from megatron_lite.config.lengths import SMALLEST_BPE
from megatron_lite.config.rules.case import SIZES, Case, divisors, either, nearest_multiples
from megatron_lite.config.schema import Architecture, PositionEmbedding
from megatron_lite.parallel.topology import even_cut

MOST_LISTED = 64  # stages whose numbers of layers a message lists

SIZES_OF_MODELS = ("model.hidden_size", "model.num_attention_heads", "model.num_query_groups", "model.ffn_hidden_size")


def heads_divide_hidden(case: Case) -> Iterator[str]:
    model = case.model
    if model.head_size is not None or not case.sound("model.num_attention_heads", "model.hidden_size"):
        return
    if model.hidden_size % model.num_attention_heads:
        yield (
            f"model.hidden_size={model.hidden_size} must be a multiple of "
            f"model.num_attention_heads={model.num_attention_heads}; "
            f"use {either(nearest_multiples(model.hidden_size, model.num_attention_heads))}, or set model.head_size"
        )


def rotary_head_is_even(case: Case) -> Iterator[str]:
    size = case.model.head_size
    if case.model.position_embedding is PositionEmbedding.rotary and size is not None and size > 0 and size % 2:
        yield (
            f"model.head_size={size} must be even, since rotary positions turn pairs; use "
            f"{either(nearest_multiples(size, 2))}"
        )


def groups_divide_heads(case: Case) -> Iterator[str]:
    groups, heads = case.model.num_query_groups, case.model.num_attention_heads
    if groups is None or not case.sound("model.num_query_groups", "model.num_attention_heads"):
        return
    if heads % groups and case.model.architecture is Architecture.decoder:
        yield (
            f"model.num_query_groups={groups} must divide model.num_attention_heads={heads}; "
            f"use {either(divisors(heads))}"
        )


def tensor_divides_heads(case: Case) -> Iterator[str]:
    heads = case.model.num_attention_heads
    if case.sound(*SIZES, "model.num_attention_heads") and heads % case.tensor:
        yield (
            f"parallel.tensor_parallel_size={case.tensor} must divide model.num_attention_heads={heads}; "
            f"use {either(divisors(heads))}"
        )


def tensor_divides_groups(case: Case) -> Iterator[str]:
    groups = case.model.num_query_groups
    if groups is None or groups == case.model.num_attention_heads:
        return  # same as the number of heads, which another rule covers
    if case.sound(*SIZES, "model.num_query_groups") and groups % case.tensor:
        yield (
            f"parallel.tensor_parallel_size={case.tensor} must divide model.num_query_groups={groups}, since each rank "
            f"holds whole groups; use {either(divisors(groups))}"
        )


def tensor_divides_ffn(case: Case) -> Iterator[str]:
    inner = case.model.ffn_hidden_size
    if (
        inner is None
        or not case.sound(*SIZES, "model.ffn_hidden_size", "model.hidden_size")
        or inner % case.tensor == 0
    ):
        return
    yield (
        f"parallel.tensor_parallel_size={case.tensor} must divide model.ffn_hidden_size={inner}; "
        f"set model.ffn_hidden_size to {either(nearest_multiples(inner, case.tensor))}"
    )


def stages_have_layers(case: Case) -> Iterator[str]:
    layers = all_layers(case.model)
    if not case.sound(*SIZES, "model.num_layers", "model.num_decoder_layers") or case.pipeline <= layers:
        return
    name = "model.num_layers" + (" + model.num_decoder_layers" if layers > case.model.num_layers else "")
    yield (
        f"parallel.pipeline_parallel_size={case.pipeline} is more than {name}={layers}, so a stage would be empty; use "
        f"{layers} or fewer"
    )


def stages_are_cut_as_possible(case: Case) -> Iterator[str]:
    """The value of parallel.stages: a word, or a list that fits the stages and the layers."""
    stages = case.config.parallel.stages
    if stages in ("balanced", "even"):
        return
    value = f"parallel.stages={as_typed(stages)}"
    if not isinstance(stages, list) or not all(type(count) is int for count in stages):
        yield f"{value} is no way to cut; use balanced, even, or a list of one integer for each stage"
        return
    if not case.sound(*SIZES, "model.num_layers", "model.num_decoder_layers"):
        return
    if problem := _problem_of_cut(case, stages):
        layers = all_layers(case.model)
        listed = f"{as_typed(even_cut(layers, case.pipeline))}, " if case.pipeline <= min(layers, MOST_LISTED) else ""
        yield f"{value} {problem}; use {listed}balanced or even"


def _problem_of_cut(case: Case, stages: list[int]) -> str | None:
    layers = all_layers(case.model)
    name = "model.num_layers" + (" + model.num_decoder_layers" if layers > case.model.num_layers else "")
    if len(stages) != case.pipeline:
        return (
            f"must have one number of layers for each of parallel.pipeline_parallel_size={case.pipeline} stages, not "
            f"{len(stages)}"
        )
    if min(stages) < 0:
        return f"must have no negative number, as {min(stages)}"
    if sum(stages) != layers:
        return f"must add up to {name}={layers}, not to {sum(stages)}"
    if 0 in stages[1:-1]:
        return (
            f"leaves stage {stages.index(0, 1)} empty: only the first stage, which holds the embedding, and the last "
            "one, which holds the head, may have no layers"
        )
    return None


def decoder_layers_need_two_stacks(case: Case) -> Iterator[str]:
    model = case.model
    if model.num_decoder_layers is not None and model.architecture is not Architecture.encoder_decoder:
        yield (
            f"model.num_decoder_layers={model.num_decoder_layers} needs model.architecture=encoder_decoder, not "
            f"{model.architecture.value}, whose only stack has model.num_layers; set model.num_decoder_layers=null"
        )


def positions_fit_architecture(case: Case) -> Iterator[str]:
    model, architecture = case.model, case.model.architecture
    homes = {
        PositionEmbedding.relative: (Architecture.encoder_decoder, "learned"),
        PositionEmbedding.rotary: (Architecture.decoder, "learned"),
    }
    home, other = homes.get(model.position_embedding, (architecture, ""))
    if architecture is not home:
        if architecture is Architecture.decoder:
            other = "learned or rotary"
        elif architecture is Architecture.encoder_decoder:
            other = "learned or relative"
        yield (
            f"model.position_embedding={model.position_embedding.value} needs model.architecture={home.value}, not "
            f"{architecture.value}; use {other}"
        )


def relative_buckets_share_distances(case: Case) -> Iterator[str]:
    """An encoder halves the buckets by direction; half of these hold one distance each, half grow up to the maximum."""
    model = case.model
    keys = ("model.relative_buckets", "model.relative_max_distance")
    if model.position_embedding is not PositionEmbedding.relative or not case.sound(*keys):
        return
    if model.relative_buckets % 4:
        yield (
            f"model.relative_buckets={model.relative_buckets} must be a multiple of 4: two directions, near and far; "
            f"use {either(nearest_multiples(model.relative_buckets, 4))}"
        )
    elif model.relative_max_distance <= model.relative_buckets // 2:
        yield (
            f"model.relative_max_distance={model.relative_max_distance} must be more than half of "
            f"model.relative_buckets={model.relative_buckets}, which are single distances; use "
            f"{model.relative_buckets // 2 + 1} or more"
        )


def groups_are_of_decoders(case: Case) -> Iterator[str]:
    model = case.model
    if model.architecture is Architecture.decoder or model.num_query_groups == model.num_attention_heads:
        return
    if case.sound("model.num_query_groups", "model.num_attention_heads"):
        yield (
            f"model.num_query_groups={model.num_query_groups} needs model.architecture=decoder, not "
            f"{model.architecture.value}, whose heads have keys and values of their own; set "
            "model.num_query_groups=null"
        )


def segments_are_of_encoders(case: Case) -> Iterator[str]:
    model = case.model
    if case.sound("model.num_segments") and model.num_segments and model.architecture is not Architecture.encoder:
        yield (
            f"model.num_segments={model.num_segments} needs model.architecture=encoder, not "
            f"{model.architecture.value}, whose samples have no parts; use 0"
        )


def scaled_head_is_tied(case: Case) -> Iterator[str]:
    if case.model.scale_tied_head and not case.model.tie_embeddings:
        yield (
            "model.scale_tied_head=true needs model.tie_embeddings=true: a head of its own learns its scale; set "
            "model.scale_tied_head=false"
        )


def family_computes_the_model(case: Case) -> Iterator[str]:
    """Only what the settings themselves decide: next-sentence heads are BERT's and have a rule of their own."""
    name = case.model.family
    if name is None or not case.sound("model.family", *SIZES_OF_MODELS):
        return
    if name not in model_types():
        yield f"model.family={shown(name)} is no model_type that we know; {choices_text(name, model_types())}"
        return
    if case.model.head_size is None:
        return  # the heads do not divide the hidden size, which another rule reports
    try:
        counterpart(case.model)
    except NoCounterpart as reason:
        yield f"model.family={name} is not what these settings make: {reason}; change them, or set model.family=null"


def sequence_fits_positions(case: Case) -> Iterator[str]:
    length, positions = case.config.data.seq_length, case.model.max_position_embeddings
    if case.sound("data.seq_length", "model.max_position_embeddings") and length > positions:
        learned = case.model.position_embedding is PositionEmbedding.learned
        fixed = learned and case.model.init_from is not None  # the loaded table has a fixed number of rows
        yield (
            f"data.seq_length={length} is longer than model.max_position_embeddings={positions}; use at most "
            f"{positions}" + ("" if fixed else f", or set model.max_position_embeddings={length}")
        )


def tokenizer_fits_vocabulary(case: Case) -> Iterator[str]:
    data, vocabulary = case.config.data, case.model.vocab_size
    trained = data.tokenizer == "train" and case.sound("model.vocab_size", "data.tokenizer_vocab_size")
    if trained and vocabulary is not None and data.tokenizer_vocab_size > vocabulary:
        remedies = [f"use at most {vocabulary}"] if vocabulary >= SMALLEST_BPE else []
        remedies += ["set model.vocab_size=null"] if case.model.init_from is None else []  # else the weights'
        remedies = remedies or ["name the tokenizer of model.init_from in data.tokenizer"]
        yield (
            f"data.tokenizer_vocab_size={data.tokenizer_vocab_size} is more than model.vocab_size={vocabulary}; "
            f"{', or '.join(remedies)}"
        )
