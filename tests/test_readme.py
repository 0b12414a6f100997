# SPDX-License-Identifier: Apache-2.0
"""
Every block of README runs: commands as they stand (long ones with fewer steps), Python in the order of the page. The
first command of each launcher starts it; the others are run in this process, which has the imports behind it.
"""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.checkpoint.conversion import save_checkpoint


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MEASUREMENTS = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip() for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line
]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]

# What makes a long command short.
SHORTER = {
    "python scripts/finetune.py --train_dir photos": "--image_size 32 --max_steps 2",
    "accelerate launch scripts/finetune.py --train_dir photos": "--variant Mi/16 --image_size 32 --max_steps 2",
    "torchrun --nproc_per_node 2 scripts/finetune.py": "--variant Mi/16 --image_size 32 --max_steps 2",
    "python scripts/pretrain.py --objective mae": "--variant Mi/16 --image_size 32 --max_steps 2",
    "python scripts/finetune.py --model_name_or_path outputs/pretrained": "--max_steps 2",
}
LAUNCHED = (
    "accelerate launch scripts/finetune.py --train_dir photos",
    "torchrun --nproc_per_node 2 scripts/finetune.py",
)


def run(command: list[str], folder: Path) -> str:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder that looks like the repository after `make demo`, with photos in it."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "scripts").symlink_to(ROOT / "scripts")
    generator = np.random.default_rng(0)
    for name, red in (("cat", 0), ("dog", 120)):
        (folder / "photos" / name).mkdir(parents=True)
        for index in range(8):
            pixels = generator.integers(0, 100, (40, 48, 3), dtype=np.uint8) + np.uint8([red, 0, 0])
            Image.fromarray(pixels).save(folder / "photos" / name / f"{index}.jpg")
    # Looks like the paper's file, with a small model in it.
    config = ViTScratchConfig.from_variant("test/4", image_size=32, hidden_act="gelu_pytorch_tanh", num_labels=5)
    save_checkpoint(ViTScratchForImageClassification(config), folder / "B_16.npz", format="npz")
    (folder / "model_cards").symlink_to(ROOT / "model_cards")
    return folder


def test_the_first_screen_has_the_sentence_a_picture_and_the_installation():
    screen = "\n".join(README.splitlines()[:40])
    assert all(word in screen for word in ("make demo", "make test", "pip install -e .", "![", "pipeline("))
    assert len(PYTHON[0].splitlines()) == 3
    assert len(README.splitlines()) <= 200


def test_pictures_and_links_of_the_page_lead_somewhere():
    targets = re.findall(
        r"\]\(((?!https?:)[^)#]+)[^)]*\)", README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    )
    assert len(targets) > 8
    assert [target for target in targets if not (ROOT / target).exists()] == []
    pictures = [ROOT / target for target in targets if target.endswith(".png")]
    assert pictures
    assert all(picture.stat().st_size < 300_000 for picture in pictures)


def test_every_command_is_known_here():
    known = ("make demo", "make test", "python scripts/convert.py B_16.npz", *SHORTER)
    known = (*known, "python scripts/convert.py outputs/vit-b16", "python scripts/probe.py outputs/pretrained")
    known = (
        *known,
        "python scripts/evaluate.py outputs/pets",
        "python scripts/card.py outputs/pets",
        "python scripts/visualize.py sheet outputs/pets",
    )
    known = (*known, "python scripts/publish.py outputs/pets me/vit-pets")
    known = (*known, 'pip install -e ".[app]"', "python scripts/app.py outputs/pets")  # test_page.py starts it
    known = (*known, "python scripts/predict.py outputs/pets photos")
    # How the environment of these tests was made.
    known = (*known, "python3 -m venv .venv", "source .venv/bin/activate", "pip install torch", "pip install -e .")
    assert [command for command in COMMANDS if not command.startswith(known)] == []
    assert all(any(command.startswith(name) for command in COMMANDS) for name in known)


@pytest.mark.timeout(420)
def test_the_demo_and_then_the_python_blocks_in_the_order_of_the_page(workplace):
    demo_ends_with_labels_from_a_process_without_the_package(workplace)
    program = "\n".join(PYTHON)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(workplace / "cache")}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=workplace, env=environment, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr
    assert "'score'" in result.stdout


