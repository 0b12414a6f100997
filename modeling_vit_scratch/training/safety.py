# SPDX-License-Identifier: Apache-2.0
"""A run that is safe to stop: whole checkpoints and models, no step that is not finite, a checkpoint at Ctrl-C."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..common import files
from ..common.errors import InputError, TrainingInterrupted, TrainingStopped, lost_worker
from ..common.processes import Processes, StopSignals, has_lost_contact
from ..configuration_vit_scratch import ViTScratchConfig


# Fields of a configuration that a checkpoint and the model that resumes from it need not share.
_NOT_COMPARED = {"transformers_version", "dtype", "auto_map", "architectures", "_name_or_path", "use_cache"}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for each setting in which a resumed run differs from the run of its checkpoint."""
    before, now = (json.loads(json.dumps(settings)) for settings in (before, now))  # a tuple comes back as a list
    if before.pop("--lamb", False):  # as --optim lamb was once given
        before["--optim"] = "lamb"

    def shown(value: Any) -> str:
        return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)

    return [
        f"{name}: {shown(now.get(name))} now, {shown(before.get(name))} in the checkpoint's run"
        for name in sorted(before)  # an earlier version may lack some
        if before[name] != now.get(name)
    ]


def check_same_model(config: ViTScratchConfig, checkpoint: str) -> None:
    """Raises InputError if a checkpoint has another configuration: the Trainer would load any weights that fit."""
    ours = json.loads(config.to_json_string())
    theirs = json.loads(Path(checkpoint, "config.json").read_text(encoding="utf-8"))
    theirs = {"temperature": 1.0, "calibrated": True, **theirs}  # older checkpoints have neither
    different = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    different = [name for name in different if name not in _NOT_COMPARED]
    if different:
        raise InputError(
            f"--resume_from_checkpoint {checkpoint} is of another model: {', '.join(different)} differ. Give the flags "
            "and the data of the first run, or start a new one in another --output_dir."
        )


# What torch and safetensors raise instead of an OSError if a file can't be written.
_WRITING_FAILED = re.compile(r"PytorchStreamWriter|unexpected pos|file write failed|iostream error", re.IGNORECASE)


