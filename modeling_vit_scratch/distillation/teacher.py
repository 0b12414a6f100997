# SPDX-License-Identifier: Apache-2.0
"""
Distillation: a trained network, the teacher, sees each training batch as the student does, and its classes or features
become a part of the loss. It is in no checkpoint. Flags and formulas are those of DeiT (Touvron et al.,
arXiv:2012.12877), but for the features, which are compared as by Wei et al. (arXiv:2205.14141).
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.image_processing_utils import BaseImageProcessor

from ..common.errors import InputError, listed
from ..common.pretrained import hash_weights, loading, refuse_missing_path
from ..configuration_vit_scratch import ViTScratchConfig
from ..data.collation import normalization
from ..modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchModel


_TOKENS = ("cls_token", "class_token", "class_embedding")  # transformers' names of the class token
PROJECTION = "teacher_projection"  # of the student's features; in checkpoints, not in the finished model


class Teacher:
    """
    Any classifier of transformers, or an encoder if `labels` is None, for pixels that the student's processor has
    normalised. Raises InputError if it can't be loaded, lacks weights or labels, or takes images of other channels.
    """

    def __init__(
        self, name: str, processor: BaseImageProcessor, student: ViTScratchConfig, labels: list[str] | None,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        what = f"--teacher_model {name}"
        refuse_missing_path(what, name)
        kind = AutoModel if labels is None else AutoModelForImageClassification
        with loading(what):
            model, info = kind.from_pretrained(name, output_loading_info=True, dtype=torch.float32)
            own = AutoImageProcessor.from_pretrained(name)
        # Features are taken before a pooling layer, which an encoder may lack.
        missing = [key for key in info["missing_keys"] if labels is not None or ".pooler." not in f".{key}"]
        if missing:
            raise InputError(f"{what} lacks weights, e.g. {min(missing)}: it was not trained for this. Give another.")
        self.channels = getattr(model.config, "num_channels", 3)
        if student.num_channels not in (1, self.channels):
            raise InputError(f"{what} takes {self.channels} channels, the images have {student.num_channels}.")
        self.order = None if labels is None else _match_labels(what, model.config, labels, student.problem_type)
        # (x - student's offset) / student's scale are pixel values: exactly x for the same processor.
        (scale, offset), (own_scale, own_offset) = normalization(processor), normalization(own)
        self.scale = (own_scale / scale).to(device)
        self.shift = (own_offset - offset * (own_scale / scale)).to(device)
        self.size, self.model = _input_size(own), model.to(device).eval().requires_grad_(False)
        self.has_class_token = any(key.endswith(_TOKENS) for key, _ in model.named_parameters())
        self.name = Path(name).resolve().name if Path(name).exists() else name
        self.digest = hash_weights(model).hexdigest()[:16]
        with loading(what):  # it would fail so in the first step
            self.width = self(torch.zeros(1, student.num_channels, *student.image_hw, device=device)).shape[1]

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> Tensor:
        """The student's pixels (B, C, H, W) -> logits of its labels (B, K), or features (B, D), float32."""
        images = (pixel_values * self.scale + self.shift).expand(-1, self.channels, -1, -1)
        if self.size is not None and self.size != images.shape[-2:]:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        outputs = self.model(pixel_values=images)
        if self.order is not None:
            return outputs.logits[:, self.order].float()
        if isinstance(self.model, ViTScratchModel):
            return outputs.pooler_output.float()
        states = outputs.last_hidden_state.float()  # (B, T, D), of a convolutional network (B, D, rows, columns)
        if states.ndim == 4:
            return states.mean((2, 3))
        return states[:, 0] if self.has_class_token else states.mean(1)


def _match_labels(what: str, config: Any, labels: list[str], problem: str) -> list[int]:
    """The teacher's class of each label, by name."""
    names = [config.id2label[index] for index in range(config.num_labels)]
    if "multi_label_classification" in (problem, config.problem_type):
        raise InputError(f"{what}: with several labels for an image, only --distillation_type features works.")
    unmatched = [label for label in labels if names.count(label) != 1]
    if unmatched:
        raise InputError(
            f"{what} must have each label once, and has not, for {len(unmatched)} of {len(labels)}: "
            f"{listed(unmatched)}. It has {listed(names)}. --distillation_type features needs no classes."
        )
    return [names.index(label) for label in labels]


