"""Every optimizer and schedule that an option may name: it trains, or is refused before anything is written."""
import dataclasses
import math
import re

import pytest
import torch
import yaml
from timm.optim import get_optimizer_info, list_optimizers
from timm.task import ClassificationTask

from tests.training.learner_steps import make_student, steps
from timm_dfpt.data.checks import kind_of
from timm_dfpt.job.cli import load_recipe
from timm_dfpt.job.optim import SCHEDULES, check_optimizer, create_scheduler, describe_decay
from timm_dfpt.job.options import TrainConfig
from timm_dfpt.training.checkpoint import restore_checkpoint, save_checkpoint
from timm_dfpt.training.learner import Learner

OPTIMIZERS = list_optimizers()
# timm imports these by name, from packages that are for GPUs.
FOREIGN = [name for name in OPTIMIZERS if isinstance(get_optimizer_info(name).opt_class, str)]
pytestmark = pytest.mark.filterwarnings('ignore:It is highly recommended to have .opt_einsum.')

REQUIRED = {'dataset': 'photos', 'student': 'resnet18', 'method': 'supervised', 'cpu': True}


def options(**given):
    return TrainConfig(**{**REQUIRED, **given})


def test_every_optimizer_does_a_step_or_is_refused():
    refused = set()
    for name in OPTIMIZERS:
        for option, spelled in (('opt', name), ('prompt_opt', f'lookahead_{name}')):
            try:
                check_optimizer(option, spelled, fused=False, cpu=True, lr=0.05, weight_decay=5e-4)
            except ValueError as error:
                refused.add(name)
                told = str(error)
            else:
                continue
            assert re.fullmatch(rf'{option}={spelled} .*[Cc]hoose another.*', told), told
    assert refused == {'adahessian', *FOREIGN}


def test_trying_an_optimizer_uses_no_random_numbers():
    before = torch.get_rng_state()
    check_optimizer('opt', 'kron', fused=False, cpu=True, lr=0.05, weight_decay=0.1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted({*OPTIMIZERS} - {'adahessian', *FOREIGN}))
@pytest.mark.parametrize('prefix', ['', 'lookahead_'])
def test_every_optimizer_trains_and_goes_on_exactly(name, prefix, make_accelerator, tmp_path):
    def learner():
        config = options(opt=prefix + name, epochs=1, lr=0.01)
        return Learner('one', config, ClassificationTask(make_student()), make_accelerator(), 8)

    with torch.compiler.set_stance('force_eager'):
        whole = learner()
        before = {key: value.clone() for key, value in whole.student.state_dict().items()}
        steps(whole, 7)
        save_checkpoint(whole.accelerator, tmp_path, 7, 1, {}, {'origin': None})
        history = steps(whole, 3, first=7)
        resumed = learner()
        restore_checkpoint(resumed.accelerator, tmp_path, {})
        steps(resumed, 3, first=7)
    assert all(math.isfinite(terms['loss']) for terms in history)
    after, again = whole.student.state_dict(), resumed.student.state_dict()
    assert all(not torch.equal(after[key], before[key]) for key in before if key.endswith('weight'))
    assert all(torch.equal(after[key], again[key]) for key in after)


# --- schedules


def rates(updates_per_epoch=5, **given):
    config = options(**given)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.lr)
    scheduler = create_scheduler(optimizer, updates_per_epoch, **config.schedule)
    found = []
    for update in range(config.epochs * updates_per_epoch):
        if scheduler is not None:
            scheduler.step_update(update)
        found.append(optimizer.param_groups[0]['lr'] / config.lr)
    return found


@pytest.mark.parametrize('sched', SCHEDULES)
def test_every_schedule_trains_in_runs_of_any_length(sched):
    """And lowers the learning rate to less than half, or says that it does not."""
    lengths = [(1, 0, 1), (1, 0, 20), (2, 1, 3), (4, 0, 5), (4, 1, 1), (30, 5, 2), (240, 0, 1)]
    for epochs, warmup, updates_per_epoch in lengths:
        given = {'sched': sched, 'epochs': epochs, 'warmup_epochs': 0 if sched == 'none' else warmup}
        found = rates(updates_per_epoch, **given)
        assert all(0 < rate <= 1 + 1e-9 for rate in found[1:])
        told = describe_decay(updates_per_epoch, 0.05, **options(**given).schedule)
        if sched in ('none', 'constant'):
            assert told is None
            assert found[-1] == pytest.approx(1)
        else:
            assert (told is None) == (2 * found[-1] <= max(found)), given
            if epochs >= 4 and updates_per_epoch > 1:
                assert (told is None) == (sched not in ('poly', 'multistep')), given


