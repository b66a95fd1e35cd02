"""Keyed randomness: every draw is a function of (seed, purpose, counters), so no generator has a state to save.

A draw is a chain of splitmix64 finalizers (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
generators", figure 15) over the key's parts; all of it works on whole arrays. A counter costs two of them for each
element of the shape that the counters up to it have together, so the largest goes last.
"""

import zlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: np.ndarray) -> np.ndarray:
    """Changes `z` in place where it is an array."""
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def bits(seed: int, purpose: str, *counters: int | np.ndarray) -> np.ndarray:
    """64 random bits, uint64, of the counters' broadcast shape."""
    return extended(np.full((), seed, np.uint64), zlib.crc32(purpose.encode()), *counters)


def extended(state: np.ndarray, *counters: int | np.ndarray) -> np.ndarray:
    """Bits of a longer key: `extended(bits(seed, purpose, a), b)` is `bits(seed, purpose, a, b)`."""
    with np.errstate(over="ignore"):
        for part in counters:
            state = _mix((state + _GOLDEN) ^ _mix(np.asarray(part).astype(np.uint64) + _GOLDEN))
    return state


def uniform(seed: int, purpose: str, *counters: int | np.ndarray) -> np.ndarray:
    """Uniform in [0, 1), float64 with 53 random bits, of the counters' broadcast shape."""
    return as_uniform(bits(seed, purpose, *counters))


def as_uniform(random_bits: np.ndarray) -> np.ndarray:
    return (random_bits >> np.uint64(11)) * 2.0**-53


def integers(high: int | np.ndarray, seed: int, purpose: str, *counters: int | np.ndarray) -> np.ndarray:
    """Uniform in 0 … high-1, int64. The bias of high * uniform is below high/2^53."""
    return (uniform(seed, purpose, *counters) * high).astype(np.int64)


def torch_seed(seed: int, purpose: str, *counters: int) -> int:
    """One seed for torch.manual_seed (63 bits)."""
    return int(bits(seed, purpose, *counters) >> np.uint64(1))
