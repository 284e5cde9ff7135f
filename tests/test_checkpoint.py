"""Checkpoints: they rebuild their own model, run no code, and are written whole or not at all."""

import logging
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from convmae import MAE, AttentionStage, Classifier, ConvMAE, ConvStage, checkpoint, masking, targets
from convmae.nn.positions import resize, sincos
from convmae.plain import from_plain, to_plain
from video import VideoConvMAE

IMAGE = (
    ConvMAE()
    .input((32, 48))
    .stages(
        ConvStage(dim=4, depth=1, stride=(4, 4), kernel=(3, 3)),
        AttentionStage(dim=12, depth=1, stride=(2, 2), heads=2),
    )
    .decode(dim=12, depth=1, heads=2)
)
CLIP = VideoConvMAE.inflate(IMAGE, frames=4)
both = pytest.mark.parametrize("builder", [IMAGE, CLIP], ids=["image", "clip"])


@dataclass(frozen=True, kw_only=True)
class Stripes:
    """A user's own masking: every other row of tokens."""

    phase: int = 0

    def __call__(self, batch: int, grid: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        mask = torch.zeros(batch, *grid, dtype=torch.bool)
        mask[..., self.phase :: 2, :] = True
        return mask


@dataclass
class Thawed:
    """A masking that somebody forgot to freeze."""

    def __call__(self, batch: int, grid: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        return masking.random(0.5)(batch, grid, generator)


IN_A_NEW_PROCESS = """
import sys
import torch
from convmae import checkpoint
state = torch.get_rng_state()
model = checkpoint.load(sys.argv[1])
assert torch.get_rng_state().equal(state), "loading draws from the caller's random numbers"
assert not model.training
given = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    out = model(**given)
torch.save(out["prediction"] if isinstance(out, dict) else out, sys.argv[3])
print(repr(model.builder))
"""


@pytest.mark.parametrize(
    "builder",
    [
        CLIP.mask(Stripes(phase=1)).predict(targets.pixels(unit=True)).drop_path(0.2),
        IMAGE.classifier(5, pooling="token"),
    ],
    ids=["clip", "classifier"],
)
def test_a_new_process_rebuilds_the_model_with_bitwise_equal_outputs(builder: MAE | Classifier, tmp_path: Path) -> None:
    model = builder.build()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    checkpoint.save(tmp_path / "last.pt", model)
    given: dict[str, Tensor] = {"x": torch.randn(2, 3, *builder.size)}
    if isinstance(builder, MAE):
        given["mask"] = builder.masking(2, builder.grid)
    torch.save(given, tmp_path / "given.pt")
    done = subprocess.run(
        [sys.executable, "-c", IN_A_NEW_PROCESS, *(str(tmp_path / f"{n}.pt") for n in ("last", "given", "out"))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == repr(builder)
    with torch.no_grad():
        here = model.eval()(**given)
    expected = here["prediction"] if isinstance(here, dict) else here
    assert torch.load(tmp_path / "out.pt", weights_only=True).equal(expected)


@both
def test_what_a_run_keeps_beside_the_weights_comes_back(builder: ConvMAE, tmp_path: Path) -> None:
    model = builder.build()
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, *builder.size))["loss"].backward()
    optimiser.step()
    checkpoint.save(tmp_path / "a.pt", model, optimiser=optimiser.state_dict(), progress={"step": 3, "loss": 0.5})
    content = checkpoint.read(tmp_path / "a.pt")
    assert content["builder"] == builder
    assert content["progress"] == {"step": 3, "loss": 0.5}
    torch.optim.AdamW(model.parameters()).load_state_dict(content["optimiser"])


def test_a_run_cannot_overwrite_the_builder_or_the_weights_with_its_own(tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError)):
        checkpoint.save(tmp_path / "a.pt", IMAGE.build(), weights={})


@pytest.mark.parametrize(
    "state", [{"last": Path("a")}, {"best": np.float64(0.5)}, {"rule": masking.random(0.5)}], ids=str
)
def test_what_a_run_keeps_is_refused_when_written_or_comes_back(state: dict[str, Any], tmp_path: Path) -> None:
    """A file that is written but can never be read is worse than an error."""
    try:
        checkpoint.save(tmp_path / "a.pt", IMAGE.build(), **state)
    except (TypeError, ValueError):
        return
    content = checkpoint.read(tmp_path / "a.pt")
    assert {name: content[name] for name in state} == state


def test_a_checkpoint_of_bfloat16_weights_loads(tmp_path: Path) -> None:
    model = IMAGE.build().bfloat16()
    checkpoint.save(tmp_path / "a.pt", model)
    for ours, theirs in zip(checkpoint.load(tmp_path / "a.pt").parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))


