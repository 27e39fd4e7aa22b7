"""Writing a repository completely to a folder, as it will be on the Hub, and proving that it loads."""
from __future__ import annotations

import dataclasses
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.models import model_entrypoint
from torch import nn

from ..teacher.teacher import DualForwardPathTeacher
from .base import RecordedBase, canonical_base, check_base, fingerprint, hub_repo_of
from .build import CONFIG, WEIGHTS
from .cards import RunFacts, prompt_path_card, student_card
from .config import PromptPathRecord
from .files import read_json, read_specs, write_json
from .licenses import License, license_of
from .options import PromptPathOptions, StudentOptions, Unpack
from .privacy import public
from .prompt_path import PROMPT_CONFIG, PROMPT_WEIGHTS, save_prompt_path
from .repo import open_source
from .student import DISTILLATION, build_student_twin, read_student_config, save_student

__all__ = ['CARD', 'CURVES', 'write_prompt_path_repo', 'write_student_repo']

_logger = logging.getLogger(__name__)

CARD = 'README.md'
CURVES = 'curves.png'
_BUFFERS = ('running_mean', 'running_var', 'num_batches_tracked')


def write_student_repo(
    model: nn.Module | str | os.PathLike[str],
    folder: Path,
    repo_id: str,
    *,
    run: RunFacts | None = None,
    curves: Path | None = None,
    figures: Mapping[Path, str] | None = None,
    **saving: Unpack[StudentOptions],
) -> None:
    """Write the repository of a student to `folder`.

    Args:
        model: The model, or a folder that `save_student` has written.
        folder: Where to write; empty.
        repo_id: Repository that the card is for.
        run: The run that the card reports.
        curves: Figure for the card.
        figures: Further figures: what they show, by file.
        **saving: See `StudentOptions`; of a folder only the license and `distillation` can be given.
    """
    license, distillation = License.given(saving), saving.get('distillation')
    if isinstance(model, nn.Module):
        save_student(model, folder, **saving)
    else:
        _refuse(model, saving, ('label_names', 'data_config', 'model_args'))
        _copy(Path(model), folder, (CONFIG, WEIGHTS), (DISTILLATION,))
        if distillation is not None:
            write_json(folder / DISTILLATION, distillation)
    if (folder / DISTILLATION).is_file():
        write_json(folder / DISTILLATION, public(read_json(folder / DISTILLATION)))
    config = read_student_config(open_source(folder))
    if license.license is not None:
        license.write_to(config)
        write_json(folder / CONFIG, config)
    if curves is not None:
        shutil.copyfile(curves, folder / CURVES)
    for file in figures or ():
        shutil.copyfile(file, folder / file.name)
    recipe = read_json(folder / DISTILLATION).get('recipe') if (folder / DISTILLATION).is_file() else None
    card = student_card(
        repo_id,
        config,
        params=sum(p.numel() for p in build_student_twin(config).parameters()),
        license=License.of_config(config),
        run=run,
        curves=CURVES if curves is not None else None,
        figures={file.name: caption for file, caption in (figures or {}).items()},
        registered_by=_registered_by(config['architecture']),
        background=recipe.get('background') if isinstance(recipe, dict) else None,
    )
    card.save(folder / CARD)


def _registered_by(architecture: str) -> str | None:
    """Return the module that registers an architecture with timm, if timm itself does not."""
    module: str = model_entrypoint(architecture).__module__
    package = module.split('.')[0]
    return None if package == 'timm' else 'timm_dfpt.models' if package == 'timm_dfpt' else module


def write_prompt_path_repo(
    teacher: DualForwardPathTeacher | str | os.PathLike[str],
    folder: Path,
    repo_id: str,
    *,
    license: License | None = None,
    token: str | bool | None = None,
    run: RunFacts | None = None,
    curves: Path | None = None,
    **saving: Unpack[PromptPathOptions],
) -> None:
    """Write the repository of a prompt path to `folder`.

    Args:
        teacher: The teacher, or a folder that `save_prompt_path` has written.
        folder: Where to write; empty.
        repo_id: Repository that the card is for.
        license: License of the weights.
        token: Token for the base.
        run: The run that the card reports.
        curves: Figure for the card.
        **saving: See `PromptPathOptions`; of a folder `label_names` and `data_config` stay as saved.
    """
    if isinstance(teacher, DualForwardPathTeacher):
        save_prompt_path(teacher, folder, **saving)
    else:
        _refuse(teacher, saving, ('label_names', 'data_config'))
        _copy(Path(teacher), folder, (PROMPT_CONFIG, PROMPT_WEIGHTS), ())
    config = PromptPathRecord.from_dict(read_json(folder / PROMPT_CONFIG))
    base_model, training = canonical_base(saving.get('base_model')), saving.get('training')
    if base_model is not None:
        config = dataclasses.replace(config, base_model=base_model or None, base_revision=saving.get('base_revision'))
    config = dataclasses.replace(config, training=public(config.training if training is None else training))
    config, base = _proven(config.validated(), folder, token)
    if isinstance(teacher, DualForwardPathTeacher):
        base = teacher.model
    write_json(folder / PROMPT_CONFIG, config.to_dict())
    if curves is not None:
        shutil.copyfile(curves, folder / CURVES)
    specs = read_specs(folder / PROMPT_WEIGHTS)
    card = prompt_path_card(
        repo_id,
        config,
        params=sum(math.prod(shape) for name, (shape, _) in specs.items() if not name.endswith(_BUFFERS)),
        size_bytes=(folder / PROMPT_WEIGHTS).stat().st_size,
        base_link=hub_repo_of(config.base_model),
        teacher_license=license_of(base),
        license=license,
        run=run,
        curves=CURVES if curves is not None else None,
    )
    card.save(folder / CARD)


def _proven(
    config: PromptPathRecord, folder: Path, token: str | bool | None
) -> tuple[PromptPathRecord, nn.Module | None]:
    """Build the base that a config names, compare it with the fingerprint, and record its commit."""
    if config.base_model is None:
        _logger.warning(
            'The teacher of this prompt path is not on the Hub: others must have it, and load the path with '
            'model=teacher.'
        )
        return config, None
    try:
        base = RecordedBase(config, open_source(folder, token=token))
        model = base.build()
        check_base(config, fingerprint(model))
    except ValueError as error:
        raise ValueError(
            f'Nobody could load this prompt path, because {config.base_model!r} is not the teacher that it was tuned '
            'on. Publish that teacher with timm_dfpt.push_student(teacher.model, "user/teacher") and pass '
            f'base_model="hf-hub:user/teacher"; or pass base_model="" if others are to bring it themselves. ({error})'
        ) from error
    return dataclasses.replace(config, base_revision=config.base_revision or base.commit), model


def _refuse(folder: str | os.PathLike[str], saving: Mapping[str, Any], names: Sequence[str]) -> None:
    if any(saving.get(name) is not None for name in names):
        raise ValueError(f'{str(folder)!r} is published as it was saved: leave {", ".join(names)} out.')


def _copy(source: Path, folder: Path, needed: Sequence[str], optional: Sequence[str]) -> None:
    missing = [name for name in needed if not (source / name).is_file()]
    if missing:
        raise FileNotFoundError(f'{str(source)!r} has no {missing[0]}, so there is nothing to publish.')
    for name in (*needed, *optional):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
