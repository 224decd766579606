"""Several GPUs and machines: one call, made on every rank of a torch.distributed group.

The make_shards of the synthesis are dealt over the ranks, their impressions gathered on all. Splitting
and fitting cost little: each rank does them itself, and takes rank 0's result in the end, so that
all hold the same bits. Ranks leave a stage together or not at all: the error of one ends all.
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
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ArgumentError, RankError, ZsuFastError
from .events import Stopped

# How long a rank that torchrun started waits for the others: as long as they may differ by.
TIMEOUT = timedelta(minutes=30)
# Seconds between looks at what other ranks have told.
_POLL_SECONDS = 0.1
# A step of a piece on a CPU is worth so many multiply-adds: below, Python's share shows.
_PIECE_WORK = 1_600_000_000
# Whatever the work: at least so many make_shards, if there are as many rows to make 4 a piece.
_PIECES = 8
P = ParamSpec("P")
T = TypeVar("T")


class _OtherRankFailed(Exception):
    """Another rank has failed; what it said comes with the next `Ranks.exchange`."""


@dataclass
class Ranks:
    """The ranks that make a call together; by default one process alone.

    Attributes:
        rank, size: of this process, and how many there are.
        backend: as torch.distributed calls it; "" where there is no group.
        device: where tensors have to be to be sent.
        rows: of each rank in the last `gather`.
    """

    rank: int = 0
    size: int = 1
    backend: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rows: list[int] = field(default_factory=list)
    _call: str = ""
    _exchanges: int = 0
    _polled: float = 0.0

    @property
    def single(self) -> bool:
        return not self.backend

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes, prints, and shows progress."""
        return self.rank == 0

    def exchange(self, value: Any = None, error: BaseException | None = None) -> list[Any]:
        """Every rank's value. All ranks have to call it, one that failed with its ``error``.

        Raises:
            RankError: on the ranks that did not fail, where another one did, or is gone.
        """
        if self.single:
            return [value]
        got: list[Any] = [None] * self.size
        with self._connected():
            dist.all_gather_object(got, (None if error is None else _in_words(error), value))
        self._exchanges += 1
        failed = [f"rank {rank}: {words}" for rank, (words, _) in enumerate(got) if words]
        if failed and error is None:
            more = f" (and {len(failed) - 1} more)" if failed[1:] else ""
            raise RankError(failed[0] + more)
        return [value for _, value in got]

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """All ranks leave the block, or it raises on all of them.

        Raises:
            RankError: another rank raised something; the one that did raises that.
        """
        try:
            yield
        except _OtherRankFailed:
            self.exchange()
            raise
        except BaseException as error:
            if not self.single and not isinstance(error, RankError) and not _is_reported(error):
                error.__dict__["_reported"] = True  # an outer block must not tell it once more
                with suppress(RankError):
                    self._set_flag("failed")
                    self.exchange(error=error)
            raise
        self.exchange()

    def broadcast_object(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        got: T = self.exchange(value if self.is_main else None)[0]
        return got

    def check_same(self, facts: dict[str, Any]) -> None:
        """Checks that every rank has the same facts.

        Raises:
            RankError: one has others.
        """
        everyone = self.exchange(facts)
        for rank, theirs in enumerate(everyone):
            for name, value in theirs.items():
                want = everyone[0][name]
                if value != want:
                    raise RankError(
                        f"rank {rank}: its {name} is {value!r:.100}, that of rank 0 {want!r:.100}. "
                        f"Every rank has to make the same call."
                    )

    def claim_shards(self, count: int) -> Iterator[int]:
        """Numbers below ``count``, each to one rank: whoever is done takes the next.

        How long a piece takes can't be told before, so that a fixed share for each rank would let
        them wait for the slowest (measured: 1.3 times as long on two ranks).
        """
        if self.single:
            yield from range(count)
            return
        while not self._flag("stopped") and not self._flag("failed"):
            with self._connected():
                at = self._store.add(self._key("dealt"), 1) - 1
            if at >= count:
                return
            yield at

    def gather(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rows of all ranks, rank by rank.

        Args:
            columns: tensors [n, ...] by name on the CPU; n may differ between ranks, and be 0.
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
        """Gives ``tensors`` rank 0's bits."""
        if not self.single:
            for tensor in tensors:
                self._broadcast(tensor.detach(), 0, tensor.detach())

    def facts(self) -> dict[str, Any]:
        """For the record; {} for one process alone."""
        if self.single:
            return {}
        return {"ranks": self.size, "backend": self.backend, "rows": self.rows}

    def request_stop(self) -> None:
        """Tells the others that this rank was asked to end the stage early."""
        self._set_flag("stopped")

    def poll(self) -> None:
        """Ends what this rank does where another one was asked to stop, or has failed.

        Raises:
            Stopped, _OtherRankFailed: as said.
        """
        if self.single or time.monotonic() - self._polled < _POLL_SECONDS:
            return
        self._polled = time.monotonic()
        if self._flag("failed"):
            raise _OtherRankFailed
        if self._flag("stopped"):
            raise Stopped("another rank was asked to stop")

    def _broadcast(self, source: Tensor, rank: int, target: Tensor) -> None:
        """As bytes: every backend takes these, whatever the dtype."""
        data = source.contiguous().to(self.device, copy=True)
        with self._connected():
            dist.broadcast(data.reshape(-1).view(torch.uint8), rank)
        target.copy_(data)

    @property
    def _store(self) -> Any:
        return dist.distributed_c10d._get_default_store()

    def _key(self, what: str) -> str:
        """Of one stage of one call: a stop does not reach into the next one."""
        return f"zsu_fast/{self._call}/{self._exchanges}/{what}"

    def _set_flag(self, what: str) -> None:
        if not self.single:
            with self._connected():
                self._store.set(self._key(what), "1")

    def _flag(self, what: str) -> bool:
        with self._connected():
            return bool(self._store.check([self._key(what)]))

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Backends raise RuntimeErrors of their own where a rank is gone or late."""
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank}: another rank was killed, did not make the call, or took longer "
                f"than the group's timeout ({_in_words(error)[:300]})"
            ) from error


def join(wanted: bool | None = None) -> Ranks:
    """The ranks of this process: the default group where it is initialised, else itself alone.

    All ranks of the group have to call this.

    Args:
        wanted: False for this process alone, True if there has to be a group.

    Raises:
        ArgumentError: there is none.
    """
    if wanted is not None and not isinstance(wanted, bool):
        raise ArgumentError("distributed", f"got {wanted!r}", "Pass True, False, or None.")
    there = dist.is_available() and dist.is_initialized()
    if wanted and not there:
        raise ArgumentError(
            "distributed",
            "got True, and no process group is initialised",
            "Call torch.distributed.init_process_group(), or start the program by torchrun.",
        )
    if wanted is False or not there:
        return Ranks()
    on_cpu = "cpu:" in dist.get_backend_config()
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.get_backend(), device)
    ranks._call = ranks.broadcast_object(uuid.uuid4().hex)
    return ranks


@contextmanager
def launched(device: str | None) -> Iterator[Ranks]:
    """The ranks of a command: of all processes that torchrun started, if it did.

    Args:
        device: as the user named it. None and "cuda" are the GPU of the local rank, where there
            are GPUs; the group is NCCL's then, else gloo's.

    Raises:
        ArgumentError: that device can't be every rank's.
    """
    if not started_by_torchrun() or dist.is_initialized():
        yield join()
        return
    local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    if on_gpu and (device not in (None, "cuda") or local >= torch.cuda.device_count()):
        raise ArgumentError(
            "device",
            f"got {device!r} for local rank {local} of a machine with {torch.cuda.device_count()} "
            f"GPUs",
            "Leave it out for a GPU a rank, start no more ranks than GPUs, or pass cpu.",
        )
    if on_gpu:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    try:
        ranks = join()
        try:
            yield ranks
        finally:  # torchrun ends all as soon as one has failed: rank 0 has to have its say first
            with suppress(RankError):
                ranks.exchange()
    finally:
        dist.destroy_process_group()


def started_by_torchrun() -> bool:
    """Whether the environment tells a rank, the number of ranks, and where they meet."""
    return dist.is_available() and all(
        name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    )


def ranks_here() -> int:
    """Ranks on this machine, that share its memory."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def make_shards(rows: int, most: int, work: int, device: torch.device) -> list[Tensor]:
    """Row numbers of each piece that is dealt: each holds rows of all classes, hard and easy.

    How a row is rounded may depend on the batch that it is in, and its whole ascent on that: so
    the make_shards depend on the rows and the model alone, never on how many ranks there are.

    Args:
        rows: how many there are.
        most: in one piece.
        work: multiply-adds of a row.
        device: a GPU wants more rows at once.
    """
    if device.type == "cuda":
        least, enough = 32, most
    else:
        least, enough = 4, _PIECE_WORK // max(1, work)
    size = min(most, max(least, min(enough, math.ceil(rows / _PIECES))))
    count = math.ceil(rows / size)
    return [torch.arange(start, rows, count) for start in range(count)]


def all_or_none(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """A method of an object with a ``ranks``, inside `Ranks.all_or_none`."""

    @functools.wraps(method)
    def run(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.ranks.all_or_none():
            return method(self, *args, **kwargs)

    return run


def joins_ranks(method: Callable[P, None]) -> Callable[P, None]:
    """An ``__init__`` with the option ``distributed``: sets ``ranks`` first, then as `together`."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        wanted: Any = kwargs.get("distributed")
        ranks = join(wanted)
        args[0].ranks = ranks  # type: ignore[attr-defined]
        with ranks.all_or_none():
            method(*args, **kwargs)

    return run


def _in_words(error: BaseException) -> str:
    if isinstance(error, ZsuFastError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return f"{type(error).__name__}: {error}"


def _is_reported(error: BaseException) -> bool:
    return bool(error.__dict__.get("_reported"))
