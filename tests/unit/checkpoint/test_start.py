"""model.init_from: a folder is refused with what is wrong in it, or we compute from it what transformers does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lite.checkpoint.hf_files import model_files
from megatron_lite.config.derived import resolve_model
from megatron_lite.config.hf.families import of_type
from megatron_lite.config.keys import as_word
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.models.shapes import parameter_shapes
from megatron_lite.parallel.context import ParallelContext
from tests.distributed.reference_models import CASES, TOKEN_IDS, VOCAB_SIZE
from tests.tiny_models import MODELS
from tests.unit.checkpoint.starts import begin, config_of_case, parity_of, tensors_of_case, write_start

Change = Callable[[dict[str, Tensor]], object]
FAMILIES = [*MODELS, "llama_biases"]


def refusal(folder: Path, name: str, *words: str) -> str:
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        begin(folder, name, *words)
    return str(caught.value)


def copy(source: str, target: str) -> Change:
    return lambda tensors: tensors.update({target: tensors[source]})


def other(source: str, target: str) -> Change:
    return lambda tensors: tensors.update({target: tensors[source].flip(0)})


def require_parity(folder: Path, name: str, *words: str) -> None:
    found = parity_of(folder, name, *words)
    assert found.difference <= found.allowed


@pytest.mark.parametrize("name", CASES)
def test_shapes_are_those_of_the_model_that_is_built(name: str) -> None:
    case = CASES[name]
    built = {name: one.shard_spec.full_shape for name, one in case.flat(ParallelContext.single()).named_parameters()}
    assert parameter_shapes(resolve_model(case.model), VOCAB_SIZE, next_sentence=case.next_sentence) == built


@pytest.mark.parametrize(
    ("name", "head", "table", "flags"),
    [
        ("gpt2_untied", "lm_head.weight", "transformer.wte.weight", {}),
        ("llama_multi_head", "lm_head.weight", "model.embed_tokens.weight", {}),
        ("bert_untied", "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight", {}),
        ("roberta_untied", "lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight", {}),
        ("t5_v1_1", "lm_head.weight", "shared.weight", {"scale_decoder_outputs": ...}),
    ],
)
def test_a_head_of_its_own_that_config_json_calls_tied(
    name: str, head: str, table: str, flags: dict[str, Any], tmp_path: Path
) -> None:
    """transformers keeps the head; a model without it would start from other logits."""
    found = refusal(write_start(tmp_path / "m", name, tie_word_embeddings=True, **flags), name)
    assert f"{head} differs from {table} (max abs " in found
    assert "(config.json: tie_word_embeddings=true)" in found
    lost = write_start(tmp_path / "lost", name, lambda tensors: tensors.pop(head), tie_word_embeddings=False)
    assert f"{head} [301, 32] is missing (config.json: tie_word_embeddings=false)" in refusal(lost, name)


TWINS = [
    ("gpt2", "transformer.wte.weight", "lm_head.weight"),
    ("llama_tied", "model.embed_tokens.weight", "lm_head.weight"),
    ("bert", "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    ("bert", "cls.predictions.bias", "cls.predictions.decoder.bias"),
    ("bert_untied", "cls.predictions.decoder.bias", "cls.predictions.bias"),
    ("roberta", "lm_head.bias", "lm_head.decoder.bias"),
    ("t5", "shared.weight", "lm_head.weight"),
    ("t5_v1_1", "shared.weight", "encoder.embed_tokens.weight"),
    ("bart", "model.shared.weight", "model.decoder.embed_tokens.weight"),
    ("bart", "model.shared.weight", "lm_head.weight"),
]


@pytest.mark.parametrize(("name", "table", "twin"), TWINS)
def test_a_tied_tensor_may_lie_there_twice_if_both_are_equal(name: str, table: str, twin: str, tmp_path: Path) -> None:
    require_parity(write_start(tmp_path / "equal", name, copy(table, twin)), name)
    found = refusal(write_start(tmp_path / "other", name, other(table, twin)), name)
    assert f"{twin} differs from {table} (max abs" in found


BUFFERS = {
    "gpt2": {"transformer.h.1.attn.bias": (1, 1, 24, 24), "h.0.attn.masked_bias": ()},
    "llama_multi_head": {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,), "model.rotary_emb.inv_freq": (4,)},
    "bert_without_pairs": {
        "bert.embeddings.position_ids": (1, 24),
        "bert.pooler.dense.weight": (32, 32),
        "cls.seq_relationship.bias": (2,),
    },
    "roberta": {"roberta.embeddings.position_ids": (1, 24), "roberta.pooler.dense.bias": (32,)},
    "t5": {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": (8, 4)},
}


@pytest.mark.parametrize("name", BUFFERS)
def test_what_follows_from_the_settings_may_be_there(name: str, tmp_path: Path) -> None:
    extra = {key: torch.ones(shape) for key, shape in BUFFERS[name].items()}
    require_parity(write_start(tmp_path / "m", name, lambda tensors: tensors.update(extra)), name)


@pytest.mark.parametrize(
    ("name", "flags", "problem"),
    [
        ("llama_biases", {"attention_bias": False}, "q_proj.bias [32] is left over: no part of the model takes it"),
        ("llama_biases", {"attention_bias": False}, "(config.json: attention_bias=false)"),
        ("llama_biases", {"mlp_bias": False}, "(config.json: mlp_bias=false)"),
        ("llama_multi_head", {"attention_bias": True}, "q_proj.bias [32] is missing (config.json: attention_bias=true"),
        (
            "llama_multi_head",
            {"num_hidden_layers": 1},
            "is left over: no part of the model takes it (config.json: num_",
        ),
        ("llama_multi_head", {"num_hidden_layers": 3}, "is missing (config.json: num_hidden_layers=3)"),
        ("gpt2", {"n_layer": 1}, "transformer.h.1.attn.c_attn.bias [96] is left over"),
        ("bert", {"num_hidden_layers": 1}, "(config.json: num_hidden_layers=1)"),
        ("t5", {"num_decoder_layers": 1}, "decoder.block.1.layer.0.SelfAttention.k.weight [64, 32] is left over"),
        ("t5", {"num_layers": 1}, "encoder.block.1.layer.0.SelfAttention.k.weight [64, 32] is left over"),
        ("bart", {"decoder_layers": 2}, "(config.json: decoder_layers=2)"),
        ("bart", {"tie_word_embeddings": False}, "tie_word_embeddings=false is not supported; supported: true"),
        ("gpt2", {"vocab_size": 300}, "and the model's is [300, 32] (config.json: vocab_size=300)"),
        ("gpt2", {"n_positions": 23}, "(config.json: n_positions=23)"),
        ("bert", {"type_vocab_size": 3}, "(config.json: type_vocab_size=3)"),
        ("bert", {"type_vocab_size": 0}, "a segment table for type_vocab_size=0"),
        ("gpt2", {"n_head": 3}, "heads of n_embd=32 / n_head=3 channels"),
        ("gpt2", {"n_head": 0}, "n_head=0 is not supported; supported: an integer >= 1"),
        ("gpt2", {"n_layer": 10**12}, "n_layer=1000000000000 is not supported; supported: no more layers than"),
        ("gpt2", {"num_attention_heads": 2}, "num_attention_heads=2 is not supported; supported: what n_head=4 says"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true is not supported"),
        ("gpt2", {"is_causal": False}, "is_causal=false is not supported"),
        ("llama_multi_head", {"tie_word_embeddings": None}, "tie_word_embeddings=null is not supported; supported: t"),
        ("gpt2", {"scale_attn_weights": None}, "scale_attn_weights=null is not supported; supported: true or false"),
        ("gpt2", {"architectures": ["GPTNeoForCausalLM"]}, "contradicts model_type=gpt2"),
        ("gpt2", {"architectures": 5}, "architectures=5 contradicts model_type=gpt2"),
        ("gpt2", {"activation_function": ["gelu"]}, "activation_function=['gelu'] is not supported"),
        ("llama_multi_head", {"rope_theta": 7.0}, "what rope_parameters.rope_theta=10000 says"),
        ("llama_multi_head", {"rope_parameters": {"rope_theta": "x"}}, "rope_parameters.rope_theta=x is not supported"),
        ("llama_multi_head", {"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention={} is not"),
        (
            "llama_multi_head",
            {"final_logit_softcapping": 30.0},
            "final_logit_softcapping=30 is a key of other",
        ),
        ("llama_multi_head", {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} is not supported"),
        ("llama_multi_head", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map={'AutoModel': 'x.Y'} is a key that we do"),
        ("bert", {"is_decoder": True}, "is_decoder=true is not supported"),
        ("bert", {"pruned_heads": {"0": [1]}}, "pruned_heads={'0': [1]} is not supported"),
        ("roberta", {"pad_token_id": 40}, "max_position_embeddings=26 is not supported; supported: more than"),
        ("t5", {"dense_act_fn": "gelu"}, "dense_act_fn=gelu is not supported; supported: what feed_forward_proj=relu"),
        ("t5", {"tie_encoder_decoder": True}, "tie_encoder_decoder=true is not supported"),
    ],
)
def test_a_config_that_contradicts_the_tensors_or_us(
    name: str, flags: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    assert problem in refusal(write_start(tmp_path / "m", name, **flags), name)


@pytest.mark.parametrize(
    ("name", "tensor", "problem"),
    [
        ("llama_multi_head", "model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.q_norm.weight [8] is"),
        ("llama_multi_head", "model.layers.2.mlp.up_proj.weight", "(config.json: num_hidden_layers=2)"),
        ("gpt2", "score.weight", "score.weight [8] is left over"),
        ("bart", "final_logits_bias", "final_logits_bias is not zero, but our model has no such parameter"),
        ("t5", "encoder.block.0.layer.0.SelfAttention.q.bias", "SelfAttention.q.bias [8] is left over"),
    ],
)
def test_an_unused_tensor_is_named(name: str, tensor: str, problem: str, tmp_path: Path) -> None:
    folder = write_start(tmp_path / "m", name, lambda tensors: tensors.update({tensor: torch.ones(8)}))
    assert problem in refusal(folder, name)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_all_faults_are_said_at_once(name: str, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        first = next(iter(tensors))
        tensors["odd"] = torch.ones(1)
        tensors[first] = tensors[first][1:]

    found = refusal(write_start(tmp_path / "m", name, change), name)
    assert "odd [1] is left over" in found
    assert "is [300, 32], and the model's is [301, 32]" in found


# Of the hub, abridged to the keys that are of interest: what each program left in its files.
OF_THE_HUB: dict[str, dict[str, Any]] = {
    "llama_tied": {  # SmolLM2
        "is_llama_config": True, "rope_interleaved": False, "rope_scaling": None, "pretraining_tp": 1,
        "transformers.js_config": {"dtype": "q4"}, "transformers_version": "4.42.3", "use_cache": True,
        "initializer_range": 0.04, "_attn_implementation_autoset": True, "unsloth_fixed": True,
    },
    "gpt2": {
        "n_ctx": 24, "summary_first_dropout": 0.1, "summary_type": "cls_index", "summary_use_proj": True,
        "summary_proj_to_labels": True, "initializer_range": 0.02, "reorder_and_upcast_attn": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "bert": {"gradient_checkpointing": False, "position_embedding_type": "absolute", "pooler_fc_size": 768,
             "directionality": "bidi", "classifier_dropout": None},
    "t5": {"n_positions": 24, "num_hidden_layers": 2, "output_past": True, "initializer_factor": 1.0,
           "is_gated_act": False, "dense_act_fn": "relu", "task_specific_params": {"summarization": {"num_beams": 4}}},
    "bart": {
        "num_hidden_layers": 2, "add_final_layer_norm": False, "normalize_before": False, "classif_dropout": 0.1,
        "normalize_embedding": True, "id2label": {"0": "LABEL_0"}, "num_beams": 4, "early_stopping": True,
        "no_repeat_ngram_size": 3, "gradient_checkpointing": False, "encoder_layerdrop": 0.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OF_THE_HUB)
def test_what_real_files_say_beside_is_no_obstacle(name: str, tmp_path: Path) -> None:
    require_parity(write_start(tmp_path / "m", name, **OF_THE_HUB[name]), name)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_transformers_saves_is_read(name: str, tmp_path: Path) -> None:
    """With every key that this version of it writes."""
    folder = write_start(tmp_path / "m", name)
    model = getattr(transformers, config_of_case(CASES[name])["architectures"][0]).from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text(json.dumps(model.config.to_dict(), default=str))
    require_parity(tmp_path / "saved", name)


# (name of the case for the script, configuration of another family, name that it is given)
SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
PAIRS_OF_SIZES = {"vocab_size": 61, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48}
RELABELLED: dict[str, tuple[str, Any, str]] = {
    "gemma": (
        "llama",
        lambda: transformers.GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=8),
        "GemmaForCausalLM",
    ),
    "gemma2": (
        "llama",
        lambda: transformers.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8),
        "Gemma2ForCausalLM",
    ),
    "qwen2": ("llama", lambda: transformers.Qwen2Config(**SIZES, num_key_value_heads=2), "Qwen2ForCausalLM"),
    "qwen3": ("llama", lambda: transformers.Qwen3Config(**SIZES, head_dim=8), "Qwen3ForCausalLM"),
    "mistral": (
        "llama",
        lambda: transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4),
        "MistralForCausalLM",
    ),
    "granite": (
        "llama",
        lambda: transformers.GraniteConfig(**SIZES, embedding_multiplier=3.0, logits_scaling=2.0),
        "GraniteForCausalLM",
    ),
    "olmo": ("llama", lambda: transformers.OlmoConfig(**SIZES), "OlmoForCausalLM"),
    "mt5": ("t5", lambda: transformers.MT5Config(**PAIRS_OF_SIZES), "MT5ForConditionalGeneration"),
    "opt": ("gpt2", lambda: transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32), "OPTForCausalLM"),
    "electra": ("bert", lambda: transformers.ElectraConfig(**SIZES, embedding_size=32), "ElectraForMaskedLM"),
    "camembert": ("roberta", lambda: transformers.CamembertConfig(**SIZES), "CamembertForMaskedLM"),
    "mbart": (
        "bart",
        lambda: transformers.MBartConfig(
            vocab_size=61, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        ),
        "MBartForConditionalGeneration",
    ),
}  # fmt: skip


@pytest.mark.parametrize("whole", [False, True], ids=["model_type", "and its class"])
@pytest.mark.parametrize("name", RELABELLED)
def test_a_model_of_another_family_under_a_known_name(name: str, whole: bool, tmp_path: Path) -> None:
    """Refused by its class, its tensors or its keys; or it is, under that name, the same to transformers."""
    family, made, architecture = RELABELLED[name]
    torch.manual_seed(1)
    model = getattr(transformers, architecture)(made())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text()) | {"model_type": family}
    if whole:
        config["architectures"] = [of_type(family)[0].architectures[0]]
    file.write_text(json.dumps(config))
    case = {"bert": "bert_without_pairs"}.get(family, family)
    case = {"llama": "llama_multi_head"}.get(case, case)
    if not whole:
        assert f"architectures=['{architecture}'] contradicts model_type={family}" in refusal(tmp_path / "m", case)
        return
    try:
        found = parity_of(tmp_path / "m", case)
    except (ConfigError, CheckpointError):
        return
    assert found.difference <= found.allowed


def test_a_key_of_gemma_without_effect_is_refused(tmp_path: Path) -> None:
    """Its tensors are those of a LLaMA, and every other key is one of LLaMA's too. Under that name transformers passes
    over the key as well, so that comparing logits would not show it."""
    for key, value in (("use_bidirectional_attention", None), ("final_logit_softcapping", 30.0)):
        folder = write_start(tmp_path / "m", "llama_geglu", **{key: value})
        for words in ([], ["model.check_init=always"]):
            found = refusal(folder, "llama_geglu", *words)
            assert f"{key}={as_word(value)} is a key of other families than model_type=llama" in found
            assert found.endswith("; give the folder with the config.json that was saved with it")
    require_parity(write_start(tmp_path / "m", "llama_geglu"), "llama_geglu")  # the remedy works


def test_the_remedies_for_an_unknown_key_work(tmp_path: Path) -> None:
    folder = write_start(tmp_path / "m", "llama_tied", my_note="a text")
    found = refusal(folder, "llama_tied")
    assert "my_note=a text is a key that we do not know for model_type=llama" in found
    assert "give the config.json that was saved with the weights, or set model.check_init=always" in found
    require_parity(folder, "llama_tied", "model.check_init=always")
    require_parity(write_start(tmp_path / "m", "llama_tied"), "llama_tied")


NEW_NAMES = ["lm_head.weight", "model.norm.bias", "x", "transformer.h.9.ln_1.weight", "cls.predictions.decoder.bias"]
FLAGS: dict[str, list[Any]] = {
    "tie_word_embeddings": [True, False, None],
    "attention_bias": [True, False],
    "hidden_act": ["gelu", "silu", "relu", "gelu_pytorch_tanh", "gelu_new", "tanh", 1],
    "activation_function": ["gelu", "gelu_new", "relu", "silu"],
    "feed_forward_proj": ["relu", "gated-gelu", "gated-silu", "gelu", "gelu_new", "x"],
    "scale_decoder_outputs": [True, False],
    "scale_attn_weights": [True, False],
    "scale_embedding": [True, False],
    "num_key_value_heads": [1, 2, 4, None],
    "num_attention_heads": [1, 2, 8, 3],
    "head_dim": [4, 8, 16, None],
    "n_head": [1, 2, 8],
    "num_heads": [2, 4, 8],
    "d_kv": [8, 16, 32],
    "encoder_attention_heads": [2, 4],
    "decoder_attention_heads": [2, 4],
    "n_inner": [None, 64, 128],
    "rope_theta": [500.0, 10000.0],
    "rope_parameters": [{"rope_type": "default", "rope_theta": 99.0}, {"rope_type": "linear", "factor": 2.0}, None],
    "rope_scaling": [None, {"type": "dynamic", "factor": 2.0}],
    "rms_norm_eps": [1e-5, 0.1, "1e-5"],
    "layer_norm_epsilon": [1e-5, 0.1],
    "layer_norm_eps": [1e-5, 0.1],
    "pad_token_id": [0, 1, 2, None],
    "relative_attention_num_buckets": [4, 8],
    "relative_attention_max_distance": [6, 128],
    "max_position_embeddings": [16, 24, 26],
    "type_vocab_size": [1, 2],
    "is_decoder": [True, False],
    "is_causal": [True, False],
    "sliding_window": [None, 4],
    "architectures": [None, ["LlamaForCausalLM"], ["BertModel"], ["T5Model"]],
    "model_type": ["gpt2", "llama", "bert", "roberta", "t5", "bart", "gemma"],
    "surprise": [1, None, True],
}


KINDS = ["drop", "add", "rename", "reshape", "cast", "retie", "flag", "unset"]


def _mutate(data: st.DataObject, kind: str, name: str) -> tuple[Change, dict[str, Any], list[str]]:
    """A change of a case's folder, and the words of which a refusal must hold one."""
    tensors, config = tensors_of_case(name), config_of_case(CASES[name])
    if kind == "unset":
        key = data.draw(st.sampled_from(sorted(config)))
        return lambda tensors: None, {key: ...}, [key, *tensors]
    if kind == "flag":
        key = data.draw(st.sampled_from([key for key in FLAGS if key in config or data.draw(st.booleans())]))
        return lambda tensors: None, {key: data.draw(st.sampled_from(FLAGS[key]))}, [key, "model_type", *tensors]
    one, two = (data.draw(st.sampled_from(sorted(tensors))) for _ in range(2))
    new = data.draw(st.sampled_from(NEW_NAMES))
    changes: dict[str, Change] = {
        "drop": lambda tensors: tensors.pop(one),
        "add": lambda tensors: tensors.update({new: tensors[one] + 1}),
        "rename": lambda tensors: tensors.update({one: tensors[two], two: tensors[one]}),
        "reshape": lambda tensors: tensors.update({one: tensors[one].flatten()[:-1]}),
        "cast": lambda tensors: tensors.update({one: tensors[one].to(data.draw(st.sampled_from(DTYPES)))}),
        "retie": lambda tensors: tensors.update({new: next(iter(tensors.values()))}),
    }
    return changes[kind], {}, [one, two, new]


DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=4, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_any_folder_gives_equal_logits_or_is_refused(kind: str, data: st.DataObject) -> None:
    """Headers and config.json alone decide: no logits are compared before a folder is taken."""
    name = data.draw(st.sampled_from(FAMILIES))
    change, flags, words = _mutate(data, kind, name)
    with TemporaryDirectory() as parent:
        folder = write_start(Path(parent, "m"), name, change, **flags)
        refused = None
        try:
            config = begin(folder, name, "model.check_init=never")
        except (ConfigError, CheckpointError) as error:
            refused = str(error)
        if refused is not None:
            assert any(word in refused for word in words), refused
            return
        assert config.model.init_from == str(folder)
        require_parity(folder, name)


def test_the_family_of_weights_is_kept(tmp_path: Path) -> None:
    """A Mistral without a window computes what a LLaMA does, and its checkpoints are Mistral's."""
    folder = write_start(tmp_path / "m", "mistral")
    found = refusal(folder, "mistral", "model.family=llama")
    assert f"model.family=llama contradicts model.init_from={folder}, whose config.json has model_type=mistral" in found
    assert found.endswith("; leave model.family out, or set model.init_from=null")
    config = begin(folder, "mistral")
    assert config.model.family == "mistral"
    files = model_files(config, vocab_size=VOCAB_SIZE, tokens=TOKEN_IDS, dtype="float32")
    assert json.loads(files["config.json"])["architectures"] == ["MistralForCausalLM"]
    assert begin(write_start(tmp_path / "l", "llama"), "llama", "model.family=llama").model.family == "llama"
