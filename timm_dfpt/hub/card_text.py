"""How cards write things: names, links, options, inputs of a model."""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

__all__ = [
    'args_text', 'cell_text', 'classes_text', 'fact_cells', 'hub_link', 'input_text', 'is_hub_id',
    'recipe_text', 'slug',
]  # fmt: skip

_HUB_ID = re.compile(r'[\w.\-]+/[\w.\-]+')


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """Return options as YAML, without those that say nothing."""
    shown = {key: value for key, value in recipe.items() if value not in (None, [], {})}
    return yaml.safe_dump(shown, sort_keys=False, default_flow_style=None, width=110).strip() if shown else ''


def args_text(args: Mapping[str, Any] | None) -> str:
    """Return the arguments of an architecture that matter to a reader."""
    shown = {k: v for k, v in (args or {}).items() if k not in ('in_chans', 'global_pool', 'num_classes')}
    return f' with `{", ".join(f"{k}={v}" for k, v in shown.items())}`' if shown else ''


def input_text(cfg: Mapping[str, Any], short: bool = False) -> str:
    """Return what images a model sees, and how they are prepared."""
    channels, height, width = cfg.get('input_size') or (3, 224, 224)
    size = f'{height} x {width} pixels, {channels} channel{"s" if channels != 1 else ""}'
    if short:
        return size
    mean, std = (', '.join(f'{v:.4g}' for v in cfg.get(key) or ()) for key in ('mean', 'std'))
    crop = f', crop {cfg["crop_pct"]:.4g} ({cfg.get("crop_mode", "center")})' if cfg.get('crop_pct') else ''
    return f'{size}; mean {mean}; std {std}; {cfg.get("interpolation", "bicubic")} resize{crop}'


def classes_text(names: Sequence[str] | None, most: int = 10) -> str:
    """Return the first names of classes, and how many more there are."""
    if not names:
        return 'unnamed'
    shown = ', '.join(cell_text(name) for name in names[:most])
    return shown + (f', and {len(names) - most} more' if len(names) > most else '')


def is_hub_id(name: str | None) -> bool:
    """Say whether a name is that of a repository on the Hub."""
    return name is not None and _HUB_ID.fullmatch(name) is not None


def hub_link(name: str | None) -> str | None:
    """Return a link to a repository on the Hub, or the name of anything else."""
    if name is None:
        return None
    repo = name.removeprefix('hf-hub:')
    return f'[{repo}](https://huggingface.co/{repo})' if is_hub_id(repo) else f'`{cell_text(name)}`'


def fact_cells(facts: Mapping[str, str | None]) -> list[tuple[str, str]]:
    """Return the facts that are known, each in one line."""
    return [(name, value.replace('\n', ' ')) for name, value in facts.items() if value is not None]


def cell_text(text: str) -> str:
    """Keep a name from a file from breaking out of its table cell."""
    return re.sub(r'([|`<>\[\]])', r'\\\1', ' '.join(text.split()))


def slug(name: str | None) -> str:
    """Return a name as the Hub takes it for a dataset."""
    return re.sub(r'[^\w.\-]+', '-', name or 'unknown').strip('-') or 'unknown'
