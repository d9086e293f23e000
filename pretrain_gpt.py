"""Pretrain a decoder-only transformer (GPT-2, LLaMA) on next-token prediction.

python -m launch pretrain_gpt parallel=dp2_tp2_pp2 model=gpt2_124m train.steps=1000
torchrun --nproc-per-node 8 pretrain_gpt.py parallel=dp2_tp2_pp2
python pretrain_gpt.py --help
"""

from __future__ import annotations

import sys

from launch.entry import run_script
from megatron_lite.config.schema import RunConfig


def pretrain(config: RunConfig) -> None:
    """Train as configured; called in every rank."""
    from megatron_lite.train.run import train  # seconds of imports, which a wrong word need not wait for

    train(config, objective="causal_lm")


def main(argv: list[str] | None = None) -> int:
    """Run the script with these words, or with those of the command line; returns the exit code."""
    return run_script(pretrain, "pretrain_gpt", argv)


if __name__ == "__main__":
    sys.exit(main())
