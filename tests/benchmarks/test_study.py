from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from benchmarks.study import report, run
from benchmarks.study.analysis import Study
from benchmarks.study.plan import PLAN_FILE, Cell, Plan
from timm_dfpt.job.options import TrainConfig
from timm_dfpt.training.compare import compare

SIZE = 16
TINY = {'stem_type': 'deep', 'stem_width': 4, 'layers': [1, 1, 1, 1]}
VALUES: dict[str, Any] = {
    'common': {
        'student': 'resnet18', 'batch_size': 16, 'lr': 0.05, 'crop_padding': 2, 'checkpoint_hist': 1, 'cpu': True,
    },
    'data': {
        'noise': {'dataset': 'noise', 'input_size': [3, SIZE, SIZE], 'mean': [0.5] * 3, 'std': [0.25] * 3},
    },
    'models': {'s': {**TINY, 'channels': [4, 4, 8, 8]}, 'l': {**TINY, 'channels': [8, 8, 16, 16]}},
    'teachers': {'big': {'data': 'noise', 'model': 'l', 'epochs': 1}},
    'arms': {
        'scratch': {'method': 'supervised'},
        'kd': {'method': 'kd', 'temperature': 4},
        'takd': {'method': 'takd', 'assistants': ['big']},
        'dfpt': {'method': 'dfpt'},
    },
    'regimes': {
        'tiny': {
            'data': 'noise',
            'teacher': 'big',
            'student': 's',
            'epochs': 2,
            'val_interval': 1,
            'tune': {'seeds': [0], 'trials': {'kd': [{'temperature': 2}, {'distill_loss_weight': 8}]}},
            'final': {
                'seeds': [100, 101],
                'arms': {
                    'kd': {'temperature': 2},
                    'dfpt': {'prompt_student_weight': 0.5},
                    'dfpt b=0': {'prompt_student_weight': 0.0},
                    'kd-time': {'method': 'kd', 'temperature': 2, 'longer': 2.3},
                    'takd': None,
                },
            },
        }
    },
}  # fmt: skip


def plan_of(folder: Path, **regime: Any) -> Plan:
    """The plan above, with changes of its regime."""
    values = copy.deepcopy(VALUES)
    values['regimes']['tiny'] |= regime
    path = folder / 'plan.yaml'
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding='utf-8')
    return Plan(path, folder)


def record_of(arm: str, seed: int, value: float, phase: str = 'final', **changes: Any) -> dict[str, Any]:
    """What a run of the plan above might have left."""
    options = VALUES['arms'].get(arm.partition(':')[0].split()[0], {'method': 'kd'})
    who = {'top1': value, 'entropy': 1.5, 'confidence': 0.5, 'loss': 1.0}
    models = {'student': who, 'teacher': {**who, 'top1': 90.0, 'kl_to_student': 0.5}}
    if options['method'] == 'dfpt':
        models['prompt_path'] = {**who, 'top1': 91.0, 'kl_to_student': 0.25}
    train = {'student_prompt_loss': 1.0, 'student_teacher_loss': 2.0} if 'prompt_path' in models else {'kd_loss': 1.0}
    return {
        'regime': 'tiny', 'arm': arm, 'seed': seed, 'phase': phase, 'epochs': 2,
        'val_top1': value - 1, 'test_top1': value if phase == 'final' else None, 'train_top1': 99.0,
        'prompt_top1': 91.0 if 'prompt_path' in models else None, 'wall_s': 10.0, 'flops': 100, 'cpu_s': 36.0,
        'config': options, 'metrics': {'train': {'student': who}, 'val': models, 'test': models},
        'curve': [{'epoch': epoch, 'train': train, 'val': models} for epoch in (1, 2)], **changes,
    }  # fmt: skip


def three_seeds(**values: list[float]) -> list[dict[str, Any]]:
    return [record_of(arm, seed, value) for arm, row in values.items() for seed, value in enumerate(row)]


# --- the plan


