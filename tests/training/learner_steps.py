"""Random images and a small student, and the steps of a learner on them."""
from __future__ import annotations

import collections
import contextlib

import timm
import torch
from torch import nn

SIZE, CLASSES, BATCH = 16, 5, 8
KWARGS = {'layers': [1, 1, 1, 1], 'channels': [8, 8, 16, 16], 'stem_type': 'deep', 'stem_width': 4}


class Batches(torch.utils.data.Dataset):
    """Random images; `poison` maps rows to what one of their pixels is."""

    def __init__(self, count, poison=None, size=SIZE):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(count, 3, size, size, generator=generator)
        self.labels = torch.randint(CLASSES, (count,), generator=generator)
        for row, value in (poison or {}).items():
            self.images[row, 0, 0, 0] = value

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return self.images[row], self.labels[row], row


def make_student(seed=0):
    torch.manual_seed(seed)
    return timm.create_model('resnet18', num_classes=CLASSES, **KWARGS)


def batches_of(data, numbers):
    return [(data.images[i * BATCH : (i + 1) * BATCH], data.labels[i * BATCH : (i + 1) * BATCH]) for i in numbers]


def steps(learner, count, first=0):
    data = Batches((first + count) * BATCH)
    return steps_on(learner, batches_of(data, range(first, first + count)), first)


def steps_on(learner, batches, first=0):
    learner.train()
    history = []
    for i, (images, labels) in enumerate(batches, first):
        learner.set_progress(0, i)
        with learner.accelerator.accumulate(learner.module):
            history.append(learner.step(images, labels, seed=i))
    return history


@contextlib.contextmanager
def rounded(learner, seed):
    """Give all that the layers of a learner return, and its gradients, errors as large as those of bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.finfo(torch.bfloat16).eps / 2

    def add_error(module, args, output):
        return output * (1 + unit * (2 * torch.rand(output.shape, generator=generator) - 1))

    # Each once: student and prompt path are in both.
    modules = dict.fromkeys([*learner.module.modules(), *learner.task.teacher.modules()])
    layers = [module for module in modules if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))]
    handles = [layer.register_forward_hook(add_error) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def terms_and_gradients(learner, batch, errors=None):
    """Return the terms of one step and the gradient of all weights together; `errors` is a seed for `rounded`."""
    gradients = []
    for parameter in learner.module.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: gradients.append((id(p), p.grad.clone())))
    with contextlib.nullcontext() if errors is None else rounded(learner, errors):
        (terms,) = steps_on(learner, [batch])
    order = [id(parameter) for parameter in learner.module.parameters()]
    gradients.sort(key=lambda pair: order.index(pair[0]))
    terms = {key: value for key, value in terms.items() if key.endswith('loss')}
    return {**terms, 'gradient': torch.cat([gradient.flatten() for _, gradient in gradients])}


def assert_bfloat16_follows_float32(make_learner, batches, draws=3):
    """A step from equal weights is no farther off than errors of bfloat16's size in each layer make it in float32.

    Only a step from equal weights can be compared: training amplifies every difference, and by how much is chance.

    Args:
        make_learner: Makes equal learners, given the precision.
        batches: Images and labels; errors are averaged over them.
        draws: Errors drawn for each batch.
    """
    off = collections.defaultdict(list)
    allowed = collections.defaultdict(list)
    for batch in batches:
        single, half = (terms_and_gradients(make_learner(precision), batch) for precision in ('no', 'bf16'))
        disturbed = [terms_and_gradients(make_learner('no'), batch, errors=i) for i in range(draws)]
        for key, value in single.items():
            assert half[key].dtype == torch.float32
            size = value.norm().clamp(min=1e-3)
            off[key].append(float((half[key] - value).norm() / size))
            allowed[key] += [float((other[key] - value).norm() / size) for other in disturbed]
    for key in off:
        # bfloat16 also rounds weights, inputs and sums of gradients, which `rounded` does not.
        assert 0 < rms(off[key]) < 4 * rms(allowed[key]), key


def rms(values):
    return (sum(value**2 for value in values) / len(values)) ** 0.5
