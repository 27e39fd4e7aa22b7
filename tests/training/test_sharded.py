"""Weights spread over two processes (FSDP2) against weights that each process has."""
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from test_processes import RELATIVE, WEIGHTS, lines
from torch import nn

from tests.forked import CONTEXT
from tests.jobs import Job, free_port
from timm_dfpt.job.devices import ShardedRoot, set_up_sharding, whole_weights
from timm_dfpt.training.checkpoint import restore_checkpoint, save_checkpoint

# What accelerate's launcher makes of train/accelerate/fsdp2.yaml.
FSDP = {
    'ACCELERATE_USE_FSDP': 'true', 'FSDP_VERSION': '2', 'FSDP_AUTO_WRAP_POLICY': 'NO_WRAP',
    'FSDP_RESHARD_AFTER_FORWARD': 'false', 'FSDP_OFFLOAD_PARAMS': 'false', 'FSDP_ACTIVATION_CHECKPOINTING': 'false',
    'FSDP_CPU_RAM_EFFICIENT_LOADING': 'false',
}  # fmt: skip
STUDENT, PROMPT_PATH = 'student/model.safetensors', 'prompt_path/prompt_path.safetensors'
ALL = (STUDENT, f'baselines/kd/{STUDENT}', PROMPT_PATH)
OPTIONS = types.SimpleNamespace(compile=False, channels_last=False, mixed_precision='no')


def finished(job: Job) -> None:
    codes = job.wait()
    assert set(codes) == {0}, job.output()


@pytest.fixture(scope='module')
def pair(tiny, tmp_path_factory):
    """The same job in one process, and in two that share the weights out: two learners, clipping, averages."""
    root = tmp_path_factory.mktemp('pair')
    for name, processes, environment in (('one', 1, {}), ('sharded', 2, FSDP)):
        argv = tiny.vit_argv(root / name, '--baselines', 'kd', '--clip-grad', '1', '--model-ema')
        job = Job(argv, root / f'{name}.log', processes, environment=environment)
        finished(job)
    assert 'sharded over 2 processes' in job.output()
    return root / 'one', root / 'sharded'


def test_sharded_trains_like_one_process(pair):
    one, sharded = (lines(run) for run in pair)
    assert len(one) == len(sharded) == 3
    for a, b in zip(one, sharded, strict=True):
        assert a.keys() == b.keys()
        differences = {key: abs(a[key] - b[key]) / max(abs(a[key]), 1e-2) for key in a if 'top1' not in key}
        assert max(differences.values()) < RELATIVE, max(differences.items(), key=lambda item: item[1])
        assert {key: a[key] for key in a if 'top1' in key} == {key: b[key] for key in b if 'top1' in key}


def test_sharded_ends_with_the_same_weights(pair):
    for name in ALL:
        one, sharded = (load_file(run / name) for run in pair)
        assert one.keys() == sharded.keys()
        assert max(float((one[key] - sharded[key]).abs().max()) for key in one) < WEIGHTS


def test_told_to_stop_killed_and_resumed(tiny, tmp_path):
    """Bit for bit, with batch statistics, dropout, mixup and an average."""

    def start(name: str) -> Job:
        more = ('--epochs', '2', '--checkpoint-steps', '4', '--resume')
        return Job(tiny.argv(tmp_path / name, *more), tmp_path / f'{name}.log', 2, environment=FSDP)

    finished(start('undisturbed'))
    job = start('run')
    job.wait_for(lambda: job.phase == 'evaluation')
    job.send(signal.SIGTERM, rank=1)
    assert job.wait() == [143, 143], job.output()
    job = start('run')
    job.wait_for(lambda: job.phase == 'save')
    job.kill()
    finished(start('run'))
    for name in (STUDENT, PROMPT_PATH, 'metrics.jsonl'):
        assert (tmp_path / 'run' / name).read_bytes() == (tmp_path / 'undisturbed' / name).read_bytes(), name


def test_checkpoints_do_not_depend_on_sharding(pair, tiny, tmp_path):
    """A sharded run that was stopped goes on with one process that has everything, to the same end."""
    argv = tiny.vit_argv(tmp_path / 'run', '--baselines', 'kd', '--clip-grad', '1', '--model-ema')
    job = Job(argv, tmp_path / 'log', 2, environment=FSDP)
    job.wait_for(lambda: (tmp_path / 'run' / 'checkpoints' / 'step-00000006').exists())
    job.kill()
    finished(Job([*argv, '--resume'], tmp_path / 'log', 1))
    for name in ALL:
        one, other = (load_file(run / name) for run in (pair[0], tmp_path / 'run'))
        assert max(float((one[key] - other[key]).abs().max()) for key in one) < WEIGHTS


