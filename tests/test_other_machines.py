# SPDX-License-Identifier: Apache-2.0
"""Machines that are not ours: other users, read-only folders, little shared memory, half a cluster."""

import encodings.raw_unicode_escape  # noqa: F401  # here, as matplotlib: root's Python can't be read by the other user
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.figure  # noqa: F401
import pytest
import torch
from forked import run_in_child
from tiny_images import build, class_folders, flags, load_script

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchImageProcessor
from modeling_vit_scratch.common.files import share, writing_problem
from modeling_vit_scratch.data.dataset import StoredImage
from startup.status import run_command_line


CLUSTER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


@pytest.fixture(scope="module")
def world():
    """A folder that everybody can read, with `pets`, a `model`, `mine` that all can write, and `locked`."""
    folder = Path(tempfile.mkdtemp())
    class_folders(folder / "pets", classes=("brown bear", "cat"), each=8)
    config = ViTScratchConfig.from_variant("test/4", id2label={0: "brown bear", 1: "cat"})
    torch.manual_seed(0)
    model = ViTScratchForImageClassification(config)
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder / "model")
    ViTScratchImageProcessor(size={"height": 16, "width": 24}).save_pretrained(folder / "model")
    share(*(folder / "model").iterdir())
    (folder / "mine").mkdir()
    (folder / "locked").mkdir()
    for path, mode in (
        (folder, 0o755),
        (folder / "mine", 0o777),
        (folder / "locked", 0o555),
        (folder / "model", 0o555),
    ):
        path.chmod(mode)
    yield folder
    (folder / "model").chmod(0o755)
    shutil.rmtree(folder)


def run(script, *words, as_nobody=True, before=None):
    def call():
        sys.argv = [f"{script}.py", *map(str, words)]
        if before is not None:
            before()
        return run_command_line(load_script(script).main)

    return run_in_child(call, as_nobody)


TRAINING = ("--dataloader_num_workers", "0", "--variant", "test/4", "--max_steps", "1", "--disable_tqdm", "True")
WRITERS = {
    "finetune": ("--train_dir", "pets", *TRAINING, "--output_dir", "OUT"),
    "pretrain": ("--train_dir", "pets", *TRAINING, "--output_dir", "OUT"),
    "evaluate": ("model", "pets", "--output_dir", "OUT"),
    "predict": ("model", "pets", "--output", "OUT/labels.csv", "--dataloader_num_workers", "0"),
    "convert": ("model", "OUT"),
    "card": ("model",),
    "export": ("model", "OUT", "--format", "torch", "--rounds", "0"),
    "probe": ("model", "--train_dir", "pets", "--output_dir", "OUT", "--skip_linear", "--dataloader_num_workers", "0"),
    "visualize": ("filters", "model", "--output", "OUT/filters.png"),
}


@pytest.mark.parametrize("script", WRITERS)
def test_an_output_that_can_not_be_written_is_said_in_a_sentence(world, script, monkeypatch):
    monkeypatch.chdir(world)
    words = [word.replace("OUT", "locked/new") for word in WRITERS[script]]
    status, printed = run(script, *words)
    assert status == 2, printed
    assert "Traceback" not in printed
    if script not in ("convert", "card"):
        assert f"{world}/locked is no folder that you can write into" in printed
        assert "step" not in printed  # seen before anything is computed


def test_a_disk_without_room_is_said_before_a_program_is_written(world, monkeypatch, tmp_path):
    monkeypatch.chdir(world)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 1000))
    words = [word.replace("OUT", str(tmp_path / "new")) for word in WRITERS["export"]]
    status, printed = run("export", *words, as_nobody=False)
    assert status == 2, printed
    assert "takes about" in printed
    assert "0.0 MB are free" in printed
    assert not list(tmp_path.iterdir())


def test_letters_that_the_terminal_does_not_have_are_escaped():
    def main():
        sys.stdout.reconfigure(encoding="ascii")
        return run_command_line(lambda: print("caf\u00e9"))

    assert run_in_child(main) == (0, "caf\\xe9\n")