def _input_size(processor: BaseImageProcessor) -> tuple[int, int] | None:
    """Height and width of what a processor makes, a square for a shorter side; None for any size."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    size = {} if size is None else dict(size)
    side = size.get("shortest_edge")
    height, width = size.get("height") or side, size.get("width") or side
    return None if height is None else (height, width)


class Distillation:
    """
    The loss (1 - alpha) * `label_loss` + alpha * teacher's part, for `Trainer(compute_loss_func=)`; in evaluation,
    which does not call `watch`, the label loss alone. Without `label_loss`, the teacher's part is all.

    The mean over images of, for "soft", tau^2 KL(teacher || student) at the temperature tau (Hinton et al.,
    arXiv:1503.02531); "hard", the cross-entropy with the teacher's class; "token", the same of the distillation token's
    classifier, while the class token's learns the labels; "features", the smooth L1 distance of projected features to
    the teacher's, which have mean 0 and variance 1.
    """

    def __init__(
        self, model: ViTScratchForImageClassification, teacher: Teacher, kind: str, alpha: float, tau: float,
        label_loss: Callable[..., Tensor] | None,
    ) -> None:  # fmt: skip
        self.teacher, self.kind, self.alpha, self.tau, self.label_loss = teacher, kind, alpha, tau, label_loss
        self._targets, self._kept = None, {}  # of the batch: the teacher's outputs, and parts of the student's
        if kind == "features":
            width = model.config.representation_size or model.config.pooled_width
            model.add_module(PROJECTION, nn.Linear(width, teacher.width))
            # In the forward pass, where sharded weights are whole.
            model.classifier.register_forward_hook(
                lambda _, args, output: self._kept.update(student=model.teacher_projection(args[0]))
            )
        elif kind == "token":
            heads = {"labels": model.classifier, "student": model.distillation_classifier}
            for name, head in heads.items():
                head.register_forward_hook(lambda *given, name=name: self._kept.update({name: given[-1]}))

    def watch(self, pixel_values: Tensor) -> None:
        """Shows the teacher the batch that the student gets next."""
        self._targets = self.teacher(pixel_values)

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """As `ClassificationLoss`."""
        (targets, kept), self._targets, self._kept = (self._targets, self._kept), None, {}
        if targets is None:
            return self.label_loss(outputs, labels, num_items_in_batch)
        student, targets = kept.get("student", outputs["logits"]).float(), targets[: len(labels)]
        if self.kind == "features":
            targets = F.layer_norm(targets, targets.shape[1:])
            losses = F.smooth_l1_loss(student, targets, reduction="none", beta=2.0).mean(1)  # (B,)
        elif self.kind == "soft":
            student, targets = ((logits / self.tau).log_softmax(1) for logits in (student, targets))
            losses = self.tau**2 * F.kl_div(student, targets, reduction="none", log_target=True).sum(1)
        else:
            losses = F.cross_entropy(student, targets.argmax(1), reduction="none")
        images = len(labels) if num_items_in_batch is None else num_items_in_batch * (len(labels) / labels.numel())
        of_teacher = losses.sum() / (images.to(losses.device) if torch.is_tensor(images) else images)
        if self.label_loss is None:
            return of_teacher
        outputs = {"logits": kept["labels"]} if self.kind == "token" else outputs
        return (1 - self.alpha) * self.label_loss(outputs, labels, num_items_in_batch) + self.alpha * of_teacher

    def metadata(self) -> dict[str, Any]:
        """For the record."""
        how = self.kind if self.label_loss is None else f"{self.kind}, weight {self.alpha:g}"
        how += f", temperature {self.tau:g}" if self.kind == "soft" else ""
        return {"teacher": self.teacher.name, "teacher_weights": self.teacher.digest, "distillation": how}

    def describe(self) -> str:
        model, order = self.teacher.model, self.teacher.order
        line = f"Teacher: {self.teacher.name}, {model.config.model_type}, {model.num_parameters():,} parameters; "
        line += f"{self.metadata()['distillation']}."
        others = 0 if order is None else model.config.num_labels - len(order)
        return f"{line} Left out of its probabilities: {others:,} classes that are no labels here." if others else line


def add_distillation_token(model: ViTScratchForImageClassification) -> ViTScratchForImageClassification:
    """
    The model with DeiT's distillation token and its classifier. What it lacks of them starts as a copy of the class
    token's. Raises InputError for an architecture that can't have them.
    """
    config = copy.deepcopy(model.config)
    config.use_distillation_token = config.use_distillation_head = True
    try:
        config.validate_vit()
        student = ViTScratchForImageClassification(config)
        shapes = {name: value.shape for name, value in student.state_dict().items()}
        weights = model.classifier.state_dict(prefix="distillation_classifier.")
        if not model.config.use_distillation_token:
            weights["vit.embeddings.distillation_token"] = model.vit.embeddings.cls_token
        for name, value in model.state_dict().items():
            is_longer = value.ndim == 3 and shapes[name][1] == value.shape[1] + 1
            weights[name] = torch.cat([value[:, :1], value], dim=1) if is_longer else value
        student.load_state_dict(weights)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"--distillation_type token: {error}") from error
    student.image_processor = model.image_processor
    return student
