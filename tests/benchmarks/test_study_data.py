from __future__ import annotations

import gzip
import itertools
import shutil
import string
from pathlib import Path
from typing import Any

import datasets
import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from benchmarks.study.data.__main__ import main as make_all
from benchmarks.study.data.fashion import make_fashion
from benchmarks.study.data.fonts import Font, find_families, scan_fonts, split_families
from benchmarks.study.data.glyphs import CHARACTERS, make_glyphs
from benchmarks.study.data.letters import make_characters

FONTS = Path(matplotlib.get_data_path()) / 'fonts' / 'ttf'
FOLDERS = {
    'dejavu-sans': ['DejaVuSans.ttf', 'DejaVuSans-Bold.ttf', 'DejaVuSans-Oblique.ttf'],
    'dejavu-serif': ['DejaVuSerif.ttf', 'DejaVuSerif-Bold.ttf', 'DejaVuSerif-Italic.ttf'],
    'stix': ['STIXGeneral.ttf', 'STIXGeneralBol.ttf', 'STIXSizOneSymReg.ttf'],
    'cm': ['cmr10.ttf', 'cmss10.ttf', 'cmb10.ttf', 'cmsy10.ttf'],
}
# More of each class than a family has fonts, so that fonts are used twice.
SMALL = {'train_per_class': 4, 'eval_per_class': 4}


@pytest.fixture(scope='module')
def fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('fonts')
    for folder, names in FOLDERS.items():
        (root / folder).mkdir()
        for name in names:
            shutil.copy(FONTS / name, root / folder / name)
    return root


@pytest.fixture(scope='module')
def glyphs(fonts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp('glyphs')
    make_glyphs(fonts, output, **SMALL)
    return output


def load(output: Path, cache: Path, split: str | None = None) -> datasets.DatasetDict | datasets.Dataset:
    return datasets.load_dataset(str(output), split=split, cache_dir=str(cache))


def contents(output: Path) -> dict[str, bytes]:
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob('*') if path.is_file()}


def remap_letters(source: Path, target: Path, shift: int) -> None:
    """Copy a font with the lower case letters moved on by `shift`: every glyph fine, every label wrong."""
    font = TTFont(source)
    letters = string.ascii_lowercase
    for table in font['cmap'].tables:
        if hasattr(table, 'cmap') and ord('a') in table.cmap:
            old = dict(table.cmap)
            for index, letter in enumerate(letters):
                table.cmap[ord(letter)] = old[ord(letters[(index + shift) % 26])]
    font.save(target)


def centred(ink: np.ndarray) -> np.ndarray:
    """Move the centre of mass of an image to its middle, and scale it to length 1."""
    ink = np.where(ink > 0.3 * ink.max(), ink, 0)
    rows, columns = (np.arange(32) @ ink.sum(axis) / ink.sum() for axis in (1, 0))
    ink = np.roll(ink, (16 - round(rows), 16 - round(columns)), (0, 1)).ravel()
    ink = ink - ink.mean()
    return ink / np.linalg.norm(ink)


def test_glyphs_load_as_three_splits(glyphs: Path, tmp_path: Path) -> None:
    data = load(glyphs, tmp_path)
    assert {split: len(rows) for split, rows in data.items()} == {'train': 248, 'validation': 248, 'test': 248}
    for rows in data.values():
        assert rows.features['label'].names == list(CHARACTERS[62])
        assert rows['label'] == list(range(62)) * (len(rows) // 62)
        assert {(row['image'].mode, row['image'].size) for row in rows} == {('L', (32, 32))}


def test_images_show_the_character_of_their_label(glyphs: Path, tmp_path: Path) -> None:
    # Nearest template, drawn another way. Some characters cannot be told apart once their size varies ('o' and 'O'), so
    # that it is right often, not always; chance is 1 in 62.
    templates = []
    for name, size, angle in itertools.product(
        ('DejaVuSans.ttf', 'DejaVuSerif.ttf', 'STIXGeneral.ttf', 'cmr10.ttf'), (20, 24), (-10, 0, 10)
    ):
        font = ImageFont.truetype(str(FONTS / name), size)
        for character in CHARACTERS[62]:
            image = Image.new('L', (32, 32))
            ImageDraw.Draw(image).text((16, 16), character, fill=255, font=font, anchor='mm')
            templates.append(centred(np.asarray(image.rotate(angle), float)))
    for rows in load(glyphs, tmp_path).values():
        images = []
        for row in rows:
            pixels = np.asarray(row['image'], float)
            # Ink may be lighter or darker than paper, which is what most of the border shows.
            paper = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]))
            images.append(centred(np.abs(pixels - paper)))
        nearest = (np.stack(images) @ np.stack(templates).T).argmax(1) % 62
        assert (nearest == rows['label']).mean() > 0.5


