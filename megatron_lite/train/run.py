"""One run from a frozen configuration to its summary: wires the rooms together and owns nothing itself."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_lite.checkpoint import native
from megatron_lite.config.derived import run_directory
from megatron_lite.config.schema import Precision, RunConfig
from megatron_lite.data.prepare import PreparedData, prepare
from megatron_lite.models.gpt import gpt_layers
from megatron_lite.objectives.causal_lm import TokenLoss
from megatron_lite.observe.console import Console
from megatron_lite.observe.hardware import enable_fast_float32_matmul, measure_gemm_peak, usable_cores
from megatron_lite.observe.progress import Progress
from megatron_lite.observe.trackers import Trackers, build_trackers
from megatron_lite.optim.batch_ramp import BatchSchedule
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.planning.flops import dense_peak_flops, flops_per_token
from megatron_lite.train import distributed
from megatron_lite.train.callbacks import Report, Save, Validate
from megatron_lite.train.engine import Engine, build_engine
from megatron_lite.train.loop import Trainer
from megatron_lite.train.sources import ShardSource
