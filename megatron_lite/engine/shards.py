"""The optimizer shards of this rank (master weights and state), as fragments with their offsets in the full tensors.

One class for each way in which DeepSpeed stores master weights and moments. All return views of its memory, so that
saving needs no copy and loading writes straight into the tensors that training uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lite.checkpoint.file_plan import Shapes
from megatron_lite.checkpoint.fragments import WEIGHT, Fragment, Region, share
from megatron_lite.checkpoint.state import LossScaleState
from megatron_lite.config.schema import OptimizerConfig, OptimizerName
from megatron_lite.engine.deepspeed_patches import waiting_once
from megatron_lite.models.stored import Shape
from megatron_lite.optim.moments import kept_dims, moments_of
from megatron_lite.parallel.context import ParallelContext


@dataclass
class Shards:
    """The fp32 master weights and optimizer state of one rank. This class handles unpartitioned tensors (ZeRO-0)."""

    module: nn.Module
    optimizer: Any  # DeepSpeed's, or torch's if DeepSpeed does not wrap it
    config: OptimizerConfig
    context: ParallelContext

    def fragments(self) -> list[Fragment]:
        """The fragments of every weight and every moment, in a fixed order."""
        self._prepare()
        return [
            fragment
            for parameter in self.module.parameters()
            if parameter.requires_grad
            for kind in (WEIGHT, *moments_of(self.config))
            for fragment in self._of(parameter, kind)
        ]

    @cached_property
    def owned(self) -> list[tuple[nn.Parameter, slice]]:
        """Parameters with the part of this rank's shard that no other rank owns: every element of the model has exactly
        one owner, which counts it in norms and writes it to checkpoints."""
        found = [
            (parameter, slice(*fragment.owned))
            for parameter in self.module.parameters()
            if parameter.requires_grad
            for fragment in self._of(parameter, WEIGHT)
        ]
        return [(parameter, part) for parameter, part in found if part.stop > part.start]

    def owned_weights(self) -> list[Tensor]:
        """The master weights of `owned`, as views."""
        return [self._local(parameter, WEIGHT)[part] for parameter, part in self.owned]

    def owned_gradients(self) -> list[Tensor]:
        """The gradients of `owned`, times fp16's loss scale; valid only between the last reduction and the update."""
        return [self._gradient(parameter)[part] for parameter, part in self.owned]

    def _local(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """This rank's part of the parameter, flattened."""
        return next(iter(self._of(parameter, kind))).values

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        """The gradient of the elements that `_local` returns."""
        assert parameter.grad is not None
        return parameter.grad.view(-1)

    def shapes(self) -> Shapes:
        """Shapes of the full tensors that this rank's stage holds (a slice of), by kind and global name."""
        found: dict[str, dict[str, Shape]] = {}
        for parameter in self.module.parameters():
            for kind in (WEIGHT, *moments_of(self.config)):
                region = self._region(parameter, kind)
                if region is not None:
                    found.setdefault(kind, {})[parameter.global_name] = region.full_shape
        return found

    def weights_changed(self) -> None:
        """Copy master weights that were written from outside (a loaded checkpoint) to the model's weights. A collective
        of all ranks."""

    @property
    def updates(self) -> int:
        """Number of optimizer updates so far, as used by Adam's bias correction."""
        return max((int(state["step"]) for state in self._torch_state.values() if "step" in state), default=0)

    @updates.setter
    def updates(self, count: int) -> None:
        for state in self._torch_state.values():
            if "step" in state:
                state["step"] = torch.full_like(state["step"], count) if torch.is_tensor(state["step"]) else count

    @property
    def loss_scale(self) -> LossScaleState | None:
        """State of fp16's dynamic loss scale; None in other precisions."""
        scaler = self._scaler
        if scaler is None:
            return None
        stable = scaler.cur_iter - scaler.last_overflow_iter - 1
        return LossScaleState(float(scaler.cur_scale), stable, scaler.cur_hysteresis)

    @loss_scale.setter
    def loss_scale(self, state: LossScaleState) -> None:
        scaler = self._scaler
        assert scaler is not None, "only fp16 has a loss scale"
        scaler.cur_scale = state.scale
        # DeepSpeed uses only the difference of the two counters.
        scaler.cur_iter, scaler.last_overflow_iter = state.steps_since_change, -1
        scaler.cur_hysteresis = state.hysteresis_left

    def _prepare(self) -> None:
        """Create the state that the first update would create, so that there are tensors to load into, or to save if
        fp16 has skipped every step so far."""
        for parameter in self.module.parameters():
            for moment in moments_of(self.config):
                region = self._region(parameter, moment)
                if region is not None:
                    self._make_state(parameter, moment, region.local_shape)

    def _make_state(self, values: Tensor, moment: str, shape: Shape) -> None:
        """`values`: the tensor that torch's optimizer sees as the parameter."""
        state = self._torch_state[values]
        if self.config.name is OptimizerName.adamw:
            state.setdefault("step", torch.zeros((), device=values.device))
        elif self.config.name is OptimizerName.adafactor:
            state.setdefault("step", 0)
        if moment not in state:
            state[moment] = torch.zeros(shape, device=values.device)

    @property
    def _torch_state(self) -> dict[Tensor, dict[str, Any]]:
        """State of torch's optimizer, whether DeepSpeed wraps it or not."""
        return getattr(self.optimizer, "optimizer", self.optimizer).state

    @property
    def _scaler(self) -> Any:
        scaler = getattr(self.optimizer, "loss_scaler", None)
        return scaler if hasattr(scaler, "cur_hysteresis") else None

    def _of(self, parameter: nn.Parameter, kind: str) -> Iterator[Fragment]:
        region = self._region(parameter, kind)
        if region is not None:
            flat = (parameter if kind == WEIGHT else self._torch_state[parameter][kind]).view(-1)
            # Every data-parallel rank has the whole tensor, so each writes only its share.
            own = share(flat.numel(), self.context.data_size, self.context.data_rank)
            yield self._fragment(parameter, kind, region, 0, flat, own)

    def _fragment(
        self, parameter: nn.Parameter, kind: str, region: Region, start: int, values: Tensor, own: tuple[int, int]
    ) -> Fragment:
        """`own`: the range of `values` that no other data-parallel rank writes."""
        first, stop = own
        if getattr(parameter, "ds_pipe_replicated", False):
            stop = first  # a copy of a tied parameter: the first stage that holds it writes it
        elif region.dim is None:  # replicated over tensor-parallel ranks: divide the writing among them, too
            part = share(stop - first, self.context.tensor_size, self.context.tensor_rank)
            first, stop = first + part[0], first + part[1]
        return Fragment(kind, parameter.global_name, region, start, values.detach(), (first, stop))

    def _region(self, parameter: nn.Parameter, kind: str) -> Region | None:
        """Position of this rank's slice in the full weight or moment; None = the parameter has no such moment."""
        spec = parameter.shard_spec
        dims = len(spec.full_shape)
        # Adafactor's row and column statistics have only some of the weight's dimensions.
        kept = tuple(range(dims)) if kind == WEIGHT else kept_dims(kind, dims)
        if kept is None:
            return None
        local = list(spec.local_shape(self.context.tensor_size))
        full_shape = tuple(spec.full_shape[dim] for dim in kept)
        if spec.dim is None or spec.dim not in kept:
            return Region(full_shape, tuple(local[dim] for dim in kept))
        offset = self.context.tensor_rank * local[spec.dim]
        if self.config.name is OptimizerName.adafactor and kind != WEIGHT:  # it keeps no statistics of padding
            local[spec.dim] = min(max(spec.full_shape[spec.dim] - offset, 0), local[spec.dim])
        return Region(full_shape, tuple(local[dim] for dim in kept), kept.index(spec.dim), offset)


class PartitionedShards(Shards):
    """ZeRO-1 and 2, also in bf16: all parameters in one flat vector per group, of which each data-parallel rank has a
    contiguous partition. A partition's ends may fall inside a parameter."""

    def _prepare(self) -> None:
        for partition in self._partitions:
            for moment in moments_of(self.config):
                self._make_state(partition, moment, partition.shape)

    def owned_gradients(self) -> list[Tensor]:
        # Copies from the GPU are asynchronous and may not be finished when backward returns.
        if hasattr(self.optimizer, "_wait_for_offload_copies"):
            self.optimizer._wait_for_offload_copies()
        return super().owned_gradients()

    def weights_changed(self) -> None:
        self.optimizer.update_lp_params()

    @property
    def _partitions(self) -> list[Tensor]:
        """This rank's partition of each group's flat vector."""
        in_bf16 = getattr(self.optimizer, "fp32_groups_flat_partition", None)
        return self.optimizer.single_partition_of_fp32_groups if in_bf16 is None else in_bf16

    def _of(self, parameter: nn.Parameter, kind: str) -> Iterator[Fragment]:
        mapping = parameter._hp_mapping
        if mapping is None:  # no part of it is in this rank's partition
            return
        place = mapping.hp_fragment_address
        flat = mapping.hp_fragment if kind == WEIGHT else self._moment(mapping.param_group_index, kind, place)
        region = self._region(parameter, kind)
        assert region is not None, "ZeRO flattens tensors, so that each moment has its parameter's shape"
        yield self._fragment(parameter, kind, region, mapping.lp_fragment_address.start, flat, (0, flat.numel()))

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        mapping: Any = parameter._hp_mapping
        flat = mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)
        place = mapping.lp_fragment_address  # in bf16 every rank has the complete gradient, so take the fragment
        return flat.narrow(0, place.start, place.numel) if flat.numel() == parameter.numel() else flat

    def _moment(self, group: int, kind: str, place: Any) -> Tensor:
        return self._torch_state[self._partitions[group]][kind].narrow(0, place.start, place.numel)