def test_a_trial_has_the_options_of_its_arm_and_its_own(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    arm, longer = plan.arm(Cell('tiny', 'kd:1', 0, 'tune'))
    assert (arm.name, arm.method, longer) == ('kd.1', 'kd', 1.0)
    assert arm.changes == {'temperature': 4, 'distill_loss_weight': 8}
    assert plan.arm(Cell('tiny', 'kd:0', 0, 'tune'))[0].changes == {'temperature': 2}


def test_a_final_arm_has_the_options_of_its_regime(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert plan.arm(Cell('tiny', 'kd', 100, 'final'))[0].changes == {'temperature': 2}
    arm, longer = plan.arm(Cell('tiny', 'kd-time', 100, 'final'))
    assert (arm.method, arm.changes, longer) == ('kd', {'temperature': 2}, 2.3)
    assert plan.config(Cell('tiny', 'kd-time', 100, 'final'), tmp_path).epochs == 5
    assert plan.config(Cell('tiny', 'kd', 100, 'final'), tmp_path).epochs == 2
    folder = f'local-dir:{tmp_path}/teachers/big/student'
    takd = Cell('tiny', 'takd', 100, 'final')
    (assistant,) = plan.assistants(takd)
    assert (assistant.method, assistant.student, assistant.teacher) == ('kd', folder, folder)
    arm, _ = plan.arm(takd)
    assert (arm.method, arm.changes) == ('kd', {'teacher': f'local-dir:{assistant.output}/student'})


def test_a_variant_has_the_options_of_the_arm_it_varies(tmp_path: Path) -> None:
    final = {'seeds': [100], 'arms': {'dfpt': {'temperature': 3, 'prompt_student_weight': 0.5}, 'dfpt b=0': None}}
    final['arms']['dfpt b=0'] = {'prompt_student_weight': 0.0}
    arm, _ = plan_of(tmp_path, final=final).arm(Cell('tiny', 'dfpt b=0', 100, 'final'))
    assert (arm.name, arm.method) == ('dfpt.b.0', 'dfpt')
    assert arm.changes == {'temperature': 3, 'prompt_student_weight': 0.0}


def test_every_cell_of_the_study_is_a_valid_run(tmp_path: Path) -> None:
    plan = Plan(PLAN_FILE, tmp_path)
    assert len(set(plan.cells())) == len(list(plan.cells()))
    cells = [cell for cell in plan.cells() if not plan.is_retired(cell)]
    for cell in {(cell.regime, cell.phase, cell.arm): cell for cell in cells}.values():
        config = plan.config(cell, tmp_path)
        arm, longer = plan.arm(cell)
        own = config.for_method(arm.method, **arm.changes)
        assert isinstance(own, TrainConfig)
        assert (own.method, own.seed) == (arm.method, cell.seed)
        assert own.epochs == round(plan.values['regimes'][cell.regime]['epochs'] * longer)
    # Names of runs that are trained together are names of folders.
    for group in run._missing(plan, tmp_path).values():
        assert len({plan.arm(cell)[0].name for cell in group}) == len(group)


def test_retired_arms_are_listed_and_not_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    final = {'seeds': [100], 'arms': {'kd': None, 'kd old': {'gone': 1, 'retired': True}}}
    plan = plan_of(tmp_path, final=final)
    cell = Cell('tiny', 'kd old', 100, 'final')
    assert cell in plan.cells()
    assert plan.options(cell) == {'method': 'kd', 'temperature': 4, 'gone': 1}
    assert not any(cell in group for group in run._missing(plan, tmp_path).values())
    again = ['--regime', 'tiny', '--arm', 'kd old', '--seed', '100', '--plan', str(tmp_path / 'plan.yaml')]
    with pytest.raises(SystemExit):
        run.main([*again, '--work', str(tmp_path)])
    assert 'train it at the commit that its record names' in capsys.readouterr().err


def test_no_image_is_chosen_from_and_reported_on(tmp_path: Path) -> None:
    # What is chosen with a seed is not reported with it.
    for regime in Plan(PLAN_FILE, tmp_path).values['regimes'].values():
        assert not {*regime.get('tune', {}).get('seeds', ())} & {*regime.get('final', {}).get('seeds', ())}


# --- what is trained together


def test_students_of_another_length_seed_or_phase_are_not_in_one_group(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    groups = list(run._missing(plan, tmp_path).values())
    assert sorted(cell.key for group in groups for cell in group) == sorted(cell.key for cell in plan.cells())
    for group in groups:
        assert len({(cell.regime, cell.phase, cell.seed) for cell in group}) == 1
        assert len({plan.config(cell, tmp_path).epochs for cell in group}) == 1
    assert [len(group) for group in groups] == [2, 4, 1, 4, 1]


def test_what_is_recorded_is_not_trained_again(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    record = record_of('kd', 100, 50.0)
    (tmp_path / 'tiny.jsonl').write_text(json.dumps(record) + '\n', encoding='utf-8')
    left = [cell for group in run._missing(plan, tmp_path).values() for cell in group]
    assert set(plan.cells()) - set(left) == {Cell('tiny', 'kd', 100, 'final')}


# --- a study from data to document


@dataclasses.dataclass(frozen=True)
class Mini:
    """A study that was really run: scratch is left out, the dual path is in."""

    plan: Path
    work: Path
    results: Path

    @property
    def argv(self) -> list[str]:
        return ['--plan', str(self.plan), '--work', str(self.work), '--results', str(self.results)]


@pytest.fixture(scope='module')
def mini(tmp_path_factory: pytest.TempPathFactory) -> Mini:
    folder = tmp_path_factory.mktemp('study')
    rng = np.random.default_rng(0)
    for split, count in (('train', 16), ('validation', 5), ('test', 7)):
        for label in range(3):
            images = folder / 'data' / 'noise' / split / 'abc'[label]
            images.mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(128, 50, (SIZE, SIZE, 3))
                pixels[:, :, label] += 40
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(images / f'{i}.png')
    final = {'seeds': [100, 101], 'arms': {'kd': {'temperature': 2}, 'dfpt': {'prompt_lr': 0.01}}}
    tune = {'seeds': [0], 'trials': {'kd': [{'temperature': 2}]}}
    plan_of(folder, tune=tune, final=final)
    mini = Mini(folder / 'plan.yaml', folder, folder / 'results')
    threads = torch.get_num_threads()
    try:
        assert run.main(mini.argv) == 0
    finally:
        torch.set_num_threads(threads)
    return mini


@pytest.mark.slow
def test_every_student_is_recorded(mini: Mini) -> None:
    records = run.read_records(mini.results)
    assert {(r['arm'], r['seed'], r['phase']) for r in records} == {
        ('kd:0', 0, 'tune'), ('kd', 100, 'final'), ('dfpt', 100, 'final'), ('kd', 101, 'final'), ('dfpt', 101, 'final'),
    }  # fmt: skip
    for record in records:
        # Images of a class are 5 to validate and 7 to test on: so are the shares that can come out.
        whole = {'val_top1': 15, 'test_top1': 21, 'train_top1': 48}
        for key, count in whole.items():
            if record[key] is not None:
                assert record[key] * count / 100 == pytest.approx(round(record[key] * count / 100), abs=1e-3)
        assert [point['epoch'] for point in record['curve']] == [1, 2]
        assert record['curve'][-1]['val']['student']['top1'] == pytest.approx(record['val_top1'], abs=1e-4)
        assert record['flops'] > 0
        assert str(mini.work) not in json.dumps(record)
    assert not list((mini.work / 'runs').iterdir())
    assert not list((mini.work / 'claims').iterdir())


@pytest.mark.slow
def test_a_tuning_run_has_no_test_numbers(mini: Mini) -> None:
    by_phase = {record['phase']: record for record in run.read_records(mini.results)}
    assert by_phase['tune']['test_top1'] is None
    assert set(by_phase['tune']['metrics']) == {'train', 'val'}
    assert by_phase['final']['test_top1'] is not None
    assert set(by_phase['final']['metrics']) == {'train', 'val', 'test'}


@pytest.mark.slow
def test_nothing_is_run_twice(mini: Mini) -> None:
    before = {path: path.stat().st_mtime_ns for path in mini.results.iterdir()}
    assert run.main(mini.argv) == 0
    assert {path: path.stat().st_mtime_ns for path in mini.results.iterdir()} == before


@pytest.mark.slow
def test_a_student_alone_is_the_one_that_is_recorded(mini: Mini, tmp_path: Path, capsys: Any) -> None:
    single = ['--regime', 'tiny', '--arm', 'dfpt', '--seed', '101']
    assert run.main([*mini.argv, *single]) == 0
    assert 'as recorded' in capsys.readouterr().out
    records = run.read_records(mini.results)
    for record in records:
        record['val_top1'] += 1
    changed = dataclasses.replace(mini, results=tmp_path)
    (tmp_path / 'tiny.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records), encoding='utf-8')
    assert run.main([*changed.argv, *single]) == 1
    assert 'as recorded' not in capsys.readouterr().out


@pytest.mark.slow
def test_what_was_interrupted_goes_on(mini: Mini, tmp_path: Path) -> None:
    plan = Plan(mini.plan, mini.work)
    cells = [cell for cell in plan.cells() if cell.seed == 101]
    folder = tmp_path / 'run'
    # All was trained, and then something went wrong.
    compare(plan.config(cells[0], folder), [plan.arm(cell)[0] for cell in cells], [101])
    (folder / 'spent.json').write_text('{"cpu_s": 1000, "elapsed_s": 2000}', encoding='utf-8')
    trained = (folder / 'seed-101' / 'summary.json').stat().st_mtime_ns
    records = run.train_students(plan, cells, folder)
    assert (folder / 'seed-101' / 'summary.json').stat().st_mtime_ns == trained
    by_arm = {r['arm']: r for r in run.read_records(mini.results) if r['seed'] == 101}
    for record in records:
        assert record['metrics'] == by_arm[record['arm']]['metrics']
        assert 500 < record['cpu_s'] < 600
        assert 1000 < record['elapsed_s'] < 1100


@pytest.mark.slow
def test_the_report_tells_what_was_run(mini: Mini, tmp_path: Path, capsys: Any) -> None:
    document = tmp_path / 'RESULTS.md'
    document.write_text('# Results\n', encoding='utf-8')
    argv = ['--plan', str(mini.plan), '--results', str(mini.results), '--document', str(document)]
    assert report.main([*argv, '--check']) == 1
    assert report.main(argv) == 0
    assert report.main([*argv, '--check']) == 0
    text = document.read_text(encoding='utf-8')
    values = {(r['arm'], r['seed']): r['test_top1'] for r in run.read_records(mini.results)}
    difference = np.mean([values['dfpt', seed] - values['kd', seed] for seed in (100, 101)])
    assert f'{difference:+.2f} [' in text
    assert '5 runs: 1 to tune' in text
    assert {path.name for path in (tmp_path / 'results').iterdir()} == {'differences.png', 'inside-tiny.png'}
    # The dual path was not tuned; KD has the options of its only trial.
    assert 'other options than tuning' not in capsys.readouterr().out


# --- the report, on records with known numbers


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    study = Study(plan_of(tmp_path), three_seeds(kd=[50, 60, 70], dfpt=[51, 61.5, 72.5]))
    found = study.difference('tiny', 'dfpt', 'kd')
    assert found is not None
    # Differences 1, 1.5, 2.5; the 97.5% quantile of t with 2 degrees of freedom is 4.302653.
    values = np.array([1, 1.5, 2.5])
    half = 4.302653 * values.std(ddof=1) / np.sqrt(3)
    assert found['mean'] == pytest.approx(values.mean())
    assert found['interval'] == pytest.approx([values.mean() - half, values.mean() + half], abs=1e-4)
    assert (found['n'], found['wins']) == (3, 3)
    assert f'| +1.67 [{5 / 3 - half:+.2f}, {5 / 3 + half:+.2f}] | 3/3 |' in report.blocks(study)['main']


def test_only_seeds_of_both_arms_count(tmp_path: Path) -> None:
    records = three_seeds(kd=[50, 60, 70], dfpt=[49, 61])
    found = Study(plan_of(tmp_path), records[::-1]).difference('tiny', 'dfpt', 'kd')
    assert found is not None
    assert (found['values'], found['n'], found['wins']) == ([-1, 1], 2, 1)
    assert Study(plan_of(tmp_path), records).difference('tiny', 'dfpt+', 'kd') is None


def test_a_variant_is_held_against_what_it_varies(tmp_path: Path) -> None:
    records = three_seeds(**{'kd': [50, 60, 70], 'dfpt': [51, 62, 73], 'dfpt b=0': [50, 61, 72]})
    study = Study(plan_of(tmp_path), records)
    assert study.base('tiny', 'dfpt b=0') == 'dfpt'
    assert study.base('tiny', 'dfpt') is study.base('tiny', 'kd') is None
    assert 'dfpt: -1.00 [-1.00, -1.00]' in report.blocks(study)['final tiny']


def test_an_arm_may_be_in_a_regime_of_the_same_set_up(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    regimes = plan.values['regimes']
    regimes['more'] = {**regimes['tiny'], 'val_interval': 2}
    regimes['longer'] = {**regimes['tiny'], 'epochs': 3}
    records = three_seeds(kd=[50, 60, 70])
    for regime in ('more', 'longer'):
        records += [record_of('dfpt', seed, 80.0, regime=regime) for seed in (1, 2)]
    study = Study(plan, records)
    found = study.difference('more', 'dfpt', 'kd')
    assert found is not None
    assert found['values'] == [20, 10]
    assert study.difference('longer', 'dfpt', 'kd') is None


def test_kd_that_costs_more_is_what_the_dual_path_is_held_against(tmp_path: Path) -> None:
    records = three_seeds(kd=[50, 60, 70], dfpt=[52, 62, 72])
    records += [record_of('kd-time', seed, 51.0 + 10 * seed, epochs=5) for seed in range(3)]
    # The same length, so no other price.
    records += [record_of('kd-T1', seed, 51.0) for seed in range(3)]
    records += [record_of('kd-tuned', seed, 51.0, config={'method': 'kd', 'teacher': 'tuned'}) for seed in range(3)]
    study = Study(plan_of(tmp_path), records)
    assert study.dearer_kd('tiny') == ['kd-time', 'kd-tuned']
    assert '| tiny, kd-time | +1.00 [+1.00, +1.00] | 3/3 | - | - |' in report.blocks(study)['main']


def test_costs_are_relative_to_kd(tmp_path: Path) -> None:
    records = three_seeds(kd=[50, 60, 70])
    records += [record_of('dfpt', seed, 50.0, wall_s=wall, flops=230) for seed, wall in enumerate((20, 30, 99))]
    study = Study(plan_of(tmp_path), records)
    assert study.ratio('tiny', 'dfpt', 'wall_s') == 3
    assert study.ratio('tiny', 'dfpt', 'flops') == 2.3


def test_the_best_trial_on_validation_images_is_chosen(tmp_path: Path) -> None:
    trials = {'kd:0': [50, 60], 'kd:1': [56, 54], 'kd:2': [54, 56], 'kd:3': [99]}
    records = [record_of(a, seed, v, 'tune') for a, row in trials.items() for seed, v in enumerate(row)]
    # Means of 55, three times: the first. The last lacks a seed.
    assert Study(plan_of(tmp_path), records).chosen('tiny') == {'kd': 'kd:0'}
    records[2]['val_top1'] += 0.1
    assert Study(plan_of(tmp_path), records).chosen('tiny') == {'kd': 'kd:1'}


def test_a_final_arm_with_options_that_tuning_did_not_choose_is_told(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    values = {'kd:0': 40.0, 'kd:1': 50.0}
    records = [
        record_of(arm, 0, value, 'tune', config={'method': 'kd', **plan.options(Cell('tiny', arm, 0, 'tune'))})
        for arm, value in values.items()
    ]
    # The plan's final KD has the temperature of the first trial; the second did better.
    wrong = 'temperature=2, not 4, distill_loss_weight=default, not 8'
    assert Study(plan, records).not_as_tuned('tiny') == [f'kd: {wrong}', f'kd-time: {wrong}']
    records[0]['val_top1'] = 60.0
    assert Study(plan, records).not_as_tuned('tiny') == []
    records.append(record_of('kd', 100, 50.0, config={'method': 'kd', 'temperature': 3}))
    assert '- kd: temperature=3, not 2' in report.blocks(Study(plan, records))['tuning tiny']


def test_records_that_the_plan_does_not_ask_for_are_told(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    records = [
        record_of('kd', 100, 50.0, config={'method': 'kd', 'temperature': 2}),
        record_of('kd', 101, 50.0, config={'method': 'kd', 'temperature': 8}),
        record_of('kd', 102, 50.0, config={'method': 'kd', 'temperature': 2}),
        # As the runner once wrote it.
        record_of('takd', 100, 50.0, config={'method': 'takd', 'assistants': ['local-dir:/x/teachers/big/student']}),
    ]
    assert Study(plan, records).unplanned() == [
        'tiny, final, kd: temperature=8, not 2 in the plan',
        'tiny, final, kd, seed 102: not in the plan',
    ]


def test_a_run_that_is_recorded_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"arm='kd', seed=0.*recorded twice"):
        Study(plan_of(tmp_path), three_seeds(kd=[50]) * 2)


def test_prose_stays_and_blocks_change() -> None:
    document = '# A\n\n<!-- begin main -->\nold\n<!-- end main -->\n\nprose\n'
    texts = {'main': 'new', 'summary': 'all of it'}
    after = report.rewrite(document, texts)
    assert after.startswith('# A\n\n<!-- begin main -->\n\nnew\n\n<!-- end main -->\n\nprose\n')
    assert 'all of it' in after
    assert 'old' not in after
    assert report.rewrite(after, texts) == after
    with pytest.raises(ValueError, match="block 'mian'"):
        report.rewrite(document.replace('main', 'mian'), texts)
    with pytest.raises(ValueError, match='twice'):
        report.rewrite(document * 2, texts)


def test_a_changed_block_is_found(tmp_path: Path, capsys: Any) -> None:
    plan_of(tmp_path)
    (tmp_path / 'results').mkdir()
    records = three_seeds(kd=[50, 60, 70], dfpt=[51, 62, 73])
    (tmp_path / 'results' / 'tiny.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records), encoding='utf-8')
    document = tmp_path / 'docs' / 'RESULTS.md'
    document.parent.mkdir()
    document.write_text('# Results\n', encoding='utf-8')
    argv = ['--plan', str(tmp_path / 'plan.yaml'), '--results', str(tmp_path / 'results'), '--document', str(document)]
    assert report.main(argv) == 0
    assert report.main([*argv, '--check']) == 0
    text = document.read_text(encoding='utf-8')
    document.write_text(text.replace('+2.00', '+3.00', 1), encoding='utf-8')
    assert report.main([*argv, '--check']) == 1
    assert 'main is not what the records give' in capsys.readouterr().out
    # Prose is nobody's but its author's.
    document.write_text(text + 'prose\n', encoding='utf-8')
    assert report.main([*argv, '--check']) == 0
    shutil.rmtree(document.parent / 'results')
    assert report.main([*argv, '--check']) == 1


def test_equal_records_give_equal_plots(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    plan.values['regimes']['other'] = {**plan.values['regimes']['tiny'], 'student': 'l'}
    arms = {'scratch': 0.0, 'kd': 1.0, 'dfpt': 2.0, 'dfpt b=0': 1.5, 'dfpt c=0': 1.0}
    records = [record_of(arm, s, 50 + s + value) for arm, value in arms.items() for s in range(3)]
    records += [record_of('kd-time', seed, 52.0, epochs=5, wall_s=23.0) for seed in range(3)]
    records += [record_of(a, s, 60 + s, regime='other') for a in ('scratch', 'kd', 'dfpt') for s in range(3)]
    drawn = report.figures(Study(plan, records))
    assert set(drawn) == {
        'differences.png', 'gap.png', 'cost.png', 'variants-tiny.png', 'inside-tiny.png', 'inside-other.png',
    }  # fmt: skip
    for name, figure in drawn.items():
        figure.save(tmp_path / name)
        assert 3_000 < (tmp_path / name).stat().st_size < 80_000
    for name in ('differences.png', 'variants-tiny.png'):
        drawn[name].save(tmp_path / 'again.png')
        assert (tmp_path / 'again.png').read_bytes() == (tmp_path / name).read_bytes()


def test_the_document_is_what_the_records_give() -> None:
    assert report.main(['--check']) == 0
