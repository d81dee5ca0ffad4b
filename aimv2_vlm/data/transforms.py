"""Picture bytes -> uint8 tensors: decoding with limits, the training crop, the evaluation crop, normalisation on the
device."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import interpolate

from aimv2_vlm.data.order import Draws
from aimv2_vlm.data.shards import too_many_bytes

MAX_PIXELS = 64_000_000
MAX_BYTES = 40_000_000
REDUCTIONS = (8, 4, 2)  # what libjpeg-turbo computes faster than the full size
FAST_MARGIN = 1.75  # pixels of a reduced crop's shorter side per pixel of the result, at least
# Pillow may open these only: others hand the bytes to external programs (EPS) or are no pictures of the web.
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}


class BadImage(Exception):
    """A picture that cannot be used, with the reason in words."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Header:
    """What a picture's header says, before decoding and before EXIF rotation."""

    height: int
    width: int
    extension: str  # of the format found in the bytes, whatever the file was called
    plain_jpeg: bool  # grey or YCbCr JPEG that needs no rotation: nothing but pixels to decode


def read_header(data: bytes, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Header:
    """Check a picture's limits without decoding it. Raises BadImage."""
    if len(data) > max_bytes:
        raise BadImage(too_many_bytes(len(data), max_bytes))
    if not data:
        raise BadImage("empty file")
    header = _jpeg_header(data) if data[:3] == b"\xff\xd8\xff" else None
    if header is None:
        if declared := _declared_size(data):
            _check_size(*declared, max_pixels)
        with _open(data) as image:
            header = Header(image.height, image.width, _EXTENSIONS[image.format], plain_jpeg=False)
    _check_size(header.height, header.width, max_pixels)
    return header


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if min(height, width) < 1:
        raise BadImage(f"zero-sided picture ({height} x {width})")
    if height * width > max_pixels:
        raise BadImage(f"{height} x {width} pixels, over the limit of {int(max_pixels)}")


def _declared_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) in the first bytes of PNG and WebP, None for others: Pillow's WebP reader reserves its canvases
    (8 bytes a pixel) as soon as a file is opened, and its own limit on PNG has other words than ours."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and len(data) >= 24:
        return int.from_bytes(data[20:24]), int.from_bytes(data[16:20])
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        if data[12:16] == b"VP8X":
            return int.from_bytes(data[27:30], "little") + 1, int.from_bytes(data[24:27], "little") + 1
        if data[12:16] == b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
        if data[12:16] == b"VP8 ":
            return int.from_bytes(data[28:30], "little") & 0x3FFF, int.from_bytes(data[26:28], "little") & 0x3FFF
    return None


def _jpeg_header(data: bytes) -> Header | None:
    """The header by libjpeg-turbo, a hundred times faster than Pillow's; None leaves the judgement to Pillow."""
    import simplejpeg

    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    plain = colorspace in ("Gray", "YCbCr") and (not _may_be_rotated(data) or _orientation(data) == 1)
    return Header(height, width, "jpg", plain_jpeg=plain)


def _may_be_rotated(data: bytes) -> bool:
    """Whether a JPEG's segments before the pixels hold EXIF or XMP that could name a rotation (or are in disorder).
    Walking the segments costs microseconds, a search in the bytes up to a tenth of the whole transform."""
    at = 2
    while data[at : at + 1] == b"\xff":
        marker = data[at + 1 : at + 2]
        if marker == b"\xda":  # start of scan: pixels follow
            return False
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if marker == b"\xe1":
            segment = data[at + 4 : end]
            if b"Exif\0\0" in segment or b"tiff:Orientation" in segment:
                return True
        at = end
    return True


def _orientation(data: bytes) -> int:
    with _open(data) as image:
        try:
            return image.getexif().get(0x0112, 1)
        except Exception:  # a broken EXIF block says nothing about the pixels
            return 1


