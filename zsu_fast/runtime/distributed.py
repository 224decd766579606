"""One call made on every rank of a torch.distributed group, on several GPUs or machines.

The ranks share the synthesis: each claims shards of impressions, and all gather the result.
Splitting and fitting are cheap, so every rank repeats them and then copies rank 0's result: all
ranks hold the same bits. Ranks leave a stage together: an error on one raises on all of them.
"""

from __future__ import annotations

import functools
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ArgumentError, RankError, ZsuFastError
from .progress import Stopped

# How long a rank started by torchrun waits for the slowest one.
TIMEOUT = timedelta(minutes=30)
_POLL_SECONDS = 0.1  # between two queries of the other ranks' flags
# Smallest shard, in multiply-adds per step on a CPU; below this, Python overhead shows.
_SHARD_WORK = 1_600_000_000
# At least this many shards, as long as each gets 4 rows (32 on a GPU).
_MIN_SHARDS = 8
# Marks an error that the other ranks know: enclosing blocks must not send it again.
_REPORTED = "_reported_to_ranks"
P = ParamSpec("P")
T = TypeVar("T")


class _OtherRankFailed(Exception):
    """Another rank has failed; the next `Ranks.exchange` raises its error."""


@dataclass
class Ranks:
    """The ranks that make one call together; by default a single process without a group.

    Attributes:
        rank: this process's rank.
        size: number of ranks.
        backend: name of the torch.distributed backend; "" without a group.
        device: the device of the tensors that the backend sends.
        rows: rows per rank in the last `gather`.
    """

    rank: int = 0
    size: int = 1
    backend: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rows: list[int] = field(default_factory=list)
    _call_id: str = ""  # the same on all ranks, different for each call
    _exchanges: int = 0
    _last_poll: float = 0.0

    @property
    def single(self) -> bool:
        """Whether there is no group, so that nothing is exchanged."""
        return not self.backend

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files, prints, and shows progress."""
        return self.rank == 0

    def exchange(self, value: Any = None, error: BaseException | None = None) -> list[Any]:
        """Returns every rank's ``value``. All ranks must call it; a failing rank passes its error.

        Raises:
            RankError: another rank passed an error, or can't be reached.
        """
        if self.single:
            return [value]
        got: list[Any] = [None] * self.size
        with self._connected():
            dist.all_gather_object(got, (None if error is None else _describe(error), value))
        self._exchanges += 1
        failed = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(got) if text]
        if failed and error is None:
            more = f" (and {len(failed) - 1} more)" if failed[1:] else ""
            raise RankError(failed[0] + more)
        return [value for _, value in got]

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """The block ends on all ranks, or raises on all of them. Blocks may be nested.

        Raises:
            RankError: another rank raised; that rank raises its own error.
        """
        try:
            yield
        except _OtherRankFailed:
            self.exchange()
            raise
        except BaseException as error:
            notes = vars(error)  # a frozen dataclass would refuse setattr
            if not self.single and not isinstance(error, RankError) and _REPORTED not in notes:
                notes[_REPORTED] = True
                with suppress(RankError):
                    self.set_flag("failed")
                    self.exchange(error=error)
            raise
        self.exchange()

    def broadcast_object(self, value: T) -> T:
        """Returns rank 0's value on every rank."""
        return cast(T, self.exchange(value if self.is_main else None)[0])

    def check_same(self, facts: dict[str, Any]) -> None:
        """Checks that ``facts`` are equal on all ranks.

        Raises:
            RankError: a rank differs from rank 0.
        """
        everyone = self.exchange(facts)
        for rank, theirs in enumerate(everyone):
            for name, value in theirs.items():
                if value != (expected := everyone[0][name]):
                    raise RankError(
                        f"rank {rank}: its {name} is {value!r:.100}, rank 0 has {expected!r:.100}. "
                        f"Make the same call on every rank."
                    )

    def claim_shards(self, count: int) -> Iterator[int]:
        """Yields shard numbers below ``count``; each goes to one rank, the first that is free.

        How long a shard takes is not known in advance: with a fixed share per rank, ranks would
        wait for the slowest (measured: 1.3 times as long on two ranks).
        """
        if self.single:
            yield from range(count)
            return
        while not self.flag("stopped") and not self.flag("failed"):
            with self._connected():
                shard = self._store.add(self._key("claimed"), 1) - 1
            if shard >= count:
                return
            yield shard

    def gather(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """Concatenates the rows of all ranks in the order of ranks.

        Args:
            columns: tensors [n, ...] on the CPU by name; n may differ between ranks and may be 0.
        """
        if self.single:
            return columns
        self.rows = self.exchange(len(next(iter(columns.values()))))
        with self.all_or_none():  # memory may run out
            joined = {n: c.new_empty(sum(self.rows), *c.shape[1:]) for n, c in columns.items()}
        for name, whole in joined.items():
            for rank, part in enumerate(whole.split(self.rows)):
                if len(part):
                    self._broadcast(columns[name] if rank == self.rank else part, rank, part)
        return joined

    def copy_from_main(self, tensors: Sequence[Tensor]) -> None:
        """Overwrites ``tensors`` with those of rank 0, bit for bit."""
        if not self.single:
            for tensor in tensors:
                self._broadcast(tensor.detach(), 0, tensor.detach())

    def facts(self) -> dict[str, Any]:
        """The entry for the run's record; {} without a group."""
        if self.single:
            return {}
        return {"ranks": self.size, "backend": self.backend, "rows": self.rows}

    def request_stop(self) -> None:
        """Tells the other ranks to end this stage early, as this one was asked to."""
        self.set_flag("stopped")

    def poll(self) -> None:
        """Ends this rank's stage if another rank was asked to stop or has failed.

        Raises:
            Stopped: another rank was asked to stop.
            _OtherRankFailed: another rank raised; `all_or_none` turns this into a `RankError`.
        """
        if self.single or time.monotonic() - self._last_poll < _POLL_SECONDS:
            return
        self._last_poll = time.monotonic()
        if self.flag("failed"):
            raise _OtherRankFailed
        if self.flag("stopped"):
            raise Stopped("another rank was asked to stop")

    def set_flag(self, name: str) -> None:
        """Sets a flag that all ranks see until the end of the stage."""
        if not self.single:
            with self._connected():
                self._store.set(self._key(name), "1")

    def flag(self, name: str) -> bool:
        """Whether any rank has set this flag in this stage."""
        if self.single:
            return False
        with self._connected():
            return bool(self._store.check([self._key(name)]))

    def _broadcast(self, source: Tensor, rank: int, target: Tensor) -> None:
        """Sends bytes: every backend supports them, whatever the dtype."""
        data = source.contiguous().to(self.device, copy=True)
        with self._connected():
            dist.broadcast(data.reshape(-1).view(torch.uint8), rank)
        target.copy_(data)

    @property
    def _store(self) -> Any:
        return dist.distributed_c10d._get_default_store()

    def _key(self, name: str) -> str:
        """A key for one stage of one call, so that a stop does not carry over into the next."""
        return f"zsu_fast/{self._call_id}/{self._exchanges}/{name}"

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Turns the RuntimeErrors of a backend that lost a rank into a `RankError`."""
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank}: another rank was killed, did not make the call, or took longer "
                f"than the group's timeout ({_describe(error)[:300]})"
            ) from error


def join(wanted: bool | None = None) -> Ranks:
    """Returns the ranks of the default process group, or of this process alone.

    All ranks of the group must call this.

    Args:
        wanted: True requires a group, False ignores it, None joins it if it is initialised.

    Raises:
        ArgumentError: a group is required and there is none, or ``wanted`` is something else.
    """
    if wanted is not None and not isinstance(wanted, bool):
        raise ArgumentError("distributed", f"got {wanted!r}", "Pass True, False, or None.")
    initialised = dist.is_available() and dist.is_initialized()
    if wanted and not initialised:
        raise ArgumentError(
            "distributed",
            "got True, but no process group is initialised",
            "Call torch.distributed.init_process_group(), or start the program with torchrun.",
        )
    if wanted is False or not initialised:
        return Ranks()
    on_cpu = "cpu:" in dist.get_backend_config()
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.get_backend(), device)
    ranks._call_id = ranks.broadcast_object(uuid.uuid4().hex)
    return ranks


@contextmanager
def launched(device: str | None) -> Iterator[Ranks]:
    """Yields the ranks of a command: all processes started by torchrun, or this one alone.

    Args:
        device: the user's choice. None and "cuda" stand for the local rank's GPU if there are GPUs
            (NCCL backend); otherwise ranks run on the CPU (gloo backend).

    Raises:
        ArgumentError: not every rank can use this device.
    """
    variables = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # set by torchrun
    if not dist.is_available() or not variables <= os.environ.keys() or dist.is_initialized():
        yield join()
        return
    local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    if on_gpu and (device not in (None, "cuda") or local >= torch.cuda.device_count()):
        raise ArgumentError(
            "device",
            f"got {device!r} for local rank {local} of a machine with {torch.cuda.device_count()} "
            f"GPUs",
            "Leave it out for one GPU per rank, start at most one rank per GPU, or pass cpu.",
        )
    if on_gpu:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    try:
        ranks = join()
        try:
            yield ranks
        finally:  # torchrun kills all ranks once one has failed: let rank 0 print the error first
            with suppress(RankError):
                ranks.exchange()
    finally:
        dist.destroy_process_group()


def ranks_here() -> int:
    """Number of ranks on this machine; they share its memory."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def make_shards(rows: int, most: int, work: int, device: torch.device) -> list[Tensor]:
    """Splits rows into shards with a stride, so that each shard holds rows of all classes.

    Rounding may depend on the batch that a row is in, and the whole ascent on rounding. So shards
    depend on the rows and the model alone, never on the number of ranks.

    Args:
        rows: number of rows.
        most: largest number of rows per shard.
        work: multiply-adds per row.
        device: on a GPU, shards are larger.

    Returns:
        Row indices of each shard, int64.
    """
    on_gpu = device.type == "cuda"
    least, enough = (32, most) if on_gpu else (4, _SHARD_WORK // max(1, work))
    size = min(most, max(least, min(enough, math.ceil(rows / _MIN_SHARDS))))
    count = math.ceil(rows / size)
    return [torch.arange(start, rows, count) for start in range(count)]


def all_or_none(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Runs a method in ``self.ranks.all_or_none()``."""

    @functools.wraps(method)
    def run(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.ranks.all_or_none():
            return method(self, *args, **kwargs)

    return run


def _describe(error: BaseException) -> str:
    if isinstance(error, ZsuFastError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return f"{type(error).__name__}: {error}"
