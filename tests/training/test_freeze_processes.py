"""The freeze of the prompt path in whole jobs: killed around it, in several processes, sharded and compiled."""
import functools
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_processes import RELATIVE, WEIGHTS, lines
from test_resume import SWEEP, Runs, survive
from test_sharded import ALL, FSDP

from tests.jobs import Job
from timm_dfpt.tasks.dfpt import DFPTDistillationTask
from timm_dfpt.training.run import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
FREEZE = ('--prompt-epochs', '1')
STEPS = 6
"""Of an epoch of the tiny job."""


def paths_of(run):
    """What the checkpoints of a run have of the prompt path, by step."""
    found = {}
    for folder in (run / 'checkpoints').glob('step-*'):
        tensors = load_file(folder / 'model.safetensors')
        found[int(folder.name[5:])] = {k: v for k, v in tensors.items() if k.startswith('prompt_path.')}
    return found


def assert_frozen(run):
    paths = paths_of(run)
    assert {STEPS, 3 * STEPS} <= paths.keys()
    for step, path in paths.items():
        same = all(torch.equal(path[name], value) for name, value in paths[STEPS].items())
        assert same == (step >= STEPS), step


@pytest.mark.parametrize('processes', [1, 2])
def test_killed_around_the_freeze(tiny, tmp_path, processes):
    runs = Runs(tiny, tmp_path, *FREEZE, '--method', 'dfpt+', '--prompt-norms', 'own')
    places = survive(runs, processes, tmp_path, 10, seed=processes, phases=SWEEP)
    print(f'{processes} processes: survived {len(places)} of {len(places)} kills, in: {" ".join(places)}')


def test_killed_with_kept_logits(tiny, tmp_path):
    runs = Runs(tiny, tmp_path, *FREEZE, '--mixup', '0', '--aug-cycle', '1')
    cache = ('--cache-teacher', '--teacher-cache-dir', str(tmp_path / 'cache'))
    survive(runs, 1, tmp_path, 10, seed=3, phases=SWEEP, more=cache)


@pytest.mark.parametrize('accumulate', ['1', '4'])
def test_processes_and_shards_train_like_one(tiny, tmp_path, accumulate):
    """Of the six steps of an epoch, two are left for the last update of the path."""
    more = [*FREEZE, '--baselines', 'kd', '--clip-grad', '1', '--model-ema', '--checkpoint-hist', '9']
    runs = {'one': (1, {}), 'two': (2, {}), 'sharded': (2, FSDP)}
    for name, (processes, environment) in runs.items():
        argv = tiny.vit_argv(tmp_path / name, *more, '--grad-accum-steps', accumulate)
        job = Job(argv, tmp_path / f'{name}.log', processes, environment=environment)
        assert job.wait() == [0] * processes, job.output()
        assert_frozen(tmp_path / name)
    for name in ('two', 'sharded'):
        for a, b in zip(lines(tmp_path / 'one'), lines(tmp_path / name), strict=True):
            assert a.keys() == b.keys()
            off = {key: abs(a[key] - b[key]) / max(abs(a[key]), 1e-2) for key in a if 'top1' not in key}
            assert max(off.values()) < RELATIVE, max(off.items(), key=lambda item: item[1])
        for file in ALL:
            one, other = (load_file(tmp_path / each / file) for each in ('one', name))
            off = {key: float((one[key] - other[key]).abs().max()) for key in one}
            print(f'{name}, {file}: {max(off.values()):.1e}')
            assert max(off.values()) < WEIGHTS


@pytest.mark.parametrize('environment', [{}, FSDP], ids=['copies', 'shards'])
def test_three_processes_leave_the_statistics_alone(tiny, tmp_path, environment):
    """A mean of three equal numbers need not be that number."""
    argv = tiny.argv(tmp_path / 'run', *FREEZE, '--batch-size', '30', '--mixup', '0', '--checkpoint-hist', '9')
    job = Job([*argv, '--epochs', '3'], tmp_path / 'log', 3, environment=environment)
    assert job.wait() == [0] * 3, job.output()
    paths = paths_of(tmp_path / 'run')
    assert len(paths) == 3
    first, *others = (paths[step] for step in sorted(paths))
    assert all(torch.equal(value, other[name]) for other in others for name, value in first.items())


def test_a_sharded_run_is_stopped_on_either_side(tiny, tmp_path):
    """And goes on with one process, or from one, to the same end."""
    more = [*FREEZE, '--baselines', 'kd', '--checkpoint-steps', '2', '--checkpoint-hist', '20']
    whole = tmp_path / 'whole'
    job = Job(tiny.vit_argv(whole, *more), tmp_path / 'log', 2, environment=FSDP)
    assert job.wait() == [0, 0], job.output()
    for step in (4, STEPS, STEPS + 2):
        for processes, environment in ((2, FSDP), (1, {}), (2, {})):
            run = tmp_path / f'{step}-{processes}-{len(environment)}'
            shutil.copytree(whole, run)
            for folder in (run / 'checkpoints').glob('step-*'):
                if int(folder.name[5:]) > step:
                    shutil.rmtree(folder)
            (run / 'summary.json').unlink()
            job = Job([*tiny.vit_argv(run, *more), '--resume'], tmp_path / 'log', processes, environment=environment)
            assert job.wait() == [0] * processes, job.output()
            for file in ALL:
                one, other = (load_file(each / file) for each in (whole, run))
                off = max(float((one[key] - other[key]).abs().max()) for key in one)
                assert off == 0 if environment == FSDP else off < WEIGHTS, (step, processes, file, off)


def test_compiled_across_the_freeze(tiny, tmp_path, monkeypatch, fresh_accelerate):
    """As one graph before and after it, resumed on either side to the same bits."""
    compile_task = DFPTDistillationTask.compile
    monkeypatch.setattr(
        DFPTDistillationTask, 'compile', functools.partialmethod(compile_task, backend='aot_eager', fullgraph=True)
    )
    counters = torch._dynamo.utils.counters

    def go(folder, *more):
        torch._dynamo.reset()
        counters.clear()
        fresh_accelerate()
        assert main(tiny.argv(folder, *FREEZE, '--checkpoint-steps', '2', '--checkpoint-hist', '20', *more)) == 0
        return counters['stats']['unique_graphs']

    whole = tmp_path / 'whole'
    assert go(whole, '--compile') >= 2
    assert_frozen(whole)
    for step in (4, STEPS, STEPS + 2):
        run = tmp_path / str(step)
        shutil.copytree(whole, run)
        for folder in (run / 'checkpoints').glob('step-*'):
            if int(folder.name[5:]) > step:
                shutil.rmtree(folder)
        (run / 'summary.json').unlink()
        go(run, '--compile', '--resume')
        for file in (ALL[0], ALL[2]):
            assert (run / file).read_bytes() == (whole / file).read_bytes()
