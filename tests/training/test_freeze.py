"""A prompt path that is tuned in the first epochs only: from then on the same to the bit, whatever happens."""
import contextlib
import copy
import json
import math
import shutil
import types

import pytest
import timm
import torch
from safetensors.torch import load_file

import timm_dfpt
from tests.training.learner_steps import BATCH, CLASSES, KWARGS, SIZE, Batches, make_student
from timm_dfpt.job.cli import parse_config
from timm_dfpt.job.optim import create_scheduler, shortened
from timm_dfpt.job.options import TrainConfig
from timm_dfpt.job.stopping import Preempted
from timm_dfpt.tasks.baselines import LogitLossTask
from timm_dfpt.tasks.dfpt import DFPTDistillationTask
from timm_dfpt.teacher.fitted_head import reorder_classes
from timm_dfpt.teacher.prompt_path import PromptPath
from timm_dfpt.training.build import create_task
from timm_dfpt.training.learner import Learner
from timm_dfpt.training.run import run
from timm_dfpt.training.run_folder import RunFolder
from timm_dfpt.training.trainer import Trainer

STEPS = 3
OPTIONS = {
    'method': 'dfpt+', 'teacher': 'resnet18', 'student': 'resnet18', 'dataset': 'none', 'cpu': True, 'epochs': 3,
    'prompt_epochs': '1', 'batch_size': BATCH, 'prompt_lr': 1e-2, 'clip_grad': 1.0, 'model_ema': True, 'drop': 0.1,
}  # fmt: skip
DATA_CONFIG = {'input_size': (3, SIZE, SIZE), 'mean': (0.5,) * 3, 'std': (0.25,) * 3}
PATH = 'prompt_path/prompt_path.safetensors'
STUDENT = 'student/model.safetensors'


def make_trainer(make_accelerator, folder, **options):
    """A path whose statistics move, and a baseline alongside, in epochs of a few steps."""
    config = TrainConfig(**{**OPTIONS, 'output': str(folder), 'checkpoint_hist': 99, **options})
    accelerator = make_accelerator(gradient_accumulation_steps=config.grad_accum_steps)
    folder.mkdir(exist_ok=True)
    data = Batches(STEPS * BATCH)
    loaders = [accelerator.prepare(torch.utils.data.DataLoader(data, batch_size=BATCH)) for _ in range(2)]
    torch.manual_seed(1)
    model = timm.create_model('resnet18', num_classes=CLASSES, **KWARGS).eval()
    common = {'input_config': DATA_CONFIG, 'teacher_input_config': DATA_CONFIG, 'verbose': False}
    paths = timm_dfpt.wrap(model, variant='dfpt+', prompt=timm_dfpt.PromptConfig(norms='own'))
    tasks = [
        DFPTDistillationTask(make_student(), paths, prompt_epochs=config.tuned_epochs(), **common),
        LogitLossTask(make_student(), copy.deepcopy(model), **common),
    ]
    updates = math.ceil(STEPS / config.grad_accum_steps)
    learners = [Learner(name, config, task, accelerator, updates) for name, task in zip('ab', tasks, strict=True)]
    train, val = loaders
    return Trainer(
        config=config, accelerator=accelerator, learners=learners, train_loader=train, val_loader=val,
        folder=RunFolder(folder),
    )  # fmt: skip


def path_in(checkpoint):
    tensors = load_file(checkpoint / 'model.safetensors')
    return {name: value for name, value in tensors.items() if name.startswith('prompt_path.')}


