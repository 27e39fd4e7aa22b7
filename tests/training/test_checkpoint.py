"""Checkpoints as files: what is in them, what is kept, and what is never loaded."""
import hashlib
import json
import pickle
import shutil
import sys

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from timm_dfpt.training.checkpoint import (
    latest_checkpoint,
    remove_leftovers,
    restore_checkpoint,
    save_checkpoint,
)

PROGRESS = {'epoch': 3, 'sums': [{'a/loss': [0.1 + 0.2, 7]}]}


@pytest.fixture
def prepared():
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    module, optimizer = accelerator.prepare(module, torch.optim.AdamW(module.parameters()))
    module(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    return accelerator, module, optimizer


def test_round_trip(prepared, tmp_path):
    accelerator, module, optimizer = prepared
    average = nn.Linear(2, 2)
    save_checkpoint(accelerator, tmp_path, 5, 2, {'average': average}, PROGRESS)
    before = {key: value.clone() for key, value in {**module.state_dict(), 'average': average.weight}.items()}
    moments = optimizer.state_dict()['state'][0]['exp_avg'].clone()
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers(), *average.parameters()):
            tensor.zero_()
    module(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    assert restore_checkpoint(accelerator, tmp_path, {'average': average}) == PROGRESS
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert torch.equal(before['average'], average.weight)
    assert torch.equal(moments, optimizer.state_dict()['state'][0]['exp_avg'])


def test_the_newest_are_kept(prepared, tmp_path):
    for step in (1, 2, 5, 4):
        # Going back from 5 to 4 is what a run does whose newest checkpoint was damaged.
        save_checkpoint(prepared[0], tmp_path, step, 2, {}, PROGRESS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['step-00000002', 'step-00000004']


class Killed(BaseException):
    """Nothing catches it, as nothing catches a SIGKILL."""


class Killer:
    """Ends the work before one of its operations on files, counted from when it is armed."""

    def __init__(self):
        self.left = None
        sys.addaudithook(self.look)

    def look(self, event, args):
        if self.left is None or event not in ('open', 'os.rename', 'os.remove', 'os.rmdir', 'os.mkdir'):
            return
        self.left -= 1
        if self.left < 0:
            self.left = None
            raise Killed(event)


def test_killed_while_a_checkpoint_replaces_one(prepared, tmp_path):
    """As at the end of an epoch in whose evaluation a run was stopped: before each operation, and the only one kept."""
    killer = Killer()
    moments, found = 0, set()
    while True:
        run = tmp_path / str(moments)
        save_checkpoint(prepared[0], run / 'checkpoints', 6, 1, {}, {'which': 'old'})
        killer.left = moments
        try:
            save_checkpoint(prepared[0], run / 'checkpoints', 6, 1, {}, {'which': 'new'})
        except Killed:
            moments += 1
        else:
            break
        finally:
            killer.left = None
        remove_leftovers(run)
        progress = restore_checkpoint(prepared[0], run / 'checkpoints', {})
        assert progress is not None, f'nothing is left of a save that was killed before operation {moments}'
        found.add(progress['which'])
        assert [path.name for path in (run / 'checkpoints').iterdir()] == ['step-00000006']
    assert moments > 10
    assert found == {'old', 'new'}


def test_killed_again_while_it_is_put_in_place(prepared, tmp_path):
    """Before each operation of going on from a save that was killed between two renames."""
    killer = Killer()
    for moment in range(100):
        run = tmp_path / str(moment)
        save_checkpoint(prepared[0], run / 'checkpoints', 6, 1, {}, {'which': 'new'})
        shutil.copytree(run / 'checkpoints' / 'step-00000006', run / 'checkpoints' / 'step-00000006.incomplete')
        (run / 'checkpoints' / 'step-00000006' / 'model.safetensors').write_bytes(b'half removed')
        killer.left = moment
        try:
            remove_leftovers(run)
        except Killed:
            killer.left = None
            remove_leftovers(run)
        else:
            break
        assert restore_checkpoint(prepared[0], run / 'checkpoints', {}) == {'which': 'new'}
    killer.left = None
    assert 5 < moment < 99


def test_nothing_but_tensors_and_json(prepared, tmp_path):
    """Only the optimizer is in a file of torch, and that loads with `weights_only`."""
    path = save_checkpoint(prepared[0], tmp_path, 1, 2, {'average': nn.Linear(2, 2)}, PROGRESS)
    assert {file.name for file in path.iterdir()} == {
        'model.safetensors', 'optimizer.bin', 'average.safetensors', 'progress.json', 'checksums.json',
    }  # fmt: skip
    assert set(torch.load(path / 'optimizer.bin', weights_only=True)) == {'state', 'param_groups'}


class Bomb:
    def __reduce__(self):
        return exec, ('raise SystemExit("code of the checkpoint was run")',)


def test_code_in_a_checkpoint_is_not_run(prepared, tmp_path):
    """Checksums keep from accidents, not from people: who makes a checkpoint makes the checksums too."""
    path = save_checkpoint(prepared[0], tmp_path, 1, 2, {}, PROGRESS)
    torch.save({'state': Bomb(), 'param_groups': []}, path / 'optimizer.bin', pickle_module=pickle)
    checksums = json.loads((path / 'checksums.json').read_text())
    checksums['optimizer.bin'] = hashlib.sha256((path / 'optimizer.bin').read_bytes()).hexdigest()
    (path / 'checksums.json').write_text(json.dumps(checksums))
    assert latest_checkpoint(tmp_path) == path
    with pytest.raises(ValueError, match='does not fit the models of this run'):
        restore_checkpoint(prepared[0], tmp_path, {})


def test_no_checkpoint(prepared, tmp_path):
    assert restore_checkpoint(prepared[0], tmp_path / 'nowhere', {}) is None


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    for name in ('student', 'checkpoints/step-00000001', 'checkpoints/step-00000002.incomplete'):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / 'file').write_text('x')
    (tmp_path / 'metrics.jsonl.incomplete').write_text('half a li')
    (tmp_path / 'teacher_heads').mkdir()
    (tmp_path / 'teacher_heads' / 'dfpt.safetensors.17.incomplete').write_text('half a he')
    remove_leftovers(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob('*') if path.is_file()) == [
        'checkpoints/step-00000001/file', 'student/file',
    ]  # fmt: skip
