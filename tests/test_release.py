"""What a release says of itself: one version and date in all files, workflows that are whole, no invented address."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import timm_dfpt

ROOT = Path(__file__).parents[1]


def load(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding='utf-8'))


def test_newest_entry_of_the_changelog_is_this_version() -> None:
    entries = re.findall(r'^## (\S+) - (\d{4}-\d\d-\d\d)$', (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8'), re.M)
    citation = load('CITATION.cff')
    assert entries[0] == (timm_dfpt.__version__, citation['date-released'])
    assert citation['version'] == timm_dfpt.__version__


def test_citation_names_the_paper() -> None:
    citation = load('CITATION.cff')
    paper = citation['preferred-citation']
    assert '2506.18244' in paper['url']
    assert [author['family-names'] for author in paper['authors']] == ['Li', 'Liu', 'Hu', 'Chen', 'Chen']
    assert {'cff-version', 'message', 'title', 'authors'} <= set(citation)


@pytest.mark.parametrize('name', ['ci', 'release'])
def test_workflows_run_the_tests(name: str) -> None:
    steps = [step for job in load(f'.github/workflows/{name}.yml')['jobs'].values() for step in job['steps']]
    assert '.ci/run' in [step.get('run') for step in steps]


def test_publishing_waits_for_tests_and_has_no_token() -> None:
    publish = load('.github/workflows/release.yml')['jobs']['publish']
    assert set(publish['needs']) == {'build', 'test'}
    assert publish['permissions'] == {'id-token': 'write'}
    assert 'secrets.' not in (ROOT / '.github' / 'workflows' / 'release.yml').read_text(encoding='utf-8')


@pytest.mark.parametrize('file', sorted((ROOT / '.github' / 'ISSUE_TEMPLATE').glob('[!c]*.yml')), ids=lambda f: f.stem)
def test_issue_forms_have_what_github_asks_for(file: Path) -> None:
    form = load(str(file.relative_to(ROOT)))
    assert {'name', 'description', 'body'} <= set(form)
    ids = [part['id'] for part in form['body']]
    assert len(set(ids)) == len(ids)
    assert all(part['attributes']['label'] for part in form['body'])
