"""`python -m megatron_lite.observe.workspace`: the charts of `panels.PANELS` as a saved view of a wandb project.

The view needs the package wandb-workspaces and a wandb account; `--print` shows the layout without either.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from megatron_lite.errors import EXIT_OK, EXIT_USER_ERROR, ConfigError, MegatronLiteError
from megatron_lite.observe.panels import WHOLE_GROUP, Panel, pattern, sections

NAME = "megatron_lite"
STEP = "step"
COLUMNS = 3
PACKAGE = "wandb-workspaces"


def main(argv: Sequence[str]) -> int:
    """Save or print the view; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_lite.observe.workspace", description="Make a view of a wandb project."
    )
    parser.add_argument("--entity", help="user or team that the project belongs to")
    parser.add_argument("--project", default="megatron_lite", help="tracking.wandb_project of the runs; %(default)s")
    parser.add_argument("--name", default=NAME, help="of the view; %(default)s")
    parser.add_argument("--print", action="store_true", help="show the layout as JSON and save nothing")
    arguments = parser.parse_args(argv)
    if arguments.print:
        print(json.dumps(layout(), indent=1))
        return EXIT_OK
    try:
        print(save(arguments.entity, arguments.project, arguments.name))
    except MegatronLiteError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return EXIT_OK


def layout() -> list[dict[str, Any]]:
    """The sections in order, each with its charts as arguments of `LinePlot`."""
    return [{"section": name, "panels": [_line_plot(panel) for panel in panels]} for name, panels in sections().items()]


def _line_plot(panel: Panel) -> dict[str, Any]:
    """A group of figures is selected by a regular expression; single figures by name, so that they keep their order."""
    grouped = [key for key in panel.all_keys if key.endswith(WHOLE_GROUP)]
    chosen = {"metric_regex": "|".join(map(pattern, grouped))} if grouped else {"y": list(panel.all_keys)}
    plot: dict[str, Any] = {"title": panel.title, "x": STEP, **chosen, "title_x": STEP}
    if panel.unit and panel.factor == 1:
        plot["title_y"] = panel.unit
    if panel.log_axis:
        plot["log_y"] = True
    return plot


def save(entity: str | None, project: str, name: str) -> str:
    """Save the view in the user's account; return its URL.

    Raises:
        ConfigError: the package or the entity is missing, or wandb rejects the view: no login, no such project, no
            network.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the package {PACKAGE} is not installed; `pip install {PACKAGE}`, or look at the layout with --print"
        ) from error
    if entity is None:
        raise ConfigError("--entity is missing, and a view belongs to a user's or a team's project; give one")
    try:
        view = build(workspaces, panels, entity, project, name)
        view.save()
    except Exception as error:  # exceptions of requests and of wandb, and plain ValueErrors
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"wandb does not take the view of {entity}/{project} ({reason}); `wandb login`, and check that the project "
            "has a run"
        ) from error
    return str(view.url)


def build(workspaces: Any, panels: Any, entity: str, project: str, name: str) -> Any:
    """Build the package's `Workspace` without saving it.

    Args:
        workspaces, panels: modules of wandb-workspaces, an optional dependency.
    """
    made = [
        workspaces.Section(
            name=section["section"],
            panels=[panels.LinePlot(**plot) for plot in section["panels"]],
            is_open=True,
            layout_settings=workspaces.SectionLayoutSettings(columns=COLUMNS),
        )
        for section in layout()
    ]
    settings = workspaces.WorkspaceSettings(x_axis=STEP)
    return workspaces.Workspace(entity=entity, project=project, name=name, sections=made, settings=settings)


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:  # `--print | head` has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit would fail again
