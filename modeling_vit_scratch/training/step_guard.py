# SPDX-License-Identifier: Apache-2.0
"""Stops a run before a non-finite loss or gradient reaches the weights; counts images that can't be read."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..common.errors import TrainingStopped
from ..common.processes import Processes
from .trainer_overrides import ImageTrainingArguments


@dataclass(frozen=True)
class StepCheck:
    """The numbers of a step, checked when its gradient is complete and the optimizer has not used it yet."""

    step: int  # counted from 1
    max_steps: int
    losses: torch.Tensor  # (N,), of the accumulated batches
    norm: torch.Tensor  # (), of their gradient
    keys: list[torch.Tensor | None]  # of their images: see `StepGuard`
    is_scaled: bool  # whether only losses count: see `StepGuard.check`
    is_non_finite: torch.Tensor  # () bool, on the host; for a GPU it is valid after `copied`
    copied: torch.cuda.Event | None = None


@dataclass
class StepGuard:
    """
    In every step the trainer calls `begin_step`, `add_loss` for each accumulated batch, and `check`. It calls
    `stop_if_bad` before it evaluates, saves or ends. All processes call these in the same order.

    Batches may hold "keys" (B, 3) int64, the seed, epoch and index of each image; and "broken", pairs of the index of
    an unreadable image and the reason.
    """

    arguments: ImageTrainingArguments
    processes: Processes
    image_name: Callable[[int], str]  # from the index of a training image to its file or another name
    log: Callable[[str], None]  # prints a line, once for all processes
    resume_advice: Callable[[], str]  # returns the last sentence of every message
    broken_images: dict[int, str] = field(default_factory=dict)  # reasons by index of a training image
    last_keys: list[torch.Tensor | None] = field(default_factory=list)  # of the batches of the latest step
    _losses: list[torch.Tensor] = field(default_factory=list)
    _last_check: StepCheck | None = None

    def begin_step(self, batches: list[dict[str, Any]]) -> None:
        """Notes the images of a step. Raises TrainingStopped if more than --max_broken_images could not be read."""
        self.last_keys, self._losses = [batch.get("keys") for batch in batches], []
        if self.arguments.max_broken_images:
            self._count_broken([pair for batch in batches for pair in batch.get("broken", ())])

    def _count_broken(self, pairs: list[tuple[int, str]]) -> None:
        new = {index: reason for index, reason in pairs if index not in self.broken_images}
        if not self.processes.maximum(len(new)):
            return
        for index, reason in (pair for part in self.processes.gather(new) for pair in part.items()):
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
        """Notes the loss of an accumulated batch, a scalar."""
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

        Reading a number waits for the device. So an optimizer that can skip a step does so on the device, and the run
        stops one step later.

        Args:
            step, max_steps: its number, counted from 1, and that of the last step.
            norm: of the gradient.
            skipping: the optimizer, if it skips steps whose `found_inf` is 1.
            is_scaled: whether a scaler of float16 skips steps whose gradient overflows: then only losses are checked.

        Raises:
            TrainingStopped: if this step is not finite; with `skipping`, if the one before was not.
        """
        norm = torch.as_tensor(norm.full_tensor() if hasattr(norm, "full_tensor") else norm).detach()
        losses = torch.stack(self._losses).float()
        numbers = losses if is_scaled else torch.cat([losses, norm.to(losses).reshape(1)])
        is_non_finite, copied = numbers.isfinite().all().logical_not(), None
        self.stop_if_bad()  # the step before
        if skipping is not None:
            skipping.found_inf = is_non_finite.float()
            if is_non_finite.is_cuda:
                on_host = torch.empty((), dtype=torch.bool, pin_memory=True)
                is_non_finite = on_host.copy_(is_non_finite, non_blocking=True)
                copied = torch.cuda.Event()
                copied.record()
        self._last_check = StepCheck(step, max_steps, losses, norm, self.last_keys, is_scaled, is_non_finite, copied)
        if skipping is None:
            self.stop_if_bad()

    def stop_if_bad(self) -> None:
        """Raises TrainingStopped if the step that was checked last has a non-finite loss or gradient."""
        check, self._last_check = self._last_check, None
        if check is None:
            return
        if check.copied is not None:
            check.copied.synchronize()
        if check.is_non_finite:
            self._stop(check)

    def _stop(self, check: StepCheck) -> None:
        """Every process names its images. They share the gradient: if it is not finite, all of them stop here."""
        arguments, losses = self.arguments, check.losses.tolist()
        is_everywhere = not (check.is_scaled or check.norm.isfinite())
        process = f"process {arguments.process_index}, " if arguments.world_size > 1 else ""
        lines = [
            f"    {process}batch {number} of {len(losses)}, loss {loss:.4g}: {', '.join(self._names(keys))}"
            for number, (loss, keys) in enumerate(zip(losses, check.keys), start=1)
        ]
        bad_loss = next((loss for loss in losses if not torch.tensor(loss).isfinite()), None)
        if is_everywhere:
            gathered = self.processes.gather((bad_loss, lines))
            lines = [line for _, part in gathered for line in part]
            bad_loss = next((loss for loss, _ in gathered if loss is not None), None)
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
