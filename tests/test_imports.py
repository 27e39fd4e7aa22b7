"""The rooms of the package: imports point down only, in no circle, and stand at the top of a file.

`python -m tests.test_imports` prints the levels, the arrows between rooms and the circles.
"""
from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'timm_dfpt'
# From the ground up; a room imports itself and what is below it. The package's own `__init__` imports any of them.
GROUND = ('version', 'utils')
ROOMS = (
    GROUND, ('models', 'data', 'backbone', 'losses'), ('teacher',), ('tasks',), ('hub',), ('deploy',), ('job',),
    ('reports',), ('training',), ('commands',), ('__main__',),
)  # fmt: skip
# Stands by itself: it imports any room, and none imports it.
APART = 'testing'


@dataclasses.dataclass(frozen=True)
class Import:
    """One import statement.

    Args:
        source: The module that imports, as `teacher.blocks`; a package by its name, the top of all by ''.
        target: What it imports: likewise, or, if it is not of the package, its full name.
        ours: Whether the target is of the package.
        where: File and line.
        inside: Whether it stands in a function.
        explained: Whether a comment says why, on its line or above the group of imports that it belongs to.
    """

    source: str
    target: str
    ours: bool
    where: str
    inside: bool = False
    explained: bool = False

    def __str__(self) -> str:
        return f'{self.where}: {self.source or "timm_dfpt"} -> {self.target}'


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Return the files of a package by the names of their modules."""
    names = {}
    for path in sorted(package.rglob('*.py')):
        parts = path.relative_to(package).with_suffix('').parts
        names['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return names


def imports_of(package: Path = PACKAGE) -> list[Import]:
    """Return every import statement of a package: in functions, for types and by `importlib`, too."""
    known = modules(package)
    return [found for name, path in known.items() for found in _imports_of_file(name, path, package, set(known))]


def _imports_of_file(name: str, path: Path, package: Path, known: set[str]) -> Iterator[Import]:
    text = path.read_text(encoding='utf-8')
    lines = text.splitlines()
    inside: set[ast.AST] = set()
    tree = ast.parse(text)
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inside.update(ast.walk(function))
    for node in ast.walk(tree):
        for target in _targets(node, name, path.name == '__init__.py', package.name):
            own = target == package.name or target.startswith(f'{package.name}.')
            short = target.removeprefix(package.name).removeprefix('.') if own else target
            while own and short not in known:
                # A name in a module, not a module.
                short = short.rpartition('.')[0]
            line = node.lineno  # type: ignore[attr-defined]
            where = f'{path.relative_to(package.parent)}:{line}'
            yield Import(name, short, own, where, node in inside, _explained(lines, line))


def _targets(node: ast.AST, name: str, is_package: bool, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = node.module or ''
        if node.level:
            parts = [package, *name.split('.')] if name else [package]
            parts = parts[: len(parts) - node.level + is_package]
            module = '.'.join([*parts, *([module] if module else [])])
        return [f'{module}.{alias.name}' if module.startswith(package) else module for alias in node.names]
    if isinstance(node, ast.Call) and node.args:
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, 'id', '')
        argument = node.args[0]
        if function in ('import_module', '__import__') and isinstance(argument, ast.Constant):
            return [str(argument.value)]
    return []


def _explained(lines: list[str], number: int) -> bool:
    """Return whether the line has a comment, or the group of imports that it is in begins with one."""
    if '#' in lines[number - 1].replace('# type:', ''):
        return True
    while number > 1 and 'import ' in lines[number - 2]:
        number -= 1
        if '#' in lines[number - 1].replace('# type:', ''):
            return True
    return lines[number - 2].lstrip().startswith('#')


def room(module: str) -> str:
    return module.partition('.')[0]


def levels(imports: list[Import]) -> dict[str, int]:
    """Return how high each module stands above those that import nothing of the package."""
    down: dict[str, set[str]] = {}
    for found in imports:
        if found.ours and found.source != found.target:
            down.setdefault(found.source, set()).add(found.target)
    heights: dict[str, int] = {}

    def height(name: str, above: tuple[str, ...] = ()) -> int:
        if name not in heights:
            below = [height(other, (*above, name)) for other in down.get(name, ()) if other not in (*above, name)]
            heights[name] = 1 + max(below, default=-1)
        return heights[name]

    return {name: height(name) for name in sorted({*down, *(t for targets in down.values() for t in targets)})}


def circles(imports: list[Import]) -> list[list[str]]:
    """Return the circles of modules, each as a list that begins and ends with the same one."""
    down: dict[str, set[str]] = {}
    for found in imports:
        if found.ours and found.source != found.target:
            down.setdefault(found.source, set()).add(found.target)
    circles, done = [], set[str]()

    def follow(name: str, trail: list[str]) -> None:
        if name in trail:
            circles.append([*trail[trail.index(name) :], name])
        elif name not in done:
            for other in sorted(down.get(name, ())):
                follow(other, [*trail, name])
            done.add(name)

    for name in sorted(down):
        follow(name, [])
    return circles


def upward(imports: list[Import]) -> list[Import]:
    """Return the imports of the package that do not point down, into the own room, or out of the top."""
    height = {name: i for i, names in enumerate(ROOMS) for name in names}

    def allowed(found: Import) -> bool:
        source, target = room(found.source), room(found.target)
        if source == target or source == '':
            return target != APART
        if target in ('', APART):
            return False
        return source == APART or height[source] > height[target]

    return [found for found in imports if found.ours and not allowed(found)]


IMPORTS = imports_of()


def show(found: list[Import]) -> str:
    return '\n'.join(map(str, found))


def test_every_room_has_its_place() -> None:
    assert {room(name) for name in modules()} - {'', APART} == {name for names in ROOMS for name in names}


def test_imports_point_down() -> None:
    found = upward(IMPORTS)
    assert not found, show(found)


def test_no_circle() -> None:
    found = circles(IMPORTS)
    assert not found, '\n'.join(' -> '.join(circle) for circle in found)


def test_nothing_of_the_package_is_imported_in_a_function() -> None:
    found = [i for i in IMPORTS if i.ours and i.inside]
    assert not found, show(found)


def test_what_else_is_imported_in_a_function_says_what_that_saves() -> None:
    found = [i for i in IMPORTS if not i.ours and i.inside and not i.explained]
    assert not found, show(found)


PLANTED = {
    'a circle in one room': ({'losses/a.py': 'from . import b', 'losses/b.py': 'from .a import x'}, circles),
    'a circle for types': (
        {'tasks/a.py': 'if TYPE_CHECKING:\n    from .b import B', 'tasks/b.py': 'from .a import A'},
        circles,
    ),
    'a circle by importlib': (
        {'hub/a.py': 'importlib.import_module("timm_dfpt.hub.b")', 'hub/b.py': 'import timm_dfpt.hub.a'},
        circles,
    ),
    'up, in a function': ({'teacher/a.py': 'def f():\n    from ..hub import push'}, upward),
    'sideways': ({'data/a.py': 'from ..losses.b import kd_loss', 'losses/b.py': ''}, upward),
    'to the top': ({'hub/a.py': 'from .. import wrap'}, upward),
    'to the testing module': ({'training/a.py': 'from ..testing import check_teacher', 'testing.py': ''}, upward),
}


@pytest.mark.parametrize('name', PLANTED)
def test_what_is_planted_is_found(name: str, tmp_path: Path) -> None:
    """Of two files in a package that else has only its rooms."""
    files, find = PLANTED[name]
    package = tmp_path / 'timm_dfpt'
    for file in ('__init__.py', *(f'{r}/__init__.py' for names in ROOMS for r in names), *files):
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text(files.get(file, ''))
    assert len(find(imports_of(package))) == 1  # type: ignore[operator]


def main() -> None:
    """Print levels, arrows between rooms and circles."""
    for name, height in sorted(levels(IMPORTS).items(), key=lambda pair: (pair[1], pair[0])):
        print(f'{height:3} {name or "timm_dfpt"}')
    arrows = {(room(i.source), room(i.target)) for i in IMPORTS if i.ours} - {(r, r) for r in map(room, modules())}
    print(f'\n{len(arrows)} arrows between rooms:')
    print(*(f'  {a or "timm_dfpt"} -> {b}' for a, b in sorted(arrows)), sep='\n')
    print(f'\n{len({(i.source, i.target) for i in IMPORTS if i.ours})} arrows between modules')
    print(f'{len(circles(IMPORTS))} circles', *(' -> '.join(circle) for circle in circles(IMPORTS)), sep='\n  ')


if __name__ == '__main__':
    main()
