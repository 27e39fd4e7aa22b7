"""What transformers.js and a browser make of a published student, against timm; from files, without a network."""
from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.tiny import CLASSES, TinyJob
from timm_dfpt.data.images import decode_image
from timm_dfpt.deploy.libraries import LIBRARIES
from timm_dfpt.deploy.transformers_js import preprocessor_config
from timm_dfpt.training.publish import publish_run
from timm_dfpt.training.run import main

pytest.importorskip('onnxruntime', reason="the extra 'onnx' is not installed")
pytest.importorskip('onnxscript', reason="the extra 'onnx' is not installed")
ROOT = Path(__file__).parents[2]
HOSTILE = ('<img src=x onerror=alert(1)>', 'b"&amp;\'', '</script>{{ 7 * 7 }}')


def test_preprocessing_is_described_as_timm_does_it() -> None:
    def described(size: tuple[int, int, int], **more: Any) -> dict[str, Any]:
        return preprocessor_config({'input_size': size, 'mean': (0.5,) * size[0], 'std': (0.2,) * size[0], **more})

    small = described((3, 224, 224), crop_pct=0.9, interpolation='bicubic')
    assert (small['image_processor_type'], small['size'], small['crop_pct'], small['resample']) == (
        'ConvNextImageProcessor', {'shortest_edge': 224}, 0.9, 3
    )  # fmt: skip
    large = described((3, 384, 384), crop_pct=0.95)
    assert (large['size'], large['crop_size']) == ({'shortest_edge': 404}, {'height': 384, 'width': 384})
    squashed = described((3, 96, 128), crop_pct=0.8, crop_mode='squash')
    assert squashed['size'] == {'height': 120, 'width': 160}
    assert described((1, 28, 28))['image_mean'] == [0.5] * 3
    for mode, size in (('border', (3, 64, 64)), ('center', (3, 64, 32))):
        with pytest.raises(ValueError, match='is not supported by transformers.js'):
            described(size, crop_mode=mode)


