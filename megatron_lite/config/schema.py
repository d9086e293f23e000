"""The one source of every setting: typed, documented, and free of torch.

A `RunConfig` is composed by Hydra (`compose.py`), completed (`derived.py`), validated (`validate.py`), turned into a
`ResolvedConfig` (`resolved.py`) and written once into the run folder (`frozen.py`). YAML files under
`megatron_lite/conf/` hold values only; their meaning is documented here, below each field.

Sizes are in elements, batches in sequences, times in seconds. `None` means "derived": the field says from what.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from megatron_lite.config.decays import Decay as Decay
from megatron_lite.config.launcher import LauncherConfig
from megatron_lite.config.stability import StabilityConfig


class Architecture(StrEnum):
    decoder = "decoder"  # each position sees those before it: GPT-2, LLaMA
    encoder = "encoder"  # each position sees all: BERT, RoBERTa
    encoder_decoder = "encoder_decoder"  # T5, BART


class Normalization(StrEnum):
    layernorm = "layernorm"
    rmsnorm = "rmsnorm"


class NormPlacement(StrEnum):
    pre = "pre"  # before attention and MLP, and once more after the last layer: GPT-2, LLaMA, T5
    post = "post"  # of each sum with the residual: BERT, RoBERTa, BART


class Activation(StrEnum):
    relu = "relu"
    gelu = "gelu"  # exact, by the error function
    gelu_tanh = "gelu_tanh"  # GPT-2's tanh approximation
    swiglu = "swiglu"  # silu(gate) * up, three matrices (arXiv 2002.05202)
    geglu = "geglu"  # gelu_tanh(gate) * up (T5 v1.1)

    @property
    def is_gated(self) -> bool:
        return self in (Activation.swiglu, Activation.geglu)


class PositionEmbedding(StrEnum):
    learned = "learned"
    rotary = "rotary"  # arXiv 2104.09864, half-rotation as in GPT-NeoX and LLaMA
    relative = "relative"  # a learned bias on attention scores by distance, shared by all layers of a stack (T5)


class InitScheme(StrEnum):
    normal = "normal"  # N(0, init_std); into the residual stream / sqrt(2 layers), 3 with cross-attention (GPT-2)
    plain = "plain"  # N(0, init_std) for all (BERT, RoBERTa, BART)
    t5 = "t5"  # by fan-in, with 1 / sqrt(head_size) folded into the query (arXiv 1910.10683)


class CheckInit(StrEnum):
    auto = "auto"
    always = "always"
    never = "never"


class Recompute(StrEnum):
    none = "none"
    selective = "selective"  # the core attention only (arXiv 2205.05198)
    full = "full"  # every transformer layer from its input


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class ObjectiveName(StrEnum):
    causal_lm = "causal_lm"
    prefix_lm = "prefix_lm"
    fill_in_the_middle = "fill_in_the_middle"
    masked_lm = "masked_lm"
    masked_lm_nsp = "masked_lm_nsp"
    span_corruption = "span_corruption"
    bart_denoising = "bart_denoising"
    ul2 = "ul2"


class OptimizerName(StrEnum):
    adamw = "adamw"
    sgd = "sgd"
    adafactor = "adafactor"


class WandbMode(StrEnum):
    disabled = "disabled"
    auto = "auto"  # online when the user is logged in, offline otherwise
    offline = "offline"
    online = "online"


@dataclass
class ModelConfig:
    """A transformer; GPT-2, LLaMA, BERT, RoBERTa, T5 and BART differ only in these settings."""

    name: str = "gpt_tiny"
    """Label for run folders and plots."""
    init_from: str | None = None
    """Weights to start from: a Hugging Face folder (or hub name) with safetensors, or one of our checkpoints. They also
    set the model's settings, and data.tokenizer unless it is given; None = random initialisation."""
    check_init: CheckInit = CheckInit.auto
    """Before the first step, compare logits of the init_from weights with those that transformers computes from the
    same folder: `auto` if it is installed and the model fits in this machine's memory, `always` (also accepts a
    config.json with keys that we do not know), or `never`."""
    architecture: Architecture = Architecture.decoder
    """Which positions attend to which: one stack of causal or of bidirectional layers, or two stacks."""
    num_layers: int = 4
    """Layers of the single stack, or of the encoder."""
    num_decoder_layers: int | None = None
    """Layers of the decoder of an encoder_decoder; None = num_layers."""
    hidden_size: int = 128
    """Width of the residual stream."""
    num_attention_heads: int = 4
    """Query heads of each attention."""
    num_query_groups: int | None = None
    """Key/value heads; None = one per attention head (multi-head), 1 = multi-query."""
    head_size: int | None = None
    """Channels of one head; None = hidden_size / num_attention_heads."""
    ffn_hidden_size: int | None = None
    """Inner width of the MLP; None = 4 x hidden_size, or 8/3 x hidden_size rounded up to 64 for SwiGLU."""
    max_position_embeddings: int = 1024
    """Longest sequence: size of the learned position table, upper bound of data.seq_length."""
    vocab_size: int | None = None
    """True vocabulary; None = that of the tokenizer. Padded rows never take part in the loss."""
    vocab_pad_multiple: int = 128
    """The embedding has a multiple of this x tensor_parallel_size rows (Megatron's make-vocab-size-divisible-by)."""
    normalization: Normalization = Normalization.layernorm
    """Kind of all norms."""
    norm_placement: NormPlacement = NormPlacement.pre
    """Where the norms of a block are."""
    norm_epsilon: float = 1e-5
    """Added to the variance, or mean square, under the square root of each norm."""
    embedding_norm: bool = False
    """Normalise the sum of the embeddings (BERT, RoBERTa, BART)."""
    activation: Activation = Activation.gelu_tanh
    """Activation of the MLP; swiglu and geglu are gated, with a third matrix."""
    position_embedding: PositionEmbedding = PositionEmbedding.learned
    """How the model encodes the positions of tokens."""
    position_offset: int = 0
    """Unused rows of the learned position table before position 0 (RoBERTa, BART: 2)."""
    rotary_base: float = 10000.0
    """position_embedding=rotary: base of the wavelengths (theta)."""
    relative_buckets: int = 32
    """position_embedding=relative: number of distance buckets; in an encoder half of them for each direction."""
    relative_max_distance: int = 128
    """position_embedding=relative: all distances from here on share a bucket."""
    num_segments: int = 0
    """Rows of the segment (token type) table; 0 = no such table. BERT 2, RoBERTa 1."""
    attention_bias: bool = True
    """Biases of the four attention projections."""
    attention_scale: bool = True
    """Divide attention scores by sqrt(head_size); T5 does not."""
    mlp_bias: bool = True
    """Biases of the matrices of the MLP."""
    tie_embeddings: bool = True
    """The output head uses the word embedding's weight."""
    scale_tied_head: bool = False
    """Multiply by hidden_size^-0.5 before a tied head (T5 v1.0)."""
    head_transform: bool = False
    """A dense layer, the activation and a norm before the head (BERT, RoBERTa)."""
    head_bias: bool = False
    """A bias on the logits (BERT, RoBERTa)."""
    embedding_dropout: float = 0.0
    """On the sum of the embeddings."""
    attention_dropout: float = 0.0
    """On attention probabilities."""
    hidden_dropout: float = 0.0
    """On the output of attention and MLP, before the residual sum."""
    ffn_dropout: float = 0.0
    """Inside the MLP, between the activation and the last matrix (T5)."""
    final_dropout: float = 0.0
    """On the output of each stack, after its last norm (T5)."""
    init: InitScheme = InitScheme.normal
    """How the weights are initialised."""
    init_std: float = 0.02
    """Standard deviation for init=normal and init=plain."""


