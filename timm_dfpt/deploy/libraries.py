"""The JavaScript of a demo page: pinned versions from npm, each file checked against its hash."""
from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

__all__ = ['LIBRARIES', 'copy_libraries']


class _Library(NamedTuple):
    version: str
    files: dict[str, str]


LIBRARIES = {
    '@huggingface/transformers': _Library(
        '4.3.1',
        {
            'dist/transformers.web.min.js': 'cc66a4de933cc21f0158dcbf72607721bfed0044d3791b2e9874f653659f979b',
            'LICENSE': 'cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30',
        },
    ),
    'onnxruntime-web': _Library(
        '1.31.0-dev.20260914-8d85527a0',
        {
            'dist/ort.wasm.bundle.min.mjs': '17b52c1ac62b421dc508b4c28b9a9675251c6e25dd512ef54b83a5e2c4242869',
            'dist/ort-wasm-simd-threaded.wasm': '06ba057753da3847e4c24f02d91ab133455b0817c69a44993a9a53a2146df9e3',
        },
    ),
}
"""Version and sha256 of each file by npm package; onnxruntime-web is the one that this transformers.js asks for."""

_MIT = """Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def copy_libraries(folder: Path, source: str | os.PathLike[str] | None = None) -> None:
    """Put the JavaScript and its licenses into a folder.

    Args:
        folder: Where to write; created.
        source: A `node_modules` folder that has the packages; by default npm fetches them. No script of theirs is run.

    Raises:
        FileNotFoundError: If there is no npm, or the folder lacks a file.
        ValueError: If npm fails, or a file is not the one that was pinned.
    """
    folder.mkdir(parents=True)
    with _given(source) as packages:
        for name, library in LIBRARIES.items():
            for file, digest in library.files.items():
                path = packages / name / file
                if not path.is_file():
                    raise FileNotFoundError(
                        f'js_libraries: {str(packages)!r} has no {name}/{file}: {_install_command()}'
                    )
                content = path.read_bytes()
                if hashlib.sha256(content).hexdigest() != digest:
                    raise ValueError(
                        f'js_libraries: {name}/{file} is not from version {library.version}: {_install_command()}'
                    )
                if file != 'LICENSE':
                    (folder / Path(file).name).write_bytes(content)
        apache = (packages / '@huggingface/transformers/LICENSE').read_text(encoding='utf-8')
    versions = {name: library.version for name, library in LIBRARIES.items()}
    parts = [
        f'transformers.web.min.js: @huggingface/transformers {versions["@huggingface/transformers"]}, with '
        '@huggingface/tokenizers; Copyright Hugging Face; Apache License 2.0, see the end.',
        f'In it @huggingface/jinja: MIT License\n\nCopyright (c) 2023 Hugging Face\n\n{_MIT}',
        f'ort.wasm.bundle.min.mjs, ort-wasm-simd-threaded.wasm: onnxruntime-web {versions["onnxruntime-web"]}: MIT '
        f'License\n\nCopyright (c) Microsoft Corporation\n\n{_MIT}\nNotices of the software in it: '
        'https://github.com/microsoft/onnxruntime/blob/main/ThirdPartyNotices.txt',
        apache,
    ]
    rule = '\n' + 80 * '-' + '\n'
    (folder / 'LICENSES.txt').write_text(rule.join(parts), encoding='utf-8')


def _install_command() -> str:
    packages = ' '.join(f'{name}@{library.version}' for name, library in LIBRARIES.items())
    return f'npm install --ignore-scripts {packages}'


@contextmanager
def _given(source: str | os.PathLike[str] | None) -> Iterator[Path]:
    if source is not None:
        yield Path(source)
        return
    npm = shutil.which('npm')
    if npm is None:
        raise FileNotFoundError(
            'demo_space needs JavaScript from npm, which is not installed: install it, or name a node_modules folder '
            f'with --js-libraries, made elsewhere by: {_install_command()}'
        )
    with tempfile.TemporaryDirectory() as temporary:
        packages = Path(temporary)
        for name, library in LIBRARIES.items():
            # Of onnxruntime-web only two files of a hundred are wanted, none of what it depends on.
            command = [npm, 'pack', '--silent', '--ignore-scripts', f'{name}@{library.version}']
            done = subprocess.run(command, cwd=packages, capture_output=True, text=True, timeout=600, check=False)
            if done.returncode:
                reason = ' '.join(done.stderr.split())[-300:]
                raise ValueError(f'demo_space: npm could not fetch {name}@{library.version}: {reason}')
            with tarfile.open(packages / done.stdout.split()[-1]) as archive:
                for file in library.files:
                    content = archive.extractfile(f'package/{file}')
                    assert content is not None
                    path = packages / name / file
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content.read())
        yield packages