def demo_ends_with_labels_from_a_process_without_the_package(workplace):
    # This environment in place of a new one, half of the budget, and no launcher: another test starts it.
    places = [f"VENV={sys.prefix}", f"SERVE={workplace / 'serve'}", f"DEMO={workplace / 'outputs' / 'demo'}"]
    shorter = "BUDGET=--image_size 24 --num_train_epochs 2 --learning_rate 1e-3"
    demo = run(["make", "demo", shorter, f"LAUNCH={sys.executable}", "-o", f"{sys.prefix}/installed", *places], ROOT)
    found = re.findall(r"Held-out accuracy: ([\d.]+) % on ([\d,]+) images", demo)
    (scratch, accuracy), (count, _) = (column for column in zip(*found))
    assert float(accuracy) >= 85
    assert int(count) >= 200
    gain = re.search(r"demo/digits +vit\S+ +[\d.]+ % +([+-][\d.]+) points", demo)[1]
    assert float(gain) == pytest.approx(float(accuracy) - float(scratch), abs=0.011)
    assert float(gain) > 10
    folder = workplace / "outputs" / "demo" / "digits"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "results.json"} <= names
    assert {f"{stem}_vit_scratch.py" for stem in ("configuration", "modeling", "image_processing")} <= names
    served = demo[demo.index("has not got the package") :]
    assert "can be imported here" not in served
    examples = sorted((workplace / "outputs" / "demo" / "examples").iterdir())
    labels = [re.search(rf"{path.name}\s+(\d)\s", served).group(1) for path in examples]
    truth = [path.stem.split("_")[1] for path in examples]
    assert len(truth) == 10
    assert sum(a == b for a, b in zip(labels, truth)) >= 8


def test_the_tests_command_is_what_ci_runs():
    assert "pytest" in run(["make", "-n", "test"], ROOT)
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test"


def test_the_samples_extra_brings_the_solar_cells():
    import elpv_dataset  # noqa: F401

    assert re.search(r"^samples =\n\s+elpv-dataset", (ROOT / "setup.cfg").read_text(), flags=re.MULTILINE)


def run_here(words: list[str], folder: Path) -> str:
    """Runs a script in this process, as Python does it in another one. Returns what it has printed."""
    printed, code = io.StringIO(), None
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        patch.setattr(sys, "argv", words)
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as ended:
            code = ended.code
    assert not code, printed.getvalue()
    return printed.getvalue()


def train(start: str, workplace: Path) -> tuple[Path, str]:
    """Runs a training command, shortened, after those that make what it starts from. Returns its folder and output."""
    command = next(command for command in COMMANDS if command.startswith(start))
    words = shlex.split(f"{command} {SHORTER[start]}")
    if "--model_name_or_path" in words:
        make(words[words.index("--model_name_or_path") + 1], workplace)
    folder = workplace / words[words.index("--output_dir") + 1]
    shutil.rmtree(folder, ignore_errors=True)  # of a test that needed it before: training writes over nothing
    if start not in LAUNCHED:
        return folder, run_here(words[1:], workplace)
    launchers = {"accelerate": "accelerate.commands.launch", "torchrun": "torch.distributed.run"}
    arguments = words[words.index("launch") + 1 :] if "launch" in words else words[1:]
    return folder, run([sys.executable, "-m", launchers[words[0]], *arguments], workplace)


def make(folder: str, workplace: Path) -> None:
    """Makes a folder as the page does, where it is not there yet: each test may run in a process of its own."""
    if folder.startswith("outputs/") and not (workplace / folder).exists():
        start = next(
            start for start in SHORTER for command in COMMANDS if command.startswith(start) and folder in command
        )
        train(start, workplace)


@pytest.mark.parametrize("start", SHORTER)
def test_training_commands_run(start, workplace):
    folder, stdout = train(start, workplace)
    assert f"Held-out {'loss' if 'mae' in start else 'accuracy'}" in stdout
    assert (folder / "model.safetensors").exists()
    if "--model_name_or_path outputs/pretrained" in start:  # the page's whole way, to publishing
        for script, told in (("card.py", "Written: "), ("publish.py", "Nothing was uploaded")):
            words = shlex.split(next(command for command in COMMANDS if f"scripts/{script}" in command))
            words = [word.replace("outputs/pets", "outputs/tuned") for word in words[1:]]
            words += ["--license", "apache-2.0"] if script == "card.py" else []  # nothing else says it
            assert told in run_here(words, workplace)


