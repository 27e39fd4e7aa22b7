"""A real, tiny run of the main job, to publish from."""

from __future__ import annotations

from pathlib import Path

from .clients import LABELS, make_model, save_model

OPTIONS = (
    '--method dfpt --baselines kd --teacher hf-hub:alice/teacher --student test_efficientnet --dataset images '
    '--input-size 3 64 64 --epochs 1 --batch-size 8 --val-fraction 0.4 --output run --cpu --no-aug --seed 7'
)


def make_images(folder: str, names: list[str], each: int = 5) -> None:
    """Class folders with coloured noise."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for i, name in enumerate(names):
        (Path(folder) / name).mkdir(parents=True)
        for k in range(each):
            noise = random.integers(0, 80, (64, 64, 3)) + np.array([30 * i, 100, 150 - 30 * i])
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(Path(folder) / name / f'{k}.png')


def make_teacher_folder(folder: str) -> None:
    save_model(folder)


def make_run() -> int:
    """Run the main job in the working folder; the teacher comes from the Hub."""
    from timm_dfpt.training.run import main

    make_images('images', LABELS)
    return main(OPTIONS.split())


def run_of_teacher(name: str) -> str:
    return run_of('teacher', name)


def run_of(option: str, name: str) -> str:
    """Run the main job with another teacher or student; return what it says of that."""
    import contextlib
    import io

    from timm_dfpt.training.run import main

    if not Path('images').exists():
        make_images('images', LABELS)
    alone = ['--student-pretrained', '--method', 'supervised', '--teacher', '', '--baselines']
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        main([*OPTIONS.split(), f'--{option}', name, *(alone if option == 'student' else [])])
    return said.getvalue()


__all__ = ['OPTIONS', 'make_images', 'make_model', 'make_run', 'make_teacher_folder', 'run_of_teacher']
