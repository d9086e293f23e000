"""What srun starts on each node: `torchrun`, with stores that listen only where the job's processes connect."""

from __future__ import annotations

import sys

from launch.torchrun import listen_where_needed


def main(argv: list[str]) -> None:
    """Args: argv: torchrun's."""
    from torch.distributed.run import main as torchrun  # torch takes seconds

    listen_where_needed()
    torchrun(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
