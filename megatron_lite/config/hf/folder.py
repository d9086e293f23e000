"""The folder that `model.init_from` names: finds it, and reads all of it but the tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_lite.config.hf.families import of_type
from megatron_lite.config.hf.headers import INDEX_FILE, SINGLE_FILE, TensorEntry, has_tensors, tensors_of
from megatron_lite.config.hf.settings import settings_of
from megatron_lite.config.schema import ModelConfig
from megatron_lite.errors import ConfigError, DamagedFileError, library_edge
from megatron_lite.state_files import Object, read_object

CONFIG_FILE = "config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TRAINING = "training"
"""Subfolder of our checkpoints with what only training needs; the model folder is next to it."""
STATE_FILE = f"{TRAINING}/state.json"
CHECKPOINT = "a checkpoint, such as RUN/checkpoints/step_00000100"
ADAPTER_FILE = "adapter_config.json"
HUB_FILES = (
    "*.json",
    "*.jinja",
    "*.safetensors",
    "*.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
TOKENIZER_FILES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("tokenizer.model",),
    ("sentencepiece.bpe.model",),
    ("vocab.txt",),
)
"""A folder with any of these files has a tokenizer."""


@dataclass(frozen=True)
class Weights:
    """A folder with the weights of a model."""

    folder: Path
    script: str
    """The entry script that trains such models."""
    kind: str
    """Kind of model, in words."""
    settings: dict[str, Any]
    """Fields of ModelConfig as the weights require them; dropouts too."""
    tensors: dict[str, TensorEntry]
    has_hf_names: bool = True
    """False = the tensors have our own names and shapes."""

    model_type: str = ""
    """transformers' name of the model type, if the tensors have transformers' names."""

    @property
    def is_own(self) -> bool:
        """Whether one of our runs has saved them."""
        return (self.folder / STATE_FILE).is_file()

    @property
    def has_tokenizer(self) -> bool:
        return any(all((self.folder / name).is_file() for name in names) for names in TOKENIZER_FILES)


def read_weights(name: str, *, unknown_keys: bool = False) -> Weights:
    """Read a model folder without its tensors.

    Args:
        name: the value of model.init_from.
        unknown_keys: accept keys of config.json with unknown effect, because logits will be compared.
    Raises:
        ConfigError: the folder does not exist, has no usable weights, or holds a model that we do not support.
        CheckpointError: one of its files is truncated or damaged.
    """
    folder = local_folder(name)
    own = _own_state(folder)
    if own is None and not (folder / CONFIG_FILE).is_file():
        raise ConfigError(
            f"model.init_from={name} holds no {CONFIG_FILE}; give a folder that transformers' save_pretrained wrote, "
            f"or {CHECKPOINT}"
        )
    _require_safetensors(folder, name)
    if (folder / ADAPTER_FILE).is_file():
        raise ConfigError(
            f"model.init_from={name} holds an adapter beside its weights ({ADAPTER_FILE}), which changes what they "
            "compute and which we cannot read; merge it with peft (merge_and_unload, then save_pretrained) and give "
            "that folder"
        )
    tensors = tensors_of(folder)
    if own is not None and not own.get("hugging_face", True):
        return _under_our_names(folder, name, own, tensors)
    path = folder / CONFIG_FILE
    described = settings_of(
        _read_json(path, name), names=tensors, where=f"model.init_from: {path}", unknown_keys=unknown_keys
    )
    family = described.family
    return Weights(
        folder, family.script, family.architecture, described.settings, tensors, model_type=family.model_type
    )


def foreign_tokenizers(weights: Weights) -> Iterator[str]:
    """Warnings if the tokenizer next to the weights is of another family, which uses the same tensors differently.

    This is only a hint: any model may be trained with any tokenizer.
    """
    if weights.is_own:
        return
    prefixes = tuple(prefix for family in of_type(weights.model_type) for prefix in family.foreign_tokenizers)
    for file_name in (CONFIG_FILE, TOKENIZER_CONFIG_FILE):
        path = weights.folder / file_name
        config = _read_json(path, str(weights.folder)) if path.is_file() else {}
        found = config.get("tokenizer_class")
        if isinstance(found, str) and found.startswith(prefixes):
            yield f"tokenizer_class={found} in {path} is of another family than model_type={weights.model_type}"


def local_folder(name: str) -> Path:
    """The folder itself, or the local copy of a model of the hub, downloaded now if necessary.

    Raises:
        ConfigError: the folder does not exist, and the hub has no such model or cannot be reached.
    """
    if not name.strip():
        raise ConfigError(f"model.init_from={name!r} names no folder; give one, or leave model.init_from out")
    try:
        folder = Path(name).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError) as error:  # an invalid file name, a lost disk, ~ of an unknown user
        raise ConfigError(f"model.init_from={name} cannot be looked up ({error}); correct the path") from error
    if is_folder:
        return folder
    if exists or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(
            f"model.init_from={name} is not a folder (looked from {Path.cwd()}); give a Hugging Face folder, or "
            f"{CHECKPOINT}"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # names, access and networks fail with many kinds of errors
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise ConfigError(
            f"model.init_from={name} is not a folder here, and the hub does not give it ({reason}); correct the name, "
            f"or run `hf download {name} --local-dir FOLDER` where there is a network and give FOLDER"
        ) from error


def _own_state(folder: Path) -> Object | None:
    """State file of one of our checkpoints; None for other folders."""
    path = folder / STATE_FILE
    return _read_json(path, str(folder)) if path.is_file() else None


def _under_our_names(folder: Path, name: str, own: Object, tensors: dict[str, TensorEntry]) -> Weights:
    """The weights of a checkpoint whose model transformers does not support."""
    frozen = own.get("config")
    described = frozen.get("model") if isinstance(frozen, dict) else None
    table = tensors.get("embedding.weight")
    state = f"model.init_from={name}: {folder / STATE_FILE}"
    if not isinstance(frozen, dict) or not isinstance(described, dict) or table is None or len(table.shape) != 2:
        raise ConfigError(f"{state} describes no model; give another checkpoint")
    with library_edge(ConfigError, f"{state} describes no model", "give another checkpoint"):
        model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), described))
    settings = {key: getattr(model, key) for key in described if key not in ("name", "init_from", "check_init")}
    settings["vocab_size"] = table.shape[0]
    return Weights(folder, str(frozen.get("script")), "of ours", settings, tensors, False)


def _require_safetensors(folder: Path, name: str) -> None:
    if has_tensors(folder):
        return
    if any(folder.glob("pytorch_model*.bin")):
        raise ConfigError(
            f"model.init_from={name} holds its weights as pickle (pytorch_model.bin), which may run code when it is "
            f"read; convert it with transformers: AutoModel.from_pretrained({str(folder)!r})"
            ".save_pretrained(FOLDER, safe_serialization=True), with the class that its config.json names for AutoModel"
        )
    if parts := sorted(path.name for path in folder.glob("*.safetensors")):
        raise ConfigError(
            f"model.init_from={name} holds {parts[0]}, but neither {SINGLE_FILE} nor {INDEX_FILE}, which says what "
            "lies in which file; copy the whole folder again from where it came, or rename a file that holds all of it"
        )
    raise ConfigError(f"model.init_from={name} holds no {SINGLE_FILE}; give a folder with weights")


def _read_json(path: Path, name: str) -> Object:
    try:
        found = read_object(path, Object)
    except DamagedFileError as error:
        raise ConfigError(f"model.init_from={name}: {error}; copy it again") from None
    if found is None:
        raise ConfigError(f"model.init_from={name}: there is no {path}; copy it again")
    return found
