"""Every kind of file through the one way in; what is none of them is told apart."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from golden import needs_shared, tensors, under
from runs import TinyRun, tiny
from safetensors.torch import save_file

from convmae import checkpoint, weights
from convmae.hub import save_pretrained
from convmae.nn.classifier import Classifier
from convmae.nn.masked_autoencoder import MaskedAutoencoder
from convmae.training import fit


def vit() -> dict[str, torch.Tensor]:
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=192, depth=1, num_heads=3, num_classes=5)
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


def test_our_own_files_folders_and_the_hub_s_form(tmp_path: Path) -> None:
    run = TinyRun(folder=tmp_path / "run").run()
    assert fit(run)
    model = checkpoint.load(tmp_path / "run" / "last.pt")
    save_pretrained(model, tmp_path / "hub")
    for source in ("run", "run/last.pt", "hub", "hub/model.safetensors"):
        found = weights.load(tmp_path / source)
        assert found.builder == run.model
        assert not found.training
        for name, tensor in model.state_dict().items():
            assert torch.equal(found.state_dict()[name], tensor), (source, name)
        assert weights.load(tmp_path / source, size=(64, 64)).trunk.size == (64, 64)


def test_other_people_s_files_as_torch_safetensors_and_state_dicts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = vit()
    torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "vit.pth")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "vit.safetensors")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), caplog.at_level(logging.INFO, "convmae"):
        outputs = [weights.load(source)(x) for source in (state, tmp_path / "vit.pth", tmp_path / "vit.safetensors")]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    assert f"vit.pth: taken for a plain ViT, {len(state)} tensors" in caplog.text


@needs_shared
def test_the_authors_convmae() -> None:
    state = {
        name: one for name, one in under(tensors("convvit_tiny"), "state.").items() if not name.startswith("norm.")
    }
    assert isinstance(weights.load(state, heads=4), Classifier)


def test_what_is_none_of_them_is_told(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"resnet\.pth: nothing known.*begin with conv1\.weight, fc\.bias"):
        weights.load(tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match="plain ViTs by the names of MAE, VideoMAE, transformers or timm"):
        weights.load(tmp_path / "resnet.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match=r"holds a Tensor, no weights"):
        weights.load(tmp_path / "tensor.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        weights.load(tmp_path / "text.pt")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        weights.load(tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        weights.load(tmp_path)
    cut = {name: tensor for name, tensor in vit().items() if name != "blocks.0.norm2.bias"}
    with pytest.raises(ValueError, match=r"the state dict: the weights do not fit.*\n.*missing: .*norm2\.bias"):
        weights.load(cut)


def test_averaged_weights_are_asked_for_where_they_are_kept(tmp_path: Path) -> None:
    model = tiny().build()
    checkpoint.save(tmp_path / "model.pt", model)
    save_pretrained(model, tmp_path / "hub")
    torch.save(vit(), tmp_path / "vit.pth")
    save_file({name: tensor.contiguous() for name, tensor in vit().items()}, tmp_path / "vit.safetensors")
    assert isinstance(weights.load(tmp_path / "model.pt"), MaskedAutoencoder)
    files = [tmp_path / name for name in ("model.pt", "hub", "vit.pth", "vit.safetensors")]
    sources: list[Path | dict[str, torch.Tensor]] = [*files, vit()]
    for source in sources:
        with pytest.raises(ValueError, match="has no averaged weights"):
            weights.load(source, average=True)


def test_what_matched_is_seen_where_nobody_has_set_up_logging(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "model.pt", tiny().build())
    torch.save(vit(), tmp_path / "vit.pth")
    code = f"""
from convmae import weights
weights.load("{tmp_path}/model.pt")
weights.load("{tmp_path}/vit.pth")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    ours, used, taken = done.stderr.splitlines()
    assert ours == f"{tmp_path}/model.pt: all {len(tiny().build().state_dict())} tensors match"
    assert used == f"used {len(vit())} tensors of {len(vit())}"
    assert taken.startswith(f"{tmp_path}/vit.pth: taken for a plain ViT, {len(vit())} tensors, as Classifier(")
