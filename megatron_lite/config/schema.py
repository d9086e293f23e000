"""The one source of every setting: typed, documented, and free of torch.

A `RunConfig` is composed by Hydra (`compose.py`), completed (`derived.py`), validated (`validate.py`), turned into a
`ResolvedConfig` (`resolved.py`) and written once into the run folder (`frozen.py`). YAML files under
`megatron_lite/conf/` hold values only; their meaning is documented below each field, and the field itself declares
range or rule, and the effect on a resumed run (`setting.py`). The groups are in files of their own, and named here.

Sizes are in elements, batches in sequences, times in seconds. `None` means "derived": the field says from what.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_lite.config import resume_effects as effects
from megatron_lite.config import texts
from megatron_lite.config.choices import (
    Activation,
    Architecture,
    CheckInit,
    Compile,
    InitScheme,
    Normalization,
    NormPlacement,
    ObjectiveName,
    OptimizerName,
    PositionEmbedding,
    Precision,
    Recompute,
    WandbMode,
)
from megatron_lite.config.data import DataConfig, ObjectiveConfig
from megatron_lite.config.decays import Decay
from megatron_lite.config.launcher import LauncherConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.setting import SAFE, setting
from megatron_lite.config.stability import StabilityConfig
from megatron_lite.config.training import (
    BatchRampConfig,
    LossScaleConfig,
    OptimizerConfig,
    ParallelConfig,
    TrackingConfig,
    TrainConfig,
)

__all__ = [
    "Activation",
    "Architecture",
    "BatchRampConfig",
    "CheckInit",
    "Compile",
    "DataConfig",
    "Decay",
    "InitScheme",
    "LauncherConfig",
    "LossScaleConfig",
    "ModelConfig",
    "NormPlacement",
    "Normalization",
    "ObjectiveConfig",
    "ObjectiveName",
    "OptimizerConfig",
    "OptimizerName",
    "ParallelConfig",
    "PositionEmbedding",
    "Precision",
    "Recompute",
    "RunConfig",
    "StabilityConfig",
    "TrackingConfig",
    "TrainConfig",
    "WandbMode",
]


@dataclass
class RunConfig:
    """Everything that decides a run. Frozen into the run folder as config-<sha12>.yaml."""

    script: str = setting("pretrain_gpt", text=texts.label, resume=effects.TARGETS)
    """The entry script."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    debug: bool = setting(False, resume=SAFE)
    """Show tracebacks of user errors (also: --debug)."""