@dataclass
class ParallelConfig:
    """The layout. world_size = data x tensor x pipeline."""

    tensor_parallel_size: int = 1
    """Ranks that split each layer: heads, MLP width and vocabulary."""
    pipeline_parallel_size: int = 1
    """Stages that split the list of layers."""
    stages: Any = "balanced"
    """How many transformer layers each stage holds: `balanced` cuts by FLOPs, embedding, head, loss and recomputation
    counted; `even` by number; a list such as [5,7,6,6] as given. In an encoder_decoder the decoder's layers follow the
    encoder's. The first stage also holds the embedding, the last one the head; these two may have no layers."""
    data_parallel_size: int | None = None
    """Number of model replicas; None = number of processes / (tensor x pipeline)."""
    sequence_parallel: bool = False
    """Shard norms and dropouts along the sequence inside a tensor-parallel group (arXiv 2205.05198)."""
    zero_stage: int = 1
    """0 (fp32 reference only), 1, or 2/3 with pipeline_parallel_size = 1 (arXiv 1910.02054)."""
    offload_optimizer: bool = False
    """Keep the optimizer's states in host memory and update them there (ZeRO-Offload, arXiv 2101.06840)."""
    recompute: Recompute = Recompute.none
    """Which activations are recomputed in the backward pass instead of stored."""


