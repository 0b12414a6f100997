# SPDX-License-Identifier: Apache-2.0
"""The Trainer: what decays, accumulation, resuming bit by bit in the middle of an epoch, sick losses, Ctrl-C."""

import json
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_images import CLASSES, ROOT, build, class_folders, difference, flags, weights
from transformers import Trainer, TrainerCallback

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchImageProcessor
from modeling_vit_scratch.augmentation.photo import DigitAugmentation, PhotoAugmentation
from modeling_vit_scratch.common.errors import InputError, TrainingInterrupted, TrainingStopped
from modeling_vit_scratch.training.build import input_size
from modeling_vit_scratch.training.progress import Progress, time_line, undecided_line
from modeling_vit_scratch.training.trainer import ImageTrainer


# ---------------------------------------------------------------------------------------------------------------------
# What decays


def test_kernels_decay_and_nothing_else():
    config = ViTScratchConfig.from_variant(
        "test/4", num_labels=3, num_register_tokens=2, qk_norm=True, layer_scale_init_value=0.1, representation_size=8
    )
    model = ViTScratchForImageClassification(config)
    trainer = ImageTrainer.__new__(ImageTrainer)
    decaying = set(trainer.get_decay_parameter_names(model))
    layer = {"attention.qkv.weight", "attention.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
    assert decaying == {
        *(f"vit.layers.{i}.{name}" for i in range(2) for name in layer),
        "vit.embeddings.patch_embeddings.projection.weight", "vit.pooler.dense.weight", "classifier.weight",
    }  # fmt: skip
    names = {name for name, _ in model.named_parameters()}
    assert decaying < names
    stock = set(Trainer.get_decay_parameter_names(trainer, model))
    assert {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings.weight"} <= stock - decaying


def test_the_optimizer_decays_them_so(pets, tmp_path):
    trainer = build(tmp_path / "out", *flags(pets, "--weight_decay", "0.3"))
    groups = trainer.create_optimizer().param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert sum(parameter.numel() for group in groups for parameter in group["params"]) == trainer.model.num_parameters()
    assert id(trainer.model.vit.embeddings.cls_token) in {id(parameter) for parameter in groups[1]["params"]}


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def test_accumulating_two_half_batches_is_one_whole_batch(pets, tmp_path):
    sgd = ["--optim", "sgd", "--learning_rate", "0.1", "--lr_scheduler_type", "constant", "--max_steps", "3"]
    results = {}
    for name, batch, accumulation in (("whole", "8", "1"), ("halves", "4", "2"), ("quarters", "2", "4")):
        trainer = build(
            tmp_path / name, *flags(pets, *sgd, "--warmup_steps", "0", "--per_device_train_batch_size", batch),
            "--gradient_accumulation_steps", accumulation,
        )  # fmt: skip
        start = weights(trainer)
        trainer.train()
        end = weights(trainer)
        results[name] = torch.cat([(end[key] - start[key]).flatten() for key in end])
    for name in ("halves", "quarters"):
        assert results[name].norm() / results["whole"].norm() == pytest.approx(1.0, abs=1e-4)
        assert torch.allclose(results[name], results["whole"], atol=1e-6)
    assert results["whole"].norm() > 0.01


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_in_the_middle_of_an_epoch_is_exact(pets, tmp_path, workers):
    # Steps 6 and 12 lie in the second and third epoch of five steps: augmentation must be that of these epochs.
    more = ["--max_steps", "13", "--dataloader_num_workers", str(workers)]
    more += ["--save_strategy", "steps", "--save_steps", "6", "--save_total_limit", "9"]
    straight = build(tmp_path / "straight", *flags(pets, *more))
    straight.train()
    expected = weights(straight)
    for checkpoint in ("checkpoint-6", "checkpoint-12"):
        resumed = build(tmp_path / f"from {checkpoint}", *flags(pets, *more))
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / checkpoint))
        assert resumed.state.global_step == 13
        assert difference(weights(resumed), expected) == 0.0


