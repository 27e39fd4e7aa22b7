"""Random numbers that are a function of seeds: the same in every process, and after every resumption."""
from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch

__all__ = ['derive_seed', 'preserved_rng', 'seed_rng', 'uniforms']


def derive_seed(*words: int) -> int:
    """Derive a seed from several numbers, well mixed, and the same on every machine.

    Args:
        words: Numbers, none negative.

    Returns:
        A number of 63 bits.
    """
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Put the global random numbers of `random`, numpy and torch's CPU back to where they were, at the end."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])


def seed_rng(seed: int) -> None:
    """Seed the global random numbers that timm's and torchvision's transforms draw from.

    Args:
        seed: Seed for `random`, numpy and torch's CPU generator. Generators of accelerators are left alone.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def uniforms(key: int, rows: Sequence[int], count: int) -> np.ndarray:
    """Draw numbers for some rows by their position in one sequence, without drawing those between.

    The sequence is SplitMix64 (Steele et al., "Fast splittable pseudorandom number generators", 2014), whose n-th
    number is a hash of `key + n * gamma`: no generator has to be made and seeded for each row.

    Args:
        key: Start of the sequence, from `derive_seed`.
        rows: The rows, none negative.
        count: Numbers per row.

    Returns:
        float64 `[len(rows), count]` in [0, 1), 53 bits each.
    """
    positions = np.asarray(rows, np.uint64)[:, None] * np.uint64(count) + np.arange(1, count + 1, dtype=np.uint64)
    z = np.uint64(key) + positions * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)) * 2.0**-53
