"""The layer list as one plain module: for one rank, for ZeRO-2/3, and as the twin that pipelines are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from megatron_lite.models.spec import LayerSpec


class FlatModel(nn.Module):
    """All layers in order. `named_parameters()` gives the global names; a tied module appears once."""

    def __init__(self, specs: Sequence[LayerSpec]) -> None:
        super().__init__()
        shared: dict[str, nn.Module] = {}
        self._calls: list[Callable[[Tensor], Tensor]] = []
        for spec in specs:
            module = shared.get(spec.tied) if spec.tied else None
            if module is None:
                module = spec.build()
                _register(self, spec.name, module)
            if spec.tied:
                shared[spec.tied] = module
            self._calls.append(module if spec.forward is None else partial(spec.forward, module))

    def forward(self, x: Tensor) -> Tensor:
        """Input of the first layer (token ids [b, s]) -> output of the last (logits [b, s, v/t])."""
        for call in self._calls:
            x = call(x)
        return x


def _register(root: nn.Module, name: str, module: nn.Module) -> None:
    """Hang `module` at the dotted path `name` below `root`, making the containers on the way."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)
