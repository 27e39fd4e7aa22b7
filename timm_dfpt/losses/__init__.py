"""Losses as free functions, one per formula: the logit losses of the literature, and both directions of DFPT-KD."""

from .dfpt import DFPTWeights, dfpt_losses
from .logit import KDLoss, dist_loss, dkd_loss, kd_loss, logit_std_loss, ttm_loss

__all__ = [
    'DFPTWeights',
    'KDLoss',
    'dfpt_losses',
    'dist_loss',
    'dkd_loss',
    'kd_loss',
    'logit_std_loss',
    'ttm_loss',
]