def equal(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def weights(trainer):
    return [{k: v.clone() for k, v in learner.module.state_dict().items()} for learner in trainer.learners]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A run that nothing happened to: its folder, with a checkpoint after each update, and what it ended with."""
    from accelerate import Accelerator

    folder = tmp_path_factory.mktemp('freeze') / 'whole'
    trainer = make_trainer(lambda **options: Accelerator(cpu=True, **options), folder, checkpoint_steps=1)
    trainer.fit()
    return folder, weights(trainer)


def test_the_path_at_the_end_is_that_of_its_last_epoch(whole):
    """All weights and statistics; the student goes on, and what the path's optimizer remembers is kept no longer."""
    folder, end = whole
    checkpoints = sorted((folder / 'checkpoints').glob('step-*'))
    assert len(checkpoints) == 3 * STEPS
    before, frozen = checkpoints[: STEPS - 1], checkpoints[STEPS - 1 :]
    last = path_in(frozen[0])
    assert any('running_mean' in name for name in last)
    assert not any(equal(path_in(each), last) for each in before)
    assert all(equal(path_in(each), last) for each in frozen)
    assert all(torch.equal(end[0][name], value) for name, value in last.items())
    states = [torch.load(each / 'optimizer_1.bin', weights_only=True)['state'] for each in (frozen[0], frozen[-1])]
    assert states[0]
    assert not states[1]
    student = [load_file(each / 'model.safetensors')['student.conv1.0.weight'] for each in frozen]
    assert all(not torch.equal(a, b) for a, b in zip(student, student[1:], strict=False))


def test_what_is_told_of_a_frozen_path(whole):
    lines = [json.loads(line)['a'] for line in (whole[0] / 'metrics.jsonl').read_text().splitlines()]
    assert [len(line['lr']) for line in lines] == [2, 1, 1]
    told = [{key for key in line['train'] if key.startswith('prompt_')} for line in lines]
    assert told[0] == {'prompt_task_loss', 'prompt_teacher_loss', 'prompt_student_loss', 'prompt_grad_norm'}
    assert told[1:] == [set(), set()]
    assert all('prompt_path' in line['val'] for line in lines)
    assert lines[1]['val']['prompt_path']['loss'] == lines[2]['val']['prompt_path']['loss']


@pytest.mark.parametrize('step', [2, STEPS, STEPS + 1], ids=['before', 'at the freeze', 'after'])
def test_a_run_goes_on_to_the_same_end(whole, make_accelerator, tmp_path, step):
    folder, end = whole
    checkpoint = f'checkpoints/step-{step:08d}'
    shutil.copytree(folder / checkpoint, tmp_path / 'run' / checkpoint)
    trainer = make_trainer(make_accelerator, tmp_path / 'run', checkpoint_steps=1)
    trainer.fit()
    assert all(map(equal, weights(trainer), end))
    assert (tmp_path / 'run' / 'metrics.jsonl').read_bytes() == (folder / 'metrics.jsonl').read_bytes()


def test_stopped_in_the_evaluation_before_the_freeze(whole, make_accelerator, tmp_path):
    """All steps of the last epoch of the path are made, and the epoch is not over."""
    trainer = make_trainer(make_accelerator, tmp_path / 'run', checkpoint_steps=1)
    trainer.stop = types.SimpleNamespace(arrived=lambda **_: trainer.progress.step_in_epoch == STEPS)
    with pytest.raises(Preempted):
        trainer.fit()
    trainer = make_trainer(make_accelerator, tmp_path / 'run', checkpoint_steps=1)
    trainer.fit()
    assert all(map(equal, weights(trainer), whole[1]))


def test_an_update_never_spans_the_freeze(make_accelerator, tmp_path):
    """Gradients of several steps are added up, and an epoch has a rest: it is the last update of the path."""
    options = {'grad_accum_steps': 2, 'checkpoint_steps': 1}
    trainer = make_trainer(make_accelerator, tmp_path / 'run', epochs=2, **options)
    trainer.fit()
    assert trainer.progress.updates == 4
    assert equal(*(path_in(tmp_path / 'run' / 'checkpoints' / f'step-{n * STEPS:08d}') for n in (1, 2)))


def test_a_gradient_scaler_does_not_look_for_gradients_of_a_frozen_path(make_accelerator, tmp_path):
    """Scales are powers of two: with two optimizers, one of which ends, every bit must be the same."""

    def fit(name, scale):
        trainer = make_trainer(make_accelerator, tmp_path / name, epochs=2)
        accelerator = trainer.accelerator
        if scale:
            accelerator.scaler = torch.amp.GradScaler('cpu', growth_interval=2, init_scale=2.0**10)
            accelerator.native_amp, accelerator.state._mixed_precision = True, 'fp16'
            accelerator.autocast = contextlib.nullcontext
        trainer.fit()
        return weights(trainer), accelerator.scaler

    (plain, _), (scaled, scaler) = fit('plain', False), fit('scaled', True)
    assert all(map(equal, plain, scaled))
    assert scaler.get_scale() > 2.0**10


def options_of(**given):
    return TrainConfig(student='a', teacher='b', dataset='c', **given)


@pytest.mark.parametrize(
    ('given', 'epochs', 'expected'),
    [
        ({}, 40, 40), ({'prompt_epochs': 'all'}, 7, 7), ({'prompt_epochs': 10}, 40, 10),
        ({'prompt_epochs': '40'}, 40, 40), ({'prompt_epochs': '25%'}, 40, 10), ({'prompt_epochs': '25%'}, 3, 1),
        ({'prompt_epochs': '7%'}, 100, 7),
        ({'prompt_epochs': '12.5%'}, 9, 2), ({'prompt_epochs': '100%'}, 9, 9), ({'prompt_epochs': '1%'}, 1, 1),
        ({'prompt_teacher_weight': 0, 'student_teacher_weight': 0}, 40, 10),
        ({'prompt_teacher_weight': 0, 'student_teacher_weight': 0, 'prompt_epochs': 'all'}, 40, 40),
        ({'prompt_teacher_weight': 0}, 40, 40), ({'prompt_path': 'x/y', 'freeze_prompt_path': True}, 40, 0),
        ({'prompt_path': 'x/y', 'prompt_epochs': 0}, 40, 0),
    ],
)  # fmt: skip
def test_epochs_in_which_the_path_is_tuned(given, epochs, expected):
    assert options_of(epochs=epochs, **given).tuned_epochs() == expected


@pytest.mark.parametrize(
    ('given', 'head', 'expected'),
    [({}, 'fitted', 8), ({'prompt_epochs': 'all'}, 'fitted', 30), ({}, 'reordered', 30), ({}, 'own', 30)],
)
def test_a_teacher_of_other_classes_is_adapted_in_a_quarter_of_the_run(make_accelerator, given, head, expected):
    torch.manual_seed(0)
    teacher = timm.create_model('resnet18', num_classes=CLASSES, **KWARGS).eval()
    if head == 'reordered':
        teacher = reorder_classes(teacher, range(CLASSES)[::-1])
    if head == 'fitted':
        loader = torch.utils.data.DataLoader(Batches(6 * BATCH), batch_size=BATCH)
        teacher = timm_dfpt.fit_head(teacher, ((images, labels) for images, labels, _ in loader), CLASSES)
    options = options_of(epochs=30, **given)
    task = create_task(options, make_student(), timm_dfpt.wrap(teacher), DATA_CONFIG, make_accelerator())
    assert task.prompt_epochs == expected


@pytest.mark.parametrize('sched', ['cosine', 'step', 'constant'])
def test_the_schedule_of_the_path_ends_with_it(sched):
    """A cosine to zero by its formula, whatever the run's is, and of the same share of warm-up."""
    config = options_of(epochs=20, sched=sched, warmup_epochs=4, lr=0.1, min_lr=0.01, warmup_lr=1e-4)
    updates, epochs = 4, 5
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.02)
    scheduler = create_scheduler(optimizer, updates, **shortened(config.schedule, epochs, updates))
    total = epochs * updates
    for update in range(total):
        scheduler.step_update(update)
        expected = 0.01 * (1 + math.cos(math.pi * update / total))
        if update < updates:
            expected = 1e-4 + (0.02 - 1e-4) * update / updates
        assert optimizer.param_groups[0]['lr'] == pytest.approx(expected)
    assert shortened(config.schedule, 20, updates) == shortened(config.schedule, None, updates) == config.schedule


