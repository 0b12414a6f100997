# SPDX-License-Identifier: Apache-2.0
"""The command line: defaults that fit together, mistakes told together, and every flag of the Trainer."""

import dataclasses
import errno
import json
import signal
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from modeling_vit_scratch.common.errors import InputError, TrainingInterrupted, TrainingStopped
from modeling_vit_scratch.common.files import write_manifest
from modeling_vit_scratch.common.flags import FLAGS_ELSEWHERE
from modeling_vit_scratch.training.command_line import build_parser, parse_arguments, split_words, trainer_flags
from startup.status import run_command_line


def parse(*argv):
    return parse_arguments([*map(str, argv)])


def refusal(*argv):
    """The message, whether raised at once or left for the reader of the data to raise."""
    with pytest.raises(InputError) as caught:
        raise parse(*argv)[3].as_error()
    return str(caught.value)


@pytest.mark.parametrize("words", [["--train_dir", "~/x"], ["--train_dir=~/x"]])
def test_a_tilde_is_the_home_folder(words):
    _, data, training, _ = parse_arguments([*words, "--output_dir=out~/y"])
    assert data.train_dir == str(Path.home() / "x")
    assert training.output_dir == "out~/y"


def test_no_flag_at_all_means_digits_from_scratch():
    model, data, training, problems = parse()
    assert (data.dataset_name, model.variant, training.output_dir) == ("digits", "Mi/4", "outputs/digits")
    assert training.learning_rate == 1e-3
    assert not problems.messages


def test_defaults_of_the_trainer_suit_image_classification():
    # The built-in data sets keep the last epoch: theirs is the number that a README shows.
    assert not parse()[2].load_best_model_at_end
    training = parse("--train_dir", "photos")[2]
    assert (training.eval_strategy, training.save_strategy, training.load_best_model_at_end) == ("epoch", "epoch", True)
    assert (training.metric_for_best_model, training.greater_is_better) == ("accuracy", True)
    assert (training.lr_scheduler_type, training.weight_decay, training.warmup_steps) == ("cosine", 0.05, 0.1)
    assert not training.remove_unused_columns
    assert training.report_to == []


@pytest.mark.skipif(torch.accelerator.is_available(), reason="what a machine without accelerator does")
def test_a_machine_without_accelerator_needs_no_flag_to_know():
    training = parse()[2]
    assert (training.use_cpu, training.dataloader_pin_memory, training.bf16) == (True, False, False)
    assert parse("--bf16")[2].bf16


@pytest.mark.parametrize(
    ("cores", "processes", "flags", "workers"),
    [(16, 1, (), 2), (2, 1, (), 2), (1, 1, (), 0), (2, 2, (), 0), (16, 1, ("--dataset_name", "digits"), 0)],
)
def test_the_cpu_reads_images_in_two_processes_if_it_has_the_cores(monkeypatch, cores, processes, flags, workers):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    training = parse(*(flags or ("--train_dir", "photos")), "--use_cpu")[2]
    assert (training.dataloader_num_workers, training.dataloader_persistent_workers) == (workers, workers > 0)


def test_a_saved_model_is_fine_tuned_more_gently():
    model, _, training, _ = parse("--model_name_or_path", "some/model")
    assert (training.learning_rate, model.variant, model.image_size) == (1e-4, None, None)
    assert parse("--model_name_or_path", "some/model", "--learning_rate", 3e-4)[2].learning_rate == 3e-4
    model, _, training, _ = parse("--config_name", "some/model")
    assert (training.learning_rate, model.variant) == (1e-3, None)


def test_another_variant_leaves_the_sizes_of_the_usual_one_behind():
    assert parse()[0].image_size == [8]
    assert parse("--dataset_name", "elpv")[2].smallest_area == 0.7
    assert parse("--variant", "Ti/16")[0].image_size is None
    assert parse("--train_dir", "photos", "--variant=Ti/16")[0].variant == "Ti/16"


def test_own_images_start_from_the_size_of_the_paper_and_name_the_folder():
    model, data, training, _ = parse("--train_dir", "pets/train.parquet")
    assert (model.variant, data.dataset_name, training.output_dir) == ("S/16", None, "outputs/train")


def test_the_best_epoch_is_kept_only_if_there_is_one_to_choose():
    assert not parse("--eval_strategy", "no")[2].load_best_model_at_end
    assert not parse("--save_strategy", "no")[2].load_best_model_at_end
    assert not parse("--load_best_model_at_end", "False")[2].load_best_model_at_end


