"""Images from a folder: what is listed, how one is loaded, and how it is cropped.

The protocols `Crop` and `Augment` also serve clips, and so do the crops.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, Self

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from convmae import folder
from convmae.data import Packed, Sample, UnusableFileError
from convmae.demo import make
from convmae.folder import Unusable, part
from convmae.listing import Listing

IMAGE_SUFFIXES = frozenset([".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"])


class Crop(Protocol):
    """Cuts a random part out of an image, or the same part out of every frame of a clip, and resizes it."""

    def __call__(self, pixels: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Crop pixels uint8 `(..., 3, h, w)` to `(..., 3, *size)`."""
        ...

    def short_side(self, size: tuple[int, int]) -> int:
        """The input's short side, in pixels, from which on a larger input would only be resized down."""
        ...


class Augment(Protocol):
    """Changes an image at random, or every frame of a clip in the same way."""

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Pixels uint8 `(..., 3, h, w)` to as many of the same kind."""
        ...


def resize(pixels: Tensor, size: tuple[int, int], mode: Literal["bilinear", "bicubic"]) -> Tensor:
    """Resize pixels uint8 `(..., 3, h, w)` to `(..., 3, *size)`, without aliasing.

    Bit for bit torchvision's resize, whose import takes as long as torch's own.
    """
    batch = pixels.reshape(-1, *pixels.shape[-3:])
    return interpolate(batch, list(size), mode=mode, antialias=True).reshape(*pixels.shape[:-2], *size)


def cover(pixels: Tensor, size: tuple[int, int], *, mode: Literal["bilinear", "bicubic"], ratio: float = 1.0) -> Tensor:
    """Resize pixels uint8 `(..., 3, h, w)`, their aspect kept, so that they just cover `ratio` times `size`."""
    height, width = pixels.shape[-2:]
    rows, columns = (round(side * ratio) for side in size)
    if rows * width >= columns * height:
        return resize(pixels, (rows, rows * width // height), mode)
    return resize(pixels, (columns * height // width, columns), mode)


def window(pixels: Tensor, size: tuple[int, int], place: float) -> Tensor:
    """Cut `size` out of pixels `(..., h, w)`, at 0 the top left, at 1 the bottom right, and between."""
    top, left = (round(place * (there - wanted)) for there, wanted in zip(pixels.shape[-2:], size, strict=True))
    return pixels[..., top : top + size[0], left : left + size[1]]


@dataclass(frozen=True, kw_only=True)
class CentreCrop:
    """The centre, for tests: pixels are resized to cover `ratio` times the size, then cut.

    The default is ImageNet's usual test: short side 256 for crops of 224, bicubic. Ratio 1 keeps all of that side.
    """

    ratio: float = 256 / 224
    mode: Literal["bilinear", "bicubic"] = "bicubic"

    def __post_init__(self) -> None:
        if not 1 <= self.ratio < math.inf:
            raise ValueError(f"ratio={self.ratio}: must be a number from 1, for less would not cover the size")

    def __call__(self, pixels: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Crop pixels uint8 `(..., 3, h, w)` to `(..., 3, *size)`; nothing is drawn."""
        return window(cover(pixels, size, mode=self.mode, ratio=self.ratio), size, 0.5)

    def short_side(self, size: tuple[int, int]) -> int:
        """The input's short side, in pixels, from which on a larger input would only be resized down."""
        return math.ceil(max(size) * self.ratio)


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """A part of random area and aspect, resized bicubically (Inception's; MAE pretrains on areas .2 to 1)."""

    area: tuple[float, float] = (0.2, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)

    def __call__(self, pixels: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Crop pixels uint8 `(..., 3, h, w)` to `(..., 3, *size)`."""
        top, left, height, width = self._box(pixels.shape[-2], pixels.shape[-1], generator)
        part = pixels[..., top : top + height, left : left + width]
        return resize(part, size, "bicubic")

    def short_side(self, size: tuple[int, int]) -> int:
        """The input's short side, in pixels, from which on a larger input would only be resized down."""
        return math.ceil(max(size) / math.sqrt(self.area[0]))

    def _box(self, height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
        """Draw as torchvision does: ten trials, then the central part with the nearest aspect allowed."""
        low, high = self.aspect
        for _ in range(10):
            u, v = torch.rand(2, generator=generator).tolist()
            area = height * width * (self.area[0] + u * (self.area[1] - self.area[0]))
            aspect = math.exp(math.log(low) + v * (math.log(high) - math.log(low)))
            h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < h <= height and 0 < w <= width:
                return _below(height - h + 1, generator), _below(width - w + 1, generator), h, w
        h, w = min(height, round(width / low)), min(width, round(height * high))
        return (height - h) // 2, (width - w) // 2, h, w


def _below(number: int, generator: torch.Generator) -> int:
    return int(torch.randint(number, (), generator=generator))


@dataclass(frozen=True, kw_only=True)
class Stills:
    """How samples are made of images: what all sources of images have in common.

    Args:
        crop: which part is shown.
        flip: mirror left and right with probability 1/2.
        augment: what else is done to a cropped image, in order; see `convmae.augmentation`.
    """

    crop: Crop = RandomResizedCrop()
    flip: bool = True
    augment: tuple[Augment, ...] = ()

    def check(self, size: tuple[int, ...]) -> None:
        """Refuse what cannot be: raises ValueError for a size without two axes."""
        if len(size) != 2:
            raise ValueError(f"{type(self).__name__} loads (H, W) pixels, but the model's input is {size}")

    @property
    def draws(self) -> bool:
        """Whether anything of a sample is drawn at random, as in training."""
        return self.flip or bool(self.augment) or isinstance(self.crop, RandomResizedCrop)

    def as_test(self) -> Self:
        """The same images as a test looks at them: the centre, and nothing is drawn."""
        return replace(self, crop=CentreCrop(), flip=False, augment=())

    def load(self, file: str | Packed, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Load an image, cropped, flipped and augmented at random, uint8 `(3, H, W)`.

        Raises `UnusableFileError` as `read` does.
        """
        pixels = self.crop(read(file), size, generator)
        if self.flip and _below(2, generator):
            pixels = pixels.flip(-1)
        for augment in self.augment:
            pixels = augment(pixels, generator)
        return pixels.contiguous()


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Stills):
    """Images below `root`, without one the built-in demonstration stills; subfolders, if any, are the classes.

    With a `split`, such as "val", those of this subfolder of `root` alone: see `convmae.folder.part`. Without one, the
    demonstration's "train". Where `python -m video.scan --images` has left a manifest, files that it found unusable are
    left out.
    """

    root: Path | None = None
    split: str | None = None
    manifest: Path | None = None
    """What the scan wrote, where it was told to write elsewhere than beside the data."""

    def open(self, size: tuple[int, ...]) -> ImageSamples:
        """List the images, to be loaded at `size`, `(H, W)` pixels.

        Raises ValueError where `size` has not two axes, `root` is not a folder or holds no image or no such split, the
        manifest cannot be read, or the demonstration set cannot be written.
        """
        self.check(size)
        root = self.root
        if root is None:
            root = make() / "train" if self.split is None else make()
        found = part(root, self.split, IMAGE_SUFFIXES)
        entries = folder.entries(self.root, found.files, self.manifest)
        known = folder.without_unusable(found, entries, root)
        return ImageSamples(
            source=self, root=root, size=(size[0], size[1]), listing=known.listing, left_out=known.left_out
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSamples:
    """The images of an opened `ImageFolder`; `left_out` are those that the manifest calls unusable."""

    source: ImageFolder
    root: Path
    size: tuple[int, int]
    listing: Listing
    left_out: tuple[Unusable, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.listing.classes

    def __len__(self) -> int:
        return len(self.listing.files)

    def __repr__(self) -> str:
        without = f", without {len(self.left_out)} that are unusable" if self.left_out else ""
        return f"{len(self)} images of {self.size} in {str(self.root)!r}{without}"

    def name(self, index: int) -> str:
        """The path of an image."""
        return os.path.join(self.root, self.listing.files[index])

    def load(self, index: int, generator: torch.Generator) -> Sample:
        """Load one image; see `Stills.load`.

        Raises `UnusableFileError` for a file that is not a whole image.
        """
        pixels = self.source.load(self.name(index), self.size, generator)
        return Sample(pixels, int(self.listing.labels[index]))


def read(file: str | Path | Packed) -> Tensor:
    """Read an image as RGB pixels uint8 `(3, h, w)`, turned upright as its EXIF data say.

    Grey, palette and CMYK images become RGB; what is transparent becomes white.

    Raises `UnusableFileError` for a file that is missing, empty, cut short, damaged, not an image, or larger
    than Pillow's limit against decompression bombs (`PIL.Image.MAX_IMAGE_PIXELS`).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(file.data) if isinstance(file, Packed) else file) as image:
                upright = ImageOps.exif_transpose(image)
                pixels = np.array(_rgb(upright))
    # One file's trouble must not end a run, and decoders raise almost anything on damaged data.
    except Exception as error:
        name, size = (file.name, len(file.data)) if isinstance(file, Packed) else (str(file), _size(file))
        raise UnusableFileError(name, _reason(size, error)) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8, not scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _size(path: str | Path) -> int | None:
    return os.path.getsize(path) if os.path.isfile(path) else None


def _reason(size: int | None, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if size == 0:
        return "empty file"
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or its header is damaged"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return "more pixels than PIL.Image.MAX_IMAGE_PIXELS allows"
    if "truncated" in str(error):
        return "cut short: the image data end before the image does"
    return f"damaged or unreadable ({type(error).__name__}: {' '.join(str(error).split())})"
