"""Label smoothing in the task and the mixup that the job builds, against the plain formula."""
import random
import types

import numpy as np
import pytest
import timm
import torch

from timm_dfpt.job.options import TrainConfig
from timm_dfpt.training.build import create_mixup, create_task
from timm_dfpt.training.models import wrap_teacher

CLASSES, BATCH, SIZE = 5, 6, 16
KWARGS = {'layers': [1, 1, 1, 1], 'channels': [8, 8, 16, 16], 'stem_type': 'deep', 'stem_width': 4}
INPUT = {'input_size': (3, SIZE, SIZE), 'mean': (0.5,) * 3, 'std': (0.25,) * 3}
CPU = types.SimpleNamespace(device=torch.device('cpu'))


def model(seed):
    torch.manual_seed(seed)
    created = timm.create_model('resnet18', num_classes=CLASSES, **KWARGS)
    created.pretrained_cfg = {**created.pretrained_cfg, **INPUT}
    return created


def task_of(method, smoothing, **options):
    teacher = None if method == 'supervised' else 'resnet18'
    config = TrainConfig(
        method=method, student='resnet18', teacher=teacher, dataset='none', smoothing=smoothing, **options
    )  # fmt: skip
    known = None if teacher is None else model(1).eval()
    if method == 'dfpt':
        known = wrap_teacher(config, known, CLASSES)
    return config, create_task(config, model(0), known, INPUT, CPU)


def smooth(labels, smoothing):
    """1 - s of the mass for the label, and s spread evenly over all classes, its own included."""
    targets = torch.full((len(labels), CLASSES), smoothing / CLASSES, dtype=torch.float64)
    targets[torch.arange(len(labels)), labels] += 1 - smoothing
    return targets


def cross_entropy(logits, targets):
    return float(-(targets * logits.double().log_softmax(1)).sum(1).mean())


def terms_of(result):
    """The loss on the labels and the logits it is of, for the student and the prompt path."""
    names = {'task_loss': 'output', 'student_task_loss': 'output', 'prompt_task_loss': 'prompt_output'}
    return {name: (float(result[name].detach()), result[of].detach()) for name, of in names.items() if name in result}


@pytest.mark.parametrize('method', ['supervised', 'kd', 'dkd', 'dfpt'])
@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.5])
def test_alone(method, smoothing):
    _, task = task_of(method, smoothing)
    torch.manual_seed(2)
    labels = torch.randint(CLASSES, (BATCH,))
    result = task(torch.randn(BATCH, 3, SIZE, SIZE), labels)
    terms = terms_of(result) or {'loss': (float(result['loss'].detach()), result['output'].detach())}
    assert len(terms) == (2 if method == 'dfpt' else 1)
    for name, (value, logits) in terms.items():
        assert value == pytest.approx(cross_entropy(logits, smooth(labels, smoothing)), rel=1e-5), name


@pytest.mark.parametrize('method', ['supervised', 'kd', 'dfpt'])
@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
def test_with_blended_images(method, kind):
    """The share of each image is read off the pixels: of every image all have the value of its number."""
    smoothing = 0.2
    config, task = task_of(method, smoothing, **{kind: 1.0})
    random.seed(3)
    np.random.seed(3)
    images = torch.arange(BATCH, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, SIZE, SIZE).clone()
    labels = torch.arange(BATCH) % CLASSES
    blended, targets = create_mixup(config, CLASSES)(images.clone(), labels)
    first, last = images[0].mean(), images[-1].mean()
    share = float((blended[0].mean() - last) / (first - last))
    assert 0.05 < share < 0.95
    result = task(blended, targets)
    expected = share * smooth(labels, smoothing) + (1 - share) * smooth(labels.flip(0), smoothing)
    terms = terms_of(result) or {'loss': (float(result['loss'].detach()), result['output'].detach())}
    for name, (value, logits) in terms.items():
        assert value == pytest.approx(cross_entropy(logits, expected), rel=1e-5), name
