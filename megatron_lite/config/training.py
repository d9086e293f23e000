"""Settings of the layout, the optimizer, the steps and their display. Parts of `schema.RunConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_lite.config import ranges, texts
from megatron_lite.config import resume_effects as effects
from megatron_lite.config.choices import Compile, OptimizerName, Precision, Recompute, WandbMode
from megatron_lite.config.decays import Decay
from megatron_lite.config.setting import SAFE, setting


@dataclass
class ParallelConfig:
    """The layout. world_size = data x tensor x pipeline."""

    tensor_parallel_size: int = setting(1, range=ranges.PROCESSES, resume=effects.TENSOR_MASKS)
    """Ranks that split each layer: heads, MLP width and vocabulary."""
    pipeline_parallel_size: int = setting(1, range=ranges.PROCESSES, resume=SAFE)
    """Stages that split the list of layers."""
    stages: Any = setting("balanced", resume=SAFE, expects="balanced, even or a list of integers")
    """How many transformer layers each stage holds: `balanced` cuts by FLOPs, embedding, head, loss and recomputation
    counted; `even` by number; a list such as [5,7,6,6] as given. In an encoder_decoder the decoder's layers follow the
    encoder's. The first stage also holds the embedding, the last one the head; these two may have no layers."""
    data_parallel_size: int | None = setting(None, range=ranges.PROCESSES, resume=SAFE)
    """Number of model replicas; None = number of processes / (tensor x pipeline)."""
    sequence_parallel: bool = setting(False, resume=effects.POSITION_MASKS)
    """Shard norms and dropouts along the sequence inside a tensor-parallel group (arXiv 2205.05198)."""
    zero_stage: int = setting(1, range=ranges.ZERO_STAGE, resume=SAFE)
    """0 (fp32 reference only), 1, or 2/3 with pipeline_parallel_size = 1 (arXiv 1910.02054)."""
    offload_optimizer: bool = setting(False, resume=SAFE)
    """Keep the optimizer's states in host memory and update them there (ZeRO-Offload, arXiv 2101.06840)."""
    recompute: Recompute = setting(Recompute.none, resume=SAFE)
    """Which activations are recomputed in the backward pass instead of stored."""


@dataclass
class OptimizerConfig:
    """The optimizer and the schedule of its learning rate."""

    name: OptimizerName = setting(OptimizerName.adamw, resume=effects.MOMENTS)
    """Which optimizer; adafactor needs ZeRO-0."""
    learning_rate: float = setting(3e-4, range=ranges.RATE, resume=effects.SCHEDULE)
    """Peak learning rate, after warm-up."""
    min_learning_rate: float = setting(3e-5, range=ranges.RATE_OR_0, resume=effects.SCHEDULE)
    """Learning rate at the end of the decay."""
    warmup_steps: int = setting(10, range=ranges.STEPS_OR_0, resume=effects.SCHEDULE)
    """Steps of linear growth from 0 to learning_rate."""
    decay: Decay = setting(Decay.cosine, resume=effects.SCHEDULE)
    """How the learning rate falls after the warm-up: config/decays.py has the formulas."""
    decay_steps: int | None = setting(None, range=ranges.STEPS, resume=effects.DECAY_STEPS)
    """Step at which min_learning_rate is reached; None = train.steps. Of decays with an end only."""
    decay_fraction: float = setting(0.1, range=ranges.SHARE, resume=effects.SCHEDULE)
    """wsd: share of the steps until decay_steps that decay to min_learning_rate; the steps before stay at the peak."""
    beta1: float = setting(0.9, range=ranges.FRACTION, resume=effects.ADAMW_UPDATES)
    """Decay rate of AdamW's first moment."""
    beta2: float = setting(0.95, range=ranges.FRACTION, resume=effects.ADAMW_UPDATES)
    """Decay rate of AdamW's second moment."""
    epsilon: float = setting(1e-8, range=ranges.SMALL, resume=effects.ADAMW_UPDATES)
    """Added to the square root of AdamW's second moment."""
    momentum: float = setting(0.0, range=ranges.FRACTION, resume=effects.SGD_UPDATES)
    """Momentum of SGD."""
    weight_decay: float = setting(0.1, range=ranges.RATE_OR_0, resume=effects.UPDATES)
    """Decoupled weight decay; on matrices only, never on biases and norm weights."""
    clip_grad_norm: float = setting(1.0, range=ranges.FP32_OR_0, resume=effects.UPDATES)
    """Largest global gradient norm; 0 = no clipping."""
    z_loss_weight: float = setting(0.0, range=ranges.FP32_OR_0, resume=effects.LOSS)
    """Weight of an auxiliary loss that keeps logits from drifting: mean of log(Z)^2, Z being the softmax's denominator
    (PaLM, arXiv 2204.02311: 1e-4). It is in the gradients and logged as z_loss, but not part of `loss`. 0 = off."""


@dataclass
class BatchRampConfig:
    """Grow the global batch linearly from `start` to train.global_batch_size (GPT-3, arXiv 2005.14165)."""

    start: int = setting(0, range=ranges.BATCH_OR_0, resume=effects.BATCH_RAMP)
    """First global batch, in sequences; 0 = no ramp."""
    increment: int = setting(0, range=ranges.BATCH_OR_0, resume=effects.BATCH_RAMP)
    """Sequences added at each stage of the ramp."""
    samples: int = setting(0, range=ranges.SAMPLES_OR_0, resume=effects.BATCH_RAMP)
    """Sequences consumed during the whole ramp."""


