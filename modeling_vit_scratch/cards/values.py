# SPDX-License-Identifier: Apache-2.0
"""
A card from a Jinja template: the names that it may use, with the metadata by which the Hub sorts models
(hf.co/docs/hub/model-cards), and how it is rendered: wrong names are errors, text from records is escaped for Markdown.
"""

import math
import re
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import FileSystemLoader, StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup
from PIL import Image

from .. import __version__
from ..common.errors import InputError, listed
from ..common.records import (
    METRIC_TITLES,
    NUM_BINS,
    format_score,
    interval_of,
    is_restrictive,
    license_problem,
    title_of,
)
from ..compatibility_vit_scratch import OLDEST
from .records import ModelRecords


# The names that the Hub knows metrics by, and their arguments. A metric that is not here is not listed.
_HUB_METRICS: dict[str, tuple[str, dict[str, Any]]] = {
    "accuracy": ("accuracy", {}), "top5_accuracy": ("top5_accuracy", {}),
    "mean_average_precision": ("mean_average_precision", {}), "macro_f1": ("f1", {"average": "macro"}),
    "micro_f1": ("f1", {"average": "micro"}), "samples_f1": ("f1", {"average": "samples"}),
    "exact_match": ("exact_match", {}), "nll": ("nll", {}), "brier": ("brier_score", {}),
    "ece": ("expected_calibration_error", {}),
}  # fmt: skip
# Those that hf.co/metrics has.
_HUB_TAGS = {"accuracy", "f1", "exact_match", "brier_score"}
# Settings that change nothing at these values, and say nothing.
_NEUTRAL: dict[str, Any] = {
    "label_smoothing": 0, "layer_decay": 1, "head_learning_rate_multiplier": 1, "processes": 1, "broken_images": 0,
    "gradient_accumulation_steps": 1, "gradient_clipping": 0, "weight_decay": 0,
}  # fmt: skip
_HIDDEN = {"recipe", "recipe_source", "recipe_differs", "samples_seen_by_process"}
# Tables have up to so many classes, and of more the worst.
_ALL_CLASSES_UP_TO, _WORST_CLASSES = 20, 10
# Of fewer images of a class, its scores are mostly chance; of fewer images in all, the interval is worth a warning.
_FEW_IMAGES_OF_A_CLASS, _FEW_IMAGES = 10, 1000
_FIGURES = {
    "confusion_matrix.png": "Confusion matrix", "precision_recall.png": "Precision and recall",
    "reliability.png": "Reliability diagram", "per_class.png": "Scores of classes",
}  # fmt: skip
# A run of scripts/transfer.py starts from the weights or from scratch, and is fine-tuned or probed.
PRETRAINED, SCRATCH, FINE_TUNED = "pretrained", "scratch", "fine-tuned"
# The probes that its table shows; the record has more.
SHOWN_PROBES = {"fewshot_5": "5 images a class", "fewshot_10": "10 images a class", "linear": "linear, all images"}


