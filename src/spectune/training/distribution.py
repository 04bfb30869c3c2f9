"""Several processes, one model: rows are shared out, gradients are summed. Started by torchrun; alone otherwise.

This is the one place that decides where weights live and how gradients are combined: every process holds the whole
model, and the gradient of a step is the sum of what all processes computed. What a process has to know of the others
beside that goes through `gather`, at the bounds of phases, and with each step's numbers.
"""

import contextlib
import copy
import datetime
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from spectune.errors import ConfigError, PeerFailedError, SpectuneError, first_line
from spectune.torchrun import Place

T = TypeVar("T")

#: small tensors are sent together in buckets of at most so many bytes, which one step takes beside its gradients
BUCKET_BYTES = 2**25
#: a process may be so long in what the others wait for: compiling, writing a checkpoint. One that fails says so at once
PATIENCE = datetime.timedelta(minutes=30)


class World:
    """This process's place among all. Without torchrun, the only one.

    Args:
        device: the model's. The first World of several processes joins them, over NCCL on CUDA and gloo elsewhere.

    Raises:
        ConfigError: several processes were started, and what is done is for one (no `device`) or cannot be shared out.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        place = Place.from_environment()
        self.size, self.rank = place.size, place.rank
        #: gradients that no process had in the first step; None before it
        self._absent: bool | None = None
        if place.alone:
            return
        if device is None:
            raise ConfigError(f"this runs in one process, and {place.size} were started: start it without torchrun")
        if not dist.is_initialized():
            _join(device)

    @property
    def leads(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def first(self) -> "World":
        """The same as the first process sees it, whose share of a step is the largest."""
        found = copy.copy(self)
        found.rank = 0
        return found

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of a batch."""
        return items[self.rank :: self.size]

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes, in float64 where there are several."""
        if self.size > 1:
            value = value.to(torch.float64, copy=True)
            _collective(lambda: dist.all_reduce(value))
        return value

    def sum_of_step(self, loss_sum: Tensor, flag: bool) -> list[Tensor]:
        """What all processes have to know of a step, in one exchange that waits for nothing: the sum of their losses,
        and, where there are several, how many raised the flag."""
        if self.size == 1:
            return [loss_sum]
        return list(self.sum(torch.stack([loss_sum.double(), torch.full_like(loss_sum, float(flag)).double()])))

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add up gradients in place. A parameter without one counts as zero, and has none after it either where no
        process has one."""
        if self.size == 1:
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        absent = self._absent_everywhere(trained)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        _in_buckets([p.grad for p in trained if p.grad is not None], dist.all_reduce)
        for parameter in absent:
            parameter.grad = None

    def _absent_everywhere(self, trained: Sequence[Tensor]) -> list[Tensor]:
        """The parameters that no process has a gradient of. The host has to wait for it, so it is asked in the first
        step, and later only where that step lacked some: on all other models a gradient is there whatever the rows."""
        if self._absent is False:
            return []
        [first, *_] = trained
        present = torch.tensor([p.grad is not None for p in trained], dtype=torch.float64, device=first.device)
        found = [p for p, count in zip(trained, self.sum(present).tolist(), strict=True) if not count]
        if self._absent is None:
            self._absent = bool(found)
        return found

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes what the first one's tensors hold."""
        if self.size > 1:
            with torch.no_grad():
                _in_buckets([tensor.detach() for tensor in tensors], lambda flat: dist.broadcast(flat, 0))

    def gather(self, value: T) -> list[T]:
        """What each process gives, by rank. All wait for the last one."""
        return gathered(value) if self.size > 1 else [value]

    def least(self, value: int | None) -> int | None:
        """The least of all processes' numbers; None where nobody has one."""
        return min((found for found in self.gather(value) if found is not None), default=None)

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """A phase that all processes pass or none: where one fails, all do at its end."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            failure = error
        code = getattr(failure, "exit_code", SpectuneError.exit_code)
        notices = self.gather(None if failure is None else (first_line(failure), code))
        for rank, notice in enumerate(notices):
            if notice is not None:
                raise failure if failure is not None and rank == self.rank else PeerFailedError(rank, *notice)

    def seed_step(self, seed: int, step: int) -> None:
        """Draw this step's dropout as its number says: other on each process, the same when the run goes on, however
        many there were before. One process alone draws on, from where its checkpoint left off."""
        if self.size > 1:
            torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + self.rank) % 2**63)

    def barrier(self) -> None:
        """Return when all processes are here."""
        self.gather(None)


def gathered(value: T) -> list[T]:
    """What each of the processes that have joined gives, by rank."""
    found: list[T] = [value] * dist.get_world_size()
    _collective(lambda: dist.all_gather_object(found, value))
    return found


def _join(device: torch.device) -> None:
    """Raises ConfigError where there is no way between such devices, SpectuneError where the others do not come."""
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"several processes train on CUDA devices or on a CPU, not on {device.type!r}: --device cpu")
    place, own = Place.from_environment(), None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        own = device
    try:
        store = shared_store(place, PATIENCE)
        if store is not None:  # processes that have parted meet again under another name
            meeting = store.add(f"spectune/met/{place.attempt}/{place.rank}", 1)
            store = PrefixStore(f"spectune/{place.attempt}/{meeting}", store)
        of_store = {} if store is None else {"store": store, "rank": place.rank, "world_size": place.size}
        backend = "gloo" if own is None else "nccl"
        dist.init_process_group(backend, timeout=PATIENCE, device_id=own, **of_store)  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:
        raise SpectuneError(f"the processes do not find each other: {first_line(error)}") from error


def shared_store(place: Place, patience: datetime.timedelta) -> Store | None:
    """A connection to what torchrun keeps for all its processes; None without torchrun."""
    if place.shared_store is None:
        return None
    host, port = place.shared_store
    return dist.TCPStore(host, port, is_master=False, timeout=patience)  # type: ignore[attr-defined]


def _in_buckets(tensors: Iterable[Tensor], send: Callable[[Tensor], object]) -> None:
    """Apply a collective in place, to small tensors of one kind together: each call costs as much as megabytes do."""
    waiting = defaultdict[tuple[torch.device, torch.dtype], list[Tensor]](list)
    sizes = defaultdict[tuple[torch.device, torch.dtype], int](int)
    for tensor in tensors:
        kind, size = (tensor.device, tensor.dtype), tensor.nbytes
        if waiting[kind] and sizes[kind] + size > BUCKET_BYTES:
            _send(waiting.pop(kind), send)
            sizes[kind] = 0
        waiting[kind].append(tensor)
        sizes[kind] += size
    for bucket in waiting.values():
        _send(bucket, send)


def _send(bucket: Sequence[Tensor], send: Callable[[Tensor], object]) -> None:
    if len(bucket) == 1 and bucket[0].is_contiguous():
        _collective(lambda: send(bucket[0]))
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
    _collective(lambda: send(flat))
    parts = torch.split(flat, [tensor.numel() for tensor in bucket])
    torch._foreach_copy_(list(bucket), [part.view(t.shape) for part, t in zip(parts, bucket, strict=True)])


def _collective(call: Callable[[], object]) -> None:
    """Raises SpectuneError where another process has gone."""
    try:
        call()
    except RuntimeError as error:
        said = first_line(error)
        why = "" if "Connection closed" in said or "Connection reset" in said else f" ({said})"
        raise SpectuneError(
            f"the connection to another process was lost{why}: it has ended without a word, killed perhaps for want of "
            "memory. To go on from the newest checkpoint: the same command with --resume"
        ) from error