@pytest.mark.parametrize(
    ("script", "model", "told"),
    [
        ("probe.py", "outputs/pretrained", "knn"),
        ("evaluate.py", "outputs/pets", "Brier"),
        ("predict.py", "outputs/pets", "Written: labels.parquet (16 images)"),
        ("card.py", "outputs/pets", "Written: outputs/pets/README.md"),
        ("visualize.py", "outputs/pets", "outputs/pets.png"),
        ("publish.py", "outputs/pets", "Nothing was uploaded"),
    ],
)
def test_commands_on_a_finished_model_run(script, model, told, workplace):
    make(model, workplace)
    words = shlex.split(next(command for command in COMMANDS if f"scripts/{script}" in command))
    assert told in run_here(words[1:], workplace)


def test_conversion_commands_run_and_the_file_comes_back(workplace):
    commands = [shlex.split(command) for command in COMMANDS if command.startswith("python scripts/convert.py")]
    for words in commands:
        run_here(words[1:], workplace)
    first, again = (np.load(workplace / name) for name in ("B_16.npz", "vit_b16_again.npz"))
    assert set(first) == set(again)
    assert all(first[name].tobytes() == again[name].tobytes() for name in first)


def test_what_pretraining_gives_is_on_record():
    measured = json.loads((ROOT / "model_cards" / "pretraining.json").read_text(encoding="utf-8"))
    cells = []
    for entry in measured:
        values = [100 * run["value"] for run in entry["runs"]]
        if entry["name"].startswith("pretraining"):
            continue
        assert len(values) >= 3
        assert len({run["seed"] for run in entry["runs"]}) == len(values)
        cells.append(f"| {np.mean(values):.1f} ± {np.std(values, ddof=1):.1f} % |")
    assert len(cells) == 12
    table = MEASUREMENTS[MEASUREMENTS.index("| pooled output | start") :]
    table = table[: table.index("\n\n")]
    assert table.count(" ± ") == len(cells)
    assert all(cell[2:-2] in table for cell in cells)


def test_what_the_demo_gains_is_on_record():
    record = json.loads((ROOT / "model_cards" / "demo.json").read_text(encoding="utf-8"))
    row = next(line for line in MEASUREMENTS.splitlines() if line.startswith("| `make demo` |"))
    told = {}
    for cell in record["cells"]:
        values = [100 * value for value in cell["values"]]
        assert len(values) >= 3
        told[cell["start"]] = f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f} %"
    assert f"| {told['pretrained']} of 270 images; from scratch {told['scratch']} |" in row
    assert f"{record['make_demo']['processor_seconds']:.0f} s of processor time" in row
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    budget = re.search(r"^BUDGET = (.*)$", makefile, flags=re.MULTILINE)[1]
    assert budget in record["cells"][0]["command"]
    assert re.search(r"^PRETRAINED = (.*)$", makefile, flags=re.MULTILINE)[1] in record["command"]


def test_how_fast_fine_tuning_is_is_on_record():
    text = " ".join(MEASUREMENTS[MEASUREMENTS.index("## Speed") :].split())
    record = json.loads((ROOT / "model_cards" / "benchmark_finetune.json").read_text(encoding="utf-8"))
    for measured in record["sets"].values():
        row = list(measured["summary"].values())[-1]  # beside transformers
        times, low, high = (f"{one:.1f}" for one in (row["times_faster"], *row["times_faster_quartiles"]))
        assert f"{times} ({low} to {high}) times" in text
        assert f"{record['variant']} at 224, {row['rounds']} rounds" in text


