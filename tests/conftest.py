"""Shared by all tests: no network, quiet libraries, warm processes."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # how work is split among threads is up to chance, and with it the last bit
os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, where it is installed; there is no GPU here

import pytest  # noqa: E402

from warm import COMPRESS, HIDDEN, LIBRARIES, Warm  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def quiet():
    """Progress bars of the libraries write to stderr, where they hide failures."""
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """Forks processes in which compress and the libraries are imported."""
    found = Warm(tmp_path_factory.mktemp("warm"), LIBRARIES + COMPRESS)
    yield found
    found.close()


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    """Forks processes in which the libraries are imported and compress cannot be."""
    folder = tmp_path_factory.mktemp("bare")
    found = Warm(folder, HIDDEN + LIBRARIES, HF_MODULES_CACHE=str(folder / "modules"))
    yield found
    found.close()


@pytest.fixture
def quick(warm, monkeypatch, tmp_path):
    """Verification in a fork of the warm process, and no cache of data outside of the test."""
    monkeypatch.setattr("subprocess.run", warm.verify)
    monkeypatch.setenv("HOME", str(tmp_path.with_name(f"{tmp_path.name}-home")))
    return warm


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Tiny models by name, saved to a folder once."""
    from models import MODELS

    folder = tmp_path_factory.mktemp("models")

    def save(name):
        if not (folder / name).exists():
            MODELS[name]()[0].save_pretrained(folder / name)
        return folder / name

    return save