class ParameterShards(Shards):
    """ZeRO-3: each parameter is split into equal parts, one per data-parallel rank; the last ones may be padded."""

    def _prepare(self) -> None:
        for partition in self.optimizer.fp32_partitioned_groups_flat:
            for moment in moments_of(self.config):
                self._make_state(partition, moment, partition.shape)

    def weights_changed(self) -> None:
        # Free parameters that an evaluation has gathered: otherwise the next forward pass uses those stale copies.
        self.optimizer._partition_all_parameters()
        for index in range(len(self.optimizer.fp32_partitioned_groups_flat)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(index)

    def _of(self, parameter: nn.Parameter, kind: str) -> Iterator[Fragment]:
        key = None if kind == WEIGHT else kind
        part, _ = self.optimizer._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=key
        )
        start = self.context.data_rank * part.numel()
        valid = min(max(parameter.ds_numel - start, 0), part.numel())
        region = self._region(parameter, kind)
        assert region is not None, "ZeRO flattens tensors, so that each moment has its parameter's shape"
        yield self._fragment(parameter, kind, region, start, part[:valid], (0, valid))

    def owned_gradients(self) -> list[Tensor]:
        with waiting_once(self.optimizer):
            return super().owned_gradients()

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        part, _ = self.optimizer._get_fp32_grad_state_partition(parameter, release_swap_buffers=False)
        return part


def shards_of(
    module: nn.Module, optimizer: Any, zero_stage: int, config: OptimizerConfig, context: ParallelContext
) -> Shards:
    """The shards of the optimizer of this ZeRO stage."""
    kinds = {0: Shards, 1: PartitionedShards, 2: PartitionedShards, 3: ParameterShards}
    return kinds[zero_stage](module, optimizer, config, context)
