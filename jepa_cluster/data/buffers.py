"""Memory that batches of images travel in, from the workers to their parent: a few buffers, used again and again.

Shared memory that is new costs a page fault every 4 KiB, a tenth of what decoding costs; these pages are met once.
The mapping is anonymous and made before the workers fork: it has no name, so a kill leaves nothing in /dev/shm, and
the size of /dev/shm does not matter. A buffer is free again when the last tensor that shows it is gone; who keeps
more batches than there are buffers gets the others in memory of their own.
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


class _Loan(weakref.ref):
    """Told when the array that shows a place is gone. Its callback must be C: what a signal's handler raises inside a
    Python one is lost, and with it the news of a worker that was killed."""

    place: int


class Buffers:
    """`count` buffers for up to `images` images of `size` pixels. Known by number in the forks of its process."""

    _known: ClassVar[weakref.WeakValueDictionary[int, Buffers]] = weakref.WeakValueDictionary()
    _numbers = itertools.count()

    def __init__(self, count: int, images: int, size: int) -> None:
        self.shape = (images, size, size, 3)
        self._memory = mmap.mmap(-1, count * math.prod(self.shape))
        self._free = list(range(count))
        self._loans: dict[int, _Loan] = {}
        self._back: list[Any] = []  # loans that ended
        self._number = next(self._numbers)
        self._known[self._number] = self

    def take(self) -> Buffer | None:
        """One that nobody uses, the last one that came back first: its pages are warm."""
        if self._back:
            return Buffer(self, self._back.pop().place)
        return Buffer(self, self._free.pop()) if self._free else None

    def show(self, place: int) -> np.ndarray:
        """uint8 [images, size, size, 3]: what is in the place."""
        bytes_ = math.prod(self.shape)
        return np.frombuffer(self._memory, np.uint8, bytes_, place * bytes_).reshape(self.shape)

    def lend(self, place: int) -> np.ndarray:
        """The same; the place is free when this array, which tensors made of it keep alive, is gone."""
        shown = self.show(place)
        self._loans[place] = loan = _Loan(shown, self._back.append)
        loan.place = place
        return shown

    @classmethod
    def known(cls, number: int) -> Buffers:
        return cls._known[number]

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return Buffers.known, (self._number,)  # to a fork and back: the memory stays where it is


@dataclass(frozen=True)
class Buffer:
    """A place in `buffers`. The parent takes it, a worker fills it, the parent lends it to whoever reads the batch."""

    buffers: Buffers
    place: int

    def room(self, images: int) -> torch.Tensor:
        """uint8 [images, 3, size, size] to write into; the pixels lie interleaved, as decoders and resizers like."""
        return torch.from_numpy(self.buffers.show(self.place)[:images]).permute(0, 3, 1, 2)

    def lend(self, images: int) -> torch.Tensor:
        return torch.from_numpy(self.buffers.lend(self.place))[:images].permute(0, 3, 1, 2)
