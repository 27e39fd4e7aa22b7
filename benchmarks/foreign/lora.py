"""Tune a teacher by low-rank adapters (LoRA, arXiv 2106.09685) of the library peft, and save it with them merged.

The adapters are put on all linear layers and all convolutions without groups and dilation, which peft does not know;
the new classifier is trained whole, and BatchNorm takes statistics of the new images. Batches, augmentation, optimizers
and schedules are those of the trainer.
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import nn

import timm_dfpt
from benchmarks.foreign.meter import Meter
from timm_dfpt.backbone.heads import replace_head
from timm_dfpt.job.devices import create_accelerator
from timm_dfpt.job.optim import create_optimizer, create_scheduler
from timm_dfpt.job.options import TrainConfig
from timm_dfpt.training.run import close, set_up

__all__ = ['tune']


def tune(config: TrainConfig, options: Mapping[str, Any], meter: Meter) -> Path:
    """Tune a model by adapters.

    Args:
        config: Model (`student`), data and recipe.
        options: `rank`, and `alpha`, by which over the rank what the adapters say is multiplied.
        meter: Measures the tuning.

    Returns:
        The folder of the model.

    Raises:
        ImportError: If peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('The way with LoRA needs peft: pip install peft.') from error
    setup = set_up(config, create_accelerator(config))
    loader: Any = setup.loaders['train']
    with meter.running():
        model: Any = timm.create_model(str(config.student), pretrained=True)
        head = model.pretrained_cfg['classifier']
        replace_head(model, [head], setup.data.num_classes, init_scale=0.0)
        targets = [name for name, each in model.named_modules() if name != head and _can_adapt(each)]
        lora = LoraConfig(
            r=options['rank'], lora_alpha=options['alpha'], target_modules=targets, modules_to_save=[head]
        )
        adapted = get_peft_model(model, lora)
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = create_optimizer(config.opt, trained, lr=config.lr, weight_decay=config.weight_decay)
        scheduler = create_scheduler(optimizer, len(loader), **config.schedule)
        adapted.train()
        update = 0
        for epoch in range(config.epochs):
            loader.set_epoch(epoch)
            for input, target, _ in loader:
                scheduler.step_update(update)
                optimizer.zero_grad()
                nn.functional.cross_entropy(adapted(input), target).backward()
                optimizer.step()
                update += 1
        merged: Any = adapted.eval().merge_and_unload()
    folder = Path(str(config.output)) / 'student'
    # A plain model again: peft leaves wrappers around what was saved whole.
    plain: Any = timm.create_model(str(config.student), pretrained=True, num_classes=setup.data.num_classes)
    state = {name.replace('.modules_to_save.default', ''): value for name, value in merged.state_dict().items()}
    plain.load_state_dict({name: value for name, value in state.items() if '.original_module' not in name}, strict=True)
    seen = {key: setup.input_config[key] for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')}
    plain.pretrained_cfg = {**plain.pretrained_cfg, **seen}
    timm_dfpt.save_student(plain, str(folder), label_names=setup.data.class_names)
    close(setup)
    return folder


def _can_adapt(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.dilation == (1, 1)
    return isinstance(module, nn.Linear)
