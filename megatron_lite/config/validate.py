"""Checks every rule between settings, and reports all violations at once.

A rule is a function from a `Case` to messages; `RULES` lists them all. A message reads `key=value rule; remedy`. A rule
stays silent if another one has already refused a value that it depends on, so that one mistake gives one message.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.rules import (
    credentials,
    launcher,
    layout,
    lengths,
    model,
    nodes,
    objective,
    tracking,
    training,
)
from megatron_lite.config.rules.case import Case, Rule
from megatron_lite.config.rules.values import out_of_form, out_of_range
from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import ConfigError


def problems(config: RunConfig, world_size: int | None = None) -> list[str]:
    """Every violation of every rule, as `key=value rule; remedy`.

    Args:
        world_size: existing processes; None = use only what the configuration itself says.
    """
    case = Case(config, world_size)
    if leaks := list(credentials.credentials_stay_outside(case)):
        return leaks  # only these: messages of other rules show values
    return [message for rule in RULES for message in rule(case)]


def validate(config: RunConfig, world_size: int | None = None) -> None:
    """Raise one ConfigError with all problems, if there are any."""
    found = problems(config, world_size)
    if found:
        raise ConfigError(found)


def values_are_in_range(case: Case) -> Iterator[str]:
    """The ranges and rules that the fields of the schema declare."""
    for _, message in (*out_of_range(case.config), *out_of_form(case.config)):
        yield message


RULES: tuple[Rule, ...] = (
    credentials.credentials_stay_outside,
    values_are_in_range,
    layout.processes_can_be_planned,
    layout.world_size_fits_layout,
    nodes.nodes_know_where_to_meet,
    nodes.deepspeed_knows_its_hosts,
    nodes.hostfile_is_of_deepspeed,
    nodes.node_rank_is_of_a_node,
    nodes.device_of_other_machines_is_given,
    objective.script_is_there,
    objective.architecture_fits_script,
    objective.objective_fits_script,
    model.heads_divide_hidden,
    model.rotary_head_is_even,
    model.groups_divide_heads,
    model.tensor_divides_heads,
    model.tensor_divides_groups,
    model.tensor_divides_ffn,
    model.stages_have_layers,
    model.stages_are_cut_as_possible,
    model.decoder_layers_need_two_stacks,
    model.positions_fit_architecture,
    model.relative_buckets_share_distances,
    model.groups_are_of_decoders,
    model.segments_are_of_encoders,
    model.scaled_head_is_tied,
    model.family_computes_the_model,
    model.sequence_fits_positions,
    model.tokenizer_fits_vocabulary,
    objective.masked_tokens_add_up,
    objective.next_sentence_needs_segments,
    objective.weights_name_denoisers,
    objective.span_denoisers_are_described,
    objective.decoder_length_can_be_chosen,
    objective.eod_mask_needs_next_tokens,
    objective.bos_needs_a_decoder,
    lengths.lengths_fit,
    layout.sequence_parallel_needs_tensor,
    layout.zero_stage_fits_pipeline,
    layout.zero_0_is_a_reference,
    layout.adafactor_needs_whole_matrices,
    layout.offload_needs_zero_and_adamw,
    training.batch_is_whole,
    training.ramp_is_whole,
    training.tokens_are_counted,
    training.fp16_needs_a_gpu,
    training.compiled_blocks_hold_their_weights,
    training.warmup_ends,
    training.decay_follows_warmup,
    training.minimum_rate_is_lower,
    training.loss_scale_minimum_is_lower,
    training.source_is_given,
    training.something_is_held_out,
    training.weights_match_sources,
    training.prompt_is_given,
    training.kept_checkpoints_exist,
    training.window_holds_enough,
    training.rollback_has_checkpoints,
    tracking.wandb_mode_is_known,
    *launcher.LAUNCHER_RULES,
)