def _train(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        module(torch.randn(4, 5, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _network() -> nn.Module:
    # Rows that two processes cannot have the same number of: 7, 3 and 1.
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3), nn.Linear(3, 1))


def _in_two_processes(rank: int, port: str, folder: str) -> None:
    os.environ.update(FSDP, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2')
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=port, ACCELERATE_USE_CPU='true')
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    set_up_sharding(accelerator, OPTIONS)
    plain = _network()
    reference = torch.optim.AdamW(plain.parameters(), lr=0.1)
    module = ShardedRoot(_network())
    module, optimizer = accelerator.prepare(module, torch.optim.AdamW(module.parameters(), lr=0.1))
    total = sum(p.numel() for p in plain.parameters())
    own = torch.tensor(sum(p.to_local().numel() for p in module.parameters()))
    assert 0 < own < total
    assert accelerator.reduce(own) == total
    _train(module, optimizer, seed=1)
    _train(plain, reference, seed=1)
    with whole_weights(module):
        # One process may call it alone.
        whole = {key: value.clone() for key, value in module.module.state_dict().items()}
        if rank == 0:
            module.module.eval()(torch.ones(2, 5))
            module.module.train()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(whole[key], value)
    path = save_checkpoint(accelerator, Path(folder), 1, 2, {}, {'epoch': 1})
    saved = torch.load(path / 'optimizer.bin', weights_only=True)['state']
    for index, entries in reference.state_dict()['state'].items():
        for key, value in entries.items():
            torch.testing.assert_close(saved[index][key], value)
    _train(module, optimizer, seed=2)
    assert restore_checkpoint(accelerator, Path(folder), {}) == {'epoch': 1}
    with whole_weights(module):
        assert all(torch.equal(whole[key], value) for key, value in module.module.state_dict().items())
    _train(module, optimizer, seed=3)
    _train(plain, reference, seed=3)
    with whole_weights(module):
        torch.testing.assert_close(dict(module.module.state_dict()), dict(plain.state_dict()))


def test_shards_are_parts_and_come_together(tmp_path):
    """Each process has a part of each tensor; weights and optimizer come back from a checkpoint."""
    port = str(free_port())
    workers = [CONTEXT.Process(target=_in_two_processes, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]


@pytest.fixture
def one_of_one(monkeypatch):
    """The variables of a launcher that starts a single process of several."""
    variables = {**FSDP, 'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '1', 'MASTER_ADDR': '127.0.0.1'}
    for name, value in {**variables, 'MASTER_PORT': str(free_port())}.items():
        monkeypatch.setenv(name, value)
    yield monkeypatch
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ('variable', 'value', 'needed'),
    [
        ('FSDP_VERSION', '1', 'fsdp_version: 2'),
        ('FSDP_AUTO_WRAP_POLICY', 'SIZE_BASED_WRAP', 'fsdp_auto_wrap_policy: NO_WRAP'),
        ('FSDP_OFFLOAD_PARAMS', 'true', 'fsdp_offload_params: false'),
        ('FSDP_ACTIVATION_CHECKPOINTING', 'true', 'fsdp_activation_checkpointing: false'),
        ('FSDP_CPU_RAM_EFFICIENT_LOADING', 'true', 'fsdp_cpu_ram_efficient_loading: false'),
    ],
)
def test_other_ways_to_shard_are_refused(one_of_one, variable, value, needed):
    one_of_one.setenv(variable, value)
    if variable == 'FSDP_VERSION':
        one_of_one.delenv('FSDP_RESHARD_AFTER_FORWARD')
    with pytest.raises(ValueError, match=f'FSDP needs {needed} .*fsdp2.yaml'):
        set_up_sharding(Accelerator(cpu=True), OPTIONS)


@pytest.mark.parametrize(
    ('option', 'value'), [('compile', True), ('channels_last', True), ('mixed_precision', 'fp16')]
)
def test_options_that_do_not_go_with_shards(one_of_one, option, value):
    options = types.SimpleNamespace(**{**vars(OPTIONS), option: value})
    with pytest.raises(ValueError, match=option.replace('_', '-') + '.* does not work with FSDP2'):
        set_up_sharding(Accelerator(cpu=True), options)


def test_deepspeed_is_refused(tiny, tmp_path):
    job = Job(tiny.argv(tmp_path / 'run'), tmp_path / 'log', environment={'ACCELERATE_USE_DEEPSPEED': 'true'})
    assert job.wait() == [1]
    assert 'error: DeepSpeed is not supported' in job.output()
    assert 'Traceback' not in job.output()
    assert not (tmp_path / 'run').exists()


def test_launcher_and_configuration_file(tiny, tmp_path):
    """The file in train/accelerate, as users give it to accelerate, with CPUs for the GPUs."""

    root = Path(__file__).parents[2]
    config = ['--config_file', str(root / 'train' / 'accelerate' / 'fsdp2.yaml'), '--num_processes', '2']
    argv = tiny.argv(tmp_path / 'run', '--epochs', '1')
    done = subprocess.run(
        [sys.executable, '-m', 'accelerate.commands.launch', *config, 'train/distill.py', *argv],
        cwd=root, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(root)}, timeout=240,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'sharded over 2 processes' in done.stdout
    assert json.loads((tmp_path / 'run' / 'summary.json').read_text())['processes'] == 2
