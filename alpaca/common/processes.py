"""The processes that a launcher started for one work: who takes what of it, and how results come to rank 0.

They meet in the key-value store that the launchers set up (TCP; rank 0's or torchrun's own). There is no collective
operation, so that no process waits for another's step, and NCCL is not needed. Where one dies, the launcher ends the others.
"""

import json
import os
import signal
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from alpaca.common.errors import UserError

LEFT_SECONDS = 0.02  # between two looks whether the others have left
ROUNDS = 2  # a process takes at most what leaves each of them so many more of the same: the last ones are small


class Processes:
    """One of `count` processes, with the number `rank`; alone where no launcher started it. Takes its GPU."""

    def __init__(self):
        self.rank, self.count = (
            int(os.environ.get(name, alone)) for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"))
        )
        local, cards = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if cards:
            if local >= cards:
                raise UserError(
                    f"process {local} of this machine has no GPU, there are {cards}; start {cards} processes"
                )
            torch.cuda.set_device(local)
        store = next(rendezvous("env://"))[0] if self.count > 1 else dist.HashStore()
        self.store = dist.PrefixStore("alpaca", store)
        self.sent, self.received_from, self.told_to_end = 0, [0] * self.count, False

    @contextmanager
    def minding_sigterm(self):
        """Meanwhile SIGTERM is noted, and ends this process where it says `end_if_told`, so that what is open is closed.

        An exception at once, in the middle of anything, could leave a lock held that the exit then waits for.
        """

        def note(*_):
            self.told_to_end = True

        earlier = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, earlier)

    def end_if_told(self):
        if self.told_to_end:
            raise SystemExit(128 + signal.SIGTERM)

    def begin(self, first):
        """Rank 0 says that the work begins with item `first`, and lets the others go on."""
        if self.rank:
            return
        with unless_gone():
            self.store.add("next", first)
            self.finished(first)
            self.store.set("first", str(first))

    def wait_for_first(self):
        """The item that the work begins with, once rank 0 has said so."""
        with unless_gone():
            return int(self.store.get("first"))

    def finished(self, number):
        """Rank 0: say that all items before this one are done with."""
        self.store.set("finished", str(number))

    def shares(self, total, most, ahead):
        """Yield range after range of the items up to `total`, at most `most` each, that no other process gets; None while
        the work is `ahead` items further than what is finished."""
        begin = self.wait_for_first()
        while True:
            with unless_gone():
                finished = int(self.store.get("finished"))
                if begin - finished < ahead:
                    part = (total - begin) // (ROUNDS * self.count) if self.count > 1 else most
                    wanted = max(1, min(part, most))
                    begin = self.store.add("next", wanted)  # of all processes
                    share = range(begin - wanted, min(begin, total))
                else:
                    share = None
            if share is not None and not share:
                return
            yield share

    def send(self, items):
        """Give items that JSON holds to rank 0."""
        with unless_gone():
            self.store.set(f"{self.rank} {self.sent}", json.dumps(items, ensure_ascii=False).encode())
        self.sent += 1

    def received(self):
        """Rank 0: the items that the others have sent since the last call."""
        items = []
        for rank in range(1, self.count):
            while self.store.check([key := f"{rank} {self.received_from[rank]}"]):
                items += json.loads(self.store.get(key))
                self.store.delete_key(key)
                self.received_from[rank] += 1
        return items

    def leave(self):
        """Another rank than 0: there is nothing more to do here."""
        with unless_gone():
            self.store.add("left", 1)

    def wait_for_others(self):
        """Rank 0, at its end: the store is here, and a process that began late would find it gone."""
        while self.store.add("left", 0) < self.count - 1:
            self.end_if_told()
            time.sleep(LEFT_SECONDS)


@contextmanager
def unless_gone():
    """Where the store is gone, so is the process that keeps it: it has said why, and this one ends without a word."""
    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError):
        raise SystemExit(1) from None
