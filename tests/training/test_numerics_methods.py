"""The rivals of DFPT-KD in bfloat16, against float32 and against their formula in float64."""
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from timm_dfpt.training.config import TrainConfig
from timm_dfpt.training.factory import create_task
from timm_dfpt.training.learner import Learner

SIZE, CLASSES, BATCH, STEPS = 16, 5, 8, 12
KWARGS = {'layers': [1, 1, 1, 1], 'channels': [8, 8, 16, 16], 'stem_type': 'deep', 'stem_width': 4}
INPUT = {'input_size': (3, SIZE, SIZE), 'mean': (0.5,) * 3, 'std': (0.25,) * 3}
METHODS = ['kd', 'dkd', 'ctkd']


@pytest.fixture
def make_learner():
    def make(method, mixed_precision):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
        config = TrainConfig(
            method=method, student='resnet18', teacher='resnet18', dataset='none', cpu=True, epochs=2,
            batch_size=BATCH, lr=0.05, sched='constant', temperature=4.0, mixed_precision=mixed_precision,
        )  # fmt: skip
        models = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            models.append(timm.create_model('resnet18', num_classes=CLASSES, **KWARGS))
            models[-1].pretrained_cfg = {**models[-1].pretrained_cfg, **INPUT}
        with torch.no_grad():
            # Else the logits of the teacher are so small that there is hardly anything to learn.
            models[1].fc.weight *= 20
        return Learner(method, config, create_task(config, *models, INPUT, accelerator), accelerator, 10)

    yield make
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def batches():
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        yield (
            torch.randn(BATCH, 3, SIZE, SIZE, generator=generator),
            torch.randint(CLASSES, (BATCH,), generator=generator),
        )


def train(learner):
    learner.train()
    history = []
    for i, (images, labels) in enumerate(batches()):
        learner.set_update(i, 0)
        with learner.accelerator.accumulate(learner.module):
            history.append(learner.step(images, labels, i, {})[0])
    return history


@pytest.mark.parametrize('method', METHODS)
def test_bfloat16_follows_float32(make_learner, method):
    """Every term of the first step within what 8 bits of mantissa leave, and training ends up at the same loss."""
    single, half = train(make_learner(method, 'no')), train(make_learner(method, 'bf16'))
    for key, value in single[0].items():
        assert half[0][key].dtype == torch.float32
        if key.endswith('loss'):
            assert abs(float(half[0][key] - value)) < 0.02 * max(1.0, abs(float(value))), key
    last = [float(sum(t['loss'] for t in history[-4:])) / 4 for history in (single, half)]
    assert abs(last[0] - last[1]) < 0.05 * last[0]
    # Not the same numbers: else nothing was computed in bfloat16.
    assert float(half[0]['loss']) != float(single[0]['loss'])


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
