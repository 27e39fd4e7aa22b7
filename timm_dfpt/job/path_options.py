"""Options of the prompt path whose defaults depend on the run."""
from __future__ import annotations

import dataclasses
from typing import Any, Literal

__all__ = ['FITTED_HEAD_SCALE', 'PathOptions', 'path_options']

FITTED_HEAD_SCALE = 0.3
"""Where the path begins, in relation to a fitted head. Smaller factors need more updates."""


@dataclasses.dataclass(frozen=True)
class PathOptions:
    """Values of options that are not given.

    Args:
        norms: Norm layers of the backbone, see `PromptConfig`.
        block: Whether there are prompt blocks.
        fusion: What follows them.
        head_init_scale: Factor on the weights of the path's own head at the start.
    """

    norms: Literal['teacher', 'own'] = 'teacher'
    block: bool = True
    fusion: Literal['conv', 'depthwise', 'none'] = 'conv'
    head_init_scale: float = 1.0


def path_options(config: Any) -> PathOptions:
    """Return what is given of these options, and for the rest what they are by default.

    Without labels nothing but statistics is learned: they are the path's own, and blocks would learn nothing. A fitted
    head is as sure as it is right, which leaves the layers before it little to learn: the path begins with a smaller
    one (docs/TEACHERS.md has what other factors are worth).

    Args:
        config: The options of a run (`TrainConfig`), `teacher_head` as chosen for its teacher.
    """
    defaults = PathOptions()
    if config.unlabelled:
        defaults = dataclasses.replace(defaults, norms='own')
        if not config.prompt_block:
            defaults = dataclasses.replace(defaults, block=False, fusion='none')
    if config.teacher_head == 'fit' and config.prompt_head and config.prompt_head_rank is None:
        defaults = dataclasses.replace(defaults, head_init_scale=FITTED_HEAD_SCALE)
    given = {field.name: getattr(config, f'prompt_{field.name}') for field in dataclasses.fields(defaults)}
    return dataclasses.replace(defaults, **{name: value for name, value in given.items() if value is not None})
