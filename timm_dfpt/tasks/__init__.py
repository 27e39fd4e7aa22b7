"""timm training tasks: a batch in, named losses out."""
from .baselines import CTKDTask, LogitLossTask
from .dfpt import DFPTDistillationTask

__all__ = ['CTKDTask', 'DFPTDistillationTask', 'LogitLossTask']
