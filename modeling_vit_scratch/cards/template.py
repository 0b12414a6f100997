# SPDX-License-Identifier: Apache-2.0
"""
The template of cards, model_cards/TEMPLATE.md: what the code writes for a record of names in place of values. So it
shows where every number of a card is from, and cannot be another than the code's.
"""

from types import SimpleNamespace
from typing import Any

from huggingface_hub.utils import yaml_dump

from ..configuration_vit_scratch import ViTScratchConfig
from .emissions import Estimate
from .metadata import metadata
from .records import Evaluation, Facts, Wishes
from .transfer import FINE_TUNED, PRETRAINED, SCRATCH, SHOWN_PROBES, Transfer
from .writing import card_body


_INTRODUCTION = """# Template of the model cards

Made by `python scripts/card.py --template` with the code that writes the cards. In braces is where a value comes from:
`config` is config.json, `processor` preprocessor_config.json, `results` the results.json of the training, `evaluation`
that of scripts/evaluate.py, `transfer` the transfer.json of scripts/transfer.py, `cost` what cards/emissions.py makes
of wall time and hardware. What has no record is left out, up to whole sections. Models that give an image several
labels, and encoders without a classifier, have sentences of their own.
"""


class _Named:
    """A number that is written as its name, whatever the format, and compared as its value."""

    label: str

    def __format__(self, specification: str) -> str:
        return f"{{{self.label}}}"

    __str__ = __repr__ = lambda self: f"{{{self.label}}}"

    def __sub__(self, other: Any) -> Any:
        return _real(float(self) - float(other), f"{self.label} - {getattr(other, 'label', other)}")

    def __mul__(self, other: Any) -> Any:
        return self

    __rmul__ = __mul__

    def __round__(self, digits: int | None = None) -> Any:
        return self

    def __floordiv__(self, other: Any) -> Any:
        return _whole(int(self) // int(other), f"{self.label} / {getattr(other, 'label', other)}")

    def __truediv__(self, other: Any) -> Any:
        return _real(float(self) / float(other), f"{self.label} / {getattr(other, 'label', other)}")


class _Whole(_Named, int):
    pass


class _Real(_Named, float):
    pass


def _whole(value: int, label: str) -> _Whole:
    number = _Whole(value)
    number.label = label
    return number


def _real(value: float, label: str) -> _Real:
    number = _Real(value)
    number.label = label
    return number


def _named(values: Any, label: str) -> Any:
    """The same with its numbers named by their places."""
    if isinstance(values, dict):
        return {key: _named(value, f"{label}.{key}") for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_named(value, f"{label}[{index}]") for index, value in enumerate(values)]
    if isinstance(values, bool) or not isinstance(values, (int, float)):
        return values
    return _whole(values, label) if isinstance(values, int) else _real(values, label)


def _written(values: Any) -> Any:
    """The same as YAML takes it: names as text."""
    if isinstance(values, dict):
        return {key: _written(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_written(value) for value in values]
    return str(values) if isinstance(values, _Named) else values


def template() -> str:
    """TEMPLATE.md."""
    facts = _facts()
    head = yaml_dump(_written(metadata(facts).to_dict()), sort_keys=False).strip()
    return f"{_INTRODUCTION}\n````markdown\n---\n{head}\n---\n\n{card_body(facts)}````\n"


# ---------------------------------------------------------------------------------------------------------------------
# An example with everything in it. The values decide which sentences there are; none of them is written.


_CLASSES = ["{class 0}", "{class 1}", "{class 2}"]
_RESULTS: dict[str, Any] = {
    "metric": "accuracy", "value": 0.9, "n": 100,
    "metrics": {"accuracy": 0.9, "macro_f1": 0.9},
    "selection": "the checkpoint with the best accuracy on these same images (step {results.selection})",
    "seed": 42,
    "dataset": {
        "name": "{results.dataset.name}", "hub_id": "{results.dataset.hub id}", "license": "license-of-the-data",
        "url": "{results.dataset.url}", "note": "{results.dataset.note}", "num_labels": 3,
        "num_training_images": 1000, "num_held_out_images": 100, "held_out": "{results.dataset.held out}",
    },
    "model": {"num_parameters": 1000, "started_from": "{USER/BASE}", "base_model": "{USER/BASE}"},
    "training": {
        "epochs": 10.0, "steps": 1000, "samples_seen": 10000, "batch_size": 64, "gradient_accumulation_steps": 2,
        "optimizer": "{results.training.optimizer}", "adam_betas": [0.9, 0.999], "adam_epsilon": 1e-8,
        "learning_rate": 0.001, "schedule": "{results.training.schedule}", "warmup_steps": 100, "weight_decay": 0.05,
        "gradient_clipping": 1.0, "label_smoothing": 0.1, "loss": "{results.training.loss}",
        "augmentation": "{results.training.augmentation}", "mixing": "{results.training.mixing}",
        "recipe": "{results.training.recipe}", "recipe_source": "{its source}", "recipe_differs": "{how}",
        "layer_decay": 0.75, "head_learning_rate_multiplier": 10.0, "weight_average": 0.99,
        "precision": "{results.training.precision}", "processes": 2, "broken_images": 3,
    },
    "command": "{results.command}", "git_commit": "{results.git_commit}",
    "versions": {"modeling_vit_scratch": "{version}", "torch": "{version}", "transformers": "{version}"},
    "hardware": "{results.hardware}", "wall_time_seconds": 100.0, "resumed_from": "{results.resumed}",
}  # fmt: skip
_EVALUATION: dict[str, Any] = {
    "metric": "accuracy", "value": 0.9, "n": 60,
    "results": [
        {"metric": "accuracy", "value": 0.9, "n": 60, "interval": [0.8, 0.95], "wilson_interval": [0.8, 0.95]},
        {"metric": "nll", "value": 0.4, "n": 60, "interval": [0.3, 0.5]},
        {"metric": "ece", "value": 0.1, "n": 60, "interval": [0.05, 0.15]},
    ],
    "confidence_level": 0.95, "bootstrap_resamples": 1000, "seed": 42, "threshold": None,
    "model": {"name": "{NAME}", "num_parameters": 1000},
    "dataset": {
        "name": "{evaluation.dataset.name}", "hub_id": None, "license": None, "url": "{evaluation.dataset.url}",
        "images": "{evaluation.dataset.images}", "broken_images": ["{file}"], "seen_in_training": False,
    },
    "temperature": 1.0, "views": 2,
    "per_class": [
        {"label": name, "precision": 0.5, "recall": 0.5, "f1": 0.5, "n": n} for name, n in zip(_CLASSES, (55, 5, 0))
    ],
    "confusion_matrix": {"labels": _CLASSES, "rows_true_columns_predicted": [[50, 5, 0], [0, 5, 0], [0, 0, 0]]},
    "reliability": {"mean_confidence": 0.99, "mean_accuracy": 0.9},
    "examples": {
        "figure": "examples.png", "right": 4, "wrong": 4, "chosen": "{evaluation.examples.chosen}",
        "credit": "{evaluation.examples.credit}",
    },
    "throughput": {"images_per_second": 100.0, "note": "{evaluation.throughput.note}"},
    "command": "{evaluation.command}", "versions": {}, "hardware": "{evaluation.hardware}",
}  # fmt: skip


def _cell(start: str, how: str) -> dict[str, Any]:
    found = {"mean": 0.9, "std": 0.1, "n": 3, "num_held_out_images": 60, "num_training_images": 1000}
    place = f"transfer.{start}.{how}"
    words = {"data": "{DATA}", "start": start, "how": how, "metric": "accuracy", "hardware": "{transfer.hardware}"}
    words |= {"command": f"{{{place}.command}}", "versions": {"torch": "{version}", "transformers": "{version}"}}
    rates = (
        {} if how != FINE_TUNED else _named({"learning_rate": 0.001, "tried": {"{RATE}": 0.9, "{RATE 2}": 0.8}}, place)
    )
    return _named(found, place) | words | rates


def _facts() -> Facts:
    config = ViTScratchConfig.from_variant("S/16", id2label=dict(enumerate(_CLASSES)))
    fields = {name: getattr(config, name) for name in type(config).__dataclass_fields__ if not name.startswith("_")}
    fields |= {"num_register_tokens": 4, "representation_size": 384, "hidden_dropout_prob": 0.1, "temperature": 1.5}
    fields |= {"drop_path_rate": 0.1, "hidden_act": "{config.hidden act}", "num_labels": 3}
    fields |= {"image_hw": config.image_hw, "patch_hw": config.patch_hw, "grid_hw": config.grid_hw}
    fields = _named(fields, "config") | {"id2label": dict(enumerate(_CLASSES)), "problem_type": config.problem_type}
    processor = {"size": {"height": 224, "width": 224}, "image_mean": 0.5, "image_std": 0.5}
    steps = {
        "do_resize": True,
        "do_center_crop": False,
        "do_normalize": True,
        "do_rescale": True,
        "crop_pct": None,
        "resample": 2,
    }
    figures = frozenset(("confusion_matrix.png", "reliability.png", "examples.png"))
    evaluation = Evaluation(
        _named(_EVALUATION, "evaluation"), "evaluation/DATA", figures, _EVALUATION["dataset"]["name"]
    )
    cells = [_cell(start, how) for how in (FINE_TUNED, *SHOWN_PROBES) for start in (SCRATCH, PRETRAINED)]
    cost = _named({"seconds": 100.0, "watts": 24.0, "grams_per_kwh": 473.0, "watt_hours": 1.0, "grams": 1.0}, "cost")
    return Facts(
        name="{NAME}",
        location="{USER/NAME}",
        config=SimpleNamespace(**fields),
        num_parameters=_whole(1000, "results.model.num_parameters"),
        processor=SimpleNamespace(**_named(processor, "processor"), **steps),
        training=_named(_RESULTS, "results"),
        evaluations=[evaluation],
        has_curves=True,
        wishes=Wishes(license="license-of-the-model", hub_model_id="{USER/NAME}"),
        cost=Estimate(**cost, power="{cost.power}", grid="{cost.grid}"),
        transfer=Transfer({"model": "{NAME}", "notes": {"{DATA}": "{transfer.notes.DATA}"}, "cells": cells}, True),
    )
