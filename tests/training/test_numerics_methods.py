"""The rivals of DFPT-KD in bfloat16, against float32 and against their formula in float64."""
import pytest
import torch
from learner_steps import BATCH, CLASSES, SIZE, assert_bfloat16_follows_float32, make_student, steps_on

from timm_dfpt.training.build import create_task
from timm_dfpt.training.learner import Learner
from timm_dfpt.training.options import TrainConfig

STEPS = 12
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
    for _ in range(STEPS):
        yield (
            torch.randn(BATCH, 3, SIZE, SIZE, generator=generator),
            torch.randint(CLASSES, (BATCH,), generator=generator),
        )


@pytest.mark.parametrize('method', METHODS)
def test_bfloat16_follows_float32(make_learner, method):
    single, half = (steps_on(make_learner(method, precision), batches()) for precision in ('no', 'bf16'))
    assert_bfloat16_follows_float32(half, single)


def divergence(student, teacher, temperature):
    """T^2 KL(teacher || student), in float64."""
    p, q = (logits.double().div(temperature).log_softmax(1) for logits in (teacher, student))
    return float(temperature**2 * (p.exp() * (p - q)).sum(1).mean())


@pytest.mark.parametrize('method', ['kd', 'ctkd'])
def test_the_term_itself_is_computed_in_float32(make_learner, method):
    """Given the logits, rounded as bfloat16 leaves them, nothing more is lost; timm's own task is one of them."""
    learner = make_learner(method, 'bf16')
    learner.train()
    images, labels = next(batches())
    with learner.accelerator.autocast(), torch.no_grad():
        result = learner.task(images, labels)
        teacher = learner.teacher_logits(images)
    student = result['output']
    assert torch.equal(student, student.bfloat16().float())
    temperature = float(result.get('temperature', 4.0))
    expected = divergence(student, teacher, temperature)
    assert expected > 0.05
    assert float(result['kd_loss']) == pytest.approx(expected, rel=2e-6)
    # What bfloat16 in the softmax would do is far outside of that.
    p, q = ((logits / temperature).bfloat16().log_softmax(1).double() for logits in (teacher, student))
    rounded = float(temperature**2 * (p.exp() * (p - q)).sum(1).mean())
    assert rounded != pytest.approx(expected, rel=2e-4)
