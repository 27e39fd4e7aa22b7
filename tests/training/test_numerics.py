"""Steps that are not finite, mixed precision and accumulated gradients, against plain torch loops."""
import contextlib
import copy
import dataclasses
import json
import re
import shlex

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import timm_dfpt
from tests.training.learner_steps import (
    BATCH,
    CLASSES,
    KWARGS,
    SIZE,
    Batches,
    assert_bfloat16_follows_float32,
    batches_of,
    make_student,
    steps,
)
from timm_dfpt.job.options import TrainConfig
from timm_dfpt.job.stopping import NonFiniteLossError
from timm_dfpt.losses import DFPTWeights
from timm_dfpt.tasks.baselines import SupervisedTask
from timm_dfpt.tasks.dfpt import DFPTDistillationTask
from timm_dfpt.tasks.evaluation import evaluate
from timm_dfpt.training.learner import Learner
from timm_dfpt.training.run import main
from timm_dfpt.training.run_folder import RunFolder
from timm_dfpt.training.trainer import Trainer

LR, MOMENTUM, DECAY = 0.1, 0.9, 1e-3
# All equal, so that the reference need not know about schedules.
OPTIONS = {
    'method': 'supervised', 'student': 'resnet18', 'dataset': 'none', 'cpu': True, 'epochs': 2, 'batch_size': BATCH,
    'lr': LR, 'momentum': MOMENTUM, 'weight_decay': DECAY, 'sched': 'step', 'decay_rate': 1.0,
}  # fmt: skip


def make_trainer(accelerator, folder, data, count=1, student=None, **options):
    config = TrainConfig(**{**OPTIONS, 'output': str(folder), **options})
    folder.mkdir()
    loaders = [
        accelerator.prepare(torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=False, drop_last=drop_last))
        for drop_last in (True, False)
    ]
    learners = []
    for i in range(count):
        task = SupervisedTask(copy.deepcopy(student) or make_student(), nn.CrossEntropyLoss(), verbose=False)
        learners.append(Learner(f'learner{i}', config, task, accelerator, len(loaders[0])))
    train, val = loaders
    return Trainer(
        config=config, accelerator=accelerator, learners=learners, train_loader=train, val_loader=val,
        folder=RunFolder(folder),
    )  # fmt: skip


def plain_training(student, batches, accumulate=1):
    """SGD as in every textbook, over the batches given."""
    optimizer = torch.optim.SGD(student.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True)
    student.train()
    for i, (images, labels) in enumerate(batches, 1):
        (F.cross_entropy(student(images), labels) / accumulate).backward()
        if i % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return student


def assert_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize(('value', 'term'), [(float('nan'), 'nan'), (float('inf'), 'nan'), (3e38, '(nan|inf)')])
def test_stops_at_what_is_not_finite(make_accelerator, tmp_path, value, term):
    data = Batches(4 * BATCH, {2 * BATCH + 3: value})
    trainer = make_trainer(make_accelerator(), tmp_path / 'run', data)
    found = rf'learner0: \w+ is {term} at step 3 \(epoch 1, training rows 16, .*23\)'
    with pytest.raises(NonFiniteLossError, match=found):
        trainer.fit()
    assert not list((tmp_path / 'run' / 'checkpoints').glob('*'))


def broken_weight(student):
    """A weight that nothing uses, so that no loss tells."""
    student.unused = nn.Parameter(torch.tensor([1.0, float('nan')]))
    return student


def tiny_std(student):
    student.bn1 = nn.Sequential(nn.Upsample(scale_factor=1), nn.BatchNorm2d(8))
    # Squares of these are too large for single precision, the normalised values are not.
    student.bn1[0].forward = lambda x: x * 1e25
    return student


@pytest.mark.parametrize(
    ('change', 'found'),
    [(tiny_std, r'bn1\.1\.running_var .*--mean and --std'), (broken_weight, r'unused is not finite after step 2')],
)
def test_weights_and_buffers_are_looked_at_with_the_losses(make_accelerator, tmp_path, change, found):
    data = Batches(2 * BATCH)
    trainer = make_trainer(make_accelerator(), tmp_path / 'run', data, student=change(make_student()))
    with pytest.raises(NonFiniteLossError, match=rf'learner0: {found}'):
        trainer.fit()
    assert not list((tmp_path / 'run').glob('checkpoints/*'))


