"""`torch.cuda` and `torch.distributed` as a rank on an H100 sees them, on a machine that has neither GPU nor peers.

`as_rank` makes this process one rank of a job: its tensors on `cuda` are fake (`recorder.FakeDevice`), its process
groups are torch's `fake` ones, which return at once. Only for a process that does nothing else (`warm.py`): torch.cuda
stays replaced until it ends.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from itertools import combinations
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._subclasses.fake_tensor
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_lite.parallel.topology import Topology
from tests.rehearsal.recorder import FakeDevice

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", total_memory=80 * 2**30, uuid="GPU-0", major=9, minor=0, multi_processor_count=132
)
_FLASH_LARGEST_HEAD = 256

_active: list[FakeDevice] = []
"""The fake device of the rehearsal that is going on; none outside of one."""


def _wait(kind: str, given_in_step: int | None = None) -> None:
    if _active:
        _active[-1].wait(kind, given_in_step)


class Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self._step = 0

    def record(self, stream: Any = None) -> None:
        self._step = _active[-1].step if _active else 0

    def synchronize(self) -> None:
        _wait("event.synchronize", self._step)

    def wait(self, stream: Any = None) -> None:
        """On the device: the host goes on."""

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 1.0


class Stream:
    device = torch.device("cuda", 0)
    cuda_stream = stream_id = device_index = 0
    device_type = 1

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def synchronize(self) -> None:
        _wait("stream.synchronize")

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_stream(self, other: Any) -> None:
        """On the device: the host goes on."""

    def wait_event(self, event: Any) -> None:
        """On the device: the host goes on."""

    def query(self) -> bool:
        return True

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Generator:
    """The device's random numbers: stateless, as there are no numbers."""

    device = torch.device("cuda", 0)

    def get_state(self) -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_state(self, state: Tensor) -> None:
        pass

    def manual_seed(self, seed: int) -> Generator:
        return self

    def initial_seed(self) -> int:
        return 0

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> None:
        pass


class Runtime:
    """CUDA's runtime, as far as `torch.cuda.cudart()` is asked: to lock memory of the host."""

    @staticmethod
    def cudaHostRegister(address: int, size: int, flags: int) -> int:  # noqa: N802
        _active[-1].page_locked[address] = range(address, address + size)
        return 0

    @staticmethod
    def cudaHostUnregister(address: int) -> int:  # noqa: N802
        return 0 if _active[-1].page_locked.pop(address, None) else 1


def _live(_: Any = None) -> int:
    return _active[-1].memory.live if _active else 0


def _peak(_: Any = None) -> int:
    return _active[-1].memory.peak if _active else 0


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def replace_torch_cuda() -> None:
    """Replace what training code asks of `torch.cuda`."""
    os.environ["DS_ACCELERATOR"] = "cuda"
    replaced: dict[str, Any] = {
        "Event": Event,
        "Stream": Stream,
        "default_generators": (Generator(),),
        "cudart": Runtime,
        "is_available": _always(True),
        "is_initialized": _always(True),
        "is_bf16_supported": _always(True),
        "is_current_stream_capturing": _always(False),
        "device_count": _always(1),
        "current_device": _always(0),
        "current_stream": _always(Stream()),
        "default_stream": _always(Stream()),
        "stream": _always(contextlib.nullcontext()),
        "synchronize": lambda *_: _wait("cuda.synchronize"),
        "get_device_properties": _always(H100),
        "get_device_name": _always(H100.name),
        "get_device_capability": _always((H100.major, H100.minor)),
        "memory_allocated": _live,
        "memory_reserved": _live,
        "memory_cached": _live,
        "max_memory_allocated": _peak,
        "max_memory_reserved": _peak,
        "max_memory_cached": _peak,
        "memory_stats": _always({}),
        "mem_get_info": lambda *_: (H100.total_memory - _live(), H100.total_memory),
        "get_rng_state": _always(torch.zeros(16, dtype=torch.uint8)),
        "initial_seed": _always(0),
    }
    silent = "init _lazy_init _lazy_call set_device empty_cache reset_peak_memory_stats reset_max_memory_cached "
    silent += "reset_max_memory_allocated set_rng_state manual_seed manual_seed_all"
    for name, value in (replaced | dict.fromkeys(silent.split(), _nothing)).items():
        setattr(torch.cuda, name, value)
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = _nothing
    Tensor.record_stream = _nothing  # type: ignore[method-assign]
    torch._subclasses.fake_tensor.init_gpu_context = _nothing


