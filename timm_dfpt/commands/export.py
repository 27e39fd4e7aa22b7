"""`timm-dfpt export`: a student as ONNX files and as a program of torch."""
from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.datasets import load_splits
from ..deploy.measure import check_formats, export_student_files
from ..deploy.onnx_files import Precision, export_onnx
from ..deploy.programs import export_pt2
from ..hub.export_table import exports_table
from ..hub.options import LoadOptions
from ..hub.prompt_path import PROMPT_CONFIG
from ..hub.repo import open_source
from ..job.cli import load_recipe
from ..job.devices import create_accelerator
from ..job.lock import locked
from ..job.options import TrainConfig
from ..job.stopping import exit_code
from ..training.build import load_data
from ..training.pages import write_page
from ..training.run_folder import RunFolder
from ..training.runtimes import export_files, export_job
from .classifiers import Classifier, open_classifier, run_folder_of

__all__ = ['export_model', 'export_run', 'main']

_PRECISIONS: dict[Precision, str] = {'float32': 'model.onnx', 'float16': 'model_fp16.onnx'}


def export_run(folder: RunFolder, formats: Sequence[str], include_preprocessing: bool = False) -> list[dict[str, Any]]:
    """Export the student of a finished run to `exported/` in its folder, and note it in `summary.json` and the report.

    Args:
        folder: The run folder.
        formats: `'onnx'`, `'pt2'` or both.
        include_preprocessing: Whether the files take pixels.

    Returns:
        Rows of `timm_dfpt.deploy.measure.export_student_files`, measured on the validation data of the run.
    """
    config = TrainConfig(**load_recipe(folder.config))
    config = dataclasses.replace(
        config, export=list(formats), include_preprocessing=include_preprocessing, resume=False, log_with=None
    )  # fmt: skip
    with locked(folder.path):
        summary = folder.read_summary()
        data = load_data(config, create_accelerator(config))
        rows = export_files(config, data, summary['input_config'], folder)
        folder.write_summary({**summary, 'exports': rows})
        if folder.report.is_file():
            write_page(folder)
    return rows


def export_model(
    classifier: Classifier, folder: Path, formats: Sequence[str], include_preprocessing: bool = False
) -> list[Path]:
    """Export a student without images to measure it on: ONNX in float32 and float16, and pt2.

    Args:
        classifier: The student.
        folder: Where the files go; it is created.
        formats: `'onnx'`, `'pt2'` or both.
        include_preprocessing: Whether the files take pixels.

    Returns:
        The files.
    """
    assert classifier.module is not None
    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {
        'data_config': classifier.data_config, 'class_names': classifier.class_names,
        'include_preprocessing': include_preprocessing,
    }  # fmt: skip
    files = []
    if 'onnx' in formats:
        for precision, name in _PRECISIONS.items():
            files.append(export_onnx(classifier.module, folder / name, precision=precision, **options))
    if 'pt2' in formats:
        files.append(export_pt2(classifier.module, folder / 'model.pt2', **options))
    return files


def main(argv: Sequence[str] | None = None, program: str = 'timm-dfpt export') -> int:
    """Export from the command line.

    Args:
        argv: Arguments; `None` for those of the process.
        program: What the command was called as, for its help.

    Returns:
        The exit code: 0, 1 after an error reported in one line, or 128 and the number of a signal to stop.
    """
    parser = argparse.ArgumentParser(
        program, allow_abbrev=False,
        description='Write a student as ONNX files (float32, float16, int8) and as a program of torch (pt2). The '
        'student of a run is exported to exported/ in its folder, and measured on the data of the run.',
    )  # fmt: skip
    add = parser.add_argument
    add('model', metavar='MODEL', help='run folder, or folder or Hub id (user/name) of a student')
    add('--formats', nargs='+', choices=('onnx', 'pt2'), default=['onnx'], help='what to write (default: onnx)')
    add('--output', metavar='DIR', help='folder to write to, of any student but that of a run')
    add(
        '--dataset', metavar='NAME',
        help='Hub id, folder of class folders, or parquet: images to calibrate int8 with, and to measure the files on',
    )  # fmt: skip
    add('--include-preprocessing', action='store_true', help='the files take pixels (uint8) and normalise them')
    add('--revision', metavar='NAME', help='branch, tag or commit of a model on the Hub')

    def job() -> None:
        args = parser.parse_args(argv)
        check_formats(args.formats)
        run = run_folder_of(args.model)
        strange = [name for name in ('output', 'dataset', 'revision') if getattr(args, name) is not None]
        if run is not None and strange:
            option = strange[0]
            raise ValueError(
                f'{option} is not for a run, which has its own data and a folder exported/: leave --{option} out, or '
                f'name the student, {run.student}.'
            )
        if run is not None:
            print(exports_table(export_run(run, args.formats, args.include_preprocessing), pad=True))
            return
        if args.output is None:
            raise ValueError('output is not given: name the folder to write to with --output.')
        folder = Path(args.output)
        if folder.is_file() or any(folder.glob('model*.*')):
            what = 'is a file' if folder.is_file() else 'holds a model already'
            raise ValueError(f'output: {str(folder)!r} {what}: name another folder.')
        options: LoadOptions = {'revision': args.revision} if args.revision else {}
        source = None if Path(args.model).is_file() else open_source(args.model, **options)
        if source is None or source.has(PROMPT_CONFIG):
            raise ValueError(f'MODEL {args.model!r} is not a student: prompt paths and files are not exported.')
        classifier = open_classifier(args.model, **options)
        if args.dataset is None:
            for file in export_model(classifier, folder, args.formats, args.include_preprocessing):
                print(file)
            if 'onnx' in args.formats:
                print('int8 is left out: it needs images to calibrate with, name some with --dataset')
            return
        try:
            data = load_splits(
                args.dataset, teacher_classes=classifier.class_names, background=classifier.background
            )  # fmt: skip
        except ValueError as error:
            remedy = 'name a --dataset that has one, to calibrate int8 with'
            raise ValueError(str(error).replace('name one with --train-split', remedy)) from error
        config = dict(classifier.data_config)
        job = export_job(source, folder, data, config, include_preprocessing=args.include_preprocessing)
        print(exports_table(export_student_files(job, args.formats), pad=True))

    return exit_code(job, 'give the same command again')
