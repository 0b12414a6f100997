# SPDX-License-Identifier: Apache-2.0
"""
What training/trainer_overrides.py relies on in transformers, accelerate and torch. A failure here after an upgrade
says what has changed; all of it is mended in that one file.
"""

import inspect
import multiprocessing
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from modeling_vit_scratch.training.optimization import Lamb
from modeling_vit_scratch.training.trainer import ImageTrainer
from modeling_vit_scratch.training.trainer_overrides import TrainerOverrides, WorkerProcesses


# ---------------------------------------------------------------------------------------------------------------------
# transformers


class Numbers(Dataset):
    """Six examples: three batches of two in an epoch."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {"x": torch.tensor([float(index), 1.0]), "labels": torch.tensor(index % 2)}


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x, labels):
        logits = self.layer(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Recorder(Trainer):
    """The stock Trainer, which writes down in which order it calls what we rely on."""

    def __init__(self, folder, **options):
        self.calls, self.redirected = [], None
        arguments = TrainingArguments(
            str(folder), per_device_train_batch_size=2, use_cpu=True, report_to="none", disable_tqdm=True,
            learning_rate=0.1, **{"save_strategy": "no", "max_steps": 2, **options},
        )  # fmt: skip
        super().__init__(Line(), arguments, train_dataset=Numbers(), eval_dataset=Numbers())

    def init_hf_repo(self, *args, **kwargs):
        self.hub_model_id, self.push_in_progress = "owner/name", self

    def is_done(self):
        self.calls.append("is_done")
        return False

    def wait_until_done(self):
        self.calls.append("wait_until_done")

    def get_batch_samples(self, *args, **kwargs):
        self.calls.append("get_batch_samples")
        batches, number = super().get_batch_samples(*args, **kwargs)
        self.batches = list(batches)
        return batches, number

    def training_step(self, model, inputs, *args, **kwargs):
        self.calls.append("training_step")
        assert any(inputs is batch for batch in self.batches)
        return super().training_step(model, inputs, *args, **kwargs)

    def _get_grad_norm(self, model, grad_norm=None):
        self.weights = self.model.layer.weight.detach().clone()
        norm = super()._get_grad_norm(model, grad_norm)
        self.calls += ["_get_grad_norm"]
        assert torch.as_tensor(norm).isfinite()
        return norm

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        step = optimizer.step

        def recorded(*args, **kwargs):
            self.calls.append("optimizer.step")
            assert torch.equal(self.weights, self.model.layer.weight)
            return step(*args, **kwargs)

        optimizer.step = recorded
        return optimizer

    def evaluate(self, *args, **kwargs):
        self.calls.append("evaluate")
        return super().evaluate(*args, **kwargs)

    def _get_output_dir(self, trial):
        return self.redirected or super()._get_output_dir(trial)

    def save_model(self, output_dir=None, _internal_call=False):
        self.calls.append(("save_model", output_dir, _internal_call))
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial):
        self.calls.append("_save_checkpoint")
        super()._save_checkpoint(model, trial)

    def _push_from_checkpoint(self, checkpoint_folder):
        self.calls.append(("_push_from_checkpoint", checkpoint_folder))


def test_these_private_methods_are_replaced_and_no_others():
    signatures = {
        "_get_grad_norm": ["self", "model", "grad_norm"], "_get_output_dir": ["self", "trial"],
        "_prepare_for_training": ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"],
        "_load_optimizer_and_scheduler": ["self", "checkpoint"],
        "_determine_best_metric": ["self", "metrics", "trial"],
        "_save_checkpoint": ["self", "model", "trial"], "_push_from_checkpoint": ["self", "checkpoint_folder"],
    }  # fmt: skip
    assert {name for name in vars(TrainerOverrides) if not name.startswith("__")} == set(signatures)
    for name, parameters in signatures.items():
        assert list(inspect.signature(getattr(Trainer, name)).parameters) == parameters
        assert list(inspect.signature(getattr(TrainerOverrides, name)).parameters) == parameters
    own = {name for name in vars(ImageTrainer) if name.startswith("_") and not name.startswith("__")}
    assert {name for name in own if hasattr(Trainer, name)} == set()
    assert ImageTrainer.__bases__ == (TrainerOverrides, Trainer)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_the_norm_is_asked_for_between_the_gradient_and_the_optimizer(tmp_path, clip):
    trainer = Recorder(tmp_path, gradient_accumulation_steps=2, max_grad_norm=clip)
    trainer.train()
    step = ["get_batch_samples", "training_step", "training_step", "_get_grad_norm", "optimizer.step"]
    assert trainer.calls == [*step, *(step[:1] + step[2:])]  # the epoch ends with one batch


def test_a_checkpoint_is_written_where_the_private_method_says_after_the_evaluation_and_before_on_save(tmp_path):
    calls = []

    class OnSave(TrainerCallback):
        def on_save(self, *args, **kwargs):
            calls.extend([*trainer.calls, "on_save"])

    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    trainer = Recorder(tmp_path / "out", **options, push_to_hub=True, save_total_limit=1, metric_for_best_model="loss")
    trainer.redirected = str(tmp_path / "elsewhere")
    trainer.add_callback(OnSave())
    trainer.train()
    place = str(tmp_path / "elsewhere" / "checkpoint-2")
    expected = ["_save_checkpoint", ("save_model", place, True), ("_push_from_checkpoint", place), "on_save"]
    assert calls[calls.index("evaluate") + 1 :] == expected
    assert not list(Path(tmp_path / "out").glob("*"))
    assert trainer.state.best_model_checkpoint == place
    written = {path.name for path in Path(place).iterdir()}
    assert written >= {"trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", TRAINING_ARGS_NAME}


def test_the_trainer_waits_in_the_end_for_the_push_under_way(tmp_path):
    trainer = Recorder(tmp_path, push_to_hub=True)
    trainer.train()
    assert trainer.calls[-2:] == ["is_done", "wait_until_done"]


def test_the_stock_trainer_takes_one_step_too_many_from_the_last_one_of_a_run(tmp_path):
    trainer = Recorder(tmp_path, save_strategy="steps", save_steps=2)
    assert trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader()) == (1, 3, 6, 4, 2, 3, 2)
    trainer.train()
    again = Recorder(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 3  # 2 once it is mended: then ImageTrainer.set_initial_training_values can go


# ---------------------------------------------------------------------------------------------------------------------
# torch and accelerate


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_fused_optimizers_skip_a_step_that_is_not_finite_and_others_do_not_say_so(kind):
    parameter = nn.Parameter(torch.ones(3))
    optimizer = kind([parameter], lr=0.1, fused=True)
    assert optimizer._step_supports_amp_scaling
    for found_inf, is_skipped in ((1.0, True), (0.0, False)):
        parameter.grad = torch.full((3,), float("nan") if is_skipped else 1.0)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        assert torch.equal(parameter, torch.ones(3)) == is_skipped
    for other in (kind([parameter], lr=0.1), Lamb([parameter])):
        assert not getattr(other, "_step_supports_amp_scaling", False)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("prepare", [lambda loader: loader, Accelerator(cpu=True).prepare], ids=["torch", "accelerate"])
def test_workers_end_at_once_also_where_somebody_holds_their_iterator(prepare, persistent):
    loader = prepare(DataLoader(Numbers(), 2, num_workers=2, persistent_workers=persistent))
    workers = WorkerProcesses()
    assert workers.add(loader) is loader
    held = iter(loader)
    next(held)
    assert len(multiprocessing.active_children()) == 2
    workers.release()
    assert multiprocessing.active_children() == []
    assert len(list(loader)) == 3  # it can be read again
    workers.release()
    assert multiprocessing.active_children() == []
    held.close() if hasattr(held, "close") else None


def test_loaders_that_read_by_themselves_have_nothing_to_end():
    workers = WorkerProcesses()
    loader = workers.add(DataLoader(Numbers(), 2))
    assert len(list(loader)) == 3
    state = torch.get_rng_state()
    next(iter(loader))
    assert torch.equal(torch.get_rng_state(), state)  # the seed of workers is drawn from a generator of its own
    workers.release()