# --- what can be kept -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", [IMAGE, CLIP, MAE.huge(), CLIP.mask(Stripes()).classifier(3)], ids=str)
def test_plain_data_gives_the_builder_back(builder: MAE | Classifier) -> None:
    plain = to_plain(builder)
    assert from_plain(plain) == builder
    assert from_plain(pickle.loads(pickle.dumps(plain))) == builder


def test_a_model_without_a_builder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"this model came from no builder.*use \.build\(\)"):
        checkpoint.save(tmp_path / "a.pt", nn.Linear(2, 2))
    assert list(tmp_path.iterdir()) == []


def test_a_class_inside_a_function_is_refused_when_it_is_kept() -> None:
    @dataclass(frozen=True)
    class Hidden(Stripes):
        pass

    with pytest.raises(TypeError, match="is defined inside a function: a checkpoint could not find it"):
        to_plain(IMAGE.mask(Hidden()))


@pytest.mark.parametrize("value", [Thawed(), [1, 2], torch.zeros(2), {"a": 1}, print], ids=repr)
def test_what_could_not_be_read_back_is_refused_when_it_is_kept(value: Any) -> None:
    """Not at the end of a week's training, when the file is opened."""
    with pytest.raises(TypeError):
        to_plain(value)


def test_what_plain_data_may_name_is_a_frozen_dataclass_at_hand() -> None:
    fields: dict[str, Any] = {}
    with pytest.raises(ValueError, match="os:system is not a frozen dataclass, so it is not built from a file"):
        from_plain({"class": "os:system", "fields": {"command": "echo no"}})
    with pytest.raises(ValueError, match="is not a frozen dataclass"):
        from_plain({"class": f"{__name__}:Thawed", "fields": fields})
    with pytest.raises(ValueError, match=r"nowhere_at_all:X cannot be imported .* on PYTHONPATH"):
        from_plain({"class": "nowhere_at_all:X", "fields": fields})
    with pytest.raises(ValueError, match="cannot be imported"):
        from_plain({"class": "convmae.masking:Gone", "fields": fields})
    with pytest.raises(ValueError, match=r"convmae\.masking:BlockMasking has changed since this was written"):
        from_plain({"class": "convmae.masking:BlockMasking", "fields": {"ratio": 0.5, "gone": 1}})


# --- files that are not checkpoints -----------------------------------------------------------------------------


def saved(folder: Path) -> Path:
    checkpoint.save(folder / "good.pt", IMAGE.build(), progress={"step": 1})
    return folder / "good.pt"


def test_a_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match="no checkpoint at"):
            checkpoint.load(path)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused_by_name(share: float, tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"good\.pt cannot be read as a checkpoint: ."):
        checkpoint.load(path)


