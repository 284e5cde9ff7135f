"""Weights for others: a folder gives the same model again, says when it is damaged, and goes to the hub and back.

The hub is a small server here that speaks its HTTP: it takes in repositories, commits and large files, and gives files
out. Not shown: the real one, and its newer way for large files (hf_xet), which the tests turn off.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard
from runs import tiny
from torch import Tensor, nn

from convmae import MAE, AttentionStage, checkpoint, hub, targets
from convmae.hub import CARD, CONFIG, WEIGHTS, from_pretrained, push_to_hub, save_pretrained
from convmae.plain import to_plain
from video import VideoConvMAE

VIT = MAE().stages(AttentionStage(dim=24, depth=2, stride=(8, 8), heads=2, hybrid=False)).input(32)
VIT = VIT.decode(dim=12, depth=1, heads=2)
BUILDERS: dict[str, Any] = {
    "ConvMAE": tiny(),
    "VideoConvMAE": VideoConvMAE.inflate(tiny(), frames=4),
    "MAE": VIT,
    "classifier": replace(tiny().classifier(3, pooling="token"), names=("a", "b", "ü")),
    "backbone": VideoConvMAE.inflate(tiny(), frames=4).backbone(any_size=True),
}


@dataclass(frozen=True, kw_only=True)
class Halves:
    """A target of the user's own."""

    scales: tuple[float, ...] = (0.5, float("inf"))

    def values(self, pixels: int, channels: int) -> int:
        return pixels * channels

    def __call__(self, patches: Tensor) -> Tensor:
        return self.scales[0] * patches.flatten(2)


