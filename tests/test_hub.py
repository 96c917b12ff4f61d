"""A push is one commit or none, whatever the network and the neighbours do; then the model loads back from the hub."""

import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import HfApi, constants
from transformers import LlamaConfig, LlamaForCausalLM

from compress.checkpoint import SIDECAR, seal
from compress.errors import CompressError
from compress.hub import ATTEMPTS, push
from fake_hub import FakeHub, Fault, File, Repo
from test_report import make_card, report

# huggingface_hub's own uploads call httpx in a way that httpx has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ID = "tester/tiny"
FACTS = {"format": "compress-plan", "library": "transformers", "class": "", "component": None, "steps": []}


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with FakeHub() as hub:
        yield hub


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "emitted"
    (folder / "unet").mkdir(parents=True)
    (folder / ".steps").mkdir()
    for name in ("model.safetensors", "unet/compressed.safetensors", "config.json", ".steps/0.json"):
        (folder / name).write_bytes(b"content of " + name.encode())
    (folder / "README.md").write_text(make_card(report(format="compress-plan")))
    report().write(folder)
    seal(folder, FACTS)
    return folder


class Pauses(list):
    """Takes the place of time.sleep and remembers."""

    __call__ = list.append


def send(hub, folder, repo=ID, api=None, **options):
    return push(folder, repo, api=api or HfApi(hub.url, hub.token), **{"sleep": Pauses()} | options)


def commits(hub, ref="main"):
    return hub.repos[ID].refs[ref][1:] if ID in hub.repos else []


def test_push_is_one_private_commit_of_the_whole_folder(hub, folder):
    assert send(hub, folder, private=True, message="hello") == f"{hub.url}/{ID}"
    (commit,) = commits(hub)
    names = {"README.md", "config.json", "model.safetensors", "report.json", "unet/compressed.safetensors", SIDECAR}
    assert set(commit.files) == {".gitattributes", *names}
    assert commit.message == "hello" and hub.repos[ID].private
    for name in names - {"README.md"}:
        assert commit.files[name].content == (folder / name).read_bytes()


def test_the_card_on_the_hub_loads_from_the_hub(hub, folder):
    send(hub, folder)
    text = commits(hub)[0].files["README.md"].content.decode()
    assert text.count(f'from_pretrained("{ID}"') == 2 and "path/to/this/folder" not in text
    assert "path/to/this/folder" in (folder / "README.md").read_text()


def test_unchanged_push_makes_no_commit_and_a_change_makes_one(hub, folder):
    send(hub, folder, "tiny")
    send(hub, folder)
    assert len(commits(hub)) == 1
    (folder / "config.json").write_text("{}")
    with pytest.raises(CompressError, match="config.json: its bytes are not those that were written"):
        send(hub, folder)
    seal(folder, FACTS)
    send(hub, folder)
    assert len(commits(hub)) == 2


def test_old_weights_leave_in_the_same_commit(hub, folder):
    names = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "notes.txt")
    repo = hub.repos[ID] = Repo()
    repo.commit("main", {name: File(b"old", False) for name in names}, "old weights")
    send(hub, folder)
    assert len(commits(hub)) == 2
    assert set(names) & set(repo.at("main").files) == {"notes.txt"}


def test_pull_request_leaves_main_alone(hub, folder):
    hub.repos[ID] = Repo()
    assert send(hub, folder, pr=True) == f"{hub.url}/{ID}/discussions/1"
    assert commits(hub) == [] and "model.safetensors" in hub.repos[ID].at("refs/pr/1").files


def test_public_repository_is_not_used_for_a_private_push(hub, folder):
    hub.repos[ID] = Repo()
    with pytest.raises(CompressError, match="exists and is public"):
        send(hub, folder, private=True)
    assert commits(hub) == []


@pytest.mark.parametrize("pr", [False, True])
@pytest.mark.parametrize(
    "fault",
    [{"status": 503, "times": 3}, {"status": 429}, {"status": None}, {"status": None, "applied": True}],
    ids=["503s", "429", "broken before", "broken after"],
)
def test_failing_commit_is_repeated_until_there_is_exactly_one(hub, folder, fault, pr):
    hub.faults.append(Fault("POST", "/commit/", **fault))
    pauses = Pauses()
    url = send(hub, folder, pr=pr, sleep=pauses)
    assert url == f"{hub.url}/{ID}" + "/discussions/1" * pr
    assert list(hub.repos[ID].refs) == ["main"] + ["refs/pr/1"] * pr
    assert len(commits(hub)) == (not pr)
    assert pauses == ([] if fault.get("applied") else [1.0, 2.0, 4.0][: fault.get("times", 1)])


@pytest.mark.parametrize("path", ["repos/create", "validate-yaml", f"models/{ID}$"])
@pytest.mark.parametrize("status", [503, None])
def test_every_other_request_is_repeated_too(hub, folder, path, status):
    hub.faults.append(Fault("GET" if "models" in path else "POST", path, status, times=2))
    send(hub, folder)
    assert len(commits(hub)) == 1


