"""Options of the prompt path whose defaults depend on the run."""
from __future__ import annotations

import pytest

from timm_dfpt.job.options import TrainConfig
from timm_dfpt.job.path_options import PathOptions, path_options

BARE = {'block': False, 'fusion': 'none'}


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({}, {}),
        ({'teacher_head': 'fit', 'method': 'dfpt+'}, {'head_init_scale': 0.3}),
        ({'prompt_norms': 'own', 'prompt_fusion': 'none'}, {'norms': 'own', 'fusion': 'none'}),
        ({'unlabelled': True}, {'norms': 'own', **BARE}),
        ({'unlabelled': True, 'prompt_block': True}, {'norms': 'own'}),
        ({'unlabelled': True, 'prompt_fusion': 'conv'}, {'norms': 'own', 'block': False}),
        ({'teacher_head': 'fit', 'prompt_head_init_scale': 1}, {}),
        ({'teacher_head': 'fit', 'prompt_head_rank': 4}, {}),
        ({'teacher_head': 'fit', 'prompt_head': False}, {}),
        ({'teacher_head': 'own', 'prompt_head_init_scale': 0.1}, {'head_init_scale': 0.1}),
    ],
)
def test_what_is_given_counts_and_the_rest_follows_the_run(options, expected):
    config = TrainConfig(**{'student': 'resnet18', 'teacher': 'resnet34', 'dataset': 'x', 'method': 'dfpt', **options})
    assert path_options(config) == PathOptions(**expected)
