"""Weights in huge pages of memory, which a CPU reads faster where it has few tokens for them.

Every page has an entry in a page table, which is read along with the weights: with pages of 4 KiB one for 64
cache lines, with those of 2 MiB one for 32768. Most distributions of Linux give huge pages only to programs
that ask for them, and Paddle does not ask.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import paddle

__all__ = ["use_huge_pages"]

_MADV_COLLAPSE = 25  # linux/mman.h
_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")


def use_huge_pages(*tensors: paddle.Tensor | None) -> None:
    """Puts the memory of tensors on the CPU into huge pages, as far as there are some.

    Whole pages of 2 MiB inside of a tensor are moved; its contents and its address stay. FusedMoE does so
    with its weights, and accelerate() of the integrations with those of a model. Call it for other weights
    that are there to stay, once they have their values. A copy, also of another dtype, is in small pages.

    Nothing happens to None, to tensors on a GPU or without values yet, and where Linux is older than 6.1 or
    set to never use such pages, or PADDLE_MOE_HUGE_PAGES=0 is set; `paddle_moe doctor` says so.

    Args:
        tensors: contiguous.

    Raises:
        ValueError: an argument is no paddle.Tensor.
    """
    # Here, because the benchmark may run without Paddle, and doctor without what was compiled.
    import paddle

    from paddle_moe._options import type_name

    for tensor in tensors:
        if tensor is None:
            continue
        if not isinstance(tensor, paddle.Tensor):
            raise ValueError(f"tensors must be of type paddle.Tensor, got {type_name(tensor)}")
        if tensor._is_initialized() and tensor.place.is_cpu_place():
            collapse(tensor.data_ptr(), tensor.size * tensor.element_size())


def why_not() -> str | None:
    """Why no memory is put into huge pages here; None where it is.

    PADDLE_MOE_HUGE_PAGES=0 in the environment is a reason.
    """
    choice = os.environ.get("PADDLE_MOE_HUGE_PAGES", "")
    if choice not in ("", "0", "1"):
        raise ValueError(f"PADDLE_MOE_HUGE_PAGES must be 0 or 1, got {choice!r}")
    return "PADDLE_MOE_HUGE_PAGES=0 is set" if choice == "0" else _why_not_in_this_system()


@functools.cache
def _why_not_in_this_system() -> str | None:
    try:
        settings = (_SETTINGS / "enabled").read_text()
    except OSError:
        return "this system has none for programs that do not reserve them"
    if "[never]" in settings:
        return f"{_SETTINGS}/enabled says never"
    page = _page_bytes()
    memory = mmap.mmap(-1, 2 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(bytes(len(memory)))
    first = ctypes.c_char.from_buffer(memory)
    start = ctypes.addressof(first)
    error = _advise(start + -start % page, page)
    del first  # else the memory could not be given back
    memory.close()
    if error in (0, errno.EAGAIN, errno.EBUSY, errno.ENOMEM):  # there is no such page at this moment
        return None
    return f"madvise(MADV_COLLAPSE), which Linux has since 6.1: {os.strerror(error)}"


@functools.cache
def _page_bytes() -> int:
    return int((_SETTINGS / "hpage_pmd_size").read_text())


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _advise(start: int, size: int) -> int:
    """The error number; 0 if it did."""
    done = _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_COLLAPSE)
    return ctypes.get_errno() if done else 0


def collapse(address: int, size: int) -> None:
    """Puts the whole huge pages of `size` bytes from `address` on into such ones."""
    if size <= 0 or why_not() is not None:
        return
    page = _page_bytes()
    start, end = address + -address % page, (address + size) // page * page
    if start < end:
        _advise(start, end - start)  # where there are too few, the others stay small
