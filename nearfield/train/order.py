"""The order of samples: a function of the seed and the position, so that a run can go on anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler


class Order(Sampler[list[int]]):
    """The batches `start` to `stop` of one process, as lists of indices.

    All epochs are laid end to end, each shuffled by itself, and cut in batches dealt to the processes in
    turn: two processes read what one reads with a batch twice as large. A batch may begin in one epoch and
    end in the next, so none is short and none is left out.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        process: int = 0,
        num_processes: int = 1,
        start: int = 0,
        stop: int,
    ):
        self.num_samples, self.batch_size = num_samples, batch_size
        self.seed, self.shuffle = seed, shuffle
        self.process, self.num_processes = process, num_processes
        self.start, self.stop = start, stop
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.start, self.stop):
            yield self.batch(batch)

    def batch(self, number: int) -> list[int]:
        """Indices of this process's batch `number`."""
        place = (number * self.num_processes + self.process) * self.batch_size
        end, taken = place + self.batch_size, list[int]()
        while place < end:
            epoch, first = divmod(place, self.num_samples)
            part = self._indices(epoch, first, min(first + end - place, self.num_samples))
            taken += part
            place += len(part)
        return taken

    def _indices(self, epoch: int, first: int, last: int) -> list[int]:
        if not self.shuffle:  # without a list of all of them: made data may have no end
            return list(range(first, last))
        if epoch != self._epoch:
            draw = torch.Generator().manual_seed((self.seed << 31) + epoch)
            self._epoch, self._permutation = epoch, torch.randperm(self.num_samples, generator=draw)
        return self._permutation[first:last].tolist()


def batches(data: Any, order: Order, *, device: torch.device, workers: int = 0) -> Iterator[dict[str, Any]]:
    """The batches of an order, on the device.

    Not through Accelerate's own loader: it reads one batch ahead, so that a dataset which draws random
    numbers would have drawn those of the next step when the checkpoint of this one is written.
    """
    from accelerate.utils import send_to_device

    loader = DataLoader(
        data,
        batch_sampler=order,
        collate_fn=getattr(data, "collate", None),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        # its workers' seeds; without one the loader would take a number from those of the model
        generator=torch.Generator().manual_seed(order.seed + order.start),
    )
    for batch in loader:
        yield send_to_device(batch, device, non_blocking=True)