class Root(nn.Module):
    """A finite loss whose gradient is not, for a batch with an image that begins with a zero: the root of another."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * SIZE * SIZE, CLASSES)

    def forward(self, x):
        logits = self.layer(x.flatten(1))
        return logits + (0 * logits).sum().sqrt() if (x[:, 0, 0, 0] == 0).any() else logits


def test_gradients_are_looked_at_too(make_accelerator, tmp_path):
    data = Batches(2 * BATCH, {3: 0.0})
    trainer = make_trainer(make_accelerator(), tmp_path / 'run', data, student=Root())
    with pytest.raises(NonFiniteLossError, match='grad_norm is nan at step 1 '):
        trainer.fit()


def test_gradients_that_no_scale_makes_finite(make_accelerator, tmp_path):
    """A gradient scaler would leave out every update for ever, and say nothing; over the end of an epoch, too."""
    data = Batches(16 * BATCH, dict.fromkeys(range(6 * BATCH, 16 * BATCH), 0.0))
    data.images[: 2 * BATCH, 0, 0, 0] = 0.0
    trainer = make_trainer(make_accelerator(), tmp_path / 'run', data, student=Root(), epochs=3)
    scale_gradients(trainer.learners[0])
    # Two, four that are made, ten and two, four that are made, ten and two.
    trainer.fit()
    assert json.loads((tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()[-1])['updates'] == 48
    data.images[:, 0, 0, 0] = 0.0
    trainer = make_trainer(make_accelerator(), tmp_path / 'more', data, student=Root(), epochs=3)
    scale_gradients(trainer.learners[0])
    with pytest.raises(NonFiniteLossError, match='of 20 updates in a row were not finite, the last at step 20'):
        trainer.fit()


# Batches, the one that is not finite; after two epochs: the scale, updates since it changed, overflows in a row.
SCALES = [(4, 3, 2.0**10, 0, 1), (3, 0, 2.0**10, 0, 0), (5, 0, 2.0**12, 0, 0), (4, 0, 2.0**10, 1, 0)]


@pytest.mark.parametrize(('count', 'bad', 'scale', 'tracker', 'overflows'), SCALES)
def test_the_scale_is_in_the_checkpoint(make_accelerator, tmp_path, count, bad, scale, tracker, overflows):
    """Scale, updates since it grew and those left out in a row, as if nothing had happened between."""
    data = Batches(count * BATCH, {bad * BATCH: 0.0})

    def make(name):
        trainer = make_trainer(make_accelerator(), tmp_path / name, data, student=Root(), epochs=2)
        scale_gradients(trainer.learners[0], init_scale=2.0**10)
        return trainer

    trainer = make('run')
    trainer.fit()
    state = trainer.accelerator.scaler.state_dict()
    assert (state['scale'], state['_growth_tracker']) == (scale, tracker)
    (tmp_path / 'run').rename(tmp_path / 'first')
    again = make('run')
    (tmp_path / 'first' / 'checkpoints').rename(tmp_path / 'run' / 'checkpoints')
    again.fit()
    assert again.accelerator.scaler.state_dict() == state
    assert again.progress.overflows_in_a_row == {'learner0': overflows}


@pytest.mark.parametrize('checkpoints', [0, 1])
def test_the_command_in_the_message_replays_the_step(tiny, tmp_path, capsys, checkpoints):
    """From the start or from the last checkpoint: the same term is the same number at the same step."""
    command = [
        *tiny.common(tmp_path / 'run'), '--dataset', str(tiny.data), '--method', 'supervised', '--student', 'resnet18',
        '--student-kwargs', 'layers=[1, 1, 1, 1]', 'channels=[8, 8, 16, 16]',
        '--lr', '1e30', '--checkpoint-steps', str(checkpoints),
    ]  # fmt: skip

    def error_of(arguments):
        assert main(arguments) == 1
        return capsys.readouterr().err.partition('error: ')[2]

    told = error_of(command)
    assert re.search(r'supervised: \w+ is (nan|inf) at step 2 \(epoch 1, training rows \d', told)
    assert len(list((tmp_path / 'run' / 'checkpoints').glob('*'))) == checkpoints
    more = re.search(r'To replay it, add (.*) to the command', told).group(1)
    assert error_of([*command, *shlex.split(more)]) == told


# The last image is in the short batch that training leaves out.
ONLY_VALIDATED = {2 * BATCH: float('nan')}


def test_metrics_of_validation_are_looked_at_too(make_accelerator, tmp_path):
    trainer = make_trainer(make_accelerator(), tmp_path / 'run', Batches(2 * BATCH + 1, ONLY_VALIDATED))
    with pytest.raises(NonFiniteLossError, match='loss is nan, .* for student on the validation data after epoch 1'):
        trainer.fit()
    assert (tmp_path / 'run' / 'metrics.jsonl').read_text() == ''
    assert not list((tmp_path / 'run').glob('checkpoints/*'))


def test_accumulated_gradients_of_several_learners(make_accelerator, tmp_path):
    """Each learner is updated after every second batch, however many there are."""
    data = Batches(6 * BATCH)
    trainer = make_trainer(
        make_accelerator(gradient_accumulation_steps=2), tmp_path / 'run', data, count=2, epochs=1, grad_accum_steps=2
    )
    trainer.fit()
    reference = plain_training(make_student(), batches_of(data, range(6)), 2)
    for learner in trainer.learners:
        assert_equal(learner.student, reference)
    assert json.loads((tmp_path / 'run' / 'metrics.jsonl').read_text())['updates'] == 3


@pytest.mark.parametrize('micro_batches', [7, 3], ids=['three left', 'no whole group'])
def test_what_is_left_of_an_epoch_is_an_update_as_large_as_one_batch(make_accelerator, tmp_path, micro_batches):
    """In double precision, its norm too."""
    data = Batches(micro_batches * BATCH)
    data.images = data.images.double()
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    accelerator, norms = make_accelerator(gradient_accumulation_steps=4), []
    options = {'epochs': 1, 'grad_accum_steps': 4, 'clip_grad': 0.5}
    trainer = make_trainer(accelerator, tmp_path / 'run', data, student=student, **options)
    (learner,), reference = trainer.learners, copy.deepcopy(student)
    settings = {'lr': LR, 'momentum': MOMENTUM, 'weight_decay': DECAY, 'nesterov': True}
    clip, optimizer = learner._clip_gradients, torch.optim.SGD(reference.parameters(), **settings)
    learner._clip_gradients = lambda: norms.append(clip()) or norms[-1]
    trainer.fit()
    for images, labels in zip(data.images.split(4 * BATCH), data.labels.split(4 * BATCH), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(reference(images), labels).backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        assert norms.pop(0)['grad_norm'].item() == pytest.approx(norm.item(), rel=1e-12)
        optimizer.step()
    assert not norms
    for mine, expected in zip(learner.student.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-14)


def make_dual_task(seed=1):
    torch.manual_seed(seed)
    teacher = timm_dfpt.wrap(timm.create_model('resnet18', num_classes=CLASSES, **KWARGS).eval())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in teacher.prompt_path.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    config = {'input_size': (3, SIZE, SIZE), 'mean': (0.5,) * 3, 'std': (0.25,) * 3}
    return DFPTDistillationTask(
        make_student(), teacher, temperature=2.0, weights=DFPTWeights(),
        input_config=config, teacher_input_config=config, verbose=False,
    )  # fmt: skip


def dual_learner(accelerator, **options):
    config = TrainConfig(**{**OPTIONS, 'method': 'dfpt', 'teacher': 'resnet18', 'prompt_lr': 1e-3, **options})
    return Learner('dfpt', config, make_dual_task(), accelerator, 10)


def scale_gradients(learner, **kwargs):
    """Give a learner a gradient scaler, as accelerate does for float16 where there is a GPU; but no autocast."""
    learner.accelerator.scaler = torch.amp.GradScaler('cpu', growth_interval=2, **kwargs)
    learner.accelerator.native_amp, learner.accelerator.state._mixed_precision = True, 'fp16'
    learner.accelerator.autocast = contextlib.nullcontext
    return learner


@pytest.mark.parametrize('fused', [False, True])
def test_a_gradient_scaler_changes_nothing(make_accelerator, fused):
    """Scales are powers of two: with two optimizers, clipping and a scale that grows, every bit must be the same."""
    options = {'clip_grad': 0.5, 'opt_fused': fused}
    plain = dual_learner(make_accelerator(), **options)
    a = steps(plain, 5)
    scaled = scale_gradients(dual_learner(make_accelerator(), **options), init_scale=2.0**10)
    b = steps(scaled, 5)
    assert [t['loss'] for t in a] == [t['loss'] for t in b]
    assert_equal(plain.module, scaled.module)
    assert scaled.accelerator.scaler.get_scale() == 2.0**12


@pytest.mark.parametrize('fused', [False, True])
def test_an_overflow_in_the_first_step_leaves_nothing_behind(make_accelerator, fused):
    """As if it did not exist, momentum included: torch's fused SGD would go on with memory it never wrote to."""
    plain = dual_learner(make_accelerator(), opt_fused=fused)
    steps(plain, 4, first=1)
    options = {'init_scale': 2.0**127, 'backoff_factor': 2.0**-117}
    scaled = scale_gradients(dual_learner(make_accelerator(), opt_fused=fused), **options)
    steps(scaled, 5)
    assert scaled.accelerator.scaler.get_scale() == 2.0**12
    # Batch statistics have seen the step.
    for (name, a), b in zip(plain.module.named_parameters(), scaled.module.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_fused_optimizers_follow_the_loop(make_accelerator):
    """On the same 200 gradients: SGD of the student and AdamW of the prompt path, under a schedule."""
    options = {'sched': 'cosine', 'prompt_weight_decay': 0.01}
    loop, fused = (dual_learner(make_accelerator(), opt_fused=fused, **options) for fused in (False, True))
    assert [o.defaults['fused'] for o in fused.optimizers] == [True, True]
    start = [p.detach().clone() for p in loop.module.parameters()]
    generator = torch.Generator().manual_seed(0)
    for update in range(200):
        gradients = [0.1 * torch.randn(p.shape, generator=generator) for p in start]
        for learner in (loop, fused):
            for parameter, gradient in zip(learner.module.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
            learner.set_progress(0, update // 10)
            for optimizer in learner.optimizers:
                optimizer.step()
    for before, a, b in zip(start, loop.module.parameters(), fused.module.parameters(), strict=True):
        moved = float((a - before).detach().abs().max())
        assert moved > 1e-3
        assert float((a - b).detach().abs().max()) < 1e-5 * max(1.0, moved)


def test_bfloat16_follows_float32(make_accelerator):
    def make(precision):
        return dual_learner(make_accelerator(mixed_precision=precision), mixed_precision=precision)

    # See test_numerics_methods.py for the size.
    assert_bfloat16_follows_float32(make, batches_of(Batches(4 * BATCH, size=64), range(4)))


def test_only_what_is_trained_is_in_the_module(make_accelerator):
    """What DistributedDataParallel would broadcast and wait for: student and prompt path, and no frozen weight."""
    learner = dual_learner(make_accelerator())
    assert all(parameter.requires_grad for parameter in learner.module.parameters())
    steps(learner, 1)
    teacher = {id(tensor) for tensor in (*learner.teacher.parameters(), *learner.teacher.buffers())}
    assert not teacher & {id(tensor) for tensor in (*learner.module.parameters(), *learner.module.buffers())}
    assert all(parameter.grad is None for parameter in learner.teacher.parameters())


def test_evaluation_counts_every_sample_once(make_accelerator):
    """19 samples in batches of 8: the last has 3."""
    data = Batches(19)
    student, other = make_student().eval(), make_student(seed=5).eval()
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH)
    result = evaluate(lambda x: {'student': student(x), 'other': other(x)}, loader, make_accelerator())
    with torch.no_grad():
        logits = {'student': student(data.images).double(), 'other': other(data.images).double()}
    for name, values in logits.items():
        p = values.softmax(1)
        expected = {
            'top1': 100 * (values.argmax(1) == data.labels).double().mean(),
            'loss': -p[torch.arange(19), data.labels].log().mean(),
            'entropy': -(p * p.log()).sum(1).mean(),
            'confidence': p.max(1).values.mean(),
        }
        if name == 'other':
            expected['kl_to_student'] = (p * (p.log() - logits['student'].log_softmax(1))).sum(1).mean()
        assert result[name] == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-5)


def test_progress_names_are_those_of_the_checkpoint(make_accelerator, tmp_path):
    """A trainer that has been restored knows what the one before it knew."""
    data = Batches(3 * BATCH)
    trainer = make_trainer(make_accelerator(), tmp_path / 'run', data, count=2)
    trainer.fit()
    (tmp_path / 'run').rename(tmp_path / 'first')
    again = make_trainer(make_accelerator(), tmp_path / 'run', data, count=2)
    (tmp_path / 'first' / 'checkpoints').rename(tmp_path / 'run' / 'checkpoints')
    again.fit()
    found, expected = (dataclasses.asdict(each.progress) for each in (again, trainer))
    assert found.pop('seconds') >= expected.pop('seconds')
    assert found == expected
    for a, b in zip(trainer.learners, again.learners, strict=True):
        assert_equal(a.student, b.student)
