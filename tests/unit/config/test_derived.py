"""Derived sizes against figures worked out by hand."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from megatron_lite.config.compose import compose
from megatron_lite.config.derived import (
    all_layers,
    data_parallel_size,
    fill_in,
    fill_in_model,
    padded_vocabulary,
    parameter_counts,
    resolve,
    resolve_model,
    run_directory,
    stage_contents,
)
from megatron_lite.config.frozen import as_containers, from_containers, render
from megatron_lite.config.schema import Activation, Architecture, ModelConfig
from megatron_lite.config.validate import validate
from megatron_lite.errors import ConfigError
from megatron_lite.parallel.topology import Topology, even_cut


def test_a_resolved_model_fills_what_is_open_and_keeps_what_is_set() -> None:
    filled = resolve_model(ModelConfig(hidden_size=768, num_attention_heads=12))
    assert (filled.num_query_groups, filled.head_size, filled.ffn_hidden_size) == (12, 64, 3072)
    given = ModelConfig(num_query_groups=2, head_size=80, ffn_hidden_size=100)
    assert fill_in_model(given) == given


def test_only_two_stacks_have_decoder_layers() -> None:
    assert resolve_model(ModelConfig()).decoder_layers == 0
    assert resolve_model(ModelConfig(architecture=Architecture.encoder_decoder, num_layers=3)).decoder_layers == 3


@pytest.mark.parametrize("activation", [Activation.swiglu, Activation.geglu])
@pytest.mark.parametrize(("hidden", "inner"), [(4096, 10944), (576, 1536), (128, 384), (48, 128)])
def test_gated_width_is_eight_thirds_rounded_up_to_64(hidden: int, inner: int, activation: Activation) -> None:
    model = ModelConfig(hidden_size=hidden, activation=activation)
    assert resolve_model(model).ffn_hidden_size == inner


def test_resolving_is_idempotent_and_does_not_touch_its_argument() -> None:
    config = compose("pretrain_gpt", ["parallel=tp2"])
    before = repr(config)
    once = resolve(config, device="cpu")
    assert resolve(once) == once
    assert repr(config) == before
    assert (once.launcher.num_processes, once.launcher.device) == (2, "cpu")


@pytest.mark.parametrize("script", ["pretrain_gpt", "pretrain_bert", "pretrain_t5"])
def test_what_is_saved_does_not_tell_the_types_apart(script: str) -> None:
    config = compose(script, ["parallel=tp2"])
    resolved, filled = resolve(config, device="cpu"), fill_in(config, device="cpu")
    assert type(resolved) is not type(filled)
    assert render(resolved) == render(filled)
    assert as_containers(resolved) == as_containers(filled)
    assert resolve(from_containers(as_containers(resolved))) == resolved
    assert pickle.loads(pickle.dumps(resolved)) == resolved


def test_a_resolved_configuration_has_nothing_open() -> None:
    config = resolve(compose("pretrain_gpt", []), device="cpu")
    with pytest.raises(ConfigError, match=r"model\.head_size, model\.ffn_hidden_size cannot be derived"):
        replace(config.model, head_size=None, ffn_hidden_size=None)
    indivisible = compose("pretrain_gpt", ["model.num_attention_heads=3"])
    with pytest.raises(
        ConfigError, match=r"^model\.hidden_size=128 must be a multiple of"
    ):  # by the rule, with a remedy
        validate(fill_in(indivisible))
    with pytest.raises(ConfigError, match=r"model\.head_size cannot be derived"):
        resolve(indivisible)


def test_a_rank_has_one_topology() -> None:
    config = resolve(compose("pretrain_gpt", ["parallel=dp2_tp2_pp2"]), device="cpu")
    assert config.topology is config.topology
    assert config.topology == Topology(2, 2, 2)
    other = replace(config, parallel=replace(config.parallel, data_parallel_size=1))
    assert other.topology == Topology(1, 2, 2)


def test_open_data_parallel_size_follows_the_processes() -> None:
    config = compose("pretrain_gpt", ["parallel=tp2", "parallel.data_parallel_size=null"])
    assert data_parallel_size(config) == 1
    assert data_parallel_size(config, 8) == 4
    assert resolve(config, world_size=8).parallel.data_parallel_size == 4
    assert fill_in(config, world_size=7).parallel.data_parallel_size is None  # no layout has 7: validation says so
    with_processes = compose("pretrain_gpt", ["parallel=tp2", "parallel.data_parallel_size=null",
                                              "launcher.num_processes=6"])  # fmt: skip
    assert resolve(with_processes).topology.world_size == 6


@pytest.mark.parametrize("key", ["processes_per_node", "gpus_per_node"])
def test_nodes_and_what_each_has_are_the_number_of_processes(key: str) -> None:
    words = ["parallel=tp2", "parallel.data_parallel_size=null", "launcher.nodes=3", f"launcher.{key}=4"]
    config = resolve(compose("pretrain_gpt", words))
    assert (config.launcher.num_processes, config.parallel.data_parallel_size, config.processes_per_node) == (12, 6, 4)


def test_processes_of_a_layout_are_dealt_out_to_the_nodes() -> None:
    config = resolve(compose("pretrain_gpt", ["parallel=dp2_tp2", "launcher.nodes=2"]))
    assert config.processes_per_node == 2


def test_micro_batches() -> None:
    words = ["experiment=demo", "train.global_batch_size=32", "train.micro_batch_size=4"]
    config = resolve(compose("pretrain_gpt", words))
    assert config.num_micro_batches() == 4
    assert config.num_micro_batches(global_batch_size=16) == 2


def test_padded_vocabulary_gives_every_rank_whole_multiples() -> None:
    config = compose("pretrain_gpt", ["parallel=tp2"])
    assert padded_vocabulary(config, 50257) == 50432
    assert padded_vocabulary(config, 50432) == 50432


def test_run_folder_is_stable_and_names_the_layout() -> None:
    config = compose("pretrain_gpt", ["parallel=dp2_tp2_pp2"])
    assert str(run_directory(config)) == "runs/pretrain_gpt-gpt_tiny"
    assert str(run_directory(compose("pretrain_gpt", ["train.run_dir=mine/run"]))) == "mine/run"


FAMILIES = [("pretrain_gpt", "gpt_tiny"), ("pretrain_gpt", "llama_tiny"), ("pretrain_bert", "bert_tiny"),
            ("pretrain_t5", "t5_tiny"), ("pretrain_t5", "t5_v1_1_base"), ("pretrain_t5", "bart_base")]  # fmt: skip


@pytest.mark.parametrize(("script", "name"), FAMILIES)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_stages_together_hold_the_model(script: str, name: str, stages: int) -> None:
    """What several stages need has a copy on each of them, and is there once where these are one."""
    model = resolve_model(compose(script, [f"model={name}"]).model)
    counts = parameter_counts(model, 8192, next_sentence=name == "bert_tiny")
    contents = stage_contents(model, even_cut(all_layers(model), stages))
    words = {0} | {i for i, content in enumerate(contents) if content.begins_decoder}
    words |= {stages - 1} if counts.tied else set()
    stacks = sum((content.layers > 0) + (content.decoder_layers > 0) for content in contents)
    biases = stacks - (2 if counts.decoder_layer else 1)
    copies = (len(words) - 1) * counts.embedding + biases * counts.relative_bias
    assert sum(map(counts.stage, contents)) == counts.total + copies


def test_contents_of_stages() -> None:
    """Six encoder and two decoder layers: the encoder may end within a stage or with it."""
    two = ModelConfig(architecture=Architecture.encoder_decoder, num_layers=6, num_decoder_layers=2)
    model, one = resolve_model(two), resolve_model(ModelConfig())
    assert all_layers(model) == 8
    within = stage_contents(model, [4, 4])
    assert [(content.layers, content.decoder_layers) for content in within] == [(4, 0), (2, 2)]
    assert [content.begins_decoder for content in within] == [False, True]
    at_bound = stage_contents(model, [2, 2, 2, 2])
    assert [(content.layers, content.decoder_layers) for content in at_bound] == [(2, 0), (2, 0), (2, 0), (0, 2)]
    assert [content.begins_decoder for content in at_bound] == [False, False, False, True]
    assert [(content.first, content.last) for content in stage_contents(one, [2, 2])] == [
        (True, False),
        (False, True),
    ]
    assert not any(content.begins_decoder for content in stage_contents(one, [2, 2]))
    alone = stage_contents(model, [0, 8, 0])
    assert [(content.layers, content.decoder_layers) for content in alone] == [(0, 0), (6, 2), (0, 0)]
    assert [content.begins_decoder for content in alone] == [False, True, False]


def test_tokens_of_a_sample_are_those_of_both_stacks() -> None:
    assert resolve(compose("pretrain_gpt", [])).tokens_per_sample == 128
    assert resolve(compose("pretrain_bert", [])).tokens_per_sample == 128
    assert resolve(compose("pretrain_t5", ["data.seq_length=512"])).tokens_per_sample == 512 + 114
    assert resolve(compose("pretrain_t5", ["objective=bart_denoising"])).tokens_per_sample == 2 * 128


def test_one_tensor_parallel_rank_of_both_stacks_by_hand() -> None:
    """T5 of h 128, 8 heads of 16, gated f 384, v 8192 on two ranks: relative bias split by heads, norms whole."""
    model = resolve(compose("pretrain_t5", [])).model
    counts = parameter_counts(model, 8192, tensor_parallel_size=2)
    attention, mlp, norm = 4 * 128 * 64, 3 * 128 * 192, 128
    assert counts.layer == attention + mlp + 2 * norm
    assert counts.decoder_layer == 2 * attention + mlp + 3 * norm
    assert (counts.relative_bias, counts.final_norm, counts.position_embedding) == (32 * 4, norm, 0)
    assert counts.embedding == counts.head == 4096 * 128
    first, second = stage_contents(model, [2, 2])
    assert counts.stage(first) == counts.embedding + 2 * counts.layer + counts.relative_bias
    on_second = counts.embedding + 2 * counts.decoder_layer + counts.relative_bias + 2 * norm + counts.head
    assert counts.stage(second) == on_second


def test_heads_of_bert_by_hand() -> None:
    """On two ranks the bias of the head is split; transform, pooler and next-sentence head are whole on each."""
    model = resolve(compose("pretrain_bert", [])).model
    counts = parameter_counts(model, 8192, tensor_parallel_size=2, next_sentence=True)
    assert counts.head_transform == 128 * 128 + 128 + 256
    assert counts.head_bias == 4096
    assert counts.next_sentence == 128 * 128 + 128 + 2 * 128 + 2
    assert counts.segment_embedding == 2 * 128
    assert (counts.embedding_norm, counts.final_norm) == (256, 0)
    assert parameter_counts(model, 8192).next_sentence == 0


def test_one_tensor_parallel_rank_by_hand() -> None:
    """h 128, 4 heads, f 512, v 8192, two ranks: matrices are halved, norms and the biases behind them are not."""
    counts = parameter_counts(resolve_model(ModelConfig()), 8192, tensor_parallel_size=2)
    attention = 128 * 3 * 64 + 3 * 64 + 64 * 128 + 128
    mlp = 128 * 256 + 256 + 256 * 128 + 128
    assert counts.layer == attention + mlp + 2 * 2 * 128
    assert counts.embedding == 4096 * 128
    assert counts.position_embedding == 1024 * 128
    assert counts.final_norm == 256


def test_a_home_in_the_run_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """`train.run_dir=~/run`: a shell replaces ~ only at the beginning of a word."""
    monkeypatch.setenv("HOME", "/home/me")
    assert resolve(compose("pretrain_gpt", ["train.run_dir=~/run"])).train.run_dir == "/home/me/run"
    unknown = "~nobody-of-this-name/run"  # left for the rules to refuse
    assert resolve(compose("pretrain_gpt", [f"train.run_dir={unknown}"])).train.run_dir == unknown