@contextlib.contextmanager
def _open(data: bytes) -> Iterator["PIL.Image.Image"]:  # noqa: F821
    """Pillow on bytes: known formats, strict about truncation, any failure a BadImage."""
    from PIL import Image, ImageFile

    # lmms-eval switches this on for the whole process when it is imported; a cut-off picture must not pass as grey.
    tolerant, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
            yield image
    except BadImage:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadImage("not a picture in a known format") from error
    except Exception as error:  # Pillow's decoders raise nearly everything on damaged bytes
        raise BadImage(f"cannot be decoded ({type(error).__name__}: {str(error)[:100]})") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant


def decode_image(
    data: bytes,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    min_size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Picture bytes -> uint8 (3, H, W), RGB, a view of (H, W, 3) memory.

    EXIF rotation is applied; grey, palette, CMYK and 16-bit become 8-bit RGB; alpha is dropped as Pillow's
    `convert("RGB")` does (what stock processors see); of animations the first frame. `min_size` (height, width) lets
    a plain JPEG be decoded at a reduced scale (1/2, 1/4, 1/8) that is not below it. Raises BadImage for limits
    (judged from the header), damage and truncation.
    """
    header, reduction = read_header(data, max_pixels, max_bytes), 1
    if min_size:
        room = min(header.height / max(1, min_size[0]), header.width / max(1, min_size[1]))
        reduction = next((factor for factor in REDUCTIONS if factor <= room), 1)
    return _decode(data, header, reduction)


def _decode(data: bytes, header: Header, reduction: int = 1) -> torch.Tensor:
    """The picture, if it is a plain JPEG with sides (ceil(height / reduction), ceil(width / reduction))."""
    if header.plain_jpeg:
        import simplejpeg

        height, width = math.ceil(header.height / reduction), math.ceil(header.width / reduction)
        try:
            pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, min_factor=reduction)
        except ValueError as error:
            raise BadImage(f"cannot be decoded ({str(error)[:100]})") from error
        return torch.from_numpy(pixels).permute(2, 0, 1)
    with _open(data) as image:
        pixels = np.array(to_rgb(image))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def to_rgb(image: "PIL.Image.Image") -> "PIL.Image.Image":  # noqa: F821
    """An opened picture upright in 8-bit RGB, as `decode_image` says. Raises BadImage."""
    from PIL import Image, ImageOps

    image.load()
    with contextlib.suppress(Exception):  # a broken EXIF block says nothing about the pixels
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, in one of Pillow's guises: its own convert() would clip to white
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage("32-bit pixels")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImage("floating-point pixels")
    return image.convert("RGB")


# ------------------------------------------------------------------------------------------------------------- geometry


def resize(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bicubic, antialiased, on uint8 (rounded and clamped): (3, H, W) -> (3, *size)."""
    if tuple(pixels.shape[1:]) == size:
        return pixels.contiguous()
    # torch's vectorised path wants one (H, W, 3) block with the strides of a batch; the copy goes by rows.
    pixels_BCHW = pixels.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
    return interpolate(pixels_BCHW, size=size, mode="bicubic", antialias=True)[0].contiguous()


def draw_crop(
    height: int, width: int, scale: Sequence[float], ratio: Sequence[float], rng: Draws
) -> tuple[int, int, int, int]:
    """(top, left, height, width) by torchvision's RandomResizedCrop: area share from `scale`, aspect w/h log-uniform
    in `ratio`, ten tries, then the largest central crop whose aspect lies in `ratio`."""
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * rng.uniform(scale[0], scale[1])
        aspect = math.exp(rng.uniform(*log_ratio))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = rng.integers(0, height - crop_height + 1)
            return top, rng.integers(0, width - crop_width + 1), crop_height, crop_width
    crop_height, crop_width = height, width
    if width / height < ratio[0]:
        crop_height = max(1, min(height, round(width / ratio[0])))
    elif width / height > ratio[1]:
        crop_width = max(1, min(width, round(height * ratio[1])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop and flip (paper Table A1). mode `exact` decodes at full size; `fast` decodes plain JPEG 2, 4
    or 8 times smaller where that leaves both sides of the crop at least `FAST_MARGIN` x `size` (about 50 dB PSNR on
    photographs), and moves the crop's edges to multiples of that factor."""

    size: int
    scale: tuple[float, float] = (0.4, 1.0)
    ratio: tuple[float, float] = (0.75, 1.33)
    flip: float = 0.5
    mode: str = "exact"

    def __call__(self, image: torch.Tensor, rng: Draws) -> torch.Tensor:
        """uint8 (3, H, W) -> uint8 (3, size, size)."""
        crop = draw_crop(image.shape[1], image.shape[2], self.scale, self.ratio, rng)
        return self._finish(image, crop, rng)

    def decode(self, data: bytes, rng: Draws, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> torch.Tensor:
        """Picture bytes -> uint8 (3, size, size); the same draws as `__call__` on the decoded picture. Raises
        BadImage."""
        header = read_header(data, max_pixels, max_bytes)
        if not header.plain_jpeg:
            return self(_decode(data, header), rng)
        crop, reduction = self.plan(header, rng)
        image = _decode(data, header, reduction)
        return self._finish(image, tuple(side // reduction for side in crop), rng)

    def plan(self, header: Header, rng: Draws) -> tuple[tuple[int, int, int, int], int]:
        """What `decode` takes from a plain JPEG: the crop (top, left, height, width) in pixels of the whole picture and
        the reduction (1, 2, 4, 8) it is decoded at, of which the crop's numbers are multiples."""
        crop = draw_crop(header.height, header.width, self.scale, self.ratio, rng)
        reduction = 1
        if self.mode == "fast":
            side = min(crop[2:])
            reduction = next((factor for factor in REDUCTIONS if side >= FAST_MARGIN * self.size * factor), 1)
        if reduction > 1:  # an edge between two reduced pixels would shift the result by part of a pixel: 34 dB, not 50
            height, width = round(crop[2] / reduction), round(crop[3] / reduction)
            height, width = min(height, header.height // reduction), min(width, header.width // reduction)
            top = min(round(crop[0] / reduction), header.height // reduction - height)
            left = min(round(crop[1] / reduction), header.width // reduction - width)
            crop = top * reduction, left * reduction, height * reduction, width * reduction
        return crop, reduction

    def _finish(self, image: torch.Tensor, crop: tuple[int, int, int, int], rng: Draws) -> torch.Tensor:
        top, left, height, width = crop
        pixels = resize(image[:, top : top + height, left : left + width], (self.size, self.size))
        return pixels.flip(2) if rng.uniform() < self.flip else pixels


@dataclass(frozen=True)
class EvalTransform:
    """Shorter side resized to `resize` (None: `size`), centre crop of `size` (torchvision's Resize and CenterCrop).

    whole: no crop; both sides become `size` (what SigLIP's processor does)."""

    size: int
    resize: int | None = None
    whole: bool = False

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 (3, H, W) -> uint8 (3, size, size)."""
        if self.whole:
            return resize(image, (self.size, self.size))
        height, width = image.shape[1:]
        short, resized = min(height, width), self.resize or self.size
        height, width = resized * height // short, resized * width // short
        pixels = resize(image, (height, width))
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        return pixels[:, top : top + self.size, left : left + self.size].contiguous()

    @property
    def blank(self) -> torch.Tensor:
        """What a hole holds."""
        return torch.zeros(3, self.size, self.size, dtype=torch.uint8)


def normalize(
    pixels: torch.Tensor, mean: Sequence[float] | torch.Tensor, std: Sequence[float] | torch.Tensor
) -> torch.Tensor:
    """uint8 (..., 3, H, W) -> float32 (value / 255 - mean) / std, on the device of `pixels`."""
    mean = torch.as_tensor(mean, dtype=torch.float32, device=pixels.device).view(3, 1, 1)
    std = torch.as_tensor(std, dtype=torch.float32, device=pixels.device).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std
