"""A pickle is a program: none in a folder of weights is ever run, and nothing of ours opens one."""

from __future__ import annotations

import ast
import pickle
import shutil
from pathlib import Path

import pytest

from megatron_lite.checkpoint.__main__ import main
from megatron_lite.checkpoint.folder import newest_complete
from megatron_lite.checkpoint.tensor_files import TensorReader
from megatron_lite.config.hf.folder import read_weights
from megatron_lite.config.hf.headers import TensorEntry
from megatron_lite.errors import CheckpointError, ConfigError
from tests.unit.checkpoint.examples import SHARD, save

REPOSITORY = Path(__file__).parents[3]
PLANTED = ("pytorch_model.bin", "training/optimizer.pt", "training/state.pkl", "model-00009-of-00009.safetensors")


class Payload:
    """What is run where this is unpickled: it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "mark"


def poison(folder: Path, mark: Path, *names: str) -> Path:
    """Put the payload under each of the names."""
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Payload(mark)))
    return folder


def test_payload_bites(mark: Path) -> None:
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()


def test_pickles_beside_a_checkpoint_are_passed_over(
    mark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """None is in the manifest."""
    folder = poison(save(tmp_path / "checkpoints", 100), mark, *PLANTED)
    found = newest_complete(tmp_path / "checkpoints", pytest.fail)
    assert found is not None
    assert main(["verify", str(folder)]) == 0
    for command in (["inspect", str(folder)], ["diff", str(folder), str(folder), "--only-tensors"]):
        assert main(command) == 2  # says which file is not a safetensors: a person looks
        assert f"{PLANTED[-1]} is" in capsys.readouterr().err
    (folder / PLANTED[-1]).unlink()
    for command in (["inspect", str(folder)], ["diff", str(folder), str(folder), "--only-tensors"]):
        assert main(command) == 0
    assert not mark.exists()


def test_pickle_in_the_place_of_a_file_is_damage(mark: Path, tmp_path: Path) -> None:
    save(tmp_path, 100)
    folder = poison(save(tmp_path, 200), mark, SHARD, "config.json")
    messages: list[str] = []
    found = newest_complete(tmp_path, messages.append)
    assert found is not None
    assert found[0].name == "step_00000100"
    assert messages[0].startswith("Skipping step_00000200: ")
    with pytest.raises(CheckpointError, match=SHARD):
        TensorReader({"weight": TensorEntry(folder / SHARD, "weight", "F32", (1,), (0, 4))})
    assert main(["verify", str(folder)]) == 1
    assert not mark.exists()


@pytest.mark.parametrize(
    ("names", "error"),
    [
        (["pytorch_model.bin"], ConfigError),
        (["pytorch_model.bin", "model.safetensors"], CheckpointError),
        (["config.json", "model.safetensors"], (ConfigError, CheckpointError)),
    ],
)
def test_pickles_are_no_weights_to_begin_from(
    names: list[str], error: type[Exception], mark: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(save(tmp_path / "checkpoints", 100) / "config.json", folder)
    poison(folder, mark, *names)
    with pytest.raises(error):
        read_weights(str(folder))
    assert not mark.exists()


def test_nothing_of_ours_reads_pickles() -> None:
    """The ranks of one job send each other objects through torch.distributed; files and hubs never do."""
    sources = [*REPOSITORY.glob("megatron_lite/**/*.py"), *REPOSITORY.glob("launch/**/*.py"), *REPOSITORY.glob("*.py")]
    assert len(sources) > 100
    found = {f"{path.relative_to(REPOSITORY)}:{line}" for path in sources for line in pickle_readers(path.read_text())}
    assert found == set()


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "AutoModel.from_pretrained('x')",
        "torch.hub.load_state_dict_from_url('x')",
    ],
)
def test_scan_sees_each_way(text: str) -> None:
    assert pickle_readers(text)


MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"torch.load", "torch.jit.load", "load_state_dict_from_url"}


def pickle_readers(source: str) -> list[int]:
    """The lines that could read a pickle. (numpy's load reads none unless it is allowed to.)"""
    return [node.lineno for node in ast.walk(ast.parse(source)) if _reads_pickle(node)]


def _reads_pickle(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(name.name.split(".")[0] in MODULES for name in node.names)
    if isinstance(node, ast.ImportFrom):
        return node.module in MODULES or (node.module == "torch" and any(name.name == "load" for name in node.names))
    if isinstance(node, ast.Attribute):
        return ast.unparse(node) in CALLS or node.attr in CALLS
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        safe = any(word.arg == "use_safetensors" and getattr(word.value, "value", 0) is True for word in node.keywords)
        return called.endswith("from_pretrained") and "Tokenizer" not in called and not safe
    return (
        isinstance(node, ast.keyword) and node.arg == "allow_pickle" and getattr(node.value, "value", True) is not False
    )
