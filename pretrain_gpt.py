"""Pretrain a decoder (GPT-2, LLaMA): next token, prefix language model or fill in the middle.

python -m launch pretrain_gpt parallel=dp2_tp2_pp2 model=gpt2_124m train.steps=1000
torchrun --nproc-per-node 8 pretrain_gpt.py parallel=dp2_tp2_pp2
python pretrain_gpt.py --help
"""

from __future__ import annotations

import sys

from launch.entry import pretrain, run_script


def main(argv: list[str] | None = None) -> int:
    """Run the script with these overrides (None = those of the command line); returns the exit code."""
    return run_script(pretrain, "pretrain_gpt", argv)


if __name__ == "__main__":
    sys.exit(main())
