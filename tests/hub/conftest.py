"""A stub of the Hub that this process may reach, and runs to push."""

import shutil

import huggingface_hub
import pytest

from tests.hub import runs, stub


@pytest.fixture(scope="package")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    runs.write_export(folder)
    runs.write_data(folder)
    shutil.rmtree(folder / "sources")
    return folder


@pytest.fixture
def run(exported, tmp_path):
    """A copy of the run, to be changed."""
    return shutil.copytree(exported, tmp_path / "run")


@pytest.fixture
def hub():
    made = stub.Hub()
    yield made
    made.close()
    assert not [error for error in made.errors if not isinstance(error, OSError)]


@pytest.fixture(autouse=True)
def reachable(monkeypatch, tmp_path):
    """The library may connect, has no login of whoever runs the tests, and uploads without Xet."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "login" / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "login" / "tokens"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.utils.disable_progress_bars()