def built(builder: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = builder.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Equal builders, modes, and weights to the bit, in name, order and precision."""
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b)
    assert one.builder == other.builder
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert bits(a[name]).equal(bits(b[name])), name


def metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as file:
        return dict(file.metadata())


def rewrite(path: Path, **changed: str | None) -> None:
    """Change a file's metadata, leaving its tensors and the rest; None takes an entry away."""
    tensors, about = safetensors.torch.load_file(path), metadata(path)
    about |= {f"convmae.{name}": value for name, value in changed.items() if value is not None}
    about = {name: value for name, value in about.items() if changed.get(name.removeprefix("convmae."), "") is not None}
    safetensors.torch.save_file(tensors, path, metadata=about)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a classifier."""
    return save_pretrained(built(BUILDERS["classifier"]), tmp_path / "models" / "a")


# ---- a folder --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
def test_a_folder_and_its_file_give_the_same_model_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = built(BUILDERS[name])
    assert save_pretrained(model, tmp_path / "a") == tmp_path / "a"
    assert {file.name for file in (tmp_path / "a").iterdir()} == {WEIGHTS, CONFIG, CARD}
    state = torch.get_rng_state()
    for source in (str(tmp_path / "a"), tmp_path / "a" / WEIGHTS):
        found = from_pretrained(source)
        assert not found.training
        assert_same(found, model)
    assert torch.get_rng_state().equal(state)


def test_logits_are_equal(folder: Path) -> None:
    model, x = built(BUILDERS["classifier"]).eval(), torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert from_pretrained(folder)(x).equal(model(x))


@pytest.mark.parametrize(("name", "size"), [("classifier", (48, 64)), ("VideoConvMAE", (8, 48, 32))])
def test_another_size_resizes_positions_as_checkpoints_do(name: str, size: tuple[int, ...], tmp_path: Path) -> None:
    model = built(BUILDERS[name])
    save_pretrained(model, tmp_path)
    checkpoint.save(tmp_path / "model.pt", model)
    found = from_pretrained(tmp_path, size=size)
    assert found.builder.size == size
    assert_same(found, checkpoint.load(tmp_path / "model.pt", size=size))
    with pytest.raises(ValueError, match="is not a multiple of"):
        from_pretrained(tmp_path, size=tuple(side + 1 for side in size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precision_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model = built(BUILDERS["classifier"]).to(dtype).eval()
    found = from_pretrained(save_pretrained(model, tmp_path))
    assert_same(found, model)
    x = torch.randn(1, 3, 32, 32, dtype=dtype)
    with torch.no_grad():
        assert found(x).equal(model(x))
    assert json.loads((tmp_path / CONFIG).read_text())["precision"] == [str(dtype).removeprefix("torch.")]
    assert "uint8" not in (tmp_path / CARD).read_text(), "pixels become float32, which does not suit it"


def test_tensors_that_share_memory_or_are_not_dense_are_written_one_by_one(tmp_path: Path) -> None:
    model: Any = built(VIT)
    first, second = (block.mlp[0] for block in model.trunk.stages[0].blocks)
    first.weight = second.weight
    shared = torch.randn(2, len(first.bias))
    first.bias.data, second.bias.data = shared
    model.decoder.head.weight.data = torch.randn(model.decoder.head.weight.shape[::-1]).t()
    assert_same(from_pretrained(save_pretrained(model, tmp_path)), model)


def test_a_class_of_the_user_s_own_comes_back_with_its_fields(tmp_path: Path) -> None:
    builder = tiny().predict(Halves())
    found = from_pretrained(save_pretrained(built(builder), tmp_path))
    assert found.builder == builder
    assert found.builder.target.scales == (0.5, float("inf"))
    assert f"Its builder needs `{__name__}` on `PYTHONPATH`." in (tmp_path / CARD).read_text()


def test_other_libraries_can_read_the_weights(folder: Path) -> None:
    model, tensors = built(BUILDERS["classifier"]), safetensors.torch.load_file(folder / WEIGHTS)
    assert metadata(folder / WEIGHTS)["format"] == "pt"
    model.load_state_dict(tensors)
    assert_same(model, from_pretrained(folder))


def test_people_can_read_what_it_is(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = BUILDERS["classifier"]
    config = json.loads((folder / CONFIG).read_text())
    assert config["builder"] == repr(replace(builder, names=()))
    assert config["input_size"] == [32, 32]
    assert (config["classes"], config["names"]) == (3, ["a", "b", "ü"])
    assert config["normalisation"]["mean"] == list(targets.IMAGENET_MEAN)
    assert config["parameters"] == sum(parameter.numel() for parameter in builder.build().parameters())
    card = (folder / CARD).read_text()
    assert ModelCard(card).data.get("pipeline_tag") == "image-classification"
    assert "# ConvMAE classifier\n" in card
    assert "Images `(B, 3, 32, 32)`: uint8 pixels in RGB, or floats normalised" in card
    assert "It gives logits of 3 classes." in card
    assert "Nothing that is known here: these weights came without figures." in card
    assert str(tmp_path) not in card
    (code,) = re.findall(r"```python\n(from.*?)```", card, re.DOTALL)
    found: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(folder)), found)
    assert found["model"].builder == builder
    save_pretrained(built(builder), folder, note="Top-1 on our pictures: 12.3 %")
    assert "## What was measured\n\nTop-1 on our pictures: 12.3 %\n" in (folder / CARD).read_text()
    clips = save_pretrained(built(BUILDERS["VideoConvMAE"]), tmp_path / "clips")
    card = (clips / CARD).read_text()
    assert "# VideoConvMAE masked autoencoder\n" in card
    assert "Clips `(B, 3, 4, 32, 32)`" in card


def test_what_others_could_not_build_is_refused_and_the_folder_stays_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ValueError, match=r"came from no builder, so nobody could build it again: use \.build\(\)"):
        save_pretrained(nn.Linear(2, 2), folder)

    @dataclass(frozen=True, kw_only=True)
    class Local(Halves):
        pass

    with pytest.raises(ValueError, match="is defined inside a function"):
        save_pretrained(built(tiny().predict(Local())), folder)
    monkeypatch.setattr(Halves, "__module__", "__main__")
    with pytest.raises(ValueError, match=r"has a class from the script that runs.*move it to a module of its own"):
        save_pretrained(built(tiny().predict(Halves())), folder)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_a_write_that_fails_leaves_the_old_weights_and_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file: file.read_bytes() for file in folder.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(built(BUILDERS["MAE"]), folder)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


# ---- damaged, foreign, hostile ---------------------------------------------------------------------------------------


def test_a_damaged_file_is_told(folder: Path) -> None:
    file = folder / WEIGHTS
    whole = file.read_bytes()
    for cut in (0, 5, 200, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"cannot be read as safetensors: .*fetch it again"):
            from_pretrained(folder)
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in (start, (start + len(whole)) // 2, len(whole) - 1):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"damaged: they do not give its checksum; .*fetch it again"):
            from_pretrained(folder)


def test_a_foreign_file_is_told(folder: Path) -> None:
    file = folder / WEIGHTS
    safetensors.torch.save_file({"bert.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"holds no builder, so it is not of this framework; .* begin with bert\.weight"
    ):
        from_pretrained(folder)
    safetensors.torch.save_file({}, file)
    with pytest.raises(ValueError, match="begin with nothing"):
        from_pretrained(folder)
    checkpoint.save(folder / "last.pt", built(BUILDERS["MAE"]))
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        from_pretrained(folder / "last.pt")


def test_a_builder_that_cannot_be_had_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, plain = folder / WEIGHTS, json.loads(metadata(folder / WEIGHTS)["convmae.builder"])
    cases: dict[str, Any] = {
        "my_lab.models:Mine cannot be imported .* on PYTHONPATH": {"class": "my_lab.models:Mine", "fields": {}},
        "convmae.builders:Nothing cannot be imported": {"class": "convmae.builders:Nothing", "fields": {}},
        "has changed since this was written": {"class": plain["class"], "fields": {"wings": 2}},
        "classes is a positive int": {"class": plain["class"], "fields": {**plain["fields"], "classes": 0}},
        "names Halves as its builder, which builds nothing": to_plain(Halves()),
        "names int as its builder": 3,
        "no plain form of a dataclass": {"name": "MAE"},
    }
    for said, builder in cases.items():
        rewrite(file, builder=json.dumps(builder))
        with pytest.raises(ValueError, match=said):
            from_pretrained(folder)
    for text in ("{", "[" * 100_000, ""):
        rewrite(file, builder=text)
        with pytest.raises(ValueError, match=rf"the builder in {file} cannot be read"):
            from_pretrained(folder)
    rewrite(file, format="2", builder=json.dumps(plain))
    with pytest.raises(ValueError, match="has format 2, this version reads 1"):
        from_pretrained(folder)


def test_weights_of_another_model_are_told(folder: Path) -> None:
    rewrite(folder / WEIGHTS, builder=json.dumps(to_plain(BUILDERS["MAE"])))
    with pytest.raises(ValueError, match=r"(?s)model\.safetensors: the weights do not fit the model.*missing: decoder"):
        from_pretrained(folder)


def test_no_code_comes_from_the_file(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for name, fields in {
        "os:system": {"command": f"touch {mark}"},
        "builtins:exec": {"source": f"open({str(mark)!r}, 'w')"},
        "subprocess:Popen": {"args": ("touch", str(mark))},
        "pathlib:Path.touch": {"self": {"path": str(mark)}},
    }.items():
        rewrite(folder / WEIGHTS, builder=json.dumps({"class": name, "fields": fields}))
        with pytest.raises(ValueError, match="is not a frozen dataclass, so it is not built from a file"):
            from_pretrained(folder)
    assert not mark.exists()


def test_a_folder_that_is_not_there_or_is_a_run_s_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder and no file .*nowhere, which is no repository 'user/name'"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no folder and no file a/b"):
        from_pretrained(Path("a/b"))
    with pytest.raises(FileNotFoundError, match=rf"has no {WEIGHTS}: write one with `python -m convmae.hub"):
        from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="revision='v1' is for a repository on the hub"):
        from_pretrained(tmp_path, revision="v1")


def test_a_library_that_is_missing_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(ValueError, match="huggingface_hub is not installed: `pip install huggingface_hub`"):
            from_pretrained("user/name")
        with pytest.raises(ValueError, match="huggingface_hub is not installed"):
            push_to_hub(built(BUILDERS["MAE"]), "user/name")
        assert from_pretrained(folder).builder == BUILDERS["classifier"]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "safetensors.torch", None)
        for act in (lambda: from_pretrained(folder), lambda: save_pretrained(built(BUILDERS["MAE"]), folder)):
            with pytest.raises(ValueError, match="safetensors is not installed: `pip install safetensors`"):
                act()


# ---- the hub ---------------------------------------------------------------------------------------------------------


@dataclass
class Repository:
    private: bool
    gated: bool = False
    revisions: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})


@dataclass
class Hub:
    """A server with repositories, to which the token `good` may write."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)

    def settings(self, folder: Path) -> dict[str, str]:
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(folder / "hf"),
            "HF_TOKEN": "good",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def answer(self, verb: str, path: str, body: bytes, token: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        self.tokens.add(token)
        if verb in ("GET", "HEAD"):
            return self.give(path, token)
        if token != "Bearer good":
            return 401, {}, b'{"error": "Invalid username or password."}'
        if verb == "PUT":
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/large/")
            self.large[path.removeprefix("/large/")] = body
            return 200, {}, b""
        return 200, {}, json.dumps(self.take(path, body)).encode()

    def give(self, path: str, token: str) -> tuple[int, dict[str, str], bytes]:
        told = re.fullmatch(r"/api/models/([^/]+/[^/]+)", path)
        asked = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = told or asked
        assert found is not None, path
        repository = self.repositories.get(found[1])
        if repository is None or (repository.private and token != "Bearer good"):
            return 401 if repository is None else 404, {"X-Error-Code": "RepoNotFound"}, b""
        if told is not None:
            said: dict[str, Any] = {
                "_id": "0",
                "id": told[1],
                "private": repository.private,
                "siblings": [],
                "tags": [],
            }
            return 200, {}, json.dumps(said).encode()
        assert asked is not None
        if repository.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if asked[2] not in repository.revisions:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if asked[3] not in repository.revisions[asked[2]]:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        data = repository.revisions[asked[2]][asked[3]]
        commit = hashlib.sha1(repr(repository.revisions[asked[2]]).encode()).hexdigest()
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}, data

    def take(self, path: str, body: bytes) -> Any:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            private = asked.get("visibility") == "private" or asked.get("private") is True
            self.repositories.setdefault(name, Repository(private=private))
            return {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            return {"files": [{"path": name, "uploadMode": modes[name], "shouldIgnore": False} for name in names]}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return {
                "transfer": "basic",
                "objects": [
                    {**one, "actions": {"upload": {"href": f"{self.url}/large/{one['oid']}"}}} for one in objects
                ],
            }
        found = re.fullmatch(r"/api/models/(.+)/commit/main", path)
        assert found is not None, path
        files = self.repositories[found[1]].revisions["main"]
        for line in body.splitlines():
            value = json.loads(line)["value"]
            if json.loads(line)["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif json.loads(line)["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
        return {"commitUrl": f"{self.url}/{found[1]}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments: Any, hub: Hub) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, token = self.path.partition("?")[0], self.headers.get("Authorization", "")
        # files go to where large ones are stored without a token, as there the address alone allows it
        status, headers, data = self.hub.answer(self.command, path, body, "Bearer good" if "/large/" in path else token)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub talks to, set as users set it; for it reads its settings when it is imported."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Answers, hub=hub)) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        for name, value in hub.settings(tmp_path).items():
            monkeypatch.setenv(name, value)
        before = huggingface_hub_forgotten()
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield hub
        server.shutdown()
        huggingface_hub_forgotten()
        sys.modules.update(before)


def huggingface_hub_forgotten() -> dict[str, ModuleType]:
    """Its modules, no longer imported."""
    names = [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]
    return {name: sys.modules.pop(name) for name in names}


def test_a_model_goes_to_the_hub_and_comes_back(there: Hub, tmp_path: Path) -> None:
    model = built(BUILDERS["classifier"])
    assert push_to_hub(model, "lab/tiny", note="nothing much") == f"{there.url}/lab/tiny"
    files = there.repositories["lab/tiny"].revisions["main"]
    assert set(files) == {WEIGHTS, CONFIG, CARD}
    assert not there.repositories["lab/tiny"].private
    card = files[CARD].decode()
    assert 'model = hub.from_pretrained("lab/tiny")' in card
    assert "nothing much" in card
    assert_same(from_pretrained("lab/tiny"), model)
    (tmp_path / WEIGHTS).write_bytes(files[WEIGHTS])
    assert_same(from_pretrained(tmp_path), model)
    assert from_pretrained("lab/tiny", size=48).builder.size == (48, 48)


def test_a_revision_is_taken_and_uploading_again_replaces(there: Hub) -> None:
    first, second = built(BUILDERS["classifier"]), built(BUILDERS["MAE"])
    push_to_hub(first, "lab/tiny")
    revisions = there.repositories["lab/tiny"].revisions
    revisions["v1"] = dict(revisions["main"])
    push_to_hub(second, "lab/tiny")
    assert_same(from_pretrained("lab/tiny"), second)
    assert_same(from_pretrained("lab/tiny", revision="v1"), first)
    with pytest.raises(ValueError, match="lab/tiny has no revision 'v2'"):
        from_pretrained("lab/tiny", revision="v2")


def test_private_means_private(there: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(BUILDERS["MAE"])
    monkeypatch.delenv("HF_TOKEN")
    push_to_hub(model, "lab/secret", private=True, token="good")
    assert there.repositories["lab/secret"].private
    push_to_hub(model, "lab/secret", token="good")
    assert there.repositories["lab/secret"].private
    with pytest.raises(
        ValueError, match="on the hub no such repository that you may see: where it is private, `hf auth"
    ):
        from_pretrained("lab/secret")
    there.repositories["lab/open"] = Repository(private=False)
    with pytest.raises(ValueError, match="lab/open is there and public: make it private on the hub"):
        push_to_hub(model, "lab/open", private=True, token="good")
    assert there.repositories["lab/open"].revisions == {"main": {}}


def test_what_the_hub_refuses_is_told(there: Hub) -> None:
    model = built(BUILDERS["MAE"])
    with pytest.raises(ValueError, match="no folder and no file lab/nothing here, and on the hub no such repository"):
        from_pretrained("lab/nothing")
    there.repositories["lab/other"] = Repository(private=False, revisions={"main": {"README.md": b"hello"}})
    with pytest.raises(ValueError, match=rf"lab/other has no {WEIGHTS}: it is not of this framework"):
        from_pretrained("lab/other")
    there.repositories["lab/gated"] = Repository(private=False, gated=True)
    with pytest.raises(ValueError, match="lab/gated is gated: ask for access"):
        from_pretrained("lab/gated")
    with pytest.raises(ValueError, match=r"lab/tiny: the hub says .*401"):
        push_to_hub(model, "lab/tiny", token="bad")
    assert "Bearer bad" in there.tokens
    with pytest.raises(ValueError, match="a repository on the hub is named 'user/name'; got 'tiny'"):
        push_to_hub(model, "tiny")
    with pytest.raises(ValueError, match="came from no builder"):
        push_to_hub(nn.Linear(2, 2), "lab/tiny")
    assert "lab/tiny" not in there.repositories


def test_a_hub_that_cannot_be_reached_is_told_unless_the_cache_has_it(
    there: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(BUILDERS["MAE"])
    push_to_hub(model, "lab/tiny")
    from_pretrained("lab/tiny")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # or else it tries for half a minute
    huggingface_hub_forgotten()
    assert_same(from_pretrained("lab/tiny"), model)
    with pytest.raises(ValueError, match="the hub cannot be reached, and its cache here has no lab/more"):
        from_pretrained("lab/more")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    huggingface_hub_forgotten()
    with pytest.raises(ValueError, match=r"lab/more: the hub says .*refused"):
        push_to_hub(model, "lab/more")


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_a_run_s_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = built(BUILDERS["classifier"])
    run = tmp_path / "run"
    run.mkdir()
    average = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    checkpoint.save(run / "last.pt", model, average=average)
    assert hub.main([str(run), str(tmp_path / "out"), "--note", "of a test"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / WEIGHTS}\n"
    assert_same(from_pretrained(tmp_path / "out"), model)
    assert "of a test" in (tmp_path / "out" / CARD).read_text()
    assert hub.main([str(run / "last.pt"), str(tmp_path / "out"), "--average"]) == 0
    assert from_pretrained(tmp_path / "out").state_dict()["head.bias"].equal(average["head.bias"])


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save(tmp_path / "last.pt", built(BUILDERS["MAE"]))
    for arguments, said in {
        (str(tmp_path / "nowhere"),): "give a run's folder, or a checkpoint",
        (str(tmp_path), "--private"): "--private is for --push user/name",
        (str(tmp_path), "--push", "name"): "a repository on the hub is named 'user/name'; got 'name'",
        (str(tmp_path), "--average"): "has no averaged weights",
    }.items():
        source, *flags = arguments
        assert hub.main([source, str(tmp_path / "out"), *flags]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_pushes_those_files_and_no_others(there: Hub, tmp_path: Path) -> None:
    model = built(BUILDERS["VideoConvMAE"])
    checkpoint.save(tmp_path / "last.pt", model)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("dear diary")
    done = subprocess.run(
        [sys.executable, "-m", "convmae.hub", "last.pt", "out", "--push", "lab/clips", "--private"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"out/{WEIGHTS}", f"{there.url}/lab/clips"]
    assert there.repositories["lab/clips"].private
    files = there.repositories["lab/clips"].revisions["main"]
    assert files == {name: (tmp_path / "out" / name).read_bytes() for name in (WEIGHTS, CONFIG, CARD)}
    assert_same(from_pretrained("lab/clips"), model)


def test_huggingface_hub_s_own_tools_find_the_file(there: Hub) -> None:
    import huggingface_hub

    push_to_hub(built(BUILDERS["MAE"]), "lab/tiny")
    card = huggingface_hub.ModelCard.load("lab/tiny")
    assert card.data.library_name == "convmae"
