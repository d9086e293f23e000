"""The view of a wandb project: the same panels, with or without the package that saves it."""

from __future__ import annotations

import json
import re
import sys
from typing import Any
from unittest.mock import Mock

import pytest

from megatron_lite.observe import workspace
from megatron_lite.observe.panels import PANELS
from megatron_lite.observe.workspace import build, main
from tests.unit.remedies import obeys


def test_the_layout_is_printed_without_an_account_or_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main(["--print"]) == 0
    plots = {plot["title"]: plot for section in json.loads(capsys.readouterr().out) for plot in section["panels"]}
    assert list(plots) == [panel.title for panel in PANELS]
    assert {plot["x"] for plot in plots.values()} == {"step"}
    assert plots["Loss"]["y"] == ["train/loss", "evaluation/validation_loss"]
    layers = plots["Gradient norm by layer"]
    assert layers["log_y"]
    assert re.match(layers["metric_regex"], "train/layer_grad_norm/layers.11")
    assert not re.match(layers["metric_regex"], "train/grad_norm")


@obeys("megatron_lite/observe/workspace.py:save")
def test_without_the_package_one_line_says_what_to_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("wandb_workspaces")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main(["--entity", "me"]) == 2
    assert capsys.readouterr().err == (
        "error: the package wandb-workspaces is not installed; `pip install wandb-workspaces`, or look at the layout "
        "with --print\n"
    )
    assert main(["--print"]) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the package's own, of pydantic
def test_the_package_takes_every_panel() -> None:
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    view = build(workspaces, panels, "me", "project", "name")
    sections = view._to_model().spec.section.panel_bank_config.sections
    configs = [panel.config for section in sections for panel in section.panels]
    assert [config.chart_title for config in configs] == [panel.title for panel in PANELS]
    assert {config.x_axis for config in configs} == {"step"}


@obeys("megatron_lite/observe/workspace.py:save")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_wandb_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*arguments: Any) -> None:
        raise ValueError("no such\nproject")

    monkeypatch.setattr(workspace, "build", refuse)
    assert main(["--entity", "me", "--project", "p"]) == 2
    assert capsys.readouterr().err == (
        "error: wandb does not take the view of me/p (no such project); `wandb login`, and check that the project has "
        "a run\n"
    )
    assert main([]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: --entity is missing")
    assert message.endswith("; give one\n")
    monkeypatch.setattr(workspace, "build", lambda *arguments: Mock(url="https://wandb.ai/me/p"))  # logged in
    assert main(["--entity", "me", "--project", "p"]) == 0
    assert "https://wandb.ai/me/p" in capsys.readouterr().out
