# SPDX-License-Identifier: Apache-2.0
"""
What relies on private parts of transformers, accelerate and torch, with its reason. A release of theirs may break it:
then tests/test_trainer_overrides.py fails.
"""

import functools
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from transformers import Trainer, TrainerState

from ..common.errors import InputError
from ..data.collation import prepare_workers


class TrainerOverrides:
    """The private methods of transformers' Trainer that `ImageTrainer` replaces: a base class before Trainer."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Called between the last backward pass of a step and the optimizer. No callback gets the norm, and computing it
        # again would take as long as clipping.
        grad_norm = super()._get_grad_norm(model, grad_norm)
        step, is_scaled = self.state.global_step + 1, getattr(self.accelerator, "scaler", None) is not None
        self.step_guard.check(step, self.state.max_steps, grad_norm, skipping_optimizer(self), is_scaled)
        return grad_norm

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # The Trainer keeps the first of equal checkpoints, and on few images many are equal in accuracy.
        if is_better_tie(metrics, self.state, self.args.metric_for_best_model):
            self.state.best_metric = None
        is_best = super()._determine_best_metric(metrics, trial)
        name = (self.args.metric_for_best_model or "loss").removeprefix("eval_")
        self.early_end.after_evaluation(name, self.state, self.control)
        return is_best

    def _get_output_dir(self, trial: Any) -> str:
        # Where the Trainer writes a checkpoint and removes old ones: the staging folder has none.
        return str(self.run_folder.staging) if self.run_folder.is_writing_checkpoint else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # The Trainer writes into the folder with the final name, and removes old checkpoints before the new one is on
        # the disk. on_save comes too late to change that.
        self.step_guard.stop_if_bad()
        metadata = {"settings": self.settings, "broken_images": self.step_guard.broken_images, "images": self.images}
        metadata["samples_seen"] = self.count_samples()
        with self.run_folder.new_checkpoint(self.state, metadata) as folder:
            super()._save_checkpoint(model, trial)
            if self.stream_batches is not None:
                self.stream_batches.save(folder, self.state.global_step * self.args.gradient_accumulation_steps)
        if self.args.push_to_hub and self.is_world_process_zero():
            self.pusher.push_checkpoint(self.run_folder.path / folder.name)
        self.run_folder.rotate(self.state)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        # A resumed run would keep the checkpoint's intervals, and its best score, which may be one of another metric.
        self.state.compute_steps(self.args, max_steps)
        if "--metric_for_best_model" in self.changed:
            self.state.best_metric = self.state.best_model_checkpoint = self.state.best_global_step = None
        result = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self.try_evaluation()  # the last moment before the first step, with the model where it will be evaluated
        return result

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # A loaded optimizer has the checkpoint's learning rates, decays and betas. This run's own are put back.
        if checkpoint is None:
            return
        groups, schedule = self.optimizer.param_groups, self.lr_scheduler
        own = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        is_function = isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)  # of the step alone
        fits = is_function or not {"--learning_rate", "--lr_scheduler_type"} & self.changed
        fits = fits and Path(checkpoint, "scheduler.pt").is_file()  # --save_only_model leaves it out
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (ValueError, KeyError):
            fits = False
        groups = self.optimizer.param_groups  # new ones
        if not fits or any(group.keys() - {"params"} != options.keys() for group, options in zip(groups, own)):
            raise InputError(
                f"--resume_from_checkpoint {checkpoint}: its optimizer or schedule is of another kind, has other "
                "groups of parameters, or was not saved. Give its --optim, --lr_scheduler_type, --layer_decay and "
                "--head_learning_rate_multiplier again, or start anew from its weights: --model_name_or_path."
            )
        for number, (group, options) in enumerate(zip(groups, own)):
            if is_function:
                schedule.base_lrs[number] = options["initial_lr"]
                options["lr"] = options["initial_lr"] * schedule.lr_lambdas[number](schedule.last_epoch)
            else:
                options.pop("lr")
            group.update(options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        pass  # called before the checkpoint has its name; `_save_checkpoint` pushes afterwards


def is_better_tie(metrics: dict[str, float], state: TrainerState, name: str | None) -> bool:
    """Whether an evaluation is as good as the best one, and has a lower loss."""
    if state.best_metric is None or metrics.get(f"eval_{(name or '').removeprefix('eval_')}") != state.best_metric:
        return False
    best = [log for log in state.log_history if log.get("step") == state.best_global_step and "eval_loss" in log]
    return bool(best) and metrics["eval_loss"] < best[0]["eval_loss"]


def skipping_optimizer(trainer: Trainer) -> torch.optim.Optimizer | None:
    """The trainer's optimizer if it skips steps whose `found_inf` is 1, as torch's fused ones on a GPU."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # torch's, inside of accelerate's
    is_able = getattr(optimizer, "_step_supports_amp_scaling", False) and trainer.accelerator.scaler is None
    return optimizer if is_able and trainer.args.device.type == "cuda" and not trainer.is_fsdp_enabled else None


class WorkerProcesses:
    """Ends the workers of data loaders with training: torch, when an iterator is collected, after any traceback."""

    def __init__(self) -> None:
        self.iterators: weakref.WeakSet[Iterator] = weakref.WeakSet()
        self._persistent: weakref.WeakSet[DataLoader] = weakref.WeakSet()

    def add(self, loader: DataLoader) -> DataLoader:
        """Remembers the iterators of a loader."""
        prepare_workers(loader)
        own = getattr(loader, "base_dataloader", loader)  # torch's, inside of accelerate's
        own.generator = torch.Generator()  # worker seeds from the global one would make dropout depend on their number
        own._get_iterator = functools.partial(self._get_iterator, weakref.ref(own))  # weak: the loader holds it
        self._persistent.add(own)
        return loader

    def _get_iterator(self, loader: weakref.ref[DataLoader]) -> Iterator:
        loader = loader()
        iterator = type(loader)._get_iterator(loader)
        self.iterators.add(iterator)
        return iterator

    def release(self) -> None:
        """Ends all worker processes."""
        for iterator in list(self.iterators):
            if isinstance(iterator, _MultiProcessingDataLoaderIter):
                iterator._shutdown_workers()
        for loader in list(self._persistent):
            loader._iterator = None
