"""The study of foreign teachers: what its plan asks for, what a way does and costs, and what its records say."""
from __future__ import annotations

import datetime
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from benchmarks.foreign import report, run
from benchmarks.foreign.analysis import Study, welch
from benchmarks.foreign.data import training_only
from benchmarks.foreign.photos import split_photos, without_copies
from benchmarks.foreign.plan import PLAN_FILE, Cell, Plan
from benchmarks.foreign.power import power, seeds_for
from benchmarks.foreign.run import RECORDS, read_records

ROOT = Path(__file__).parents[2]
SIZE = 16
TINY = {'student': 'resnet18', 'student_kwargs': {'stem_type': 'deep', 'stem_width': 4, 'layers': [1, 1, 1, 1]}}
VALUES: dict[str, Any] = {
    'common': {'batch_size': 16, 'lr': 0.05, 'crop_padding': 2, 'checkpoint_hist': 1, 'cpu': True},
    'data': {
        name: {'dataset': name, 'input_size': [3, SIZE, SIZE], 'mean': [0.5] * 3, 'std': [0.25] * 3}
        for name in ('noise', 'other')
    },
    'models': {
        's': {**TINY, 'student_kwargs': {**TINY['student_kwargs'], 'channels': [4, 4, 8, 8]}},
        'm': {**TINY, 'student_kwargs': {**TINY['student_kwargs'], 'channels': [8, 8, 16, 16]}},
    },
    'teachers': {'foreign': {'data': 'other', 'model': 'm', 'epochs': 1, 'seed': 0}},
    'ways': {
        'alone': [{'method': 'supervised'}],
        'ft-kd': [{'do': 'fit', 'model': 'teacher'}, {'method': 'supervised', 'model': 'teacher', 'start': 'previous'},
                  {'method': 'kd', 'teacher': 'previous'}],
    },
    'regimes': {
        'tiny': {
            'about': 'Noise.',
            'data': 'noise',
            'teacher': 'foreign',
            'student': 's',
            'epochs': 2,
            'tune': {'seeds': [0], 'trials': {'alone': [{'lr': 0.1}, {'lr': 0.2}]}},
            'time': {'seeds': [0], 'share': 0.5},
            'final': {
                'seeds': [100, 101],
                'arms': {
                    'alone': {'tuned': ['alone']},
                    'ft-kd': {'way': 'ft-kd', 'options': [{}, {'epochs': 1}, {'temperature': 2}]},
                    'alone wd': {'tuned': ['alone'], 'options': {'weight_decay': 0.0}},
                },
                'primary': [['ft-kd', 'alone']],
            },
        }
    },
    'order': [
        {'phase': 'tune', 'regimes': ['tiny']}, {'phase': 'time', 'regimes': ['tiny']},
        {'phase': 'final', 'regimes': ['tiny'], 'seeds': 1}, {'phase': 'flops', 'regimes': ['tiny']},
    ],
}  # fmt: skip


def write_plan(folder: Path) -> Path:
    path = folder / 'plan.yaml'
    path.write_text(yaml.safe_dump(VALUES, sort_keys=False), encoding='utf-8')
    return path


def write_images(folder: Path, classes: list[str]) -> None:
    rng = np.random.default_rng(0)
    for split, count in (('train', 16), ('validation', 6), ('test', 6)):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
                image.save(folder / split / name / f'{i:02}.png')


