"""The layer list as one plain module: for one rank, for ZeRO-2/3, and as the reference for pipelines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from megatron_lite.models.activations import Activations
from megatron_lite.models.spec import LayerSpec
from megatron_lite.parallel.layers import vocab_parallel_logits


class FlatModel(nn.Module):
    """All layers in order. `named_parameters()` gives the global names; a tied module appears once."""

    def __init__(self, specs: Sequence[LayerSpec], built: Callable[[nn.Module], None] | None = None) -> None:
        """`built`: called with each layer before the next one is built."""
        super().__init__()
        self._specs = specs
        shared: dict[str, nn.Module] = {}
        self._calls: list[Callable[[Activations], Activations]] = []
        for spec in specs:
            module = shared.get(spec.tied) if spec.tied else None
            if module is None:
                module = spec.build()
                _register(self, spec.name, module)
                if built is not None:
                    built(module)
            if spec.tied:
                shared[spec.tied] = module
            self._calls.append(partial(spec.apply, module))

    def forward(self, *inputs: Tensor, end: Callable[[Activations], Any] | None = None) -> Any:
        """The batch's fields, in the order of the first entry's `stage_inputs` -> the result of `end`.

        Takes tensors instead of a dictionary, so that ZeRO-3's hooks see them.

        Args:
            end: of what the last layer leaves; None = `outputs_of`. Called here, because ZeRO-3 has the head's weights
                only within this method.
        """
        x = inputs_of(self._specs, inputs)
        for call in self._calls:
            x = call(x)
        return (end or outputs_of)(x)


def inputs_of(specs: Sequence[LayerSpec], inputs: Sequence[Tensor]) -> Activations:
    """Convert a batch's fields, in the order of the first entry's `stage_inputs`, to the first layer's input."""
    assert specs[0].stage_inputs is not None, "the first entry takes the batch"
    return Activations(**dict(zip([field.name for field in specs[0].stage_inputs], inputs, strict=True)))


def outputs_of(x: Activations) -> Tensor | tuple[Tensor, Tensor]:
    """The model's outputs: logits [b, s, v/t], and with a next-sentence head its logits [b, 2]."""
    assert x.head is not None, "the last entry leaves the head"
    logits = x.head(x.hidden, vocab_parallel_logits)
    return logits if x.sequence_logits is None else (logits, x.sequence_logits)


def _register(root: nn.Module, name: str, module: nn.Module) -> None:
    """Register `module` at the dotted path `name` below `root`, creating intermediate containers."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)
