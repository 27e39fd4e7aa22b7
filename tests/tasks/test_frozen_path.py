"""A prompt path that is frozen while its student goes on: what a step then computes, and what it does not."""
import copy

import pytest
import timm
import torch
from timm.task import LogitDistillationTask

import timm_dfpt
from timm_dfpt.losses import DFPTWeights
from timm_dfpt.tasks.dfpt import DFPTDistillationTask

CLASSES, SIZE = 7, 32
CONFIG = {'input_size': (3, SIZE, SIZE), 'mean': (0.5,) * 3, 'std': (0.25,) * 3}


def make_task(variant='dfpt', **kwargs):
    torch.manual_seed(0)
    teacher, student = (timm.create_model('test_resnet', num_classes=CLASSES) for _ in range(2))
    paths = timm_dfpt.wrap(teacher.eval(), variant=variant, prompt=timm_dfpt.PromptConfig(norms='own'))
    with torch.no_grad():
        for param in paths.prompt_path.parameters():
            param.add_(0.05 * torch.randn(param.shape))
    return DFPTDistillationTask(
        student, paths, input_config=CONFIG, teacher_input_config=CONFIG, verbose=False, **kwargs
    )


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, SIZE, SIZE, generator=generator), torch.randint(CLASSES, (6,), generator=generator)


def step(task, **known):
    task.get_trainable_module().train()
    result = task(*batch(), **known)
    result['loss'].backward()
    return result


@pytest.mark.parametrize('variant', ['dfpt', 'dfpt+'])
def test_a_student_of_a_frozen_path_learns_as_by_plain_distillation_from_it(variant):
    """timm's task with the path for its teacher, to the bit; blocks, statistics and the teacher stay as they are."""
    task = make_task(variant, weights=DFPTWeights(0.0, 0.25, 0.0, 2.0), prompt_epochs=3)
    plain = copy.deepcopy(task.get_student())
    step(task)
    step(task)
    task.set_progress(2, 0, 9)
    assert task.get_frozen_path() is None
    task.set_progress(3, 0, 9)
    path = task.get_frozen_path()
    assert path is task.teacher.prompt_path
    assert not task.prompt_param_groups()
    before = {name: value.clone() for name, value in path.state_dict().items()}
    plain.load_state_dict(task.get_student().state_dict())
    task.get_student().zero_grad()
    passes = []
    task.teacher.model.register_forward_hook(lambda *_: passes.append(0))
    result = step(task)
    assert not passes
    assert not result['prompt_output'].requires_grad
    assert all(param.grad is None for param in path.parameters())
    assert all(torch.equal(value, before[name]) for name, value in path.state_dict().items())
    assert {name for name in result if name.endswith('loss')} == {'loss', 'student_task_loss', 'student_prompt_loss'}

    options = {'distill_loss_weight': 2.0, 'task_loss_weight': 1.0, 'temperature': 4.0, 'verbose': False}
    model = copy.deepcopy(path)
    model.pretrained_cfg = plain.pretrained_cfg
    reference = LogitDistillationTask(plain, model, **options)
    plain.train()
    expected = reference(*batch())
    expected['loss'].backward()
    assert torch.equal(result['loss'], expected['loss'])
    for mine, theirs in zip(task.get_student().parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_with_known_logits_no_path_runs():
    task = make_task(prompt_epochs=0)
    expected = step(task)
    task.get_student().zero_grad()
    known = {'teacher_logits': expected['teacher_output'], 'prompt_logits': expected['prompt_output']}
    passes = []
    for model in (task.teacher.model, task.teacher.prompt_path):
        model.register_forward_hook(lambda *_: passes.append(0))
    result = step(task, **known)
    assert not passes
    assert all(torch.equal(value, expected[name]) for name, value in result.items())
    # What the original path says still matters to the student (c).
    assert 'student_teacher_loss' in result


def test_logits_of_a_path_that_is_trained_are_computed_whatever_is_known():
    task = make_task()
    expected = step(task)
    result = step(task, prompt_logits=torch.zeros(6, CLASSES))
    assert result['prompt_output'].requires_grad
    torch.testing.assert_close(result['prompt_task_loss'], expected['prompt_task_loss'])


def test_a_frozen_path_can_be_trained_on():
    task = make_task(prompt_epochs=0)
    task.teacher.prompt_path.requires_grad_(True)
    assert step(task)['prompt_output'].requires_grad
    assert task.get_frozen_path() is None
