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
