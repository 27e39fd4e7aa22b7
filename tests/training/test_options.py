"""Options of a step, through the whole main job: they run, and they leave the student they should."""
import copy
import functools
import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file

from tests.tiny import RESNET
from timm_dfpt import wrap
from timm_dfpt.hub.heads import describe_precision
from timm_dfpt.tasks.dfpt import DFPTDistillationTask
from timm_dfpt.training import export, models
from timm_dfpt.training import run as run_module
from timm_dfpt.training.learner import Learner
from timm_dfpt.training.run import main
from timm_dfpt.training.run_facts import read_run
from timm_dfpt.training.run_folder import RunFolder
from timm_dfpt.training.teacher_precision import compute_heads_in_float32

STEPS = 214 // 32  # an epoch, without the last batch


@pytest.fixture
def train(tiny, tmp_path, fresh_accelerate):
    """Run one epoch of the main job in this process; return the student's weights."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def train(name, *more):
        fresh_accelerate()
        assert main([*tiny.argv(tmp_path / name), '--epochs', '1', *more]) == 0
        return load_file(tmp_path / name / 'student' / 'model.safetensors')

    yield train
    torch.set_num_threads(threads)


@pytest.fixture
def teacher_passes(monkeypatch):
    """An entry for each time that the teacher's original path ran."""
    passes, create = [], models.create_teacher

    def create_counted(*args):
        teacher = create(*args)
        # Wrapping copies the tree, hooks included, for the prompt path, whose passes are not the teacher's.
        teacher.register_forward_hook(lambda module, *_: passes.append(None) if module is teacher else None)
        return teacher

    monkeypatch.setattr(models, 'create_teacher', create_counted)
    return passes


@pytest.fixture
def teacher_calls(teacher_passes, monkeypatch):
    """How often each training step ran the teacher's original path."""
    per_step, step = [], Learner.step

    def counted_step(*args):
        before = len(teacher_passes)
        result = step(*args)
        per_step.append(len(teacher_passes) - before)
        return result

    monkeypatch.setattr(Learner, 'step', counted_step)
    return per_step


def floats(weights):
    return {name: value for name, value in weights.items() if value.is_floating_point()}


def distance(a, b):
    """The largest difference of a weight."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in floats(a))


@pytest.mark.parametrize('method', ['kd', 'dfpt'])
def test_bfloat16_teacher_and_channels_last_leave_a_student_close_to_the_plain_one(train, method, tmp_path):
    plain = train('plain', '--method', method)
    last = train('last', '--method', method, '--channels-last')
    half = train('half', '--method', method, '--teacher-dtype', 'bfloat16')
    for student in (last, half):
        assert all(value.isfinite().all() for value in floats(student).values())
        assert {value.dtype for value in floats(student).values()} == {torch.float32}
    assert distance(last, plain) < 1e-3
    # Another teacher, if only by rounding: the option must change something, and not much.
    assert 0 < distance(half, plain) < 0.1
    summary = json.loads((tmp_path / 'half' / 'summary.json').read_text())
    record = json.loads((tmp_path / 'half' / 'student' / 'distillation.json').read_text())
    precision = summary['teacher_precision']
    assert record['teacher_precision'] == precision
    assert (precision['dtype'], precision['images'] > 0) == ('bfloat16', True)
    assert 90 <= precision['agreement'] <= 100
    assert 0 < precision['kl'] < 0.01
    assert read_run(RunFolder(tmp_path / 'half'))[0].teacher_precision == precision
    assert 'bfloat16, its head in float32' in str(describe_precision(precision))


def test_a_copy_of_a_backbone_in_half_precision_computes_as_it_up_to_rounding():
    """The copy is trained in float32, and the logits of both are in float32, too."""
    teacher = timm.create_model('resnet18', num_classes=3, **RESNET).bfloat16()
    compute_heads_in_float32(teacher)
    teacher = wrap(teacher, variant='dfpt+').eval()
    original, prompt = teacher(torch.randn(2, 3, 16, 16).bfloat16())
    assert original.dtype == prompt.dtype == torch.float32
    assert 0 < (original - prompt).abs().max() < 0.1 * original.abs().max()
    # Where a saved prompt path is compared with its teacher.
    shapes = copy.deepcopy(teacher.unwrap()).to('meta')
    assert shapes(torch.empty(2, 3, 16, 16, dtype=torch.bfloat16, device='meta')).shape == (2, 3)


def test_compiled_training_gives_the_same_student(train, monkeypatch):
    """The option's own backend needs a C++ compiler and minutes; the graph is the same with any other."""
    plain = train('plain', '--drop', '0')
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compile_task = DFPTDistillationTask.compile
    monkeypatch.setattr(
        DFPTDistillationTask, 'compile', functools.partialmethod(compile_task, backend='aot_eager', fullgraph=True)
    )
    compiled = train('compiled', '--drop', '0', '--compile')
    assert counters['stats']['unique_graphs'] >= 1
    assert distance(compiled, plain) < 1e-3
    torch._dynamo.reset()