def test_same_seed_gives_the_same_bytes(fonts: Path, glyphs: Path, tmp_path: Path) -> None:
    make_glyphs(fonts, tmp_path / 'again', **SMALL)
    make_glyphs(fonts, tmp_path / 'other', **SMALL, seed=1)
    first, again, other = contents(glyphs), contents(tmp_path / 'again'), contents(tmp_path / 'other')
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_images_depend_on_where_fonts_are_below_the_folder_only(fonts: Path, glyphs: Path, tmp_path: Path) -> None:
    shutil.copytree(fonts, tmp_path / 'elsewhere')
    make_glyphs(tmp_path / 'elsewhere', tmp_path / 'output', **SMALL)
    assert contents(tmp_path / 'output') == contents(glyphs)


def test_fewer_per_class_are_the_first_rows(fonts: Path, glyphs: Path, tmp_path: Path) -> None:
    make_glyphs(fonts, tmp_path / 'few', train_per_class=2, eval_per_class=1)
    few = load(tmp_path / 'few', tmp_path, 'train')
    first = load(glyphs, tmp_path, 'train[:124]')
    for one, two in zip(few, first, strict=True):
        assert one['label'] == two['label']
        np.testing.assert_array_equal(np.asarray(one['image']), np.asarray(two['image']))


def test_no_image_is_in_two_places(glyphs: Path, tmp_path: Path) -> None:
    images = [row['image'].tobytes() for rows in load(glyphs, tmp_path).values() for row in rows]
    assert len(set(images)) == len(images)


def test_some_characters_are_the_first_images_of_theirs_in_fewer_levels(
    fonts: Path, glyphs: Path, tmp_path: Path
) -> None:
    per_class = {'train': 4, 'validation': 1, 'test': 2}
    make_characters(fonts, tmp_path / 'some', ['x', 'B', '7'], per_class, grey_levels=4)
    some = load(tmp_path / 'some', tmp_path)
    for split, rows in some.items():
        assert rows.features['label'].names == ['x', 'B', '7']
        assert np.bincount(rows['label']).tolist() == [per_class[split]] * 3
        for name in 'xB7':
            number = CHARACTERS[62].index(name)
            all_of_it = load(glyphs, tmp_path, split).filter(lambda row, label=number: row['label'] == label)
            mine = [row['image'] for row in rows if rows.features['label'].names[row['label']] == name]
            for image, original in zip(mine, all_of_it.select(range(len(mine)))['image'], strict=True):
                levels = np.asarray(image)
                assert set(np.unique(levels)) <= {0, 85, 170, 255}
                # As near as a level can be.
                assert np.abs(levels.astype(int) - np.asarray(original)).max() <= 42


def test_94_classes_have_all_of_ascii(fonts: Path, tmp_path: Path) -> None:
    make_glyphs(fonts, tmp_path / 'data', classes=94, train_per_class=1, eval_per_class=1, size=28)
    rows = load(tmp_path / 'data', tmp_path, 'train')
    assert sorted(rows.features['label'].names) == [chr(code) for code in range(33, 127)]
    assert rows[0]['image'].size == (28, 28)


def test_families_are_whole_and_in_one_split(fonts: Path) -> None:
    usable, thumbnails, _ = scan_fonts(fonts, CHARACTERS[62])
    splits = split_families(find_families(usable, thumbnails))
    place: dict[str, set[str]] = {}
    for split, families in splits.items():
        assert families
        for members in families.values():
            for font in members:
                place.setdefault(font.path.parent.name, set()).add(split)
    assert set(place) == set(FOLDERS)
    assert all(len(found) == 1 for found in place.values())
    assert sum(len(members) for families in splits.values() for members in families.values()) == len(usable)


def test_unusable_fonts_are_dropped(fonts: Path, tmp_path: Path) -> None:
    root = tmp_path / 'fonts'
    shutil.copytree(fonts, root)
    (root / 'twin').mkdir()
    shutil.copy(FONTS / 'DejaVuSans.ttf', root / 'twin' / 'Twin.ttf')
    remap_letters(FONTS / 'DejaVuSerif.ttf', root / 'dejavu-serif' / 'Shifted.ttf', 1)
    (root / 'broken.otf').write_bytes(b'not a font')
    before, _, _ = scan_fonts(fonts, CHARACTERS[62])
    usable, _, dropped = scan_fonts(root, CHARACTERS[62])
    assert [font.name for font in usable] == [font.name for font in before]
    names = {font.path.name for font in usable}
    assert 'DejaVuSans.ttf' in names
    # Mathematical symbols: no letters at all in one, in the other something else in their places.
    assert not {'STIXSizOneSymReg.ttf', 'cmsy10.ttf'} & names
    assert dropped == {
        'not readable by FreeType': 1,
        'a character is missing or blank': 1,
        'looks exactly like another font': 1,
        'symbols, small capitals or unusual shapes': 2,
    }


