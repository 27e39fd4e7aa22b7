"""The losses of DFPT-KD where the prompt path is frozen, or nobody learns from the original path."""
import pytest
import torch

from timm_dfpt.losses import DFPTWeights, dfpt_losses
from timm_dfpt.tasks.methods import KD_LOSSES

ALONE = DFPTWeights(prompt_teacher=0.0, student_teacher=0.0)


def losses_and_gradients(weights, teacher=True, kd_fn=None, **options):
    generator = torch.Generator().manual_seed(0)
    student, prompt, original = (torch.randn(6, 4, generator=generator) for _ in range(3))
    target = torch.randint(4, (6,), generator=generator)
    for logits in (student, prompt):
        logits.requires_grad_()
    losses = dfpt_losses(
        student, prompt, original if teacher else None, target, weights=weights, kd_fn=kd_fn, **options
    )
    losses['loss'].backward()
    return losses, student.grad, prompt.grad


@pytest.mark.parametrize('kd_fn', [None, KD_LOSSES['dkd']])
@pytest.mark.parametrize(('weights', 'teacher'), [(DFPTWeights(), True), (ALONE, False)])
def test_a_student_hears_the_same_from_a_frozen_path(kd_fn, weights, teacher):
    both, gradient, _ = losses_and_gradients(weights, teacher, kd_fn)
    frozen, expected, none = losses_and_gradients(weights, teacher, kd_fn, prompt_learns=False)
    assert torch.equal(gradient, expected)
    assert none is None
    own = {'student_task_loss', 'student_prompt_loss', *(['student_teacher_loss'] if teacher else [])}
    assert frozen.keys() == own | {'loss'}
    assert all(torch.equal(frozen[key], both[key]) for key in own)
    total = sum(getattr(weights, key.removesuffix('_loss')) * frozen[key] for key in own)
    torch.testing.assert_close(frozen['loss'], total)


def test_an_original_path_that_nobody_learns_from_changes_nothing():
    without, *gradients = losses_and_gradients(ALONE, teacher=False)
    given, *expected = losses_and_gradients(ALONE)
    assert given.keys() - without.keys() == {'prompt_teacher_loss', 'student_teacher_loss'}
    assert all(torch.equal(without[key], given[key]) for key in without)
    assert all(map(torch.equal, gradients, expected))


@pytest.mark.parametrize(
    ('changes', 'options'), [({}, {}), ({'student_teacher': 0.0}, {}), ({'prompt_teacher': 0.0}, {}),
                             ({'prompt_teacher': 0.0}, {'prompt_learns': False})],
)  # fmt: skip
def test_logits_that_somebody_learns_from_must_be_there(changes, options):
    with pytest.raises(ValueError, match='teacher_logits=None needs .*student_teacher=0'):
        losses_and_gradients(DFPTWeights(**changes), teacher=False, **options)
