"""The teacher with two forward paths: blocks, hooks, and `wrap`."""
from .blocks import PromptConfig
from .fitted_head import fit_head
from .head_record import FittedHead
from .teacher import DualForwardOutput, DualForwardPathTeacher
from .wrapping import wrap

__all__ = ['DualForwardOutput', 'DualForwardPathTeacher', 'FittedHead', 'PromptConfig', 'fit_head', 'wrap']
