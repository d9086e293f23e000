"""Every rule, by its exact words."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from megatron_lite.config.compose import compose
from megatron_lite.config.derived import fill_in
from megatron_lite.config.preset_folders import PresetFolders
from megatron_lite.config.rules.case import Case
from megatron_lite.config.rules.launcher import job_seconds
from megatron_lite.config.rules.lengths import LENGTH_RULES
from megatron_lite.config.rules.tracking import MODE_VARIABLE
from megatron_lite.config.rules.training import FP16_ON_CPU
from megatron_lite.config.schema import RunConfig
from megatron_lite.config.validate import RULES, problems, validate
from megatron_lite.errors import ConfigError
from tests.unit.config.launcher_violations import LAUNCHER_VIOLATIONS
from tests.unit.config.objective_violations import OBJECTIVE_VIOLATIONS


@cache
def config_of(*words: str, device: str = "cpu") -> RunConfig:
    """Of pretrain_gpt, unless the first word names another script; the device is found unless `auto` is asked for.

    Only read: what composing takes is kept.
    """
    device = "auto" if "launcher.device=auto" in words else device
    script = words[0] if words and words[0].startswith("pretrain_") else "pretrain_gpt"
    return fill_in(compose(script, [word for word in words if word != script]), device=device)


def problems_of(*words: str, world_size: int | None = None, device: str = "cpu") -> list[str]:
    return problems(config_of(*words, device=device), world_size)


VIOLATIONS: dict[str, tuple[list[str], str]] = OBJECTIVE_VIOLATIONS | LAUNCHER_VIOLATIONS | {
    # ------------------------------------------------------------------------------------------ processes
    "world size is not an multiple": (
        ["parallel=tp2", "parallel.pipeline_parallel_size=4", "parallel.data_parallel_size=null",
         "launcher.num_processes=12"],
        "launcher.num_processes=12 must be a multiple of tensor x pipeline = 2 x 4 = 8; use 8 processes (dp=1), or 16 "
        "processes (dp=2), or the layout dp=2 tp=2 pp=3",
    ),
    "processes that no plan can list": (
        ["parallel=dp512_tp2_pp4096", "model.num_layers=5000", "train.global_batch_size=2048"],
        "parallel.data_parallel_size=512 x tensor x pipeline = 512 x 2 x 4096 = 4194304 processes are more than "
        "131072, the most that a plan can list; use smaller sizes",
    ),
    "world size is not the layout's": (
        ["parallel=dp2_tp2_pp2", "launcher.num_processes=4"],
        "launcher.num_processes=4 must be data x tensor x pipeline = 2 x 2 x 2 = 8; use 8 processes (dp=2), or the "
        "layout dp=2 tp=2 pp=1",
    ),
    "stages that are no word": (
        ["parallel=pp2", "parallel.stages=evn"],
        "parallel.stages=evn is no way to cut; use balanced, even, or a list of one integer for each stage",
    ),
    "stages that are no integers": (
        ["parallel=pp2", "parallel.stages=[2.5,1.5]"],
        "parallel.stages=[2.5,1.5] is no way to cut; use balanced, even, or a list of one integer for each stage",
    ),
    "stages that are null": (
        ["parallel=pp2", "parallel.stages=null"],
        "parallel.stages=null is no way to cut; use balanced, even, or a list of one integer for each stage",
    ),
    "number of stages": (
        ["parallel=pp2", "parallel.stages=[1,2,1]"],
        "parallel.stages=[1,2,1] must have one number of layers for each of parallel.pipeline_parallel_size=2 stages, "
        "not 3; use [2,2], balanced or even",
    ),
    "layers of all stages": (
        ["parallel=pp2", "parallel.stages=[2,3]"],
        "parallel.stages=[2,3] must add up to model.num_layers=4, not to 5; use [2,2], balanced or even",
    ),
    "layers of the stages of both stacks": (
        ["pretrain_t5", "parallel=pp2", "parallel.stages=[1,1]"],
        "parallel.stages=[1,1] must add up to model.num_layers + model.num_decoder_layers=4, not to 2; use [2,2], "
        "balanced or even",
    ),
    "negative stage": (
        ["parallel=pp2", "parallel.stages=[5,-1]"],
        "parallel.stages=[5,-1] must have no negative number, as -1; use [2,2], balanced or even",
    ),
    "empty stage in the middle": (
        ["parallel=dp1_tp1_pp3", "parallel.stages=[2,0,2]"],
        "parallel.stages=[2,0,2] leaves stage 1 empty: only the first stage, which holds the embedding, and the last "
        "one, which holds the head, may have no layers; use [2,1,1], balanced or even",
    ),
    # ---------------------------------------------------------------------------------------------- model
    "family that computes something else": (
        ["model.family=llama"],
        "model.family=llama is not what these settings make: LlamaForCausalLM of transformers has rmsnorm for "
        "model.normalization=layernorm, and rotary for model.position_embedding=learned, and swiglu or geglu for "
        "model.activation=gelu_tanh; change them, or set model.family=null",
    ),
    "family of another name": (
        ["model.family=gpt-2"],
        "model.family=gpt-2 is no model_type that we know; did you mean gpt2? (choose one of gpt2, llama, mistral, "
        "bert, roberta, t5, bart)",
    ),
    "hidden and heads": (
        ["model.hidden_size=130"],
        "model.hidden_size=130 must be a multiple of model.num_attention_heads=4; use 128 or 132, or set "
        "model.head_size",
    ),
    "odd rotary head": (
        ["model=llama_tiny", "model.head_size=33"],
        "model.head_size=33 must be even, since rotary positions turn pairs; use 32 or 34",
    ),
    "groups and heads": (
        ["model.num_query_groups=3"],
        "model.num_query_groups=3 must divide model.num_attention_heads=4; use 1, 2 or 4",
    ),
    "tensor and heads": (
        ["model.num_attention_heads=16", "model.ffn_hidden_size=513", "parallel.tensor_parallel_size=3"],
        "parallel.tensor_parallel_size=3 must divide model.num_attention_heads=16; use 1, 2, 4, 8 or 16",
    ),
    "tensor and groups": (
        ["model.num_query_groups=2", "parallel.tensor_parallel_size=4"],
        "parallel.tensor_parallel_size=4 must divide model.num_query_groups=2, since each rank holds whole groups; "
        "use 1 or 2",
    ),
    "tensor and ffn": (
        ["model.ffn_hidden_size=511", "parallel.tensor_parallel_size=2"],
        "parallel.tensor_parallel_size=2 must divide model.ffn_hidden_size=511; set model.ffn_hidden_size to 510 or "
        "512",
    ),
    "pipeline and layers": (
        ["parallel.pipeline_parallel_size=8"],
        "parallel.pipeline_parallel_size=8 is more than model.num_layers=4, so a stage would be empty; use 4 or fewer",
    ),
    "sequence and positions": (
        ["data.seq_length=2048"],
        "data.seq_length=2048 is longer than model.max_position_embeddings=1024; use at most 1024, or set "
        "model.max_position_embeddings=2048",
    ),
    "tokenizer and vocabulary": (
        ["model.vocab_size=5000"],
        "data.tokenizer_vocab_size=8192 is more than model.vocab_size=5000; use at most 5000, or set "
        "model.vocab_size=null",
    ),
    "vocabulary": (
        ["model.vocab_size=0"],
        "model.vocab_size=0 must be at least 1; use null for the size of the tokenizer",
    ),
    "vocabulary padding": (
        ["model.vocab_pad_multiple=0"],
        "model.vocab_pad_multiple=0 must be at least 1; use 1 or more",
    ),
    # --------------------------------------------------------------------------------------------- layout
    "sequence parallel without tensor": (
        ["parallel.sequence_parallel=true"],
        "parallel.sequence_parallel=true needs parallel.tensor_parallel_size > 1, whose ranks share the sequence; set "
        "parallel.sequence_parallel=false",
    ),
    "sequence parallel and sequence": (
        ["parallel=tp4", "parallel.sequence_parallel=true", "data.seq_length=126"],
        "data.seq_length=126 must be a multiple of parallel.tensor_parallel_size=4 with "
        "parallel.sequence_parallel=true; use 124 or 128",
    ),
    "ZeRO-2 and pipeline": (
        ["parallel=pp2", "parallel.zero_stage=2"],
        "parallel.zero_stage=2 needs parallel.pipeline_parallel_size=1, not 2: a pipeline accumulates whole gradients "
        "over its micro-batches; use parallel.zero_stage=1",
    ),
    "ZeRO-0 and bf16": (
        ["parallel.zero_stage=0", "train.precision=bf16"],
        "parallel.zero_stage=0 needs train.precision=fp32, not bf16: without ZeRO there are no right fp32 master "
        "weights; use parallel.zero_stage=1",
    ),
    "ZeRO-3 and compiled blocks": (
        ["parallel.zero_stage=3", "train.compile=blocks"],
        "train.compile=blocks needs parallel.zero_stage=2 or less, not 3: a graph takes the weights of a whole layer "
        "at once, and ZeRO-3 gathers them module by module inside it; use train.compile=none or parallel.zero_stage=2",
    ),
    "ZeRO stage": (["parallel.zero_stage=4"], "parallel.zero_stage=4 is not known; use 0, 1, 2 or 3"),
    "Adafactor and ZeRO": (
        ["optimizer=adafactor", "parallel.zero_stage=1"],
        "optimizer.name=adafactor needs parallel.zero_stage=0, not 1: ZeRO flattens parameters, so the rows and "
        "columns that Adafactor factors are lost; use parallel.zero_stage=0 or optimizer.name=adamw",
    ),
    "Adafactor and bf16": (
        ["optimizer=adafactor", "train.precision=bf16"],
        "optimizer.name=adafactor needs train.precision=fp32, not bf16: it runs without ZeRO, which holds the fp32 "
        "master weights; use train.precision=fp32 or optimizer.name=adamw",
    ),
    "offload and ZeRO-0": (
        ["parallel.offload_optimizer=true", "parallel.zero_stage=0"],
        "parallel.offload_optimizer=true needs parallel.zero_stage >= 1, which owns the states that are moved; use "
        "parallel.zero_stage=1",
    ),
    "offload and SGD": (
        ["parallel.offload_optimizer=true", "optimizer=sgd"],
        "parallel.offload_optimizer=true needs optimizer.name=adamw, not sgd: only Adam's arithmetic runs on the host; "
        "set parallel.offload_optimizer=false",
    ),
    # ---------------------------------------------------------------------------------------------- batch
    "global batch": (
        ["parallel=dp2", "train.global_batch_size=36"],
        "train.global_batch_size=36 must be a multiple of train.micro_batch_size x data-parallel size = 4 x 2 = 8; use "
        "32 or 40",
    ),
    "tokens beyond an int64": (
        ["train.steps=99999999", "train.global_batch_size=16777216", "data.seq_length=16777216",
         "model.max_position_embeddings=16777216"],
        "train.steps=99999999 x train.global_batch_size=16777216 x data.seq_length=16777216 are "
        "28147497389590623289344 tokens, more than an int64 counts; use train.steps=32767 or less",
    ),
    "ramp starts above": (
        ["train.batch_ramp={start:64,increment:4,samples:10}"],
        "train.batch_ramp.start=64 is more than train.global_batch_size=32; use at most 32",
    ),
    "ramp start": (
        ["train.batch_ramp={start:6,increment:4,samples:10}"],
        "train.batch_ramp.start=6 must be a multiple of train.micro_batch_size x data-parallel size = 4; use 4 or 8",
    ),
    "ramp increment": (
        ["train.batch_ramp={start:8,increment:6,samples:10}"],
        "train.batch_ramp.increment=6 must be a multiple of train.micro_batch_size x data-parallel size = 4; use 4 or "
        "8",
    ),
    "ramp increment and batch": (
        ["train.batch_ramp={start:8,increment:16,samples:10}"],
        "train.batch_ramp.increment=16 must divide train.global_batch_size - train.batch_ramp.start = 32 - 8 = 24; use "
        "4, 8, 12 or 24",
    ),
    "ramp without increment": (
        ["train.batch_ramp={start:8,increment:0,samples:10}"],
        "train.batch_ramp.increment=0 must be positive while there is a ramp; use 4",
    ),
    "ramp without samples": (
        ["train.batch_ramp={start:8,increment:4}"],
        "train.batch_ramp.samples=0 must be positive while there is a ramp; give the sequences that it lasts",
    ),
    "ramp without start": (
        ["train.batch_ramp.increment=4"],
        "train.batch_ramp.increment=4 has no effect while train.batch_ramp.start=0; give the first batch as "
        "train.batch_ramp.start",
    ),
    # ---------------------------------------------------------------------------------------------- range
    "more than fp32 can tell": (
        ["optimizer.epsilon=1e-300"],
        "optimizer.epsilon=1e-300 is less than 1.2e-38, the smallest number that fp32 holds; use 1.2e-38 or more",
    ),
    "rate beyond use": (
        ["optimizer.learning_rate=1e10"],
        "optimizer.learning_rate=1e+10 is more than 1000, where no update is small any more; use at most 1000",
    ),
    "endless sequence": (
        ["data.seq_length=1000000000"],
        "data.seq_length=1000000000 is more than 16777216, the longest sequence that is planned for; use at most "
        "16777216",
    ),
    "endless vocabulary": (
        ["model.vocab_size=1e12"],
        "model.vocab_size=1000000000000 is more than 2147483647, the largest int32, which holds a token; use at most "
        "2147483647",
    ),
    "endless wait": (
        ["train.timeout_seconds=1e30"],
        "train.timeout_seconds=1e+30 is more than 1e+07, 115 days; use at most 1e+07",
    ),
    "weight that is not a number": (
        ["data.weights=[nan]"],
        "data.weights[0]=nan must be a number; give a finite one",
    ),
    "path that a shell left empty": (
        ["train.run_dir="],
        "train.run_dir='' is an empty path, as an unset variable of a shell leaves it; give a path, or leave the "
        "setting out",
    ),
    "name that leaves its folder": (
        ["model.name=../../x"],
        "model.name=../../x becomes part of a folder's name; use a name without `/`",
    ),
    "name longer than file systems take": (
        [f"train.run_dir=runs/{300 * 'a'}"],
        f"train.run_dir=runs/{155 * 'a'}... (305 characters) holds a name of 300 bytes; file systems take 255: use a "
        "shorter one",
    ),
    "separator of nothing": (
        ["data.document_separator="],
        "data.document_separator='' is empty; give a text, or leave the setting out",
    ),
    # --------------------------------------------------------------------------------------- optimisation
    "fp16 on a CPU": (
        ["train.precision=fp16"],
        "train.precision=fp16 does not run on a CPU; use train.precision=bf16",
    ),
    "loss scale power": (
        ["train.loss_scale.initial_power=40"],
        "train.loss_scale.initial_power=40 is more than 32, where the scale overflows any fp16 gradient; use at most "
        "32",
    ),
    "loss scale minimum": (
        ["train.loss_scale={initial_power:2,minimum:8}"],
        "train.loss_scale.minimum=8 is more than the first scale 2^2; use at most 4",
    ),
    "loss scale window": (["train.loss_scale.window=0"], "train.loss_scale.window=0 must be at least 1; use 1 or more"),
    "warm-up": (
        ["optimizer.warmup_steps=300"],
        "optimizer.warmup_steps=300 must be less than train.steps=300; use at most 299",
    ),
    "decay": (
        ["optimizer.decay_steps=10"],
        "optimizer.decay_steps=10 must be more than optimizer.warmup_steps=10, where the decay starts; use null for "
        "train.steps",
    ),
    "minimum rate": (
        ["optimizer.min_learning_rate=0.01"],
        "optimizer.min_learning_rate=0.01 is more than optimizer.learning_rate=0.0003; use at most 0.0003",
    ),
    "rate": (
        ["optimizer.learning_rate=0", "optimizer.min_learning_rate=0"],
        "optimizer.learning_rate=0 must be a positive number; use a value above 0",
    ),
    "beta": (
        ["optimizer.beta2=1"],
        "optimizer.beta2=1 must be at least 0 and less than 1; use a fraction such as 0.1",
    ),
    "dropout": (
        ["model.hidden_dropout=-0.1"],
        "model.hidden_dropout=-0.1 must be at least 0 and less than 1; use a fraction such as 0.1",
    ),
    "not a number": (
        ["optimizer.weight_decay=nan"],
        "optimizer.weight_decay=nan must be a number >= 0; use 0 or more",
    ),
    "steps": (["train.steps=0"], "train.steps=0 must be at least 1; use 1 or more"),
    "interval": (["train.save_interval=-1"], "train.save_interval=-1 must be a number >= 0; use 0 or more"),
    "clipping": (
        ["optimizer.clip_grad_norm=-1"],
        "optimizer.clip_grad_norm=-1 must be a number >= 0; use 0 or more",
    ),
    "tensor size": (
        ["parallel.tensor_parallel_size=0"],
        "parallel.tensor_parallel_size=0 must be at least 1; use 1 or more",
    ),
    # ----------------------------------------------------------------------------------------------- data
    "no source": (
        ["data.source=null"],
        "data.source=null names no text; give a file or a list of files, or use data.source=embedded",
    ),
    "source of validation": (
        ["data.validation_source=[]"],
        "data.validation_source=[] names no text; give a file or a list of files, or use "
        "data.validation_source=embedded",
    ),
    "nothing held out": (
        ["data.validation_fraction=0"],
        "data.validation_fraction=0 holds nothing out; use a fraction such as 0.02, or set data.validation_source",
    ),
    "number of weights": (
        ["data.weights=[1,2]"],
        "data.weights=[1.0, 2.0] has 2 numbers for 1 data.source; give one weight a source",
    ),
    "share of bad rows": (
        ["data.max_bad_fraction=1.5"],
        "data.max_bad_fraction=1.5 must be at least 0 and at most 1; use a fraction such as 0.1",
    ),
    "longest document": (
        ["data.max_document_bytes=0"],
        "data.max_document_bytes=0 must be at least 1; use 1 or more",
    ),
    "negative weight": (
        ["data.source=[a,b]", "data.weights=[1,-2]"],
        "data.weights=[1.0, -2.0] must be 0 or more and not all 0; give each source its share",
    ),
    "empty prompt": (
        ["train.generate_prompt=''"],
        "train.generate_prompt='' is empty; give the text that the sample starts from, or train.generate_tokens=0",
    ),
    # ---------------------------------------------------------------------------------------- checkpoints
    "negative multiple": (
        ["train.keep_every=-1"],
        "train.keep_every=-1 must be a number >= 0; use 0 or more",
    ),
    "multiple of all": (
        ["train.keep_last=0", "train.keep_every=200"],
        "train.keep_every=200 has no effect while train.keep_last=0 keeps all checkpoints; set train.keep_last to the "
        "number of the newest ones to keep",
    ),
    "best of all": (
        ["train.keep_last=0", "train.keep_best=2"],
        "train.keep_best=2 has no effect while train.keep_last=0 keeps all checkpoints; set train.keep_last to the "
        "number of the newest ones to keep",
    ),
    "multiple of no save": (
        ["train.keep_every=150"],
        "train.keep_every=150 must be a multiple of train.save_interval=100, after which checkpoints are written; use "
        "100 or 200",
    ),
    "best without validation": (
        ["train.keep_best=1", "train.eval_interval=0"],
        "train.keep_best=1 has no effect while train.eval_interval=0: no checkpoint but the last gets a validation "
        "loss; set train.eval_interval=100",
    ),
    "more steps than the window": (
        ["stability.window=10", "stability.min_steps=12"],
        "stability.min_steps=12 is more than stability.window=10, which never holds as many; use at most 10",
    ),
    "rollback to nothing": (
        ["stability=rollback", "train.save_interval=0"],
        "stability.on_spike=rollback goes back to a checkpoint, and train.save_interval=0 writes none before the end; "
        "set train.save_interval to the steps that you can afford to lose, such as 100",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VIOLATIONS)
def test_one_violation_gives_one_message(name: str) -> None:
    words, message = VIOLATIONS[name]
    assert problems_of(*words) == [message]


def test_mode_of_wandb_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODE_VARIABLE, "bogus")
    assert problems_of("tracking=wandb") == [
        "WANDB_MODE=bogus in the environment is not known; use online, offline or disabled, or unset it"
    ]
    assert problems_of() == []
    for mode in ("online", "offline", "disabled", ""):
        monkeypatch.setenv(MODE_VARIABLE, mode)
        assert problems_of("tracking=wandb") == []


def test_every_rule_has_a_case_above(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODE_VARIABLE, "bogus")
    cases = [
        Case(config_of(*words, device="cpu"), None) for words, _ in [*VIOLATIONS.values(), (["tracking=wandb"], "")]
    ]
    rules = (*RULES, *LENGTH_RULES)
    silent = [rule.__name__ for rule in rules if not any(message for case in cases for message in rule(case))]
    assert silent == []


@pytest.mark.parametrize(
    ("vocabulary", "remedy"),
    [(5000, "use at most 5000"), (300, "name the tokenizer of model.init_from in data.tokenizer")],
)
def test_sizes_of_weights_are_not_offered_for_change(vocabulary: int, remedy: str) -> None:
    config = config_of()
    model = replace(config.model, init_from="w", vocab_size=vocabulary, max_position_embeddings=64)
    assert problems(replace(config, model=model)) == [
        "data.seq_length=128 is longer than model.max_position_embeddings=64; use at most 64",
        f"data.tokenizer_vocab_size=8192 is more than model.vocab_size={vocabulary}; {remedy}",
    ]


@pytest.mark.parametrize("script", PresetFolders().scripts())
def test_defaults_are_valid(script: str) -> None:
    assert problems_of(script) == []


def test_world_that_is_there() -> None:
    """Under torchrun the number of processes is a fact, not a setting."""
    config = compose("pretrain_gpt", ["parallel=dp2_tp2_pp2"])
    assert problems(config, 8) == []
    assert problems(config, 6) == [
        "world_size=6 must be data x tensor x pipeline = 2 x 2 x 2 = 8; use 8 processes (dp=2), or the layout dp=1 "
        "tp=2 pp=3"
    ]
    of_zero_3 = problems(compose("pretrain_gpt", ["parallel=zero3", "parallel.data_parallel_size=2"]), 8)
    assert of_zero_3[0].endswith(", or the layout dp=4 tp=2 pp=1")  # ZeRO-3 has no pipeline


def test_unknown_device() -> None:
    assert problems_of("launcher.device=gpu", device="gpu") == [
        "launcher.device=gpu is not known; use auto, cpu or cuda"
    ]


def test_fp16_on_a_gpu_and_for_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems_of("train.precision=fp16", device="cuda") == []
    monkeypatch.setenv(FP16_ON_CPU, "1")
    assert problems_of("train.precision=fp16") == []


@pytest.mark.parametrize(
    "words",
    [
        ["parallel.zero_stage=0"],  # the fp32 reference, clipping included
        ["parallel=zero3", "parallel.data_parallel_size=2", "parallel.tensor_parallel_size=2"],
        ["parallel.offload_optimizer=true"],
        ["model.num_query_groups=1"],
        ["model.head_size=64"],
        ["parallel.pipeline_parallel_size=3"],  # four layers on three stages: two, one, one
        ["train.generate_prompt=''", "train.generate_tokens=0"],
        ["optimizer.decay=constant", "optimizer.decay_steps=5"],
        ["optimizer.decay=inverse_sqrt", "optimizer.decay_steps=5"],
        ["model.vocab_size=5000", "data.tokenizer=/some/folder"],
        ["data.validation_fraction=0", "data.validation_source=held_out.txt"],
        ["train.batch_ramp={start:8,increment:8,samples:100}"],
        ["objective=prefix_lm", "data.mask_loss_after_eod=true"],
        ["pretrain_bert", "model=roberta_base", "objective=masked_lm"],
        ["pretrain_bert", "objective.mask_token_fraction=0.9"],
        ["pretrain_t5", "model=bart_base", "objective=bart_denoising", "data.seq_length=1024"],
        ["pretrain_t5", "data.seq_length=10"],
        ["pretrain_t5", "objective=bart_denoising", "data.seq_length=11"],
        ["pretrain_t5", "objective=ul2", "data.seq_length=68"],
        ["pretrain_t5", "objective=ul2", "objective.decoder_seq_length=14"],
        ["pretrain_t5", "objective=ul2", "data.seq_length=9", "objective.ul2_weights=[0,0,1,0,0,0,0]"],
        ["pretrain_t5", "data.seq_length=2048", "model.max_position_embeddings=2048", "data.tokenizer=/some/folder"],
        ["pretrain_t5", "objective=ul2", "objective.decoder_seq_length=200", "objective.ul2_mode_tokens=false"],
        ["pretrain_t5", "parallel.pipeline_parallel_size=4"],  # a layer a stage, of either stack
        ["pretrain_t5", "model.num_decoder_layers=4", "parallel.pipeline_parallel_size=6"],
        ["pretrain_t5", "parallel=tp2", "parallel.sequence_parallel=true", "data.seq_length=130"],
        ["launcher=slurm", "launcher.nodes=2", "launcher.gpus_per_node=4", "launcher.time=24:00:00", "launcher.chain=3",
         "launcher.sbatch_options=['--constraint=h100']", "launcher.environment={A: b}", "parallel=dp8_tp1_pp1"],
        ["launcher.environment={WANDB_API_KEY: ''}", "launcher.setup=['export HF_TOKEN=$(cat ~/.token)']"],
        ["train.eval_interval=0", "train.save_interval=0", "train.keep_last=0", "optimizer.clip_grad_norm=0"],
        ["train.keep_every=300", "train.keep_best=1"],
        ["train.keep_every=7", "train.save_interval=0"],
    ],
)  # fmt: skip
def test_what_is_allowed(words: list[str]) -> None:
    assert problems_of(*words) == []


def test_everything_at_once() -> None:
    words = [
        "parallel.tensor_parallel_size=3",
        "parallel.pipeline_parallel_size=9",
        "parallel.zero_stage=3",
        "train.global_batch_size=33",
        "data.seq_length=5000",
        "optimizer.warmup_steps=900",
        "train.precision=fp16",
        "model.ffn_hidden_size=100",
        "train.log_interval=0",
    ]
    with pytest.raises(ConfigError) as caught:
        validate(fill_in(compose("pretrain_gpt", words), device="cpu"))
    found = [problem.partition("=")[0] for problem in caught.value.problems]
    assert found == [
        "train.log_interval",
        "parallel.tensor_parallel_size",
        "parallel.tensor_parallel_size",
        "parallel.pipeline_parallel_size",
        "data.seq_length",
        "parallel.zero_stage",
        "train.global_batch_size",
        "train.precision",
        "optimizer.warmup_steps",
    ]
    assert str(caught.value) == "\n".join(caught.value.problems)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("1:30", 90), ("24:00:00", 86400), ("2-12", 216000), ("2-12:30", 217800), ("1-0:0:1", 86401)],
)
def test_time_limits_as_slurm_reads_them(time: str, seconds: int) -> None:
    """The forms of sbatch's manual, --time."""
    assert job_seconds(time) == seconds


@pytest.mark.parametrize("time", ["", "24h", "1:2:3:4", "1-", "-5", "1:00 ", "infinite"])
def test_what_is_no_time_limit(time: str) -> None:
    assert job_seconds(time) is None
