"""Freed memory stays in the process within the block, and outside it does not."""

from __future__ import annotations

import platform

import pytest
import torch

from zsu_fast.runtime.allocator import keep_freed_memory

PAGES = 16384  # of 4 KB, in 64 MB


def faults() -> int:
    """Page faults of writing 64 MB in new memory."""
    resource = pytest.importorskip("resource", reason="Windows counts no page faults")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the block acts on glibc alone")
def test_memory_is_used_again_in_the_block_only() -> None:
    with keep_freed_memory():
        faults()
        assert faults() < PAGES // 8
    faults()
    assert faults() > PAGES // 2


def test_the_settings_come_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), keep_freed_memory():
        raise ZeroDivisionError
    if platform.libc_ver()[0] == "glibc":
        faults()
        assert faults() > PAGES // 2
