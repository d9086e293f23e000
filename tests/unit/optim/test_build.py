"""Which parameters decay, and that each optimizer computes what its name says."""

import copy

import pytest
import torch
from torch import nn

from megatron_lite.config.schema import OptimizerConfig, OptimizerName
from megatron_lite.errors import ConfigError
from megatron_lite.optim.adafactor import Adafactor
from megatron_lite.optim.build import build_optimizer
from megatron_lite.optim.groups import parameter_groups
from megatron_lite.parallel.context import ParallelContext


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embedding(tokens))
        return self.head(x + self.down(torch.tanh(self.up(x))))


def trained(config: OptimizerConfig, steps: int = 5) -> tuple[Net, Net, torch.optim.Optimizer]:
    """The start and the end of a few steps, and the optimizer."""
    torch.manual_seed(0)
    start = Net()
    net = copy.deepcopy(start)
    optimizer = build_optimizer(net.named_parameters(), config, ParallelContext.single())
    run(net, optimizer, steps)
    return start, net, optimizer


def run(net: Net, optimizer: torch.optim.Optimizer, steps: int) -> None:
    tokens = torch.randint(0, 11, (4, 7), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()


def assert_same(net: Net, other: Net, tolerance: float = 1e-6) -> None:
    for (name, value), expected in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_only_matrices_decay_and_tied_weights_come_once() -> None:
    net = Net()
    named = [*net.named_parameters(remove_duplicate=False)]
    assert sum(parameter is net.embedding.weight for _, parameter in named) == 2
    matrices, vectors = parameter_groups(named, 0.1)
    assert [p.shape for p in matrices["params"]] == [(11, 8), (16, 8), (8, 16)]
    assert [p.shape for p in vectors["params"]] == [(8,), (8,), (16,), (8,)]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)


def test_a_stacked_bias_is_no_matrix() -> None:
    """That of SwiGLU's gate and up has two dimensions."""
    named = [("gate_up.weight", nn.Parameter(torch.ones(2, 8, 8))), ("gate_up.bias", nn.Parameter(torch.ones(2, 8)))]
    matrices, vectors = parameter_groups(named, 0.1)
    assert [p.shape for p in matrices["params"]] == [(2, 8, 8)]
    assert [p.shape for p in vectors["params"]] == [(2, 8)]


def test_groups_leave_out_frozen_parameters_and_empty_groups() -> None:
    net = Net()
    for parameter in (net.norm.weight, net.norm.bias, net.up.bias, net.down.bias):
        parameter.requires_grad_(False)
    groups = parameter_groups(net.named_parameters(), 0.1)
    assert [group["name"] for group in groups] == ["matrices"]


def test_adamw_is_fused_and_equals_the_formula() -> None:
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.3, beta1=0.8, beta2=0.9, epsilon=1e-7)
    start, net, optimizer = trained(config)
    assert all(group["fused"] for group in optimizer.param_groups)
    run_formula_adamw(start, config, steps=5)
    assert_same(net, start)


def test_adamw_adds_epsilon_to_the_root() -> None:
    """A gradient as large as epsilon: half a step. Gradients of a model are so much larger that it would not show."""
    weight = nn.Parameter(torch.zeros(2))
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.0, epsilon=1e-3)
    optimizer = build_optimizer([("weight", weight)], config, ParallelContext.single())
    weight.grad = torch.tensor([1e-3, -3e-3])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.05, 0.075]), rtol=1e-5, atol=0.0)


def run_formula_adamw(net: Net, config: OptimizerConfig, steps: int) -> None:
    """arXiv 1711.05101, algorithm 2, in float64 statistics and plain arithmetic."""
    moments = {name: (torch.zeros_like(p).double(), torch.zeros_like(p).double()) for name, p in net.named_parameters()}

    class Formula(torch.optim.Optimizer):
        count = 0

        @torch.no_grad()
        def step(self) -> None:  # type: ignore[override]
            self.count += 1
            for name, p in net.named_parameters():
                m, v = moments[name]
                m.mul_(config.beta1).add_(p.grad.double(), alpha=1 - config.beta1)
                v.mul_(config.beta2).add_(p.grad.double() ** 2, alpha=1 - config.beta2)
                update = (m / (1 - config.beta1**self.count)) / (
                    (v / (1 - config.beta2**self.count)).sqrt() + config.epsilon
                )
                decay = config.weight_decay if p.ndim >= 2 else 0.0
                p.sub_((config.learning_rate * (update + decay * p.double())).float())

    run(net, Formula(net.parameters(), {}), steps)


def test_sgd_without_decay_equals_torch() -> None:
    start, net, _ = trained(OptimizerConfig(name=OptimizerName.sgd, learning_rate=0.1, momentum=0.9, weight_decay=0.0))
    run(start, torch.optim.SGD(start.parameters(), lr=0.1, momentum=0.9), 5)
    assert_same(net, start)


def test_sgd_decay_is_not_smeared_by_momentum() -> None:
    """With a zero gradient the weights shrink by the same factor each step; coupled decay would gather speed."""
    weight = nn.Parameter(torch.ones(2, 2))
    config = OptimizerConfig(name=OptimizerName.sgd, learning_rate=0.1, momentum=0.9, weight_decay=0.5)
    optimizer = build_optimizer([("weight", weight)], config, ParallelContext.single())
    for _ in range(3):
        weight.grad = torch.zeros(2, 2)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 0.95**3))


def test_the_engine_can_set_the_learning_rate() -> None:
    for name in OptimizerName:
        start, net, optimizer = trained(OptimizerConfig(name=name), steps=0)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        run(net, optimizer, 2)
        assert_same(net, start, tolerance=0.0)


def test_adafactor_refuses_half_precision() -> None:
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    with pytest.raises(ConfigError, match=r"optimizer\.name=adafactor .* use train\.precision=fp32"):
        build_optimizer([("weight", weight)], OptimizerConfig(name=OptimizerName.adafactor), ParallelContext.single())


def test_adafactor_refuses_flat_shards() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = Adafactor([weight], lr=0.1)
    flat = nn.Parameter(torch.ones(4))
    flat.grad = torch.ones(4)
    optimizer.param_groups[0]["params"] = [flat]  # what ZeRO does
    with pytest.raises(ConfigError, match=r"use parallel\.zero_stage=0"):
        optimizer.step()