def test_a_run_ends_when_its_hours_are_over_and_goes_on_exactly(pets, tmp_path):
    kinds = ("epoch", "steps")
    for kind in kinds:
        more = ["--num_train_epochs", "2", "--eval_strategy", kind, "--save_strategy", kind]
        short = build(tmp_path / kind, *flags(pets, *more, "--max_hours", "1e-9"))
        short.train()
        assert short.early_end.reason == "at step 1 of 10: --max_hours 1e-09 are over"
        steps = [log["step"] for log in short.state.log_history if "eval_loss" in log]
        assert (steps, short.state.best_global_step) == ([1], 1)
        assert [path.name for path in (tmp_path / kind).glob("checkpoint-*")] == ["checkpoint-1"]
    resumed = build(tmp_path / "epoch", *flags(pets, *more, "--resume_from_checkpoint", "True"))
    resumed.train(resume_from_checkpoint=True)
    assert (resumed.state.global_step, resumed.early_end.reason) == (10, None)
    straight = build(tmp_path / "straight", *flags(pets, *more))
    straight.train()
    assert difference(weights(resumed), weights(straight)) == 0.0


def test_a_run_ends_early_where_evaluations_do_not_get_better_and_ends_with_the_best(pets, tmp_path):
    same = ["--learning_rate", "1e-30", "--weight_decay", "0", "--eval_strategy", "epoch", "--save_strategy", "epoch"]
    same += ["--num_train_epochs", "6"]
    trainer = build(tmp_path / "out", *flags(pets, *same, "--early_stopping_patience", "2"))
    trainer.train()
    assert trainer.state.best_global_step == 5
    why = "no better accuracy than at step 5 in 2 evaluations, --early_stopping_patience 2"
    assert trainer.early_end.reason == f"at step 15 of 30: {why}"
    more = ["--early_stopping_patience", "3", "--resume_from_checkpoint", "True"]
    longer = build(tmp_path / "out", *flags(pets, *same, *more))
    longer.train(resume_from_checkpoint=True)
    assert (longer.state.global_step, longer.state.best_global_step) == (20, 5)
    with pytest.raises(InputError, match="--early_stopping_patience needs evaluations and checkpoints"):
        build(tmp_path / "none", *flags(pets, "--early_stopping_patience", "2"))


def test_every_epoch_augments_anew_and_tells_the_training_set_so(pets, tmp_path):
    trainer, seen = build(tmp_path / "out", *flags(pets, "--num_train_epochs", "3")), []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(int(trainer.train_dataset._epoch))

    trainer.add_callback(Watch())
    trainer.train()
    assert seen == [0] * 5 + [1] * 5 + [2] * 5


def test_the_model_sees_what_the_processor_makes_mixed_and_the_trainer_remembers_of_which_examples(pets, tmp_path):
    more = ["--mixup", "0.8", "--gradient_accumulation_steps", "2", "--max_steps", "2", "--bf16", "True"]
    trainer, seen, keys = build(tmp_path / "out", *flags(pets, *more)), [], []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            keys.append([batch.tolist() for batch in trainer.step_guard.last_keys])

    trainer.add_callback(Watch())
    trainer.model.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(kwargs["pixel_values"].clone()), with_kwargs=True
    )
    trainer.train()
    assert len(seen.pop(0)) == 6  # the held-out images, on which the evaluation is tried
    assert [[len(batch) for batch in step] for step in keys] == [[4, 4], [4, 4]]
    for pixels, batch in zip(seen, [batch for step in keys for batch in step]):
        assert pixels.dtype == torch.float32  # also where the network computes in bfloat16
        images = [trainer.train_dataset[index]["pixel_values"] for _, _, index in batch]
        arrays = [image.permute(1, 2, 0).numpy() for image in images]
        plain = trainer.processing_class(arrays, do_resize=False, return_tensors="pt")["pixel_values"].double()
        before = plain.roll(1, 0)
        weight = ((pixels - before) * (plain - before)).sum() / (plain - before).square().sum()
        assert 0 < weight < 1
        assert torch.allclose(pixels.double(), weight * plain + (1 - weight) * before, atol=1e-6)