@pytest.mark.parametrize(
    ('given', 'updates'),
    [
        ({'sched': 'step'}, [6, 12, 18]),
        ({'sched': 'step', 'decay_epochs': 2}, [10]),
        ({'sched': 'step', 'decay_epochs': 0.5}, [10]),
        ({'sched': 'step', 'decay_epochs': 1}, [5, 10, 15]),
        # timm's comes an update early.
        ({'sched': 'multistep', 'decay_milestones': [1, 3]}, [4, 14]),
    ],
)
def test_decays_come_when_they_should(given, updates):
    found = rates(epochs=4, decay_rate=0.5, **given)
    assert [i for i in range(1, len(found)) if found[i] < found[i - 1]] == updates
    assert found[-1] == pytest.approx(0.5 ** len(updates))


@pytest.mark.parametrize(
    ('given', 'first'),
    [
        ({}, 16),
        ({'decay_epochs': 2}, 10),
        ({'decay_epochs': 0.5}, 10),
        ({'decay_epochs': 1}, 15),
        ({'decay_epochs': 4}, 0),
    ],
)
def test_the_decay_at_the_end_begins_when_it_should(given, first):
    found = rates(epochs=4, sched='wsd', **given)
    assert [i for i, rate in enumerate(found) if rate == pytest.approx(1)] == list(range(first + 1))
    assert found[first + 1 :] == sorted(found[first + 1 :], reverse=True)


@pytest.mark.parametrize(
    ('given', 'told'),
    [
        ({'sched': 'step', 'decay_epochs': 90}, 'sched=step never lowers .*decay_epochs=90.0'),
        ({'sched': 'step', 'decay_rate': 1.0}, 'sched=step never lowers .*decay_rate=1.0'),
        ({'sched': 'multistep'}, r'sched=multistep never lowers .*epochs=4, .*decay_milestones=\[150, 180, 210\]'),
        ({'sched': 'multistep', 'decay_milestones': []}, 'sched=multistep never lowers'),
        ({'min_lr': 0.05}, 'sched=cosine never lowers .*min_lr=0.05'),
        ({'warmup_epochs': 4}, 'sched=cosine never lowers .*warmup_epochs=4'),
        ({'sched': 'poly'}, r'sched=poly lowers the learning rate to 0.03\d only .*decay_rate=0.1'),
    ],
)
def test_a_schedule_that_cannot_decay_is_reported(given, told):
    line = describe_decay(5, 0.05, **options(epochs=4, **given).schedule)
    assert re.search(told, line), line
    assert '\n' not in line


def test_a_run_of_any_length_is_described_at_once():
    assert describe_decay(10**9, 0.05, **options(epochs=10**9).schedule) is None


def test_no_group_ends_or_starts_above_its_own_learning_rate():
    groups = [{'params': [torch.zeros(1)], 'lr': lr} for lr in (1e-3, 3e-4)]
    optimizer = torch.optim.SGD(groups, lr=1e-3)
    config = options(epochs=4, warmup_epochs=1, warmup_lr=0.04, min_lr=0.04)
    scheduler = create_scheduler(optimizer, 5, **config.schedule)
    for update in range(20):
        scheduler.step_update(update)
        assert optimizer.param_groups[0]['lr'] <= 1e-3 + 1e-12
        assert optimizer.param_groups[1]['lr'] == pytest.approx(3e-4)


# --- numbers


NUMBERS = [f.name for f in dataclasses.fields(TrainConfig) if kind_of(TrainConfig, f.name).item in (int, float)]


def test_every_number_has_a_lowest_value():
    fields = TrainConfig.__dataclass_fields__
    assert [name for name in NUMBERS if not {'low', 'above'} & set(fields[name].metadata)] == []


@pytest.mark.parametrize('value', ['.nan', '.inf', '-.inf', 'yes', 'many', '-7', '[[1]]', '{a: 1}'])
def test_no_number_may_be_this(value, tmp_path):
    for name in NUMBERS:
        (tmp_path / 'recipe.yaml').write_text(f'{name}: {value}')
        with pytest.raises(ValueError, match=f'^{name} must be ') as caught:
            options(**load_recipe(tmp_path / 'recipe.yaml'))
        assert '\n' not in str(caught.value)


def test_words_that_yaml_reads_as_booleans_are_the_choices_they_were(tmp_path):
    (tmp_path / 'recipe.yaml').write_text('cache_images: on\nmixed_precision: no\n')
    config = options(**load_recipe(tmp_path / 'recipe.yaml'))
    assert (config.cache_images, config.mixed_precision) == ('on', 'no')
    with pytest.raises(ValueError, match='^kd_loss must be str, got True'):
        options(**yaml.safe_load('kd_loss: on'))
    with pytest.raises(ValueError, match='^student_kwargs: drop_rate must be a finite number, got nan'):
        options(**yaml.safe_load('student_kwargs: {drop_rate: .nan}'))
