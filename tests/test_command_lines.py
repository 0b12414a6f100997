# SPDX-License-Identifier: Apache-2.0
"""Command lines: --help and mistakes of every script before torch is imported, and flags that scripts share."""

import ast
import dataclasses
import json
import subprocess
import sys

import pytest
from tiny_images import ROOT, class_folders

from modeling_vit_scratch import VARIANTS
from modeling_vit_scratch.checkpoint.formats import FORMATS
from modeling_vit_scratch.common import flags as shared
from modeling_vit_scratch.common.flags import BUILT_IN, DataArguments, Parser, flag_metadata
from modeling_vit_scratch.evaluation.arguments import EvaluationArguments
from modeling_vit_scratch.prediction.arguments import PredictionArguments
from modeling_vit_scratch.pretraining.arguments import OBJECTIVE_DEFAULTS, OBJECTIVES, PRETRAIN, PretrainingArguments
from modeling_vit_scratch.recipes.table import DATA_SETS
from modeling_vit_scratch.training.arguments import VARIANT_NAMES, ModelArguments, RecipeArguments, TrainingFlags
from modeling_vit_scratch.training.command_line import FINETUNE, build_parser, parse_arguments


SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))
HEAVY = {"torch", "transformers", "datasets", "numpy", "sklearn", "matplotlib", "gradio"}
# Runs a script as Python does, and says on the last line what it has imported.
PROGRAM = """
import json, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
    status = None
except SystemExit as end:
    status = end.code or 0
print(json.dumps([status, sorted(sys.modules)]))
"""


def run(script, *words):
    """The exit status, what was printed, the errors, and the modules that were imported."""
    command = [sys.executable, "-c", PROGRAM, str(ROOT / "scripts" / f"{script}.py"), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    *printed, last = done.stdout.splitlines() or [""]
    assert last, done.stderr
    status, modules = json.loads(last)
    return status, printed, done.stderr, set(modules)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_torch_and_fits_on_a_few_pages(script):
    status, printed, errors, modules = run(script, "--help")
    assert (status, errors) == (0, "")
    assert not modules & HEAVY
    assert len(printed) <= 205
    assert any(line.startswith("    python scripts/") for line in printed[:12]), "no example on top"
    assert "test/4" not in "\n".join(printed)


@pytest.mark.parametrize("script", ["finetune", "pretrain"])
def test_help_all_has_every_flag_once(script):
    names = [line.split()[0] for line in run(script, "--help", "all")[1] if line.startswith("  --")]
    assert len(names) == len(set(names))
    assert {"--label_names_file", "--ema_warmup", "--adam_beta1", "--train_dir"} <= set(names)


@pytest.mark.parametrize(
    ("script", "words", "parts"),
    [
        (
            "finetune",
            ["--learnin_rate", "1", "--num_train_epochs=many", "--variant", "S/15", "--mixup", "-1", "--recipe", "x"],
            ("5 problems", "Did you mean --learning_rate?", "--num_train_epochs: invalid", "Did you mean S/16?",
             "--mixup -1", "no recipe 'x'"),
        ),
        ("finetune", ["--variant", "S/16", "--image_size", "100"], ("must divide",)),
        (
            "finetune",
            ["--optim", "adamw", "--learning_rate", "0"],
            ("2 problems", "--optim: invalid choice: 'adamw'", "--learning_rate 0 must be above 0."),
        ),
        ("finetune", ["--train_val_split", "7", "--max_stepss", "3"], ("2 problems", "Did you mean --max_steps?")),
        ("finetune", ["--activation_checkpoint", "1"], ("Did you mean --activation_checkpointing?",)),
        (
            "finetune", ["--lr", "1", "--epochs", "3", "--workers", "2"],
            ("--learning_rate?", "--num_train_epochs?", "--dataloader_num_workers?"),
        ),
        ("pretrain", ["--objective", "foo", "--mask_ratio", "x"], ("2 problems", "--objective foo", "--mask_ratio: ")),
        ("evaluate", ["model", "data", "--crops", "3", "--foo"], ("2 problems", "--crops: invalid choice", "--foo")),
        ("predict", ["model", "photo.jpg", "--topk", "3", "--dtype", "x"], ("2 problems", "--dtype", "--top_k?")),
        ("probe", ["model", "--skip_linear", "--train_val_split", "7"], ("--train_val_split 7",)),
        ("visualize", ["filters", "m", "--image_size", "1", "2", "3", "--save_arrays", "x"], ("2 problems", ".npz")),
        ("visualize", ["augmentation", "--mixup", "-1"], ("--mixup -1",)),
        ("transfer", ["compare", "nowhere"], ("nowhere has no results.json",)),
    ],
)  # fmt: skip
def test_mistakes_are_answered_in_one_message_before_torch(script, words, parts):
    status, printed, errors, modules = run(script, *words)
    assert (status, printed) == (2, [])
    assert not modules & HEAVY
    assert all(part in errors for part in parts), errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    "script", [script for script in SCRIPTS if script not in ("evaluate", "finetune", "predict", "pretrain")]
)
def test_a_flag_that_does_not_exist_is_refused_before_torch(script):
    needed = {"app": ["m"], "convert": ["m", "o"], "export": ["m", "o"], "publish": ["f", "me/x"], "probe": ["m"]}
    needed |= {
        "benchmark": ["data"],
        "visualize": ["filters", "m"],
        "transfer": ["--model_name_or_path", "m", "--data", "digits"],
    }
    status, _, errors, modules = run(script, *needed.get(script, []), "--nonsense")
    if script == "transfer":  # a flag of finetune.py for all it knows, which checks it
        assert "--nonsense" in errors
        return
    assert status == 2
    assert "--nonsense" in errors
    assert not modules & HEAVY