@dataclass
class DataConfig:
    """Where the text comes from and how it becomes samples."""

    source: Any = "embedded"
    """`embedded`, one path or dataset name or a list: .txt, .jsonl (also .gz, .bz2, .xz, .zst), .parquet (`*` joins
    files into one source), a Megatron .bin/.idx prefix, or a Hugging Face dataset name/path. See docs/data.md."""
    weights: list[float] | None = None
    """Share of samples drawn from each source; None = proportional to its tokens."""
    text_key: str = "text"
    """Field or column that holds the text in .jsonl, .parquet and Hugging Face datasets."""
    document_separator: str | None = "\n\n"
    """What separates documents in a .txt file; None = one document per file. `\\n`, `\\t`, `\\uXXXX` and `\\\\`
    are escapes on the command line."""
    dataset_split: str = "train"
    """Split of a Hugging Face dataset."""
    dataset_config: str | None = None
    """Configuration name of a Hugging Face dataset."""
    max_bad_fraction: float = 0.01
    """Largest share of bad rows among a source's non-empty rows: they are counted, shown and left out. If there are
    more, the preparation fails. Null and empty rows are counted and shown too, but never too many."""
    max_document_bytes: int = 16 * 2**20
    """Longest row, in bytes of the unpacked file: a line of .jsonl with all its fields, a document of .txt, a cell of
    a column. Longer ones are left out as bad rows and never held in memory."""
    tokenizer: str = "train"
    """`train` a byte-level BPE on the sources, or the folder (or hub name) of a Hugging Face tokenizer."""
    tokenizer_vocab_size: int = 8192
    """Size of a trained tokenizer, special tokens included."""
    add_bos: bool | None = None
    """Begin every document with the tokenizer's beginning-of-text token (decoders only); None = if the tokenizer does
    so for a text. The tokenizer of a checkpoint then does the same."""
    eod_token: str | None = None
    """The token that every document ends with; None = the tokenizer's eos_token, or where that ends a turn of a chat,
    such as <|im_end|> or <|eot_id|>, its <|endoftext|> or <|end_of_text|>."""
    seq_length: int = 128
    """Tokens of one sample."""
    validation_fraction: float = 0.02
    """Share of documents held out."""
    validation_source: Any = None
    """A separate source (same forms) to validate on; None = hold out validation_fraction of the documents."""
    max_epochs: int | None = None
    """Passes over any source, after which the run ends as out of data; None = as many as train.steps needs."""
    mask_loss_after_eod: bool = False
    """Exclude from the loss the token after an end-of-document token (the first one of another document)."""
    cache_dir: str = "data"
    """Folder of prepared shards; each data set is in a subfolder named by the hash of what it was made from."""
    num_workers: int | None = None
    """Threads that tokenise; None = the number of cores of this machine."""


