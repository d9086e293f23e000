"""Pretrain an encoder-decoder (T5, BART): span corruption, BART's denoising or UL2's mixture.

python -m launch pretrain_t5 parallel=dp2_tp2_pp2 model=t5_small objective=ul2
torchrun --nproc-per-node 8 pretrain_t5.py parallel=dp2_tp2_pp2
python pretrain_t5.py --help
"""

from __future__ import annotations

import sys

from launch.entry import pretrain, run_script


def main(argv: list[str] | None = None) -> int:
    """Run the script with these overrides (None = those of the command line); returns the exit code."""
    return run_script(pretrain, "pretrain_t5", argv)


if __name__ == "__main__":
    sys.exit(main())
