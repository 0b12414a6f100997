# SPDX-License-Identifier: Apache-2.0
"""
DINO (Caron et al., arXiv:2104.14294), as in main_dino.py: a student learns to say about each crop of an image what its
teacher says about the large ones. The teacher is a moving average of the student.

B images have G = 2 global and L local crops, and a head has K outputs.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerState
from transformers import initialization as init

from ..common.errors import InputError, TrainingStopped
from ..configuration_vit_scratch import ViTScratchConfig
from ..modeling_vit_scratch import ViTScratchModel, ViTScratchPreTrainedModel
from .arguments import PretrainingArguments
from .models import PretrainingOutput


STUDENT_TEMP, CENTER_MOMENTUM = 0.1, 0.9
# Of the head. Encoders narrower than the paper's smallest, S of 384 channels, have hidden layers in proportion.
_HIDDEN, _NARROWEST, _BOTTLENECK = 2048, 384, 256
# A teacher whose outputs tell less than this share of ln K about an image says the same about all. It may do so for a
# while before it learns, and has collapsed where it does so for this share of all steps, at least so many.
_TELLS_NOTHING, _PATIENCE, _LEAST_STEPS = 1e-3, 1 / 5, 100


def cosine(first: float, last: float, share: float) -> float:
    """From the first value to the last, by the share of the steps that are done."""
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def dino_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """
    The mean cross-entropy of every crop of the student with every other global crop of the teacher, a scalar.

    Args:
        predictions: the student's logits (B, G + L, K), divided by its temperature, the global crops first.
        targets: the teacher's probabilities (B, G, K).
    """
    logs, count = predictions.log_softmax(-1), targets.shape[1]
    with_itself = (targets * logs[:, :count]).sum((1, 2))  # (B,)
    with_all = (targets.sum(1, keepdim=True) * logs).sum((1, 2))
    return (with_itself - with_all).mean() / (count * logs.shape[1] - count)


class DinoHead(nn.Module):
    """Three dense layers, a unit vector of 256 numbers, and its cosine with each of K unit vectors."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        hidden = _HIDDEN * min(width, _NARROWEST) // _NARROWEST
        sizes = (width, hidden, hidden, _BOTTLENECK)
        self.dense = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.last_layer = nn.Linear(_BOTTLENECK, outputs, bias=False)
        for layer in self.dense:
            layer.kernel_init = partial(init.trunc_normal_, std=0.02)
        self.last_layer.kernel_init = partial(init.uniform_, a=-1 / 16, b=1 / 16)

    def forward(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., K)"""
        first, second, third = self.dense
        features = third(F.gelu(second(F.gelu(first(features)))))
        return F.linear(F.normalize(features, dim=-1), F.normalize(self.last_layer.weight, dim=-1))


@dataclass
class DinoOutput(PretrainingOutput):
    """With the student's `predictions` (B, G + L, K), and the teacher's `logits` and `targets` (B, G, K)."""

    logits: Tensor | None = None
    targets: Tensor | None = None


class SelfDistillation(ViTScratchPreTrainedModel):
    """The student, and the teacher, whose encoder `vit` is what is probed and saved. `out_dim` is K."""

    def __init__(self, config: ViTScratchConfig, out_dim: int, teacher_temp: float = 0.04) -> None:
        super().__init__(config)
        self.vit, self.teacher_head = ViTScratchModel(config), DinoHead(config.pooled_width, out_dim)
        self.student, self.student_head = ViTScratchModel(config), DinoHead(config.pooled_width, out_dim)
        self.register_buffer("center", torch.zeros(out_dim))
        self.teacher_temp = teacher_temp
        self.post_init()
        self.start_student()

    def start_student(self) -> None:
        """The student begins as its teacher, which takes no gradient."""
        for teacher, student in ((self.vit, self.student), (self.teacher_head, self.student_head)):
            student.load_state_dict(teacher.state_dict())
            teacher.requires_grad_(False)

    def train(self, mode: bool = True) -> "SelfDistillation":
        """As in torch, but the teacher has no dropout."""
        super().train(mode)
        self.vit.eval()
        return self

    def forward(self, pixel_values: Tensor, local_pixel_values: Tensor | None = None) -> DinoOutput:
        """From global crops (B, G, C, H, W) and local ones (B, L, C, H', W') to the loss."""
        with torch.no_grad():
            features = self.vit(pixel_values.flatten(0, 1)).pooler_output.unflatten(0, pixel_values.shape[:2])
            logits = self.teacher_head(features).float()
            targets = ((logits - self.center) / self.teacher_temp).softmax(-1)
        crops = [pixel_values] if local_pixel_values is None else [pixel_values, local_pixel_values]
        features = [self.student(part.flatten(0, 1)).pooler_output.unflatten(0, part.shape[:2]) for part in crops]
        predictions = self.student_head(torch.cat(features, dim=1)).float() / STUDENT_TEMP
        return DinoOutput(dino_loss(predictions, targets), predictions, logits, targets)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student"""
        for teacher, student in ((self.vit, self.student), (self.teacher_head, self.student_head)):
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