def test_every_flag_of_the_trainer_is_there():
    assert trainer_flags() == {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for words in (["--adam_beta1", "0.8", "--max_steps", "3"], ["--no_dataloader_pin_memory"], ["--no-cuda"]):
        assert split_words(words) == ((words, []) if words != ["--no-cuda"] else ([], words))
    training = parse("--adam_beta1", 0.8, "--seed", 3, "--no_skip_memory_metrics", "--label_names", "a", "b")[2]
    assert (training.adam_beta1, training.seed, training.label_names) == (0.8, 3, ["a", "b"])
    assert training.adam_beta2 == TrainingArguments.adam_beta2
    assert not training.skip_memory_metrics


def test_help_is_in_groups_with_defaults_and_without_second_spellings(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--dataset_name", "elpv", "--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("most used: --train_dir", "model: --patch_size", "data: --validation_dir", "--resume_from_checkpoint"):
        assert part in text
    assert "(default: 0.15)" in text
    assert "Default: S/16" in text
    assert "--train-val-split" not in text


def test_all_mistakes_of_a_command_line_are_told_at_once():
    message = refusal(
        "--learnin_rate", 1, "--num_train_epochs", "many", "--optim", "foo", "--variant", "S/15", "--weight_decay", -1,
        "--train_val_split", 1.5, "--max_train_samples", 0, "--per_device_train_batch_size", 0,
    )  # fmt: skip
    expected = (
        "8 problems", "--learnin_rate: there is no such flag. Did you mean --learning_rate?",
        "--num_train_epochs: invalid",
        "--optim: invalid choice", "no variant 'S/15'", "--weight_decay -1", "--train_val_split 1.5",
        "--max_train_samples 0", "--per_device_train_batch_size 0",
    )  # fmt: skip
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (("--hub_token", "x"), "HF_TOKEN"),
        (("--token", "x"), "HF_TOKEN"),
        (("--ignore-mismatched-sizes",), "not needed"),
        (("--do_predict",), "no test split"),
        (("--do_train", "False"), "always trains"),
        (("--prediction_loss_only",), "accuracy"),
        (("--enable_jit_checkpoint",), "its signal handler stays behind"),
        (("--lamb",), "--lamb: is --optim lamb now"),
        (("photos",), "belongs to no flag"),
        (("--train", "photos"), "no such flag"),  # no abbreviations: this could be several
        (("--image_size",), "expected at least one argument"),
        (("--image_size", 1, 2, 3), "two: height and width"),
        (("--variant", "S/16", "--image_size", 100), "must divide"),
        (("--variant", "S/16", "--model_name_or_path", "x"), "Keep one"),
        (("--variant", "S/16", "--config_name", "x"), "Keep one"),
        (("--dataset_name", "digits", "--train_dir", "x"), "Keep one"),
        (("--validation_dir", "x"), "goes with --train_dir"),
        (("--dataset_config_name", "x"), "Hub"),
        (("--num_train_epochs", 0), "above 0"),
        (("--learning_rate", "nan"), "above 0"),
        (("--label_smoothing_factor", 1), "below 1"),
        (("--smallest_area", 0), "at most 1"),
        (("--gradient_accumulation_steps", 0), "at least 1"),
        (("--lr_scheduler_type", "cosin"), "cosin"),  # the Trainer's own message
    ],
)
def test_refused(argv, part):
    assert part in refusal(*argv)


def test_every_flag_from_elsewhere_is_known_to_be_absent():
    options = {*build_parser()._option_string_actions, *(f"--{name}" for name in trainer_flags())}
    assert not options & set(FLAGS_ELSEWHERE)


@pytest.mark.parametrize("content", ["config.json", "checkpoint-3/trainer_state.json"])
def test_no_run_writes_over_another(tmp_path, content):
    (tmp_path / content).parent.mkdir(exist_ok=True)
    (tmp_path / content).write_text("{}")
    assert "already has a model" in refusal("--output_dir", tmp_path)
    assert "already has a model" in refusal("--output_dir", tmp_path, "--resume_from_checkpoint", "False")


def test_resuming_finds_the_latest_checkpoint(tmp_path):
    for step in (3, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({}))
        write_manifest(tmp_path / f"checkpoint-{step}", {})
    latest = str(tmp_path / "checkpoint-12")
    for wish in ("True", "true", latest):
        training, problems = parse("--output_dir", tmp_path, "--resume_from_checkpoint", wish)[2:]
        assert (training.resume_from_checkpoint, problems.messages) == (latest, [])


def test_there_must_be_something_to_resume(tmp_path):
    assert "no checkpoint in" in refusal("--output_dir", tmp_path / "new", "--resume_from_checkpoint", "True")
    assert "no trainer_state.json" in refusal("--output_dir", tmp_path, "--resume_from_checkpoint", tmp_path)


@pytest.mark.parametrize(
    ("exception", "status", "part"),
    [
        (InputError("mend me"), 2, "error: mend me"),
        (TrainingStopped("no number"), 1, "error: no number"),
        (TrainingInterrupted("go on so"), 130, "go on so"),
        (TrainingInterrupted("go on so", signal.SIGTERM), 143, "go on so"),
        (OSError(errno.ENOSPC, "No space left on device", "results.json"), 1, "results.json could not be written"),
        (KeyboardInterrupt(), 130, "Interrupted."),
    ],
)
def test_what_users_cause_ends_with_a_message_and_a_status(exception, status, part, capsys):
    def main():
        raise exception

    assert run_command_line(main) == status
    errors = capsys.readouterr().err
    assert part in errors
    assert "Traceback" not in errors


def test_a_bug_keeps_its_traceback_and_success_is_silent():
    assert run_command_line(lambda: None) == 0
    with pytest.raises(ZeroDivisionError):
        run_command_line(lambda: 1 / 0)


def test_the_default_optimizer_is_transformers_own():
    assert parse()[2].optim == TrainingArguments.default_optim
