# SPDX-License-Identifier: Apache-2.0
"""The configurations of `accelerate launch`, one run over two hosts, and one that is compiled and in bfloat16."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from forked import start_script
from safetensors.torch import load_file
from tiny_images import ROOT, build, class_folders, difference, flags, weights
from two_processes import SGD


CONFIGURATIONS = sorted((ROOT / "scripts" / "accelerate_configs").glob("*.yaml"))
HOSTS = ("10.213.7.1", "10.213.7.2")


def launch(configuration: str, *arguments: str) -> list[str]:
    file = ROOT / "scripts" / "accelerate_configs" / configuration
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), *arguments]
    return [*command, str(ROOT / "scripts" / "finetune.py")]


@pytest.mark.parametrize("file", CONFIGURATIONS, ids=lambda file: file.stem)
def test_accelerate_reads_every_configuration(file):
    read = load_config_from_file(str(file))
    expected = {
        "cpu": (DistributedType.NO, 1, 1), "one_gpu": (DistributedType.NO, 1, 1),
        "multi_gpu": (DistributedType.MULTI_GPU, 1, 8),
        "multi_node": (DistributedType.MULTI_GPU, 2, 16), "fsdp2": (DistributedType.FSDP, 1, 8),
    }  # fmt: skip
    assert (read.distributed_type, read.num_machines, read.num_processes) == expected[file.stem]
    assert read.use_cpu == file.stem.endswith("cpu")
    if file.stem == "fsdp2":
        assert read.fsdp_config["fsdp_version"] == 2


@pytest.fixture
def hosts():
    """Two network namespaces with a cable between them. Skips where they can't be made."""
    if shutil.which("ip") is None:
        pytest.skip("two hosts on one machine need the program ip (iproute2)")
    names = [f"vit{os.getpid() % 10000}{side}" for side in "ab"]  # an interface has at most 15 letters
    commands = [f"netns add {name}" for name in names]
    commands += [f"link add {names[0]} netns {names[0]} type veth peer name {names[1]} netns {names[1]}"]
    for name, address in zip(names, HOSTS):
        commands += [f"-n {name} addr add {address}/24 dev {name}", f"-n {name} link set {name} up"]
        commands += [f"-n {name} link set lo up", f"netns exec {name} true"]
    try:
        for command in commands:
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"network namespaces can't be made here: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_hosts_train_as_one(hosts, tmp_path):
    images = str(class_folders(tmp_path / "images", each=11))
    common = flags(images, *SGD, "--variant", "test/4", "--max_steps", "3", "--dataloader_num_workers", "0")
    common += ["--disable_tqdm", "True", "--report_to", "none"]
    words = [ROOT / "scripts" / "finetune.py", *common, "--per_device_train_batch_size", "4"]
    words += ["--output_dir", tmp_path / "two"]
    shared = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": HOSTS[0]}
    shared |= {"MASTER_PORT": "29555", "ACCELERATE_USE_CPU": "true"}
    programs = []
    for rank, host in enumerate(hosts):
        own = {"RANK": str(rank), "GLOO_SOCKET_IFNAME": host, **shared}
        programs.append(start_script(words, tmp_path, tmp_path / f"{rank}.log", host, **own))
    for program in programs:
        assert program.wait() == 0, program.printed
    one = build(tmp_path / "one", *common, "--per_device_train_batch_size", "8")
    one.train()
    stored = load_file(tmp_path / "two" / "model.safetensors")
    assert difference(stored, dict(one.model.named_parameters())) < 1e-6
    record = json.loads((tmp_path / "two" / "results.json").read_text())
    assert record["n"] == 9
    assert record["value"] == one.evaluate()["eval_accuracy"]
    assert record["training"]["samples_seen_by_process"] == [12, 12]
    assert record["training"]["processes"] == 2


def test_a_compiled_run_in_bfloat16_resumes_exactly(pets, tmp_path):
    # The backend that needs no C++ compiler; what the Trainer makes of a compiled model is the same.
    common = ["--bf16", "True", "--torch_compile", "True", "--torch_compile_backend", "aot_eager", "--max_steps", "4"]
    common = [*flags(pets), "--save_strategy", "steps", "--save_steps", "2", "--dataloader_num_workers", "0", *common]
    straight = build(tmp_path / "a", *common)
    straight.train()
    resumed = build(tmp_path / "b", *common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert difference(weights(straight), weights(resumed)) == 0.0
    assert straight.evaluate()["eval_images"] == 6
    assert straight.accelerator.mixed_precision == "bf16"
    loaded = load_file(tmp_path / "a" / "checkpoint-4" / "model.safetensors")
    assert difference(loaded, weights(straight)) == 0.0


def test_one_process_starts_from_the_configuration_in_the_precision_of_the_launcher(pets, tmp_path):
    argv = [*flags(pets), "--variant", "test/4", "--max_steps", "2", "--output_dir", str(tmp_path / "out")]
    command = [*launch("cpu.yaml", "--mixed_precision", "bf16"), *argv, "--disable_tqdm", "True", "--report_to", "none"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (record["training"]["precision"], record["training"]["processes"]) == ("bfloat16", 1)


def test_fsdp_on_a_cpu_is_told_to_be_none(pets, tmp_path, monkeypatch):
    assert build(tmp_path / "a", *flags(pets)).describe_sharding() is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "keeps the whole model (DDP)" in "".join(build(tmp_path / "b", *flags(pets)).describe())
