"""How much of the watched steps' time a ledger may take."""

from __future__ import annotations

import time

# Records in detail come in windows of forwards, so that neighbours can be compared: the first one,
# and again whenever those before have taken less than this share of all time gone by.
WINDOW, DETAIL_SHARE = 32, 0.005
# Every write is looked at whether it left the statistics finite, if that takes less than this share
# of the time. Else only every so many are, and the step at which they ceased to be is bracketed.
CHECK_SHARE = 0.003
MOST = 50_000_000  # nanoseconds that can be saved up: no burst of detail after an idle hour
LONG_WAY = 4  # looks at a layer that a forward costs in which layers are looked at, besides these
clock = time.perf_counter_ns


class Pace:
    """What there is time for, decided anew for each window of forwards. Times are nanoseconds.

    Attributes:
        detailed: whether the calls of this window are recorded in detail.
        left: forwards that are left of it.
        every: forwards from one look whether statistics are finite to the next.
    """

    __slots__ = ("_began", "_dearest", "_saved", "_spent", "detailed", "every", "left")

    def __init__(self) -> None:
        self.detailed, self.left, self.every = True, WINDOW, 1
        self._began = 0  # when this window did
        self._saved = self._spent = 0  # for records, before this window; and in it
        self._dearest = 0  # a look at one layer, which is forgotten by halves

    def begin(self) -> None:
        """A block begins: what went by outside is no time of watched steps."""
        self._began = clock()

    def next_window(self, layers: int) -> None:
        """Decide what there is time for in the next window, of a model with so many ``layers``."""
        now = clock()
        gone, self._began = now - self._began, now
        self._saved = min(MOST, self._saved + int(DETAIL_SHARE * gone) - self._spent)
        self.detailed, self.left, self._spent = self._saved >= 0, WINDOW - 1, 0
        look = self._dearest * (layers + LONG_WAY)
        self.every = 1 + int(look * WINDOW / (CHECK_SHARE * gone + 1))

    def recorded(self, start: int) -> None:
        """A record in detail was begun at ``start``, and is done."""
        self._spent += clock() - start

    def looked(self, start: int) -> None:
        """A look at a layer was begun at ``start``, and is done."""
        self._dearest = max(self._dearest // 2, clock() - start)
