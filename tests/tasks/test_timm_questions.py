"""What timm's train.py asks of a task beyond a forward: parameter groups, clipping, checkpoints of any origin."""
import copy

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from torch import nn

import timm_dfpt
from timm_dfpt.tasks.baselines import CTKDTask, LogitLossTask, SupervisedTask
from timm_dfpt.tasks.dfpt import DFPTDistillationTask

CONFIG = {'input_size': (3, 32, 32), 'mean': (0.5,) * 3, 'std': (0.25,) * 3}
ARGS = {'test_resnet': {}, 'test_vit': {'img_size': 32, 'patch_size': 8}}
TASKS = ['supervised', 'kd', 'ctkd', 'dfpt', 'dfpt+']


def model(seed, name='test_resnet'):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=5, **ARGS[name])


class WithoutGroups(nn.Sequential):
    """A student that is not timm's."""

    num_classes, in_chans = 5, 3
    pretrained_cfg = {**CONFIG, 'classifier': '4'}

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


def task_of(kind, student):
    if kind == 'supervised':
        return SupervisedTask(student, nn.CrossEntropyLoss(), verbose=False)
    if kind in ('kd', 'ctkd'):
        return {'kd': LogitLossTask, 'ctkd': CTKDTask}[kind](
            student, model(1), input_config=CONFIG, teacher_input_config=CONFIG, verbose=False
        )
    teacher = timm_dfpt.wrap(model(1).eval(), variant=kind)
    return DFPTDistillationTask(student, teacher, input_config=CONFIG, teacher_input_config=CONFIG, verbose=False)


def by_parameter(groups, keys):
    return {id(p): tuple(group[key] for key in keys) for group in groups for p in group['params']}


@pytest.mark.parametrize('kind', TASKS)
@pytest.mark.parametrize('name', ARGS)
def test_the_students_parameters_are_grouped_as_without_a_task(kind, name):
    student = model(0, name)
    module = task_of(kind, student).get_trainable_module()
    for decay in ({'layer_decay': 0.5}, {}):
        alone, whole = (
            create_optimizer_v2(each, 'sgd', lr=0.1, weight_decay=0.1, **decay).param_groups
            for each in (student, module)
        )
        keys = ('weight_decay', 'lr_scale') if decay else ('weight_decay',)
        expected, found = by_parameter(alone, keys), by_parameter(whole, keys)
        assert {key: found[key] for key in expected} == expected
        if decay:
            assert len({scale for _, scale in expected.values()}) > 2
            # What else is trained is as near to the loss as the student's head.
            assert {scale for key, (_, scale) in found.items() if key not in expected} <= {1.0}
            for coarse in (True, False):
                layers = [len(group_parameters(each, each.group_matcher(coarse=coarse))) for each in (student, module)]
                assert layers[0] == layers[1] > 2


@pytest.mark.parametrize('kind', ['ctkd', 'dfpt'])
def test_a_student_without_groups_has_those_that_timm_gives_it(kind):
    student = WithoutGroups()
    module = task_of(kind, student).get_trainable_module()
    alone, whole = (by_parameter(param_groups_layer_decay(each), ['lr_scale']) for each in (student, module))
    assert {key: whole[key] for key in alone} == alone
    assert len(set(alone.values())) == 2


@pytest.mark.parametrize('kind', TASKS)
def test_clipping_without_the_head_leaves_out_the_students(kind):
    student = model(0)
    task = task_of(kind, student)
    every = {id(p) for p in task.get_trainable_module().parameters()}
    assert {id(p) for p in task.get_clip_parameters()} == every
    head = {id(p) for p in student.get_classifier().parameters()}
    assert {id(p) for p in task.get_clip_parameters(exclude_head=True)} == every - head


def state_of(task):
    return {key: value.clone() for key, value in task.get_trainable_module().state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize('kind', TASKS)
def test_the_checkpoint_of_a_plain_student_loads_and_leaves_all_else(kind, tmp_path):
    other = model(7)
    forms = {
        'bare': other.state_dict(),
        'timm': {'state_dict': other.state_dict(), 'epoch': 3},
        'old': {'model': {f'module.{key}': value for key, value in other.state_dict().items()}},
        'of another task': {'state_dict': other.state_dict(), 'task_state': {'projection': {}}},
    }
    for form, checkpoint in forms.items():
        task = task_of(kind, model(0))
        before = state_of(task)
        torch.save(checkpoint, tmp_path / 'checkpoint.pth')
        resume_task_checkpoint(task, str(tmp_path / 'checkpoint.pth'), log_info=False)
        assert equal(task.get_student().state_dict(), other.state_dict()), form
        rest = {key: value for key, value in state_of(task).items() if kind in TASKS[2:] and 'student.' not in key}
        assert equal(rest, {key: before[key] for key in rest}), form


@pytest.mark.parametrize('kind', TASKS)
def test_a_checkpoint_brings_back_all_that_is_trained(kind, tmp_path):
    task = task_of(kind, model(0))
    with torch.no_grad():
        for parameter in task.get_trainable_module().parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    task.setup_ema(decay=0.5)
    average = copy.deepcopy(task.get_student(ema=True).state_dict())
    torch.save({**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}, tmp_path / 'checkpoint.pth')
    again = task_of(kind, model(5))
    again.setup_ema(decay=0.5)
    resume_task_checkpoint(again, str(tmp_path / 'checkpoint.pth'), log_info=False)
    load_task_ema_checkpoint(again, str(tmp_path / 'checkpoint.pth'))
    assert equal(state_of(again), state_of(task))
    assert equal(again.get_student(ema=True).state_dict(), average)
