"""Images from a folder."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convmae.data import UNLABELLED, Source, UnusableFileError
from convmae.images import IMAGE_SUFFIXES, ImageFolder, RandomResizedCrop, read, resize
from convmae.listing import listing

PHOTOGRAPHS = Path(__file__).parents[2] / "shared" / "media" / "images"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def save(path: Path, size: tuple[int, int] = (40, 30), mode: str = "RGB", colour: object = (200, 30, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)  # type: ignore[arg-type]
    return path


def test_subfolders_are_classes_in_sorted_order(tmp_path: Path) -> None:
    for file in ("dog/b.png", "cat/deep/a.JPG", "cat/z.png", "loose.png"):
        save(tmp_path / file)
    (tmp_path / "empty").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    save(tmp_path / "cat" / ".hidden.png")
    found = listing(tmp_path, IMAGE_SUFFIXES)
    assert tuple(found.files) == ("cat/deep/a.JPG", "cat/z.png", "dog/b.png", "loose.png")
    assert tuple(found.labels) == (0, 0, 1, UNLABELLED)
    assert found.classes == ("cat", "dog")


def test_links_are_followed_once_and_a_dead_one_is_listed(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "a.png")
    root = tmp_path / "root"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "linked" / "back").symlink_to(root)
    (root / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = listing(root, IMAGE_SUFFIXES)
    assert tuple(found.files) == ("gone.png", "linked/a.png")
    with pytest.raises(UnusableFileError, match="no such file"):
        ImageFolder(root=root).open((8, 8)).load(0, seeded())


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda p: p / "none", "is not a folder"), (lambda p: p, "holds no file ending in .bmp .gif")],
)
def test_a_wrong_root_is_a_clear_error(tmp_path: Path, make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageFolder(root=make(tmp_path)).open((8, 8))  # type: ignore[operator]


def test_clip_sizes_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"loads \(H, W\) pixels"):
        ImageFolder(root=tmp_path).open((8, 32, 32))


def test_samples_follow_from_the_generator_alone_and_pickle(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(noise).save(tmp_path / "a" / "noise.png")
    source = ImageFolder(root=tmp_path)
    assert isinstance(source, Source)
    samples = source.open((32, 48))
    pixels, label, _ = samples.load(0, seeded(3))
    assert (tuple(pixels.shape), pixels.dtype, label) == ((3, 32, 48), torch.uint8, 0)
    assert pixels.is_contiguous()
    again = pickle.loads(pickle.dumps(samples)).load(0, seeded(3))
    assert torch.equal(pixels, again.pixels)
    assert not torch.equal(pixels, samples.load(0, seeded(4)).pixels)
    assert eval(repr(source), {"PosixPath": Path, "ImageFolder": ImageFolder, "RandomResizedCrop": RandomResizedCrop})


def test_half_of_the_images_are_mirrored(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 64).astype(np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")

    def mirrored(*, flip: bool) -> int:
        samples = ImageFolder(root=tmp_path, flip=flip).open((16, 16))
        loaded = [samples.load(0, seeded(seed)).pixels.float() for seed in range(100)]
        return sum(bool(pixels[..., 0].mean() > pixels[..., -1].mean()) for pixels in loaded)

    assert mirrored(flip=False) == 0
    assert 30 < mirrored(flip=True) < 70


def test_crops_have_the_areas_and_aspects_asked_for() -> None:
    crop = RandomResizedCrop()
    for seed in range(200):
        top, left, height, width = crop._box(90, 120, seeded(seed))
        assert 0 <= top <= 90 - height
        assert 0 <= left <= 120 - width
        assert 0.19 < height * width / (90 * 120) <= 1
        assert 0.72 < width / height < 1.36
    assert crop._box(10, 1000, seeded()) == (0, 493, 10, 13)  # nothing fits: the central part


def test_resizing_is_torchvisions() -> None:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize as theirs

    pixels = torch.randint(0, 256, (2, 50, 70, 3), generator=seeded(), dtype=torch.uint8).permute(0, 3, 1, 2)
    for mode in InterpolationMode.BILINEAR, InterpolationMode.BICUBIC:
        ours = resize(pixels[..., 3:40, 5:60], (24, 31), mode.value)
        assert torch.equal(ours, theirs(pixels[..., 3:40, 5:60], [24, 31], interpolation=mode, antialias=True))


@pytest.mark.parametrize(
    ("name", "mode", "colour", "expected"),
    [
        ("grey.png", "L", 100, (100, 100, 100)),
        ("deep.png", "I;16", 100 << 8, (100, 100, 100)),
        ("cmyk.jpg", "CMYK", (0, 0, 0, 0), (255, 255, 255)),
        ("clear.png", "RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("opaque.png", "RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("palette.gif", "P", 0, (0, 0, 0)),
        ("bits.png", "1", 1, (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb(
    tmp_path: Path, name: str, mode: str, colour: object, expected: tuple[int, int, int]
) -> None:
    pixels = read(save(tmp_path / name, mode=mode, colour=colour))
    assert pixels.shape == (3, 30, 40)
    assert tuple(pixels[:, 0, 0].tolist()) == expected


def test_exif_turns_an_image_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 30))
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read(tmp_path / "turned.jpg").shape == (3, 40, 30)


def test_broken_images_say_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)).save(whole)
    for name, data, reason in [
        ("empty.jpg", b"", "empty file"),
        ("page.jpg", b"<!doctype html><title>404</title>", "not an image"),
        ("short.jpg", whole.read_bytes()[:5000], "cut short"),
        ("folder.jpg", None, "IsADirectoryError"),
    ]:
        path = tmp_path / name
        path.mkdir() if data is None else path.write_bytes(data)
        with pytest.raises(UnusableFileError, match=reason) as caught:
            read(path)
        assert caught.value.name == str(path)
        assert "\n" not in caught.value.reason
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9000)
    with pytest.raises(UnusableFileError, match="MAX_IMAGE_PIXELS"):
        read(whole)


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason=f"the photographs are not in {PHOTOGRAPHS}")
def test_real_photographs_load() -> None:
    samples = ImageFolder(root=PHOTOGRAPHS).open((64, 96))
    assert len(samples) > 20
    for index in range(len(samples)):
        pixels = samples.load(index, seeded(index)).pixels
        assert pixels.shape == (3, 64, 96)
        assert pixels.float().std() > 5