class DinoSteps(TrainerCallback):
    """
    What happens at each step beside the student's: temperature, weight decay, teacher and centre, which all follow from
    the number of the step. Raises TrainingStopped when the teacher has said the same about all images for long.
    """

    def __init__(self, model: SelfDistillation, options: PretrainingArguments, weight_decay: float) -> None:
        self.model, self.options, self.weight_decay = model, options, weight_decay
        # Sums over the crops of a step: the teacher's logits (K,), its probabilities (K,), their entropies, the crops.
        self.sums: Tensor | None = None
        # Sums since the last report, and since the last look for a collapse: both entropies, and the steps.
        self.reported, self.watched = torch.zeros(3), torch.zeros(3)

    def loss(self, outputs: DinoOutput, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The share of a batch in the mean over all images of an update, for `Trainer(compute_loss_func=)`."""
        if self.model.training:
            logits, targets = outputs["logits"].flatten(0, 1), outputs["targets"].flatten(0, 1)
            entropy = torch.special.entr(targets).sum()
            sums = torch.cat([logits.sum(0), targets.sum(0), torch.stack([entropy, entropy.new_tensor(len(targets))])])
            self.sums = sums if self.sums is None else self.sums + sums
        return outputs["loss"] * (1 if num_items_in_batch is None else len(labels) / num_items_in_batch)

    def on_train_begin(self, args: Any, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if any(isinstance(weight, DTensor) for weight in self.model.parameters()):
            raise InputError("--objective dino averages whole weights, and FSDP has parts of them. Leave out --fsdp.")
        self._set_temperature(state)

    def _set_temperature(self, state: TrainerState) -> None:
        options, epoch = self.options, state.epoch or 0.0
        share = min(epoch / options.warmup_teacher_temp_epochs, 1.0) if options.warmup_teacher_temp_epochs else 1.0
        first, last = options.warmup_teacher_temp, options.teacher_temp
        self.model.teacher_temp = first + (last - first) * share

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, optimizer: Any, **kwargs: Any) -> None:
        self.sums = None
        self._set_temperature(state)
        decay = cosine(self.weight_decay, self.options.weight_decay_end, state.global_step / state.max_steps)
        for group in optimizer.param_groups:
            group["weight_decay"] = decay if group["weight_decay"] else 0.0

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if (state.epoch or 0.0) < self.options.freeze_last_layer:
            self.model.student_head.last_layer.weight.grad = None

    @torch.no_grad()
    def on_step_end(self, args: Any, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        model, done = self.model, (state.global_step - 1) / state.max_steps
        model.update_teacher(cosine(self.options.momentum_teacher, 1.0, done))
        sums = reduce(self.sums, "sum")
        logits, mean, entropy = (sums[:-1] / sums[-1]).split([len(model.center), len(model.center), 1])
        model.center.lerp_(logits, 1 - CENTER_MOMENTUM)
        entropies = torch.cat([entropy, torch.special.entr(mean).sum()[None], torch.ones_like(entropy)])
        self.reported, self.watched = (sums.to(entropies) + entropies for sums in (self.reported, self.watched))
        if state.global_step % (patience := max(int(_PATIENCE * state.max_steps), _LEAST_STEPS)) == 0:
            self.stop_if_collapsed(state.global_step, patience)

    def stop_if_collapsed(self, step: int, patience: int) -> None:
        """Raises TrainingStopped if the teacher has told nothing since the last call. Waits for the device."""
        (each, mean, steps), most = self.watched.tolist(), math.log(len(self.model.center))
        self.watched = torch.zeros(3)
        if steps < patience or (mean - each) / steps > _TELLS_NOTHING * most:  # a resumed run has not seen all steps
            return
        how = "all outputs are equally likely" if each / steps > most / 2 else "the same outputs are likely for all"
        raise TrainingStopped(
            f"The teacher has collapsed: for {steps:g} steps before step {step} it has said the same about every image "
            f"({how}: an entropy of {each / steps:.3g} for an image and {mean / steps:.3g} for all, of at most "
            f"{most:.3g}). Its features are worth nothing. Usual ways out for a new run: a lower --learning_rate, a "
            "lower --teacher_temp if all are equally likely and a higher one if not, a higher --momentum_teacher, "
            "larger batches.",
            is_shared=True,
        )

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Adds the teacher's entropies to a report of training: of the outputs for an image, and of their mean."""
        each, mean, steps = self.reported.tolist()
        if "loss" in logs and steps:
            entropies = {"teacher_entropy": each / steps, "mean_teacher_entropy": mean / steps}
            logs.update(entropies)
            state.log_history[-1].update(entropies)
            self.reported = torch.zeros(3)
