"""The fake device: sees every operation on tensors, answers what only a device could know, and writes down the rest.

Tensors of the CPU are real and compute as ever. Tensors of the device have shapes and no data (`FakeTensor`); torch
itself complains if an operation mixes the two, exactly where a GPU would.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from tests.rehearsal import wire
from tests.rehearsal.memory import LiveMemory
from tests.rehearsal.record import Act

aten = torch.ops.aten
ROOT = Path(__file__).parents[2]

_NO_KERNEL = {
    aten.detach.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.lift_fresh.default,
    aten._unsafe_view.default,
    aten._reshape_alias.default,
    aten.set_.source_Tensor,
    aten.set_.source_Storage_storage_offset,
    aten.record_stream.default,
}
"""Operations that only allocate or only make a view."""

_OPERATIONS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "allgather_coalesced": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "send": "send",
    "recv": "receive",
    "recv_any_source": "receive",
    "barrier": "barrier",
}
"""torch's names of collectives, those of `torch.distributed` and of functional collectives, without a final `_`."""


class WrongDeviceError(AssertionError):
    """A tensor is not where the operation needs it."""


class FakeDevice(FakeTensorMode):
    """While active, everything on `cuda` is fake, and what happens there goes to `act`."""

    avoid_device_init = True
    of_the_host: ClassVar[set[str]] = set()
    """Names of process groups of gloo, for tensors of the CPU."""

    def __init__(self, names_of_groups: dict[tuple[int, ...], str]) -> None:
        """`names_of_groups`: by their ranks; other groups are called `other`."""
        super().__init__(allow_non_fake_inputs=True)
        self._names = names_of_groups
        self.memory = LiveMemory()
        self.act = Act()
        self.phase = "begin"
        self.step = 0
        self._within = False  # an operation whose shape torch finds
        self._pinned = WeakIdKeyDictionary()  # storages in page-locked memory of the host
        self.page_locked: dict[int, range] = {}  # by its first address: memory that was locked after it was allocated

    @contextmanager
    def recording(self, act: Act) -> Iterator[Act]:
        """Write down what happens from here on."""
        self.act, self.phase = act, "begin"
        self.step += 1
        self.memory.begin()
        yield act
        act.peak_bytes, act.left_bytes = self.memory.peak, self.memory.live

    def wait(self, kind: str, given_in_step: int | None = None) -> None:
        """The host has waited for the device.

        Args:
            given_in_step: in which act the device was given what the host waited for; None = everything so far.
        """
        if given_in_step is not None and given_in_step < self.step:
            self.act.late_waits[f"{kind} {place()}"] += 1
        else:
            self.act.waits[self.phase][f"{kind} {place()}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._within:
            return super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace in ("c10d", "_c10d_functional"):
            self._note_collective(func, args, kwargs)
        handler = _HANDLERS.get(func)
        result = NotImplemented if handler is None else handler(self, func, args, kwargs)
        if result is NotImplemented:
            if not _on_device(args, kwargs):
                return func(*args, **kwargs)  # all on the CPU: for real
            result = self._shape_of_result(func, types, args, kwargs)
        tensors = [one for one in tree_iter(result) if isinstance(one, torch.Tensor) and one.is_cuda]
        if tensors:
            self._note_kernel(func, args, kwargs, result, tensors)
            for tensor in tensors:
                self.memory.hold(tensor)
        return result

    def _shape_of_result(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """torch may find the shape by running smaller operations; the device runs one kernel, and none of those."""
        self._within = True
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._within = False

    # What is written down.

    def _note_kernel(self, func: Any, args: Any, kwargs: Any, result: Any, outputs: list[torch.Tensor]) -> None:
        if func.is_view or func in _NO_KERNEL or func.namespace in ("c10d", "_c10d_functional"):
            return
        inputs = [one for one in tree_iter((args, kwargs)) if isinstance(one, torch.Tensor)]
        known = {id(one): one for one in (*inputs, *outputs)}
        work = self.act.work[self.phase]
        work.kernels += 1
        work.bytes += sum(one.numel() * one.element_size() for one in known.values())
        if func._overloadpacket in flop_registry:
            # torch's formulas do not know the dtype of an output as an argument.
            known_args = [one for one in args if not isinstance(one, torch.dtype)]
            work.flops += flop_registry[func._overloadpacket](*known_args, **kwargs, out_val=result)
        self.act.operations[self.phase][func._overloadpacket.__name__] += 1

    def _note_collective(self, func: Any, args: Any, kwargs: Any) -> None:
        group = _group_of(args, kwargs)
        if group is None:  # waiting for one that was started before
            return
        operation = _OPERATIONS.get(func._overloadpacket.__name__.rstrip("_"), func._overloadpacket.__name__)
        lists = [one for one in tree_iter((args, kwargs)) if isinstance(one, torch.Tensor)]
        if group.group_name not in self.of_the_host and operation != "barrier":
            for tensor in lists:
                if tensor.device.type != "cuda":
                    raise WrongDeviceError(f"a tensor of the CPU in {operation} of a group of NCCL")
        ranks = tuple(dist.get_process_group_ranks(group))
        size = _message_size(operation, args, len(ranks))
        name = "pipeline" if operation in ("send", "receive") else self._names.get(ranks, "other")
        message = self.act.messages[name, operation]
        message.calls += 1
        message.bytes += wire.sent_bytes(operation, size, len(ranks))

    # Operations that need an answer.

    def _scalar(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`.item()`, `float()`, `bool()` of a tensor."""
        tensor = args[0]
        if not isinstance(tensor, FakeTensor):
            return func(*args, **kwargs)
        self.wait("item")
        return _values((), tensor.dtype).item()

    def _data_dependent(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Sizes that depend on values: half of all elements are found."""
        tensor = args[0]
        if not tensor.is_cuda:
            return NotImplemented
        self.wait(func._overloadpacket.__name__)
        found = max(tensor.numel() // 2, 1)
        if func is aten.nonzero.default:
            return tensor.new_empty(found, tensor.dim(), dtype=torch.int64)
        return tensor.new_empty(found)  # masked_select

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Copies between host and device wait, except between pinned memory and the device with `non_blocking`."""
        if func is aten.copy_.default:
            target, source = args[0], args[1]
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            to_host = source.is_cuda and not target.is_cuda
            from_host = target.is_cuda and not source.is_cuda
        else:
            source, target = args[0], None
            non_blocking = kwargs.get("non_blocking", False)
            device = torch.device(kwargs.get("device") or source.device)
            to_host = source.is_cuda and device.type == "cpu"
            from_host = device.type == "cuda" and not source.is_cuda
        if from_host and not (non_blocking and self.is_pinned(source)):
            self.wait("copy to the device")
        if to_host:
            return self._to_host(source, target, args, kwargs, non_blocking)
        if from_host:
            return self._to_device(source, target, kwargs)
        return NotImplemented

    def _to_device(self, source: Any, target: Any, kwargs: Any) -> torch.Tensor:
        if target is not None:
            source.expand(target.shape)  # the shapes fit
            return target
        dtype, device = kwargs.get("dtype") or source.dtype, kwargs["device"]
        with self:
            return torch.empty(source.shape, dtype=dtype, device=device)

    def _to_host(self, source: Any, target: Any, args: Any, kwargs: Any, non_blocking: bool) -> torch.Tensor:
        """Without a target, torch itself allocates pinned memory for a copy that does not wait."""
        if not (non_blocking and (target is None or self.is_pinned(target))):
            self.wait("copy to the host")
        if target is not None:
            source.expand(target.shape)  # the shapes fit
            return target.fill_(_values((), target.dtype).item())
        made = _values(source.shape, kwargs.get("dtype") or source.dtype)
        if non_blocking:
            self._pinned[made.untyped_storage()] = None
        return made

    # Pinned memory of the host.

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        if not tensor.is_cpu:
            return False
        storage = tensor.untyped_storage()
        return storage in self._pinned or any(storage.data_ptr() in locked for locked in self.page_locked.values())

    def _pin(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        copy = args[0].clone()
        self._pinned[copy.untyped_storage()] = None
        return copy

    def _asks_pinned(self, func: Any, args: Any, kwargs: Any) -> bool:
        return self.is_pinned(args[0])

    def _allocate(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Allocations with `pin_memory=True`."""
        if not kwargs.get("pin_memory"):
            return NotImplemented
        made = func(*args, **{**kwargs, "pin_memory": False})
        self._pinned[made.untyped_storage()] = None
        return made


_HANDLERS: dict[Any, Any] = {
    aten._local_scalar_dense.default: FakeDevice._scalar,
    aten.nonzero.default: FakeDevice._data_dependent,
    aten.masked_select.default: FakeDevice._data_dependent,
    aten.copy_.default: FakeDevice._copy,
    aten._to_copy.default: FakeDevice._copy,
    aten._pin_memory.default: FakeDevice._pin,
    aten.is_pinned.default: FakeDevice._asks_pinned,
    aten.empty.memory_format: FakeDevice._allocate,
    aten.zeros.default: FakeDevice._allocate,
    aten.empty_like.default: FakeDevice._allocate,
    aten.zeros_like.default: FakeDevice._allocate,
    aten.empty_strided.default: FakeDevice._allocate,
}


def _values(shape: Any, dtype: torch.dtype) -> torch.Tensor:
    """What the host reads from the device: ones; False for questions, such as whether a gradient overflowed."""
    return torch.zeros(shape, dtype=dtype) if dtype is torch.bool else torch.ones(shape, dtype=dtype)


def _on_device(args: Any, kwargs: Any) -> bool:
    """Whether an operation has to do with the device."""
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "cuda":
        return True
    return any(isinstance(one, FakeTensor) for one in tree_iter((args, kwargs)))


def _tolist(self: FakeTensor) -> Any:
    """One copy to the host, where torch's own asks for each element."""
    return self.cpu().tolist()


FakeTensor.tolist = _tolist  # type: ignore[method-assign]


def _group_of(args: Any, kwargs: Any) -> dist.ProcessGroup | None:
    for one in (*args, *kwargs.values()):
        if isinstance(one, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(one)
            except RuntimeError:  # an object of another class: a ReduceOp
                continue
        if isinstance(one, str) and one in dist.distributed_c10d._world.pg_names.values():
            return dist.distributed_c10d._resolve_process_group(one)
    return None


def _message_size(operation: str, args: Any, ranks: int) -> int:
    """Bytes of the whole tensor, of all ranks' parts together."""

    def size(tree: Any) -> int:
        return sum(one.numel() * one.element_size() for one in tree_iter(tree) if isinstance(one, torch.Tensor))

    sizes = [size(one) for one in args]
    return max(sizes, default=0)  # of input and output, the larger is the whole


def place(depth: int = 3) -> str:
    """The innermost frames of our own code or DeepSpeed's, innermost first: `engine/flat.py:52 _to_device < ...`."""
    found: list[str] = []
    frame = sys._getframe(2)
    while frame is not None and len(found) < depth:
        name = frame.f_code.co_filename
        if "/deepspeed/" in name or (name.startswith(str(ROOT)) and "/tests/rehearsal/" not in name):
            short = name.rpartition("site-packages/")[2].removeprefix(str(ROOT) + "/").removeprefix("megatron_lite/")
            found.append(f"{short}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(found) or "somewhere else"
