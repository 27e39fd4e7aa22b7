"""Decoding against Pillow's own conversions and against pixels known beforehand; damaged files are told apart."""

import contextlib
import io
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from timm_dfpt.data.datasets import load_splits
from timm_dfpt.data.images import BadImageError, decode_image, inspect_image
from timm_dfpt.training.run import main

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (12, 17), dtype=np.uint8)
RGB = RNG.integers(0, 256, (12, 17, 3), dtype=np.uint8)


def encode(image: Image.Image, image_format: str = 'png', **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def jpeg(size: tuple[int, int] = (64, 48)) -> bytes:
    return encode(Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)), 'jpeg')


def pixels(source: bytes, channels: int) -> np.ndarray:
    return np.asarray(decode_image(source, channels))


def palette(transparency: object = None) -> bytes:
    image = Image.fromarray(RGB).quantize(16)
    options = {} if transparency is None else {'transparency': transparency}
    return encode(image, 'png', **options)


SAME_AS_PILLOW = {
    'rgb': encode(Image.fromarray(RGB)),
    'grey': encode(Image.fromarray(GREY)),
    'bilevel': encode(Image.fromarray(GREY).convert('1')),
    'palette': palette(),
    'palette, one transparent colour': palette(3),
    'palette, transparency by colour': palette(bytes(range(0, 256, 16))),
    'grey and alpha': encode(Image.fromarray(np.stack([GREY, 255 - GREY], -1))),
    'rgba': encode(Image.fromarray(np.dstack([RGB, GREY]))),
    'cmyk jpeg': encode(Image.fromarray(RGB).convert('CMYK'), 'jpeg'),
    'grey jpeg': encode(Image.fromarray(GREY), 'jpeg'),
    'gif': encode(Image.fromarray(GREY), 'gif'),
    'webp': encode(Image.fromarray(RGB), 'webp', lossless=True),
    'bmp': encode(Image.fromarray(RGB), 'bmp'),
    'one pixel': encode(Image.fromarray(RGB[:1, :1])),
}


@pytest.mark.parametrize('name', SAME_AS_PILLOW)
@pytest.mark.parametrize(('channels', 'mode'), [(1, 'L'), (3, 'RGB')])
@pytest.mark.filterwarnings('ignore:Palette images with Transparency')
def test_eight_bit_images_are_converted_as_pillow_does(name: str, channels: int, mode: str, tmp_path) -> None:
    source = SAME_AS_PILLOW[name]
    expected = np.asarray(Image.open(io.BytesIO(source)).convert(mode))
    (tmp_path / 'image').write_bytes(source)
    image = decode_image(source, channels)
    assert image.mode == mode
    if mode == 'L' and name.startswith('palette,'):  # by way of RGBA, whose rounding may differ by one
        assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1
    else:
        np.testing.assert_array_equal(np.asarray(image), expected)
    np.testing.assert_array_equal(np.asarray(decode_image(str(tmp_path / 'image'), channels)), np.asarray(image))
    assert inspect_image(source).problem is None


@pytest.mark.parametrize('dtype', ['<u2', '>u2', '<i4'])
def test_sixteen_bit_images_are_scaled_not_clipped(dtype: str) -> None:
    wide = (GREY.astype(np.uint32) * 257).astype(dtype)  # 257 maps 0..255 to the whole of 0..65535
    image = Image.fromarray(wide) if dtype != '>u2' else Image.frombytes('I;16B', (17, 12), wide.tobytes())
    for image_format in ('png', 'tiff') if dtype == '<u2' else ('tiff',):
        source = encode(image, image_format)
        np.testing.assert_array_equal(pixels(source, 1), GREY)
        np.testing.assert_array_equal(pixels(source, 3), np.repeat(GREY[..., None], 3, axis=2))


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise
    source = encode(Image.fromarray(RGB), 'png', exif=exif)
    np.testing.assert_array_equal(pixels(source, 3), np.rot90(RGB, k=-1))


def corrupt_png() -> bytes:
    data = bytearray(encode(Image.fromarray(RGB)))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


