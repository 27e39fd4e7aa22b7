"""Time that the parts of a run take."""
from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

__all__ = ['Phases']


class Phases(dict[str, float]):
    """Seconds by part of a run."""

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds within the context to a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self[name] = self.get(name, 0.0) + time.perf_counter() - start
