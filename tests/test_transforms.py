"""Laws of picture decoding and cropping: reference pixels for every kind of picture, limits before decoding,
torchvision's geometry."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageFile, ImageOps, WebPImagePlugin
from torchvision.transforms.v2 import functional as reference

from aimv2_vlm.data.order import Draws, draws
from aimv2_vlm.data.transforms import (
    FAST_MARGIN,
    BadImage,
    EvalTransform,
    Header,
    TrainTransform,
    decode_image,
    draw_crop,
    normalize,
    read_header,
)

RGB = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[10, 20, 30], [200, 100, 50], [255, 255, 255]]], np.uint8)


def save(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(height, width, seed=0):
    """A picture like a photograph: power falls with frequency."""
    generator = np.random.default_rng(seed)
    vertical, horizontal = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    spectrum = 1 / np.maximum(np.hypot(vertical, horizontal), 1 / max(height, width))
    phases = np.exp(2j * np.pi * generator.random((3, height, width // 2 + 1)))
    channels = np.fft.irfft2(spectrum * phases, s=(height, width))
    channels = 0.8 * channels.mean(0) + 0.2 * channels  # colours go together
    channels = (channels - channels.mean()) / channels.std() * 45 + 128
    return Image.fromarray(channels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def pixels_of(data, **options):
    tensor = decode_image(data, **options)
    assert tensor.dtype == torch.uint8 and tensor.shape[0] == 3
    return tensor.permute(1, 2, 0).numpy()


def psnr(one, two):
    return 10 * torch.log10(255**2 / ((one.float() - two.float()) ** 2).mean().clamp(min=1e-9)).item()


# --- reference pixels


def grey_16():
    return save(Image.fromarray(np.array([[0, 256, 32768], [65535, 511, 0x1234]], np.uint16)))


def palette():
    return save(Image.fromarray(RGB).quantize(6), transparency=0)


def png(height, width, bits, colour, raw, *chunks):
    """A PNG of kinds that Pillow does not write; `raw`: rows without their filter bytes."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    stride = len(raw) // max(1, height)
    rows = b"".join(b"\0" + raw[at : at + stride] for at in range(0, len(raw), stride or 1))
    middle = b"".join(chunk(*one) for one in chunks) + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + middle + chunk(b"IEND", b"")


def wide(pixels, low=0x5A):
    """16-bit samples, big-endian, whose high bytes are `pixels`."""
    return (pixels.astype(">u2") * 256 + low).astype(">u2").tobytes()


def rotated(orientation, kind):
    """RGB stored so that EXIF's `orientation` turns it upright again."""
    across = np.swapaxes(RGB, 0, 1)
    stored = {
        1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1],
        5: across, 6: across[::-1], 7: across[::-1, ::-1], 8: across[:, ::-1],
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, lossless=True)