class RunFolder:
    """--output_dir during training. Files that are not complete are in `staging`. `checkpoint_size` is in bytes."""

    def __init__(
        self, arguments: TrainingArguments, processes: Processes, log: Callable[[str], None], checkpoint_size: int
    ) -> None:
        self.arguments, self.processes, self.log, self.checkpoint_size = arguments, processes, log, checkpoint_size
        self.path = Path(arguments.output_dir)
        self.staging, self.is_writing_checkpoint = self.path / files.STAGING, False
        self._lock: IO[str] | None = None

    def prepare(self, resumes: bool = False) -> None:
        """Locks the folder and cleans it up. Raises InputError if another run has it or a checkpoint has no room."""
        if not self.arguments.should_save:
            return
        if self._lock is None:
            self._lock = files.lock(self.path / "_lock", f"--output_dir {self.path}")  # uploads leave out "_*"
            if not resumes and (self.path / "config.json").exists():
                raise InputError(f"Another run has left its model in --output_dir {self.path}. Choose another one.")
        if files.remove_staging(self.path):
            self.log(f"Removed {self.staging}: unfinished files of a run that was killed.")
        if self.arguments.save_strategy == "no":
            return
        folder, size = self.path.resolve(), self.checkpoint_size
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free
        if free < size:
            raise InputError(
                f"A checkpoint takes about {_megabytes(size)}, but {_megabytes(free)} are free in {folder}. Make room, "
                "choose another --output_dir, or leave out checkpoints: --save_strategy no."
            )
        # While a checkpoint is written, the one that it replaces is still there.
        limit, present = self.arguments.save_total_limit or 1, len(files.find_checkpoints(folder))
        needed = max(limit + 1 - present, 1) * size
        if free < needed:
            self.log(
                f"warning: {_megabytes(free)} are free in {folder}, and the checkpoints of this run may take "
                f"{_megabytes(needed)}. If the disk gets full, the run stops. A lower --save_total_limit needs less."
            )

    def checkpoint_to_resume(self, wanted: str | bool | None) -> str | None:
        """The wanted checkpoint, or for True the latest whole one (InputError without). Logs later, damaged ones."""
        if not wanted:
            return None
        latest, damaged = files.latest_whole(self.path, read=wanted is True)
        if wanted is True and latest is None:
            raise InputError(f"There is no checkpoint to resume from in {self.path}.")
        wanted = latest if wanted is True else wanted
        if latest is not None and Path(wanted).resolve() == latest.resolve():
            for checkpoint, reason in damaged.items():
                self.log(f"warning: {checkpoint} is damaged, {reason}. Passed over.")
        return str(wanted)

    def compare_settings(self, checkpoint: str, manifest: dict[str, Any], settings: dict[str, Any]) -> set[str]:
        """The names of settings that were others in the run of a checkpoint, with this manifest; logs a warning."""
        if "settings" not in manifest:
            self.log(f"warning: {checkpoint} does not say which settings its run had. Give the same ones again.")
            return set()
        different = differences(manifest["settings"], settings)
        if different:
            lines = "".join(f"\n    {line}" for line in different)
            self.log(
                f"warning: {Path(checkpoint).name} is of a run with other settings. This run uses its own, and does "
                f"not end with the weights of a run without a stop:{lines}"
            )
        return {line.split(":")[0] for line in different}

    def resume_advice(self) -> str:
        """How to resume a run that has stopped: the last sentence of every message about it."""
        checkpoint, _ = files.latest_whole(self.path)
        if checkpoint is None:
            return "No checkpoint was saved yet: run the same command to start again."
        way_out = "to go on, add --resume_from_checkpoint True to the same command."
        return f"The latest checkpoint is {checkpoint}: {way_out}"

    @contextmanager
    def new_checkpoint(self, state: TrainerState, metadata: dict[str, Any]) -> Iterator[Path]:
        """A folder for all processes to write a checkpoint into. When whole, it gets its name, also in `state`."""
        name = f"checkpoint-{state.global_step}"
        staged, checkpoint = self.staging / name, self.path / name
        with self._full_disk_explained(name, self.path, state.global_step):
            self.is_writing_checkpoint = True
            try:
                yield staged
            finally:
                self.is_writing_checkpoint = False
            self.processes.wait()  # for files of the others, such as their random state
            if state.best_model_checkpoint == str(staged):
                state.best_model_checkpoint = str(checkpoint)
                if self.arguments.should_save:  # only one process may write this file
                    state.save_to_json(str(staged / files.STATE))
            if self.arguments.should_save:
                files.publish(staged, checkpoint, metadata)
        self.processes.wait()
        if self.arguments.local_process_index == 0 and staged.is_dir():
            files.publish(staged, checkpoint, metadata)  # on the disk of another machine

    @contextmanager
    def new_model(self, folder: Path, step: int) -> Iterator[Path]:
        """A folder for all processes to write a model into. Its files then move into `folder`, each atomically."""
        staging = folder / files.STAGING
        with self._full_disk_explained("the model", folder, step):
            yield staging / "model"
            if self.arguments.should_save:
                files.publish_files(staging / "model", folder)
                files.remove_staging(folder)
        self.processes.wait()

    def rotate(self, state: TrainerState) -> None:
        """Removes checkpoints beyond --save_total_limit, but not the latest and the best."""
        if self.arguments.should_save:
            latest = str(self.path / f"checkpoint-{state.global_step}")
            keep = {latest, state.best_model_checkpoint or latest}
            limit = self.arguments.save_total_limit or 0
            others = [checkpoint for checkpoint in files.find_checkpoints(self.path) if str(checkpoint) not in keep]
            for checkpoint in others[max(0, limit - len(keep)) :] if limit > 0 else ():
                files.remove(checkpoint)
            files.remove_staging(self.path)

    @contextmanager
    def _full_disk_explained(self, what: str, folder: Path, step: int) -> Iterator[None]:
        """Turns errors of a full disk into TrainingStopped, and removes unfinished files."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _WRITING_FAILED.search(str(error)):
                raise
            free = shutil.disk_usage(folder).free
            if self.arguments.should_save:
                files.remove_staging(folder)
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise TrainingStopped(
                f"At step {step}, {what} could not be written to {folder}: {reason}.\n"
                f"{_megabytes(free)} were free there; a checkpoint takes about {_megabytes(self.checkpoint_size)}. The "
                "unfinished files are removed, what was saved before is intact.\nMake room, e.g. by removing old runs, "
                f"or save fewer checkpoints: a lower --save_total_limit ({self.arguments.save_total_limit} now), a "
                f"higher --save_steps. {self.resume_advice()}"
            ) from error


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"


@dataclass(frozen=True)
class StepCheck:
    """The numbers of a step, checked when its gradient is complete and the optimizer has not used it yet."""

    step: int
    max_steps: int
    losses: torch.Tensor  # (N,), of the accumulated batches
    norm: torch.Tensor  # (), of their gradient
    keys: list[torch.Tensor | None]  # of their images
    is_scaled: bool
    is_non_finite: torch.Tensor  # () bool, on the host; for a GPU it is valid after `copied`
    copied: torch.cuda.Event | None = None


@dataclass
class StepGuard:
    """
    Stops a run before a step that is not finite, and after too many unreadable images. The trainer calls `begin_step`,
    `add_loss` for each batch, and `check`; `stop_if_bad` before it evaluates, saves or ends. All processes do the same.
    """

    folder: RunFolder
    max_broken_images: int
    image_name: Callable[[int], str]  # from the index of a training image to its file or another name
    broken_images: dict[int, str] = field(default_factory=dict)  # reasons by index of a training image
    last_keys: list[torch.Tensor | None] = field(default_factory=list)  # of the batches of the latest step
    _losses: list[torch.Tensor] = field(default_factory=list)
    _last_check: StepCheck | None = None

    def begin_step(self, batches: list[dict[str, Any]]) -> None:
        """Notes the "keys" (B, 3) of images: seed, epoch, index. Raises TrainingStopped if too many are "broken"."""
        self.last_keys, self._losses = [batch.get("keys") for batch in batches], []
        pairs = [pair for batch in batches for pair in batch.get("broken", ())]
        new = {index: reason for index, reason in pairs if index not in self.broken_images}
        if not self.max_broken_images or not self.folder.processes.maximum(len(new)):
            return
        for index, reason in (pair for part in self.folder.processes.gather(new) for pair in part.items()):
            if index not in self.broken_images:
                self.broken_images[index] = reason
                self.folder.log(f"broken image {len(self.broken_images)}, another one takes its place: {reason}")
        if len(self.broken_images) > self.max_broken_images:
            lines = "".join(f"\n    {reason}" for reason in self.broken_images.values())
            raise TrainingStopped(
                f"{len(self.broken_images)} training images can't be read, more than --max_broken_images "
                f"{self.max_broken_images}:{lines}\nRepair or remove them, or raise the limit. "
                + self.folder.resume_advice(),
                is_shared=True,
            )

    def add_loss(self, loss: torch.Tensor) -> None:
        """Notes the loss of an accumulated batch, a scalar."""
        self._losses.append(loss)

    def check(self, step: int, max_steps: int, norm: Any, skipping: Any = None, is_scaled: bool = False) -> None:
        """
        Raises TrainingStopped for a step, counted from 1, that is not finite. Reading a number waits for the device: an
        optimizer that skips steps whose `found_inf` is 1 (`skipping`) does so on the device, and the run stops one step
        later. With `is_scaled` only losses are checked: a scaler of float16 skips steps whose gradient overflows.
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
        if check is not None and check.copied is not None:
            check.copied.synchronize()
        if check is None or not check.is_non_finite:
            return
        arguments, losses = self.folder.arguments, check.losses.tolist()
        # Every process names its images. They share the gradient: if it is not finite, all of them stop here.
        is_everywhere = not (check.is_scaled or check.norm.isfinite())
        process = f"process {arguments.process_index}, " if arguments.world_size > 1 else ""
        lines = [
            f"    {process}batch {number} of {len(losses)}, loss {loss:.4g}: {', '.join(self._names(keys))}"
            for number, (loss, keys) in enumerate(zip(losses, check.keys), start=1)
        ]
        bad_loss = next((loss for loss in losses if not torch.tensor(loss).isfinite()), None)
        if is_everywhere:
            gathered = self.folder.processes.gather((bad_loss, lines))
            lines = [line for _, part in gathered for line in part]
            bad_loss = next((loss for loss, _ in gathered if loss is not None), None)
        found = f"The gradient's norm is {float(check.norm):g}" if bad_loss is None else f"The loss is {bad_loss:g}"
        raise TrainingStopped(
            f"{found} at step {check.step} of {check.max_steps}. The weights are those of the step before. The images "
            "of this step:\n" + "\n".join(lines) + "\nUsual ways out: a lower --learning_rate "
            f"({arguments.learning_rate:g} now), more --warmup_steps, --max_grad_norm 1, --bf16 False. "
            + self.folder.resume_advice(),
            is_shared=is_everywhere,
        )

    def _names(self, keys: torch.Tensor | None) -> list[str]:
        return ["?"] if keys is None else [self.image_name(int(index)) for index in keys[:, 2]]


