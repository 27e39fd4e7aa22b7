import functools

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.task import LogitDistillationTask
from torch import nn

from timm_dfpt.job.options import TrainConfig
from timm_dfpt.losses import dkd_loss
from timm_dfpt.tasks.baselines import CTKDTask, LogitLossTask, SupervisedTask
from timm_dfpt.tasks.methods import KD_LOSSES, METHODS

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
        student, teacher, nn.CrossEntropyLoss(), kd_loss=KD_LOSSES[loss], temperature=3.0,
        task_loss_weight=0.3, distill_loss_weight=0.7, verbose=False,
    )  # fmt: skip
    result = task(input, target)
    with torch.no_grad():
        ours, theirs = logits_of(student, teacher, input)
        expected = 0.3 * F.cross_entropy(ours, target) + 0.7 * KD_LOSSES[loss](ours, theirs, target, 3.0)
    torch.testing.assert_close(result['loss'], expected)
    torch.testing.assert_close(result['output'], ours)


@pytest.mark.parametrize('temperature', [3.0, 4.0])
@pytest.mark.parametrize('kd_loss', [None, KD_LOSSES['kd']])
def test_plain_loss_is_timms_task_bit_for_bit(kd_loss, temperature, batch):
    """Losses, gradients, batch statistics and random numbers of several steps; timm runs the student first."""
    kwargs = {'temperature': temperature, 'distill_loss_weight': 0.9, 'task_loss_weight': 0.1, 'verbose': False}
    drops = {'drop_rate': 0.3, 'drop_path_rate': 0.3}
    students, teachers = ([model(seed, **drops) for _ in range(2)] for seed in (1, 2))
    ours = LogitLossTask(students[0], teachers[0], nn.CrossEntropyLoss(), kd_loss=kd_loss, **kwargs).train()
    timms = LogitDistillationTask(students[1], teachers[1].requires_grad_(False), nn.CrossEntropyLoss(), **kwargs)
    tasks = (ours, timms.train())
    optimizers = [torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1) for task in tasks]
    for seed in range(3):
        results, streams = [], []
        for task, optimizer in zip(tasks, optimizers, strict=True):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            results.append(task(*batch))
            results[-1]['loss'].backward()
            streams.append(torch.get_rng_state())
        assert torch.equal(*streams)
        for key, value in results[1].items():
            assert torch.equal(results[0][key], value), key
        for a, b in zip(*(student.parameters() for student in students), strict=True):
            assert torch.equal(a.grad, b.grad)
        for optimizer in optimizers:
            optimizer.step()
    states = [task.get_checkpoint_state()['state_dict'] for task in tasks]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_arguments_reach_the_loss(batch):
    input, target = batch
    student, teacher = model(1).eval(), model(2).eval()
    losses = {}
    for beta in (2.0, 8.0):
        task = LogitLossTask(
            student, teacher, kd_loss=functools.partial(dkd_loss, beta=beta), temperature=4.0,
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
    task = kind(model(1), teacher, nn.CrossEntropyLoss(), verbose=False)
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
        student, teacher, nn.CrossEntropyLoss(), task_loss_weight=0.0,
        distill_loss_weight=1.0, verbose=False,
    )  # fmt: skip
    temperature = task.trainable_module.temperature
    # From where the curriculum has reached its full strength.
    task.set_progress(temperature.curriculum_epochs, 0, 1)
    before = task(input, target)
    before['loss'].backward()
    with torch.no_grad():
        temperature.raw -= 0.1 * temperature.raw.grad.sign()
        assert task(input, target)['loss'] > before['loss']
    assert task(input, target)['temperature'] != before['temperature']


def test_ctkd_evaluates_and_saves_the_student_alone():
    student = model(1)
    task = CTKDTask(student, model(2), nn.CrossEntropyLoss(), verbose=False)
    assert task.get_eval_model() is student
    assert task.get_eval_model(ema=False)(torch.randn(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize('kind', [LogitLossTask, CTKDTask])
def test_logits_that_are_known_are_taken_over(kind, batch):
    teacher = model(2)
    task = kind(model(1).eval(), teacher, nn.CrossEntropyLoss(), verbose=False)
    assert task.get_teacher() is teacher
    calls = []
    teacher.register_forward_hook(lambda *args: calls.append(1))
    first = task(*batch)
    again = task(*batch, first['teacher_output'])
    assert len(calls) == 1
    assert again['teacher_output'] is first['teacher_output']
    assert torch.equal(again['loss'], first['loss'])
    assert torch.equal(first['teacher_output'], task.teacher_logits(batch[0]))


def test_the_teacher_sees_its_own_normalisation():
    net = model(2)
    own = {**INPUT, 'mean': (0.1, 0.2, 0.3), 'std': (0.5, 0.6, 0.7)}
    task = LogitLossTask(model(1), net, input_config=INPUT, teacher_input_config=own, verbose=False)
    pixels = torch.rand(2, 3, 32, 32)

    def normalised(config):
        mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ('mean', 'std'))
        return (pixels - mean) / std

    with torch.no_grad():
        logits = task.teacher_logits(normalised(INPUT))
        torch.testing.assert_close(logits, net(normalised(own)), rtol=1e-4, atol=1e-5)


def test_the_weight_of_the_teacher_grows():
    task = LogitLossTask(model(1), model(2), distill_loss_weight=0.8, distill_warmup_epochs=4, verbose=False)
    seen = []
    for epoch in range(6):
        task.set_progress(epoch, 0, 100)
        seen.append(task.distill_loss_weight)
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_a_task_without_a_teacher_says_so(batch):
    task = SupervisedTask(model(1), nn.CrossEntropyLoss(), verbose=False)
    assert task.get_teacher() is None
    assert list(task.eval_outputs(batch[0])) == ['student']
    with pytest.raises(RuntimeError, match='SupervisedTask trains without a teacher'):
        task.teacher_logits(batch[0])


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
    for name, loss in KD_LOSSES.items():
        if not METHODS[name].needs_hard_labels:
            assert loss(torch.randn(4, 5), torch.randn(4, 5), soft, 2.0).isfinite()
    for name, method in METHODS.items():
        if method.needs_teacher and not method.needs_hard_labels:
            TrainConfig(**SHARED, method=name, mixup=0.2)
