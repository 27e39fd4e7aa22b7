"""From a finished run folder to repositories on the Hub."""
from __future__ import annotations

import argparse
import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..deploy.space import write_space
from ..deploy.transformers_js import write_onnx_repo
from ..hub.cards import RunFacts
from ..hub.errors import HubError
from ..hub.files import parse_yaml, read_json
from ..hub.licenses import License
from ..hub.options import PushOptions, Unpack
from ..hub.privacy import public
from ..hub.prompt_path import PROMPT_CONFIG
from ..hub.repo import empty_folder, push_folder
from ..hub.repo_folder import CURVES, write_prompt_path_repo, write_student_repo
from ..hub.sources import check_repo_id
from ..job.options import TrainConfig
from ..job.stopping import exit_code
from .pages import draw_card_figures
from .plots import plot_curves
from .report import attempt
from .run_facts import NOT_RECIPE, read_run
from .run_folder import RunFolder

__all__ = ['check_targets', 'main', 'publish_at_end', 'publish_run', 'retry_command']


def publish_run(
    run_dir: str | os.PathLike[str],
    push_to_hub: str | None = None,
    *,
    push_prompt_path: str | None = None,
    push_onnx: str | None = None,
    demo_space: str | None = None,
    js_libraries: str | os.PathLike[str] | None = None,
    base_model: str | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    **options: Unpack[PushOptions],
) -> dict[str, str]:
    """Publish what a run has left: student, prompt path, ONNX files, and a page that runs them.

    The run folder is only read. All repositories are written completely before the first is pushed, the prompt path
    first. Doing it again with the same run makes no second commit.

    Args:
        run_dir: The run folder.
        push_to_hub: Repository `'user/name'` of the student.
        push_prompt_path: Repository `'user/name'` of the prompt path.
        push_onnx: Repository `'user/name'` of the student for transformers.js and onnxruntime.
        demo_space: Static Space `'user/name'` in which the student runs in the browser.
        js_libraries: A `node_modules` folder with the libraries of the Space; by default npm fetches them.
        base_model: Where others find the prompt path's teacher, if not where this run had it from; see
            `timm_dfpt.hub.PromptPathOptions`.
        license: License of the weights, e.g. `'apache-2.0'`; by default what the run was given with `--license`, and
            never taken from the models it started from.
        license_name: Name of the license where `license` is `'other'`.
        license_link: Address of its text.
        **options: See `timm_dfpt.hub.PushOptions`; a dry run writes to `student/`, `prompt_path/`, `onnx/` and `space/`
            in its folder.

    Returns:
        Addresses (or folders) by `'student'`, `'prompt_path'`, `'onnx'` and `'space'`.

    Raises:
        FileNotFoundError: If the run folder is not complete.
        FileExistsError: If a repository holds something else.
        HubError: If an upload failed; the message says how to try again.
        ValueError: If an argument does not fit the run.
    """
    repos = check_targets(push_to_hub, push_prompt_path, push_onnx, demo_space)
    if not repos:
        raise ValueError(
            'Name what to publish: --push-to-hub user/student, --push-prompt-path user/prompt, '
            '--push-onnx user/student-ONNX, --demo-space user/space, or several.'
        )
    terms = License(license, license_name, license_link)
    run_folder = RunFolder(run_dir)
    run, recipe = read_run(run_folder, push_prompt_path)
    if terms.license is None:
        # Of the options as they were given: in a record the link would be without its address.
        terms = License.given(parse_yaml(run_folder.config.read_text(encoding='utf-8')))
    base_revision = None
    prompt_config = run_folder.prompt_path / PROMPT_CONFIG
    if prompt_config.is_file():
        base_revision = read_json(prompt_config).get('base_revision')
    elif 'prompt_path' in repos:
        raise FileNotFoundError(
            f'{str(run_folder)!r} has no prompt_path, since {run.method!r} does not tune one: leave '
            '--push-prompt-path out.'
        )
    record = _record(run, recipe, base_revision)
    pushing: PushOptions = {'commit_message': f'Add {run.method} run', **options}
    dry_run = options.get('dry_run')
    with tempfile.TemporaryDirectory() as temporary:
        folders = {kind: Path(temporary, kind) for kind in repos}
        shipped = _Shipped(run_folder, repos, terms, js_libraries)
        if dry_run is not None:
            empty_folder(dry_run)
        curves = _draw_curves(run_folder, Path(temporary, CURVES), run.method)
        for kind, folder in folders.items():
            folder.mkdir()
            common: dict[str, Any] = {'run': run, 'curves': curves}
            if kind in ('onnx', 'space'):
                shipped.write(kind, folder)
            elif kind == 'student':
                figures = attempt('drawing figures of the card', lambda: draw_card_figures(run_folder, Path(temporary)))
                common |= {'distillation': record, 'figures': figures or {}, **terms.metadata()}
                write_student_repo(run_folder.student, folder, repos[kind], **common)
            else:
                common |= {'training': record, 'base_model': base_model, 'token': options.get('token')}
                common['license'] = terms
                write_prompt_path_repo(run_folder.prompt_path, folder, repos[kind], **common)
        try:
            places = {}
            for kind, folder in folders.items():
                if dry_run is not None:
                    pushing['dry_run'] = Path(dry_run, kind)
                places[kind] = push_folder(folder, repos[kind], kind == 'space', **pushing)
            return places
        except HubError as error:
            again = retry_command(
                run_folder, push_to_hub, push_prompt_path, options.get('private'), terms, push_onnx, demo_space
            )
            raise HubError(f'{error} The run folder is as it was; to try again: {again}') from error


