"""The job: plain distillation of a saved teacher on a folder of JPEGs, and how each trainer is asked for it.

    python -m benchmarks.peers.jobs 32px FOLDER    # writes images and teacher
"""
from __future__ import annotations

import dataclasses
import string
import sys
from pathlib import Path

__all__ = ['JOBS', 'Job', 'arguments']

_CLASSES = 10
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained on what, for one epoch on the CPU with one thread: KD at T = 4, 0.1 CE + 0.9 KL, SGD.

    Args:
        teacher: Its architecture.
        student: Its architecture.
        size: Side of the images in pixels.
        images: Number to train on; a tenth of it to validate on.
        batch: Batch size.
        crop_padding: Pixels around an image that is then cropped; 0 for random resized crops.
    """

    teacher: str
    student: str
    size: int
    images: int
    batch: int
    crop_padding: int


JOBS = {
    '32px': Job('cifar_resnet20', 'cifar_resnet8', 32, 2560, 64, 4),
    '224px': Job('resnet18', 'mobilenetv3_small_050', 224, 480, 16, 0),
    'tiny': Job('cifar_resnet8', 'cifar_resnet8', 32, 30, 10, 4),
}


def write(job: Job, folder: Path) -> None:
    """Write the images, the teacher with random weights, and what configuration the trainers need."""
    import numpy as np
    import timm
    import torch

    import timm_dfpt
    from benchmarks.data_parts import photograph

    torch.manual_seed(0)
    for split, number in (('train', job.images), ('val', job.images // 10)):
        for i in range(number):
            path = folder / 'data' / split / f'class{i % _CLASSES}' / f'{i}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            photograph(job.size, i + (split == 'val') * job.images).save(path, quality=90)
    teacher = timm.create_model(job.teacher, num_classes=_CLASSES)
    config = {'input_size': (3, job.size, job.size), 'mean': _MEAN, 'std': _STD}
    names = [f'class{i}' for i in np.arange(_CLASSES)]
    timm_dfpt.save_student(teacher, folder / 'teacher', label_names=names, data_config=config)
    (folder / 'empty.yaml').write_text('{}\n', encoding='utf-8')
    (folder / 'torchdistill.yaml').write_text(_torchdistill(job, folder), encoding='utf-8')


def arguments(peer: str, job: Job, folder: Path, output: Path) -> list[str]:
    """Return what comes after the name of a trainer's script; all it writes goes to `output`."""
    if peer == 'torchdistill':
        return ['--config', str(folder / 'torchdistill.yaml'), '--device', 'cpu']
    same = [
        '--task-loss-weight', '0.1', '--distill-loss-weight', '0.9', '--batch-size', str(job.batch), '--epochs', '1',
        '--lr', '0.05', '--weight-decay', '5e-4', '--warmup-epochs', '0', '--output', str(output),
    ]  # fmt: skip
    data, teacher = str(folder / 'data'), f'local-dir:{folder / "teacher"}'
    if peer == 'timm':
        crops = ['--scale', '1', '1', '--ratio', '1', '1'] if job.crop_padding else []
        return [
            data, '--train-split', 'train', '--val-split', 'val', '--model', job.student,
            '--num-classes', str(_CLASSES), '--kd-model-name', teacher, '--kd-temperature', '4', '--opt', 'sgd',
            '--sched', 'cosine', '--smoothing', '0', '--workers', '0', '--device', 'cpu', '--no-prefetcher',
            '--color-jitter', '0', '--img-size', str(job.size), *crops, *same,
        ]  # fmt: skip
    crops = ['--crop-padding', str(job.crop_padding), '--hflip', '0.5'] if job.crop_padding else []
    return [
        '--config', str(folder / 'empty.yaml'), '--dataset', data, '--teacher', teacher, '--student', job.student,
        '--method', 'kd', '--temperature', '4', '--workers', '0', '--cpu', *crops, *same,
    ]  # fmt: skip


def _torchdistill(job: Job, folder: Path) -> str:
    """Return the configuration of the same job for torchdistill's image classification example."""
    padded = job.crop_padding > 0
    return string.Template(Path(__file__).with_name('torchdistill.yaml').read_text(encoding='utf-8')).substitute(
        data=folder / 'data', teacher=folder / 'teacher', student=job.student, classes=_CLASSES, batch=job.batch,
        mean=', '.join(map(str, _MEAN)), std=', '.join(map(str, _STD)),
        crop='RandomCrop' if padded else 'RandomResizedCrop',
        crop_options=f'size: {job.size}' + f', padding: {job.crop_padding}' * padded,
    )  # fmt: skip


if __name__ == '__main__':
    write(JOBS[sys.argv[1]], Path(sys.argv[2]))