def template_values(records: ModelRecords) -> dict[str, Any]:
    """Every name that a template may use, as scripts/card.py --help lists them: plain values, without methods."""
    options, training, config, folder = records.options, records.training, records.config, records.folder
    main_record = training or records.evaluations[0]
    if training is None:
        architecture = (config.architectures or [""])[0]
        is_encoder = bool(architecture) and not architecture.endswith("ForImageClassification")
    else:  # the configuration does not say it yet
        is_encoder = (training["pretraining"] or {}).get("objective", "supervised") != "supervised"
    license, terms = options.license, {"license_name": options.license_name, "license_link": options.license_link}
    base = training and training["model"].get("license")
    base = base and {"license_name": None, "license_link": None, **base}
    if license is None and base and is_restrictive(base["license"]):
        license, terms = base["license"], {name: base[name] for name in terms}
    elif license is None and training is not None and not license_problem(training["dataset"]["license"]):
        license = training["dataset"]["license"]
    values = {
        "name": (options.hub_model_id or folder.resolve().name).split("/")[-1],
        # A path that depends on this machine helps nobody.
        "location": options.hub_model_id or (folder.name if folder.is_absolute() else folder.as_posix()),
        "task": "image-feature-extraction" if is_encoder else "image-classification",
        "is_encoder": is_encoder,
        "is_multi_label": config.problem_type == "multi_label_classification",
        "labels": [] if is_encoder else [str(config.id2label[index]) for index in range(config.num_labels)],
        "num_parameters": main_record["model"]["num_parameters"],
        "config": config.to_dict()
        | {"image_hw": config.image_hw, "patch_hw": config.patch_hw, "grid_hw": config.grid_hw},
        "processor": _processor(records),
        "training": None if training is None else _training(training),
        "evaluations": [_evaluation(one) for one in records.evaluations],
        "transfer": None if records.transfer is None else transfer_values(records.transfer),
        "emissions": records.emissions,
        "figures": sorted(records.figures),
        "sheet_credit": records.sheet_credit,
        "license": license,
        **terms,
        "base_license": base,
        "license_is_of_data": training is not None
        and license == training["dataset"]["license"]
        and not options.license,
        "base_model": options.base_model or (training and training["model"]["base_model"]),
        "version": main_record["versions"].get("modeling_vit_scratch", __version__),
        "oldest_transformers": OLDEST,
    }
    unseen = (one for one in values["evaluations"] if not one["dataset"]["seen_in_training"])
    values["best_evaluation"] = next(unseen, None)
    return values | {"card_data": Markup(_metadata(records, values).to_yaml())}


def _settings(training: dict[str, Any], usual: dict[str, Any], hidden: set[str] = _HIDDEN) -> list[tuple[str, Any]]:
    return [
        (key.replace("_", " "), value)
        for key, value in training.items()
        if value is not None and key not in hidden and not (key in usual and value == usual[key])
    ]


def _processor(records: ModelRecords) -> dict[str, Any] | None:
    if records.processor is None:
        return None
    values = {"crop_pct": None, "do_center_crop": False, "crop_size": None} | records.processor.to_dict()
    for key in ("image_mean", "image_std"):
        each = values[key] if isinstance(values[key], (list, tuple)) else [values[key]]
        values[key] = list(each[:1] if len(set(each)) == 1 else each)  # one value for channels that are all alike
    return values | {"interpolation": Image.Resampling(records.processor.resample).name.lower()}


def _training(record: dict[str, Any]) -> dict[str, Any]:
    earlier, following = [], record["training"]
    for run in reversed(record.get("earlier") or []):
        earlier.append({**run, "settings": _settings(run["training"], following)})
        following = run["training"]
    first = earlier[-1] if earlier else record["model"]
    # Runs on the same labelled images are one training from scratch; on others, a fine-tuning.
    is_one_training = all(run["data"] == record["dataset"]["name"] and run["metric"] != "loss" for run in earlier)
    # The loss of a pretraining without labels is that of its objective.
    hidden = _HIDDEN | ({"loss"} if record["metric"] == "loss" else set())
    metrics = record["metrics"].items()
    return {
        **record,
        "selection": record["selection"].replace("these same images", "the held-out images").replace("_", " "),
        "selected_on_held_out": "same images" in record["selection"],
        "held_out_from_same_source": " %" in record["dataset"]["held_out"],
        "results": [
            {"metric": key, "value": value} for key, value in metrics if key in METRIC_TITLES or key == record["metric"]
        ],
        "probes": [
            (key.removeprefix("probe_").replace("_", " "), value) for key, value in metrics if key.startswith("probe_")
        ],
        "settings": _settings(record["training"], _NEUTRAL, hidden),
        "earlier": earlier,  # the last first
        "runs_from_scratch": len(earlier) + 1 if first["started_from"] == "scratch" and is_one_training else 0,
    }


