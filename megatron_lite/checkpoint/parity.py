"""Compare the logits of our layers and of transformers for the same weights, on a few random samples.

Only one model is in memory at a time. Shapes: b samples, s positions, d decoder positions, v true vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_lite.checkpoint.fragments import WEIGHT, Fragment, Region
from megatron_lite.checkpoint.loading import start_from
from megatron_lite.config.derived import has_next_sentence_head
from megatron_lite.config.hf.families import counterpart
from megatron_lite.config.hf.folder import CONFIG_FILE
from megatron_lite.config.hf.headers import tensors_of
from megatron_lite.config.resolved import ResolvedConfig, ResolvedModel
from megatron_lite.config.schema import Architecture, Recompute
from megatron_lite.errors import CheckpointError, DamagedFileError, MegatronLiteError, library_edge
from megatron_lite.models.build import build_layers
from megatron_lite.models.fields import Field
from megatron_lite.models.flat import FlatModel
from megatron_lite.models.hf import stored_form
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.state_files import Object, read_object

TOLERANCE = 1e-4
"""Largest allowed difference of a logit in fp32 arithmetic. If logits exceed 1, it is relative to the largest one,
because rounding errors grow with them: the logits of SmolLM2-135M reach 36, and the order of summation alone changes
them by 1.1e-4."""
LEAST_SPREAD = 10.0
"""Logits must vary between positions by this multiple of the allowed difference, or the comparison shows nothing. In
trained and in fresh models they vary by thousands of times the allowed difference."""
SAMPLES, LENGTH = 4, 128
START_SAMPLES, START_LENGTH = 2, 64
OTHER_VERSION = "install the transformers of constraints.txt and try again"
THEIR_NAMES = {"tokens": "input_ids", "segments": "token_type_ids", "decoder_tokens": "decoder_input_ids"}


@dataclass(frozen=True)
class Parity:
    """The result of a comparison with transformers."""

    reader: str
    """The class and version of transformers."""
    outputs: str
    """What was compared, as text."""
    difference: float
    """The largest difference of any logit; NaN if a logit is NaN."""
    allowed: float
    spread: float = math.inf
    """The largest difference of a logit between two positions: 0 = logits do not depend on the inputs."""
    zeros: tuple[str, ...] = ()
    """Our names of weight matrices that are all zero: the comparison does not test how they are used."""

    @property
    def tells_something(self) -> bool:
        """Whether the logits vary enough that a wrong computation would have given other logits."""
        return self.spread > LEAST_SPREAD * self.allowed


def require_transformers(why: str, error: type[MegatronLiteError] = CheckpointError) -> None:
    """
    Raises:
        CheckpointError: it cannot be imported, or `error` of another kind.
    """
    with library_edge(error, f"{why}, and transformers cannot be imported", "pip install 'transformers>=4.50'"):
        import transformers  # noqa: F401


def compare(source: Path, exported: Path, config: ResolvedConfig, dtype: torch.dtype) -> Parity:
    """Compare a checkpoint with its export: both in fp32 arithmetic, with weights rounded to `dtype`.

    Args:
        source: the checkpoint, read by our layers.
        exported: the model folder, read by transformers.
        config: configuration of the checkpoint's run.
        dtype: dtype of the exported weights.
    Raises:
        CheckpointError: transformers reports missing or unexpected tensors in the folder.
    """
    described = _described(exported)
    inputs = random_inputs(config.model, described["vocab_size"], described.get("pad_token_id"))
    reading = _Reading(exported, described["architectures"][0], every_tensor=True)
    return _compare(source, reading, config, described["vocab_size"], inputs, dtype)


def compare_start(folder: Path, config: ResolvedConfig) -> Parity:
    """Compare the initial weights of a run, which both read from one folder; uses fewer and shorter samples.

    Args:
        config: its model.vocab_size is that of the weights.
    Raises:
        CheckpointError: transformers cannot read the folder, or reports missing tensors.
    """
    family = counterpart(config.model, next_sentence=has_next_sentence_head(config))
    vocab_size, pad_id = config.model.vocab_size, _described(folder).get("pad_token_id")
    assert vocab_size is not None  # weights have one
    inputs = random_inputs(config.model, vocab_size, pad_id, samples=START_SAMPLES, longest=START_LENGTH)
    reading = _Reading(folder, family.architecture, every_tensor=False)
    return _compare(folder, reading, config, vocab_size, inputs, torch.float32)


@dataclass(frozen=True)
class _Reading:
    """How transformers should read a folder."""

    folder: Path
    architecture: str
    every_tensor: bool
    """Whether the model must use every tensor of the files; otherwise it may ignore some."""


def _described(folder: Path) -> Object:
    try:
        found = read_object(folder / CONFIG_FILE, Object)
    except DamagedFileError as error:
        raise CheckpointError(f"{error}; restore an undamaged copy") from error
    if found is None:
        raise CheckpointError(f"{folder} has no {CONFIG_FILE}; restore it")
    return found


def _compare(
    source: Path,
    reading: _Reading,
    config: ResolvedConfig,
    vocab_size: int,
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> Parity:
    with torch.no_grad():
        ours, zeros = _ours(source, config, vocab_size, inputs, dtype)
        theirs = _theirs(reading, inputs)
    import transformers

    difference = max_of([one - other for one, other in zip(ours, theirs, strict=True)])
    outputs = "logits and next-sentence logits" if len(ours) > 1 else "logits"
    reader = f"{reading.architecture} of transformers {transformers.__version__}"
    places = ours[0].flatten(0, 1)
    spread = float((places.amax(0) - places.amin(0)).max())
    return Parity(reader, outputs, difference, TOLERANCE * max(1.0, max_of(ours)), spread, zeros)


def random_inputs(
    model: ResolvedModel, vocab_size: int, pad_id: int | None, *, samples: int = SAMPLES, longest: int = LENGTH
) -> dict[str, Tensor]:
    """Random values for every model input, by our names: [b, s], [b, d]. The same at every call."""
    generator = torch.Generator().manual_seed(SAMPLES)
    length = min(longest, model.max_position_embeddings)

    def tokens(length: int) -> Tensor:
        drawn = torch.randint(vocab_size, (samples, length), generator=generator)
        return torch.where(drawn == pad_id, (drawn + 1) % vocab_size, drawn) if isinstance(pad_id, int) else drawn

    found = {"tokens": tokens(length)}
    if model.num_segments > 1:
        found["segments"] = torch.randint(model.num_segments, (samples, length), generator=generator)
    if model.architecture is Architecture.encoder_decoder:
        found["decoder_tokens"] = tokens(max(1, length // 2))
    return found


def max_of(tensors: list[Tensor]) -> float:
    """The largest magnitude; NaN if there is one (Python's max would miss it)."""
    return float(torch.stack([tensor.abs().max() for tensor in tensors]).max())


def _ours(
    source: Path, config: ResolvedConfig, vocab_size: int, inputs: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[list[Tensor], tuple[str, ...]]:
    """Our logits: [b, s or d, v], and [b, 2] of a next-sentence head; and the names of all-zero weight matrices."""
    model = FlatModel(
        build_layers(
            config.model,
            ParallelContext.single(),
            vocab_size=vocab_size,
            recompute=Recompute.none,
            inputs=tuple(Field(name, tensor.shape[1]) for name, tensor in inputs.items()),
            next_sentence_head=has_next_sentence_head(config),
        )
    ).eval()
    read_weights(model, source, config.model)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    outputs = model(*inputs.values())
    logits, *others = [outputs] if isinstance(outputs, Tensor) else outputs
    zeros = tuple(name for name, weight in model.named_parameters() if weight.dim() > 1 and not weight.any())
    return [logits[..., :vocab_size], *others], zeros


def read_weights(model: FlatModel, source: Path, settings: ResolvedModel) -> None:
    """Fill a single-rank model from a folder with transformers' names.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    specs = {name: parameter.shard_spec for name, parameter in model.named_parameters()}
    form = stored_form(settings, {name: spec.full_shape for name, spec in specs.items()})
    fragments = [
        Fragment(
            WEIGHT,
            name,
            Region(specs[name].full_shape, tuple(parameter.shape), specs[name].dim),
            0,
            parameter.detach().view(-1),
            (0, parameter.numel()),
        )
        for name, parameter in model.named_parameters()
    ]
    start_from(tensors_of(source), form, fragments, str(source), settings)


def _theirs(reading: _Reading, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The logits of transformers' model, in the same order.

    Raises:
        CheckpointError: transformers cannot read the folder, or reports missing or unexpected tensors.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    architecture, arguments = reading.architecture, {THEIR_NAMES[name]: tensor for name, tensor in inputs.items()}
    reader = f"{architecture} of transformers {transformers.__version__}"
    with _quiet(), library_edge(CheckpointError, f"{reader} cannot read {reading.folder}", OTHER_VERSION):
        model, found = getattr(transformers, architecture).from_pretrained(
            reading.folder, torch_dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    faults = [
        f"{kind.replace('_', ' ')}: {', '.join(map(str, sorted(names, key=str)[:3]))}"
        for kind, names in found.items()
        if names and (reading.every_tensor or kind != "unexpected_keys")
    ]
    if faults:
        raise CheckpointError(
            f"{reader} and {reading.folder} have different tensors ({'; '.join(faults)}); {OTHER_VERSION}"
        )
    with library_edge(CheckpointError, f"{reader} cannot compute with {reading.folder}", OTHER_VERSION):
        outputs = model.eval()(**arguments)
    if "prediction_logits" in outputs:
        return [outputs.prediction_logits, outputs.seq_relationship_logits]
    return [outputs.logits]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' loading report: we report problems ourselves."""
    import transformers

    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)
