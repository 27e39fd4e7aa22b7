"""What heads and fusions of low rank save: size of a prompt path by number of classes, and CPU time of a step.

    python -m benchmarks.low_rank --rounds 7
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import nn

import timm_dfpt
from timm_dfpt.tasks.dfpt import DFPTDistillationTask

from .measure import interleaved, spread
from .ways import RESULTS, create_optimizers

CLASSES = (10, 1000, 21841)
LOW: dict[str, Any] = {'head_rank': 16, 'fusion_rank': 16}
FORMS: dict[str, dict[str, Any]] = {
    'default': {},
    "`fusion='depthwise'`": {'fusion': 'depthwise'},
    '`head_rank=16`': {'head_rank': 16},
    '`head_rank=16, fusion_rank=16`': LOW,
    'the same, `partial_ratio=0.25`': {**LOW, 'partial_ratio': 0.25},
}
# Of 10 classes a correction of rank 16 would be larger than the head.
_FEW = {'head_rank': 8}


def size(model: nn.Module) -> int:
    """Return the bytes of a model's tensors, which are all but a few kB of its file."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def wrapped(model: Any, form: dict[str, Any]) -> timm_dfpt.DualForwardPathTeacher:
    """Give a model a prompt path of a form."""
    few = _FEW if model.num_classes < 32 and 'head_rank' in form else {}
    return timm_dfpt.wrap(model, prompt=timm_dfpt.PromptConfig(**{**form, **few}))


def sizes(teachers: Sequence[str]) -> list[str]:
    """Return a table of sizes; nothing is computed and no memory is taken."""
    counts = ' | '.join(f'{classes:,} classes' for classes in CLASSES)
    lines = [f'| teacher | prompt path | {counts} |', '|---|---|' + '---:|' * len(CLASSES)]
    for teacher in teachers:
        for name, form in FORMS.items():
            cells = []
            for classes in CLASSES:
                with torch.device('meta'):
                    paths = wrapped(timm.create_model(teacher, num_classes=classes), form)
                own, whole = size(paths.prompt_path), size(paths.model)
                cells.append(f'{own / 1e6:.1f} of {whole / 1e6:.1f} MB, {100 * own / whole:.1f}%')
            lines.append(f'| {teacher} | {name} | {" | ".join(cells)} |')
    return lines


def times(teacher: str, student: str, classes: int, batch: int, side: int, rounds: int) -> list[str]:
    """Return rows of a table of step times, the forms taken in turns."""
    torch.manual_seed(0)
    x, target = torch.randn(batch, 3, side, side), torch.randint(classes, (batch,))
    model = timm.create_model(teacher, num_classes=classes)
    steps = {}
    for name, form in FORMS.items():
        task = DFPTDistillationTask(
            timm.create_model(student, num_classes=classes), wrapped(model, form), verbose=False
        )
        task.train()
        optimizers = create_optimizers(task)

        def step(task: Any = task, optimizers: Any = optimizers) -> None:
            task(x, target)['loss'].backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        steps[name] = step
    seconds = interleaved(steps, rounds)
    whole = seconds['default']
    return [
        f'| {teacher} -> {student}, {classes:,} classes | {name} | {1000 * spread(found)[0]:.0f} | '
        + '{:.2f} ({:.2f}-{:.2f}) |'.format(*spread([a / b for a, b in zip(found, whole, strict=True)]))
        for name, found in seconds.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=7, help='rounds of a measurement (%(default)s)')
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    lines = [
        '# Heads and fusions of low rank',
        f'Made by `python -m benchmarks.low_rank --rounds {args.rounds}`. Of 10 classes the head has rank 8.',
        '## Size\n\nAll tensors of the prompt path, as a share of those of the teacher.',
        '\n'.join(sizes(('resnet50', 'resnet18', 'convnext_tiny', 'vit_small_patch16_224'))),
        '## CPU time of a step\n\nDFPT-KD at 96 px, batch 4, one thread, with the updates of SGD and AdamW. '
        'Medians; quartiles of the ratios within a round.',
        '\n'.join([
            '| pair | prompt path | CPU ms | time / default |', '|---|---|---:|---:|',
            *(row for classes in CLASSES[1:] for row in times('resnet50', 'resnet18', classes, 4, 96, args.rounds)),
        ]),
    ]
    (RESULTS / 'low_rank.md').write_text('\n\n'.join(lines) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
