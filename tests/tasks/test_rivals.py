import pytest
import timm
import torch
import torch.nn.functional as F
from timm.task import LogitDistillationTask
from torch import nn

from timm_dfpt.losses import KD_LOSSES, dkd_loss
from timm_dfpt.tasks.baselines import AdaptedTeacher, CTKDTask, LogitLossTask
from timm_dfpt.training.options import METHODS, TrainConfig

INPUT = {'input_size': (3, 32, 32), 'mean': (0.5, 0.5, 0.5), 'std': (0.25, 0.25, 0.25)}
SHARED = {'teacher': 'test_resnet', 'student': 'test_resnet', 'dataset': 'user/data'}


def model(seed, **kwargs):
    torch.manual_seed(seed)
    net = timm.create_model('test_resnet', num_classes=5, **kwargs)
    net.pretrained_cfg = {**net.pretrained_cfg, 'mean': INPUT['mean'], 'std': INPUT['std'], 'input_size': (3, 32, 32)}
    return net


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 4, 0])


def logits_of(student, teacher, input):
    return student(input), teacher(input)


@pytest.mark.parametrize('loss', KD_LOSSES)
def test_total_is_weighted_sum_of_the_formulas(loss, batch):
    input, target = batch
    student, teacher = model(1).eval(), model(2).eval()
    task = LogitLossTask(
        student, AdaptedTeacher(teacher, INPUT), nn.CrossEntropyLoss(), loss=loss, temperature=3.0,
        task_loss_weight=0.3, distill_loss_weight=0.7, verbose=False,
    )  # fmt: skip
    result = task(input, target)
    with torch.no_grad():
        ours, theirs = logits_of(student, teacher, input)
        expected = 0.3 * F.cross_entropy(ours, target) + 0.7 * KD_LOSSES[loss](ours, theirs, target, 3.0)
    torch.testing.assert_close(result['loss'], expected)
    torch.testing.assert_close(result['output'], ours)


def test_plain_loss_is_timms_task(batch):
    input, target = batch
    kwargs = {'temperature': 4.0, 'distill_loss_weight': 0.9, 'task_loss_weight': 0.1, 'verbose': False}
    student = model(1).eval()
    ours = LogitLossTask(student, AdaptedTeacher(model(2), INPUT), nn.CrossEntropyLoss(), loss='kd', **kwargs)
    timms = LogitDistillationTask(student, AdaptedTeacher(model(2), INPUT), nn.CrossEntropyLoss(), **kwargs)
    torch.testing.assert_close(ours(input, target)['loss'], timms(input, target)['loss'])


def test_arguments_reach_the_loss(batch):
    input, target = batch
    student, teacher = model(1).eval(), model(2).eval()
    losses = {}
    for beta in (2.0, 8.0):
        task = LogitLossTask(
            student, AdaptedTeacher(teacher, INPUT), loss='dkd', loss_kwargs={'beta': beta}, temperature=4.0,
            task_loss_weight=0.0, distill_loss_weight=1.0, verbose=False,
        )  # fmt: skip
        losses[beta] = task(input, target)['loss']
        with torch.no_grad():
            expected = dkd_loss(student(input), teacher(input), target, 4.0, beta=beta)
        torch.testing.assert_close(losses[beta].detach(), expected)
    assert losses[2.0] != losses[8.0]


@pytest.mark.parametrize('kind', [LogitLossTask, CTKDTask])
def test_the_teacher_gets_no_gradient_and_stays_in_evaluation(kind, batch):
    teacher = model(2)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    task = kind(model(1), AdaptedTeacher(teacher, INPUT), nn.CrossEntropyLoss(), verbose=False)
    task.train()
    task(*batch)['loss'].backward()
    assert all(p.grad is None for p in teacher.parameters())
    # Batch statistics would have moved in training mode.
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


def test_learned_temperature_moves_against_the_student(batch):
    input, target = batch
    student, teacher = model(1).eval(), model(2)
    for net in (student, teacher):
        # With logits near zero the temperature makes no difference.
        net.fc.weight.data *= 50
    task = CTKDTask(
        student, AdaptedTeacher(teacher, INPUT), nn.CrossEntropyLoss(), task_loss_weight=0.0,
        distill_loss_weight=1.0, verbose=False,
    )  # fmt: skip
    temperature = task.trainable_module.temperature
    # From where the curriculum has reached its full strength.
    task.epoch = temperature.curriculum_epochs
    before = task(input, target)
    before['loss'].backward()
    with torch.no_grad():
        temperature.raw -= 0.1 * temperature.raw.grad.sign()
        assert task(input, target)['loss'] > before['loss']
    assert task(input, target)['temperature'] != before['temperature']


def test_ctkd_evaluates_and_saves_the_student_alone():
    student = model(1)
    task = CTKDTask(student, AdaptedTeacher(model(2), INPUT), nn.CrossEntropyLoss(), verbose=False)
    assert task.get_eval_model() is student
    assert task.get_eval_model(ema=False)(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_shared_logits_are_read_and_written():
    net = model(2)
    teacher = AdaptedTeacher(net, INPUT)
    calls = []
    net.register_forward_hook(lambda *args: calls.append(1))
    x = torch.randn(2, 3, 32, 32)
    known = {}
    with teacher.sharing(known, 7):
        first = teacher(x)
    with teacher.sharing(known, 7):
        second = teacher(x)
    assert second is first
    assert known == {7: first}
    torch.testing.assert_close(teacher(x), first)
    assert len(calls) == 2


def test_the_teacher_sees_its_own_normalisation():
    net = model(2)
    own = {**INPUT, 'mean': (0.1, 0.2, 0.3), 'std': (0.5, 0.6, 0.7)}
    teacher = AdaptedTeacher(net, INPUT, own)
    pixels = torch.rand(2, 3, 32, 32)

    def normalised(config):
        mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ('mean', 'std'))
        return (pixels - mean) / std

    with torch.no_grad():
        torch.testing.assert_close(teacher(normalised(INPUT)), net(normalised(own)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('mixed', [{'mixup': 0.2}, {'cutmix': 1.0}])
@pytest.mark.parametrize(
    'options',
    [
        {'method': 'dkd'},
        {'method': 'dfpt', 'kd_loss': 'dkd'},
        {'method': 'dfpt+', 'kd_loss': 'dkd'},
        {'method': 'kd', 'baselines': ['dkd']},
    ],
)
def test_hard_target_methods_refuse_mixed_targets(options, mixed):
    with pytest.raises(ValueError, match=r'dkd needs class indices .*mixup or cutmix'):
        TrainConfig(**SHARED, **options, **mixed)
    TrainConfig(**SHARED, **options)


def test_no_other_method_needs_class_indices():
    soft = torch.full((4, 5), 0.2)
    for name in set(KD_LOSSES) - {'dkd'}:
        assert KD_LOSSES[name](torch.randn(4, 5), torch.randn(4, 5), soft, 2.0).isfinite()
    for method in set(METHODS) - {'dkd', 'supervised'}:
        TrainConfig(**SHARED, method=method, mixup=0.2)
