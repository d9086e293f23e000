"""What validates also trains: random valid configurations of tiny models, two steps each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from megatron_lite.config.compose import compose
from megatron_lite.config.derived import fill_in
from megatron_lite.config.validate import problems
from tests.integration.runs import losses, run_warm

DRAWS = 10
LAYOUTS = (
    "dp1_tp1_pp1",
    "dp2_tp1_pp1",
    "dp1_tp2_pp1",
    "dp1_tp1_pp2",
)  # two ranks at most: the suite's time is CPU time
NUMBERS = {
    "model.num_layers": st.integers(1, 4),
    "model.hidden_size": st.sampled_from((16, 24, 40)),
    "model.num_attention_heads": st.sampled_from((1, 2, 4)),
    "model.num_query_groups": st.sampled_from((None, 1, 2)),
    "model.head_size": st.sampled_from((None, 2, 8)),
    "model.ffn_hidden_size": st.sampled_from((None, 2, 50)),
    "model.vocab_pad_multiple": st.sampled_from((1, 128)),
    "model.norm_epsilon": st.floats(1.2e-38, 1.0),
    "model.rotary_base": st.floats(1.0, 1e12),
    "model.init_std": st.floats(1.2e-38, 1.0),
    "model.embedding_dropout": st.floats(0.0, 0.9999998),
    "model.attention_dropout": st.floats(0.0, 0.9999998),
    "model.hidden_dropout": st.floats(0.0, 0.9999998),
    "model.ffn_dropout": st.floats(0.0, 0.9999998),
    "data.seq_length": st.integers(1, 64),
    "optimizer.learning_rate": st.floats(1.2e-38, 1.0),
    "optimizer.min_learning_rate": st.floats(0.0, 1.0),
    "optimizer.warmup_steps": st.integers(0, 1),
    "optimizer.decay_steps": st.sampled_from((None, 2, 10**6)),
    "optimizer.beta1": st.floats(0.0, 0.9999998),
    "optimizer.beta2": st.floats(0.0, 0.9999998),
    "optimizer.epsilon": st.floats(1.2e-38, 1.0),
    "optimizer.weight_decay": st.floats(0.0, 1000.0),
    "optimizer.clip_grad_norm": st.floats(0.0, 3.4e38),
    "train.seed": st.integers(0, 2**63 - 1),
    "train.micro_batch_size": st.integers(1, 2),
    "train.global_batch_size": st.integers(1, 8),
    "train.eval_interval": st.integers(0, 3),
    "train.save_interval": st.integers(0, 3),
    "train.log_interval": st.integers(1, 3),
    "train.generate_tokens": st.integers(0, 4),
    "stability.window": st.integers(1, 10**4),
    "stability.min_steps": st.integers(1, 3),
    "stability.layer_interval": st.integers(0, 2),
}
CHOICES = {
    "model.normalization": ("layernorm", "rmsnorm"),
    "model.norm_placement": ("pre", "post"),
    "model.activation": ("relu", "gelu", "gelu_tanh", "swiglu", "geglu"),
    "model.position_embedding": ("learned", "rotary", "relative"),
    "model.tie_embeddings": ("true", "false"),
    "model.attention_bias": ("true", "false"),
    "model.init": ("normal", "plain", "t5"),
    "parallel.zero_stage": ("0", "1", "2", "3"),
    "parallel.recompute": ("none", "selective", "full"),
    "parallel.sequence_parallel": ("false", "true"),
    "optimizer.decay": ("constant", "linear", "cosine", "inverse_sqrt"),
    "train.precision": ("fp32", "bf16"),
    "stability.on_spike": ("warn", "skip_step"),
}
OBJECTIVES = {
    "pretrain_gpt": ("causal_lm", "prefix_lm", "fill_in_the_middle"),
    "pretrain_bert": ("masked_lm", "masked_lm_nsp"),
    "pretrain_t5": ("span_corruption", "bart_denoising", "ul2"),
}
PRESETS = {"pretrain_gpt": ("gpt_tiny", "llama_tiny"), "pretrain_bert": ("bert_tiny",), "pretrain_t5": ("t5_tiny",)}
FEW = 10  # settings that are drawn beside the layout: with all of them hardly a draw would be valid


@st.composite
def configurations(draw: DrawFn) -> tuple[str, list[str]]:
    """A script and its words, of which `validate` has nothing to say."""
    script = draw(st.sampled_from(sorted(PRESETS)))
    words = [
        f"model={draw(st.sampled_from(PRESETS[script]))}",
        f"objective={draw(st.sampled_from(OBJECTIVES[script]))}",
        f"parallel={draw(st.sampled_from(LAYOUTS))}",
        f"optimizer={draw(st.sampled_from(('adamw', 'sgd')))}",
    ]
    for key in draw(st.lists(st.sampled_from([*NUMBERS, *CHOICES]), min_size=4, max_size=FEW, unique=True)):
        value = draw(NUMBERS[key] if key in NUMBERS else st.sampled_from(CHOICES[key]))
        words.append(f"{key}={'null' if value is None else value}")
    config = fill_in(compose(script, [*TINY, *words]), device="cpu")
    assume(not problems(config))
    return script, words


TINY = [
    "model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=2", "data.seq_length=32",
    "data.tokenizer_vocab_size=512", "train.micro_batch_size=1", "train.global_batch_size=4", "train.steps=2",
    "train.eval_interval=0", "train.eval_batches=1", "train.save_interval=0", "train.generate_tokens=0",
    "optimizer.warmup_steps=0", "tracking.plot=false",
]  # fmt: skip


@pytest.mark.slow
@settings(
    max_examples=DRAWS,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # each example is a run: what fails is shown as it was drawn
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much, HealthCheck.too_slow],
)
@given(drawn=configurations())
def test_what_validates_trains(
    drawn: tuple[str, list[str]], tiny: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    script, words = drawn
    run_dir: Path = tmp_path_factory.mktemp("drawn") / "run"
    finished = run_warm(tiny("run", *TINY, *words, f"train.run_dir={run_dir}"), script=script)
    assert finished.code == 0, f"{script} {' '.join(words)}\n{finished.out}\n{finished.err}"
    assert set(losses(run_dir)) <= {1, 2}
