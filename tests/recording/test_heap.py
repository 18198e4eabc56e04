"""Memory that was freed stays for the next batch, and goes back where too much has gathered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from patchclamp.recording import heap

MEGABYTE = 1 << 20


def resident() -> int:
    """Bytes of this process in memory, by another way than the code's."""
    [line] = [each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


def use_and_free(megabytes: int) -> None:
    """Hold blocks of 4 MB, which glibc takes from its heap, and free them."""
    held = [torch.ones(MEGABYTE) for _ in range(megabytes // 4)]
    del held


@pytest.mark.skipif(heap._glibc() is None, reason="another C library than glibc: nothing is done here")
def test_what_was_freed_stays_and_goes_back_when_it_is_too_much() -> None:
    with heap.kept_for_reuse() as memory:
        for _ in range(heap._FIRST):
            use_and_free(40)
            memory.batch_done()
        before = resident()
        use_and_free(400)
        assert resident() - before > 300 * MEGABYTE  # kept
        memory.batch_done()
        assert resident() - before < 50 * MEGABYTE
        use_and_free(400)
        memory.batch_done()
        assert resident() - before > 300 * MEGABYTE  # not so soon again
        for _ in range(heap._BETWEEN):
            memory.batch_done()
        assert resident() - before < 50 * MEGABYTE


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    with heap.kept_for_reuse() as memory:
        for _ in range(20):
            memory.batch_done()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_inside_is_passed_on(error: type[BaseException]) -> None:
    with pytest.raises(error), heap.kept_for_reuse():
        raise error