def short_png() -> bytes:
    """A PNG whose checksums are right, and whose compressed pixels end in the middle."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    packed = zlib.compress(b''.join(b'\0' + row.tobytes() for row in RGB))
    header = struct.pack('>IIBBBBB', RGB.shape[1], RGB.shape[0], 8, 2, 0, 0, 0)
    chunks = chunk(b'IHDR', header) + chunk(b'IDAT', packed[: len(packed) // 2]) + chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + chunks


def jpeg_without_tables() -> bytes:
    """A JPEG with its end marker, whose Huffman tables are overwritten."""
    data = bytearray(jpeg())
    start = data.index(b'\xff\xc4') + 5
    data[start : start + 16] = b'\xff' * 16
    return bytes(data)


BAD = {
    'no image': (None, 'no image'),
    'zero bytes': (b'', '0 bytes'),
    'text': (b'this is not an image', 'cannot identify'),
    'truncated jpeg': (jpeg()[:-200], 'truncated'),
    'truncated png': (encode(Image.fromarray(RGB))[:-40], ''),
    'truncated webp': (encode(Image.fromarray(RGB), 'webp', lossless=True)[:-40], ''),
    'truncated tiff': (encode(Image.fromarray(RGB), 'tiff')[:-200], ''),
    'png with a wrong byte': (corrupt_png(), ''),
    'header only': (jpeg()[:200], ''),
    'floating point': (encode(Image.fromarray(GREY.astype(np.float32)), 'tiff'), 'floating point'),
    '32 bit': (encode(Image.fromarray(np.full((2, 2), 1 << 20, np.int32)), 'tiff'), '32-bit'),
    'missing file': ('no/such/file.png', 'No such file'),
}


# What only decoding finds.
BAD_INSIDE = {
    'png that ends too early': (short_png(), 'truncated'),
    'jpeg without tables': (jpeg_without_tables(), 'broken data stream'),
}


@pytest.mark.parametrize('name', BAD | BAD_INSIDE)
def test_a_check_finds_what_decoding_finds(name: str) -> None:
    source, message = (BAD | BAD_INSIDE)[name]
    assert message in str(inspect_image(source).problem)
    with pytest.raises(BadImageError, match=message or None):
        decode_image(source)


@pytest.mark.parametrize('name', SAME_AS_PILLOW)
def test_a_check_has_nothing_against_good_images(name: str) -> None:
    assert inspect_image(SAME_AS_PILLOW[name]).problem is None


def test_a_job_that_skips_bad_images_gets_to_its_end(tiny, tmp_path, capsys) -> None:
    """Whatever only decoding finds, in the training and in the validation images."""
    shutil.copytree(tiny.data, tmp_path / 'data')
    for split, name in (('train', 'png that ends too early'), ('val', 'jpeg without tables')):
        next((tmp_path / 'data' / split / 'ash').iterdir()).write_bytes(BAD_INSIDE[name][0])
    argv = tiny.argv(tmp_path / 'run', '--dataset', str(tmp_path / 'data'), '--method', 'kd', '--epochs', '1')
    assert main([*argv, '--on-bad-image', 'skip']) == 0
    train, val = (len(list((tiny.data / split).rglob('*.png'))) - 1 for split in ('train', 'val'))
    assert f'{train} images to train on, {val} to validate on' in capsys.readouterr().out


def test_a_picture_too_large_to_be_one_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 50)
    assert 'DecompressionBombError' in str(inspect_image(encode(Image.fromarray(RGB))).problem)


def test_jpeg_with_bytes_after_its_end_is_good() -> None:
    source = jpeg()
    assert inspect_image(source + b'\x00' * 7).problem is None
    np.testing.assert_array_equal(pixels(source + b'\x00' * 7, 3), pixels(source, 3))


@pytest.mark.filterwarnings('ignore::UserWarning:PIL')
def test_damage_anywhere_is_an_image_or_a_bad_image_error() -> None:
    files = [jpeg(), *(encode(Image.fromarray(RGB), kind) for kind in ('png', 'gif', 'tiff', 'bmp', 'webp'))]
    for data in files:
        for _ in range(60):
            damaged = bytearray(data[: RNG.integers(1, len(data) + 1)])
            damaged[RNG.integers(len(damaged))] = RNG.integers(256)
            with contextlib.suppress(BadImageError):
                assert decode_image(bytes(damaged)).mode == 'RGB'


def layer(mode: str, alpha: int) -> Image.Image:
    """One colour, the left half transparent to this degree."""
    image = Image.new('RGBA', (4, 2), (200, 100, 0, 255))
    image.paste((200, 100, 0, alpha), (0, 0, 2, 2))
    return image.convert(mode) if mode != 'P' else image.quantize(4)


TRANSPARENT = {
    'rgba': encode(layer('RGBA', 0)),
    'grey and alpha': encode(layer('LA', 0)),
    'palette': encode(layer('P', 0)),
    'gif': encode(Image.fromarray(np.array([[9, 9, 124, 124]] * 2, np.uint8)), 'gif', transparency=9),
    'webp': encode(layer('RGBA', 0), 'webp', lossless=True, exact=True),
    'rgb with a colour for it': encode(
        Image.fromarray(np.array([[[9, 9, 9]] * 2 + [[200, 100, 0]] * 2] * 2, np.uint8)), transparency=(9, 9, 9)
    ),
    'grey with a value for it': encode(Image.fromarray(np.array([[9, 9, 124, 124]] * 2, np.uint8)), transparency=9),
}


@pytest.mark.parametrize('name', TRANSPARENT)
def test_transparent_images_are_laid_over_the_background(name: str) -> None:
    source = TRANSPARENT[name]
    assert inspect_image(source).transparent
    for background, color in (('white', 255), ('10,10,10', 10), ('7', 7)):
        for channels in (1, 3):
            over = np.asarray(decode_image(source, channels, background)).reshape(2, 4, channels)
            assert (over[:, :2] == color).all()
            np.testing.assert_array_equal(over[:, 2:], pixels(source, channels).reshape(2, 4, channels)[:, 2:])


def test_half_transparent_images_are_mixed_and_others_left_alone() -> None:
    over = np.asarray(decode_image(encode(layer('RGBA', 51)), 3, '#0000ff'))
    assert over[0, 0].tolist() == [40, 20, 204]
    for name, source in SAME_AS_PILLOW.items():
        if 'transparen' not in name and 'alpha' not in name and name != 'rgba':
            np.testing.assert_array_equal(np.asarray(decode_image(source, 3, 'white')), pixels(source, 3))
            assert not inspect_image(source).transparent
    opaque = encode(Image.fromarray(RGB).convert('RGBA'))
    assert not inspect_image(opaque).transparent


@pytest.mark.parametrize('text', ['', 'whitish', '1,2', '256', '-1', '1,2,300', '#12345'])
def test_what_is_not_a_colour_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match='background=.* must be a color such as white'):
        decode_image(SAME_AS_PILLOW['rgb'], 3, text)


def wide_rgb(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, which Pillow reads and does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    rows = np.repeat(values[..., None], 3, axis=2).astype('>u2')
    packed = zlib.compress(b''.join(b'\0' + row.tobytes() for row in rows))
    header = struct.pack('>IIBBBBB', values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', packed) + chunk(b'IEND', b'')


WIDE = {
    'png': lambda values: encode(Image.fromarray(values.astype(np.uint16))),
    'tiff': lambda values: encode(Image.fromarray(values.astype(np.uint16)), 'tiff'),
    'tiff of 32 bits': lambda values: encode(Image.fromarray(values.astype(np.int32)), 'tiff'),
    'png in colour': wide_rgb,
}


@pytest.mark.parametrize('name', WIDE)
@pytest.mark.parametrize(('bits', 'remedy'), [(10, 'by 64 '), (12, 'by 16 '), (16, None)])
def test_images_of_fewer_bits_than_their_file(tmp_path, caplog, name: str, bits: int, remedy: str | None) -> None:
    for i in range(6):
        folder = tmp_path / 'ab'[i % 2]
        folder.mkdir(exist_ok=True)
        # Dark ones are no rule: the brightest counts.
        values = np.random.default_rng(i).integers(0, 2 ** (bits if i == 3 else 9), (5, 5))
        values[0, 0] = 2**bits - 1 if i == 3 else 0
        (folder / f'{i}.png').write_bytes(WIDE[name](values))
    load_splits(str(tmp_path))
    assert [record.message.split(' have')[0] for record in caplog.records] == ['6 images of 16 bits'] * bool(remedy)
    assert (remedy or '') in caplog.text


@pytest.mark.parametrize('background', [None, 'white'])
def test_transparent_images_are_counted(tmp_path, caplog, background: str | None) -> None:
    for i, name in enumerate(['rgb', *TRANSPARENT, 'grey jpeg']):
        folder = tmp_path / 'ab'[i % 2]
        folder.mkdir(exist_ok=True)
        (folder / f'{i}.png').write_bytes((SAME_AS_PILLOW | TRANSPARENT)[name])
    split = load_splits(str(tmp_path), background=background).train
    assert split.background == background
    messages = [record.message for record in caplog.records if '--background' in record.message]
    assert len(messages) == (background is None)
    assert all(message.startswith(f'{len(TRANSPARENT)} of {len(TRANSPARENT) + 2} images') for message in messages)


def test_small_sets_are_read_through_and_large_ones_on_demand(tmp_path, monkeypatch) -> None:
    for name in 'ab':
        for i in range(3):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(RGB + np.uint8(i)).save(tmp_path / name / f'{i}.png')
    (tmp_path / 'b' / '2.png').write_bytes(short_png())
    message = r'1 images of split .*b/2.png .*truncated.*--on-bad-image skip'
    with pytest.raises(ValueError, match=message) as error:
        load_splits(str(tmp_path))
    assert '\n' not in str(error.value)
    assert not load_splits(str(tmp_path), check_images='off').checked
    monkeypatch.setattr('timm_dfpt.data.datasets.SMALL', 5)
    large = load_splits(str(tmp_path))
    assert len(large.train) == 4
    assert not large.checked
    with pytest.raises(ValueError, match=message):
        load_splits(str(tmp_path), check_images='on')
    left = load_splits(str(tmp_path), on_bad_image='skip')
    assert left.checked
    assert len(left.train) + len(left.val) == 5
    with pytest.raises(ValueError, match="cannot be used with check_images='off'"):
        load_splits(str(tmp_path), on_bad_image='skip', check_images='off')


def test_channels_are_one_or_three() -> None:
    with pytest.raises(ValueError, match='channels=4'):
        decode_image(SAME_AS_PILLOW['rgb'], 4)
