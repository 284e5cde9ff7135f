"""Backbones: the maps of a trunk. Features of files: each once, whatever stops the command, and easy to read back."""

import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from media import MEDIA, counting, needs_media
from PIL import Image

from convmae import MAE, AttentionStage, ConvMAE, ConvStage, checkpoint, masking, targets
from convmae import features as features_module
from convmae.builders import Backbone, backbone_of
from convmae.data import Sample, Samples, UnusableFileError
from convmae.features import Arrays, Format, extract, main
from convmae.images import ImageFolder
from convmae.nn.layers import ATTENTION_EPS, recompute
from convmae.nn.trunk import Trunk
from convmae.targets import normalize
from video import VideoConvMAE
from video import features as video_features
from video.clips import Dense, views
from video.readers import Track
from video.videos import Videos

THREE = (
    ConvMAE()
    .input((32, 48))
    .stages(
        ConvStage(dim=4, depth=1, stride=(4, 4), kernel=(3, 3), mlp_ratio=2.0),
        ConvStage(dim=6, depth=1, stride=(2, 2), kernel=(3, 3), mlp_ratio=2.0),
        AttentionStage(dim=12, depth=2, stride=(2, 2), heads=2),
    )
    .decode(dim=12, depth=1, heads=2)
)
CLIPS = VideoConvMAE.inflate(THREE, frames=4)
PLAIN = MAE(trunk=(AttentionStage(dim=8, depth=2, heads=2, stride=(16, 16), hybrid=False),)).input((32, 48))
BUILDERS = [THREE, CLIPS, PLAIN, THREE.with_class_token()]


def some(builder: MAE, batch: int = 2, size: tuple[int, ...] | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *(size or builder.size), generator=generator)


# --- backbones --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("builder", "channels", "strides"),
    [
        (ConvMAE.base(), [256, 384, 768], [(4, 4), (8, 8), (16, 16)]),
        (VideoConvMAE.small(), [128, 256, 384], [(2, 4, 4), (2, 8, 8), (2, 16, 16)]),
        (MAE.small(), [384], [(16, 16)]),
        (MAE.huge(), [1280], [(14, 14)]),
    ],
)
def test_widths_and_strides_are_known_before_any_map_is(
    builder: MAE, channels: list[int], strides: list[tuple[int, ...]]
) -> None:
    with torch.device("meta"):
        backbone = builder.backbone().build()
    assert backbone.channels == backbone.feature_info.channels() == channels
    assert backbone.strides == strides
    assert backbone.feature_info.reduction() == [stride[-1] for stride in strides]


def test_feature_info_answers_as_timms_does() -> None:
    import timm

    theirs: Any = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3)).feature_info
    ours = ConvMAE.small().backbone(stages=(0, 1, 2))
    with torch.device("meta"):
        info = ours.build().feature_info
    channels: list[int] = theirs.channels()
    assert theirs.reduction() == info.reduction() == [4, 8, 16]
    assert [type(number) for number in channels] == [type(number) for number in info.channels()]


def test_strides_that_differ_in_height_and_width_have_no_single_reduction() -> None:
    flat = replace(PLAIN, trunk=(replace(PLAIN.trunk[0], stride=(8, 16)),)).backbone().build()
    assert flat.strides == [(8, 16)]
    with pytest.raises(ValueError, match=r"\[\(8, 16\)\] differ in height and width: use \.strides"):
        flat.feature_info.reduction()