def publish_at_end(config: TrainConfig, folder: RunFolder) -> None:
    """Publish a run that has just ended, if its options ask for it.

    Args:
        config: The options.
        folder: The run folder, complete.

    Raises:
        HubError: If that failed; the message says how to try again.
    """
    to_hub, prompt_path = config.push_to_hub, config.push_prompt_path
    if not (to_hub or prompt_path):
        return
    license, private = License.given(vars(config)), config.private or None
    try:
        options: dict[str, Any] = {'private': private, **license.metadata()}
        places = publish_run(folder.path, to_hub, push_prompt_path=prompt_path, **options)
    except HubError:
        raise
    except Exception as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        again = retry_command(folder, to_hub, prompt_path, private, license)
        raise HubError(f'Publishing failed: {reason} The run folder is complete; to try again: {again}') from error
    for kind, place in places.items():
        print(f'published the {kind.replace("_", " ")}: {place}')


def _draw_curves(folder: RunFolder, path: Path, method: object) -> Path | None:
    student = read_json(folder.summary)['models']['student']['name']
    title = f'{method}: {public(student, local=True)}'
    attempt('drawing the curves', lambda: plot_curves(folder.read_metrics(), path, title))
    return path if path.is_file() else None


def check_targets(
    push_to_hub: str | None, push_prompt_path: str | None, push_onnx: str | None = None, demo_space: str | None = None
) -> dict[str, str]:
    """Check the repositories to publish to.

    Returns:
        Their ids by `'prompt_path'`, `'student'`, `'onnx'` and `'space'`, for those that are given.

    Raises:
        ValueError: If one is not an id, or two are the same.
    """
    wanted = {
        'prompt_path': (push_prompt_path, 'push_prompt_path'),
        'student': (push_to_hub, 'push_to_hub'),
        'onnx': (push_onnx, 'push_onnx'),
        'space': (demo_space, 'demo_space'),
    }
    repos = {kind: check_repo_id(repo, option) for kind, (repo, option) in wanted.items() if repo is not None}
    # The Hub has Spaces elsewhere.
    models = [repo for kind, repo in repos.items() if kind != 'space']
    for repo in models:
        if models.count(repo) > 1:
            raise ValueError(f'Student, prompt path and ONNX files need a repository each, got {repo!r} for two.')
    return repos


def retry_command(
    folder: RunFolder, push_to_hub: str | None, push_prompt_path: str | None, private: bool | None,
    license: License, push_onnx: str | None = None, demo_space: str | None = None,
) -> str:  # fmt: skip
    """Return the command that publishes a run again."""
    words = ['timm-dfpt', 'publish', str(folder)]
    flags = {
        '--push-prompt-path': push_prompt_path, '--push-to-hub': push_to_hub, '--push-onnx': push_onnx,
        '--demo-space': demo_space,
        **{f'--{key.replace("_", "-")}': value for key, value in license.metadata().items()},
    }  # fmt: skip
    for flag, value in flags.items():
        words += [flag, value] if value else []
    return shlex.join([*words, *(['--private'] if private else [])])


