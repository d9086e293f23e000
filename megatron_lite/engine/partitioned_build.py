"""Build a model for ZeRO-3 without ever holding all of it on one device."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from deepspeed.runtime.zero.partition_parameters import Init
from torch import nn


class LayerPartitioner:
    """Partitions each layer over the data-parallel ranks as soon as it is built, so that at most one layer is whole.

    Left to itself DeepSpeed partitions a finished model. With initial weights that are the same on every rank the
    result is the same.
    """

    def __init__(self, config: dict[str, Any], dtype: torch.dtype, grid: PipelineParallelGrid | None) -> None:
        """
        Args:
            config: the dictionary for `deepspeed.initialize`.
            grid: None = all ranks are data-parallel.
        """
        self._config, self._dtype, self._grid = config, dtype, grid
        self._first: Any = None  # the first partitioned parameter: DeepSpeed partitions others as it did that one

    def __call__(self, layer: nn.Module) -> None:
        """A collective of the data-parallel ranks."""
        layer.to(self._dtype)
        parameters = list(layer.parameters())
        if self._first is not None:
            self._first.convert_to_zero_parameters(param_list=parameters)
        elif parameters:
            group = None if self._grid is None else self._grid.get_data_parallel_group()
            Init(
                module=layer,
                data_parallel_group=group,
                dtype=self._dtype,
                config_dict_or_path=self._config,
                mpu=self._grid,
            )
            self._first = parameters[0]