@dataclass
class ObjectiveConfig:
    """What the model is trained to predict. Defaults are those of the papers; each objective reads its own fields."""

    name: ObjectiveName = ObjectiveName.causal_lm
    """Which objective; each script trains those of its architecture."""
    masked_fraction: float = 0.15
    """masked_lm, masked_lm_nsp (BERT, arXiv 1810.04805): share of positions that are predicted."""
    mask_token_fraction: float = 0.8
    """Of these, the share that becomes the mask token ..."""
    random_token_fraction: float = 0.1
    """... and the share that becomes a random token; the rest stays."""
    whole_word: bool = False
    """Mask all tokens of a word together."""
    next_fraction: float = 0.5
    """masked_lm_nsp: share of pairs whose second part really follows the first."""
    short_fraction: float = 0.1
    """masked_lm_nsp: share of pairs that are cut to a random shorter length."""
    fim_fraction: float = 0.5
    """fill_in_the_middle (arXiv 2207.14255): share of documents that are rearranged."""
    fim_spm_fraction: float = 0.5
    """Of these, the share in the order suffix, prefix, middle instead of prefix, suffix, middle."""
    noise_density: float = 0.15
    """span_corruption (T5, arXiv 1910.10683): share of tokens that are replaced by sentinels."""
    mean_span_length: float = 3.0
    """span_corruption: tokens of a replaced span, on average."""
    infill_fraction: float = 0.3
    """bart_denoising (arXiv 1910.13461): share of tokens that lie in masked spans."""
    infill_span_length: float = 3.0
    """bart_denoising: lambda of the Poisson distribution of span lengths."""
    permute_sentences: bool = True
    """bart_denoising: shuffle the sentences of the input."""
    ul2_mode_tokens: bool = True
    """ul2 (arXiv 2205.05131): begin the input with the token of its denoiser, [NLU], [S2S] or [NLG]."""
    ul2_weights: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    """ul2 (arXiv 2205.05131, table 1): weights of its seven denoisers: two R, one S, four X."""
    ul2_span_lengths: list[float] = field(default_factory=lambda: [3.0, 8.0, 3.0, 8.0, 64.0, 64.0])
    """ul2: tokens of a span on average, of its two R- and four X-denoisers."""
    ul2_noise_densities: list[float] = field(default_factory=lambda: [0.15, 0.15, 0.5, 0.5, 0.15, 0.5])
    """ul2: share of tokens that these six take out."""
    ul2_s_density: float = 0.25
    """ul2: share of tokens that the S-denoiser predicts, on average: the suffix begins at a random position."""
    decoder_seq_length: int | None = None
    """ul2 only: positions of the decoder; None = half of data.seq_length. The other objectives compute them."""


@dataclass
class OptimizerConfig:
    """The optimizer and the schedule of its learning rate."""

    name: OptimizerName = OptimizerName.adamw
    """Which optimizer; adafactor needs ZeRO-0."""
    learning_rate: float = 3e-4
    """Peak learning rate, after warm-up."""
    min_learning_rate: float = 3e-5
    """Learning rate at the end of the decay."""
    warmup_steps: int = 10
    """Steps of linear growth from 0 to learning_rate."""
    decay: Decay = Decay.cosine
    """How the learning rate falls after the warm-up: config/decays.py has the formulas."""
    decay_steps: int | None = None
    """Step at which min_learning_rate is reached; None = train.steps. Of decays with an end only."""
    decay_fraction: float = 0.1
    """wsd: share of the steps until decay_steps that decay to min_learning_rate; the steps before stay at the peak."""
    beta1: float = 0.9
    """Decay rate of AdamW's first moment."""
    beta2: float = 0.95
    """Decay rate of AdamW's second moment."""
    epsilon: float = 1e-8
    """Added to the square root of AdamW's second moment."""
    momentum: float = 0.0
    """Momentum of SGD."""
    weight_decay: float = 0.1
    """Decoupled weight decay; on matrices only, never on biases and norm weights."""
    clip_grad_norm: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""
    z_loss_weight: float = 0.0
    """Weight of an auxiliary loss that keeps logits from drifting: mean of log(Z)^2, Z being the softmax's denominator
    (PaLM, arXiv 2204.02311: 1e-4). It is in the gradients and logged as z_loss, but not part of `loss`. 0 = off."""


