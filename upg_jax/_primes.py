"""The prime table of the prime manifold (docs/format.md, section 2)."""

from __future__ import annotations

import functools

import numpy as np

NUM_PRIMES = 10_000
LARGEST_PRIME = 104_729


@functools.cache
def prime_table() -> np.ndarray:
    """Returns the first 10,000 primes, 2 to 104729, as a read-only uint32 array."""
    sieve = np.ones(LARGEST_PRIME + 1, dtype=bool)
    sieve[:2] = False
    for factor in range(2, int(LARGEST_PRIME**0.5) + 1):
        if sieve[factor]:
            sieve[factor * factor :: factor] = False
    primes = np.flatnonzero(sieve).astype(np.uint32)
    primes.flags.writeable = False
    return primes