@pytest.mark.parametrize("builder", BUILDERS)
def test_maps_are_the_trunks_channels_first_and_not_copied(builder: MAE) -> None:
    backbone, x = builder.backbone().build(), some(builder)
    kept = []
    backbone.trunk.stages[-1].register_forward_hook(lambda module, given, out: kept.append(out[0]))
    maps = backbone.features(x)
    for features, own in zip(maps, backbone.trunk(x).maps, strict=True):
        assert torch.equal(features, rearrange(own, "b 1 ... c -> b c ..."))
    for features, width, stride in zip(maps, backbone.channels, backbone.strides, strict=True):
        cells = [side // by for side, by in zip(builder.size, stride, strict=True)]
        assert features.shape == (2, width, *cells)
    assert maps[-1].data_ptr() == kept[0].data_ptr()


@pytest.mark.parametrize("builder", BUILDERS)
def test_pixels_are_normalised_inside(builder: MAE) -> None:
    backbone = builder.backbone().build()
    pixels = torch.randint(256, (2, 3, *builder.size), dtype=torch.uint8)
    for one, other in zip(backbone(pixels), backbone(normalize(pixels)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("stages", [(0,), (1,), (0, 1), (2,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("builder", [THREE, CLIPS])
def test_every_parameter_takes_part_and_maps_are_those_of_the_whole(builder: MAE, stages: tuple[int, ...]) -> None:
    whole, chosen = builder.backbone().build(), builder.backbone(stages=stages).build()
    mine = chosen.state_dict()
    chosen.load_state_dict({name: tensor for name, tensor in whole.state_dict().items() if name in mine})
    maps, all_maps = chosen(some(builder)), whole(some(builder))
    assert [len(maps), chosen.channels] == [len(stages), [whole.channels[stage] for stage in stages]]
    for features, stage in zip(maps, stages, strict=True):
        assert torch.equal(features, all_maps[stage])
    sum(features.square().sum() for features in maps).backward()
    assert not [name for name, parameter in chosen.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_norm_is_over_the_channels_of_the_last_map_alone(builder: MAE) -> None:
    torch.manual_seed(0)
    plain = builder.backbone().build()
    normed = builder.backbone(norm=True).build()
    normed.load_state_dict(plain.state_dict(), strict=False)
    *finer, last = plain(some(builder))
    *same, out = normed(some(builder))
    assert all(torch.equal(one, other) for one, other in zip(finer, same, strict=True))
    mean = last.mean(1, keepdim=True)
    expected = (last - mean) / (last - mean).square().mean(1, keepdim=True).add(ATTENTION_EPS).sqrt()
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("options", [{}, {"stages": [0]}, {"norm": True}, {"any_size": True}])
def test_a_backbone_prints_as_the_code_that_makes_it(builder: MAE, options: dict[str, bool]) -> None:
    net = builder.backbone(**options)  # type: ignore[arg-type]
    names = {kind.__name__: kind for kind in (Backbone, MAE, AttentionStage, ConvMAE, ConvStage, VideoConvMAE)}
    assert eval(repr(net), {**names, "masking": masking, "targets": targets}) == net
    assert pickle.loads(pickle.dumps(net)) == net
    hash(net)
    assert net.input((32, 32) if len(builder.size) == 2 else 32).size[-2:] == (32, 32)


def test_stages_that_are_not_there_are_refused() -> None:
    for stages in ((), (3,), (-1,), (1, 0), (1, 1)):
        with pytest.raises(ValueError, match=r"give some of \(0, 1, 2\), ascending, or None for all"):
            THREE.backbone(stages=stages)
    with pytest.raises(ValueError, match=r"norm=True is for the last stage's map: add 2 to stages=\(0, 1\)"):
        THREE.backbone(stages=(0, 1), norm=True)
    with pytest.raises(ValueError, match=r"\(230, 230\)\) is not a multiple of \(16, 16\)"):
        THREE.backbone().input(230).build()


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_backbone_of_any_size_is_the_one_that_was_built_for_that_size(builder: MAE, tmp_path: Path) -> None:
    size = (*[2 * side for side in builder.size[:-2]], 64, 16)
    fixed, any_size = builder.backbone().build().eval(), builder.backbone(any_size=True).build().eval()
    any_size.load_state_dict(fixed.state_dict())
    checkpoint.save(tmp_path / "fixed.pt", fixed)
    resized = checkpoint.load(tmp_path / "fixed.pt", size=size)
    for at, reference in ((builder.size, fixed), (size, resized)):
        for one, other in zip(any_size(some(builder, size=at)), reference(some(builder, size=at)), strict=True):
            assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"the model was built for inputs"):
        fixed(some(builder, size=size))
    any_size(some(builder, size=size))[-1].square().sum().backward()
    assert not [name for name, parameter in any_size.named_parameters() if parameter.grad is None]
    for odd in ((*size[:-2], 64, 24), (*size[:-2], 64, 0), (4, *size)):
        with pytest.raises(ValueError, match=r"are not a multiple of \(.*16, 16\): pad or resize"):
            any_size(torch.zeros(1, 3, *odd))


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_backbone_starts_from_a_pretrained_trunk_and_comes_back_from_a_file(builder: MAE, tmp_path: Path) -> None:
    pretrained = builder.build()
    checkpoint.save(tmp_path / "pretrained.pt", pretrained)
    backbone = builder.backbone().build()
    checkpoint.load_trunk(backbone, tmp_path / "pretrained.pt")
    checkpoint.save(tmp_path / "backbone.pt", backbone)
    again = checkpoint.load(tmp_path / "backbone.pt")
    assert again.builder == builder.backbone()
    x = some(builder)
    for one, other, trunk in zip(again(x), backbone(x), pretrained.trunk(x).maps, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, rearrange(trunk, "b 1 ... c -> b c ..."))


@pytest.mark.parametrize("builder", BUILDERS)
def test_the_backbone_of_a_model_shares_its_trunk(builder: MAE, tmp_path: Path) -> None:
    for model in (builder.build(), builder.classifier(3).build().eval(), builder.backbone(norm=True).build()):
        backbone = backbone_of(model)
        assert backbone.trunk is model.trunk
        assert backbone.training == model.training
        assert backbone.builder == builder.backbone(stages=range(len(builder.trunk)))
        first = backbone_of(model, stages=(0,), any_size=True)
        assert next(first.parameters()) is next(model.trunk.parameters())
        checkpoint.save(tmp_path / "first.pt", first)
        again, x = checkpoint.load(tmp_path / "first.pt"), some(builder)
        assert torch.equal(again(x)[0], backbone.eval()(x)[0])
    with pytest.raises(ValueError, match=r"a Linear has no \.trunk: give a masked autoencoder or a classifier"):
        backbone_of(torch.nn.Linear(2, 2))


def test_a_backbone_of_a_model_without_a_builder_works_and_is_not_saved(tmp_path: Path) -> None:
    model = THREE.build()
    model.builder = None
    backbone = backbone_of(model)
    assert isinstance(backbone.trunk, Trunk)
    with pytest.raises(ValueError, match="came from no builder"):
        checkpoint.save(tmp_path / "none.pt", backbone)


@pytest.mark.slow
@pytest.mark.parametrize("any_size", [False, True])
def test_a_compiled_backbone_gives_the_same_maps_and_gradients(any_size: bool) -> None:
    plain = THREE.backbone(any_size=any_size).build()
    # traced ahead of time, bicubic interpolation is many operators, and takes half a minute
    compiled = torch.compile(plain, backend="eager" if any_size else "aot_eager", fullgraph=True)
    x = some(THREE, size=(48, 32) if any_size else None)
    gradients = []
    for net in (plain, compiled):
        plain.zero_grad()
        maps = net(x)
        sum(features.square().sum() for features in maps).backward()
        gradients.append([maps, [parameter.grad for parameter in plain.parameters()]])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_blocks_may_be_computed_again_in_the_backward_pass() -> None:
    backbone = THREE.backbone(any_size=True).build()
    expected = torch.autograd.grad(backbone(some(THREE))[-1].square().sum(), list(backbone.parameters()))
    recompute(backbone)
    torch.testing.assert_close(
        torch.autograd.grad(backbone(some(THREE))[-1].square().sum(), list(backbone.parameters())), expected
    )


# --- features of files ------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty-one pictures in three folders, of which two are broken."""
    folder, random = tmp_path / "photos", np.random.default_rng(0)
    for number in range(21):
        path = folder / "abc"[number % 3] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(256, size=(40, 60, 3), dtype=np.uint8)).save(path)
    (folder / "a" / "03.png").write_bytes(b"")
    (folder / "b" / "04.png").write_text("not a picture")
    return folder


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run's folder, as far as it matters here."""
    torch.manual_seed(3)
    (tmp_path / "run").mkdir()
    checkpoint.save(tmp_path / "run" / "last.pt", THREE.build())
    return tmp_path / "run"


def command(*arguments: object) -> int:
    return main([str(argument) for argument in (*arguments, "--workers", 0, "--part", 8, "--batch-size", 4)])


def loaded(folder: Path) -> dict[str, Arrays]:
    """The rows of every file, by name."""
    from safetensors.numpy import load_file

    found: dict[str, Arrays] = {}
    for line in map(json.loads, (folder / "index.jsonl").read_text().splitlines()):
        path = folder / line["part"]
        part = load_file(path) if path.suffix == ".safetensors" else dict(np.load(path))
        assert line["file"] not in found
        found[line["file"]] = {name: rows[line["row"]] for name, rows in part.items() if rows.ndim}
    return found


@pytest.mark.parametrize("format", ["npz", "safetensors"])
def test_every_file_has_the_features_of_its_own_pixels(
    photos: Path, trained: Path, tmp_path: Path, format: Format, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command(trained, photos, out, "--maps", "--format", format) == 0
    model, samples = checkpoint.load(trained / "last.pt"), ImageFolder(root=photos).as_test().open(THREE.size)
    found = loaded(out)
    for index in range(len(samples)):
        name = os.path.relpath(samples.name(index), photos)
        if name in ("a/03.png", "b/04.png"):
            continue
        pixels, label, _ = samples.load(index, torch.Generator())
        with torch.no_grad():
            maps = [each[0, 0].movedim(-1, 0) for each in model.trunk(normalize(pixels[None])).maps]
        rows = found.pop(name)
        assert rows["label"] == label == "abc".index(name[0])
        np.testing.assert_allclose(rows["vector"], maps[-1].flatten(1).mean(1).numpy(), rtol=1e-4, atol=1e-5)
        for stage, features in enumerate(maps):
            assert rows[f"stage{stage}"].dtype == np.float16
            np.testing.assert_allclose(rows[f"stage{stage}"], features.numpy(), rtol=2e-3, atol=1e-4)
    assert not found
    failed = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert [line["file"] for line in failed] == ["a/03.png", "b/04.png"]
    assert [line["reason"] for line in failed] == ["empty file", "not an image, or its header is damaged"]
    said = capsys.readouterr().out
    assert f"{out}: features of 19 files; 0 files were done before" in said
    assert "a/03.png: empty file" in said


def test_the_three_lines_of_the_documentation_read_features_back(
    photos: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(trained, photos, tmp_path / "features") == 0
    after = str(features_module.__doc__).split("To read them back:")[1].split("A part is written")[0]
    lines = [line for line in dedent(after).splitlines() if line]
    assert len(lines) == 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"np": np, "json": json, "Path": Path}
    exec("\n".join(lines), names)
    assert {name: rows["vector"].tolist() for name, rows in loaded(tmp_path / "features").items()} == {
        name: vector.tolist() for name, vector in names["vectors"].items()
    }


@dataclass(frozen=True, repr=False)
class Interrupting:
    """Samples that are written down when they are loaded; one is broken, and before another comes Ctrl-C."""

    record: Path
    count: int = 30
    broken: int = 11
    interrupted_at: int | None = None

    def __repr__(self) -> str:
        return "the same data, wherever it is interrupted"

    def open(self, size: tuple[int, ...]) -> Samples:
        return Recorded(self, size)


@dataclass(frozen=True)
class Recorded:
    source: Interrupting
    size: tuple[int, ...]

    def __len__(self) -> int:
        return self.source.count

    def name(self, index: int) -> str:
        return f"sample {index} \udcff"  # not UTF-8 on the disk

    def load(self, index: int, generator: torch.Generator) -> Sample:
        if index == self.source.interrupted_at:
            raise KeyboardInterrupt
        with self.source.record.open("a") as file:
            file.write(f"{index}\n")
        if index == self.source.broken:
            raise UnusableFileError(self.name(index), "broken")
        pixels = torch.randint(256, (3, *self.size), generator=torch.Generator().manual_seed(index))
        return Sample(pixels.byte(), index % 3)


@pytest.mark.parametrize("format", ["npz", "safetensors"])
def test_interrupted_features_go_on_at_the_part_they_were_at_and_are_the_same(tmp_path: Path, format: Format) -> None:
    model, record = THREE.build(), tmp_path / "record"

    def go(out: Path, record: Path, **changes: Any) -> features_module.Written:
        options: dict[str, Any] = {"format": format, "part": 6, "batch_size": 3, "workers": 0, "device": "cpu"}
        return extract(model, Interrupting(record, **changes), out, **options)

    whole = go(tmp_path / "whole", tmp_path / "other")
    assert [whole.files, whole.before, [error.name for error in whole.failed]] == [29, 0, ["sample 11 \udcff"]]
    for at in (2, 13, 14, 29):
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "out", record, interrupted_at=at)
        assert not (tmp_path / "out" / "index.jsonl").exists()
        assert len(list((tmp_path / "out").glob("part-*"))) == at // 6
    done = go(tmp_path / "out", record)
    assert [done.files, done.before, list(map(str, done.failed))] == [29, 24, list(map(str, whole.failed))]
    for path in (tmp_path / "whole").iterdir():
        if path.suffix != ".safetensors":  # which keeps its header's texts in any order
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    one, other = loaded(tmp_path / "out"), loaded(tmp_path / "whole")
    assert list(one) == list(other) == [f"sample {index} \udcff" for index in range(30) if index != 11]
    assert all(np.array_equal(rows["vector"], other[name]["vector"]) for name, rows in one.items())
    assert not list((tmp_path / "out").glob(".*"))
    taken = [int(line) for line in record.read_text().splitlines()]
    assert set(taken) == set(range(30))
    # what was loaded twice lay in the part that was under way
    assert all(taken.count(index) == 1 for index in (*range(6, 12), *range(18, 24)))
    before = len(taken)
    assert go(tmp_path / "out", record).before == 30
    assert len(record.read_text().splitlines()) == before


def test_a_part_that_was_taken_away_is_written_again(photos: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command(trained, photos, out) == 0
    path, other = out / "part-000001.npz", out / "part-000002.npz"
    was, untouched = path.read_bytes(), other.stat().st_mtime_ns
    path.unlink()
    assert command(trained, photos, out) == 0
    assert path.read_bytes() == was
    assert other.stat().st_mtime_ns == untouched


@pytest.mark.slow
def test_features_that_are_killed_in_whatever_way_are_whole_in_the_end(trained: Path, tmp_path: Path) -> None:
    photos, random = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    for number in range(600):
        Image.fromarray(random.integers(256, size=(64, 64, 3), dtype=np.uint8)).save(photos / f"{number:03}.png")
    (photos / "300.png").write_bytes(b"")
    arguments = [str(trained), str(photos), str(tmp_path / "out"), "--part", "4", "--batch-size", "2", "--workers", "1"]
    parts, kept = set[str](), dict[str, int]()
    for how, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 130), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        process = subprocess.Popen(
            [sys.executable, "-m", "convmae.features", *arguments],
            cwd=Path(__file__).parents[1],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        until = time.monotonic() + 120
        while len(list((tmp_path / "out").glob("part-*"))) < len(parts) + 3 and time.monotonic() < until:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(how)
        said = process.communicate(timeout=300)[1]
        assert process.returncode == code, said
        assert ("stopped; the same command goes on" in said) == (code == 130)
        assert not (tmp_path / "out" / "index.jsonl").exists()
        parts = {path.name for path in (tmp_path / "out").glob("part-*")}
        for name, modified in kept.items():
            assert (tmp_path / "out" / name).stat().st_mtime_ns == modified
        kept = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in parts}
    arguments[-1] = "0"
    assert main(arguments) == 0
    arguments[2] = str(tmp_path / "whole")
    assert main(arguments) == 0
    one, other = loaded(tmp_path / "out"), loaded(tmp_path / "whole")
    assert list(one) == list(other) == [f"{number:03}.png" for number in range(600) if number != 300]
    for name, rows in one.items():
        assert np.array_equal(rows["vector"], other[name]["vector"])
    assert not list((tmp_path / "out").glob(".*"))


def test_a_loader_process_gives_the_same_features(photos: Path, trained: Path, tmp_path: Path) -> None:
    assert command(trained, photos, tmp_path / "one") == 0
    assert main([str(trained), str(photos), str(tmp_path / "two"), "--workers", "1"]) == 0
    one, two = loaded(tmp_path / "one"), loaded(tmp_path / "two")
    assert list(one) == list(two)
    for name, rows in one.items():
        np.testing.assert_allclose(rows["vector"], two[name]["vector"], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_refused_in_words(
    photos: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    out = tmp_path / "out"
    assert "part=10 is not a multiple of batch_size=4" in refused(trained, photos, out, "--part", 10, "--batch-size", 4)
    assert "batch_size=0, seconds=-1: must be positive" in refused(
        trained, photos, out, "--batch-size", 0, "--seconds", -1
    )
    assert "holds no file ending in" in refused(trained, trained, out)
    assert "no checkpoint at" in refused(photos, photos, out)
    assert "size=(40, 40)) is not a multiple of (16, 16)" in refused(trained, photos, out, "--size", 40)
    assert not out.exists()
    assert "holds 'a' and was not begun by this command" in refused(trained, photos, photos)
    assert command(trained, photos, out) == 0
    capsys.readouterr()
    assert "(part was 8, now 1024)" in refused(trained, photos, out)
    checkpoint.save(trained / "last.pt", THREE.build())
    assert "was begun with other settings (weights was" in refused(trained, photos, out, "--part", 8, "--batch-size", 4)
    checkpoint.save(trained / "last.pt", CLIPS.build())
    assert "takes inputs of (4, 32, 48): use `python -m video.features`" in refused(trained, photos, out)
    folder = os.open(photos, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another process writes to"):
        extract(THREE.build(), ImageFolder(root=photos).as_test(), photos)
    os.close(folder)


def test_a_folder_of_nothing_but_broken_files_has_empty_arrays_and_fails(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"")
    assert command(trained, tmp_path / "photos", tmp_path / "out", "--maps") == 1
    part = np.load(tmp_path / "out" / "part-000000.npz")
    assert part["vector"].shape == (0, 12)
    assert part["stage0"].shape == (0, 4, 8, 12)
    assert (tmp_path / "out" / "index.jsonl").read_text() == ""


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_classifier_and_a_plain_vit_have_features_too(photos: Path, tmp_path: Path, precision: Any) -> None:
    models: list[Any] = [THREE.classifier(3).build(), PLAIN.build(), PLAIN.backbone(norm=True).build()]
    for number, model in enumerate(models):
        out = tmp_path / str(number)
        source = ImageFolder(root=photos).as_test()
        assert extract(model, source, out, base=photos, workers=0, precision=precision).files == 19
        rows = loaded(out)["a/00.png"]
        assert rows["vector"].shape == (model.trunk.dims[-1],)
        assert rows["vector"].dtype == np.float32


@pytest.mark.parametrize("clips", [1, 3])
def test_videos_have_the_features_of_their_clips(tmp_path: Path, clips: int) -> None:
    torch.manual_seed(0)
    model = CLIPS.build().eval()
    checkpoint.save(tmp_path / "model.pt", model)
    path = counting(tmp_path / "videos" / "a.mp4", frames=20)
    (tmp_path / "videos" / "b.mp4").write_bytes(b"")
    arguments = [tmp_path / "model.pt", tmp_path / "videos", tmp_path / "out", "--maps", "--clips", clips]
    options = ["--stride", 2, "--workers", 0]
    assert video_features.main([str(argument) for argument in (*arguments, *options)]) == 0
    (rows,) = loaded(tmp_path / "out").values()
    assert rows["vector"].shape == ((clips, 12) if clips > 1 else (12,))
    # what the clips show, told from the brightness of their frames
    pixels = (
        Videos(root=path.parent, sampling=Dense(stride=2))
        .as_test(clips=clips)
        .open(CLIPS.size)
        .load(0, torch.Generator())[0]
    )
    several = pixels if clips > 1 else pixels[None]
    chosen = views(Track(frames=20, fps=25.0, height=48, width=64), 4, Dense(stride=2), clips)
    assert several.float().mean((1, 3, 4)).div(6).round().int().tolist() == chosen
    with torch.no_grad():
        maps = model.trunk(normalize(several)).maps
    expected = maps[-1].flatten(1, -2).mean(1).numpy()
    np.testing.assert_allclose(rows["vector"].reshape(clips, 12), expected, rtol=1e-4, atol=1e-5)
    for stage, own in enumerate(maps):
        stored = rows[f"stage{stage}"].reshape(clips, *own[0, 0].movedim(-1, 0).shape)
        np.testing.assert_allclose(stored, own[:, 0].movedim(-1, 1).numpy(), rtol=2e-3, atol=1e-4)
    failed = (tmp_path / "out" / "failed.jsonl").read_text()
    assert json.loads(failed) == {"file": "b.mp4", "reason": "empty file"}


@needs_media
def test_real_videos_have_features_and_broken_ones_reasons(tmp_path: Path) -> None:
    model = CLIPS.build()
    done = extract(model, Videos(root=MEDIA / "bad").as_test(), tmp_path, base=MEDIA / "bad", workers=0)
    failed = {error.name for error in done.failed}
    assert {"zero_bytes.mp4", "text.mp4", "one_frame.mp4"} <= failed
    assert not failed & loaded(tmp_path).keys()
    assert done.files + len(failed) == len(Videos(root=MEDIA / "bad").listing().files)


def test_an_image_command_of_videos_says_which_to_use(
    photos: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert video_features.main([str(trained), str(photos), str(tmp_path / "out")]) == 2
    assert "takes inputs of (32, 48): use `python -m convmae.features`" in capsys.readouterr().err