class _Shipped:
    """What of a run goes to browsers: written once, for the repository and for the page."""

    def __init__(self, run: RunFolder, repos: Mapping[str, str], license: License, js_libraries: Any) -> None:
        self.run, self.repos, self.license, self.js_libraries = run, repos, license, js_libraries
        self.summary = read_json(run.summary)
        before = parse_yaml(run.config.read_text(encoding='utf-8')).get('push_to_hub')
        self.base = repos.get('student') or before
        if {'onnx', 'space'} & set(repos) and not self.summary.get('class_names'):
            raise ValueError(
                'push_onnx and demo_space need a student with classes, which this run does not have: leave them out.'
            )
        if 'onnx' in repos and self.base is None:
            raise ValueError('push_onnx links to the repository of its student: give that, too, with --push-to-hub.')

    def write(self, kind: str, folder: Path) -> None:
        """Write the repository `'onnx'` or `'space'` to a folder."""
        if kind == 'onnx':
            self._write_onnx(folder)
            return
        with tempfile.TemporaryDirectory() as temporary:
            self._write_onnx(Path(temporary))
            rows = self.summary.get('exports', [])
            options: dict[str, Any] = {'license': self.license, 'js_libraries': self.js_libraries}
            write_space(Path(temporary), folder, self.repos['space'], base_model=self.base, rows=rows, **options)

    def _write_onnx(self, folder: Path) -> None:
        write_onnx_repo(
            self.run.exported,
            folder,
            self.repos.get('onnx', 'user/student-ONNX'),
            self.base or 'user/student',
            label_names=self.summary['class_names'],
            rows=self.summary.get('exports', []),
            license=self.license,
            architecture=read_json(self.run.student / 'config.json')['architecture'],
        )


def _record(run: RunFacts, recipe: Mapping[str, Any], base_revision: str | None) -> dict[str, Any]:
    """Return the facts that go alongside the weights, without the folders of this machine."""
    return {
        'format_version': 1,
        'method': run.method,
        'teacher': run.teacher,
        'teacher_revision': base_revision,
        **({'teacher_head': run.teacher_head} if run.teacher_head is not None else {}),
        'prompt_path': run.prompt_path,
        'dataset': run.dataset,
        'eval_split': run.eval_split,
        'metrics': {row.role: row.splits for row in run.rows},
        'recipe': public({key: value for key, value in recipe.items() if key not in NOT_RECIPE}),
        'licenses': dict(run.licenses),
        'seed': run.seed,
        'versions': dict(run.versions),
    }


def main(argv: Sequence[str] | None = None, program: str = 'timm-dfpt publish') -> int:
    """Publish from the command line.

    Args:
        argv: Arguments; `None` for those of the process.
        program: What the command was called as, for its help.

    Returns:
        The exit code: 0, 1 after an error reported in one line, or 128 and the number of a signal to stop.
    """
    parser = argparse.ArgumentParser(
        program,
        description='Publish student, prompt path and ONNX files of a finished run on the Hugging Face Hub.',
        allow_abbrev=False,
    )
    add = parser.add_argument
    add('run_dir', metavar='RUN_DIR', help='folder of a finished run')
    add('--push-to-hub', metavar='USER/NAME', help='repository of the student')
    add('--push-prompt-path', metavar='USER/NAME', help='repository of the prompt path')
    add('--push-onnx', metavar='USER/NAME', help='repository of the ONNX files, for transformers.js')
    add('--demo-space', metavar='USER/NAME', help='static Space in which the student runs in the browser')
    add('--js-libraries', metavar='DIR', help='node_modules with the libraries of the Space (default: from npm)')
    add('--base-model', metavar='ID', help='where others find the teacher of the prompt path: hf-hub:user/name')
    add('--private', action='store_true', help='make new repositories private (default: as your account does)')
    add('--license', metavar='ID', help='license of the weights, such as apache-2.0 (default: that of the run)')
    add('--license-name', metavar='NAME', help='name of the license with --license other')
    add('--license-link', metavar='URL', help='address of its text')
    add('--revision', metavar='BRANCH', help='branch to push to (default: main)')
    add('--create-pr', action='store_true', help='open pull requests instead of committing')
    add('--force', action='store_true', help='replace files of the same name in a repository with other content')
    add('--dry-run', metavar='DIR', help='write the exact repositories to this folder and push nothing')

    def job() -> None:
        args = vars(parser.parse_args(argv))
        args['private'] = args['private'] or None
        for kind, where in publish_run(**args).items():
            print(f'{kind}: {where}')

    return exit_code(job, 'the run folder is as it was, and the same command tries again')
