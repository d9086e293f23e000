"""What happens before any rank starts: the data is made ready, then the run folder gets its files."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable

from launch.base import LaunchPlan
from launch.messages import show_error
from launch.processes import Children, Ending, start
from megatron_lite.config.frozen import freeze
from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import EXIT_FAILURE, EXIT_USER_ERROR, MegatronLiteError


class Preparation:
    """The corpus on its way to shards, in a child process: its threads and its memory end with it."""

    def __init__(self, config: RunConfig, prepare: Callable[[RunConfig], None]) -> None:
        # a group of its own, so that its worker processes end with it
        self._children = Children([start(lambda: _guarded(prepare, config), own_group=True)], as_groups=True)

    @property
    def failed(self) -> bool:
        """Whether it has already ended badly; does not wait."""
        self._children.poll()
        return self._children.failed

    def wait(self, ending: Ending) -> int:
        """Exit code: 0, or that of the error which the child has shown."""
        self._children.wait(ending)
        if ending.signal:
            return ending.exit_code
        (end,) = self._children.ends.values()
        if end.status < 0:
            show_error(f"the preparation of the data was killed by signal {-end.status}")
            return 128 - end.status
        return end.status


def prepare_data(config: RunConfig) -> None:
    """Make the shards of a configuration, saying what takes time."""
    from megatron_lite.data.prepare import prepare  # seconds of imports that only this process needs

    prepare(config, report=lambda line: print(line, flush=True))


def _guarded(prepare: Callable[[RunConfig], None], config: RunConfig) -> int:
    try:
        prepare(config)
    except MegatronLiteError as error:
        show_error(error, debug=config.debug)
        return EXIT_USER_ERROR
    except Exception:
        traceback.print_exc(file=sys.stderr)
        return EXIT_FAILURE
    return 0


def write_files(plan: LaunchPlan) -> None:
    """Freeze the configuration and make room for logs. The only writes of a launcher itself.

    Raises:
        ConfigError: the run folder cannot be written.
    """
    path = freeze(plan.config, plan.run_dir)
    assert path == plan.frozen_config
    plan.error_file.parent.mkdir(exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        plan.error_file.unlink()
