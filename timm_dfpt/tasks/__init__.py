"""timm training tasks: a batch in, named losses out."""
from .base import StudentTask
from .baselines import CTKDTask, LogitLossTask, SupervisedTask
from .dfpt import DFPTDistillationTask
from .features import FeatureTask
from .methods import KD_LOSSES, METHODS, Method, register_method

__all__ = [
    'KD_LOSSES',
    'METHODS',
    'CTKDTask',
    'DFPTDistillationTask',
    'FeatureTask',
    'LogitLossTask',
    'Method',
    'StudentTask',
    'SupervisedTask',
    'register_method',
]