def _evaluation(record: dict[str, Any]) -> dict[str, Any]:
    is_multi_label = record["threshold"] is not None
    key, title = ("average_precision", "average precision") if is_multi_label else ("f1", "F1")
    classes = [row for row in record["per_class"] if row["n"]]
    by_score = sorted(classes, key=lambda row: row[key])
    # A metric may have no value, e.g. for labels that no image has.
    results = [{**one, "interval": interval_of(one)} for one in record["results"]]
    main = next(one for one in results if one["metric"] == record["metric"])
    results = [one for one in results if not math.isnan(one["value"])]
    shown = set(record["figures"])
    if len(record["per_class"]) <= _ALL_CLASSES_UP_TO:
        shown.discard("per_class.png")  # the table has them all
    examples = record["examples"]
    return {
        **record,
        "is_multi_label": is_multi_label,
        "results": results,
        "metrics": [one["metric"] for one in results],
        "main": main,
        "num_bins": NUM_BINS,
        "classes": classes if len(classes) <= _ALL_CLASSES_UP_TO else by_score[:_WORST_CLASSES],
        "num_classes": len(classes),
        "class_metric": title,
        "most_frequent": None if is_multi_label else max(classes, key=lambda row: row["n"], default=None),
        "figures": [(file, alt) for file, alt in _FIGURES.items() if file in shown],
        "examples": examples if examples and examples["figure"] in record["figures"] else None,
        # For the limits
        "is_small": record["n"] < _FEW_IMAGES and main["interval"] is not None,
        "absent": [row["label"] for row in record["per_class"] if not row["n"]],
        "few": [row["label"] for row in classes if row["n"] < _FEW_IMAGES_OF_A_CLASS],
        "few_images": _FEW_IMAGES_OF_A_CLASS,
        "worst": {**by_score[0], "score": by_score[0][key]} if by_score and by_score[0][key] < 1 else None,
        "confusions": _confusions(record),
        "calibration": _calibration(record),
    }


