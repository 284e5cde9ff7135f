"""Classifiers as ONNX and as exported programs give eager's logits, at other batch sizes than the traced one."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import onnxruntime
import pytest
import torch
from runs import tiny
from torch import Tensor

from convmae import MAE, AttentionStage, checkpoint, export
from convmae.builders import Classifier
from convmae.export import save_exported_program, to_exported_program, to_onnx
from convmae.nn.classifier import Classifier as ClassifierModule
from video import VideoConvMAE

VIT = MAE().stages(AttentionStage(dim=24, depth=2, stride=(8, 8), heads=2, hybrid=False)).input(32)
BUILDERS = {
    "images": tiny().classifier(5),
    "images, first token": tiny().classifier(5, pooling="token"),
    "clips": VideoConvMAE.inflate(tiny(), frames=4).classifier(5),
    "ViT, class token": VIT.classifier(5, pooling="token"),
    "ViT, mean": VIT.with_class_token(False).classifier(5),
}


def built(builder: Classifier) -> ClassifierModule:
    torch.manual_seed(0)
    return replace(builder, head_std=0.5).build().eval()  # so that logits differ by more than the bound


def pixels(model: ClassifierModule, count: int, *, raw: bool = False) -> Tensor:
    random = torch.Generator().manual_seed(count)
    shape = (count, 3, *model.trunk.size)
    if raw:
        return torch.randint(256, shape, dtype=torch.uint8, generator=random)
    return torch.randn(shape, generator=random)


def by_onnx(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path)
    assert [one.name for one in session.get_inputs()] == ["pixels"]
    (logits,) = session.run(["logits"], {"pixels": x.numpy()})
    return torch.from_numpy(np.asarray(logits))


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_an_exported_program_gives_eager_s_logits_at_any_batch_size(name: str, tmp_path: Path) -> None:
    model = built(BUILDERS[name]).train()
    program = torch.export.load(save_exported_program(model, tmp_path / "model.pt2")).module()
    assert model.training, "it is left as it was"
    model.eval()
    for count in (1, 2, 5):
        x = pixels(model, count)
        assert float(model(x).std()) > 0.05
        torch.testing.assert_close(program(x), model(x), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_onnx_gives_eager_s_logits_at_any_batch_size(name: str, tmp_path: Path) -> None:
    model = built(BUILDERS[name])
    path = to_onnx(model, tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"], "the weights are in the file"
    for count in (1, 3):
        x = pixels(model, count)
        torch.testing.assert_close(by_onnx(path, x), model(x), rtol=0, atol=1e-4)


@torch.no_grad()
def test_raw_pixels_are_normalised_in_the_file(tmp_path: Path) -> None:
    model = built(BUILDERS["images"])
    path, x = to_onnx(model, tmp_path / "model.onnx", raw_pixels=True), pixels(model, 3, raw=True)
    torch.testing.assert_close(by_onnx(path, x), model(x), rtol=0, atol=1e-4)
    program = to_exported_program(model, raw_pixels=True).module()
    torch.testing.assert_close(program(x), model(x), rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_command_writes_what_the_ending_says_at_another_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = built(BUILDERS["images"])
    checkpoint.save(tmp_path / "model.pt", model)
    for ending in ("onnx", "pt2"):
        assert export.main([str(tmp_path / "model.pt"), str(tmp_path / f"out.{ending}"), "--size", "48"]) == 0
        assert "pixels (B, 3, 48, 48), ImageNet-normalised floats, to logits (B, 5)" in capsys.readouterr().out
    larger = checkpoint.load(tmp_path / "model.pt", size=(48, 48))
    x = pixels(larger, 2)
    torch.testing.assert_close(by_onnx(tmp_path / "out.onnx", x), larger(x), rtol=0, atol=1e-4)
    assert export.main([str(tmp_path / "model.pt"), str(tmp_path / "out.tflite")]) == 2
    assert "must end in .onnx or .pt2" in capsys.readouterr().err
    assert export.main([str(tmp_path / "nowhere"), str(tmp_path / "out.onnx")]) == 2
    assert "no checkpoint at" in capsys.readouterr().err


@pytest.mark.slow
@torch.no_grad()
def test_a_program_that_does_not_know_this_framework_can_use_it(tmp_path: Path) -> None:
    model = built(BUILDERS["clips"])
    x = pixels(model, 3)
    save_exported_program(model, tmp_path / "model.pt2")
    torch.save({"pixels": x, "logits": model(x)}, tmp_path / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr


ELSEWHERE = """
import sys
sys.modules["convmae"] = sys.modules["einops"] = None  # an import of them fails
import torch
expected = torch.load("expected.pt")
logits = torch.export.load("model.pt2").module()(expected["pixels"])
torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-4)
"""


@pytest.mark.slow
@torch.no_grad()
def test_a_fixed_batch_is_the_only_one_taken(tmp_path: Path) -> None:
    model = built(BUILDERS["images"])
    path = to_onnx(model, tmp_path / "model.onnx", batch=1)
    torch.testing.assert_close(by_onnx(path, pixels(model, 1)), model(pixels(model, 1)), rtol=0, atol=1e-4)
    with pytest.raises(Exception, match="invalid dimensions for input: pixels"):
        by_onnx(path, pixels(model, 2))
    with pytest.raises(ValueError, match="a batch has one sample or more; got 0"):
        to_exported_program(model, batch=0)


@pytest.mark.slow
@torch.no_grad()
def test_weights_too_large_for_an_onnx_file_lie_beside_it(tmp_path: Path) -> None:
    model = built(BUILDERS["images"])
    with mock.patch.object(export, "LIMIT", 1000):
        path = to_onnx(model, tmp_path / "model.onnx")
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    x = pixels(model, 3)
    torch.testing.assert_close(by_onnx(path, x), model(x), rtol=0, atol=1e-4)
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(Exception, match=r"model\.onnx\.data"):
        by_onnx(path, x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a model on a GPU needs one")
@torch.no_grad()
def test_a_model_on_a_gpu_is_exported_in_plain_operators_and_stays_there(tmp_path: Path) -> None:
    model = built(BUILDERS["images"]).cuda()
    program = to_exported_program(model)
    assert not [node for node in program.graph.nodes if "convmae" in str(node.target)]
    assert next(model.parameters()).is_cuda
    x = pixels(model, 3)
    torch.testing.assert_close(by_onnx(to_onnx(model, tmp_path / "model.onnx"), x), model.cpu()(x), rtol=0, atol=1e-4)


def test_what_cannot_be_exported_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a MaskedAutoencoder is no classifier: finetune it first"):
        to_exported_program(tiny().build())
    with pytest.raises(
        ValueError, match=r"normalised in float32, and the model is in torch\.float16: give model\.float"
    ):
        to_onnx(built(BUILDERS["images"]).half(), tmp_path / "model.onnx", raw_pixels=True)
    with (
        mock.patch.object(export, "PACKAGES", ("onnx", "not_there_at_all")),
        pytest.raises(ValueError, match=r"ONNX needs not_there_at_all: pip install \"convmae\[export\]\""),
    ):
        to_onnx(built(BUILDERS["images"]), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
