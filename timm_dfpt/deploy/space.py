"""A page in which a student runs in the browser, as a static Space on the Hub or from any web server."""
from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..hub.export_table import exports_table
from ..hub.files import read_json, write_json
from ..hub.licenses import License
from ..version import __version__
from .libraries import copy_libraries

__all__ = ['write_space']

_TEMPLATES = Path(__file__).parent / 'templates' / 'space'
_PAGE = ('index.html', 'app.js', 'style.css')
_LARGEST_LOSS = 1.0  # points of top-1


def write_space(
    onnx_repo: Path,
    folder: Path,
    space_id: str,
    *,
    base_model: str | None = None,
    rows: Sequence[Mapping[str, Any]] = (),
    license: License | None = None,
    js_libraries: str | os.PathLike[str] | None = None,
) -> None:
    """Write a Space with everything that it needs: page, model and libraries.

    Its model is the int8 file, or that of float32 where int8 lost more than a point.

    Args:
        onnx_repo: Folder that `write_onnx_repo` has written.
        folder: Where to write; empty.
        space_id: The Space, `'user/name'`.
        base_model: The student's repository, whose card the page links to.
        rows: What was measured of the files.
        license: License of the weights.
        js_libraries: A `node_modules` folder; by default npm fetches the libraries.

    Raises:
        FileNotFoundError: If libraries are missing.
        ValueError: If they are not those that were pinned.
    """
    top1 = {row['format']: row.get('top1') for row in rows}
    timm, int8 = top1.get('timm'), top1.get('ONNX int8')
    loses = timm is not None and int8 is not None and timm - int8 > _LARGEST_LOSS
    file = 'model.onnx' if loses else 'model_quantized.onnx'
    for name in _PAGE:
        shutil.copyfile(_TEMPLATES / name, folder / name)
    (folder / 'model' / 'onnx').mkdir(parents=True)
    for name in ('config.json', 'preprocessor_config.json', f'onnx/{file}'):
        shutil.copyfile(onnx_repo / name, folder / 'model' / name)
    copy_libraries(folder / 'lib', js_libraries)
    config = read_json(folder / 'model' / 'config.json')
    title = (base_model or space_id).split('/')[-1]
    card = f'https://huggingface.co/{base_model}' if base_model else None
    write_json(folder / 'settings.json', {'title': title, 'dtype': 'fp32' if loses else 'q8', 'card': card})
    front = {
        'title': title,
        'sdk': 'static',
        'pinned': False,
        **(license or License()).metadata(),
        **({'models': [base_model]} if base_model else {}),
    }
    import jinja2  # costs 0.1 s

    text = jinja2.Template((_TEMPLATES / 'README.md').read_text(encoding='utf-8')).render(
        front=yaml.safe_dump(front, sort_keys=False).strip(),
        title=title,
        architecture=config['timm_architecture'],
        classes=len(config['id2label']),
        base_model=base_model,
        table=exports_table(rows) if rows else '',
        version=__version__,
    )
    (folder / 'README.md').write_text(text, encoding='utf-8')
