# SPDX-License-Identifier: Apache-2.0
"""Stops a run before a loss or a gradient that is not finite reaches the weights; counts images that can't be read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..common.errors import TrainingStopped
from ..common.processes import Processes
from .arguments import ImageTrainingArguments


@dataclass(frozen=True)
class StepCheck:
    """
    The check of a step, made when its gradient is complete and the optimizer has not used it yet.

    Attributes:
        step, max_steps: its number, counted from 1, and the last one's.
        losses, norm: of the accumulated batches, (N,), and of their gradient, ().
        keys: of their images: see `StepGuard`.
        is_scaled: whether only losses count: see `StepGuard.check`.
        is_bad: whether one of these numbers is not finite; on the host, of a GPU only after `copied`.
    """

    step: int
    max_steps: int
    losses: torch.Tensor
    norm: torch.Tensor
    keys: list[torch.Tensor | None]
    is_scaled: bool
    is_bad: torch.Tensor
    copied: torch.cuda.Event | None = None


class StepGuard:
    """
    In every step the trainer calls `begin_step`, for each accumulated batch `add_loss`, and `check`. Before it
    evaluates, saves or ends it calls `stop_if_bad`. All processes call these in the same order.

    Batches may hold "keys" (B, 3) int64: seed, epoch and index of each image; and "broken": pairs of the index of an
    image that can't be read, and the reason.

    Args:
        arguments: of the run.
        processes: all processes of the run.
        image_name: from the index of a training image to its file, or whatever else people know it by.
        log: prints a line for people, once for all processes.
        resume_advice: gives the last sentence of every message.

    Attributes:
        broken_images: of the training images that could not be read so far, by index: why.
        last_keys: of the batches of the latest step.
    """

    def __init__(
        self,
        arguments: ImageTrainingArguments,
        processes: Processes,
        image_name: Callable[[int], str],
        log: Callable[[str], None],
        resume_advice: Callable[[], str],
    ) -> None:
        self.arguments, self.processes, self.image_name = arguments, processes, image_name
        self.log, self.resume_advice = log, resume_advice
        self.broken_images: dict[int, str] = {}
        self.last_keys: list[torch.Tensor | None] = []
        self._losses: list[torch.Tensor] = []
        self._last_check: StepCheck | None = None

    def begin_step(self, batches: list[dict[str, Any]]) -> None:
        """
        Notes which images the batches of a step have.

        Raises:
            TrainingStopped: if more images than --max_broken_images could not be read.
        """
        self.last_keys, self._losses = [batch.get("keys") for batch in batches], []
        if self.arguments.max_broken_images:
            self._count_broken([pair for batch in batches for pair in batch.get("broken", ())])

    def _count_broken(self, pairs: list[tuple[int, str]]) -> None:
        new = {index: reason for index, reason in pairs if index not in self.broken_images}
        if not self.processes.largest(len(new)):
            return
        for index, reason in (pair for part in self.processes.everyones(new) for pair in part.items()):
            if index not in self.broken_images:
                self.broken_images[index] = reason
                self.log(f"broken image {len(self.broken_images)}, another one takes its place: {reason}")
        limit = self.arguments.max_broken_images
        if len(self.broken_images) > limit:
            lines = "".join(f"\n    {reason}" for reason in self.broken_images.values())
            raise TrainingStopped(
                f"{len(self.broken_images)} training images can't be read, more than --max_broken_images {limit}:"
                f"{lines}\nRepair or remove them, or raise the limit. {self.resume_advice()}",
                is_shared=True,
            )

    def add_loss(self, loss: torch.Tensor) -> None:
        """Notes the loss of an accumulated batch, ()."""
        self._losses.append(loss)

    def check(
        self,
        step: int,
        max_steps: int,
        norm: torch.Tensor | float,
        skipping: torch.optim.Optimizer | None = None,
        is_scaled: bool = False,
    ) -> None:
        """
        Checks a step before the optimizer takes it.

        To read a number means to wait for the device. An optimizer that can skip a step by itself is told on the device
        to do so, and the run stops when the gradient of the next step is there: nothing waits.

        Args:
            step, max_steps: its number, counted from 1, and the last one's.
            norm: of the gradient.
            skipping: the optimizer, if it skips a step that its `found_inf` is 1 for.
            is_scaled: whether a scaler of float16 skips steps whose gradient overflows: then only losses are checked.

        Raises:
            TrainingStopped: if this step is bad, or where steps are skipped the one before.
        """
        norm = torch.as_tensor(norm.full_tensor() if hasattr(norm, "full_tensor") else norm).detach()
        losses = torch.stack(self._losses).float()
        numbers = losses if is_scaled else torch.cat([losses, norm.to(losses).reshape(1)])
        is_bad, copied = numbers.isfinite().all().logical_not(), None
        self.stop_if_bad()  # the step before
        if skipping is not None:
            skipping.found_inf = is_bad.float()
            if is_bad.is_cuda:
                is_bad = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(is_bad, non_blocking=True)
                copied = torch.cuda.Event()
                copied.record()
        self._last_check = StepCheck(step, max_steps, losses, norm, self.last_keys, is_scaled, is_bad, copied)
        if skipping is None:
            self.stop_if_bad()

    def stop_if_bad(self) -> None:
        """Raises TrainingStopped if the step that was checked last has a loss or a gradient that is not finite."""
        check, self._last_check = self._last_check, None
        if check is None:
            return
        if check.copied is not None:
            check.copied.synchronize()
        if check.is_bad:
            self._stop(check)

    def _stop(self, check: StepCheck) -> None:
        """Every process names its images. All have one gradient: if that is bad, all of them stop here."""
        arguments, losses = self.arguments, check.losses.tolist()
        is_everywhere = not (check.is_scaled or check.norm.isfinite())
        process = f"process {arguments.process_index}, " if arguments.world_size > 1 else ""
        lines = [
            f"    {process}batch {number} of {len(losses)}, loss {loss:.4g}: {', '.join(self._names(keys))}"
            for number, (loss, keys) in enumerate(zip(losses, check.keys), start=1)
        ]
        bad_loss = next((loss for loss in losses if not torch.tensor(loss).isfinite()), None)
        if is_everywhere:
            everyones = self.processes.everyones((bad_loss, lines))
            lines = [line for _, part in everyones for line in part]
            bad_loss = next((loss for loss, _ in everyones if loss is not None), None)
        found = f"The gradient's norm is {float(check.norm):g}" if bad_loss is None else f"The loss is {bad_loss:g}"
        raise TrainingStopped(
            f"{found} at step {check.step} of {check.max_steps}. The weights are those of the step before. The images "
            "of this step:\n" + "\n".join(lines) + "\nUsual ways out: a lower --learning_rate "
            f"({arguments.learning_rate:g} now), more --warmup_steps, --max_grad_norm 1, --bf16 False. "
            + self.resume_advice(),
            is_shared=is_everywhere,
        )

    def _names(self, keys: torch.Tensor | None) -> list[str]:
        return ["?"] if keys is None else [self.image_name(int(index)) for index in keys[:, 2]]
