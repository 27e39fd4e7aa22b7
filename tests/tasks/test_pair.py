"""Students that cannot learn from their teacher are refused when a task is built, and teachers stay frozen in it."""
import copy

import pytest
import timm
import torch
from torch import nn

import timm_dfpt
from timm_dfpt.tasks import CTKDTask, DFPTDistillationTask, LogitLossTask, SupervisedTask

TASKS = [DFPTDistillationTask, LogitLossTask, CTKDTask]


def make_model(seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model('test_resnet', **{'num_classes': 3, **kwargs})


def make_batch():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])


class Wrapper(nn.Module):
    """A student of one's own around a model."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.pretrained_cfg = inner, inner.pretrained_cfg
        self.num_classes, self.in_chans = inner.num_classes, inner.in_chans

    def forward(self, x):
        return self.inner(x)


def tied():
    """Two models with one weight in common, as a view of it."""
    student, teacher = make_model(0), make_model(1)
    student.fc.weight = nn.Parameter(teacher.fc.weight.detach()[:])
    return student, teacher


def same():
    model = make_model()
    return model, model


def inside():
    model = make_model()
    return Wrapper(model), model


def stage():
    student, teacher = make_model(0), make_model(1)
    student.layer2 = teacher.layer2
    return student, teacher


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('make', [same, inside, tied, stage])
def test_a_student_that_shares_weights_with_its_teacher_is_refused(task, make):
    student, teacher = make()
    with pytest.raises(ValueError, match=r'share \d+ weights, such as .*copy\.deepcopy'):
        task(student, teacher, verbose=False)
    # Nothing has been frozen on the way.
    assert all(p.requires_grad for p in student.parameters())
    if task is DFPTDistillationTask:
        for variant in ('dfpt', 'dfpt+'):
            student, teacher = make()
            with pytest.raises(ValueError, match='share'):
                task(student, timm_dfpt.wrap(teacher, variant=variant), verbose=False)
    student, teacher = make()
    task(copy.deepcopy(student), teacher, verbose=False)


def test_a_student_that_shares_weights_with_the_prompt_path_is_refused():
    student, teacher = make_model(0), timm_dfpt.wrap(make_model(1))
    student.fc = teacher.prompt_path.head[0]
    with pytest.raises(ValueError, match='share 2 weights, such as fc.weight'):
        DFPTDistillationTask(student, teacher, verbose=False)


@pytest.mark.parametrize('task', [*TASKS, SupervisedTask])
def test_a_student_with_nothing_to_train_is_refused(task):
    teacher = () if task is SupervisedTask else (make_model(1),)
    with pytest.raises(ValueError, match=r'no trainable parameter.*requires_grad_\(True\)'):
        task(make_model().requires_grad_(False), *teacher, verbose=False)
    partly = make_model().requires_grad_(False)
    partly.fc.requires_grad_(True)
    task(partly, *teacher, verbose=False)


@pytest.mark.parametrize('task', TASKS)
def test_numbers_of_classes_are_those_of_the_logits(task):
    def with_head(classes):
        model = make_model(num_classes=9)
        model.fc = nn.Sequential(nn.Dropout(), nn.Linear(model.num_features, classes))
        return model

    assert task(with_head(3), with_head(3), verbose=False)(*make_batch())['loss'].isfinite()
    for student, teacher in ((make_model(num_classes=9), with_head(3)), (with_head(3), make_model(num_classes=9))):
        with pytest.raises(ValueError, match=r"'student': [39], 'teacher': [39]"):
            task(student, teacher, verbose=False)


def test_a_prompt_path_of_other_classes_is_refused():
    with pytest.raises(ValueError, match="'teacher': 3, 'prompt path': 4"):
        DFPTDistillationTask(make_model(), timm_dfpt.wrap(make_model(), num_classes=4), verbose=False)


@pytest.mark.parametrize('task', [LogitLossTask, CTKDTask])
def test_a_teacher_with_two_paths_is_refused_where_one_is_needed(task):
    with pytest.raises(TypeError, match=r'teacher\.unwrap\(\)'):
        task(make_model(), timm_dfpt.wrap(make_model(1)), verbose=False)


@pytest.mark.parametrize('task', TASKS)
def test_wrappers_around_student_and_teacher(task):
    student, teacher = make_model(0), make_model(1)
    expected = task(copy.deepcopy(student), copy.deepcopy(teacher), verbose=False)(*make_batch())['loss']
    built = task(nn.DataParallel(student), nn.DataParallel(teacher), verbose=False)
    assert torch.equal(built(*make_batch())['loss'], expected)


@pytest.mark.parametrize('task', TASKS)
def test_the_teacher_of_a_task_never_moves(task):
    model = make_model(1)
    model(make_batch()[0]).sum().backward()
    state = copy.deepcopy(model.eval().state_dict())
    built = task(make_model(0), model, verbose=False)
    for touch in (lambda: built.train(), lambda: model.train(), lambda: built.requires_grad_(True)):
        optimizer = torch.optim.SGD(built.parameters(), lr=0.1, weight_decay=0.1)
        touch()
        built(*make_batch())['loss'].backward()
        optimizer.step()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
