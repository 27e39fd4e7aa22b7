"""The baselines of DFPT-KD in bfloat16, against float32 and against their formula in float64."""
import functools

import pytest
import torch

from tests.training.learner_steps import BATCH, CLASSES, assert_bfloat16_follows_float32, make_student, steps_on
from timm_dfpt.job.options import TrainConfig
from timm_dfpt.training.build import create_task
from timm_dfpt.training.learner import Learner

BATCHES = 4
# So large that the last stage has 2 x 2 pixels: for a 3 x 3 convolution with a stride of 2 over a single one, oneDNN's
# AVX-512 kernel in bfloat16 returns a gradient with values that it never wrote (torch 2.14 on an AMD EPYC).
SIZE = 64
INPUT = {'input_size': (3, SIZE, SIZE), 'mean': (0.5,) * 3, 'std': (0.25,) * 3}
METHODS = ['kd', 'dkd', 'ctkd']


@pytest.fixture
def make_learner(make_accelerator):
    def make(method, mixed_precision):
        accelerator = make_accelerator(mixed_precision=mixed_precision)
        config = TrainConfig(
            method=method, student='resnet18', teacher='resnet18', dataset='none', cpu=True, epochs=2,
            batch_size=BATCH, lr=0.05, sched='constant', temperature=4.0, mixed_precision=mixed_precision,
        )  # fmt: skip
        student, teacher = make_student(0), make_student(1)
        for model in (student, teacher):
            model.pretrained_cfg = {**model.pretrained_cfg, **INPUT}
        with torch.no_grad():
            # Else the logits of the teacher are so small that there is hardly anything to learn.
            teacher.fc.weight *= 20
        return Learner(method, config, create_task(config, student, teacher, INPUT, accelerator), accelerator, 10)

    return make


def batches():
    generator = torch.Generator().manual_seed(0)
    for _ in range(BATCHES):
        yield (
            torch.randn(BATCH, 3, SIZE, SIZE, generator=generator),
            torch.randint(CLASSES, (BATCH,), generator=generator),
        )


@pytest.mark.parametrize('method', METHODS)
def test_bfloat16_follows_float32(make_learner, method):
    assert_bfloat16_follows_float32(functools.partial(make_learner, method), batches())


def divergence(student, teacher, temperature):
    """T^2 KL(teacher || student) in float64, and how far off float32 may be: a few units in the last place."""
    p, q = (logits.double().div(temperature).log_softmax(1) for logits in (teacher, student))
    off = 4 * torch.finfo(torch.float32).eps * max(p.abs().max(), q.abs().max())
    return tuple(float(temperature**2 * value) for value in ((p.exp() * (p - q)).sum(1).mean(), off))


@pytest.mark.parametrize('method', ['kd', 'ctkd'])
def test_the_term_itself_is_computed_in_float32(make_learner, method):
    """Given the logits, rounded as bfloat16 leaves them, nothing more is lost."""
    learner = make_learner(method, 'bf16')
    learner.train()
    images, labels = next(batches())
    with learner.accelerator.autocast(), torch.no_grad():
        result = learner.task(images, labels)
        teacher = learner.task.teacher_logits(images)
    student = result['output']
    assert torch.equal(student, student.bfloat16().float())
    temperature = float(result.get('temperature', 4.0))
    expected, off = divergence(student, teacher, temperature)
    assert expected > 0.05
    assert float(result['kd_loss']) == pytest.approx(expected, abs=off)
    # What bfloat16 in the softmax would do is far outside of that.
    p, q = ((logits / temperature).bfloat16().log_softmax(1).double() for logits in (teacher, student))
    rounded = float(temperature**2 * (p.exp() * (p - q)).sum(1).mean())
    assert rounded != pytest.approx(expected, abs=10 * off)


@pytest.mark.parametrize('method', ['kd', 'ctkd'])
def test_an_evaluation_changes_no_step_in_bfloat16(make_learner, method):
    """Else a run that is resumed after one would become another student."""
    first, second = list(batches())[:2]
    students = []
    for evaluated in (False, True):
        learner = make_learner(method, 'bf16')
        steps_on(learner, [first])
        if evaluated:
            learner.eval()
            with torch.no_grad(), learner.accelerator.autocast():
                learner.outputs_with_teacher(first[0], {})
        steps_on(learner, [second])
        students.append(learner.student.state_dict())
    assert all(torch.equal(students[0][key], students[1][key]) for key in students[0])
