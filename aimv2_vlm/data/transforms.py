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

MAX_PIXELS = 64_000_000
MAX_BYTES = 40_000_000
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
        raise BadImage(f"{len(data)} bytes, over the limit of {int(max_bytes)}")
    if not data:
        raise BadImage("empty file")
    header = _jpeg_header(data) if data[:3] == b"\xff\xd8\xff" else None
    if header is None:
        with _open(data) as image:
            header = Header(image.height, image.width, _EXTENSIONS[image.format], plain_jpeg=False)
    if min(header.height, header.width) < 1:
        raise BadImage(f"zero-sided picture ({header.height} x {header.width})")
    if header.height * header.width > max_pixels:
        raise BadImage(f"{header.height} x {header.width} pixels, over the limit of {int(max_pixels)}")
    return header


def _jpeg_header(data: bytes) -> Header | None:
    """The header by libjpeg-turbo, a hundred times faster than Pillow's; None leaves the judgement to Pillow."""
    import simplejpeg

    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    # EXIF or XMP may hold a rotation: they stand before the pixels, so a search in the first segments' range is enough.
    start = data[: 4 * 65536]
    upright = b"Exif\0\0" not in start and b"tiff:Orientation" not in start or _orientation(data) == 1
    return Header(height, width, "jpg", plain_jpeg=upright and colorspace in ("Gray", "YCbCr"))


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
    header = read_header(data, max_pixels, max_bytes)
    if header.plain_jpeg:
        import simplejpeg

        height, width = min_size or (0, 0)
        try:
            pixels = simplejpeg.decode_jpeg(
                data, "RGB", min_height=height, min_width=width, min_factor=2 if min_size else 1
            )
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


def _resize(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bicubic, antialiased, on uint8 (rounded and clamped): (3, H, W) -> (3, *size)."""
    if tuple(pixels.shape[1:]) == size:
        return pixels.contiguous()
    pixels_BCHW = pixels[None].contiguous(
        memory_format=torch.channels_last
    )  # torch's vectorised path; copies the crop only
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
    """Random resized crop and flip (paper Table A1). mode `exact` decodes at full size; `fast` lets JPEG decode at a
    reduced scale that leaves the crop's sides at least 2.5 x `size` (about 50 dB PSNR), its corners rounded to pixels
    of the reduced picture."""

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
        header = read_header(data, max_pixels, max_bytes) if self.mode == "fast" else None
        if header is None or not header.plain_jpeg:
            return self(decode_image(data, max_pixels, max_bytes), rng)
        top, left, height, width = draw_crop(header.height, header.width, self.scale, self.ratio, rng)
        enough = 2.5 * self.size / min(height, width)
        least = math.ceil(header.height * enough), math.ceil(header.width * enough)
        image = decode_image(data, max_pixels, max_bytes, min_size=least)
        down, across = image.shape[1] / header.height, image.shape[2] / header.width
        top, left = min(round(top * down), image.shape[1] - 1), min(round(left * across), image.shape[2] - 1)
        height = max(1, min(round(height * down), image.shape[1] - top))
        width = max(1, min(round(width * across), image.shape[2] - left))
        return self._finish(image, (top, left, height, width), rng)

    def _finish(self, image: torch.Tensor, crop: tuple[int, int, int, int], rng: Draws) -> torch.Tensor:
        top, left, height, width = crop
        pixels = _resize(image[:, top : top + height, left : left + width], (self.size, self.size))
        return pixels.flip(2) if rng.uniform() < self.flip else pixels


@dataclass(frozen=True)
class EvalTransform:
    """Shorter side resized to `size`, centre crop (torchvision's Resize and CenterCrop)."""

    size: int

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 (3, H, W) -> uint8 (3, size, size)."""
        height, width = image.shape[1:]
        short = min(height, width)
        height, width = self.size * height // short, self.size * width // short
        pixels = _resize(image, (height, width))
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        return pixels[:, top : top + self.size, left : left + self.size].contiguous()


def normalize(
    pixels: torch.Tensor, mean: Sequence[float] | torch.Tensor, std: Sequence[float] | torch.Tensor
) -> torch.Tensor:
    """uint8 (..., 3, H, W) -> float32 (value / 255 - mean) / std, on the device of `pixels`."""
    mean = torch.as_tensor(mean, dtype=torch.float32, device=pixels.device).view(3, 1, 1)
    std = torch.as_tensor(std, dtype=torch.float32, device=pixels.device).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std
