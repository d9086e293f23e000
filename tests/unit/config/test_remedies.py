"""Whoever obeys a message gets a configuration that is valid: every remedy of every rule is tried."""

from __future__ import annotations

import re

import pytest

from tests.unit.config.test_validate import VIOLATIONS, problems_of

# What a person makes of remedies that name no value, or hold more than one step.
BY_HAND: dict[str, list[list[str]]] = {
    "world size is not an multiple": [["launcher.num_processes=8"], ["launcher.num_processes=16"],
                                  ["parallel=dp2_tp2_pp3"]],
    "world size is not the layout's": [["launcher.num_processes=8"], ["parallel=dp2_tp2_pp1"]],
    "processes that no plan can list": [["parallel=dp8_tp2_pp2"]],
    "stages that are no word": [["parallel.stages=[2,2]"], ["parallel.stages=balanced"], ["parallel.stages=even"]],
    "stages that are no integers": [["parallel.stages=[3,1]"], ["parallel.stages=balanced"], ["parallel.stages=even"]],
    "stages that are null": [["parallel.stages=[4,0]"], ["parallel.stages=balanced"], ["parallel.stages=even"]],
    "number of stages": [["parallel.stages=[2,2]"], ["parallel.stages=balanced"], ["parallel.stages=even"]],
    "layers of all stages": [["parallel.stages=[2,2]"], ["parallel.stages=balanced"], ["parallel.stages=even"]],
    "layers of the stages of both stacks": [["parallel.stages=[2,2]"], ["parallel.stages=balanced"]],
    "negative stage": [["parallel.stages=[2,2]"], ["parallel.stages=balanced"], ["parallel.stages=even"]],
    "empty stage in the middle": [["parallel.stages=[2,1,1]"], ["parallel.stages=balanced"], ["parallel.stages=even"]],
    "hidden and heads": [["model.hidden_size=128"], ["model.hidden_size=132"], ["model.head_size=32"]],
    "tensor and ffn": [["model.ffn_hidden_size=510"], ["model.ffn_hidden_size=512"]],
    "sequence parallel without tensor": [["parallel.sequence_parallel=false"]],
    "Adafactor and ZeRO": [["parallel.zero_stage=0"], ["optimizer=adamw"]],
    "Adafactor and bf16": [["train.precision=fp32"], ["optimizer=adamw", "parallel.zero_stage=1"]],
    "offload and ZeRO-0": [["parallel.zero_stage=1"]],
    "ZeRO-3 and compiled blocks": [["train.compile=none"], ["parallel.zero_stage=2"]],
    "offload and SGD": [["parallel.offload_optimizer=false"]],
    "ramp without samples": [["train.batch_ramp.samples=100"]],
    "ramp without start": [["train.batch_ramp={start:8,increment:4,samples:100}"]],
    "decay": [["optimizer.decay_steps=null"]],
    "dropout": [["model.hidden_dropout=0.1"]],
    "family that computes something else": [["model=llama_tiny"], ["model.family=null"]],
    "family of another name": [["model.family=gpt2"]],
    "beta": [["optimizer.beta2=0.1"]],
    "rate": [["optimizer.learning_rate=1e-6"]],
    "weight that is not a number": [["data.weights=[1]"]],
    "path that a shell left empty": [["train.run_dir=runs/x"], ["train.run_dir=null"]],
    "name that leaves its folder": [["model.name=x"]],
    "name longer than file systems take": [["train.run_dir=runs/x"]],
    "separator of nothing": [["data.document_separator=x"]],
    "no source": [["data.source=a.txt"], ["data.source=[a.txt,b.txt]"], ["data.source=embedded"]],
    "source of validation": [["data.validation_source=a.txt"], ["data.validation_source=embedded"]],
    "nothing held out": [["data.validation_fraction=0.02"], ["data.validation_source=a.txt"]],
    "number of weights": [["data.weights=[1]"]],
    "negative weight": [["data.weights=[1,2]"]],
    "empty prompt": [["train.generate_prompt=x"], ["train.generate_tokens=0"]],
    "multiple of all": [["train.keep_last=2"]],
    "best of all": [["train.keep_last=2"]],
    "rollback to nothing": [["train.save_interval=100"]],
    "script that is none": [["script=pretrain_gpt"]],
    "architecture of another script": [["pretrain_bert"], ["model=gpt_tiny"]],
    "GPT under the script of BERT": [["pretrain_gpt", "objective=causal_lm"], ["model=bert_tiny"]],
    "objective of BERT under GPT": [["pretrain_bert"], ["objective=causal_lm"], ["objective=prefix_lm"]],
    "objective of GPT under BERT": [["pretrain_gpt"], ["objective=masked_lm_nsp"], ["objective=masked_lm"]],
    "objective of GPT under T5": [["pretrain_gpt"], ["objective=span_corruption"], ["objective=bart_denoising"]],
    "relative positions of GPT": [["model.position_embedding=learned"], ["model.position_embedding=rotary"]],
    "relative positions of BERT": [["model.position_embedding=learned"]],
    "rotary positions of T5": [["model.position_embedding=learned"], ["model.position_embedding=relative"]],
    "number of denoisers": [["objective.ul2_weights=[1,1,1,1,1,1,1]"]],
    "spans of denoisers": [["objective.ul2_span_lengths=[3,8,3,8,64,64]"]],
    "densities of denoisers": [["objective.ul2_noise_densities=[0.15,0.15,0.5,0.5,0.15,0.5]"]],
    "weights of denoisers": [["objective.ul2_weights=[0,0,1,0,0,0,0]"]],
    "next sentence without segments": [["model.num_segments=2"], ["objective=masked_lm"]],
    "masked fraction": [["objective.masked_fraction=0.15"]],
    "noise density": [["objective.noise_density=0.15"]],
    "infill fraction": [["objective.infill_fraction=0.15"]],
    "next fraction": [["objective.next_fraction=0.1"]],
    "rate of fill-in-the-middle": [["objective.fim_fraction=0.1"]],
    "spans that touch": [["objective.noise_density=0.5"], ["objective.mean_span_length=20"]],
    "spans that touch in a long sequence": [["objective.noise_density=0.5", "objective.mean_span_length=20"]],
    "hardly any text": [["objective.noise_density=0.5"]],
    "endless infilling": [["objective.infill_span_length=3"]],
    "too short for a denoiser": [["data.seq_length=68"], ["objective.ul2_weights=[1,0,1,1,1,0,0]"]],
    "denoisers that become one": [["data.seq_length=68"], ["objective.ul2_weights=[1,1,1,1,1,0,1]"]],
    "decoder too short for a denoiser": [["objective.decoder_seq_length=14"],
                                         ["objective.ul2_weights=[0,0,1,0,0,1,1]"]],
    "tensor and heads": [[f"parallel.tensor_parallel_size={size}", "model.ffn_hidden_size=512"] for size in (2, 16)],
    "vocabulary": [["model.vocab_size=null"]],
    "endless sequence": [["data.seq_length=1024"]],
    "endless vocabulary": [["model.vocab_size=8192"]],
    "steps": [["train.steps=300"]],
    "span length of BART": [["objective.infill_span_length=3"]],
    "mask and random tokens": [["objective.random_token_fraction=0.2"]],
    "both stacks too short for a denoiser": [["data.seq_length=68", "objective.decoder_seq_length=null"],
                                             ["objective.ul2_weights=[1,0,1,1,1,0,1]"]],
    "sentinels of spans": [["data.seq_length=1809", "objective.decoder_seq_length=null"],
                           ["objective.mean_span_length=4"], ["data.tokenizer=/some/folder"]],
    "sentinels of denoisers": [["data.seq_length=807"], ["data.tokenizer=/some/folder"]],
    "decoder and positions": [["data.seq_length=96"], ["model.max_position_embeddings=170"]],
    "chosen decoder and positions": [["objective.decoder_seq_length=1024"], ["model.max_position_embeddings=2000"]],
    "nodes and layout": [["launcher.nodes=2"], ["parallel=dp2_tp2_pp3"]],
    "processes and nodes": [["launcher.num_processes=null", "parallel=dp8"]],
    "processes that nodes do not share": [["launcher.num_processes=2"], ["launcher.nodes=3"]],
    "more processes than GPUs": [["launcher.processes_per_node=4"], ["launcher.gpus_per_node=null"]],
    "no time": [["launcher.time=24:00:00"]],
    "time that YAML has read": [["launcher.time=24:00:00"], ["launcher.time=1-00:00:00"]],
    "time without time": [["launcher.time=2:31"]],
    "partition of two lines": [["launcher.partition=a"], ["launcher.partition=null"]],
    "empty account": [["launcher.account=a"], ["launcher.account=null"]],
    "run folder with a backslash": [["train.run_dir=a/b"]],
    "option without dashes": [["launcher.sbatch_options=['--constraint=h100']"]],
    "argument of two lines": [["launcher.srun_arguments=['--cpu-bind=none']"]],
    "option with a setting": [["launcher.sbatch_options=[]", "launcher.time=3:00"]],
    "option of the script": [["launcher.sbatch_options=[]"]],
    "no variable": [["launcher.environment={A_B:c}"]],
    "mounts without a container": [["launcher.container=x"], ["launcher.container_mounts=[]"]],
    "no mount": [["launcher.container_mounts=['/host/folder:/container/folder']"]],
    "no grace": [["launcher.grace_seconds=1"]],
    "port": [["launcher.master_port=65535"], ["launcher.master_port=null"]],
    "layout that nodes do not have": [["launcher.processes_per_node=2"], ["parallel=dp2_tp2_pp2"]],
    "no meeting place, static": [["launcher.master_address=n0"]],
    "no meeting place, c10d": [["launcher.master_address=n0"]],
    "no hosts": [["launcher.hostfile=hosts"], ["launcher=torchrun", "launcher.nodes=2", "launcher.master_address=n0"]],
    "node beyond the last": [["launcher.node_rank=1"],
                             ["launcher.nodes=3", "parallel=dp3", "train.global_batch_size=24"]],
    "node rank that torchrun decides": [["launcher.node_rank=null"], ["launcher.rendezvous=static"]],
    "credential among the variables": [["launcher.environment={}"]],
    "credential in the batch script": [["launcher.setup=[]"]],
    "beginning of text of an encoder": [["data.add_bos=null"]],
    "value with a name that is to be passed": [["launcher.pass_environment=[HF_TOKEN]"]],
    "variable that is passed and given": [["launcher.pass_environment=[]"], ["launcher.environment={}"]],
    "credential by its value": [["launcher.environment={}", "launcher.pass_environment=[GREETING]"]],
    "login in the batch script": [["launcher.setup=[]", "launcher.pass_environment=[WANDB_API_KEY]"]],
    "share of bad rows": [["data.max_bad_fraction=0.1"]],
    "login in an address": [["data.source=[embedded, 'https://host/x.jsonl']"]],
}  # fmt: skip
NUMBER = r"\d[\d.]*(?:e[+-]?\d+)?"
ASSIGNMENT = re.compile(r"\b((?:[a-z0-9_]+\.)+[a-z0-9_]+|launcher|objective|optimizer)=([^\s,;:]+)")
LISTED = re.compile(rf"use (?:at most |less than )?((?:{NUMBER}(?:, | or )?)+)")