def test_held_out_images_reach_the_model_as_the_processor_makes_them(pets, tmp_path):
    trainer, seen = build(tmp_path / "out", *flags(pets)), []
    trainer.model.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(kwargs["pixel_values"].clone()), with_kwargs=True
    )
    trainer.evaluate()
    held_out = trainer.eval_dataset.examples
    images = [held_out.decode(index, trainer.processing_class) for index in range(len(held_out))]
    assert torch.equal(torch.cat(seen), trainer.processing_class(images, return_tensors="pt")["pixel_values"])
    assert trainer.step_guard.last_keys == []


def test_a_checkpoint_of_other_labels_or_another_network_is_refused(pets, tmp_path):
    build(tmp_path / "a", *flags(pets, "--max_steps", "1", "--save_strategy", "steps")).train()
    other = str(class_folders(tmp_path / "other", classes=CLASSES[:2]))
    with pytest.raises(InputError, match="id2label, label2id differ"):
        build(tmp_path / "b", *flags(other)).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    with pytest.raises(InputError, match="patch_size differ"):
        build(tmp_path / "b", *flags(pets, "--patch_size", "8")).train(
            resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1")
        )


def test_the_finished_folder_is_the_best_checkpoint_and_every_image_counts_once(pets, tmp_path):
    more = ["--num_train_epochs", "3", "--dataloader_drop_last", "True", "--per_device_eval_batch_size", "4"]
    trainer = build(tmp_path / "out", "--train_dir", pets, "--train_val_split", "0.25", *more)
    trainer.train()
    assert trainer.state.global_step == 3 * 4  # the last two of 18 images are dropped, as asked
    scores = trainer.evaluate()
    assert scores["eval_images"] == 6
    assert scores["eval_accuracy"] == trainer.state.best_metric
    trainer.save_model()
    for key, tensor in ViTScratchForImageClassification.from_pretrained(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[key])
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) <= 2


# ---------------------------------------------------------------------------------------------------------------------
# Runs that end early


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run_before_it_reaches_the_weights(pets, tmp_path, value):
    trainer = build(tmp_path / "out", *flags(pets, "--save_strategy", "steps", "--save_steps", "2"))
    healthy, steps = trainer.model.loss_function, []

    def sick(*args, **kwargs):
        if trainer.model.training:  # not when the evaluation is tried
            steps.append(trainer.state.global_step)
        return healthy(*args, **kwargs) * (value if len(steps) == 4 else 1.0)

    trainer.model.loss_function = sick
    with pytest.raises(TrainingStopped, match=r"(?s)step 4 of 50.*checkpoint-2.*--resume_from_checkpoint True"):
        trainer.train()
    assert multiprocessing.active_children() == []  # those that read images have ended with the run
    assert steps == [0, 1, 2, 3]
    trainer.args.dataloader_num_workers, trainer.args.dataloader_persistent_workers = 2, True
    trainer.evaluate()
    assert multiprocessing.active_children() == []  # here neither
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())


class InterruptAt(TrainerCallback):
    """A signal during a step, and after so many seconds each, more of them."""

    def __init__(self, step, number=signal.SIGINT, again=()):
        self.step, self.number, self.again = step, number, again

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)
            for seconds in self.again:
                time.sleep(seconds)
                os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("step", [6, 9])  # in the middle of the second epoch, and its last step
def test_ctrl_c_saves_a_checkpoint_from_which_a_run_goes_on_exactly(pets, tmp_path, step, capfd):
    before = signal.getsignal(signal.SIGINT)
    more = ["--train_dir", pets, "--train_val_split", "0.25", "--num_train_epochs", "3"]
    straight = build(tmp_path / "straight", *more)
    straight.train()
    stopped = build(tmp_path / "out", *more)
    stopped.add_callback(InterruptAt(step))
    with pytest.raises(
        TrainingInterrupted, match=f"Interrupted at step {step + 1} of 15.*checkpoint-{step + 1}: to go on"
    ):
        stopped.train()
    assert "Once more to stop at once" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    resumed = build(tmp_path / "again", *more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step + 1}"))
    assert difference(weights(resumed), weights(straight)) == 0.0
    evaluations = [[log for log in run.state.log_history if "eval_loss" in log] for run in (resumed, straight)]
    assert [log["eval_loss"] for log in evaluations[0]] == [log["eval_loss"] for log in evaluations[1]]


