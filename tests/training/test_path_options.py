"""Options of the prompt path whose defaults depend on the teacher."""
from __future__ import annotations

import pytest

from timm_dfpt.job.options import TrainConfig
from timm_dfpt.job.path_options import PathOptions, path_options

FOREIGN = {'norms': 'own', 'lr': 3e-3}
BARE = {'block': False, 'fusion': 'none'}


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({'teacher_head': 'auto'}, {}),
        ({'teacher_head': 'own', 'method': 'dfpt+'}, {}),
        ({'teacher_head': 'own', 'prompt_norms': 'own', 'prompt_lr': 2e-3}, {'norms': 'own', 'lr': 2e-3}),
        ({'teacher_head': 'fit'}, FOREIGN),
        ({'teacher_head': 'new'}, FOREIGN),
        ({'teacher_head': 'fit', 'method': 'dfpt+'}, {**FOREIGN, **BARE}),
        ({'teacher_head': 'fit', 'method': 'dfpt+', 'prompt_block': True}, FOREIGN),
        ({'teacher_head': 'fit', 'method': 'dfpt+', 'prompt_fusion': 'conv'}, {**FOREIGN, 'block': False}),
        ({'teacher_head': 'fit', 'prompt_lr': 1e-3, 'prompt_norms': 'teacher'}, {}),
        ({'teacher_head': 'fit', 'teacher_dtype': 'bfloat16'}, {'lr': 3e-3}),
        ({'teacher_head': 'fit', 'teacher_dtype': 'bfloat16', 'method': 'dfpt+'}, {**FOREIGN, **BARE}),
    ],
)
def test_defaults_follow_the_teacher(options, expected):
    config = TrainConfig(**{'student': 'resnet18', 'teacher': 'resnet34', 'dataset': 'x', 'method': 'dfpt', **options})
    assert path_options(config) == PathOptions(**expected)
