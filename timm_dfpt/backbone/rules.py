"""What `feature_info` does not say about some families, as data: a new family costs a line.

Everything else is found by `stages.find_stages` from `feature_info` and a calibration pass.
"""
from __future__ import annotations

import dataclasses
import re

from torch import nn

__all__ = ['RULES', 'StageRule', 'rule_for']


@dataclasses.dataclass(frozen=True)
class StageRule:
    """How the stages of a family differ from what its `feature_info` says.

    Args:
        why: The reason, in words.
        modules: Modules that end a stage, instead of those of `feature_info`; names that a model lacks are skipped.
        rename: Pattern and replacement for the module names of `feature_info`.
        leaves: Which tensors of a stage's output get a block; by default every feature tensor of the channels that
            `feature_info` names.
        own_channels: The channels that `feature_info` names are not those of the (renamed) module.
        reroll: The tokens of a stage stand in an order of their own, which `model.reroll(x, block)` undoes.
    """

    why: str
    modules: tuple[str, ...] = ()
    rename: tuple[str, str] | None = None
    leaves: tuple[int, ...] | None = None
    own_channels: bool = False
    reroll: bool = False


RULES: dict[str, StageRule] = {
    'CoaT': StageRule(
        'feature_info points three times at the parallel blocks',
        modules=('serial_blocks1', 'serial_blocks2', 'serial_blocks3', 'serial_blocks4', 'parallel_blocks'),
    ),
    'EfficientViM': StageRule(
        'a stage returns its downsampled output, too; its last block (features, hidden state)',
        rename=(r'^stages\.(\d+)$', r'stages.\1.blocks'),
        leaves=(0,),
    ),
    'Gemma4VitClassifier': StageRule('names are relative to the inner encoder', rename=(r'^', 'encoder.')),
    'Hiera': StageRule('tokens stand in mask-unit order', reroll=True),
    'HighResolutionNet': StageRule(
        'the names in feature_info do not exist; a stage returns a list with a branch per resolution',
        modules=('layer1', 'stage2', 'stage3', 'stage4'),
    ),
    'MultiScaleVit': StageRule('the names in feature_info do not exist', rename=(r'^block\.', 'stages.')),
    'NASNetALarge': StageRule(
        'feature_info taps inside the next cell',
        modules=('cell_stem_1', 'cell_5', 'cell_11', 'cell_17'),
    ),
    'PNASNet5Large': StageRule(
        'feature_info taps inside the next cell',
        modules=('cell_stem_1', 'cell_3', 'cell_7', 'cell_11'),
    ),
    'PoolingVisionTransformer': StageRule('a stage returns (features, class tokens)', leaves=(0,)),
    'SelecSls': StageRule('a block returns [features, skip connection]', leaves=(0,)),
    'Twins': StageRule('the names in feature_info do not exist', rename=(r'^block\.', 'blocks.')),
    'Xception': StageRule(
        'feature_info taps inside a residual block', rename=(r'^(block\d+)\.rep\..*$', r'\1'), own_channels=True
    ),
    'XceptionAligned': StageRule(
        'feature_info taps inside a residual block', rename=(r'^(blocks\.\d+)\.stack\..*$', r'\1'), own_channels=True
    ),
}
_NO_RULE = StageRule('feature_info says it all')


def rule_for(model: nn.Module) -> StageRule:
    """Return the rule of the model's class or of the nearest base class that has one."""
    return next((RULES[c.__name__] for c in type(model).__mro__ if c.__name__ in RULES), _NO_RULE)


def apply_rename(rule: StageRule, name: str) -> str:
    """Return the module that ends a stage for the module that `feature_info` names."""
    return re.sub(*rule.rename, name) if rule.rename else name
