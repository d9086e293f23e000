"""Every error that is raised says what to do, and tests obey: a new one without either fails here.

The rules of the configuration have tests of their own (`config/test_remedies.py`). Read from the sources alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megatron_lite import errors

ROOT = Path(__file__).parents[2]
OF_LIBRARY = ("verify", "train", "checkpoint", "data", "observe", "models", "config/hf")
ROOMS = ("launch", *(f"megatron_lite/{room}" for room in OF_LIBRARY))
OURS = {name for name, value in vars(errors).items() if isinstance(value, type) and name.endswith("Error")}
EDGE = "library_edge"

PASSED_ON = {
    # Several problems at once, each with its remedy.
    "launch/deepspeed.py:_through_shells", "launch/evaluation.py:_check_keys", "launch/hostfile.py:read_hostfile",
    "launch/hostfile.py:with_hosts", "launch/sweep.py:build_all", "launch/sweep.py:expand",
    "megatron_lite/checkpoint/fit.py:require_fit", "megatron_lite/checkpoint/resume.py:allowed_changes",
    "megatron_lite/config/hf/settings.py:settings_of", "megatron_lite/config/hf/start.py:with_weights",
    "megatron_lite/data/samples/loader.py:held_out_datasets", "megatron_lite/data/samples/loader.py:training_dataset",
    "megatron_lite/data/shards/prepare.py:refuse_other_data",
    "megatron_lite/data/corpus/source_names.py:require_sources",
    "megatron_lite/data/corpus/source_names.py:resolve_sources", "megatron_lite/train/startup.py:require_same_program",
    # A text that another function makes.
    "launch/arguments.py:parse", "launch/comparing.py:compare", "megatron_lite/observe/run_lock.py:confirm",
    "megatron_lite/train/parts.py:agreed_rollbacks",
    "megatron_lite/checkpoint/inspection.py:locate", "megatron_lite/data/corpus/hugging_face.py:_edge",
    # The caller that catches it says where, and what to do.
    "launch/slurm/attempt.py:_job_number", "launch/slurm/attempt.py:_of_job",
    "megatron_lite/checkpoint/folder.py:read_manifest", "megatron_lite/checkpoint/state.py:read_state",
    "megatron_lite/data/tokenizer/foreign.py:read_through_transformers", "megatron_lite/data/sealed.py:read_sealed",
    "megatron_lite/data/sidecar.py:read_sidecar", "megatron_lite/observe/markers.py:read_marker",
    "megatron_lite/observe/run_folder.py:_settings",
    # A fault of ours, raised as it is on the rank that has it.
    "megatron_lite/checkpoint/saving.py:_together",
}  # fmt: skip
"""Functions whose errors get their remedy elsewhere."""


@dataclass(frozen=True)
class Site:
    """A place where an error of ours is made."""

    place: str
    line: int
    has_remedy: bool


@cache
def sites() -> tuple[Site, ...]:
    found = []
    for room in ROOMS:
        for file in sorted((ROOT / room).rglob("*.py")):
            name = file.relative_to(ROOT).as_posix()
            found += _sites(ast.parse(file.read_text()), f"{name}:<module>", name)
    return tuple(found)


def _sites(node: ast.AST, place: str, file: str) -> Iterator[Site]:
    for child in ast.iter_child_nodes(node):
        inner = f"{file}:{child.name}" if isinstance(child, ast.FunctionDef) else place
        if isinstance(child, ast.Call) and isinstance(child.func, ast.Name):
            if child.func.id in OURS:
                yield Site(inner, child.lineno, any(";" in text for text in _texts(child)))
            elif child.func.id == EDGE:
                named = any(keyword.arg == "remedy" for keyword in child.keywords)
                yield Site(inner, child.lineno, len(child.args) > 2 or named)
        yield from _sites(child, inner, file)


def _texts(call: ast.Call) -> Iterator[str]:
    for node in ast.walk(call):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@cache
def obeyed() -> frozenset[str]:
    """What the decorators `obeys` of all tests name."""
    return frozenset(place for file in sorted((ROOT / "tests").rglob("test_*.py")) for place in _marks(file))


def _marks(file: Path) -> Iterator[str]:
    text = file.read_text()
    if "@obeys(" not in text:
        return
    tree = ast.parse(text)
    constants = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)]
    names = {ast.unparse(one.targets[0]): ast.literal_eval(one.value) for one in constants}
    for function in ast.walk(tree):
        for mark in function.decorator_list if isinstance(function, ast.FunctionDef) else ():
            if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == "obeys":
                yield from (_place(argument, names) for argument in mark.args)


def _place(argument: ast.expr, names: dict[str, object]) -> str:
    if isinstance(argument, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.FormattedValue) else part for part in argument.values]
        return "".join(str(names[part.id] if isinstance(part, ast.Name) else ast.literal_eval(part)) for part in parts)
    return str(ast.literal_eval(argument))


def test_every_error_says_what_to_do() -> None:
    missing = [f"{one.place} (line {one.line})" for one in sites() if not one.has_remedy and one.place not in PASSED_ON]
    assert missing == []


def test_every_remedy_is_obeyed_by_a_test() -> None:
    """A new error needs a test with `@obeys`."""
    raised = {one.place for one in sites()}
    assert sorted(raised - obeyed() - PASSED_ON) == [], "without a test that obeys"
    assert sorted((PASSED_ON | obeyed()) - raised) == [], "no such error"


def test_the_sources_are_read() -> None:
    assert len(sites()) > 250
    assert len(obeyed()) > 30
    found = list(_sites(ast.parse('def f():\n raise DataError("a is bad")\n'), "x.py:<module>", "x.py"))
    assert found == [Site("x.py:f", 2, False)]
    edges = 'with library_edge(DataError, "what"): pass\nwith library_edge(DataError, "what", "remedy"): pass'
    assert [one.has_remedy for one in _sites(ast.parse(edges), "x", "x.py")] == [False, True]
