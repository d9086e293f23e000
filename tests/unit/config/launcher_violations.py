"""Settings of launchers that break one rule each, and its exact words."""

from __future__ import annotations

from megatron_lite.config.rules.credentials import EXPORT

SLURM = ["launcher=slurm", "launcher.gpus_per_node=4", "parallel.data_parallel_size=null"]

LAUNCHER_VIOLATIONS: dict[str, tuple[list[str], str]] = {
    "several nodes from one machine": (
        ["launcher.nodes=2", "parallel=dp2"],
        "launcher.nodes=2 needs a launcher of several machines, and launcher.name=local starts processes of this one; "
        "use launcher=slurm, torchrun or deepspeed, or launcher.nodes=1",
    ),
    "nodes and layout": (
        ["launcher=slurm", "launcher.gpus_per_node=4", "launcher.nodes=3", "parallel=dp2_tp2_pp2"],
        "launcher.nodes x launcher.gpus_per_node=12 must be data x tensor x pipeline = 2 x 2 x 2 = 8; use 8 processes "
        "(dp=2), or the layout dp=2 tp=2 pp=3",
    ),
    "processes and nodes": (
        ["launcher=slurm", "launcher.processes_per_node=4", "launcher.nodes=2", "launcher.num_processes=2",
         "parallel=dp2"],
        "launcher.num_processes=2 must be launcher.nodes x launcher.processes_per_node = 2 x 4 = 8; leave "
        "launcher.num_processes out",
    ),
    "processes that nodes do not share": (
        ["launcher=slurm", "launcher.nodes=2", "launcher.num_processes=3", "train.global_batch_size=24",
         "parallel.data_parallel_size=null"],
        "launcher.nodes=2 must divide the 3 processes of the layout; use a layout of 2 or 4 processes, or another "
        "launcher.nodes",
    ),
    "more nodes than processes": (
        ["launcher=slurm", "launcher.nodes=4", "parallel=dp2"],
        "launcher.nodes=4 is more than the 2 processes of the layout; use at most 2",
    ),
    "more processes than GPUs": (
        [*SLURM, "launcher.processes_per_node=8"],
        "launcher.processes_per_node=8 is more than launcher.gpus_per_node=4, and each process needs a GPU; use at "
        "most 4, or leave launcher.gpus_per_node out to compute on CPUs",
    ),
    "no time": (
        [*SLURM, "launcher.time=24h"],
        "launcher.time=24h is not a time limit; use minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS, such as "
        "24:00:00",
    ),
    "time that YAML has read": (
        [*SLURM, "launcher.time=86400"],
        "launcher.time=86400 is 60 days of minutes; YAML reads 24:00:00 as 86400 unless it is quoted: write time: "
        "'24:00:00', or a limit of days as D-HH:MM:SS",
    ),
    "grace beyond the time": (
        [*SLURM, "launcher.time=2:00"],
        "launcher.grace_seconds=120 leaves no time to train within launcher.time=2:00, the last 30 s of which requeue "
        "the job; use less than 90",
    ),
    "time without time": (
        [*SLURM, "launcher.time=0:30"],
        "launcher.time=0:30 is too short to train and to end in; use more than 150 seconds",
    ),
    "chain without slurm": (
        ["launcher.chain=3"],
        "launcher.chain=3 submits jobs to slurm, and launcher.name=local has none; use launcher=slurm, or "
        "launcher.chain=1",
    ),
    "partition of two lines": (
        [*SLURM, "launcher.partition='a\nb'"],
        r"launcher.partition='a\nb' must be one line of text without backslashes; use a name, or null",
    ),
    "empty account": (
        [*SLURM, "launcher.account=''"],
        "launcher.account='' must be one line of text without backslashes; use a name, or null",
    ),
    "run folder with a backslash": (
        [*SLURM, r"train.run_dir=a\b"],
        r"train.run_dir=a\b must be one line without backslashes with launcher=slurm, which writes it into a line "
        "of its script; give another folder",
    ),
    "option without dashes": (
        [*SLURM, "launcher.sbatch_options=['constraint=h100']"],
        "launcher.sbatch_options holds constraint=h100, which is not an option of one line that begins with `--`; "
        "write it like --constraint=h100",
    ),
    "argument of two lines": (
        [*SLURM, "launcher.srun_arguments=['--label\n--overlap']"],
        r"launcher.srun_arguments holds '--label\n--overlap', which is not an option of one line that begins with `--`"
        "; write it like --cpu-bind=none",
    ),
    "option with a setting": (
        [*SLURM, "launcher.sbatch_options=['--time=3']"],
        "launcher.sbatch_options holds --time=3, which is the launcher's own; set launcher.time",
    ),
    "option of the script": (
        [*SLURM, "launcher.sbatch_options=['--open-mode=truncate']"],
        "launcher.sbatch_options holds --open-mode=truncate, which is the launcher's own; leave it out: the launcher "
        "sets it",
    ),
    "no variable": (
        [*SLURM, "launcher.environment={A-B:c}"],
        "launcher.environment holds A-B, which is not a name of a variable; use letters, digits and _",
    ),
    "value with a name that is to be passed": (
        ["launcher.pass_environment=['HF_TOKEN=hunter2']"],
        "launcher.pass_environment holds HF_TOKEN=..., and takes names of variables alone; write NAME, and `export "
        "NAME=...` in the shell that launches",
    ),
    "variable that is passed and given": (
        ["launcher.pass_environment=[A]", "launcher.environment={A: b}"],
        "launcher.pass_environment names A, to which launcher.environment gives a value; leave one of the two out",
    ),
    "credential by its value": (
        ["launcher.environment={GREETING: hf_abcdefghijkl}"],
        "launcher.environment.GREETING holds what looks like a credential, and the configuration is kept in the run "
        "folder; " + EXPORT,
    ),
    "login in the batch script": (
        [*SLURM, "launcher.setup=['wandb login 0123456789abcdef']"],
        "launcher.setup logs in with a credential, and the configuration is kept in the run folder; " + EXPORT,
    ),
    "mounts without a container": (
        [*SLURM, "launcher.container_mounts=['/a:/b']"],
        "launcher.container_mounts=['/a:/b'] needs launcher.container; name an image, or leave the mounts out",
    ),
    "no mount": (
        [*SLURM, "launcher.container=x", "launcher.container_mounts=['/a']"],
        "launcher.container_mounts holds /a, which is not a pair of folders; write it like "
        "/host/folder:/container/folder, one entry a mount",
    ),
    "no node": (["launcher.nodes=0"], "launcher.nodes=0 must be at least 1; use 1 or more"),
    "no grace": (
        ["launcher.grace_seconds=0"],
        "launcher.grace_seconds=0 must be a positive number; use a value above 0",
    ),
    "less than no requeue": (
        ["launcher.max_requeues=-1"],
        "launcher.max_requeues=-1 must be a number >= 0; use 0 or more",
    ),
    "port": (
        ["launcher.master_port=70000"],
        "launcher.master_port=70000 is not a port; use 1 to 65535, or null for a free one",
    ),
    "layout that nodes do not have": (
        ["parallel=dp2_tp2", "launcher=torchrun", "launcher.nodes=2", "launcher.processes_per_node=4",
         "launcher.master_address=n0"],
        "launcher.nodes x launcher.processes_per_node=8 must be data x tensor x pipeline = 2 x 2 x 1 = 4; use 4 "
        "processes (dp=2), or the layout dp=2 tp=2 pp=2",
    ),
    "no meeting place, static": (
        ["parallel=dp2", "launcher=torchrun", "launcher.nodes=2"],
        "launcher.master_address is needed for launcher.nodes=2 with launcher.name=torchrun, and every node must be "
        "able to reach it; set launcher.master_address to the address of the node of rank 0",
    ),
    "no meeting place, c10d": (
        ["parallel=dp2", "launcher=torchrun", "launcher.nodes=2", "launcher.rendezvous=c10d"],
        "launcher.master_address is needed for launcher.nodes=2 with launcher.name=torchrun, and every node must be "
        "able to reach it; set launcher.master_address to that of any node",
    ),
    "no hosts": (
        ["parallel=dp2", "launcher=deepspeed", "launcher.nodes=2"],
        "launcher.nodes=2 with launcher.name=deepspeed needs launcher.hostfile, a file of lines `HOST slots=N`; give "
        "one, or use launcher=torchrun",
    ),
    "hosts of another launcher": (
        ["launcher=torchrun", "launcher.hostfile=hosts"],
        "launcher.hostfile=hosts is read by launcher.name=deepspeed only, not torchrun; use launcher=deepspeed, or "
        "launcher.hostfile=null",
    ),
    "node beyond the last": (
        ["parallel=dp2", "launcher=torchrun", "launcher.nodes=2", "launcher.master_address=n0",
         "launcher.node_rank=2"],
        "launcher.node_rank=2 is not among the ranks of launcher.nodes=2, 0 to 1; use one of these, or more "
        "launcher.nodes",
    ),
    "node rank that torchrun decides": (
        ["parallel=dp2", "launcher=torchrun", "launcher.nodes=2", "launcher.master_address=n0",
         "launcher.node_rank=1", "launcher.rendezvous=c10d"],
        "launcher.node_rank=1 has no meaning with launcher.rendezvous=c10d, where torchrun numbers the nodes; leave it "
        "out, or use launcher.rendezvous=static",
    ),
    "device that cannot be seen from here": (
        ["parallel=dp2", "launcher=torchrun", "launcher.nodes=2", "launcher.master_address=n0", "launcher.device=auto"],
        "launcher.device=auto looks at this machine only, and the ranks run on several; use launcher.device=cuda or "
        "cpu",
    ),
    "credential among the variables": (
        ["launcher.environment={WANDB_API_KEY: 0123456789abcdef}"],
        "launcher.environment.WANDB_API_KEY is named like a credential, and the configuration is kept in the run "
        "folder; " + EXPORT,
    ),
    "credential in the batch script": (
        [*SLURM, "launcher.setup=['export HF_TOKEN=hf_abc']"],
        "launcher.setup gives a value to HF_TOKEN, which is named like a credential, and the configuration is kept in "
        "the run folder; " + EXPORT,
    ),
    "login in an address": (
        ["data.source=[embedded, 'https://me:hunter2@host/x.jsonl']"],
        "data.source[1] holds an address with a login, and the configuration is kept in the run folder; leave the "
        "login out and give it to what opens the address in another way, such as ~/.netrc or an exported variable",
    ),
}  # fmt: skip
