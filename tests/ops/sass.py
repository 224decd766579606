"""Reads the machine code of CUDA kernels: what a thread executes, how often it waits for memory.

`shortest_path` stands in for a GPU: of all paths through a kernel that do a row's work, as counted
by instructions that the work needs, it finds the shortest. That is what most threads execute;
edges, slow divisions and rare branches lie beside it.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator
from typing import NamedTuple


class Instruction(NamedTuple):
    """One line of SASS.

    Attributes:
        address: in bytes from the start of the kernel.
        predicated: whether a predicate decides if it is executed.
        text: without its predicate.
        control: the upper half of its encoding, with the scoreboard bits.
    """

    address: int
    predicated: bool
    text: str
    control: int

    @property
    def target(self) -> int:
        """The address that a branch names last."""
        return int(re.findall(r"0x([0-9a-f]+)", self.text)[-1], 16)

    @property
    def waits_for(self) -> set[int]:
        """The scoreboards that must be clear before it is issued."""
        mask = self.control >> 52 & 63
        return {k for k in range(6) if mask >> k & 1}

    @property
    def sets(self) -> int:
        """The scoreboard that its result clears; 7 for none."""
        return self.control >> 46 & 7


def instructions(body: str) -> list[Instruction]:
    """Parses a function as ``cuobjdump -sass`` prints it."""
    line = r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\d\s+)?(.*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/\s+"
    found = re.findall(line + r"/\* 0x([0-9a-f]{16}) \*/", body)
    return [Instruction(int(a, 16), bool(p), text, int(c, 16)) for a, p, text, c in found]


def shortest_path(body: str, work: dict[str, int]) -> list[Instruction]:
    """Returns the shortest way to EXIT with at least ``work[pattern]`` instructions per pattern."""
    code = instructions(body)
    place = {instruction.address: i for i, instruction in enumerate(code)}
    start = (0, tuple(0 for _ in work))
    came_from: dict[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]] | None] = {}
    queue: list[tuple[int, tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]] | None]] = [
        (0, start, None)
    ]
    while queue:
        cost, state, before = heapq.heappop(queue)
        if state in came_from:
            continue
        came_from[state] = before
        at, done = state[0], code[state[0]]
        counts = tuple(
            min(most, have + bool(re.match(pattern, done.text)))
            for (pattern, most), have in zip(work.items(), state[1], strict=True)
        )
        if done.text.startswith("EXIT") and not done.predicated and counts == (*work.values(),):
            path: list[Instruction] = []
            step: tuple[int, tuple[int, ...]] | None = state
            while step is not None:
                path.append(code[step[0]])
                step = came_from[step]
            return path[::-1]
        for following in _successors(done, at, place):
            heapq.heappush(queue, (cost + 1, (following, counts), state))
    raise ValueError(f"no path does {work}")


def _successors(done: Instruction, at: int, place: dict[int, int]) -> Iterator[int]:
    ends = done.text.startswith(("EXIT", "RET", "CALL", "BRA", "BRX"))
    branches = done.text.startswith("BRA") or (done.text.startswith("CALL") and done.predicated)
    if branches:
        yield place[done.target]
    # BRA.DIV: if the warp's threads are apart; "BRA P0, ..." has its predicate as an operand
    conditional = done.predicated or ".DIV" in done.text or re.match(r"BRA\S* !?U?P\d", done.text)
    if not ends or conditional:
        yield at + 1


def memory_waits(path: list[Instruction]) -> int:
    """Counts how often a path waits for loads from memory that were started since the last wait."""
    waits = 0
    pending: set[int] = set()  # scoreboards of loads since the last wait
    for instruction in path:
        if pending & instruction.waits_for:
            waits += 1
            pending = set()
        if instruction.text.startswith("LDG") and instruction.sets < 6:
            pending.add(instruction.sets)
    return waits
