"""Makes docs/report.png: the upper part of report.html in a headless Chromium.

    python docs/screenshot.py RUN_FOLDER [--out FILE] [--height PIXELS] [--dark]

Without a run folder it takes a made-up run, so that the page can be worked on without training.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from launch.follow import state  # noqa: E402
from megatron_lite.observe.report import write_report  # noqa: E402
from tests.browser import find_browser, photograph  # noqa: E402
from tests.unit.observe.synthetic_run import eventful_run  # noqa: E402

WIDTH = 1240


def main() -> None:
    parser = argparse.ArgumentParser(description="Make docs/report.png.")
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN_FOLDER")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "report.png")
    parser.add_argument("--height", type=int, default=1530)
    parser.add_argument("--dark", action="store_true")
    arguments = parser.parse_args()
    picture = arguments.out.absolute()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.run is not None:
            page = write_report(arguments.run, state(arguments.run), folder / "report.html")
        else:
            os.chdir(folder)  # the picture shows the run's path
            run = eventful_run(Path("runs") / "demo")
            page = write_report(run.path, "DONE at step 400: done (all steps are trained)", folder / "report.html")
        photograph(find_browser(), page, picture, width=WIDTH, height=arguments.height, dark=arguments.dark)
    print(picture)


if __name__ == "__main__":
    main()