def test_how_fast_the_network_is_is_on_record():
    def read(task):
        return json.loads((ROOT / "model_cards" / f"benchmark_{task}.json").read_text(encoding="utf-8"))["batches"]["8"]

    def times(batch, ours, other):
        low, middle, high = np.percentile(np.divide(batch["seconds"][other], batch["seconds"][ours]), [25, 50, 75])
        return f"{middle:.2f} ({low:.2f} to {high:.2f})"

    text = MEASUREMENTS[MEASUREMENTS.index("On one thread of an AMD EPYC, S/16") :]
    inference, training = read("inference"), read("training")
    blocked = "ours, block_weights"
    for name in ("ours", blocked, "transformers", "timm", "torchvision", "vit-pytorch"):
        cells = [f"{inference['summary'][name]['images_per_second']:.1f}"]
        is_peer = not name.startswith("ours")
        cells += [times(inference, ours, name) if is_peer else "" for ours in ("ours", blocked)]
        row = training["summary"].get(name)
        cells += [f"{row['images_per_second']:.2f}" if row else "", times(training, "ours", name) if is_peer else ""]
        cells += [f"{row['memory_bytes'] / 1e6:.0f} MB" if row else ""]
        shown = {"ours": "ours", blocked: "ours with blocks"}.get(name, name)
        assert "| ".join(["", shown + " ", *(f"{cell} " if cell else "" for cell in cells)]) + "|" in text, cells
    for task, ours in (("inference_b16", blocked), ("inference_bfloat16", "ours"), ("training_b16", "ours")):
        batch = read(task)
        for name in ("transformers", "timm"):
            assert times(batch, ours, name) in " ".join(text.split()), (task, name, times(batch, ours, name))


def test_how_fast_the_network_is_beside_deployed_programs_is_on_record():
    start = MEASUREMENTS.index("On one thread of an Intel Xeon")
    lines = MEASUREMENTS[start : MEASUREMENTS.index("On one thread of an AMD EPYC, S/16")].splitlines()
    table = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in lines if line.startswith("| ")}
    names = {
        "ours": "ours, plain", "ours, accelerated": "ours, accelerated", "transformers": "transformers 5.24",
        "timm": "timm 1.0.31", "torchvision": "torchvision 0.29.1", "vit-pytorch": "vit-pytorch 1.26.14",
        "OpenVINO": "OpenVINO 2026.4", "ONNX Runtime": "ONNX Runtime 1.32", "OpenVINO, int8": "OpenVINO, static int8",
        "ONNX Runtime, int8 weights": "ONNX Runtime, int8 weights",
    }  # fmt: skip
    columns = [("inference_xeon", "1"), ("inference_xeon", "8"), ("inference_xeon_bfloat16", "1")]
    columns += [("inference_xeon_bfloat16", "8"), ("training_xeon", "8"), ("training_xeon_bfloat16", "8")]
    for column, (task, size) in enumerate(columns):
        record = json.loads((ROOT / "model_cards" / f"benchmark_{task}.json").read_text(encoding="utf-8"))
        batch = record["batches"][size]
        for name, title in names.items():
            cell = table[title][column].strip()
            if name not in batch["seconds"]:
                assert cell == "", (task, title)
                continue
            ratios = np.divide(batch["seconds"][name], batch["seconds"]["ours, accelerated"])
            times = "" if name == "ours, accelerated" else f" ({np.median(ratios):.2f})"
            assert cell == f"{batch['summary'][name]['images_per_second']:.1f}{times}", (task, title)


def test_how_fast_the_plain_and_the_accelerated_network_are_is_on_record():
    text = " ".join(MEASUREMENTS[MEASUREMENTS.index("* **Plain and accelerated**") :].split("\n* ")[0].split())
    for task, batch, fast, slow in (
        ("inference", "8", "ours", "transformers"), ("training", "8", "ours", "transformers"),
        ("inference", "8", "ours, accelerated", "ours"), ("inference", "1", "ours, accelerated", "ours"),
        ("training", "8", "ours, accelerated", "ours"),
    ):  # fmt: skip
        record = json.loads((ROOT / "model_cards" / f"benchmark_{task}_plain.json").read_text(encoding="utf-8"))
        seconds = record["batches"][batch]["seconds"]
        low, middle, high = np.percentile(np.divide(seconds[slow], seconds[fast]), [25, 50, 75])
        assert f"{middle:.2f} ({low:.2f} to {high:.2f})" in text, (task, batch, fast)
