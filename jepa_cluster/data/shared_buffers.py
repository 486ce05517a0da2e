"""Shared memory that carries batches of images from the workers to their parent, in a few buffers.

New shared memory costs a page fault every 4 KiB, a tenth of the cost of decoding. The pages of
these buffers are mapped once. The mapping is anonymous and made before the workers fork. It has no
name, so a kill leaves nothing in /dev/shm, and the size of /dev/shm does not matter. A buffer is
free again when the last tensor that shows it is gone. A reader that keeps more batches than there
are buffers gets the others in memory of their own.
"""

from __future__ import annotations

import itertools
import math
import mmap
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch


class _BufferRef(weakref.ref):
    """A reference to the array that shows a slot; its callback runs when that array is gone.

    The callback must be a C function. A RuntimeError that a signal handler raises inside a Python
    callback is lost, and with it the report that a worker was killed.
    """

    slot: int


class Buffers:
    """`count` slots, each for up to `images` images of `size` pixels; forks know them by number."""

    _known: ClassVar[weakref.WeakValueDictionary[int, Buffers]] = weakref.WeakValueDictionary()
    _numbers = itertools.count()

    def __init__(self, count: int, images: int, size: int) -> None:
        self.shape = (images, size, size, 3)
        self._memory = mmap.mmap(-1, count * math.prod(self.shape))
        self._free = list(range(count))
        self._refs: dict[int, _BufferRef] = {}
        self._returned: list[Any] = []  # references whose array is gone
        self._number = next(self._numbers)
        self._known[self._number] = self

    def acquire(self) -> Buffer | None:
        """Take a free slot; None when all are in use.

        The slot that was returned last is taken first, because the CPU cache still holds it.
        """
        if self._returned:
            return Buffer(self, self._returned.pop().slot)
        if self._free:
            return Buffer(self, self._free.pop())
        return None

    def view(self, slot: int) -> np.ndarray:
        """Return the slot as uint8 [images, size, size, 3]."""
        length = math.prod(self.shape)
        return np.frombuffer(self._memory, np.uint8, length, slot * length).reshape(self.shape)

    def release_on_gc(self, slot: int) -> np.ndarray:
        """Return the slot as `view` does; it is free when this array and its tensors are gone."""
        array = self.view(slot)
        ref = _BufferRef(array, self._returned.append)
        ref.slot = slot
        self._refs[slot] = ref
        return array

    @classmethod
    def known(cls, number: int) -> Buffers:
        return cls._known[number]

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return Buffers.known, (self._number,)  # to a fork and back: the memory is not copied


@dataclass(frozen=True)
class Buffer:
    """One slot of `buffers`. The parent acquires it, a worker fills it, the parent reads it."""

    buffers: Buffers
    slot: int

    def for_writing(self, images: int) -> torch.Tensor:
        """Return uint8 [images, 3, size, size], interleaved as decoders and resizers write it."""
        return _channels_first(self.buffers.view(self.slot), images)

    def for_reading(self, images: int) -> torch.Tensor:
        """Return the same; the slot is free when this tensor and all made of it are gone."""
        return _channels_first(self.buffers.release_on_gc(self.slot), images)


def _channels_first(array: np.ndarray, images: int) -> torch.Tensor:
    return torch.from_numpy(array)[:images].permute(0, 3, 1, 2)
