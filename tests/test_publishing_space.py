# SPDX-License-Identifier: Apache-2.0
"""scripts/publish.py --space against a loopback Hub, and the Space in a process that has not got this package."""

import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from forked import free_port
from huggingface_hub import RepoCard
from loopback_hub import Repository
from test_publishing import connect, error, folder, hub, publish, saved  # noqa: F401
from test_remote_code import HIDDEN

from publishing.space import CODE, GRADIO


ROOT = Path(__file__).parent.parent
FILES = {"README.md", "app.py", "requirements.txt", *(f"page/{path.name}" for path in CODE)}


def test_a_dry_run_shows_the_space_and_what_it_waits_for(folder, hub, capsys):  # noqa: F811
    publish("--space", folder, "owner/pets")
    shown = capsys.readouterr().out
    for part in ("The Space owner/pets", "bytes  app.py", "sdk: gradio", "- owner/pets", "publish it first", "--yes"):
        assert part in shown, part
    assert hub.repositories == {}
    assert {method for method, _ in hub.requests} <= {"GET", "HEAD"}
    assert "publish it first" in error("--space", folder, "owner/pets", "--yes")
    assert hub.repositories == {}


def test_a_space_has_the_page_and_names_its_model(folder, hub, capsys):  # noqa: F811
    publish(folder, "owner/pets", "--yes", "--private")
    publish("--space", folder, "owner/pets", "--yes")
    assert "HF_TOKEN" in capsys.readouterr().out  # the model is private
    repository = hub.repositories["spaces/owner/pets"]
    assert repository.titles()[0] == "Upload page"
    files = repository.files()
    assert set(files) == FILES | {".gitattributes"}
    for path in CODE:
        assert files[f"page/{path.name}"] == path.read_bytes()
    card = RepoCard(files["README.md"].decode()).data.to_dict()
    assert card["models"] == ["owner/pets"]
    assert (card["sdk"], card["sdk_version"], card["app_file"]) == ("gradio", GRADIO, "app.py")
    assert len(card["short_description"]) <= 60
    assert f"gradio=={GRADIO}\n" in (ROOT / "constraints.txt").read_text()  # what the tests run with
    assert re.search(r"^torch==[\d.]+$", files["requirements.txt"].decode(), flags=re.MULTILINE)

    # An update takes away what this version's page has no more; other people's Spaces stay.
    repository.add("main", {**files, "page/old.py": b"", "notes.txt": b"mine"}, "more")
    publish("--space", folder, "owner/pets", "--yes")
    assert set(repository.files()) == FILES | {".gitattributes", "notes.txt"}
    hub.repositories["spaces/owner/other"] = Repository("owner", private=False)
    hub.repositories["spaces/owner/other"].add("main", {"app.py": b"print()"}, "other")
    hub.repositories["owner/other"] = hub.repositories["owner/pets"]
    assert "holds something else (another app)" in error("--space", folder, "owner/other", "--yes")


def test_a_space_for_a_model_of_others_runs_its_code_as_it_is_now(folder, hub):  # noqa: F811
    publish(folder, "owner/pets", "--yes")
    plain = hub.repositories["other/plain"] = Repository("other", private=False)
    plain.add("main", {"config.json": b'{"model_type": "vit"}'}, "plain")
    publish("--space", "owner/pets", "owner/try-it", "--yes")
    app = hub.repositories["spaces/owner/try-it"].files()["app.py"].decode()
    commit = hub.repositories["owner/pets"].resolve("main")
    assert f'MODEL, REVISION = "owner/pets", "{commit}"' in app
    assert "trust_remote_code=True" in app
    publish("--space", "other/plain", "owner/plain", "--yes")
    app = hub.repositories["spaces/owner/plain"].files()["app.py"].decode()
    assert 'MODEL, REVISION = "other/plain", "main"' in app
    assert "trust_remote_code=False" in app


def test_what_can_not_have_a_page_is_said(folder, hub):  # noqa: F811
    assert "no repository other/nothing" in error("--space", "other/nothing", "owner/pets")
    assert "is no folder, nor USER/NAME" in error("--space", "nothing", "owner/pets")
    assert "--license is that of a model" in error("--space", folder, "owner/pets", "--license", "mit")
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in error("--space", folder, "owner/pets")


@pytest.mark.timeout(200)
def test_a_space_runs_without_this_package(folder, hub, tmp_path):  # noqa: F811
    pytest.importorskip("gradio", reason='needs gradio: pip install -e ".[app]"')
    publish(folder, "owner/pets", "--yes")
    publish("--space", folder, "owner/pets", "--yes")
    for path, content in hub.repositories["spaces/owner/pets"].files().items():
        (tmp_path / "space" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "space" / path).write_bytes(content)
    port = free_port()
    environment = {**os.environ, **hub.environment(), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    environment |= {"GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(tmp_path / "uploads"), "PYTHONPATH": ""}
    code = HIDDEN + "import runpy; sys.path.insert(0, '.'); runpy.run_path('app.py', run_name='__main__')"
    log = tmp_path / "log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-c", code], cwd=tmp_path / "space", env=environment, stdout=output, stderr=output
        )
    try:
        while server.poll() is None and "Running on" not in log.read_text():
            time.sleep(0.1)
        assert server.poll() is None, log.read_text()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/config", timeout=30) as answer:
            config = answer.read().decode()
    finally:
        server.terminate()
        server.wait()
    assert "3 classes" in config
    assert "https://huggingface.co/owner/pets" in config