@pytest.mark.parametrize("garbage", [b"hello", bytes(100_000), b"PK\x03\x04" + bytes(200), b"\x80\x02}q\x00."])
def test_a_file_of_something_else_is_refused_by_name(garbage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "text.pt"
    path.write_bytes(garbage)
    with pytest.raises(ValueError, match=r"text\.pt (cannot be read as|is not) a checkpoint"):
        checkpoint.load(path)


def test_a_flipped_byte_among_the_weights_is_noticed(tmp_path: Path) -> None:
    """The archive holds a checksum of every tensor, but torch does not look at it when it reads."""
    path = saved(tmp_path)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    path.write_bytes(bytes(whole))
    assert zipfile.ZipFile(path).testzip() is not None
    with pytest.raises(ValueError, match="checkpoint"):
        checkpoint.load(path)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    content = torch.load(saved(folder), weights_only=True)
    change(content)
    torch.save(content, folder / "changed.pt")
    return folder / "changed.pt"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("builder"), "is not a checkpoint of this framework; for the authors' weights"),
        (lambda c: c.pop("weights"), "is not a checkpoint of this framework"),
        (lambda c: c.update(format=99), "has checkpoint format 99, this version reads 1"),
        (lambda c: c.pop("format"), "changed.pt"),
        (lambda c: c.update(builder=5), "changed.pt|builder"),
        (lambda c: c.update(builder={"fields": {}}), "changed.pt|builder|class"),
        (lambda c: c.update(builder={"class": "convmae.masking:BlockMasking"}), "changed.pt|builder|fields"),
        (lambda c: c.update(builder=to_plain(masking.random(0.5))), "changed.pt|builder"),
        (lambda c: c["weights"].popitem(), "weights|changed.pt"),
        (lambda c: c["weights"].update({"norm.weight": torch.zeros(99)}), "weights|changed.pt"),
        (lambda c: c["weights"].update(stranger=torch.zeros(1)), "weights|changed.pt"),
        (lambda c: c.update(weights=3), "weights|changed.pt"),
    ],
)
def test_a_file_with_a_part_missing_or_changed_is_refused(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint.load(rewritten(tmp_path, change))


def test_a_foreign_file_is_told_where_to_go(tmp_path: Path) -> None:
    torch.save({"model": {"patch_embed1.proj.weight": torch.zeros(1)}}, tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match=r"theirs\.pth is not a checkpoint of this framework.*convmae\.official\.load"):
        checkpoint.load(tmp_path / "theirs.pth")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt is not a checkpoint of this framework"):
        checkpoint.load(tmp_path / "list.pt")


class Malicious:
    """Unpickled by an incautious reader, it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("where", ["builder", "weights", "progress"])
def test_a_malicious_file_is_refused_and_executes_nothing(where: str, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    path = rewritten(tmp_path, lambda content: content.update({where: Malicious(trace)}))
    with pytest.raises(ValueError, match=r"changed\.pt cannot be read as a checkpoint"):
        checkpoint.load(path)
    with (tmp_path / "raw.pt").open("wb") as file:
        pickle.dump(Malicious(trace), file)
    with pytest.raises(ValueError, match=r"raw\.pt cannot be read as a checkpoint"):
        checkpoint.load(tmp_path / "raw.pt")
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the trap is real
    assert trace.exists()


# --- writing ----------------------------------------------------------------------------------------------------


def fails(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["torch.save", "os.fsync", "pathlib.Path.replace"])
def test_a_failed_save_keeps_the_previous_file_and_leaves_nothing_behind(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()
    with monkeypatch.context() as broken:
        broken.setattr(step, fails)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(path, IMAGE.build())
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["good.pt"]
    checkpoint.load(path)


def test_a_save_interrupted_in_the_middle_keeps_the_previous_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()

    def half(content: Any, file: Any) -> None:
        file.write(b"half a checkpoint")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, IMAGE.build())
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["good.pt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_keeps_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()
    real = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *args, **kw: real(Path("/dev/full") if self.suffix == ".tmp" else self, *args, **kw)
    )
    with pytest.raises((OSError, RuntimeError)):
        checkpoint.save(path, IMAGE.build())
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["good.pt"]


def test_saving_over_a_file_replaces_it_whole_and_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    path = saved(tmp_path)
    model = CLIP.build()
    checkpoint.save(path, model)
    assert checkpoint.load(path).builder == CLIP
    assert [found.name for found in tmp_path.iterdir()] == ["good.pt"]
    with pytest.raises(OSError, match="No such file"):
        checkpoint.save(tmp_path / "missing" / "a.pt", model)


def test_a_builder_that_cannot_be_kept_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()
    model = IMAGE.mask(Thawed()).build()
    with pytest.raises(TypeError):
        checkpoint.save(path, model)
    assert path.read_bytes() == before


# --- another size -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("builder", "size"),
    [(IMAGE, (64, 32)), (IMAGE, (16, 16)), (CLIP, (8, 64, 32)), (CLIP, (2, 32, 48)), (CLIP, (4, 32, 96))],
    ids=str,
)
def test_positions_are_resized_in_time_height_and_width_with_a_logged_line(
    builder: ConvMAE, size: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    here, there = builder.build(), builder.input(size).build()
    with caplog.at_level(logging.INFO):
        checkpoint.load_weights(there, here.state_dict())
    names = [name for name in here.state_dict() if name.endswith("positions")]
    assert len(names) == 2
    grid = builder.input(size).grid
    for name in names:
        assert f"{name} resized from {builder.grid} to {grid}" in caplog.messages
        expected = resize(here.state_dict()[name], grid)
        assert there.state_dict()[name].equal(expected)
    for name, tensor in there.state_dict().items():
        if name not in names:
            assert tensor.equal(here.state_dict()[name])
    assert there(torch.randn(2, 3, *size))["loss"].isfinite()


def test_weights_of_the_same_size_are_taken_as_they_are_without_a_line(caplog: pytest.LogCaptureFixture) -> None:
    here, there = IMAGE.build(), IMAGE.build()
    with caplog.at_level(logging.INFO):
        checkpoint.load_weights(there, here.state_dict())
    assert caplog.messages == []
    for name, tensor in there.state_dict().items():
        assert tensor.equal(here.state_dict()[name])


@pytest.mark.parametrize(
    ("old", "new"), [((4, 6), (8, 3)), ((2, 4, 6), (4, 8, 3)), ((1, 4, 6), (3, 4, 6)), ((4, 4, 4), (2, 4, 4))]
)
def test_resizing_keeps_constants_and_straight_lines_of_time(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    constant = resize(torch.full((*old, 5), 0.7), new)
    assert constant.shape == (*new, 5)
    assert torch.allclose(constant, torch.tensor(0.7))
    table = sincos(old, 12)
    assert resize(table, old) is table


def test_resizing_time_is_linear_between_frames() -> None:
    table = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 3, 1)
    assert resize(table, (4, 3, 3))[:, 0, 0, 0].tolist() == pytest.approx([0, 0.25, 0.75, 1])


def test_resizing_space_is_torchs_bicubic() -> None:
    table = torch.randn(4, 6, 5)
    expected = nn.functional.interpolate(table.permute(2, 0, 1)[None], size=(7, 3), mode="bicubic")
    assert torch.allclose(resize(table, (7, 3)), expected[0].permute(1, 2, 0))


def test_weights_that_do_not_fit_are_refused_with_every_difference() -> None:
    model = IMAGE.build()
    weights: dict[str, Tensor] = dict(model.state_dict())
    before = {name: tensor.clone() for name, tensor in weights.items()}
    del weights["norm.weight"]
    weights["stranger"] = torch.zeros(1)
    weights["norm.bias"] = torch.zeros(13)
    weights["decoder.positions"] = torch.zeros(4, 6, 10)
    with pytest.raises(ValueError, match="the weights do not fit the model, 4 differences:") as caught:
        checkpoint.load_weights(model, weights)
    for problem in (
        "missing: norm.weight",
        "unexpected: stranger",
        "norm.bias: the file has (13,), the model (12,)",
        "decoder.positions: the file has (4, 6, 10), the model (4, 6, 12)",
    ):
        assert f"\n  - {problem}" in str(caught.value)
    for name, tensor in model.state_dict().items():
        assert tensor.equal(before[name])


def test_positions_of_an_image_do_not_pass_for_a_clips() -> None:
    with pytest.raises(ValueError, match=r"positions: the file has \(4, 6, 12\), the model \(2, 4, 6, 12\)"):
        checkpoint.load_weights(CLIP.build(), IMAGE.build().state_dict())


def test_a_checkpoint_loads_at_another_size(tmp_path: Path) -> None:
    builder = ConvMAE().input(32).stages(
        ConvStage(dim=8, depth=1, stride=(4, 4), kernel=(3, 3)),
        AttentionStage(dim=16, depth=1, stride=(2, 2), heads=2),
    ).decode(dim=16, depth=1, heads=2)  # fmt: skip
    checkpoint.save(tmp_path / "small.pt", builder.build())
    larger = checkpoint.load(tmp_path / "small.pt", size=64)
    assert larger.trunk.grid == (8, 8)
    assert larger(torch.randn(2, 3, 64, 64))["loss"].isfinite()


def test_a_classifier_starts_from_a_pretrained_trunk_at_another_size(tmp_path: Path) -> None:
    builder = ConvMAE().input(32).stages(
        ConvStage(dim=8, depth=1, stride=(4, 4), kernel=(3, 3)),
        AttentionStage(dim=16, depth=1, stride=(2, 2), heads=2),
    ).decode(dim=16, depth=1, heads=2)  # fmt: skip
    model = builder.build()
    checkpoint.save(tmp_path / "small.pt", model)
    net = builder.input(48).classifier(5).build()
    checkpoint.load_trunk(net, tmp_path / "small.pt")
    assert net(torch.randn(2, 3, 48, 48)).shape == (2, 5)
    weight = "stages.0.blocks.0.depthwise.weight"
    assert net.trunk.state_dict()[weight].equal(model.trunk.state_dict()[weight])