@pytest.fixture(scope='module')
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformers.js and what it needs, from `TIMM_DFPT_NODE_MODULES` or npm."""
    if shutil.which('node') is None or shutil.which('npm') is None:
        pytest.skip('node and npm are not installed')
    given = os.environ.get('TIMM_DFPT_NODE_MODULES')
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp('npm')
    version = LIBRARIES['@huggingface/transformers'].version
    # Its scripts would fetch CUDA.
    command = ['npm', 'install', '--ignore-scripts', '--no-save', f'@huggingface/transformers@{version}']
    if subprocess.run(command, cwd=folder, capture_output=True).returncode:
        pytest.skip('npm cannot fetch transformers.js')
    return folder / 'node_modules'


def run_of(tiny: TinyJob, folder: Path, kind: str) -> tuple[Path, list[Path]]:
    """A run with class names that are not harmless; return it, and its validation images."""
    data = folder / 'data'
    for split in ('train', 'val'):
        for old, new in zip(CLASSES, HOSTILE, strict=True):
            shutil.copytree(tiny.data / split / old, data / split / new.replace('/', '\u2044'))
    channels = ['1', '16', '16'] if kind == 'grey' else ['3', '16', '16']
    more = ['--include-preprocessing'] if kind == 'pixels' else []
    argv = tiny.argv(folder / 'run', '--epochs', '3', '--method', 'supervised', '--export', 'onnx', *more)
    drop = argv.index('--teacher')
    argv = [*argv[:drop], *argv[drop + 2 :], '--dataset', str(data), '--input-size', *channels]
    argv += ['--crop-pct', '0.8', '--push-to-hub', ''] if kind == 'crop' else []
    assert main(argv) == 0
    # As large as they are seen, so that nothing is resized, which sharp does not do as Pillow does.
    return folder / 'run', sorted((data / 'val').rglob('*.png'))


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['color', 'grey', 'pixels', 'crop'])
def test_transformers_js_says_what_timm_says(kind: str, tiny: TinyJob, tmp_path: Path, node_modules: Path) -> None:
    run, images = run_of(tiny, tmp_path, kind)
    images = images[::5]
    if kind == 'crop':
        for image in images:
            Image.open(image).resize((20, 20)).save(image)
    publish_run(run, 'alice/student', push_onnx='alice/student-ONNX', dry_run=tmp_path / 'dry')
    repo = shutil.copytree(tmp_path / 'dry' / 'onnx', tmp_path / 'student-ONNX')
    assert sorted(path.name for path in (repo / 'onnx').iterdir()) == [
        'model.onnx', 'model_fp16.onnx', 'model_quantized.onnx'
    ]  # fmt: skip
    command = ['node', str(Path(__file__).with_name('classify.mjs')), str(node_modules), str(repo), *map(str, images)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said['processor'] == 'ConvNextImageProcessor'
    student = timm.create_model(f'local-dir:{run / "student"}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(student))
    channels = 1 if kind == 'grey' else 3
    inputs = torch.stack([transform(decode_image(str(path), channels)) for path in images])
    with torch.no_grad():
        logits = student(inputs).numpy()
    if kind in ('color', 'crop'):
        for pixels, expected in zip(said['pixels'], inputs.numpy(), strict=True):
            assert np.abs(np.array(pixels['data']).reshape(pixels['dims'])[0] - expected).max() < 1e-5
    bounds = {'fp32': 1e-4, 'fp16': 2e-2, 'q8': 0.3}
    names = student.pretrained_cfg['label_names']
    for dtype, bound in bounds.items():
        assert np.abs(np.array(said['logits'][dtype]) - logits).max() < bound * np.abs(logits).max()
        assert set(said['labels'][dtype][0]) == set(names)
    same = [labels[0] == names[row.argmax()] for labels, row in zip(said['labels']['fp32'], logits, strict=True)]
    assert all(same)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / 'dry' / 'space'))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


@pytest.mark.slow
def test_page_in_a_browser(tiny: TinyJob, tmp_path: Path, node_modules: Path, served: str) -> None:
    chromium = shutil.which('chromium') or shutil.which('chromium-browser')
    if chromium is None:
        pytest.skip('chromium is not installed')
    run, images = run_of(tiny, tmp_path, 'color')
    publish_run(run, demo_space='alice/demo', dry_run=tmp_path / 'dry', js_libraries=node_modules)
    space = tmp_path / 'dry' / 'space'
    for name in ('app.js', 'index.html', 'style.css'):
        assert '//' not in (space / name).read_text().replace('// ', ''), name
    assert 'Copyright (c) Microsoft Corporation' in (space / 'lib' / 'LICENSES.txt').read_text()
    assert 'Apache License' in (space / 'lib' / 'LICENSES.txt').read_text()
    student = timm.create_model(f'local-dir:{run / "student"}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(student))
    inputs = torch.stack([transform(Image.open(path).convert('RGB')) for path in images])
    with torch.no_grad():
        probabilities = student(inputs).softmax(-1)
    # Of an image that int8 cannot decide otherwise.
    sure = int(probabilities.max(1).values.argmax())
    shutil.copy(images[sure], space / 'photo.png')
    command = [
        chromium, '--headless', '--no-sandbox', '--disable-gpu', '--virtual-time-budget=60000',
        '--enable-logging=stderr', '--dump-dom', f'{served}/index.html?image=photo.png',
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert 'data-state="done"' in done.stdout, done.stdout + done.stderr
    assert 'CONSOLE' not in done.stderr, done.stderr
    shown = re.findall(r'<span class="name">(.*?)</span><span class="share">(.*?) %', done.stdout)
    names = student.pretrained_cfg['label_names']
    assert len(shown) == 3
    unescaped = shown[0][0].replace('&lt;', '<').replace('&gt;', '>').replace('&quot;', '"').replace('&amp;', '&')
    assert unescaped == names[int(probabilities[sure].argmax())]
    assert float(shown[0][1]) == pytest.approx(100 * probabilities[sure].max().item(), abs=15)
    assert 'onerror=' not in re.sub(r'&lt;.*?&gt;', '', done.stdout)
    assert re.search(r'\d+ ms', done.stdout)


def test_changed_libraries_are_refused(tmp_path: Path) -> None:
    from timm_dfpt.deploy.libraries import copy_libraries  # raises before it needs any package

    with pytest.raises(FileNotFoundError, match='npm install --ignore-scripts @huggingface/transformers@'):
        copy_libraries(tmp_path / 'a', tmp_path / 'none')
    for name, library in LIBRARIES.items():
        for file in library.files:
            path = tmp_path / 'modules' / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('alert(1)')
    with pytest.raises(ValueError, match='is not from version'):
        copy_libraries(tmp_path / 'b', tmp_path / 'modules')
    assert list((tmp_path / 'b').iterdir()) == []
