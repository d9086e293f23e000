"""What srun starts on each node: `torchrun`, with stores that listen only at the address where the ranks connect."""

from __future__ import annotations

import sys

from launch.torchrun import listen_where_needed


def main(argv: list[str]) -> None:
    """Args: argv: arguments of torchrun."""
    from torch.distributed.run import main as torchrun  # torch takes seconds to import

    listen_where_needed()
    torchrun(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
