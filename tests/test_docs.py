"""Every file of the repository that its documents name exists, in prose, links and commands; so do headings."""
from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ('docs', 'examples', 'benchmarks')
DOCUMENTS = [*ROOT.glob('*.md'), *(path for name in FOLDERS for path in ROOT.glob(f'{name}/**/*.md'))]
# Tables, most of which a script writes.
TABLES = ('FOREIGN.md', 'PERFORMANCE_TABLES.md', 'STUDY.md')
PUBLIC = ('backbone', 'deploy', 'hub', 'losses', 'models', 'tasks', 'teacher', 'testing')
# In the prose and in commands, what begins with a folder of the repository; and modules that are run.
PATH = re.compile(r'(?<![\w./-])(?:(?:timm_dfpt|train|tests|benchmarks|docs|hub_cards|\.ci)/[\w./*-]*[\w*]|\w+\.toml)')
MODULE = re.compile(r'-m ((?:timm_dfpt|train|tests|benchmarks)[\w.]*\w)')
LINK = re.compile(r'\]\((?!https?:|#)([^)#\s]+)')
ANCHOR = re.compile(r'\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)')


def named(document: Path) -> set[str]:
    """Return the paths that a document names, relative to the root of the repository."""
    text = document.read_text(encoding='utf-8')
    links = {str((document.parent / link).resolve().relative_to(ROOT)) for link in LINK.findall(text)}
    return links | set(PATH.findall(text)) | {name.replace('.', '/') for name in MODULE.findall(text)}


def exists(path: str) -> bool:
    return any(True for name in (path, f'{path}.py') for _ in ROOT.glob(name))


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(document: Path) -> None:
    missing = sorted(path for path in named(document) if not exists(path))
    assert not missing, f'{document.name} names {", ".join(missing)}'


def test_what_is_missing_is_found(tmp_path: Path) -> None:
    found = 'Run `train/nothing.py` or\n```\npython -m benchmarks.nothing --x\n```\nand `.ci/no`, photos/train/cat.'
    (tmp_path / 'a.md').write_text(found)
    assert named(tmp_path / 'a.md') == {'train/nothing.py', 'benchmarks/nothing', '.ci/no'}
    assert not any(map(exists, named(tmp_path / 'a.md')))


def anchors(document: Path) -> set[str]:
    """Return what GitHub makes of the headings of a document."""
    headings = re.findall(r'^#+ (.+)$', document.read_text(encoding='utf-8'), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_headings_that_are_linked_exist(document: Path) -> None:
    links = ANCHOR.findall(document.read_text(encoding='utf-8'))
    targets = [(document.parent / path if path else document, anchor) for path, anchor in links]
    missing = [f'{target.name}#{anchor}' for target, anchor in targets if anchor not in anchors(target)]
    assert not missing, f'{document.name} links {", ".join(missing)}'


def test_pages_are_short() -> None:
    """Else nobody finds anything in them."""
    lengths = {path.name: len(path.read_text(encoding='utf-8').splitlines()) for path in (ROOT / 'docs').glob('*.md')}
    assert not {name: length for name, length in lengths.items() if length > 200 and name not in TABLES}


def test_every_page_is_in_the_table_of_contents() -> None:
    text = (ROOT / 'docs' / 'index.md').read_text(encoding='utf-8')
    pages = {path.stem for path in (ROOT / 'docs').glob('*.md')} - {'index'}
    assert pages == set(text.partition(':hidden:')[2].replace('`', '').split())
    assert pages == set(re.findall(r'\]\((\w+)\.md\)', text)) - {'README'}


def test_public_names_are_in_the_api() -> None:
    """The site fails on it, too, but is not built by default."""
    text = (ROOT / 'docs' / 'API.md').read_text(encoding='utf-8')
    listed = set(re.findall(r'^\.\. auto\w+:: (?:[\w.]+\.)?(\w+)$', text, flags=re.MULTILINE))
    for module in ('timm_dfpt', *(f'timm_dfpt.{name}' for name in PUBLIC)):
        names = set(importlib.import_module(module).__all__) - {'__version__', 'models'}
        assert names <= listed, f'docs/API.md lacks {sorted(names - listed)} of {module}'


def test_public_names_have_docstrings() -> None:
    """Ruff sees to those of functions and classes where they are written; these are the ones that users see."""
    for module in ('timm_dfpt', *(f'timm_dfpt.{name}' for name in PUBLIC)):
        package = importlib.import_module(module)
        for name in package.__all__:
            value = getattr(package, name)
            if inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value):
                assert inspect.getdoc(value), f'{module}.{name}'
