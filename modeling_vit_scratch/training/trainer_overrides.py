# SPDX-License-Identifier: Apache-2.0
"""
All that relies on private parts of transformers, accelerate and torch: what one of their releases may break.

Each has its reason, and tests/test_trainer_overrides.py fails when what it relies on has changed.
"""

import functools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from transformers import Trainer

from ..data.loader import prepare_workers


class TrainerOverrides:
    """The private methods of transformers' Trainer that `ImageTrainer` replaces. It is a base class before Trainer."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # The Trainer calls this between the last backward pass of a step and the optimizer. No callback gets the norm,
        # and to compute it a second time would take as long as to clip it.
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.step_guard.check(
            self.state.global_step + 1,
            self.state.max_steps,
            grad_norm,
            skipping=skipping_optimizer(self),
            is_scaled=getattr(self.accelerator, "scaler", None) is not None,
        )
        return grad_norm

    def _get_output_dir(self, trial: Any) -> str:
        # Where the Trainer writes a checkpoint, and looks for old ones to remove: in the staging folder there are none.
        return str(self.run_folder.staging) if self.run_folder.is_writing_checkpoint else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # The Trainer writes into a folder that has its final name from the start, and removes old ones before a new one
        # is on the disk. on_save comes after that.
        self.step_guard.stop_if_bad()
        metadata = {"settings": self.settings, "broken_images": self.step_guard.broken_images}
        with self.run_folder.new_checkpoint(self.state, metadata) as folder:
            super()._save_checkpoint(model, trial)
            if self.stream_position is not None:
                self.stream_position.save(folder, self.state.global_step * self.args.gradient_accumulation_steps)
        if self.args.push_to_hub and self.is_world_process_zero():
            self.pusher.push_checkpoint(self.run_folder.path / folder.name)
        self.run_folder.rotate(self.state)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The Trainer calls this while the checkpoint has no name yet. `_save_checkpoint` above pushes afterwards.
        pass


def skipping_optimizer(trainer: Trainer) -> torch.optim.Optimizer | None:
    """
    The trainer's optimizer, if it skips a step that its `found_inf` is 1 for: torch's fused ones, on a GPU. What they
    have for the scaler of float16 is of use without one, too; nothing public says which optimizers have it.
    """
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # inside of accelerate's, torch's own
    is_able = getattr(optimizer, "_step_supports_amp_scaling", False) and trainer.accelerator.scaler is None
    return optimizer if is_able and trainer.args.device.type == "cuda" and not trainer.is_fsdp_enabled else None


class WorkerProcesses:
    """
    The processes that read images for some loaders. torch remembers a loader's iterator, which has them, only while
    they are persistent; it ends them when somebody collects the garbage, and waits five seconds for each if what it
    ends them with is gone by then. A run that failed would leave them for as long as its error is looked at.
    """

    def __init__(self) -> None:
        self.iterators: weakref.WeakSet[Iterator] = weakref.WeakSet()
        self._persistent: weakref.WeakSet[DataLoader] = weakref.WeakSet()

    def add(self, loader: DataLoader) -> DataLoader:
        """
        A loader of accelerate's or torch's, whose iterators it remembers from now on. The loader gets a generator of
        its own, from which it draws a seed for its workers in every epoch, or once if they stay alive: from the global
        one, dropout would depend on how many there are.
        """
        prepare_workers(loader)
        own = getattr(loader, "base_dataloader", loader)  # inside of accelerate's, torch's own
        own.generator = torch.Generator()
        own._get_iterator = functools.partial(self._get_iterator, weakref.ref(own))  # it must not hold itself
        self._persistent.add(own)
        return loader

    def _get_iterator(self, loader: weakref.ref[DataLoader]) -> Iterator:
        loader = loader()
        iterator = type(loader)._get_iterator(loader)
        self.iterators.add(iterator)
        return iterator

    def release(self) -> None:
        """Ends all of them, now."""
        for iterator in list(self.iterators):
            if isinstance(iterator, _MultiProcessingDataLoaderIter):
                iterator._shutdown_workers()
        for loader in list(self._persistent):
            if loader._iterator is not None:
                loader._iterator = None
