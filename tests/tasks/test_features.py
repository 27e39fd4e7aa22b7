"""Feature distillation: timm's own task is the reference."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.task import FeatureDistillationTask
from torch import nn

import timm_dfpt
from timm_dfpt.tasks.evaluation import measure_features
from timm_dfpt.tasks.features import FeatureTask

CONFIG = {'input_size': (3, 32, 32), 'mean': (0.5,) * 3, 'std': (0.25,) * 3}


def model(seed, name='test_resnet', classes=5, **kwargs):
    torch.manual_seed(seed)
    net = timm.create_model(name, num_classes=classes, **kwargs)
    net.pretrained_cfg = {**net.pretrained_cfg, **CONFIG}
    return net


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 4, 0])


TEACHERS = {
    'as wide': lambda: model(2),
    'wider, of other classes': lambda: model(2, 'test_efficientnet', 7),
    'an encoder': lambda: model(2, 'test_vit', 0, img_size=32, patch_size=8),
}


@pytest.mark.parametrize('teacher', TEACHERS)
def test_whole_steps_are_those_of_timms_task(teacher, batch):
    kwargs = {'distill_loss_weight': 3.0, 'task_loss_weight': 0.5, 'verbose': False}
    tasks, optimizers = [], []
    for kind in (FeatureTask, FeatureDistillationTask):
        frozen = TEACHERS[teacher]().requires_grad_(False)
        torch.manual_seed(5)
        task = kind(model(1, drop_rate=0.3, drop_path_rate=0.3), frozen, nn.CrossEntropyLoss(), **kwargs)
        tasks.append(task.train())
        optimizers.append(torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1, momentum=0.9))
    for seed in range(3):
        results = []
        for task in tasks:
            torch.manual_seed(seed)
            results.append(task(*batch))
        for key, value in results[1].items():
            assert torch.equal(results[0][key], value), key
        for result, optimizer in zip(results, optimizers, strict=True):
            optimizer.zero_grad()
            result['loss'].backward()
            optimizer.step()
    states = [task.get_trainable_module().state_dict() for task in tasks]
    assert ('projection.weight' in states[0]) is (teacher != 'as wide')
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]), name


def test_the_projection_is_trained_and_belongs_to_no_student(batch):
    task = FeatureTask(model(1), TEACHERS['wider, of other classes'](), nn.CrossEntropyLoss(), verbose=False)
    task.setup_ema(decay=0.5)
    task(*batch)['loss'].backward()
    (group,) = task.extra_param_groups()
    assert all(param.grad is not None for param in group['params'])
    for ema in (False, True):
        assert task.get_student(ema=ema).state_dict().keys() == model(1).state_dict().keys()
    state = copy.deepcopy(task.get_task_state())
    other = FeatureTask(model(3), TEACHERS['wider, of other classes'](), nn.CrossEntropyLoss(), verbose=False)
    other.load_task_state(state)
    assert torch.equal(other.get_task_state()['projection']['weight'], state['projection']['weight'])


def test_features_are_measured_as_they_are_compared(batch):
    student, teacher = model(1, classes=0), TEACHERS['wider, of other classes']()
    task = FeatureTask(student, teacher, nn.CrossEntropyLoss(), verbose=False).eval()
    student.eval()
    with torch.no_grad():
        outputs = task.eval_features(batch[0])
        measured = measure_features(outputs, batch[1])['student']
        # A student without classes gives its pooled features.
        ours = task.get_trainable_module().projection(student(batch[0]))
        theirs = teacher.forward_head(teacher.forward_features(batch[0]), pre_logits=True)
    cosines = (ours * theirs).sum(1) / ours.norm(dim=1) / theirs.norm(dim=1)
    torch.testing.assert_close(measured['similarity'], 100 * cosines.sum())
    torch.testing.assert_close(measured['loss'] / 6, F.mse_loss(ours, theirs))


class WithoutFeatures(nn.Sequential):
    num_classes, in_chans, pretrained_cfg = 5, 3, CONFIG

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


@pytest.mark.parametrize(
    ('student', 'teacher', 'message'),
    [
        (lambda: model(1), WithoutFeatures, 'teacher WithoutFeatures does not return pooled features .*forward_head'),
        (WithoutFeatures, lambda: model(1), 'student WithoutFeatures'),
        (lambda: model(1), lambda: model(2, global_pool=''), r'a tensor \[1, .* not pooled features \[B, D\]'),
        (lambda: model(1), lambda: timm_dfpt.wrap(model(2)), 'takes a plain model'),
    ],
)
def test_what_has_no_pooled_features_is_refused(student, teacher, message):
    with pytest.raises((TypeError, ValueError), match=message):
        FeatureTask(student(), teacher(), nn.CrossEntropyLoss(), verbose=False)