@dataclass
class BatchRampConfig:
    """Grow the global batch linearly from `start` to train.global_batch_size (GPT-3, arXiv 2005.14165)."""

    start: int = 0
    """First global batch, in sequences; 0 = no ramp."""
    increment: int = 0
    """Sequences added at each stage of the ramp."""
    samples: int = 0
    """Sequences consumed during the whole ramp."""


@dataclass
class LossScaleConfig:
    """Dynamic loss scaling of fp16 (arXiv 1710.03740)."""

    initial_power: int = 16
    """The first scale is 2 to this power."""
    window: int = 1000
    """Steps without overflow after which the scale doubles."""
    hysteresis: int = 2
    """Number of overflows before the scale halves."""
    minimum: int = 1
    """Smallest scale; it is not halved further."""


@dataclass
class TrainConfig:
    """Steps, batches, precision, checkpoints and the run folder."""

    steps: int = 300
    """Optimizer steps of the whole run."""
    micro_batch_size: int = 4
    """Sequences of one forward pass on one data-parallel rank."""
    global_batch_size: int = 32
    """Sequences of one optimizer step, over all ranks."""
    batch_ramp: BatchRampConfig = field(default_factory=BatchRampConfig)
    seed: int = 1234
    """Seed of initialisation, data order and dropout."""
    precision: Precision = Precision.fp32
    """Precision of forward and backward pass; bf16 and fp16 keep fp32 master weights."""
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)
    log_interval: int = 1
    """Steps between lines of metrics.jsonl."""
    eval_interval: int = 100
    """Steps between validations; 0 = only at the end."""
    eval_batches: int = 8
    """Global batches per validation."""
    save_interval: int = 100
    """Steps between checkpoints; 0 = only at the end."""
    keep_last: int = 2
    """Number of newest checkpoints to keep; 0 = all."""
    keep_every: int = 0
    """Besides keep_last, keep the checkpoints of steps that are multiples of this forever; 0 = none."""
    keep_best: int = 0
    """Besides keep_last, keep this many checkpoints with the lowest validation losses; 0 = none."""
    async_save: bool = True
    """Continue training while a checkpoint is written."""
    generate_tokens: int = 40
    """Tokens of the generated sample in the summary; 0 = none."""
    generate_prompt: str = "def "
    """Prompt for the sample in the summary."""
    run_dir: str | None = None
    """The run folder; None = runs/<script>-<model.name>. The same folder resumes, under any layout."""
    max_non_finite_steps: int = 3
    """Consecutive steps with a loss or an update that is NaN or Inf, after which the run ends as diverged."""
    timeout_seconds: float = 600.0
    """How long a rank may stay in one phase (data, save, ...) before the job ends with a report of the hang."""


@dataclass
class TrackingConfig:
    """Progress display, plots and experiment tracking."""

    progress: bool = True
    """Show the progress bar (a plain line per log_interval where the output is not a terminal)."""
    wandb: WandbMode = WandbMode.disabled
    """Report to Weights & Biases."""
    wandb_project: str = "megatron_lite"
    """The run's project in Weights & Biases."""
    wandb_name: str | None = None
    """The run's name in Weights & Biases; None = the run folder's name."""
    tensorboard: bool = False
    """Write event files for TensorBoard into the run folder."""
    plot: bool = True
    """Draw loss.png at the end, and write report.html."""


@dataclass
class RunConfig:
    """Everything that decides a run. Frozen into the run folder as config-<sha12>.yaml."""

    script: str = "pretrain_gpt"
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
    debug: bool = False
    """Show tracebacks of user errors (also: --debug)."""