def _confusions(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The three most frequent confusions of a class with another one."""
    matrix, labels = record["confusion_matrix"].get("rows_true_columns_predicted"), record["confusion_matrix"]["labels"]
    if matrix is None:  # of several labels
        return []
    counts, images = np.array(matrix), [row["n"] for row in record["per_class"]]
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:3]
    return [
        {"label": labels[row], "prediction": labels[column], "n": matrix[row][column], "of": images[row]}
        for row, column in zip(*np.unravel_index(order, counts.shape))
        if counts[row, column]
    ]


def _calibration(record: dict[str, Any]) -> str | None:
    """Whether confidence and accuracy differ by more than chance makes them; None if not, or if that is not known."""
    confidence, accuracy = record["reliability"]["mean_confidence"], record["reliability"]["mean_accuracy"]
    interval = next((one.get("wilson_interval") for one in record["results"] if one["metric"] == "accuracy"), None)
    if interval is None or interval[0] <= confidence <= interval[1]:
        return None
    return "overconfident" if confidence > accuracy else "underconfident"


def _metadata(records: ModelRecords, values: dict[str, Any]) -> ModelCardData:
    training, license, results = records.training, values["license"], _hub_results(records)
    sources = [training["dataset"]] if training else [one["dataset"] for one in records.evaluations]
    metrics = {result.metric_type for result in results} & _HUB_TAGS
    return ModelCardData(
        license=license,
        license_name=values["license_name"] if license == "other" else None,
        license_link=values["license_link"] if license == "other" else None,
        library_name="transformers",
        pipeline_tag=values["task"],
        base_model=values["base_model"],
        datasets=list(dict.fromkeys(source["hub_id"] for source in sources if source["hub_id"])) or None,
        tags=["vision", "vit", "custom_code", *(["multi-label-classification"] if values["is_multi_label"] else [])],
        metrics=sorted(metrics) or None,
        co2_eq_emissions=_emissions(records),
        model_name=values["name"] if results else None,
        eval_results=results or None,
    )


def _hub_results(records: ModelRecords) -> list[EvalResult]:
    """Results on images that it was not trained on: of evaluations, and of the training if none is on the same."""
    shown, training = [one for one in records.evaluations if not one["dataset"]["seen_in_training"]], records.training
    found = [(record, record["dataset"]["images"], one) for record in shown for one in record["results"]]
    evaluated = [(one["dataset"]["name"], one["n"]) for one in shown]
    if training is not None and (training["dataset"]["name"], training["n"]) not in evaluated:
        results = ({"metric": key, "value": value, "n": training["n"]} for key, value in training["metrics"].items())
        found += [(training, training["dataset"]["held_out"], result) for result in results]
    return [
        _hub_result(record, images, result)
        for record, images, result in found
        if result["metric"] in _HUB_METRICS and not math.isnan(result["value"])
    ]


def _hub_result(record: dict[str, Any], images: str, result: dict[str, Any]) -> EvalResult:
    dataset, split = record["dataset"], re.match(r"the (\w+) split of the data", images)
    kind, arguments = _HUB_METRICS[result["metric"]]
    arguments = {**arguments, "n": result["n"]}
    if interval := interval_of(result):
        arguments |= {
            "confidence_level": record["confidence_level"],
            "confidence_interval": [round(bound, 4) for bound in interval],
            "confidence_method": "wilson" if result.get("wilson_interval") else "percentile bootstrap over images",
        }
    return EvalResult(
        task_type="image-classification",
        task_name="Image Classification",
        dataset_type=dataset["hub_id"] or re.sub(r"\W+", "-", dataset["name"].lower()),
        dataset_name=dataset["name"],
        dataset_split=split and split[1],
        dataset_args={"images": images},
        metric_type=kind,
        metric_name=f"{title_of(result['metric'])} (n = {result['n']:,})",
        metric_value=round(result["value"], 4),
        metric_args=arguments,
    )


def _emissions(records: ModelRecords) -> dict[str, Any] | None:
    """What codecarbon reports, as hf.co/docs/hub/model-cards-co2 has it."""
    training, found = records.training, records.emissions
    if found is None:
        return None
    from_scratch = training["model"]["started_from"] == "scratch" or training["pretraining"]
    emissions = {
        "emissions": found["grams"],
        "source": " ".join(filter(None, ("codecarbon", found["version"]))),
        "training_type": "pre-training" if from_scratch else "fine-tuning",
        "hardware_used": training["hardware"],
    }
    return emissions | ({"geographical_location": found["country"]} if found["country"] else {})


def find(record: dict[str, Any], data: str, how: str) -> dict[str, dict[str, Any]]:
    """{PRETRAINED: cell, SCRATCH: cell} of transfer.json for a data set, fine-tuned or by a probe."""
    return {cell["start"]: cell for cell in record["cells"] if (cell["data"], cell["how"]) == (data, how)}


def names_of(record: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(cell["data"] for cell in record["cells"]))


def in_words(cell: dict[str, Any]) -> str:
    """Mean and standard deviation of a cell: 74.8 ± 0.4 %."""
    spread = "" if cell["std"] is None else f" ± {100 * cell['std']:.1f}"
    return f"{100 * cell['mean']:.1f}{spread} %"


def gain_in_words(row: dict[str, dict[str, Any]]) -> str:
    """What the pretrained weights gain, in percentage points: +6.6."""
    return f"{100 * (row[PRETRAINED]['mean'] - row[SCRATCH]['mean']):+.1f}"


def transfer_values(record: dict[str, Any]) -> dict[str, Any]:
    cells = [{**cell, "words": in_words(cell)} for cell in record["cells"]]
    record, data = {**record, "cells": cells}, names_of(record)
    rows = {name: find(record, name, FINE_TUNED) for name in data}
    probes = {how: title for how, title in SHOWN_PROBES.items() if any(cell["how"] == how for cell in cells)}
    probed = {name: [find(record, name, how) for how in probes] for name in data}
    last_probes = [found[-1] for found in probed.values() if found and found[-1]]
    return {
        "model": record["model"],
        "is_accuracy": {cell["metric"] for row in rows.values() for cell in row.values()} == {"accuracy"},
        "rows": [(name, row, gain_in_words(row)) for name, row in rows.items()],
        "probes": list(probes.values()),
        "probe_rows": list(probed.items()),
        "num_seeds": sorted({cell["n"] for cell in cells}),
        "learning_rates": _by_value(
            (name, (row[SCRATCH]["learning_rate"], row[PRETRAINED]["learning_rate"])) for name, row in rows.items()
        ),
        "tried": list(dict.fromkeys(rate for row in rows.values() for rate in row[SCRATCH].get("tried", {}))),
        "machines": _by_value(
            (cell["data"], (cell["hardware"], cell["versions"]["torch"], cell["versions"]["transformers"]))
            for cell in cells
        ),
        "notes": record["notes"],
        "commands": "\n".join(
            row[start]["command"] for row in (*rows.values(), *last_probes) for start in (SCRATCH, PRETRAINED)
        ),
    }


def _by_value(pairs: Iterable[tuple[str, tuple[Any, ...]]]) -> list[tuple[tuple[Any, ...], list[str] | None]]:
    """Each value with the data sets that have it; with None if all have the same."""
    groups: dict[tuple[Any, ...], dict[str, None]] = {}
    for data, value in pairs:
        groups.setdefault(value, {})[data] = None
    return [(value, list(data) if len(groups) > 1 else None) for value, data in groups.items()]


# --- Rendering --------------------------------------------------------------------------------------------------------


CARD_TEMPLATE = "template.md"


class Absent(StrictUndefined):
    """A value that this model's records don't have: false in a condition, an error where it is printed."""

    __slots__ = ()
    __format__ = StrictUndefined._fail_with_undefined_error

    def __bool__(self) -> bool:
        return False

    @property
    def _undefined_message(self) -> str:
        return f"the records of this model have no {self._undefined_name}. Put a condition around it"


class CardEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox. In that of `ModelCard` a misspelt name prints nothing, and a name from a record may be HTML."""

    def getitem(self, obj: Any, argument: Any) -> Any:
        """As in Jinja; None, which JSON has for what is not known, becomes `Absent`."""
        value = super().getitem(obj, argument)
        return Absent(name=argument) if value is None else value

    getattr = getitem  # keys of records before methods of dictionaries, e.g. a key named "values"


def render(values: dict[str, Any], template: str = CARD_TEMPLATE, text: str | None = None) -> str:
    """Fills in a template of this folder, or the `text` of another one. InputError, with the line, for a mistake."""
    environment = CardEnvironment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, finalize=_escaped, trim_blocks=True,
        lstrip_blocks=True, autoescape=True,  # so that macros and blocks return Markup, which _escaped leaves alone
    )  # fmt: skip
    environment.filters |= FILTERS
    values = {name: Absent(name=name) if value is None else value for name, value in values.items()}
    try:
        chosen = environment.get_template(template) if text is None else environment.from_string(text)
        rendered = chosen.render(values)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise InputError(f"{_where(error, template)}: {error}.") from error
    return re.sub(r"\n{3,}", "\n\n", rendered).strip() + "\n"


