"""Where any model can be opened: its stages, found by `feature_info`, rules and a calibration pass."""
from .stages import find_stages
from .types import Feature, Stage

__all__ = ['Feature', 'Stage', 'find_stages']
