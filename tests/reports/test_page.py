"""report.html of a real run whose classes have the worst of names, read by a parser and by a browser."""
import html.parser
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image

from tests.tiny import DATA_CONFIG, RESNET
from timm_dfpt.hub.student import save_student
from timm_dfpt.reports.names import shown
from timm_dfpt.reports.page import Page, render
from timm_dfpt.reports.predictions import Predicted, SplitPredictions
from timm_dfpt.reports.sections import calibration_section, classes_section, confusion_section
from timm_dfpt.training import pages
from timm_dfpt.training.compare import main as compare
from timm_dfpt.training.pages import main as report
from timm_dfpt.training.publish import publish_run
from timm_dfpt.training.report import closing_table
from timm_dfpt.training.run import main

HOSTILE = [
    '<script>alert(1)</script>', '</svg></style><img src=x onerror=alert(1)>', '"\' onload="alert(1)',
    '$\\frac{1}{0$', '{{ 7 * 7 }}{% raw %}', '\u202egnp.exe', 'a\x00b\x1b[31m\nc',
    '\u05e9\u05dc\u05d5\u05dd & \u732b', '-->]]>', 'x' * 900,
]  # fmt: skip


class Found(html.parser.HTMLParser):
    """Tags, attributes, the text, and the cells of tables by section."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.tables, self.in_cell = [], [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *each) for each in attributes]
        if tag == 'table':
            self.tables.append([])
        elif tag == 'tr':
            self.tables[-1].append([])
        elif tag in ('td', 'th'):
            self.tables[-1][-1].append('')
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ('td', 'th')

    def handle_data(self, data):
        self.text.append(data)
        if self.in_cell:
            self.tables[-1][-1][-1] += data.strip()


def cells(markdown):
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in markdown.splitlines()]
    return [rows[0], *rows[2:]]


@pytest.fixture(scope='module')
def job(tiny, tmp_path_factory):
    """Arguments of a job on images of such classes."""
    root = tmp_path_factory.mktemp('hostile')
    files = sorted(tiny.data.rglob('*.png'))
    images = [{'bytes': files[i % len(files)].read_bytes(), 'path': None} for i in range(240)]
    names = [HOSTILE[i % len(HOSTILE)] for i in range(240)]
    (root / 'data').mkdir()
    for split, rows in (('train', slice(0, 160)), ('validation', slice(160, 240))):
        pq.write_table(pa.table({'image': images[rows], 'label': names[rows]}), root / 'data' / f'{split}.parquet')
    torch.manual_seed(0)
    teacher = timm.create_model('resnet18', num_classes=len(HOSTILE), **RESNET)
    save_student(teacher, root / 'teacher', label_names=sorted(HOSTILE), data_config=DATA_CONFIG)
    return root, [
        *tiny.common(root / 'run'), '--dataset', str(root / 'data'), '--teacher', f'local-dir:{root / "teacher"}',
        '--student', 'resnet18', '--student-kwargs', *(f'{key}={value}' for key, value in RESNET.items()),
        '--epochs', '2',
    ]  # fmt: skip


@pytest.fixture(scope='module')
def run(job):
    assert main([*job[1], '--method', 'dfpt', '--baselines', 'kd']) == 0
    return job[0] / 'run'


def check_harmless(text, root):
    found = Found(text)
    assert not {'script', 'iframe', 'object', 'embed', 'form', 'base', 'image'} & set(found.tags)
    assert not [each for each in found.attributes if each[1].startswith('on')]
    links = [each for each in found.attributes if each[1] in ('src', 'href', 'xlink:href', 'action', 'srcset')]
    assert all(value.startswith(('#', 'data:')) for *_, value in links)
    assert 'url(' not in re.sub(r'url\(#\w+\)', '', text)
    assert '@import' not in text
    # No folder of the machine, no direction or control character, and no template that was run.
    assert str(root) not in text
    assert str(Path(__file__).parents[2]) not in text
    assert not re.search('[\u202a-\u202e\u2066-\u2069\x00-\x08\x0e-\x1f]', text)
    assert '7 * 7' in ''.join(found.text)
    return found


def test_the_page_of_a_run(run, job):
    text = (run / 'report.html').read_text(encoding='utf-8')
    found = check_harmless(text, job[0])
    assert len(text) < 2_000_000
    summary = json.loads((run / 'summary.json').read_text())
    for model in (*summary['models'].values(), *summary['baselines'].values()):
        model['name'] = model['name'].replace(str(job[0]) + '/', '')
    assert found.tables[0] == cells(closing_table(summary))
    sections = {value for tag, name, value in found.attributes if tag == 'section' and name == 'id'}
    assert sections == {
        'results', 'curves', 'classes', 'parting', 'confusions', 'calibration', 'images', 'cost', 'configuration'
    }
    shown_text = ''.join(found.text)
    for name in HOSTILE:
        assert shown(name, 24)[:10] in shown_text
    # The accuracy of all classes together is the one that was measured.
    head, *rows = next(table for table in found.tables if table[0][0] == 'class')
    models = {'teacher %': 'teacher', 'prompt path %': 'prompt_path', 'student %': 'student'}
    counts = np.array([int(row[1]) for row in rows])
    for title, role in models.items():
        shares = np.array([float(row[head.index(title)]) for row in rows])
        expected = summary['models'][role]['metrics']['top1']
        assert (counts * shares).sum() / counts.sum() == pytest.approx(expected, abs=0.1)
    assert set(summary['phases']) == {'setup', 'teacher_evaluation', 'training', 'evaluation', 'export', 'costs'}
    assert summary['phases']['training'] == summary['train_seconds']
    assert found.tags.count('img') > 12


def test_a_card_shows_its_figures(run, tmp_path):
    assert publish_run(run, 'user/name', dry_run=tmp_path / 'repo')
    card = (tmp_path / 'repo' / 'student' / 'README.md').read_text(encoding='utf-8')
    for name in ('classes.png', 'calibration.png'):
        assert f']({name})' in card
        with Image.open(tmp_path / 'repo' / 'student' / name) as image:
            image.load()
            assert image.width > 400


def test_it_can_be_made_again_from_the_folder(run, job, capsys, tmp_path):
    before = (run / 'report.html').read_bytes()
    (run / 'report.html').unlink()
    assert report([str(run)]) == 0
    assert (run / 'report.html').read_bytes() == before
    shutil.copytree(run, tmp_path / 'run')
    # What is not there is left out.
    (tmp_path / 'run' / 'predictions.safetensors').unlink()
    assert report([str(tmp_path / 'run')]) == 0
    tags = Found((tmp_path / 'run' / 'report.html').read_text(encoding='utf-8')).tags
    assert tags.count('section') == 4
    (tmp_path / 'run' / 'summary.json').unlink()
    assert report([str(tmp_path / 'run')]) == 1
    assert 'not finished' in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_of_a_comparison(job, tmp_path):
    argv = [*job[1], '--output', str(tmp_path / 'out'), '--methods', 'scratch', 'kd', '--seeds', '1', '2']
    assert compare([*argv, '--epochs', '1']) == 0
    text = (tmp_path / 'out' / 'report.html').read_text(encoding='utf-8')
    found = check_harmless(text, tmp_path)
    assert str(job[0]) not in text
    assert found.tables[0] == cells((tmp_path / 'out' / 'compare.md').read_text().split('\n\n')[1])
    result = json.loads((tmp_path / 'out' / 'compare.json').read_text())
    head, *rows = next(table for table in found.tables if table[0][0] == 'class')
    assert head == ['class', 'images', 'kd %', 'scratch %', 'scratch - kd']
    mean = np.average([float(row[3]) for row in rows], weights=[int(row[1]) for row in rows])
    assert mean == pytest.approx(result['arms']['scratch']['val']['mean'], abs=0.1)
    before = (tmp_path / 'out' / 'report.html').read_bytes()
    assert report([str(tmp_path / 'out')]) == 0
    assert (tmp_path / 'out' / 'report.html').read_bytes() == before


def test_a_run_is_whole_without(job, tmp_path, monkeypatch, caplog, fresh_accelerate):
    def broken(*args):
        raise AssertionError('no page\ntoday')

    argv = [*job[1], '--method', 'supervised', '--epochs', '1', '--output', str(tmp_path / 'a'), '--resume']
    argv[argv.index('--teacher') : argv.index('--teacher') + 2] = []
    assert main([*argv, '--no-report']) == 0
    assert not {'report.html', 'predictions.safetensors'} & {file.name for file in (tmp_path / 'a').iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(pages, 'run_page', broken)
        fresh_accelerate()
        assert main(argv) == 0
    assert 'writing the report failed (AssertionError: no page today)' in caplog.text
    assert (tmp_path / 'a' / 'summary.json').is_file()
    assert not (tmp_path / 'a' / 'report.html').exists()
    fresh_accelerate()
    assert main(argv) == 0
    # Without a teacher there is nobody to part from.
    sections = re.findall(r'<section id="(\w+)"', (tmp_path / 'a' / 'report.html').read_text(encoding='utf-8'))
    assert 'classes' in sections
    assert 'parting' not in sections


def test_a_thousand_classes_are_cut():
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(1000, (5000,), generator=generator)
    sample = torch.arange(200)

    def model():
        classes = torch.where(torch.rand(5000, generator=generator) < 0.6, target, target.flip(0))
        return Predicted(classes, torch.rand(5000, generator=generator), torch.randn(200, 1000, generator=generator))

    split = SplitPredictions(target, sample, {'teacher': model(), 'student': model()})
    names = [f'{i} ' + 'very ' * 150 for i in range(1000)]
    colors = {'teacher': 2, 'student': 0}
    sections = [
        classes_section(split, 'here', names, 'student', 'teacher', colors),
        confusion_section(split, 'here', names, 'student', ['teacher']),
        calibration_section(split, None, 'here', 'student', colors),
    ]
    text = render(Page('title', 'kind', 'summary', [], sections, 'footer'))
    assert len(text) < 200_000
    assert max(len(table) for table in Found(text).tables) == 25
    assert f'24 of {len(target.unique()):,} classes' in text


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('T-shirt/top', 'T-shirt/top'), (' a \t\n b ', 'a b'), ('\u202eabc', '\ufffdabc'), ('\x00', '\ufffd'),
        (' ', '(blank)'), ('x' * 100, 'x' * 39 + '\u2026' + 'x' * 20), ('\ud800', '\ufffd'),
    ],
)  # fmt: skip
def test_names_are_visible(name, expected):
    assert shown(name) == expected


CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')


def browse(tmp_path, url, *more):
    """Return what chromium says on stderr, and the page as it stands in its memory."""
    command = [
        CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--enable-logging=stderr', '--dump-dom',
        f'--user-data-dir={tmp_path / "profile"}', *more, url,
    ]  # fmt: skip
    env = {**os.environ, 'HOME': str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    return done.stderr, done.stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason='there is no chromium (apt-get install chromium)')
def test_a_browser_shows_the_page_of_the_run(run, job, tmp_path):
    """Without an error in its console, with the numbers of the summary, and no wider than a phone."""
    picture = tmp_path / 'page.png'
    said, dom = browse(tmp_path, f'file://{run}/report.html', f'--screenshot={picture}', '--window-size=1280,2000')
    assert 'CONSOLE' not in said
    assert picture.stat().st_size > 20_000
    found = Found(dom)
    assert found.tables == Found((run / 'report.html').read_text(encoding='utf-8')).tables
    assert found.tags.count('svg') >= 5
    assert 'script' not in found.tags
    frame = tmp_path / 'phone.html'
    frame.write_text(
        f'<iframe id="f" width="390" height="844" src="file://{run}/report.html"></iframe><script>onload = () => '
        '{ const d = document.getElementById("f").contentDocument.documentElement; '
        'document.title = d.scrollWidth + " of " + d.clientWidth; }</script>'
    )
    said, dom = browse(tmp_path, f'file://{frame}', '--allow-file-access-from-files')
    width, _, screen = re.search(r'<title>(.*)</title>', dom)[1].partition(' of ')
    assert 300 < int(width) == int(screen)
