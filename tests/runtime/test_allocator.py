"""Freed memory stays in the process within the block, and goes back at its end."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

# In a process of its own: what other code has allocated decides where a block finds room.
PROGRAM = """
import json, resource, torch
from zsu_fast.runtime.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with keep_freed_memory():
    inside = [faults() for _ in range(4)]
print(json.dumps([min(inside), faults()]))
"""
PAGES = 16384  # of 4 KB, in 64 MB


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the block acts on glibc alone")
def test_memory_is_used_again_and_goes_back_at_the_end() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, stdout=subprocess.PIPE, text=True
    )
    inside, after = json.loads(done.stdout)
    assert inside < PAGES // 8
    assert after > PAGES // 2  # the memory went back at the end