def test_ctrl_c_twice_stops_at_once_but_one_that_comes_twice_is_one(pets, tmp_path):
    trainer = build(tmp_path / "out", *flags(pets))
    trainer.add_callback(InterruptAt(2, again=[0.0, 1.05]))
    with pytest.raises(TrainingInterrupted, match=r"step 2 of 50\. No checkpoint was saved yet"):
        trainer.train()


# ---------------------------------------------------------------------------------------------------------------------
# The rest


def test_a_push_does_not_replace_the_card(pets, tmp_path):
    trainer = build(tmp_path / "out", *flags(pets))
    (tmp_path / "out" / "README.md").write_text("ours")
    trainer.create_model_card(model_name="x")
    assert (tmp_path / "out" / "README.md").read_text() == "ours"


def test_digits_move_and_photos_are_cropped(pets, tmp_path):
    digits = build(tmp_path / "a", "--dataset_name", "digits", "--max_train_samples", "20", "--verify_images", "False")
    assert isinstance(digits.train_dataset.augmentation, DigitAugmentation)
    assert digits.train_dataset[0]["pixel_values"].shape == (1, 16, 24)
    photos = build(tmp_path / "b", *flags(pets, "--smallest_area", "0.5"))
    assert isinstance(photos.train_dataset.augmentation, PhotoAugmentation)
    assert photos.train_dataset.augmentation.smallest_area == 0.5
    assert photos.eval_dataset.augmentation is None


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"size": {"height": 8, "width": 12}}, (8, 12)),
        ({"size": {"shortest_edge": 30}, "do_center_crop": True, "crop_size": {"height": 20, "width": 28}}, (20, 28)),
        ({"size": {"shortest_edge": 30}}, (16, 24)),
    ],
)
def test_the_size_that_augmentation_aims_at_is_what_the_processor_makes(settings, size):
    assert input_size(ViTScratchImageProcessor(**settings), ViTScratchConfig.from_variant("test/4")) == size


def test_progress_tells_one_short_line_for_each_report(pets, tmp_path, capsys):
    trainer = build(tmp_path / "out", "--train_dir", pets, "--max_steps", "2", "--disable_tqdm", "False")
    assert any(isinstance(callback, Progress) for callback in trainer.callback_handler.callbacks)
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert [line.split()[2] for line in lines] == ["training", "training", "held"][-len(lines) :]
    assert "accuracy" in lines[-1]
    assert "runtime" not in "".join(lines)


def test_a_log_file_gets_one_line_an_epoch_and_no_bar(pets, tmp_path, capfd):
    trainer = build(tmp_path / "out", "--train_dir", pets, "--num_train_epochs", "3", "--train_val_split", "0.25")
    trainer.train()
    scores = trainer.evaluate()
    printed, errors = capfd.readouterr()
    lines = [line for line in printed.splitlines() if line.startswith("epoch")]
    assert [line.split(":")[0] for line in lines] == [f"epoch {n}, step {5 * n} of 15" for n in (1, 2, 3)]
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert f": loss {np.mean(logged[len(logged) // 3 : 2 * len(logged) // 3]):.4g}; held out: loss " in lines[1]
    assert "it/s" not in printed + errors
    assert "{" not in printed  # the Trainer's own reports
    assert 0 <= scores["eval_accuracy"] <= 1


def test_the_time_of_a_run_is_told_and_what_would_be_shorter():
    assert time_line(0.5, 100, (224, 224)) == "About 50 seconds to go: 100 steps of 0.5 seconds, and the evaluations."
    assert "About 42 minutes" in time_line(2.5, 1000, (224, 192))
    assert "now 224 x 192" in time_line(2.5, 1000, (224, 192))
    assert time_line(10, 3600, (224, 224)).startswith("About 10.0 hours")