def test_a_user_without_a_home_trains_and_what_is_saved_can_be_read_by_others(world, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    old = os.umask(0o022)
    try:
        status, printed = run("finetune", *[w.replace("OUT", "mine/new") for w in WRITERS["finetune"]])
    finally:
        os.umask(old)
    assert status == 0, printed
    for file in (world / "mine" / "new").rglob("*.safetensors"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o644, file


def test_a_folder_that_can_be_made_is_no_problem(tmp_path):
    assert writing_problem(tmp_path / "a" / "b") is None
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in writing_problem(tmp_path / "file" / "b")


# ---------------------------------------------------------------------------------------------------------------------
# Clusters


@pytest.mark.parametrize(
    ("variables", "is_fine"),
    [
        ({}, True),
        ({"RANK": "0", "WORLD_SIZE": "1"}, True),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, True),
        ({"RANK": "1"}, False),
        ({"WORLD_SIZE": "2"}, False),
        ({"LOCAL_RANK": "0"}, False),
        ({"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, False),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, False),
    ],
)
def test_half_a_cluster_is_refused_by_the_names_of_its_variables(monkeypatch, capsys, variables, is_fine):
    for name in CLUSTER:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run_command_line(lambda: None) == (0 if is_fine else 2)
    printed = capsys.readouterr().err
    assert (
        printed == "" if is_fine else all(f"{name}={value}" in printed for name, value in list(variables.items())[:1])
    )


# ---------------------------------------------------------------------------------------------------------------------
# Processes that read images


def full(tensor):
    raise RuntimeError(
        "unable to allocate shared memory(shm) for file </torch_1>: Resource temporarily unavailable (11)"
    )


@pytest.mark.parametrize("script", ["predict", "evaluate", "finetune"])
def test_full_shared_memory_ends_the_run_with_a_sentence(world, script, monkeypatch, tmp_path):
    monkeypatch.chdir(world)
    words = [word.replace("OUT", str(tmp_path / "new")) for word in WRITERS[script]]
    words += ["--dataloader_num_workers", "1"]

    def before():
        signal.alarm(60)  # it once waited for ever
        torch.Tensor.share_memory_ = full

    status, printed = run(script, *words, as_nobody=False, before=before)
    assert status == 1, printed
    assert "There is no shared memory left" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("script", ["predict", "finetune"])
def test_a_decoder_that_crashes_is_said_with_its_image(world, script, monkeypatch, tmp_path):
    monkeypatch.chdir(world)
    words = [word.replace("OUT", str(tmp_path / "new")) for word in WRITERS[script]]
    words += ["--dataloader_num_workers", "1", *(["--no_verify_images"] if script == "finetune" else [])]

    def crash(name):
        if str(name).endswith("cat/5.png"):
            os.kill(os.getpid(), signal.SIGKILL)

    def before():
        signal.alarm(60)
        fit, opened = ViTScratchImageProcessor.fit, StoredImage.open
        ViTScratchImageProcessor.fit = lambda self, image, *a, **k: crash(k.get("name")) or fit(self, image, *a, **k)
        StoredImage.open = lambda self, decoder: crash(self.name) or opened(self, decoder)

    status, printed = run(script, *words, as_nobody=False, before=before)
    assert status == 1, printed
    assert "while it read pets/cat/5.png" in printed


def test_no_more_processes_and_a_closed_pipe(capsys):
    def fork():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    assert run_command_line(fork) == 1
    assert "ulimit -u" in capsys.readouterr().err


def test_usr1_and_hup_save_a_checkpoint_and_nohup_keeps_its_word(pets, tmp_path):
    trainer = build(tmp_path / "out", *flags(pets, "--dataloader_num_workers", "0"))
    signals = trainer.save_on_signal.signals
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGUSR1)
            assert signals.poll() == signal.SIGUSR1
    finally:
        signal.signal(signal.SIGHUP, before)


# Memory ---------------------------------------------------------------------------------------------------------------


PAGES_TAKEN = """
import resource
import startup.quick
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    blocks = [bytearray(16 << 20) for _ in range(8)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_commands_keep_freed_memory_for_the_next_step_unless_the_user_has_set_it():
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    kept, given_back = (
        int(subprocess.check_output([sys.executable, "-c", PAGES_TAKEN], env={**plain, **given}, cwd="scripts"))
        for given in ({}, {"MALLOC_TRIM_THRESHOLD_": "131072"})
    )
    assert 5 * kept < given_back