def test_a_font_with_two_equal_characters_is_dropped(fonts: Path, tmp_path: Path) -> None:
    root = tmp_path / 'fonts'
    shutil.copytree(fonts, root)
    font = TTFont(FONTS / 'DejaVuSans-BoldOblique.ttf')
    for table in font['cmap'].tables:
        if hasattr(table, 'cmap') and ord('l') in table.cmap:
            table.cmap[ord('l')] = table.cmap[ord('I')]
    font.save(root / 'dejavu-sans' / 'DejaVuSans-BoldOblique.ttf')
    _, _, dropped = scan_fonts(root, CHARACTERS[62])
    assert dropped['two characters look the same'] == 1


def test_folders_with_one_design_are_one_family() -> None:
    rng = np.random.default_rng(0)
    design = rng.integers(0, 255, (3, 62, 16, 16))
    # Folders a and c share a design up to a small noise, c and d another one: a, c and d are one family.
    rows = {'a/1': design[0], 'b/1': design[1], 'c/1': design[0], 'c/2': design[2], 'd/1': design[2]}
    thumbnails = np.stack([np.clip(mask + rng.integers(-20, 20, mask.shape), 0, 255) for mask in rows.values()])
    fonts = [Font(f'{name}.ttf', Path(f'{name}.ttf'), 64.0, 0.0) for name in rows]
    families = find_families(fonts, thumbnails.astype(np.uint8))
    assert {name: [font.name for font in members] for name, members in families.items()} == {
        'a+c+d': ['a/1.ttf', 'c/1.ttf', 'c/2.ttf', 'd/1.ttf'],
        'b': ['b/1.ttf'],
    }


def test_families_are_dealt_by_size() -> None:
    sizes = {'f': 1, 'e': 2, 'd': 3, 'c': 4, 'b': 5, 'a': 6, 'g': 1}
    families = {
        name: [Font(f'{name}/{index}.ttf', Path(f'{name}/{index}.ttf'), 64.0, 0.0) for index in range(size)]
        for name, size in sizes.items()
    }
    splits = {split: list(names) for split, names in split_families(families).items()}
    assert splits == {'train': ['a', 'd', 'e', 'f'], 'validation': ['b', 'g'], 'test': ['c']}


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'classes': 63}, 'classes=63'),
        ({'train_per_class': 0}, 'train_per_class=0'),
        ({'eval_per_class': -1}, 'eval_per_class=-1'),
        ({'size': 4}, 'size=4'),
    ],
)
def test_bad_arguments_are_named(fonts: Path, tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_glyphs(fonts, tmp_path / 'data', **arguments)
    assert not (tmp_path / 'data').exists()


def test_too_few_fonts_are_an_error(fonts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'no \.otf or \.ttf'):
        make_glyphs(tmp_path, tmp_path / 'data')
    shutil.copytree(fonts / 'stix', tmp_path / 'fonts' / 'stix')
    with pytest.raises(ValueError, match='from at least two folders'):
        make_glyphs(tmp_path / 'fonts', tmp_path / 'data')
    shutil.copytree(fonts / 'dejavu-serif', tmp_path / 'fonts' / 'dejavu-serif')
    with pytest.raises(ValueError, match='at least 3 font families'):
        make_glyphs(tmp_path / 'fonts', tmp_path / 'data')


def test_fashion_keeps_every_image_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    source = tmp_path / 'source'
    source.mkdir()
    images = {}
    for prefix, count in (('train', 120), ('t10k', 20)):
        images[prefix] = rng.integers(0, 255, (count, 28, 28), dtype=np.uint8)
        labels = rng.permutation(np.arange(count, dtype=np.uint8) % 10)
        # The number of the class is written into the corner, so that the labels can be checked after shuffling.
        images[prefix][:, 0, 0] = labels
        header = b'\0\0\x08\x03' + np.array(images[prefix].shape, '>u4').tobytes()
        pixels = gzip.compress(header + images[prefix].tobytes())
        (source / f'{prefix}-images-idx3-ubyte.gz').write_bytes(pixels)
        header = b'\0\0\x08\x01' + np.array([count], '>u4').tobytes()
        (source / f'{prefix}-labels-idx1-ubyte.gz').write_bytes(gzip.compress(header + labels.tobytes()))
    make_fashion(source, tmp_path / 'data')
    data = load(tmp_path / 'data', tmp_path / 'cache')
    pixels = {split: np.stack([np.asarray(row['image']) for row in rows]) for split, rows in data.items()}
    for split, rows in data.items():
        np.testing.assert_array_equal(pixels[split][:, 0, 0], rows['label'])
    assert np.bincount(data['train']['label']).tolist() == [10] * 10
    assert np.bincount(data['validation']['label']).tolist() == [2] * 10
    together = np.concatenate([pixels['train'], pixels['validation']])
    assert {image.tobytes() for image in together} == {image.tobytes() for image in images['train']}
    assert len(together) == 120
    np.testing.assert_array_equal(pixels['test'], images['t10k'])


def test_all_sets_at_once_need_the_images_of_clothes(fonts: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        make_all(['--fonts', str(fonts), '--fashion', str(tmp_path), '--output', str(tmp_path / 'data')])
    assert 'train-images-idx3-ubyte.gz' in capsys.readouterr().err
    assert not (tmp_path / 'data').exists()