def test_a_hub_that_stays_down_is_told_and_nothing_lands(hub, folder):
    hub.faults.append(Fault("POST", "/commit/", times=99))
    pauses = Pauses()
    with pytest.raises(CompressError, match=f"503.*tried {ATTEMPTS} times"):
        send(hub, folder, sleep=pauses)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0] and commits(hub) == []


def test_an_upload_that_breaks_off_commits_nothing(hub, folder):
    hub.faults.append(Fault("PUT", "/lfs/", 400))
    with pytest.raises(CompressError, match="nothing was committed, push again"):
        send(hub, folder)
    assert commits(hub) == []
    send(hub, folder)
    assert len(commits(hub)) == 1


class Neighbour(HfApi):
    """Somebody commits `files` between our look at the head and our commit."""

    files: dict | None = None
    repo: Repo

    def create_commit(self, *arguments, **options):
        if self.files is not None:
            self.repo.commit("main", self.files, "theirs")
            self.files = None
        return super().create_commit(*arguments, **options)


def test_somebody_elses_commit_is_never_overwritten(hub, folder):
    api = Neighbour(hub.url, hub.token)
    api.files, api.repo = {"theirs.txt": File(b"precious", False)}, hub.repos.setdefault(ID, Repo())
    with pytest.raises(CompressError, match="somebody else committed .*--pr"):
        send(hub, folder, api=api)
    assert [commit.message for commit in commits(hub)] == ["theirs"]
    assert send(hub, folder, pr=True).endswith("/discussions/1")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "stale.safetensors"])
def test_almost_the_same_files_by_another_hand_are_not_ours(hub, folder, name):
    send(hub, folder)
    files = hub.repos[ID].at("main").files
    api = Neighbour(hub.url, hub.token)
    api.repo = hub.repos[ID] = Repo()
    api.repo.commit("main", {"stale.safetensors": File(b"old", True)}, "before")
    api.files = files | {name: File(b"x" * 20, name.endswith("safetensors"))}
    with pytest.raises(CompressError, match="somebody else committed"):
        send(hub, folder, api=api)


def test_the_same_files_by_another_hand_are_done(hub, folder):
    send(hub, folder)
    files = hub.repos[ID].at("main").files
    api = Neighbour(hub.url, hub.token)
    api.files, api.repo = files, Repo()
    hub.repos[ID] = api.repo
    assert send(hub, folder, api=api) == f"{hub.url}/{ID}"
    assert [commit.message for commit in commits(hub)] == ["theirs"]


def test_bad_token_is_one_clear_line(hub, folder):
    with pytest.raises(CompressError, match="does not accept the token") as caught:
        send(hub, folder, api=HfApi(hub.url, "hf_wrong"))
    assert "\n" not in str(caught.value) and hub.repos == {}


def test_token_without_write_access_is_told(hub, folder):
    hub.repos[ID] = Repo()
    hub.faults.append(Fault("POST", "/commit/", 403))
    with pytest.raises(CompressError, match="may not write to tester/tiny"):
        send(hub, folder)


@pytest.mark.parametrize("repo", ["a/b/c", "", "tester/white space", "../up", "tester/x--y"])
def test_invalid_name_is_refused_before_anything_is_sent(hub, folder, repo):
    with pytest.raises(CompressError, match="OWNER/NAME"):
        send(hub, folder, repo)
    assert hub.requests == []


def test_unfinished_folder_is_refused_before_anything_is_sent(hub, folder):
    report(verified={"passed": False, "how": "reloaded", "error": 0.5}).write(folder)
    with pytest.raises(CompressError, match="reload check has not passed"):
        send(hub, folder)
    (folder / "report.json").unlink()
    with pytest.raises(CompressError, match="no such file"):
        send(hub, folder)
    assert hub.requests == []


def test_offline_mode_is_told(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CompressError, match="(?i)offline"):
        send(hub, folder)


LOAD = """
import torch
from transformers import LlamaForCausalLM
model = LlamaForCausalLM.from_pretrained("tester/tiny")
torch.save(model.state_dict(), "loaded.pt")
"""


def test_the_pushed_model_loads_back_bit_equal(hub, folder, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    for stale in ("model.safetensors", "config.json", "unet/compressed.safetensors"):
        (folder / stale).unlink()
    model.save_pretrained(folder)
    seal(folder, FACTS)
    send(hub, folder, private=True)
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HOME": str(tmp_path / "home")}
    switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    environment = os.environ | settings | switches
    subprocess.run([sys.executable, "-W", "error", "-c", LOAD], cwd=tmp_path, env=environment, check=True)
    loaded = torch.load(tmp_path / "loaded.pt")
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