def test_what_replayed_steps_ask_of_the_loop_changes_no_bit(train, tmp_path):
    """Without a GPU nothing is replayed: left are the marks between steps and the copies of what they return."""
    more = ('--baselines', 'kd', '--grad-accum-steps', '2', '--log-interval', '1')
    plain = train('plain', *more)
    with torch.compiler.set_stance('force_eager'):
        marked = train('marked', '--compile', '--compile-mode', 'reduce-overhead', *more)
    assert distance(marked, plain) == 0
    assert (tmp_path / 'marked' / 'metrics.jsonl').read_text() == (tmp_path / 'plain' / 'metrics.jsonl').read_text()


def test_fused_optimizers_go_on_exactly_from_a_checkpoint(train, tmp_path):
    checkpoints = ('--opt-fused', '--checkpoint-steps', '2', '--checkpoint-hist', '9')
    whole = train('whole', *checkpoints)
    shutil.copytree(tmp_path / 'whole', tmp_path / 'cut')
    for path in (tmp_path / 'cut' / 'checkpoints').glob('step-*'):
        if path.name > 'step-00000002':
            shutil.rmtree(path)
    resumed = train('cut', *checkpoints, '--resume')
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize('method', ['kd', 'dfpt'])
def test_accumulation_calls_the_teacher_once_a_micro_batch(train, teacher_calls, method):
    train('accumulated', '--method', method, '--grad-accum-steps', '3')
    assert teacher_calls == [1] * STEPS


def test_a_baseline_beside_it_shares_the_teachers_pass(train, teacher_calls):
    train('both', '--method', 'dfpt', '--baselines', 'kd')
    assert teacher_calls == [1, 0] * STEPS


def weights_at_each_step(monkeypatch):
    seen, step = [], Learner.step

    def watched(self, *args):
        seen.append(self.task.weights)
        return step(self, *args)

    monkeypatch.setattr(Learner, 'step', watched)
    return seen


def test_a_weight_with_an_end_moves_in_a_straight_line_from_the_first_update_to_the_last(train, monkeypatch):
    seen = weights_at_each_step(monkeypatch)
    train('moving', '--student-prompt-weight', '0', '--student-prompt-weight-end', '0.5', '--epochs', '2')
    count = 2 * STEPS
    assert [w.student_prompt for w in seen] == pytest.approx([0.5 * i / (count - 1) for i in range(count)])
    assert {(w.prompt_teacher, w.prompt_student, w.student_teacher) for w in seen} == {(1.0, 0.25, 1.0)}


def test_an_end_equal_to_the_start_is_no_change(train):
    plain = train('plain')
    moved = train('moved', '--student-prompt-weight-end', '1')
    assert all(torch.equal(plain[key], moved[key]) for key in plain)


def test_validation_now_and_then_leaves_the_same_student_and_ends_with_one(train, tmp_path):
    often = train('often', '--epochs', '5')
    rare = train('rare', '--epochs', '5', '--val-interval', '3', '--export-epochs', '2')
    assert all(torch.equal(often[key], rare[key]) for key in often)
    lines = {
        name: [json.loads(line)['dfpt'] for line in (tmp_path / name / 'metrics.jsonl').read_text().splitlines()]
        for name in ('often', 'rare')
    }
    # An epoch whose student is exported is validated too.
    assert [i + 1 for i, line in enumerate(lines['rare']) if 'val' in line] == [2, 3, 5]
    assert all(line['val'] == lines['often'][i]['val'] for i, line in enumerate(lines['rare']) if 'val' in line)
    assert (tmp_path / 'rare' / 'curves.svg').is_file()


def test_the_end_of_a_run_asks_a_teacher_once(train, teacher_passes, monkeypatch):
    """However many learn from it. That its numbers beside others are those of a run alone: test_compare.py."""
    counted, timed = [], []
    measure, cost = run_module.measure, export.measure_cost

    def measured(*args):
        before = len(teacher_passes)
        result = measure(*args)
        counted.append(len(teacher_passes) - before)
        return result

    monkeypatch.setattr(run_module, 'measure', measured)
    monkeypatch.setattr(export, 'measure_cost', lambda *args: timed.append(args) or cost(*args))
    train('all', '--method', 'dfpt', '--baselines', 'kd', 'dkd', '--mixup', '0')
    assert counted == [2]  # 43 images in batches of 32
    assert len(timed) == 1 + 1 + 3
