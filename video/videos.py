"""Clips from video files: a source says where the videos are, which frames make a clip, and what is cut out of them."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convmae import folder
from convmae.data import Packed, Sample
from convmae.folder import Unusable, part
from convmae.images import IMAGE_SUFFIXES, Augment, Crop
from convmae.listing import Listing
from video import lists, readers
from video.clips import Dense, MultiScaleCrop, Sampling, Twice, Views, many
from video.demo import make
from video.lists import VIDEO_SUFFIXES
from video.readers.protocol import RefusedError

LOOKED_FOR = 20
"""Of so many videos of a listing one must be there: a wrong place is not found out by an epoch of failures."""


@dataclass(frozen=True, kw_only=True)
class Clips:
    """How clips are made of a video: what all sources of videos have in common.

    The defaults are VideoMAE's for pretraining: frames at stride 4, multi-scale crops, no flips.

    Args:
        sampling: which frames make a clip.
        crop: which part of them is shown, the same in every frame.
        flip: mirror half of the clips: not where left and right tell classes apart, as in Something-Something.
        augment: what else is done to a cropped clip, in order; see `convmae.augmentation`.
        repeats: clips drawn from a video each time that it is decoded (repeated augmentation).
        reader: the reader asked first; `video.readers` says for what files which is wrong, and not used.
        views: what a test looks at, in place of random clips: then nothing is drawn, and `crop` is not used. See
            `as_test`.
    """

    sampling: Sampling = Dense(stride=4)
    crop: Crop = MultiScaleCrop()
    flip: bool = False
    augment: tuple[Augment, ...] = ()
    repeats: int = 1
    reader: readers.Choice = "auto"
    views: Views | None = None

    @property
    def given(self) -> int:
        """Clips that each video gives."""
        return self.repeats if self.views is None else len(self.views)

    @property
    def draws(self) -> bool:
        """Whether clips are drawn at random, as in training."""
        return self.views is None

    def as_test(self, clips: int = 1, crops: Literal[1, 3] = 1) -> Self:
        """The same videos as a test looks at them: so many clips of each, in so many crops, and nothing is drawn.

        Raises ValueError as `Views` does.
        """
        return replace(self, views=Views(clips=clips, crops=crops), flip=False, augment=(), repeats=1)

    def twice(self, by: int) -> Self:
        """The same videos, opened for `(2 * T, H, W)`: T frames, and after them T that begin up to `by - 1` later.

        Both are cropped, flipped and augmented alike. See `video.clips.Twice`, and `convmae.two_views`.

        Raises ValueError for a test, and for less than one place.
        """
        if self.views is not None:
            raise ValueError(f"{type(self).__name__}(views={self.views!r}) is a test, which looks at single clips")
        return replace(self, sampling=Twice(sampling=self.sampling, by=by))

    def check(self, size: tuple[int, ...]) -> None:
        """Refuse what cannot be.

        Raises ValueError for a size without three axes, a reader that is not there, and random changes of views.
        """
        if len(size) != 3:
            raise ValueError(f"{type(self).__name__} loads (T, H, W) clips, but the model's input is {size}")
        if isinstance(self.sampling, Twice) and size[0] % 2:
            raise ValueError(f"{type(self).__name__}.twice(...) loads two clips of T frames: (2 * T, H, W), not {size}")
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats} is below 1")
        drawn = {"flip": self.flip, "augment": self.augment, "repeats": self.repeats > 1}
        if self.views is not None and (wrong := [f"{name}={getattr(self, name)!r}" for name in drawn if drawn[name]]):
            raise ValueError(
                f"{type(self).__name__}(views={self.views!r}) draws nothing at random, but has {', '.join(wrong)}: "
                "leave it out, or take .as_test(...), which does"
            )
        readers.in_turn(self.reader)

    def load(
        self,
        video: str | Packed,
        size: tuple[int, int, int],
        generator: torch.Generator,
        *,
        intact: tuple[int, int] | None = None,
        reader: readers.Choice | None = None,
    ) -> Tensor:
        """Load random clips of a video, or its views, uint8 `(given, 3, T, H, W)`, or `(3, T, H, W)` where it is one.

        All views of a clip come before those of the next. All randomness comes from the generator. Frames are taken
        from the `intact` ones, first and stop, where the others are damaged; `reader` is that of the source unless
        given.

        Raises `UnusableFileError` for a file that `readers.read` cannot read.
        """
        choose = self.choosing(size[0], generator, intact)
        # of a test in their own size: those readers that would shrink them each do it in another way
        short_side = self.crop.short_side(size[1:]) if self.views is None else None
        return self.cut(
            readers.read(video, choose, short_side=short_side, reader=reader or self.reader), size, generator
        )

    def cut(self, frames: readers.Frames, size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        """Cut clips out of the frames that `choosing` chose, uint8 `(given * T, h, w, 3)`; gives what `load` does."""
        count, target = size[0], size[1:]
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
        several = pixels.view(-1, count, *pixels.shape[1:])
        if self.views is None:
            clips = [self._augmented(clip, target, generator) for clip in several]
        else:
            clips = [view for clip in several for view in self.views.crop(clip, target)]
        clips = [clip.transpose(0, 1) for clip in clips]
        return torch.stack(clips) if len(clips) > 1 else clips[0].contiguous()

    def choosing(
        self, frames: int, generator: torch.Generator, intact: tuple[int, int] | None = None
    ) -> readers.Choose:
        """What chooses the frames of all clips of a video; asked again, it answers equal tracks equally."""
        seed = int(torch.randint(2**62, (), generator=generator))

        def choose(track: readers.Track) -> list[int]:
            first, stop = intact or (0, track.frames)
            stop = min(stop, track.frames)
            if stop <= first:
                raise RefusedError("it has fewer frames than the manifest says: scan it again")
            whole = track._replace(frames=stop - first)
            if self.views is None:
                clips = many(self.sampling, whole, frames, self.repeats, torch.Generator().manual_seed(seed))
            else:
                clips = self.views.choose(whole, frames, self.sampling)
            return [first + index for clip in clips for index in clip]

        return choose

    def _augmented(self, clip: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """A clip `(T, 3, h, w)`, cropped to size."""
        pixels = self.crop(clip, size, generator)
        if self.flip and int(torch.randint(2, (), generator=generator)):
            pixels = pixels.flip(-1)
        for augment in self.augment:
            pixels = augment(pixels, generator)
        return pixels


@dataclass(frozen=True, kw_only=True)
class Videos(Clips):
    """Videos of a folder, or of a list; without a root, the built-in demonstration clips.

    Below a folder, those files count that end in one of `VIDEO_SUFFIXES`, and folders of frames; its subfolders, if
    any, are the classes. With a `split`, such as "val", only that subfolder counts (`convmae.folder.part`); without
    one, of the demonstration "train". A list is a text file with `path label` or `path,label` a line
    (`lists.read_list`). Nothing is opened for it. Where `python -m video.scan` has left a manifest, files that it found
    unusable are left out, and of those that are partly damaged, only the intact frames are taken.
    """

    root: Path | None = None
    manifest: Path | None = None
    """What the scan wrote, where it was told to write elsewhere than beside the data."""
    split: str | int | None = None
    """A subfolder of the root; data sets that are not split by folders have other values."""

    def __post_init__(self) -> None:
        for name in ("root", "manifest"):
            if isinstance(getattr(self, name), str):  # as one types it
                object.__setattr__(self, name, Path(getattr(self, name)))

    def listing(self) -> Listing:
        """The videos, their paths relative to `base`, and their classes; raises ValueError where there are none."""
        if self.root is not None and not self.root.is_dir():
            if not self.root.is_file():
                raise ValueError(f"root={str(self.root)!r} is not a folder of videos, nor a list of them")
            if self.split is not None:
                raise ValueError(f"split={self.split!r} is a subfolder of a folder, but root={str(self.root)!r} a list")
            return lists.read_list(self.root)
        try:
            return part(self.base, self.split, VIDEO_SUFFIXES, frames=IMAGE_SUFFIXES)
        except ValueError as problem:
            if any(self.base.glob("*.tar")):
                raise ValueError(f"{problem}; for its .tar files, give a recipe video.shards.VideoShards") from problem
            raise

    @property
    def base(self) -> Path:
        """The folder that paths are relative to."""
        if self.root is None:
            return make() / "train" if self.split is None else make()
        return self.root if self.root.is_dir() else self.root.parent

    def open(self, size: tuple[int, ...]) -> VideoSamples:
        """List the videos, to be loaded as clips of `size`, `(T, H, W)` frames and pixels.

        Raises ValueError where `size` has not three axes, there is no video, none of the first ones is there, a list or
        the manifest cannot be read, or the demonstration set cannot be written.
        """
        self.check(size)
        found = self.listing()
        first = [self.base / name for name in found.files[:LOOKED_FOR]]
        if not any(path.exists() for path in first):
            raise ValueError(
                f"{type(self).__name__}: of its first {len(first)} videos none is there, such as {first[0]}"
            )
        entries = folder.entries(self.root, found.files, self.manifest)
        known = folder.without_unusable(found, entries, self.base)
        intact = [(0, 0) if entry is None else entry.intact for entry in known.entries]
        by_pyav = [entry is not None and entry.reader == "pyav" for entry in known.entries]
        return VideoSamples(
            source=self,
            base=str(self.base),
            size=(size[0], size[1], size[2]),
            listing=known.listing,
            left_out=known.left_out,
            intact=np.array(intact, np.int32).reshape(-1, 2) if entries else None,
            by_pyav=np.array(by_pyav, bool) if entries else None,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoSamples:
    """The videos of an opened source.

    Args:
        source: how clips are made.
        base: the folder that paths are relative to.
        size: of a clip, `(T, H, W)`.
        listing: the videos and their classes.
        left_out: those that the manifest calls unusable.
        intact: first and stop of the undamaged frames of each, int32 `(N, 2)`; None without a manifest.
        by_pyav: which of them another reader would get wrong, bool `(N)`; None without a manifest.
    """

    source: Videos
    base: str
    size: tuple[int, int, int]
    listing: Listing
    left_out: tuple[Unusable, ...] = ()
    intact: NDArray[np.int32] | None = None
    by_pyav: NDArray[np.bool_] | None = None

    @property
    def repeats(self) -> int:
        """Clips that each video gives."""
        return self.source.given

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.listing.classes

    def __len__(self) -> int:
        return len(self.listing.files)

    def __repr__(self) -> str:
        without = f", without {len(self.left_out)} that are unusable" if self.left_out else ""
        return f"{len(self)} videos as clips of {self.size} in {str(self.source.root or self.base)!r}{without}"

    def name(self, index: int) -> str:
        """The path of a video."""
        return os.path.join(self.base, self.listing.files[index])

    def load(self, index: int, generator: torch.Generator) -> Sample:
        """Load random clips of a video, or its views; see `Clips.load`."""
        intact, reader = self.known(index)
        pixels = self.source.load(self.name(index), self.size, generator, intact=intact, reader=reader)
        return Sample(pixels, int(self.listing.labels[index]))

    def known(self, index: int) -> tuple[tuple[int, int] | None, readers.Choice]:
        """The intact frames of a video, first and stop, where a manifest tells them; and the reader it needs."""
        intact = None
        if self.intact is not None and self.intact[index, 1] > 0:
            intact = (int(self.intact[index, 0]), int(self.intact[index, 1]))
        by_pyav = self.by_pyav is not None and bool(self.by_pyav[index])
        return intact, "pyav" if by_pyav else self.source.reader