@pytest.fixture(scope='module')
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was run to its end."""
    folder = tmp_path_factory.mktemp('foreign')
    for name, classes in (('noise', ['a', 'b', 'c']), ('other', ['d', 'e', 'f', 'g'])):
        write_images(folder / 'data' / name, classes)
        training_only(folder / 'data' / name, folder / 'data' / f'{name}-train')
    argv = ['--work', str(folder), '--plan', str(write_plan(folder)), '--records', str(folder / 'records')]
    assert run.main(argv) == 0
    return folder


def time_of(arm: str, *seconds: float) -> dict[str, Any]:
    """Record of the time of an arm in half of its epochs, a head fitted in the first of several stages."""
    epochs = [None, *([1] * (len(seconds) - 1))] if len(seconds) > 1 else [1]
    return {'regime': 'tiny', 'seed': 0, 'phase': 'time', 'arm': arm, 'cpu_s': list(seconds), 'epochs': epochs}


def trials_of(*values: float) -> list[dict[str, Any]]:
    """Records of the trials of training alone."""
    common = {'regime': 'tiny', 'seed': 0, 'phase': 'tune'}
    return [{**common, 'arm': f'alone:{i}', 'student_top1': value} for i, value in enumerate(values)]


def test_a_step_of_the_order_is_finished_seed_by_seed(tmp_path: Path) -> None:
    cells = list(Plan(write_plan(tmp_path), tmp_path).cells())
    assert [cell.arm for cell in cells] == ['alone:0', 'alone:1']
    cells = list(Plan(write_plan(tmp_path), tmp_path, trials_of(70.0, 60.0)).cells())[2:]
    assert [(cell.arm, cell.phase) for cell in cells] == [('alone', 'time'), ('alone', 'flops')]
    records = [*trials_of(70.0, 60.0), time_of('alone', 5.0)]
    cells = list(Plan(write_plan(tmp_path), tmp_path, records).cells())[3:-1]
    assert [cell.arm for cell in cells] == ['alone', 'ft-kd', 'alone wd']
    assert {cell.seed for cell in cells} == {100}


def test_finals_follow_from_tuning(tmp_path: Path) -> None:
    path = write_plan(tmp_path)
    values = yaml.safe_load(path.read_text(encoding='utf-8'))
    regime = values['regimes']['tiny']
    regime['tune']['trials']['ft-kd'] = [[{}, {'epochs': 3}, {}]]
    regime['final']['arms'] = {
        'alone': {'tuned': ['alone']}, 'ft-kd': {'tuned': ['ft-kd']},
        'alone =time': {'tuned': ['alone'], 'time': 'dearest'}, 'ft-kd =time': {'tuned': ['ft-kd'], 'time': 'dearest'},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(values), encoding='utf-8')
    records = trials_of(60.0, 70.0)
    assert not [cell for cell in Plan(path, tmp_path, records).cells() if cell.phase == 'final']
    records += [{**records[0], 'arm': 'ft-kd:0'}]
    assert not [cell for cell in Plan(path, tmp_path, records).cells() if cell.phase == 'final']
    records += [time_of('alone', 5.0), time_of('ft-kd', 1.0, 2.5, 12.0)]
    plan = Plan(path, tmp_path, records)
    # The dearest is not trained twice.
    assert {cell.arm for cell in plan.cells() if cell.phase == 'final'} == {'alone', 'ft-kd', 'alone =time'}
    alone, longer = (plan.stages(Cell('tiny', arm, 100, 'final'))[0].options for arm in ('alone', 'alone =time'))
    assert alone == {'method': 'supervised', 'lr': 0.2}
    # 30 seconds for 10, and so three times two epochs.
    assert longer == {**alone, 'epochs': 6}


def test_what_is_planned_can_be_trained() -> None:
    plan = Plan(PLAN_FILE, Path('/nowhere'))
    cells = list(plan.cells())
    assert cells
    for cell in cells:
        for stage in plan.stages(cell):
            if stage.do == 'train':
                plan.config(cell, stage, Path('/nowhere/run'), [Path(f'/nowhere/{i}') for i in range(4)])


def test_ways_of_a_regime_have_equal_numbers_of_trials() -> None:
    plan = Plan(PLAN_FILE, Path())
    for name, regime in plan.values['regimes'].items():
        trials: dict[str, int] = {}
        for way, given in regime.get('tune', {}).get('trials', {}).items():
            # With a fitted head and with a random one: two ways of fine-tuning, of which the better one is taken.
            family = way.replace('ft-head-kd', 'ft-kd')
            trials[family] = trials.get(family, 0) + len(given)
        assert len(set(trials.values())) <= 1, (name, trials)


@pytest.mark.slow
def test_every_way_is_recorded_with_what_it_costs(work: Path) -> None:
    records = {(r['arm'], r['seed']): r for r in read_records(work / 'records') if r['phase'] != 'flops'}
    found = {(r['arm'], r['seed']) for r in read_records(work / 'records')}
    assert found == {('alone:0', 0), ('alone:1', 0), ('alone', 0), ('alone', 100), ('ft-kd', 100), ('alone wd', 100)}
    assert 'test' not in records['alone:0', 0]['metrics']
    tuned = records['ft-kd', 100]
    assert tuned['epochs'] == [None, 1, 2]
    assert len(tuned['cpu_s']) == 3
    assert tuned['total_cpu_s'] == pytest.approx(sum(tuned['cpu_s']), abs=0.02)
    assert tuned['student_top1'] == tuned['metrics']['test']['student']['top1']
    assert tuned['teacher_top1'] is not None
    assert tuned['images'] == 48
    (counted,) = (r for r in read_records(work / 'records') if r['phase'] == 'flops')
    assert counted['flops'][0] > 1e6
    assert records['alone wd', 100]['stages'][0]['options']['weight_decay'] == 0


@pytest.mark.slow
def test_what_is_recorded_is_not_trained_again(work: Path, capsys: Any) -> None:
    before = (work / 'records' / 'tiny.jsonl').read_bytes()
    argv = ['--work', str(work), '--plan', str(work / 'plan.yaml'), '--records', str(work / 'records')]
    assert run.main(argv) == 0
    assert run.main([*argv, '--progress']) == 0
    assert '   3 of 3' in capsys.readouterr().out
    assert (work / 'records' / 'tiny.jsonl').read_bytes() == before
    assert not any((work / 'runs').iterdir())


@pytest.mark.slow
def test_a_run_sees_training_images_only(work: Path) -> None:
    seen = {path.read_bytes() for path in (work / 'data' / 'noise-train').rglob('*.png')}
    assert seen == {path.read_bytes() for path in (work / 'data' / 'noise' / 'train').rglob('*.png')}


@pytest.mark.slow
def test_the_page_is_made_from_records(work: Path, tmp_path: Path) -> None:
    argv = ['--plan', str(work / 'plan.yaml'), '--records', str(work / 'records'), '--document', str(tmp_path / 'a.md')]
    assert report.main([*argv, '--check']) == 1
    assert report.main(argv) == 0
    assert report.main([*argv, '--check']) == 0
    text = (tmp_path / 'a.md').read_text(encoding='utf-8')
    assert 'ft-kd - alone' in text
    # One seed is no interval.
    assert '| ft-kd - alone | - |' in text
    assert (tmp_path / 'results' / report.PLOT).is_file()


def test_flops_of_a_way_are_those_of_all_of_its_epochs() -> None:
    def record(arm: str, phase: str, epochs: list[int | None], flops: list[int]) -> dict[str, Any]:
        return {'regime': 'tiny', 'arm': arm, 'seed': 0, 'phase': phase, 'epochs': epochs, 'flops': flops}

    records = [
        record('alone', 'flops', [2], [20]), record('alone', 'final', [4], []),
        record('ft-kd', 'flops', [None, 1, 2], [7, 30, 40]), record('ft-kd', 'final', [None, 3, 4], []),
        record('ft-kd =time', 'final', [None, 3, 8], []),
    ]
    plan = plan_of(yaml.safe_dump(VALUES))
    arms = plan.values['regimes']['tiny']['final']['arms']
    arms |= {'ft-kd': {'tuned': ['ft-kd']}, 'ft-kd =time': {'tuned': ['ft-kd'], 'time': 'dearest'}}
    study = Study(plan, records)
    # 10 an epoch alone; 7 for the head, 30 an epoch of fine-tuning, 20 an epoch of KD.
    assert study.flops('tiny', 'alone') == 1
    assert study.flops('tiny', 'ft-kd') == (7 + 90 + 80) / 40
    assert study.flops('tiny', 'ft-kd =time') == (7 + 90 + 160) / 40
    assert study.flops('tiny', 'alone wd') is None


def test_welchs_interval() -> None:
    # By hand: variances 1 and 4 of three and four values, degrees (1/3 + 1)^2 / ((1/3)^2 / 2 + 1^2 / 3) = 4.57, taken
    # as 4, whose 97.5% quantile is 2.776445.
    found = welch([9.0, 10.0, 11.0], [3.0, 5.0, 5.0 + 2 * math.sqrt(2) - 2, 5.0])
    assert found is not None
    ones, others = np.array([9.0, 10.0, 11.0]), np.array([3.0, 5.0, 3.0 + 2 * math.sqrt(2), 5.0])
    parts = ones.var(ddof=1) / 3, others.var(ddof=1) / 4
    degrees = math.floor(sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 3))
    quantile = {3: 3.182446, 4: 2.776445, 5: 2.570582}[degrees]
    half = quantile * math.sqrt(sum(parts))
    assert found['mean'] == pytest.approx(ones.mean() - others.mean())
    assert found['interval'] == pytest.approx([found['mean'] - half, found['mean'] + half], abs=1e-4)
    assert welch([1.0], [1.0, 2.0]) is None


def test_power_by_simulation() -> None:
    rng = np.random.default_rng(0)
    seeds, difference, sd = 10, 0.5, 0.4
    ones, others = rng.normal(difference, sd, (4000, seeds)), rng.normal(0, sd, (4000, seeds))
    error = np.sqrt(ones.var(1, ddof=1) / seeds + others.var(1, ddof=1) / seeds)
    found = (np.abs(ones.mean(1) - others.mean(1)) / error > 2.1009).mean()
    assert power(difference, sd, seeds) == pytest.approx(found, abs=0.03)
    assert power(difference, sd, seeds_for(difference, sd)) >= 0.8


def test_photographs_are_split_without_copies(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = []
    for i in range(11):
        paths.append(tmp_path / f'{i}.png')
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((32, 32)).save(paths[-1])
    copy = tmp_path / 'copy.png'
    copy.write_bytes(paths[0].read_bytes())
    kept = without_copies({'some': [*paths, copy], 'few': paths[:1]})
    assert kept == {'some': paths}
    split_photos(kept, tmp_path / 'out', 3, 'test')
    halves = [{file.name for file in (tmp_path / 'out' / split / 'some').iterdir()} for split in ('train', 'test')]
    assert [len(half) for half in halves] == [5, 6]
    assert not halves[0] & halves[1]


def test_the_plan_is_older_than_the_records() -> None:
    finals = [record for record in read_records(RECORDS) if record['phase'] == 'final']
    plan = Plan(PLAN_FILE, Path())
    for record in finals:
        assert record['plan'] == plan.digest(record['regime']), 'arms or contrasts were changed after their records'
    git = ['git', '-C', str(ROOT), 'log', '--format=%H %aI', '--', 'benchmarks/foreign/plan.yaml']
    if not finals or not (ROOT / '.git').exists():
        return
    lines = subprocess.run(git, capture_output=True, text=True, check=True).stdout.split('\n')
    written: dict[str, datetime.datetime] = {}
    for line in filter(None, reversed(lines)):
        commit, date = line.split()
        show = ['git', '-C', str(ROOT), 'show', f'{commit}:benchmarks/foreign/plan.yaml']
        old = plan_of(subprocess.run(show, capture_output=True, text=True, check=True).stdout)
        for regime in {record['regime'] for record in finals} & set(old.values['regimes']):
            written.setdefault(f'{regime} {old.digest(regime)}', datetime.datetime.fromisoformat(date))
    for record in finals:
        when = written[f'{record["regime"]} {record["plan"]}']
        assert when < datetime.datetime.fromisoformat(record['date']), record['arm']


def plan_of(text: str) -> Plan:
    plan = Plan.__new__(Plan)
    plan.values, plan.work = yaml.safe_load(text), Path()
    return plan


def test_records_are_of_planned_students_and_say_where_they_are_from() -> None:
    records = read_records(RECORDS)
    plan = Plan(PLAN_FILE, Path(), records)
    Study(plan, records)
    for record in records:
        cell = Cell(record['regime'], record['arm'], record['seed'], record['phase'])
        stages = [
            {key: value for key, value in vars(stage).items() if value} for stage in plan.stages(cell)
        ]
        assert json.loads(json.dumps(stages)) == record['stages'], cell
        assert record['machine']['threads'] == 1
        assert record['versions']['torch'].split('.')[0] == torch.__version__.split('.')[0]
        seen = list(record['metrics'])
        assert seen == {'tune': ['val'], 'time': [], 'flops': []}.get(record['phase'], seen)


def test_the_page_is_up_to_date() -> None:
    assert report.main(['--check']) == 0
