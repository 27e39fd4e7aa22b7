"""Random images and a small student, and the steps of a learner on them."""
from __future__ import annotations

import timm
import torch

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
        learner.set_update(i, 0)
        with learner.accelerator.accumulate(learner.module):
            history.append(learner.step(images, labels, i, {})[0])
    return history


def assert_bfloat16_follows_float32(half, single):
    """Every term of the first step within what 8 bits of mantissa leave, and training ends up at the same loss."""
    for key, value in single[0].items():
        assert half[0][key].dtype == torch.float32
        if key.endswith('loss'):
            assert abs(float(half[0][key] - value)) < 0.02 * max(1.0, abs(float(value))), key
    last = [float(sum(t['loss'] for t in history[-4:])) / 4 for history in (single, half)]
    assert abs(last[0] - last[1]) < 0.05 * last[0]
    # Not the same numbers: else nothing was computed in bfloat16.
    assert float(half[0]['loss']) != float(single[0]['loss'])
