"""model.check_init: one rank compares its logits with transformers', and all ranks end in the same way."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import psutil
import pytest
import torch
import transformers
from torch import Tensor

from megatron_lite.checkpoint import parity
from megatron_lite.config.hf.folder import STATE_FILE
from megatron_lite.config.schema import CheckInit, RunConfig
from megatron_lite.errors import CheckpointError, ConfigError, MegatronLiteError
from megatron_lite.train import check_init
from megatron_lite.train.check_init import check_start
from tests.distributed.harness import run_ranks
from tests.unit.checkpoint.starts import begin, write_start
from tests.unit.remedies import obeys


def start_rank(config: RunConfig, planted: bool) -> tuple[str | None, list[str]]:
    """(exit code and error, messages). `planted`: transformers computes something else than config.json says."""
    theirs = parity._theirs

    def shifted(*arguments: object) -> list[Tensor]:
        return [logits * 1.01 for logits in theirs(*arguments)]  # type: ignore[arg-type]

    lines: list[str] = []
    with mock.patch.object(parity, "_theirs", shifted) if planted else nullcontext():
        try:
            check_start(config, lines.append)
        except MegatronLiteError as error:
            return f"{error.end:d}: {error}", lines
    return None, lines


@pytest.mark.parametrize("planted", [False, True])
@obeys("megatron_lite/train/check_init.py:_check")
def test_one_rank_looks_and_all_know(planted: bool, tmp_path: Path) -> None:
    config = begin(write_start(tmp_path / "m", "llama"), "llama")
    first, second = run_ranks(start_rank, 2, config, planted)
    assert first[0] == second[0]
    assert second[1] == []
    if planted:
        assert first[0].startswith("2: model.init_from=")
        assert "gives other logits here than with LlamaForCausalLM of transformers" in first[0]
        assert "set model.check_init=never" in first[0]
        assert run_ranks(start_rank, 2, _with(config, CheckInit.never), planted)[0][0] is None  # the remedy works
    else:
        assert first[0] is None
        assert "LlamaForCausalLM of transformers" in first[1][0]


def test_a_folder_that_has_changed_since_the_launch_is_refused_by_all_ranks(tmp_path: Path) -> None:
    """A frozen configuration may be older than the current content of the folder that it came from."""
    config = begin(write_start(tmp_path / "m", "llama_multi_head"), "llama_multi_head")
    write_start(tmp_path / "m", "llama_multi_head", rope_theta=500.0, rope_parameters=...)
    ranks = run_ranks(start_rank, 2, config, False)
    assert ranks[0][0] == ranks[1][0]
    assert ranks[0][0].startswith("2: model.rotary_base=10000 contradicts model.init_from=")


def _with(config: RunConfig, wanted: CheckInit) -> RunConfig:
    return replace(config, model=replace(config.model, check_init=wanted))


def test_auto_says_why_nothing_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = begin(write_start(tmp_path / "m", "gpt2"), "gpt2")
    assert "computes the same logits" in check_init._check(config)
    assert check_init._check(_with(config, CheckInit.never)).endswith(": model.check_init=never")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=150_000))
    assert "model.check_init=always compares anyway" in check_init._check(config)
    assert "computes the same logits" in check_init._check(_with(config, CheckInit.always))


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = begin(write_start(tmp_path / "m", "gpt2"), "gpt2")
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(check_init.importlib.util, "find_spec", lambda name: None)
    assert check_init._check(config).endswith("it is not installed")
    with pytest.raises(ConfigError, match=r"check_init=always compares .* cannot be imported.*pip install"):
        check_init._check(_with(config, CheckInit.always))


def test_non_finite_weights_are_refused(tmp_path: Path) -> None:
    folder = write_start(tmp_path / "m", "gpt2", lambda tensors: tensors.update(_nan(tensors)))
    with pytest.raises(CheckpointError, match="largest difference nan"):
        check_init._check(begin(folder, "gpt2"))


def _nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"transformer.ln_f.weight": tensors["transformer.ln_f.weight"] * float("nan")}


def _zero(*names: str) -> Callable[[dict[str, Tensor]], None]:
    """Set these tensors to zero; no names = all."""
    return lambda tensors: tensors.update({name: torch.zeros_like(tensors[name]) for name in names or list(tensors)})


@pytest.mark.parametrize(
    ("name", "zeros"),
    [("gpt2_untied", ("lm_head.weight",)), ("llama_multi_head", ("lm_head.weight",)), ("llama_tied", ()), ("t5", ())],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_equal_logits_that_depend_on_nothing_prove_nothing(name: str, zeros: tuple[str, ...], tmp_path: Path) -> None:
    config = begin(write_start(tmp_path / "m", name, _zero(*zeros)), name)
    assert "warning: its logits hardly depend on the input (they differ by 0 at most)" in check_init._check(config)
    with pytest.raises(CheckpointError, match=r"check_init=always requires: its logits hardly .*check_init=auto"):
        check_init._check(_with(config, CheckInit.always))


def test_a_constant_is_no_agreement(tmp_path: Path) -> None:
    """The logits come from a bias alone, so equal logits prove nothing, however large they are."""
    head = {"cls.predictions.transform.LayerNorm.weight": 0.0, "cls.predictions.bias": 50.0}

    def change(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: torch.full_like(tensors[name], value) for name, value in head.items()})

    config = begin(write_start(tmp_path / "m", "bert_without_pairs", change), "bert_without_pairs")
    assert "hardly depend on the input" in check_init._check(config)


def test_matrices_of_zeros_are_reported_although_logits_agree(tmp_path: Path) -> None:
    folder = write_start(tmp_path / "m", "gpt2", _zero("transformer.h.1.mlp.c_proj.weight"))
    found = check_init._check(begin(folder, "gpt2", "model.check_init=always"))
    assert found.count("warning: all zero, so equal logits prove nothing about these tensors: ") == 1
    assert "mlp" in found.rpartition("these tensors: ")[2]


def test_a_fresh_gemma_under_the_name_of_llama_is_not_taken_for_one(tmp_path: Path) -> None:
    """All keys are LLaMA's keys too. But Gemma adds 1 to its norm weights, so fresh ones are zeros."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    model = transformers.GemmaForCausalLM(
        transformers.GemmaConfig(**sizes, num_key_value_heads=4, intermediate_size=48)
    )
    model.save_pretrained(tmp_path / "m")
    label = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "use_bidirectional_attention": ...}
    file = tmp_path / "m" / "config.json"
    config = {key: value for key, value in (json.loads(file.read_text()) | label).items() if value is not ...}
    file.write_text(json.dumps(config))
    (tmp_path / "m" / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizerFast"}')
    found = check_init._check(begin(tmp_path / "m", "llama_geglu"))
    signs = ("hardly depend", "tokenizer_class=GemmaTokenizerFast in", "no LLaMA model in transformers has a GELU gate")
    assert [sign for sign in signs if sign not in found] == []


def test_a_tokenizer_of_another_family_is_a_sign_and_no_more(tmp_path: Path) -> None:
    folder = write_start(tmp_path / "m", "llama_multi_head", tokenizer_class="GemmaTokenizer")
    config = begin(folder, "llama_multi_head")
    for wanted in (CheckInit.auto, CheckInit.never):
        assert "of another family than model_type=llama" in check_init._check(_with(config, wanted))
    with pytest.raises(CheckpointError, match=r"tokenizer_class=GemmaTokenizer in .*set model\.check_init=auto"):
        check_init._check(_with(config, CheckInit.always))
    (folder / STATE_FILE).parent.mkdir()
    (folder / STATE_FILE).write_text("{}")  # a run of ours may train with any tokenizer
    assert "warning" not in check_init._check(_with(config, CheckInit.always))