_real_attention = nn.functional.scaled_dot_product_attention


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that torch 2.13 chooses on an H100 (`sdp_utils.cpp`): flash for half precision without a mask, the
    memory-efficient one for fp32 or a mask, and plain products where neither takes grouped heads."""
    if not query.is_cuda:
        return _real_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    half = query.dtype in (torch.bfloat16, torch.float16)
    if half and attn_mask is None and query.shape[-1] <= _FLASH_LARGEST_HEAD:
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
    if query.shape[1] != key.shape[1]:  # grouped heads
        return torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    trains = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, trains, dropout_p, is_causal, scale=scale
    )[0]


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` that assigns `.data`, as it does for real tensors. For fake ones torch would swap the objects,
    which fails while hooks refer to them."""
    if recurse:
        for child in self.children():
            child._apply(fn)
    for name, tensor in [*self._parameters.items(), *self._buffers.items()]:
        if tensor is None:
            continue
        with torch.no_grad():
            applied = fn(tensor)
        if applied is tensor:
            continue
        if isinstance(tensor, nn.Parameter) and applied.device == tensor.device:
            tensor.data = applied
        elif isinstance(tensor, nn.Parameter):  # real on the CPU, fake on the device: no common memory to assign
            self._parameters[name] = _moved(tensor, applied)
        else:
            self._buffers[name] = applied
    return self


def _moved(parameter: nn.Parameter, applied: Tensor) -> nn.Parameter:
    """The parameter on its new device, with all that was noted on the old one."""
    made = nn.Parameter(applied, parameter.requires_grad)
    made.__dict__.update(parameter.__dict__)
    return made


def _gather_objects(everyone: list[Any], own: Any, group: Any = None) -> None:
    everyone[:] = [own] * len(everyone)


_real_new_group = dist.new_group


def _new_group(ranks: Any = None, timeout: Any = None, backend: Any = None, **kwargs: Any) -> Any:
    """Every group is a fake one; those of the CPU (gloo) accept tensors of the CPU."""
    group = _real_new_group(ranks, backend="fake", **kwargs)
    if backend == "gloo" and isinstance(group, dist.ProcessGroup):
        FakeDevice.of_the_host.add(group.group_name)
    return group


def _names_of_groups(topology: Topology) -> dict[tuple[int, ...], str]:
    """By their ranks. `stages`: all or some ranks of a pipeline; tied weights lie on some."""
    names = {tuple(range(topology.world_size)): "world"}
    for ranks in topology.pipeline_groups():
        for size in range(2, len(ranks) + 1):
            names |= dict.fromkeys(combinations(ranks, size), "stages")
    names |= {tuple(ranks): "tensor" for ranks in topology.tensor_groups()}
    return names | {tuple(ranks): "data" for ranks in topology.data_groups()}


@contextlib.contextmanager
def as_rank(rank: int, topology: Topology) -> Iterator[FakeDevice]:
    """While this lasts, the process is one rank of a job with this layout, on a node of its own."""
    world_size = topology.world_size
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK="0",
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="",
        MASTER_PORT="0",
    )
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    fake = FakeDevice(_names_of_groups(topology))
    _active.append(fake)
    with (
        mock.patch.multiple(dist, all_gather_object=_gather_objects, new_group=_new_group),
        mock.patch.multiple(dist, broadcast_object_list=_nothing),
        mock.patch.object(nn.functional, "scaled_dot_product_attention", _attention),
        mock.patch.object(nn.Module, "_apply", _apply),
        fake,
    ):
        try:
            yield fake
        finally:
            _active.pop()
            dist.destroy_process_group()