GREY = np.array([[0, 100, 255], [1, 2, 3]], np.uint8)
REFERENCE = {
    "RGB png": (lambda: save(Image.fromarray(RGB)), RGB),
    "RGB webp": (lambda: save(Image.fromarray(RGB), "WEBP", lossless=True), RGB),
    "RGB bmp": (lambda: save(Image.fromarray(RGB), "BMP"), RGB),
    "RGB tiff": (lambda: save(Image.fromarray(RGB), "TIFF"), RGB),
    "palette with transparency": (palette, RGB),
    "palette gif": (lambda: save(Image.fromarray(RGB).quantize(6), "GIF"), RGB),
    "RGBA": (lambda: save(Image.fromarray(np.dstack([RGB, np.full((2, 3), 7, np.uint8)]))), RGB),
    "grey": (lambda: save(Image.fromarray(GREY)), GREY[..., None].repeat(3, 2)),
    "LA": (
        lambda: save(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(GREY)])),
        GREY[..., None].repeat(3, 2),
    ),
    "1 bit": (
        lambda: save(Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1")),
        np.array([[0, 255], [255, 0]], np.uint8)[..., None].repeat(3, 2),
    ),
    "16-bit grey": (grey_16, np.array([[0, 1, 128], [255, 1, 0x12]], np.uint8)[..., None].repeat(3, 2)),
    "animated gif": (
        lambda: save(Image.fromarray(RGB).quantize(6), "GIF", save_all=True, append_images=[Image.new("L", (3, 2))]),
        RGB,
    ),
    "animated webp": (
        lambda: save(
            Image.fromarray(RGB), "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", (3, 2))]
        ),
        RGB,
    ),
    "1 pixel": (lambda: save(Image.fromarray(RGB[:1, :1])), RGB[:1, :1]),
    "16-bit RGB png": (lambda: png(2, 3, 16, 2, wide(RGB)), RGB),
    "16-bit RGBA png": (lambda: png(2, 3, 16, 6, wide(np.dstack([RGB, GREY]))), RGB),
    "16-bit grey tiff": (lambda: save(Image.fromarray(GREY.astype(np.uint16) * 256 + 9), "TIFF"), GREY[..., None].repeat(3, 2)),
    "RGB png with a transparent colour": (lambda: save(Image.fromarray(RGB), transparency=(255, 0, 0)), RGB),
    "grey png with a transparent value": (lambda: save(Image.fromarray(GREY), transparency=100), GREY[..., None].repeat(3, 2)),
    "palette with alpha per colour": (lambda: save(Image.fromarray(RGB).quantize(6), transparency=bytes([0, 9, 99, 199, 255, 3])), RGB),
    "RGBA webp": (
        lambda: save(Image.fromarray(np.dstack([RGB, GREY])), "WEBP", lossless=True, exact=True),
        RGB,
    ),
    "CMYK tiff": (
        lambda: save(Image.fromarray(np.dstack([255 - RGB, np.zeros((2, 3), np.uint8)]), "CMYK"), "TIFF"),
        RGB,
    ),
    "animated png": (
        lambda: save(Image.fromarray(RGB), save_all=True, append_images=[Image.new("RGB", (3, 2))]),
        RGB,
    ),
    **{
        f"EXIF {orientation} {kind}": (lambda orientation=orientation, kind=kind: rotated(orientation, kind), RGB)
        for orientation in range(1, 9)
        for kind in ("PNG", "WEBP", "TIFF")
    },
}


@pytest.mark.parametrize("kind", REFERENCE)
def test_reference_pixels(kind):
    """The table, and in both modes the training crop of exactly these pixels."""
    make, expected = REFERENCE[kind]
    data = make()
    assert np.array_equal(pixels_of(data), expected)
    image = torch.from_numpy(expected.copy()).permute(2, 0, 1)
    for mode in ("exact", "fast"):
        for size in (1, 2, 5):
            transform = TrainTransform(size, mode=mode)
            assert torch.equal(transform.decode(data, Draws(size)), transform(image, Draws(size)))


def stored_jpeg(kind):
    """A JPEG of one of the kinds, large enough for mode fast to reduce it where it may."""
    picture = smooth(480, 640)
    if kind == "grey":
        return save(picture.convert("L"), "JPEG", quality=95)
    if kind == "CMYK":
        return save(picture.convert("CMYK"), "JPEG", quality=95)
    if kind == "progressive":
        return save(picture, "JPEG", quality=95, progressive=True)
    exif = Image.Exif()
    exif[0x0112] = int(kind)
    return save(picture, "JPEG", quality=95, exif=exif)