def test_a_comparison_of_runs_loads_few_files():
    _, _, _, modules = run("transfer", "compare", "nowhere")
    ours = {name for name in modules if name.partition(".")[0] in ("modeling_vit_scratch", "experiments", "startup")}
    assert len(ours) <= 10


def test_help_all_has_the_flags_of_the_trainer():
    status, printed, _, modules = run("finetune", "--help", "all")
    text = "\n".join(printed)
    assert status == 0
    assert "torch" in modules
    for name in ("--adam_beta1 X", "--logging_strategy WHEN", "--train_dir DIR", "--fsdp", "adamw_torch_fused"):
        assert f"  {name}" in text or f" {name}" in text
    assert text.count("  --learning_rate X") == 1


def test_after_the_command_line_the_package_is_whole():
    program = """
import sys
from startup.quick import before_torch
with before_torch():
    from modeling_vit_scratch.training.command_line import build_parser
    build_parser()
    assert "torch" not in sys.modules
import modeling_vit_scratch
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert CONFIG_MAPPING["vit_scratch"] is modeling_vit_scratch.ViTScratchConfig
assert modeling_vit_scratch.ViTScratchModel._auto_class == "AutoModel"
assert modeling_vit_scratch.ViTScratchModel.checkpoint_loader is modeling_vit_scratch._load_checkpoint
with before_torch():  # no more to do
    pass
print("whole")
"""
    environment = {"PYTHONPATH": str(ROOT / "scripts"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["whole"], done.stderr


# Runs a script up to the first batch of its network (in training, the first step), and says what it has imported.
TO_THE_FIRST_BATCH = """
import gc, json, os, runpy, sys
import torch
def stop(module, inputs):
    if type(module).__name__ == "ViTScratchForImageClassification" and module.training == ("finetune" in sys.argv[0]):
        print(json.dumps([gc.isenabled(), gc.get_freeze_count(), sorted(sys.modules)]), flush=True)
        os._exit(0)
torch.nn.modules.module.register_module_forward_pre_hook(stop)
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("script", "words", "needless"),
    [
        (
            "finetune",
            ["--train_dir", "{images}", "--variant", "test/4", "--image_size", "16", "--output_dir", "{out}"],
            {"matplotlib"},
        ),
        (
            "predict",
            [str(ROOT / "model_cards" / "vit-tiny-imagenet"), "{images}", "--output", "{out}.csv"],
            {"datasets", "evaluate", "matplotlib", "pandas", "peft", "sklearn", "transformers.trainer"},
        ),
    ],
)
def test_until_its_first_batch_a_run_imports_what_it_needs_and_freezes_it(script, words, needless, tmp_path):
    class_folders(tmp_path / "images")
    words = [word.format(images=tmp_path / "images", out=tmp_path / "out") for word in words]
    command = [sys.executable, "-c", TO_THE_FIRST_BATCH, str(ROOT / "scripts" / f"{script}.py"), *words]
    done = subprocess.run(
        [*command, "--dataloader_num_workers", "0"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    collects, frozen, modules = json.loads(done.stdout.splitlines()[-1])
    assert not needless & set(modules)
    assert collects
    assert frozen > 100_000  # objects of torch and transformers, which no collection looks at again


def test_every_script_reads_its_command_line_first():
    for script in SCRIPTS:
        text = (ROOT / "scripts" / f"{script}.py").read_text(encoding="utf-8")
        names = {
            module for node in ast.parse(text).body if isinstance(node, ast.ImportFrom) for module in [node.module]
        }
        assert names <= {"startup.quick", "pathlib", "typing"}, script
        assert "    with before_torch():\n" in text
        assert text.endswith('if __name__ == "__main__":\n    raise SystemExit(run_command_line(main))\n')


# ---------------------------------------------------------------------------------------------------------------------
# Names that are written down, since reading them would import torch


def test_names_are_those_of_the_library():
    assert {*VARIANT_NAMES, "test/4"} == set(VARIANTS)
    assert set(OBJECTIVES) == set(OBJECTIVE_DEFAULTS)
    assert set(BUILT_IN) == set(DATA_SETS)
    from convert import FORMATS as formats  # scripts/convert.py

    assert formats == tuple(FORMATS)


# ---------------------------------------------------------------------------------------------------------------------
# Each flag once


def test_every_flag_is_in_one_group_of_help_or_is_the_trainers():
    for script, kinds in (
        (FINETUNE, (ModelArguments, DataArguments, RecipeArguments, TrainingFlags)),
        (PRETRAIN, (ModelArguments, DataArguments, PretrainingArguments, RecipeArguments, TrainingFlags)),
    ):
        names = [field.name for kind in kinds for field in dataclasses.fields(kind) if field.init]
        assert len(names) == len(set(names))
        hidden = {
            "logging_strategy",
            "dataloader_persistent_workers",
            "hub_always_push",
            "hub_revision",
            "license_name",
            "license_link",
            "image_processor_name",
            "trust_remote_code",
            "shuffle_buffer_size",
            "label_names_file",
            "ema_warmup",
            "probe_images",
            "probe_steps",
            "hub_strategy",
            "problem_type",
            "hub_private_repo",
            "distillation_type",
            "distillation_alpha",
            "distillation_tau",
            "progressive_image_size",
            "patch_drop_rate",
        }  # --help all shows them
        if script is PRETRAIN:
            hidden |= {"freeze", "lora_rank", "teacher_model"}  # for classifiers
            hidden |= {"mpp_target", "mask_patch_size", "norm_pix_loss"}
            hidden |= {name for name in names if name.startswith(("decoder_", "warmup_teacher_"))}
            hidden |= {"out_dim", "momentum_teacher", "teacher_temp", "weight_decay_end", "freeze_last_layer"}
            hidden |= {"local_crops_scale", "global_crops_scale"}
        assert build_parser(script).shown == set(names) - hidden


def test_a_flag_of_several_scripts_has_one_help_text():
    kinds = [kind for kind in vars(shared).values() if dataclasses.is_dataclass(kind)]
    texts = {
        field.name: shared.flag_metadata(kind, field.name)["help"]
        for kind in kinds
        for field in dataclasses.fields(kind)
        if field.init
    }
    train = (ModelArguments, DataArguments, TrainingFlags)
    for own in (EvaluationArguments, PredictionArguments):
        for name in (field.name for field in dataclasses.fields(own) if field.init):
            common = [kind for kind in train if name in kind.__dataclass_fields__]
            for kind in common:
                # The same text, but for what means something else.
                if name not in ("output_dir", "max_broken_images", "split"):
                    assert flag_metadata(own, name)["help"] == flag_metadata(kind, name)["help"] == texts[name], name


def test_a_subclass_that_changes_a_default_keeps_the_help_text(capsys):
    @dataclasses.dataclass
    class Own(shared.ReadingFlags):
        per_device_eval_batch_size: int = 7

    parser = Parser(Own, groups={"own": ("per_device_eval_batch_size",)})
    with pytest.raises(SystemExit):
        parser.parse_known_args(["--help"])
    assert "Batch size per device, without gradients." in " ".join(capsys.readouterr().out.split())
    assert parser.parse_known_args([])[0].per_device_eval_batch_size == 7


@pytest.mark.parametrize(
    ("words", "script", "rate"),
    [
        ([], FINETUNE, 1e-3),
        (["--model_name_or_path", "x"], FINETUNE, 1e-4),
        (["--config_name", "x"], FINETUNE, 1e-3),
        (["--dataset_name", "elpv", "--model_name_or_path", "x"], FINETUNE, 1e-4),
        (["--model_name_or_path", "x"], PRETRAIN, 1e-3),
        (["--objective", "mae", "--model_name_or_path", "x"], PRETRAIN, 1e-3),
        (["--recipe", "bv_transfer_cifar10", "--model_name_or_path", "x"], FINETUNE, 0.003),
        (["--recipe", "bv_transfer_cifar10", "--model_name_or_path", "x", "--learning_rate", "1"], FINETUNE, 1.0),
    ],
)
def test_the_learning_rate_is_decided_by_the_situation(words, script, rate):
    assert parse_arguments(words, script)[2].learning_rate == rate