class BestCheckpoint(TrainerCallback):
    """Finds the best checkpoint again when a run is resumed under another path, which its state does not know."""

    def __init__(self, output_dir: Path, checkpoint: Path, best: str | None) -> None:
        folders = [] if best is None else [output_dir / Path(best).name, checkpoint.parent / Path(best).name]
        self.path = next((folder for folder in folders if folder.is_dir()), None)

    def on_train_begin(self, args: Any, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if self.path is not None:
            state.best_model_checkpoint = str(self.path)


class EarlyEnd(TrainerCallback):
    """
    Ends a run before its last step: after --max_hours, or after --early_stopping_patience evaluations that are no
    better than the best. The step is evaluated and saved as a last one. `reason` says why; None if the run goes on.
    """

    def __init__(self, max_hours: float | None, patience: int | None, processes: Processes) -> None:
        self.max_hours, self.patience, self.processes = max_hours, patience, processes
        self.started, self.reason = 0.0, None

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        self.started, self.reason = time.monotonic(), None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.max_hours is None or state.global_step >= state.max_steps:
            return
        if self.processes.maximum(int(time.monotonic() - self.started >= 3600 * self.max_hours)):
            self._end(f"--max_hours {self.max_hours:g} are over", state, control)
            # With "epoch" they come anyway: the Trainer ends the epoch here.
            control.should_evaluate = control.should_evaluate or args.eval_strategy == "steps"
            control.should_save = control.should_save or args.save_strategy == "steps"

    def after_evaluation(self, name: str, state: TrainerState, control: TrainerControl) -> None:
        """When the best checkpoint is known. Counts in the state's history, so that a resumed run goes on counting."""
        steps = {log["step"] for log in state.log_history if "eval_loss" in log}
        worse = sum(step > (state.best_global_step or 0) for step in steps)
        if self.patience is not None and worse >= self.patience and state.global_step < state.max_steps:
            best = f"no better {name} than at step {state.best_global_step} in {worse} evaluations"
            self._end(f"{best}, --early_stopping_patience {self.patience}", state, control)

    def _end(self, why: str, state: TrainerState, control: TrainerControl) -> None:
        control.should_training_stop = True
        self.reason = f"at step {state.global_step:,} of {state.max_steps:,}: {why}"


class SaveOnSignal(TrainerCallback):
    """Ctrl-C or SIGTERM, in any process, saves a checkpoint after the step to resume from exactly, and ends the run."""

    def __init__(self, processes: Processes) -> None:
        self.processes, self.signals, self._agreed = processes, StopSignals(_announce), 0

    @property
    def number(self) -> int:
        """The number of the signal that asked to stop, in this process or in any; 0 if there is none."""
        return self._agreed or self.signals.number

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        self._agreed = 0
        self.signals.start()

    def _agree(self) -> bool:
        self._agreed = self._agreed or self.processes.maximum(self.signals.poll())
        return self._agreed > 0

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The last step of an epoch is left to on_epoch_end: a checkpoint from before the evaluation would skip it.
        if self._agree() and state.epoch % 1 != 0:
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if self._agree():
            control.should_save = True

    def on_save(self, *_: Any, **kwargs: Any) -> None:
        if self._agree():
            raise TrainingInterrupted("Stopped after a checkpoint.", self._agreed)


def _announce(what: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        # Not print, which fails if the signal came while something else was printing.
        os.write(2, f"\n{what}: saving a checkpoint after this step. Once more to stop at once.\n".encode())


@contextmanager
def errors_explained(trainer: Trainer) -> Iterator[None]:
    """Turns errors of signals, lost workers and lost processes into messages for users."""
    try:
        yield
    except TrainingStopped:
        raise
    except (KeyboardInterrupt, RuntimeError) as error:
        state, arguments, advice = trainer.state, trainer.args, trainer.run_folder.resume_advice()
        step, size = state.global_step + 1, arguments.per_device_train_batch_size
        batch = f"--per_device_train_batch_size ({size} now)"
        if isinstance(error, KeyboardInterrupt) or trainer.save_on_signal.number:
            # The launcher may have ended the other processes first, which raises a RuntimeError here.
            message = f"Interrupted at step {state.global_step} of {state.max_steps}. {advice}"
            raise TrainingInterrupted(message, trainer.save_on_signal.number or signal.SIGINT) from error
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            message = f"Out of memory at step {step}: {str(error).splitlines()[0]} Ways out: a lower {batch} with "
            message += "more --gradient_accumulation_steps, --gradient_checkpointing True, or a smaller --image_size."
        elif lost := lost_worker(error, f" at step {step}"):
            workers = f"--dataloader_num_workers ({arguments.dataloader_num_workers} now)"
            message = f"{lost} Ways out: a lower {workers} or {batch}."
        elif arguments.world_size > 1 and has_lost_contact(error):
            message = f"Process {arguments.process_index} of {arguments.world_size} has lost the others at step "
            message += f"{step}: one of them has ended, see its message."
        else:
            raise
        raise TrainingStopped(f"{message} {advice}") from error
