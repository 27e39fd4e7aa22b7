"""Build the documentation as a site: `make docs`. A broken link or a public name without an entry fails the build."""
from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import timm_dfpt

ROOT = Path(__file__).resolve().parents[1]
# All that `__all__` of these has must be in API.md.
PUBLIC = ('timm_dfpt', *(f'timm_dfpt.{name}' for name in (
    'backbone', 'deploy', 'hub', 'losses', 'models', 'tasks', 'teacher', 'testing'
)))  # fmt: skip

project = 'timm_dfpt'
author = 'The timm_dfpt maintainers'
version = release = timm_dfpt.__version__
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
exclude_patterns = ['results']
html_theme = 'furo'
html_title = 'timm_dfpt'
# Pages are as they are in the repository: no copies of their sources, and no date of a build.
html_copy_source = False

# Headings have the anchors that GitHub gives them.
myst_heading_anchors = 4

autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autodoc_typehints_format = 'short'
autodoc_default_options = {'members': True, 'show-inheritance': True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# A name in single backticks is linked where it is in API.md.
default_role = 'py:obj'
nitpicky = True
# Without a network there are no inventories of torch and timm; our own names must be found.
nitpick_ignore_regex = [('py:.*', r'(?s)(?!timm_dfpt\.).*'), ('py:class', r'timm_dfpt\..*\._\w+\..*')]

logger = logging.getLogger(__name__)


def link_repository(app: Sphinx, doctree: nodes.document) -> None:
    """Link what lies outside docs/: a Markdown file is handed out as it is, like any other; a folder is named only."""
    for node in list(doctree.findall(addnodes.pending_xref)):
        if node.get('reftype') != 'myst':
            continue
        target = Path(app.env.doc2path(node['refdoc'])).parent / node['reftarget']
        if node.get('refdomain') == 'doc' and node['reftarget'] not in app.env.found_docs:
            file = os.path.relpath(f'{node["reftarget"]}.md', app.srcdir)
            link = addnodes.download_reference('', '', *node.children, reftarget=f'/{file}', refdoc=node['refdoc'])
            node.replace_self(link)
        elif target.is_dir() and target.resolve().is_relative_to(ROOT):
            node.replace_self(node.children)


def check_entries(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of public names that API.md leaves out."""
    documented = set()
    for entry in env.get_domain('py').objects:  # type: ignore[attr-defined]
        module, _, name = entry.rpartition('.')
        if module in sys.modules:
            documented.add(id(getattr(sys.modules[module], name, None)))
    for module in PUBLIC:
        package: Any = importlib.import_module(module)
        for name in package.__all__:
            value = getattr(package, name)
            if name != '__version__' and f'{module}.{name}' not in PUBLIC and id(value) not in documented:
                logger.warning(f'{module}.{name} is public and has no entry in docs/API.md.')


def setup(app: Sphinx) -> None:
    """Connect what is ours."""
    # Before Sphinx collects the files that are handed out.
    app.connect('doctree-read', link_repository, priority=100)
    app.connect('env-check-consistency', check_entries)