@dataclass
class LossScaleConfig:
    """Dynamic loss scaling of fp16 (arXiv 1710.03740)."""

    initial_power: int = setting(
        16, range=ranges.LOSS_SCALE_POWER, resume=SAFE
    )  # the scale has long moved away from it
    """The first scale is 2 to this power."""
    window: int = setting(1000, range=ranges.STEPS, resume=effects.LOSS_SCALE)
    """Steps without overflow after which the scale doubles."""
    hysteresis: int = setting(2, range=ranges.STEPS, resume=effects.LOSS_SCALE)
    """Number of overflows before the scale halves."""
    minimum: int = setting(1, range=ranges.LOSS_SCALE, resume=effects.LOSS_SCALE)
    """Smallest scale; it is not halved further."""


@dataclass
class TrainConfig:
    """Steps, batches, precision, checkpoints and the run folder."""

    steps: int = setting(300, range=ranges.STEPS, resume=effects.LAST_STEP)
    """Optimizer steps of the whole run."""
    micro_batch_size: int = setting(4, range=ranges.BATCH, resume=effects.MASKS)
    """Sequences of one forward pass on one data-parallel rank."""
    global_batch_size: int = setting(32, range=ranges.BATCH, resume=effects.BATCH)
    """Sequences of one optimizer step, over all ranks."""
    batch_ramp: BatchRampConfig = field(default_factory=BatchRampConfig)
    seed: int = setting(1234, range=ranges.SEED, resume=effects.ORDER)
    """Seed of initialisation, data order and dropout."""
    precision: Precision = setting(Precision.fp32, resume=effects.PRECISION)
    """Precision of forward and backward pass; bf16 and fp16 keep fp32 master weights."""
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)
    compile: Compile = setting(Compile.none, resume=SAFE)  # a mask of dropout does not depend on it
    """blocks = transformer layers train through torch.compile: about a minute more at the start, then shorter steps on
    a GPU. Evaluation and generation run as without it. Not with ZeRO-3. Losses differ in the last digits."""
    head_chunk: int | None = setting(None, range=ranges.TOKENS, resume=SAFE)  # the same sums in another order
    """Tokens whose logits exist at once: output head and loss go through a micro-batch in chunks of this size. None =
    as many as fit 128 MiB on a CPU, 256 MiB on a GPU."""
    deterministic: bool = setting(False, resume=SAFE)
    """On GPUs, use only algorithms that give the same bits in every run, at the price of speed; see docs/gpus.md. On
    CPUs runs always repeat bit for bit."""
    log_interval: int = setting(1, range=ranges.STEPS, resume=SAFE)
    """Steps between lines of metrics.jsonl."""
    eval_interval: int = setting(100, range=ranges.STEPS_OR_0, resume=SAFE)
    """Steps between validations; 0 = only at the end."""
    eval_batches: int = setting(8, range=ranges.STEPS, resume=effects.VALIDATION)
    """Global batches per validation."""
    save_interval: int = setting(100, range=ranges.STEPS_OR_0, resume=SAFE)
    """Steps between checkpoints; 0 = only at the end."""
    keep_last: int = setting(2, range=ranges.STEPS_OR_0, resume=SAFE)
    """Number of newest checkpoints to keep; 0 = all."""
    keep_every: int = setting(0, range=ranges.STEPS_OR_0, resume=SAFE)
    """Besides keep_last, keep the checkpoints of steps that are multiples of this forever; 0 = none."""
    keep_best: int = setting(0, range=ranges.STEPS_OR_0, resume=SAFE)
    """Besides keep_last, keep this many checkpoints with the lowest validation losses; 0 = none."""
    async_save: bool = setting(True, resume=SAFE)
    """Continue training while a checkpoint is written."""
    generate_tokens: int = setting(40, range=ranges.GENERATED_TOKENS, resume=SAFE)
    """Tokens of the generated sample in the summary; 0 = none."""
    generate_prompt: str = setting("def ", text=texts.free, resume=SAFE)  # an empty one is checked by `prompt_is_given`
    """Prompt for the sample in the summary."""
    run_dir: str | None = setting(None, text=texts.path, resume=SAFE)
    """The run folder; None = runs/<script>-<model.name>. The same folder resumes, under any layout."""
    max_non_finite_steps: int = setting(3, range=ranges.STEPS, resume=SAFE)
    """Consecutive steps with a loss or an update that is NaN or Inf, after which the run ends as diverged."""
    timeout_seconds: float = setting(600.0, range=ranges.SECONDS, resume=SAFE)
    """How long a rank may stay in one phase (data, save, ...) before the job ends with a report of the hang."""


@dataclass
class TrackingConfig:
    """Progress display, plots and experiment tracking."""

    progress: bool = setting(True, resume=SAFE)
    """Show the progress bar (a plain line per log_interval where the output is not a terminal)."""
    wandb: WandbMode = setting(WandbMode.disabled, resume=SAFE)
    """Report to Weights & Biases."""
    wandb_project: str = setting("megatron_lite", text=texts.project, resume=SAFE)
    """The run's project in Weights & Biases."""
    wandb_name: str | None = setting(None, text=texts.line, resume=SAFE)
    """The run's name in Weights & Biases; None = the run folder's name."""
    tensorboard: bool = setting(False, resume=SAFE)
    """Write event files for TensorBoard into the run folder."""
    plot: bool = setting(True, resume=SAFE)
    """Draw loss.png at the end, and write report.html."""