def remedies(words: list[str], message: str) -> list[list[str]]:
    """The words that each alternative of a message adds: `KEY=VALUE`, or numbers for the key that it begins with."""
    key, advice = message.partition("=")[0], message.partition("; ")[2]
    found = [[f"{name}={value}"] for name, value in ASSIGNMENT.findall(advice)]
    if listed := LISTED.search(advice):
        less = 1 if "less than" in listed[0] else 0
        found += [[f"{key}={int(number) - less if less else number}"] for number in re.findall(NUMBER, listed[1])]
    return found


def obeyed(words: list[str], remedy: list[str]) -> list[str]:
    """The command line once more, with what the remedy changes."""
    keys = {word.partition("=")[0] for word in remedy}
    groups = {word.partition("=")[0] for word in remedy if "." not in word.partition("=")[0]}
    script = any(word.startswith("pretrain_") for word in remedy)
    kept = [
        word
        for word in words
        if word.partition("=")[0] not in keys
        and not (word.startswith("pretrain_") and script)
        and word.partition(".")[0] not in groups
    ]
    first = [word for word in (*remedy, *kept) if word.startswith("pretrain_")]
    return [*first, *(word for word in (*kept, *remedy) if not word.startswith("pretrain_"))]


CASES = {name: BY_HAND.get(name) or remedies(*VIOLATIONS[name]) for name in VIOLATIONS}


def test_every_message_has_a_remedy_that_is_tried() -> None:
    assert [name for name, tried in CASES.items() if not tried] == []
    assert set(BY_HAND) <= set(VIOLATIONS)


@pytest.mark.parametrize("name", VIOLATIONS)
def test_the_remedy_works(name: str) -> None:
    words, _ = VIOLATIONS[name]
    assert {" ".join(remedy): problems_of(*obeyed(words, remedy)) for remedy in CASES[name]} == {
        " ".join(remedy): [] for remedy in CASES[name]
    }
