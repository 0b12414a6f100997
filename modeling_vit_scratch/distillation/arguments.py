# SPDX-License-Identifier: Apache-2.0
"""The flags of distillation. Imports no torch."""

from dataclasses import dataclass

from ..common.errors import Problems
from ..common.flags import flag


@dataclass
class DistillationFlags:
    """What a teacher is, and how it teaches."""

    teacher_model: str | None = flag(
        None,
        "Learn from this classifier, too: a folder or a Hub id. See `--help all`: --distillation_type.",
        metavar="MODEL",
    )
    distillation_type: str = flag(
        "soft",
        "What --teacher_model teaches: soft, its probabilities; hard, its classes; token, its classes to a "
        "distillation token (DeiT); features, what a linear layer makes of the student's.",
        choices=("soft", "hard", "token", "features"),
    )
    distillation_alpha: float = flag(
        0.5, "Weight of the teacher in the loss; the labels have the rest.", at_least=0, at_most=1
    )
    distillation_tau: float = flag(1.0, "Temperature of soft distillation.", above=0)

    @property
    def distills(self) -> bool:
        return self.teacher_model is not None and self.distillation_alpha > 0

    @property
    def distillation_flags(self) -> str:
        """Those that have another value than their default, beside --teacher_model."""
        names = ("distillation_type", "distillation_alpha", "distillation_tau")
        return ", ".join(f"--{name}" for name in names if getattr(self, name) != getattr(DistillationFlags, name))

    def check_distillation(self, loss: str, freeze: str | None, lora_rank: int | None, problems: Problems) -> None:
        """Adds what does not go together."""
        kind, how = self.distillation_type, f"--distillation_type {self.distillation_type}"
        if self.teacher_model is None:
            if self.distillation_flags:
                problems.add(f"{self.distillation_flags}: there is no teacher. Add --teacher_model, or leave this out.")
            return
        if self.distillation_tau != 1.0 and kind != "soft":
            problems.add(f"--distillation_tau is for --distillation_type soft, not for {kind}.")
        if loss != "softmax" and kind != "features":
            problems.add(f"{how} compares probabilities that sum to 1: it needs --loss softmax, not {loss}.")
        if (freeze and kind == "token") or (freeze == "encoder" and kind == "features"):
            problems.add(f"{how} trains what --freeze {freeze} keeps as it is. Leave one of them out.")
        if lora_rank and kind == "token":
            problems.add(f"{how} trains a new token, and --lora_rank adapters alone. Leave one of them out.")
