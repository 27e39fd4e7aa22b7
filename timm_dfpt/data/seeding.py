"""Random numbers that are a function of seeds: the same in every process, and after every resumption."""
from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

__all__ = ['derive_seed', 'preserved_rng', 'seed_rng']


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