@pytest.mark.parametrize("kind", ["grey", "CMYK", "progressive", *"12345678"])
def test_jpegs_of_every_kind_in_both_modes(kind):
    """Exact: the crop of the picture as Pillow decodes and turns it. Fast: the same where the picture is more than plain
    pixels, else within 45 dB of its own crop decoded whole."""
    data = stored_jpeg(kind)
    upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    image = torch.from_numpy(upright).permute(2, 0, 1)
    assert torch.equal(decode_image(data), image)
    exact, fast = (TrainTransform(64, flip=0.0, mode=mode) for mode in ("exact", "fast"))
    assert torch.equal(exact.decode(data, Draws(4)), exact(image, Draws(4)))
    header = read_header(data)
    assert header.plain_jpeg == (kind in ("grey", "progressive", "1"))
    if header.plain_jpeg:
        (top, left, height, width), reduction = fast.plan(header, Draws(4))
        assert reduction == 2
        whole = TrainTransform(64, (1.0, 1.0), (width / height, width / height), flip=0.0)
        assert 45 < psnr(fast.decode(data, Draws(4)), whole(image[:, top : top + height, left : left + width], Draws(0))) < 80
    else:
        assert torch.equal(fast.decode(data, Draws(4)), exact(image, Draws(4)))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_jpeg_equals_pillows_decoding(subsampling, options):
    data = save(smooth(61, 83), "JPEG", quality=92, subsampling=subsampling, **options)
    assert np.array_equal(pixels_of(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert read_header(data).plain_jpeg


def test_grey_and_cmyk_jpeg():
    picture = smooth(40, 50)
    grey = pixels_of(save(picture.convert("L"), "JPEG", quality=95))
    assert np.array_equal(grey[..., 0], grey[..., 1]) and np.array_equal(grey[..., 0], grey[..., 2])
    data = save(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)  # no cyan, no black: red
    assert np.abs(pixels_of(data).astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(orientation, kind):
    """A picture stored by each of the eight rules comes out upright: the bright corner at the top left, the dark one
    at the top right."""
    upright = np.full((32, 48, 3), 128, np.uint8)
    upright[:16, :16], upright[:16, 32:] = 255, 0
    transposed = np.swapaxes(upright, 0, 1)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: transposed, 6: transposed[::-1], 7: transposed[::-1, ::-1], 8: transposed[:, ::-1],
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, quality=100)
    assert np.abs(pixels_of(data).astype(int) - upright).max() <= 40
    assert read_header(data).plain_jpeg == (kind == "JPEG" and orientation == 1)


def test_rotations_are_found_wherever_they_may_stand():
    """In EXIF after other segments and fill bytes, in XMP, and not in the pixels or a comment."""
    plain = save(smooth(20, 30), "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = save(smooth(20, 30), "JPEG", exif=exif)

    def segment(marker, body):
        return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body

    comments = segment(0xE2, b"\0" * 65_000) * 5 + segment(0xFE, b"Exif\0\0 tiff:Orientation")
    xmp = segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"/>')
    assert pixels_of(turned[:2] + comments + turned[2:]).shape == (30, 20, 3)
    assert pixels_of(turned[:2] + b"\xff" + turned[2:]).shape == (30, 20, 3)
    assert pixels_of(plain[:2] + comments + xmp + plain[2:]).shape == (30, 20, 3)
    assert read_header(plain[:2] + comments + plain[2:]).plain_jpeg
    assert np.array_equal(pixels_of(plain[:2] + comments + plain[2:]), pixels_of(plain))
    assert read_header(plain + b"Exif\0\0tiff:Orientation").plain_jpeg


def test_a_broken_exif_block_does_not_cost_the_picture():
    plain = save(smooth(20, 30), "JPEG")
    block = b"Exif\0\0" + b"\xff" * 40
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:]
    assert np.array_equal(pixels_of(data), pixels_of(plain))


# --- refused


def png_header(height, width):
    return png(height, width, 8, 2, b"")


def jpeg_with_size(height, width):
    data = bytearray(save(Image.new("RGB", (8, 8)), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_with_size(kind, height, width):
    """A WebP whose header (extended VP8X, lossless VP8L, lossy VP8) declares this size over the pixels of another."""
    picture = Image.new("RGBA" if kind == "VP8X" else "RGB", (8, 8))  # lossy with alpha is an extended file
    data = bytearray(save(picture, "WEBP", lossless=kind == "VP8L"))
    assert data[12:16] == kind.encode()
    if kind == "VP8X":
        data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif kind == "VP8L":
        data[21:25] = (width - 1 | height - 1 << 14).to_bytes(4, "little")
    else:
        data[26:30] = struct.pack("<HH", width, height)
    return bytes(data)


def gif_with_size(height, width):
    data = bytearray(save(Image.new("L", (8, 8)), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


BOMBS = {
    "real png": lambda: save(Image.new("L", (9000, 9000)), compress_level=1),
    "png": lambda: png_header(20_000, 20_000),
    "largest png": lambda: png_header(2**31 - 1, 2**31 - 1),
    "jpeg": lambda: jpeg_with_size(65_000, 65_000),
    "just too large jpeg": lambda: jpeg_with_size(8001, 8000),
    "extended webp": lambda: webp_with_size("VP8X", 16_383, 16_383),
    "largest webp": lambda: webp_with_size("VP8X", 2**24, 2**24),
    "lossless webp": lambda: webp_with_size("VP8L", 16_383, 16_383),
    "lossy webp": lambda: webp_with_size("VP8 ", 16_383, 16_383),
    "gif": lambda: gif_with_size(65_535, 65_535),
    "bytes": lambda: save(Image.new("RGB", (8, 8)), "JPEG") + bytes(40_000_000),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_are_refused_from_the_header(kind, monkeypatch):
    """Refused before decoding: no decoder is ever started, in no mode."""
    started = []

    def watch(owner, name):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **options: (started.append(name), real(*args, **options))[1])

    watch(simplejpeg, "decode_jpeg")
    watch(WebPImagePlugin._webp, "WebPAnimDecoder")
    watch(ImageFile.ImageFile, "load")
    exact, fast = TrainTransform(8), TrainTransform(8, mode="fast")
    data = BOMBS[kind]()
    started.clear()  # what making the picture may have used
    for call in (read_header, decode_image, lambda data: exact.decode(data, Draws(0)), lambda data: fast.decode(data, Draws(0))):
        with pytest.raises(BadImage, match="over the limit|DecompressionBomb"):
            call(data)
    assert started == []
    for good in ("JPEG", "WEBP"):
        decode_image(save(smooth(8, 8), good))
    assert set(started) == {"decode_jpeg", "WebPAnimDecoder", "load"}  # the watch does see them


MEMORY_OF_BOMBS = """
import io, resource, sys
from pathlib import Path
import simplejpeg
from PIL import Image
from aimv2_vlm.data.order import Draws
from aimv2_vlm.data.transforms import BadImage, TrainTransform, decode_image

transforms = [TrainTransform(8, mode=mode) for mode in ("exact", "fast")]
for kind in ("JPEG", "PNG", "WEBP", "GIF"):  # the decoders are loaded before memory is limited
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, kind)
    for transform in transforms:
        transform.decode(buffer.getvalue(), Draws(0))
files = [path.read_bytes() for path in sorted(Path(sys.argv[1]).iterdir())]
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 100_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for data in files:
    for call in (decode_image, *(lambda data, one=one: one.decode(data, Draws(0)) for one in transforms)):
        try:
            call(data)
        except BadImage as error:
            print(error.reason)
print("grown", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
try:
    decode_image(files[-1], max_pixels=10**9)
except (BadImage, MemoryError) as error:
    print("decoded:", repr(error))
"""


def test_bombs_cost_no_memory(tmp_path):
    """In a process that may take 100 MB more (each of these pictures needs over 240 MB), every one is refused for its
    size, and the resident peak hardly moves; told to decode one, the process runs out."""
    for number, kind in enumerate(sorted(BOMBS, key="real png".__eq__)):
        (tmp_path / f"{number:02}").write_bytes(BOMBS[kind]())
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_OF_BOMBS, str(tmp_path)], check=False, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    *refused, grown, decoded = done.stdout.splitlines()
    assert len(refused) == 3 * len(BOMBS)
    assert all("over the limit" in reason or "DecompressionBomb" in reason for reason in refused), refused
    assert int(grown.split()[1]) < 20_000  # kB
    assert decoded.startswith("decoded:") and "Memory" in decoded


def test_limits_are_arguments():
    data = save(smooth(20, 30), "JPEG")
    assert decode_image(data, max_pixels=600).shape == (3, 20, 30)
    with pytest.raises(BadImage, match="20 x 30 pixels, over the limit of 599"):
        decode_image(data, max_pixels=599)
    with pytest.raises(BadImage, match="bytes, over the limit of 100"):
        decode_image(data, max_bytes=100)


@pytest.mark.parametrize("data", [jpeg_with_size(0, 8), jpeg_with_size(8, 0), png_header(0, 8), png_header(8, 0)])
def test_zero_sides_are_refused(data):
    with pytest.raises(BadImage):
        decode_image(data)


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", b"\xff\xd8\xff", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>", b"\0" * 9999],
)
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(BadImage):
        decode_image(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "CMYK"])
@pytest.mark.parametrize("tolerant", [False, True])
def test_truncated_pictures_are_refused(kind, tolerant, monkeypatch):
    """Also when another library told Pillow to accept them; that setting is left as it was."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    picture = smooth(90, 90)
    data = save(picture.convert("CMYK"), "JPEG") if kind == "CMYK" else save(picture, kind)
    decode_image(data)
    for share in (0.5, 0.8):
        with pytest.raises(BadImage):
            decode_image(data[: int(len(data) * share)])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is tolerant


@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_raise_nothing_but_bad_image():
    generator = np.random.default_rng(0)
    sources = [save(smooth(30, 30), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")]
    refused = 0
    for number in range(600):
        data = bytearray(sources[number % len(sources)])
        for _ in range(generator.integers(1, 20)):
            data[generator.integers(len(data))] = generator.integers(256)
        try:
            decode_image(bytes(data), max_pixels=10_000)
        except BadImage as error:
            refused += bool(error.reason)
    assert refused > 100


# --- geometry


def test_resize_is_pillows_bicubic_within_rounding():
    picture = smooth(200, 300)
    data = save(picture)
    left, top = 20, 10
    expected = picture.crop((left, top, left + 200, top + 160)).resize((64, 64), Image.Resampling.BICUBIC)
    whole_picture = TrainTransform(64, scale=(1, 1), ratio=(1.25, 1.25), flip=0.0)
    ours = whole_picture(decode_image(data)[:, top : top + 160, left : left + 200], Draws(0))
    assert psnr(ours, torch.from_numpy(np.array(expected)).permute(2, 0, 1)) > 50


@pytest.mark.parametrize("height, width", [(300, 400), (64, 64), (50, 211), (1, 100), (100, 1)])
def test_eval_transform_is_torchvisions(height, width):
    image = decode_image(save(smooth(max(height, 2), max(width, 2)).crop((0, 0, width, height))))
    expected = reference.resize(image, [64], interpolation=reference.InterpolationMode.BICUBIC, antialias=True)
    expected = reference.center_crop(expected, [64, 64])
    assert torch.equal(EvalTransform(64)(image), expected)


def test_crops_follow_scale_and_ratio():
    """torchvision's rule: share of the area uniform in scale, aspect log-uniform in ratio; always inside the
    picture."""
    shares, aspects, tops = [], [], []
    for position in range(4000):
        top, left, height, width = draw_crop(1000, 1000, (0.4, 1.0), (0.75, 1.33), draws(0, position, "crop"))
        assert 0 <= top <= 1000 - height and 0 <= left <= 1000 - width
        shares.append(height * width / 1e6)
        aspects.append(width / height)
        tops.append(top / max(1, 1000 - height))
    assert 0.398 < min(shares) and max(shares) <= 1 and 0.748 < min(aspects) and max(aspects) < 1.332
    # at a small scale nothing is rejected, so the uniform laws hold plainly
    small = [draw_crop(1000, 1000, (0.1, 0.3), (0.75, 1.33), draws(1, n, "crop"))[2:] for n in range(4000)]
    areas = np.sort([height * width / 1e6 for height, width in small])
    assert np.abs(areas - np.linspace(0.1, 0.3, 4000)).max() < 0.01
    logs = np.sort(np.log([width / height for height, width in small]))
    assert np.abs(logs - np.linspace(np.log(0.75), np.log(1.33), 4000)).max() < 0.03
    assert abs(np.mean(tops) - 0.5) < 0.03


@pytest.mark.parametrize("height, width", [(10, 1000), (1000, 10), (1, 1), (1, 50)])
def test_extreme_shapes_fall_back_to_the_central_crop(height, width):
    top, left, crop_height, crop_width = draw_crop(height, width, (0.9, 1.0), (0.75, 1.33), Draws(3))
    assert 0 <= top <= height - crop_height and 0 <= left <= width - crop_width and crop_height * crop_width >= 1
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    assert TrainTransform(16)(image, Draws(1)).shape == EvalTransform(16)(image).shape == (3, 16, 16)


def test_train_transform_is_determined_by_its_draws():
    data = save(smooth(120, 160), "JPEG")
    transform = TrainTransform(48)
    first = transform.decode(data, draws(0, 5, "crop"))
    assert first.dtype == torch.uint8 and first.shape == (3, 48, 48) and first.is_contiguous()
    assert torch.equal(first, transform.decode(data, draws(0, 5, "crop")))
    assert torch.equal(first, transform(decode_image(data), draws(0, 5, "crop")))
    assert not torch.equal(first, transform.decode(data, draws(0, 6, "crop")))


def test_flip_mirrors_the_same_crop():
    data = save(smooth(120, 160), "JPEG")
    plain, mirrored = (TrainTransform(48, flip=flip).decode(data, Draws(1)) for flip in (0.0, 1.0))
    assert torch.equal(plain.flip(2), mirrored)
    sometimes = [TrainTransform(48, flip=0.5).decode(data, Draws(n)) for n in range(60)]
    flips = sum(
        torch.equal(one, TrainTransform(48, flip=1.0).decode(data, Draws(n))) for n, one in enumerate(sometimes)
    )
    assert 15 < flips < 45


def test_fast_mode_is_close_to_exact():
    """On whole pictures, where no corner is rounded to the reduced picture's pixels."""
    options = {"scale": (1.0, 1.0), "ratio": (4 / 3, 4 / 3)}
    for seed in range(4):
        data = save(smooth(600, 800, seed), "JPEG", quality=90)
        exact, fast = (
            TrainTransform(100, mode=mode, **options).decode(data, Draws(seed)) for mode in ("exact", "fast")
        )
        assert 50 < psnr(exact, fast) < 80  # below 80: it did decode at a reduced scale
    assert decode_image(data, min_size=(250, 250)).shape == (3, 300, 400)


def test_fast_mode_reduces_as_far_as_its_margin_allows():
    """The plan is the drawn crop moved to multiples of the reduction, inside the picture, by less than one multiple."""
    reductions = []
    for position in range(400):
        height, width = 100 + 17 * position, 5_000 - 11 * position
        header = Header(height, width, "jpg", plain_jpeg=True)
        drawn = draw_crop(height, width, (0.1, 1.0), (0.75, 1.33), draws(0, position, "crop"))
        exact, fast = (TrainTransform(100, (0.1, 1.0), mode=m).plan(header, draws(0, position, "crop")) for m in ("exact", "fast"))
        assert exact == (drawn, 1)
        crop, reduction = fast
        reductions.append(reduction)
        assert all(side % reduction == 0 for side in crop)
        assert crop[0] + crop[2] <= height and crop[1] + crop[3] <= width and min(crop) >= 0
        assert max(abs(one - other) for one, other in zip(crop, drawn)) < reduction
        room = min(drawn[2:]) / (FAST_MARGIN * 100)
        assert room >= reduction or reduction == 1
        assert room < 2 * reduction or reduction == 8
    assert set(reductions) == {1, 2, 4, 8}


def test_fast_mode_takes_the_same_crop_within_a_reduced_pixel():
    ramp = np.linspace(0, 255, 800).astype(np.uint8)[None].repeat(600, 0)
    data = save(Image.fromarray(np.dstack([ramp] * 3)), "JPEG", quality=95)
    for position in range(10):
        exact, fast = (TrainTransform(96, mode=m).decode(data, draws(0, position, "crop")) for m in ("exact", "fast"))
        assert (exact.float() - fast.float()).abs().max() <= 4


def test_normalize():
    pixels = torch.tensor([0, 255, 128], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = torch.tensor([(0 - 0.5) / 0.1, (1 - 0.4) / 0.2, (128 / 255 - 0.3) / 0.3]).view(1, 3, 1, 1)
    torch.testing.assert_close(normalize(pixels, [0.5, 0.4, 0.3], [0.1, 0.2, 0.3]), expected)