def test_few_updates_are_not_all_warm_up():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.02)
    schedule = options_of(epochs=4, warmup_epochs=1).schedule
    create_scheduler(optimizer, 1, **shortened(schedule, 1, 1)).step_update(0)
    assert optimizer.param_groups[0]['lr'] == pytest.approx(0.02)


def test_a_step_on_kept_logits_runs_the_student_alone(tiny, tmp_path, fresh_accelerate, monkeypatch):
    """With a = c = 0: no path runs for images whose logits are kept, and the student is the same to the bit."""
    passes, forward = [], PromptPath.forward

    def counted(path, x, *args):
        # How many batches the measurement of speed runs depends on the time they take.
        if len(x) == 24:
            passes.append(None)
        return forward(path, x, *args)

    monkeypatch.setattr(PromptPath, 'forward', counted)
    counts = []
    for name, more in (('plain', []), ('kept', ['--cache-teacher', '--teacher-cache-dir', str(tmp_path / 'cache')])):
        fresh_accelerate()
        options = ['--mixup', '0', '--batch-size', '24', '--epochs', '3', '--prompt-epochs', '1', '--aug-cycle', '1']
        options += ['--validation-batch-size', '25']
        alone = ['--prompt-teacher-weight', '0', '--student-teacher-weight', '0']
        run(parse_config(tiny.argv(tmp_path / name, *options, *alone, *more)))
        counts.append(len(passes))
        passes.clear()
    for name in (STUDENT, PATH, 'metrics.jsonl'):
        assert (tmp_path / 'plain' / name).read_bytes() == (tmp_path / 'kept' / name).read_bytes()
    # The second epoch of the frozen path finds the logits of its 9 steps; two passes make sure that they can be kept.
    assert counts[0] - counts[1] == 9 - 2
