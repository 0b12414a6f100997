# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a Hub that answers, and of one that does not, from a loopback server that speaks its protocol."""

import hashlib
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from reference import transformers_twin

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification


ROOT = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path):
    """Serves the files of `tmp_path / "repository"` as user/vit. Yields the address and the files asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, with_body: bool) -> None:
            match = re.fullmatch(r"/user/vit/resolve/[^/]+/(.+)", self.path)
            path = tmp_path / "repository" / (match.group(1) if match else "-")
            asked.append(path.name)
            if path.is_file():
                body, headers = path.read_bytes(), {}
                headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
                self.send_response(200)
            else:
                body, headers = b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
                self.send_response(404)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def log_message(self, *arguments) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def convert(tmp_path: Path, endpoint: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, str(ROOT / "scripts" / "convert.py"), "user/vit", "out"]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)


def test_a_repository_with_a_bin_file_only(hub, tmp_path):
    ours = ViTScratchForImageClassification(ViTScratchConfig.from_variant("test/4", num_labels=3)).eval()
    theirs = transformers_twin(ours)
    theirs.save_pretrained(tmp_path / "repository")
    (tmp_path / "repository" / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "repository" / "pytorch_model.bin")
    endpoint, asked = hub
    result = convert(tmp_path, endpoint)
    assert result.returncode == 0, result.stderr
    assert "model.safetensors" in asked  # looked for first
    converted = ViTScratchForImageClassification.from_pretrained(tmp_path / "out").eval()
    images = torch.randn(2, 3, 16, 24)
    torch.testing.assert_close(converted(images).logits, theirs(images).logits, rtol=0, atol=1e-5)


@pytest.mark.timeout(220)
def test_a_hub_that_is_not_there_is_asked_for_one_file_only(tmp_path):
    result = convert(tmp_path, "http://127.0.0.1:9")
    assert result.returncode == 1
    assert "user/vit: neither a file nor a folder, and the Hub does not give it" in result.stderr
    assert "Traceback" not in result.stderr
    wanted = set(re.findall(r"resolve/main/(\S+)", result.stderr))
    assert wanted == {"model.safetensors"}