def test_the_time_is_told_once_after_the_first_steps(pets, tmp_path, capsys):
    build(tmp_path / "out", *flags(pets, "--max_steps", "41", "--logging_steps", "100")).train()
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("About")]
    assert len(told) == 1
    assert ": 31 steps of " in told[0]


def test_arguments_are_saved_without_a_token(pets, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    trainer = build(tmp_path / "out", *flags(pets, "--max_steps", "1"))
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    for file in Path(tmp_path / "out").iterdir():
        assert b"hf_secret" not in file.read_bytes(), file
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 1


def test_scores_that_are_hardly_apart_are_told(pets, tmp_path):
    trainer = build(tmp_path / "out", *flags(pets, "--max_steps", "2", "--learning_rate", "1e-6"))
    torch.nn.init.zeros_(trainer.model.classifier.weight)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    assert abs(loss - np.log(3)) < 0.1  # three classes
    told = (
        f"The scores of the 3 classes are hardly apart: the loss is {loss:.3g} on held-out images, and that of a guess"
    )
    assert undecided_line(trainer, loss).startswith(told)
    assert undecided_line(trainer, 0.6) is None
    trainer.state.log_history += [{"loss": 0.01}] * 10  # sure of itself, and wrong on held-out images
    assert undecided_line(trainer, loss) is None
    other = build(tmp_path / "other", *flags(pets, "--max_steps", "2", "--loss", "sigmoid"))
    assert undecided_line(other, np.log(3)) is None


def test_tensorboard_gets_the_losses(pets, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    build(tmp_path / "out", *flags(pets, "--max_steps", "3", "--report_to", "tensorboard")).train()
    (file,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    read = events.EventAccumulator(str(file))
    read.Reload()
    assert {"train/loss", "train/learning_rate"} <= set(read.Tags()["scalars"])
    assert all(np.isfinite(event.value) for event in read.Scalars("train/loss"))


def test_trackio_gets_the_losses(pets, tmp_path, monkeypatch):
    trackio, logged = pytest.importorskip("trackio"), []
    # Without its server, which is a process of its own.
    monkeypatch.setattr(trackio, "init", lambda **options: logged.append(options))
    monkeypatch.setattr(trackio, "log", lambda metrics, **options: logged.append(metrics))
    monkeypatch.setattr(trackio, "finish", lambda: None)
    words = flags(pets, "--max_steps", "3", "--report_to", "trackio", "--project", "pets")
    trainer = build(tmp_path / "out", *words)
    trainer.train()
    assert logged[0]["project"] == "pets"
    assert any("train/loss" in metrics for metrics in logged)


def test_the_search_of_the_docs_finds_the_best_rate(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    page = (ROOT / "docs" / "howto" / "track.md").read_text(encoding="utf-8")
    program = re.search(r"```py\n(.*?)```", page, flags=re.DOTALL)[1].replace("n_trials=10", "n_trials=3")
    monkeypatch.chdir(tmp_path)

    def finetune(command, check):
        rate, folder = (command[command.index(flag) + 1] for flag in ("--learning_rate", "--output_dir"))
        Path(folder).mkdir(parents=True)
        Path(folder, "results.json").write_text(json.dumps({"value": float(rate)}))

    monkeypatch.setattr("subprocess.run", finetune)
    names = {}
    exec(program, names)
    assert len(names["study"].trials) == 3
    assert names["study"].best_value == max(trial.params["learning_rate"] for trial in names["study"].trials)


def test_memory_that_runs_out_is_said_with_the_ways_out(pets, tmp_path, monkeypatch):
    trainer = build(tmp_path / "out", *flags(pets, "--max_steps", "3"))

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee documentation.")

    monkeypatch.setattr(trainer.model, "forward", full)
    with pytest.raises(TrainingStopped, match=r"Out of memory at step 1: .* 2 GiB\. Ways out: .* \(4 now\)") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
