"""Pretrain an encoder (BERT, RoBERTa): masked tokens, with or without next-sentence prediction.

python -m launch pretrain_bert parallel=dp2_tp2_pp2 model=roberta_base objective=masked_lm
torchrun --nproc-per-node 8 pretrain_bert.py parallel=dp2_tp2_pp2
python pretrain_bert.py --help
"""

from __future__ import annotations

import sys

from launch.entry import pretrain, run_script


def main(argv: list[str] | None = None) -> int:
    """Run the script with these overrides (None = those of the command line); returns the exit code."""
    return run_script(pretrain, "pretrain_bert", argv)


if __name__ == "__main__":
    sys.exit(main())
