"""Options of the prompt path whose defaults depend on the teacher."""
from __future__ import annotations

import dataclasses
from typing import Any, Literal

from ..tasks.methods import METHODS

__all__ = ['PathOptions', 'path_options']


@dataclasses.dataclass(frozen=True)
class PathOptions:
    """What holds where an option is not given: with a teacher of the same classes.

    Args:
        norms: Norm layers of the backbone, see `PromptConfig`.
        block: Whether there are prompt blocks.
        fusion: What follows them.
        lr: Learning rate.
        backbone_lr_scale: DFPT-KD+: learning rate of the backbone's copy in relation to it.
    """

    norms: Literal['teacher', 'own'] = 'teacher'
    block: bool = True
    fusion: Literal['conv', 'depthwise', 'none'] = 'conv'
    lr: float = 1e-3
    backbone_lr_scale: float = 0.3


def path_options(config: Any) -> PathOptions:
    """Return what is given of these options, and for the rest what they are by default.

    A foreign teacher, whose head was fitted or whose path has a new one, has to be adapted to its images: norms of its
    own, and a larger learning rate. A copy of the backbone then needs no blocks, and neither does a path that is not
    tuned since there are no labels. Measured in docs/PERFORMANCE.md.

    Args:
        config: The options of a run (`TrainConfig`), `teacher_head` as it was chosen.
    """
    foreign, copies = config.teacher_head in ('fit', 'new'), METHODS[config.method].copies_backbone
    defaults = PathOptions()
    if foreign or config.unlabelled:
        # What is trained is kept in float32, and norm layers do not mix.
        norms: Literal['teacher', 'own'] = 'own' if copies or config.teacher_dtype == 'float32' else 'teacher'
        defaults = dataclasses.replace(defaults, norms=norms, lr=3e-3)
        if (copies or config.unlabelled) and not config.prompt_block:
            defaults = dataclasses.replace(defaults, block=False, fusion='none')
    given = {field.name: getattr(config, f'prompt_{field.name}') for field in dataclasses.fields(defaults)}
    return dataclasses.replace(defaults, **{name: value for name, value in given.items() if value is not None})
