"""Bad arguments of the losses: one clear error each, before anything is computed."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from timm_dfpt.losses import DFPTWeights, dfpt_losses, dkd_loss
from timm_dfpt.tasks.methods import KD_LOSSES

STUDENT, TEACHER, PROMPT = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([3, 4, 1, 4])


@pytest.mark.parametrize('temperature', [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize('name', KD_LOSSES)
def test_temperature_must_be_positive(name: str, temperature: float) -> None:
    with pytest.raises(ValueError, match='temperature must be positive and finite'):
        KD_LOSSES[name](STUDENT, TEACHER, TARGET, temperature)
    with pytest.raises(ValueError, match='temperature must be positive and finite'):
        dfpt_losses(STUDENT, PROMPT, TEACHER, TARGET, temperature=temperature)


BAD_ARGUMENTS = {
    'teacher classes': ({'teacher': torch.zeros(4, 6)}, ValueError, r'teacher_logits.*\[4, 6\].*num_classes'),
    'teacher batch': ({'teacher': torch.zeros(3, 5)}, ValueError, r'teacher_logits.*\[3, 5\]'),
    'teacher as features': ({'teacher': torch.zeros(4, 5, 2)}, ValueError, r'teacher_logits.*\[B, K\]'),
    'teacher of integers': ({'teacher': torch.zeros(4, 5).long()}, TypeError, 'teacher_logits.*int64'),
    'teacher elsewhere': ({'teacher': torch.zeros(4, 5, device='meta')}, ValueError, 'teacher_logits is on meta'),
    'student as list': ({'student': [[0.0, 1.0]]}, TypeError, 'student_logits.*list'),
    'empty batch': (
        {'student': torch.zeros(0, 5), 'teacher': torch.zeros(0, 5)},
        ValueError,
        r'at least one.*\[0, 5\]',
    ),
    'temperature text': ({'temperature': '4'}, TypeError, "temperature must be a number, got '4'"),
    'temperature truth': ({'temperature': True}, TypeError, 'temperature must be a number, got True'),
    'temperature per sample': ({'temperature': torch.ones(4, 1)}, ValueError, r'no dimension.*\[4, 1\]'),
    'target int32': ({'target': TARGET.int()}, TypeError, r'int64.*int32.*target\.long\(\)'),
    'target batch': ({'target': torch.tensor([0, 1])}, ValueError, r'shape \[4\].*\[2\]'),
    'target elsewhere': ({'target': torch.zeros(4, dtype=torch.int64, device='meta')}, ValueError, 'target is on meta'),
    'target list': ({'target': [0, 1, 2, 4]}, TypeError, 'target must be a tensor'),
}


@pytest.mark.parametrize('case', BAD_ARGUMENTS)
def test_bad_arguments(case: str) -> None:
    change, error, message = BAD_ARGUMENTS[case]
    given = {'student': STUDENT, 'teacher': TEACHER, 'target': TARGET, 'temperature': 4.0}
    given.update(change)
    with pytest.raises(error, match=message):
        dkd_loss(given['student'], given['teacher'], given['target'], given['temperature'])


@pytest.mark.parametrize('name', ['prompt_logits', 'teacher_logits'])
def test_dfpt_names_the_logits_that_do_not_fit(name: str) -> None:
    args = {'student_logits': STUDENT, 'prompt_logits': PROMPT, 'teacher_logits': TEACHER}
    args[name] = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=rf'{name} has the shape \[4, 3\]'):
        dfpt_losses(**args, target=TARGET)


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        ({'target': torch.zeros(4, 6)}, ValueError, r'soft target.*\[4, 5\].*\[4, 6\].*mixup'),
        ({'temperature': torch.tensor(4.0)}, TypeError, 'temperature must be a number, not a tensor: a learned'),
        ({'criterion': torch.nn.CrossEntropyLoss(reduction='none')}, ValueError, r'criterion must return a scalar'),
        ({'kd_fn': lambda s, t, y, temperature: s - t}, ValueError, r'kd_fn must return a scalar.*\[4, 5\]'),
    ],
)
def test_dfpt_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    kwargs = {'target': TARGET, **change}
    with pytest.raises(error, match=message):
        dfpt_losses(STUDENT, PROMPT, TEACHER, **kwargs)


@pytest.mark.parametrize('name', [field.name for field in dataclasses.fields(DFPTWeights)])
@pytest.mark.parametrize('value', [-0.1, math.nan, math.inf, '1', None, True])
def test_weights_are_checked(name: str, value: object) -> None:
    error = ValueError if type(value) is float else TypeError
    with pytest.raises(error, match=rf'DFPTWeights\.{name} must be .*{value!r}'):
        DFPTWeights(**{name: value})


def test_weights_cannot_all_be_zero_and_cannot_change() -> None:
    with pytest.raises(ValueError, match='all 0'):
        DFPTWeights(0, 0, 0, 0, 0, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        DFPTWeights().prompt_task = 2.0