def _where(error: Exception, template: str) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.endswith(".py")]
    place = error if isinstance(error, TemplateSyntaxError) else frames[-1] if frames else None
    if place is None:
        return template
    file, line = place.filename, place.lineno
    return f"{template if not file or file.startswith('<') else Path(file).name}, line {line}"


def escape(text: Any) -> Markup:
    """Text on one line, without markup of Markdown or HTML."""
    return Markup(re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", re.sub(r"\s+", " ", str(text))))


def _escaped(value: Any) -> Any:
    if value is None:
        raise UndefinedError("the records of this model have no value for it. Put a condition around it")
    return value if hasattr(value, "__html__") else escape(value)


def number(value: Any, digits: int | None = None) -> Any:
    """1,797 or 0.001; several numbers with commas; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return ", ".join(str(number(one, digits)) for one in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if digits is not None:
        return f"{value:,.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def percent(value: float, digits: int = 2) -> str:
    """A fraction as a percentage: 98.89 %."""
    return f"{100 * value:.{digits}f} %"


def size(value: int | Sequence[int]) -> str:
    """Height and width: 224 x 224."""
    height, width = (value, value) if isinstance(value, int) else value
    return f"{height} x {width}"


def url(address: str) -> Markup:
    """A path or an address as the target of a link."""
    return Markup(quote(address, safe="/:?&=#%+,;@!~*'"))


def code(text: Any) -> Markup:
    return Markup("`" + " ".join(str(text).split()).replace("`", "'").replace("|", r"\|") + "`")


def code_block(text: Any, language: str = "text") -> Markup:
    """Code in a fence that is longer than any in the code."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", str(text))), default=0))
    return Markup(f"{fence}{language}\n{str(text).strip()}\n{fence}")


FILTERS = {
    "number": number, "percent": percent, "size": size, "names": listed, "score": format_score,
    "metric_title": title_of, "metric_name": lambda metric: METRIC_TITLES.get(metric, metric),
    "url": url, "code": code, "code_block": code_block,
}  # fmt: skip
