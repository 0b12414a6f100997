# SPDX-License-Identifier: Apache-2.0
"""scripts/publish.py against a loopback Hub: what goes and what stays, and one clear message for what goes wrong."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from loopback_hub import LoopbackHub, Repository
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from test_cards import RECORD
from tiny_images import ROOT, load_script

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchImageProcessor
from modeling_vit_scratch.cards import writing
from modeling_vit_scratch.cards.records import CardOptions
from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.configuration_vit_scratch import CODE_VERSION
from modeling_vit_scratch.hub import commit as publishing_hub
from modeling_vit_scratch.hub.contents import CODE, collect, find_leaks, shareable, without_leaks
from publishing import refreshing
from startup.status import run_command_line


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
---

# pets

```python
classify = pipeline("image-classification", model="outputs/pets", trust_remote_code=True)
```
"""
CODE_NAMES = {module.name for module in CODE}
PUBLISHED = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "results.json", *CODE_NAMES}
TOKEN = "hf_" + "aB3" * 11


def connect(monkeypatch, hub: LoopbackHub, cache: Path) -> None:
    """This process as one that was started with the loopback Hub in its environment."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    monkeypatch.setattr(publishing_hub, "WAIT", 0.0)
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with LoopbackHub() as server:
        connect(monkeypatch, server, tmp_path / "hub-cache")
        yield server


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "pets"
    torch.manual_seed(0)
    config = ViTScratchConfig.from_variant("test/4", id2label={0: "cat", 1: "dog", 2: "owl"})
    ViTScratchForImageClassification(config).save_pretrained(folder)
    ViTScratchImageProcessor(size={"height": 16, "width": 24}).save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "results.json").write_text(json.dumps({"command": "python scripts/finetune.py --train_dir pets"}))
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "pets"))


def publish(*argv: object) -> None:
    load_script("publish").main([str(word) for word in argv])


def error(*argv: object) -> str:
    with pytest.raises(InputError) as caught:
        publish(*argv)
    return str(caught.value)


def test_without_yes_everything_is_shown_and_nothing_changes(folder, hub, capsys):
    for path in (
        "checkpoint-5/optimizer.pt",
        "training_args.bin",
        "runs/a/events.out.tfevents.1",
        "trainer_state.json",
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"x")
    (folder / CODE[0].name).write_text("# another version")
    publish(folder, "owner/pets")
    shown = capsys.readouterr().out
    assert hub.repositories == {}
    assert {method for method, _ in hub.requests} <= {"GET", "HEAD"}
    size = (folder / "model.safetensors").stat().st_size
    assert f"{size:,} bytes  model.safetensors" in shown
    for part in (
        "left out: checkpoint-5/ (a checkpoint", "left out: training_args.bin (a pickle", "left out: runs/ (a log)",
        "left out: trainer_state.json (the state", f"not of the folder: {CODE[0].name}", "| license: apache-2.0",
        "Nothing was uploaded", "--yes",
    ):  # fmt: skip
        assert part in shown, part
    assert (folder / CODE[0].name).read_text() == "# another version"


def test_the_dry_run_needs_no_hub(folder, capsys):
    publish(folder, "owner/pets")  # HF_HUB_OFFLINE is set by conftest
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().out


def test_one_commit_has_all_and_only_what_belongs_to_the_model(folder, hub, capsys):
    (folder / "figures").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "figures" / "confusion_matrix.png")
    (folder / "training_args.bin").write_bytes(TOKEN.encode())
    (folder / CODE[0].name).unlink()
    publish(folder, "owner/pets", "--yes", "--commit_message", "First")
    repository = hub.repositories["owner/pets"]
    assert repository.titles() == ["First", "initial commit"]
    files = repository.files()
    assert set(files) == PUBLISHED | {".gitattributes", "figures/confusion_matrix.png"}
    for module in CODE:
        assert files[module.name] == module.read_bytes()
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert b'model="owner/pets"' in files["README.md"]
    assert not repository.private
    assert f"{hub.url}/owner/pets/commit/{repository.resolve('main')}" in capsys.readouterr().out


def test_an_update_removes_outdated_weights_and_keeps_what_people_added(folder, hub):
    repository = hub.repositories["owner/pets"] = Repository("owner", private=True)
    config = (folder / "config.json").read_bytes()
    old = {"config.json": config, "pytorch_model.bin": b"old", "training_args.bin": b"old", "notes.txt": b"mine"}
    repository.add("main", old, "old")
    publish(folder, "owner/pets", "--yes")
    assert set(repository.files()) == PUBLISHED | {"notes.txt"}
    assert repository.titles() == ["Upload model", "old", "initial commit"]


def test_private_branch_and_pull_request(folder, hub):
    publish(folder, "owner/pets", "--yes", "--private", "--revision", "v2")
    repository = hub.repositories["owner/pets"]
    assert repository.private
    assert set(repository.files()) == {".gitattributes"}
    assert set(repository.files("v2")) >= PUBLISHED
    publish(folder, "owner/pets", "--yes", "--create_pr")
    assert repository.pull_requests == ["refs/pr/1"]
    assert set(repository.files()) == {".gitattributes"}
    assert set(repository.files("refs/pr/1")) >= PUBLISHED
    assert "leave out --revision" in error(folder, "owner/pets", "--create_pr", "--revision", "v2")


@pytest.mark.parametrize("loss", ["question", "PUT", "commit", "answer"])
def test_a_lost_connection_is_tried_again_and_nothing_is_published_twice(folder, hub, loss):
    if loss == "question":
        hub.losses["GET", "/api/models/"] = 2
    elif loss == "PUT":
        hub.losses["PUT", "/lfs/"] = 2
    elif loss == "commit":
        hub.losses["POST", "/commit/main"] = 1
    else:
        hub.lost_answers["POST", "/commit/main"] = 1
    publish(folder, "owner/pets", "--yes")
    repository = hub.repositories["owner/pets"]
    assert repository.titles() == ["Upload model", "initial commit"]
    assert set(repository.files()) == PUBLISHED | {".gitattributes"}
    assert sum([*hub.losses.values(), *hub.lost_answers.values()]) == 0


@pytest.mark.parametrize("where", [("PUT", "/lfs/"), ("POST", "/commit/")])
def test_a_connection_that_stays_lost_publishes_nothing(folder, hub, where):
    hub.losses[where] = 1000
    message = error(folder, "owner/pets", "--yes")
    assert "connection to the Hub was lost" in message
    assert "Run the same command again" in message
    assert hub.repositories["owner/pets"].titles() == ["initial commit"]
    hub.losses.clear()
    publish(folder, "owner/pets", "--yes")
    assert hub.repositories["owner/pets"].titles() == ["Upload model", "initial commit"]


def test_what_the_hub_refuses_is_one_message(folder, hub, monkeypatch, capsys):
    hub.repositories["owner/bert"] = Repository("owner", private=False)
    hub.repositories["owner/bert"].add("main", {"config.json": b'{"model_type": "bert"}'}, "bert")
    hub.repositories["owner/public"] = Repository("owner", private=False)
    hub.repositories["other/theirs"] = Repository("other", private=False)
    hub.repositories["other/hidden"] = Repository("other", private=True)
    before = {name: repository.titles() for name, repository in hub.repositories.items()}
    cases = {
        "owner/bert": "holds something else (bert)",
        "owner/public --private": "everybody can read it",
        "other/theirs": "may not write to other/theirs",
        "other/hidden": "may not write to other/hidden",
        "other/new": "may not write to other/new",
        "own--er/..": "is no name for a repository",
        "pets": "give USER/NAME",
    }
    for words, expected in cases.items():
        assert expected in error(folder, *words.split(), "--yes"), words
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert "may not write" in error(folder, "reader/pets", "--yes")
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert "does not accept the token" in error(folder, "owner/pets", "--yes")
    monkeypatch.delenv("HF_TOKEN")
    assert "There is no token" in error(folder, "owner/pets", "--yes")
    assert {name: repository.titles() for name, repository in hub.repositories.items()} == before
    assert run_command_line(lambda: publish(folder, "owner/pets", "--yes")) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_somebody_elses_commit_meanwhile_is_not_overwritten(folder, hub, monkeypatch):
    remote = publishing_hub.prepare("owner/pets")
    hub.repositories["owner/pets"].add("main", {"README.md": b"mine"}, "meanwhile")
    uploads, _ = collect(folder)
    with pytest.raises(InputError, match="changed by somebody else"):
        publishing_hub.commit(remote, uploads, "late")
    assert hub.repositories["owner/pets"].files() == {"README.md": b"mine"}


def test_folders_that_are_not_ready_are_refused_with_all_reasons(folder, hub):
    (folder / "README.md").write_text(CARD.replace("license: apache-2.0\n", "").replace("image-classi", "text-classi"))
    (folder / "results.json").write_text(json.dumps({"command": f"--train_dir {Path.home()}/pets --token {TOKEN}"}))
    message = error(folder, "owner/pets", "--yes")
    for part in ("3 problems", "names no licence", "results.json has a token (hf_aB3...) and the local path"):
        assert part in message
    assert TOKEN not in message
    (folder / "README.md").write_text("---\nmodel-index: 7\n---\n")
    assert "metadata of README.md can't be read" in error(folder, "owner/pets", "--yes")
    (folder / "README.md").unlink()
    assert "no README.md" in error(folder, "owner/pets", "--yes")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "is a pickle" in error(folder, "owner/pets", "--yes")
    assert "is no folder" in error(folder / "nothing", "owner/pets")
    assert hub.requests == []


def test_a_licence_can_be_given(folder, hub):
    (folder / "README.md").write_text(CARD.replace("license: apache-2.0\n", ""))
    publish(folder, "owner/pets", "--yes", "--license", "cc-by-4.0")
    assert b"license: cc-by-4.0" in hub.repositories["owner/pets"].files()["README.md"]
    assert "no name of the Hub's" in error(folder, "owner/pets", "--yes", "--license", "See our site!")
    assert "add license_name" in error(folder, "owner/pets", "--yes", "--license", "other")
    link = "https://example.org/terms"
    publish(folder, "owner/terms", "--yes", "--license", "other", "--license_name", "terms", "--license_link", link)
    assert b"license_name: terms" in hub.repositories["owner/terms"].files()["README.md"]
    other = "license: other\nlicense_name: pets-terms\nlicense_link: https://example.org/terms"
    (folder / "README.md").write_text(CARD.replace("license: apache-2.0", other))
    publish(folder, "owner/other", "--yes")
    assert other.encode() in hub.repositories["owner/other"].files()["README.md"]
    publish(folder, "owner/other", "--yes", "--license", "mit")
    assert b"license_name" not in hub.repositories["owner/other"].files()["README.md"]


def test_the_shipped_model_passes_a_dry_run(hub, capsys):
    publish(ROOT / "model_cards" / "vit-tiny-imagenet", "owner/vit-tiny-imagenet")
    printed = capsys.readouterr().out
    assert "| license_name: imagenet-terms-of-access" in printed
    assert "Nothing was uploaded. To upload, add --yes." in printed


def test_weights_with_restrictions_are_not_published_as_free_without_a_word(folder, hub, capsys):
    base = {"license": "cc-by-nc-4.0"}
    (folder / "results.json").write_text(json.dumps({"model": {"license": base}}))
    publish(folder, "owner/pets")
    assert "are under cc-by-nc-4.0, which restricts" in capsys.readouterr().out
    publish(folder, "owner/pets", "--license", "cc-by-nc-4.0")
    assert "which restricts" not in capsys.readouterr().out


def test_a_card_that_publishing_changes_counts_as_written_and_not_as_changed_by_hand(folder, hub):
    readme = folder / "README.md"
    readme.unlink()
    (folder / "results.json").write_text(json.dumps(RECORD))
    writing.write_card(folder, CardOptions(base_model="user/vit"))
    assert "The model: cc-by-4.0 (that of the data" in readme.read_text()
    publish(folder, "owner/pets", "--yes", "--license", "mit")
    readme.write_bytes(hub.repositories["owner/pets"].files()["README.md"])
    assert "license: mit" in readme.read_text()
    assert "The model: mit." in readme.read_text()
    assert 'model="owner/pets"' in readme.read_text()
    given = {"base_model": "user/vit", "license": "mit", "hub_model_id": "owner/pets"}
    assert writing.stored_options(folder) == given
    # One that was changed by hand stays so.
    readme.write_text(readme.read_text().replace("# pets", "# My pets"))
    publish(folder, "owner/hand", "--yes")
    readme.write_bytes(hub.repositories["owner/hand"].files()["README.md"])
    assert writing.stored_options(folder) is None


def test_models_that_do_not_answer_are_refused(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file(
        {**weights, "classifier.bias": torch.full((3,), torch.nan)}, folder / "model.safetensors", {"format": "pt"}
    )
    assert "is not finite" in error(folder, "owner/pets")
    weights.pop("classifier.bias")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "classifier.bias" in error(folder, "owner/pets")
    (folder / "model.safetensors").write_bytes(b"broken")
    assert "can't be loaded" in error(folder, "owner/pets")


def test_leaks_are_found_and_taken_out():
    home = str(Path.home())
    leaky = f'{{"a": "{home}/data/pets", "b": "{TOKEN}", "c": "C:\\\\Users\\\\me\\\\pets", "d": "~/data/pets"}}'
    assert len(find_leaks(leaky)) == 4
    assert json.loads(without_leaks(leaky)) == {"a": "pets", "b": "TOKEN", "c": "pets", "d": "pets"}
    for secret in (
        "github_pat_" + "aB3" * 20, "glpat-" + "aB3" * 8, "sk-proj-" + "aB3" * 12, "sk-ant-api03-" + "aB3" * 12,
        "xoxb-" + "123-" * 8, "AIza" + "aB3" * 12, "npm_" + "aB3" * 12, "ASIA" + "AB34" * 4,
        f"eyJ{'aB3' * 8}.eyJ{'aB3' * 8}.{'aB3' * 8}", "-----BEGIN OPENSSH PRIVATE KEY-----",
    ):  # fmt: skip
        assert find_leaks(f"x {secret}, y") == [f"a token ({secret[:6]}...)"], secret
        assert without_leaks(f"x {secret}, y") == "x TOKEN, y"
    for text in ('{"aws_secret_access_key": "%s"}', "WANDB_API_KEY=%s", "password: '%s'", "https://me:%s@example.org"):
        assert "wJ4lrXUtn" not in without_leaks(text % "wJ4lrXUtnFEMIbPxRfiCYEXAMPLEKEY"), text
        assert len(find_leaks(text % "wJ4lrXUtnFEMIbPxRfiCYEXAMPLEKEY")) == 1
    for path in ("C:/Users/me/pets", "D:/data/pets", "/kaggle/input/pets", "/lustre/me/pets", "~me/data/pets"):
        assert find_leaks(f"from {path}") == [f"the local path {path}"]
        assert without_leaks(f"from {path}") == "from pets"
    assert find_leaks("secret-of-mine", token="secret-of-mine") == ["a token (secret...)"]
    harmless = "https://example.org/home/x and/or /usr/bin/env S/16 hf_hub_download outputs/pets ~5 a/home/b"
    harmless += ' {"num_register_tokens": 4, "mask_token": "learned"} task-specific-models-of-2024 https://x.org/~me/a'
    harmless += " sk-learn-like-interfaces-of-models token: https://example.org eyJ 10:30 s3://bucket/key"
    assert find_leaks(harmless) == []
    assert without_leaks(harmless) == harmless
    settings = {
        "hub_token": "x",
        "output_dir": f"{home}/runs/pets",
        "nested": [{"api_key": "x", "rate": 0.1}],
        "n": None,
    }
    assert shareable(settings) == {"output_dir": "pets", "nested": [{"rate": 0.1}], "n": None}


def test_links_out_of_the_folder_and_what_is_hidden_in_pictures_are_refused(folder, tmp_path):
    exif, text = Image.Exif(), PngInfo()
    exif.get_ifd(ExifTags.IFD.GPSInfo)[1] = "N"
    exif[ExifTags.Base.Artist] = TOKEN
    text.add_text("Comment", "drawn from ~/data/pets")
    (folder / "figures").mkdir()
    picture = Image.new("RGB", (9, 9))
    picture.save(folder / "photo.jpg", exif=exif)
    picture.save(folder / "figures" / "a.png", pnginfo=text)
    picture.save(folder / "b.png")
    (folder / "damaged.png").write_bytes(b"\x89PNG")
    leaks = {upload.path: find_leaks(upload.text()) for upload in collect(folder)[0] if upload.path.endswith("g")}
    assert leaks == {
        "photo.jpg": [f"a token ({TOKEN[:6]}...)", "the place where a photo was taken"],
        "figures/a.png": ["the local path ~/data/pets"],
        "b.png": [],
        "damaged.png": [],
    }
    (tmp_path / "id_rsa").write_text("of mine")
    (folder / "LICENSE").symlink_to(tmp_path / "id_rsa")
    assert re.search(r"LICENSE is a link to .*id_rsa: put a copy", error(folder, "owner/pets"))
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to("README.md")
    assert "LICENSE" in {upload.path for upload in collect(folder)[0]}


def as_saved_earlier(folder: Path, eps: str = "eps=config.layer_norm_eps") -> dict[str, bytes]:
    """The folder as an older version would have saved it: other code, and no version. What is in it now."""
    encoder, parts = folder / "encoder_vit_scratch.py", folder / "parts_vit_scratch.py"
    encoder.write_text("# older\n" + encoder.read_text())
    assert "eps=config.layer_norm_eps" in parts.read_text()
    parts.write_text(parts.read_text().replace("eps=config.layer_norm_eps", eps))
    config = json.loads((folder / "config.json").read_text())
    del config["code_version"]
    (folder / "config.json").write_text(json.dumps(config))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_old_code_is_renewed_after_a_comparison_of_numbers(folder, capsys):
    before = as_saved_earlier(folder)
    publish(folder, "--refresh_code", "--yes")
    shown = capsys.readouterr().out
    assert "Code of version unknown, to be replaced by version" in shown
    assert "differ by at most 0.0e+00." in shown
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"config.json", "encoder_vit_scratch.py"}
    for path in CODE:
        assert after[path.name] == path.read_bytes()
    config = json.loads(after["config.json"])
    assert config == json.loads(before["config.json"]) | {"code_version": CODE_VERSION}
    publish(folder, "--refresh_code")
    assert f"Its code is that of version {CODE_VERSION} already." in capsys.readouterr().out


def test_code_that_gives_other_numbers_does_not_replace_the_old(folder):
    before = as_saved_earlier(folder, eps="eps=0.3")
    assert "gives other numbers with the code of version" in error(folder, "--refresh_code", "--yes")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.fixture
def quick_outputs(monkeypatch):
    """The two runs of the model, which take seconds each, in place of which numbers are given."""
    found = {"old": [torch.zeros(2)], "new": [torch.zeros(2)]}

    def outputs(path: Path) -> list[torch.Tensor]:
        result = found["new" if path.name == "renewed" else "old"]
        if isinstance(result, str):
            raise RuntimeError(result)
        return result

    monkeypatch.setattr(refreshing, "_outputs", outputs)
    return found


def test_code_is_renewed_on_the_hub_in_one_commit_that_keeps_the_rest(folder, hub, quick_outputs, capsys):
    publish(folder, "owner/pets", "--yes")
    repository = hub.repositories["owner/pets"]
    older = Path(shutil.copytree(folder, folder.with_name("older")))
    as_saved_earlier(older)
    changed = {name: (older / name).read_bytes() for name in ("encoder_vit_scratch.py", "config.json")}
    repository.add("main", repository.files() | changed, "older")
    commits = len(repository.commits)
    publish("owner/pets", "--refresh_code")
    assert "Nothing was changed. To write the new files, add --yes." in capsys.readouterr().out
    assert len(repository.commits) == commits
    publish("owner/pets", "--refresh_code", "--yes")
    assert len(repository.commits) == commits + 1
    assert set(repository.files()) >= PUBLISHED
    assert repository.files()["encoder_vit_scratch.py"] == (folder / "encoder_vit_scratch.py").read_bytes()
    assert json.loads(repository.files()["config.json"])["code_version"] == CODE_VERSION


def test_code_that_does_not_run_is_renewed_with_a_word_or_refused(folder, quick_outputs, capsys):
    as_saved_earlier(folder)
    quick_outputs["old"] = "ImportError: cannot import name 'X'"
    publish(folder, "--refresh_code")
    assert "does not run here, so there is nothing to compare with: ImportError" in capsys.readouterr().out
    quick_outputs["new"] = "KeyError: 'y'"
    assert "does not run with the code of version" in error(folder, "--refresh_code")
    quick_outputs.update(old=[torch.zeros(2)], new=[torch.tensor([0.0, float("nan")])])
    assert "gives other numbers" in error(folder, "--refresh_code")


def test_renewing_takes_models_of_ours_and_no_other_arguments(folder, hub, tmp_path):
    assert "owner/absent" in error("owner/absent", "--refresh_code")
    assert "nothing else" in error(folder, "me/pets", "--refresh_code")
    assert "no folder of a vit_scratch model" in error(tmp_path, "--refresh_code")
    assert "is no folder, nor USER/NAME" in error("nothing", "--refresh_code")
    assert "Where to publish it: give USER/NAME" in error(folder)
