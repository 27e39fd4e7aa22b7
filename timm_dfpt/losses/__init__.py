"""Losses as free functions, one per formula: the logit losses of the literature, and both directions of DFPT-KD."""

from .dfpt import DFPTWeights, dfpt_losses
from .logit import dist_loss, dkd_loss, kd_loss, logit_std_loss, ttm_loss
from .registry import KD_LOSSES, KDLoss

__all__ = [
    'KD_LOSSES',
    'DFPTWeights',
    'KDLoss',
    'dfpt_losses',
    'dist_loss',
    'dkd_loss',
    'kd_loss',
    'logit_std_loss',
    'ttm_loss',
]
