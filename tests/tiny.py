"""Tiny generated images and tiny teachers, made once, for tests that run the whole main job."""
from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image

from timm_dfpt.hub.student import save_student

ROOT = Path(__file__).parents[1]
SIZE = 16
CLASSES = ('ash', 'birch', 'cedar')
DATA_CONFIG = {
    'input_size': (3, SIZE, SIZE),
    'mean': (0.5, 0.5, 0.5),
    'std': (0.25, 0.25, 0.25),
    'interpolation': 'bilinear',
    'crop_pct': 1.0,
    'crop_mode': 'center',
}
RESNET = {'layers': [1, 1, 1, 1], 'channels': [8, 8, 16, 16], 'stem_type': 'deep', 'stem_width': 4}
VIT = {'embed_dim': 32, 'depth': 4, 'num_heads': 2, 'patch_size': 4}


@dataclasses.dataclass(frozen=True)
class TinyJob:
    """Where the tiny things are, and the arguments of a job on them."""

    data: Path
    teacher: Path
    vit_teacher: Path

    def argv(self, output: Path, *more: str) -> list[str]:
        """A job with all that draws random numbers: augmentation, dropout, mixup; with EMA and both paths."""
        return [
            '--dataset', str(self.data), '--teacher', f'local-dir:{self.teacher}', '--student', 'resnet18',
            '--student-kwargs', *(f'{key}={value}' for key, value in RESNET.items()),
            *self.common(output), '--drop', '0.1', '--mixup', '0.2', '--model-ema', '--model-ema-decay', '0.9', *more,
        ]  # fmt: skip

    def vit_argv(self, output: Path, *more: str) -> list[str]:
        """A job without anything that looks at more than one image: no batch statistics, dropout or mixup."""
        kwargs = [f'{key}={value}' for key, value in {**VIT, 'depth': 2, 'img_size': SIZE}.items()]
        return [
            '--dataset', str(self.data), '--teacher', f'local-dir:{self.vit_teacher}', '--student', 'test_vit',
            '--student-kwargs', *kwargs, '--prompt-norm', 'layer', *self.common(output), '--opt', 'adamw',
            '--lr', '1e-3', *more,
        ]  # fmt: skip

    def common(self, output: Path) -> list[str]:
        return [
            '--output', str(output), '--input-size', '3', str(SIZE), str(SIZE), '--mean', '0.5', '--std', '0.25',
            '--crop-pct', '1', '--crop-padding', '2', '--epochs', '3', '--batch-size', '32', '--lr', '0.05', '--cpu',
            '--temperature', '2',
        ]  # fmt: skip


def write_images(folder: Path, count: int, seed: int) -> None:
    """Class folders of noise around a colour and a stripe of their own."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.normal(128, 50, (SIZE, SIZE, 3))
            pixels[:, :, label] += 25
            pixels[label * 5 : label * 5 + 3] += 40
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f'{i:03}.png')


def write_teacher(folder: Path, architecture: str, **kwargs: object) -> None:
    torch.manual_seed(3)
    model = timm.create_model(architecture, num_classes=len(CLASSES), **kwargs)
    save_student(model, folder, label_names=CLASSES, data_config=DATA_CONFIG)


@pytest.fixture(scope='session')
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    root = tmp_path_factory.mktemp('tiny')
    # 214 images leave a last batch of 22 out in training; 43 leave one of 11 to be evaluated.
    write_images(root / 'data' / 'train', 72, seed=0)
    write_images(root / 'data' / 'val', 15, seed=1)
    (root / 'data' / 'val' / CLASSES[0] / '000.png').unlink()
    (root / 'data' / 'val' / CLASSES[1] / '000.png').unlink()
    write_teacher(root / 'teacher', 'resnet18', **{**RESNET, 'channels': [8, 16, 16, 32]})
    write_teacher(root / 'vit_teacher', 'test_vit', img_size=SIZE, **VIT)
    return TinyJob(root / 'data', root / 'teacher', root / 'vit_teacher')


@pytest.fixture
def make_accelerator(fresh_accelerate: Callable[[], None]) -> Callable[..., Accelerator]:
    def make(**kwargs: object) -> Accelerator:
        fresh_accelerate()
        return Accelerator(cpu=True, **kwargs)

    return make


@pytest.fixture(scope='session')
def default_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `train/` has for the default job, and of each split the first 500 images."""
    root = tmp_path_factory.mktemp('default')
    for name in ('distill.py', 'recipes/quickstart.yaml'):
        (root / 'train' / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / 'train' / name, root / 'train' / name)
    quickstart = root / 'train' / 'quickstart'
    shutil.copytree(ROOT / 'train' / 'quickstart' / 'teacher', quickstart / 'teacher')
    (quickstart / 'data').mkdir()
    for file in (ROOT / 'train' / 'quickstart' / 'data').glob('*.parquet'):
        pq.write_table(pq.read_table(file).slice(0, 500), quickstart / 'data' / file.name)
    return root
