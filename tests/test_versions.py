"""The oldest versions that are tested are the oldest that are admitted."""
from pathlib import Path

import pytest

tomllib = pytest.importorskip('tomllib', reason='Python 3.11 has it')

ROOT = Path(__file__).parents[1]
# They look at the code and are no part of what runs.
CHECKERS = ('mypy', 'ruff', 'types-PyYAML')


def test_pins_are_lower_bounds():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
    admitted = [*project['dependencies'], *project['optional-dependencies']['dev']]
    pins = (ROOT / '.ci' / 'oldest.txt').read_text(encoding='utf-8').splitlines()
    assert [pin for pin in pins if not pin.startswith('#')] == [
        bound.replace('>=', '==') for bound in admitted if '>=' in bound and not bound.startswith(CHECKERS)
    ]


def test_the_group_of_developers_is_the_extra():
    """But that a group cannot name the extras of its own project."""
    found = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))
    extras = found['project']['optional-dependencies']
    own = [each for each in extras['dev'] if not each.startswith('timm-dfpt')]
    assert set(found['dependency-groups']['dev']) == {*own, *extras['onnx']}
