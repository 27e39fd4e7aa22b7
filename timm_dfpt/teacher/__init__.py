"""The teacher with two forward paths: blocks, hooks, and `wrap`."""
from .blocks import PromptConfig
from .teacher import DualForwardOutput, DualForwardPathTeacher
from .wrapping import wrap

__all__ = ['DualForwardOutput', 'DualForwardPathTeacher', 'PromptConfig', 'wrap']
