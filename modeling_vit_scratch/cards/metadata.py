# SPDX-License-Identifier: Apache-2.0
"""The metadata of a card, which the Hub sorts, filters and ranks models by: hf.co/docs/hub/model-cards."""

import math
import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..common.records import interval_of, license_problem, title_of
from .records import Evaluation, ModelRecords


# The names that the Hub knows metrics by, and what to hand their `compute`. A metric that is not here is not listed.
_TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "accuracy": ("accuracy", {}),
    "top5_accuracy": ("top5_accuracy", {}),
    "mean_average_precision": ("mean_average_precision", {}),
    "macro_f1": ("f1", {"average": "macro"}),
    "micro_f1": ("f1", {"average": "micro"}),
    "samples_f1": ("f1", {"average": "samples"}),
    "exact_match": ("exact_match", {}),
    "nll": ("nll", {}),
    "brier": ("brier_score", {}),
    "ece": ("expected_calibration_error", {}),
}
# Those that hf.co/metrics has.
_KNOWN = {"accuracy", "f1", "exact_match", "brier_score"}


def metadata(records: ModelRecords) -> ModelCardData:
    """Everything that the records tell: what they don't is left out."""
    training, results, license = records.training or {}, _results(records), license_of(records)
    sources = [training.get("dataset"), *(one.record["dataset"] for one in records.evaluations if not training)]
    hub_ids = [source["hub_id"] for source in sources if source and source.get("hub_id")]
    kinds = {result.metric_type for result in results} & _KNOWN
    return ModelCardData(
        license=license,
        license_name=records.options.license_name if license == "other" else None,
        license_link=records.options.license_link if license == "other" else None,
        library_name="transformers",
        pipeline_tag=task(records),
        base_model=base_model(records),
        datasets=list(dict.fromkeys(hub_ids)) or None,
        tags=["vision", "vit", "custom_code", *(["multi-label-classification"] if records.is_multi_label else [])],
        metrics=sorted(kinds) or None,
        co2_eq_emissions=_emissions(records),
        model_name=records.name if results else None,
        eval_results=results or None,
    )


def task(records: ModelRecords) -> str:
    """The pipeline that the model is for."""
    return "image-feature-extraction" if records.is_encoder else "image-classification"


def base_model(records: ModelRecords) -> str | None:
    """The id on the Hub of what training started from, where that is known."""
    return records.options.base_model or (records.training or {"model": {}})["model"].get("base_model")


def license_of(records: ModelRecords) -> str | None:
    """The licence of the model: as it was given, else that of the data it was trained on, if the Hub knows it."""
    if records.options.license is not None:
        return records.options.license
    license = (records.training or {"dataset": {}})["dataset"].get("license")
    return None if license_problem(license) else license


def _results(records: ModelRecords) -> list[EvalResult]:
    """Of images that it was not trained on: of evaluations, and of the training where none is of the same images."""
    shown = [one for one in records.evaluations if one.is_unseen]
    results = [result for one in shown for result in _of_evaluation(one)]
    training = records.training
    same = training and any(
        one.record["dataset"]["name"] == training["dataset"]["name"] and one.record["n"] == training["n"]
        for one in shown
    )
    return results if training is None or same else results + _of_training(training)


def _of_training(record: dict[str, Any]) -> list[EvalResult]:
    return [
        _result(record["dataset"], record["dataset"]["held_out"], metric, value, {"n": record["n"]})
        for metric, value in record["metrics"].items()
        if metric in _TYPES
    ]


def _of_evaluation(evaluation: Evaluation) -> list[EvalResult]:
    record, results = evaluation.record, []
    for one in record["results"]:
        if one["metric"] not in _TYPES or math.isnan(one["value"]):
            continue
        interval = interval_of(one)
        more = {"n": one["n"]}
        if interval is not None:
            more |= {
                "confidence_level": record["confidence_level"],
                "confidence_interval": [round(bound, 4) for bound in interval],
                "confidence_method": "wilson" if one.get("wilson_interval") else "percentile bootstrap over images",
            }
        results.append(_result(record["dataset"], record["dataset"]["images"], one["metric"], one["value"], more))
    return results


def _result(dataset: dict[str, Any], images: str, metric: str, value: float, more: dict[str, Any]) -> EvalResult:
    kind, arguments = _TYPES[metric]
    return EvalResult(
        task_type="image-classification",
        task_name="Image Classification",
        dataset_type=dataset.get("hub_id") or re.sub(r"\W+", "-", dataset["name"].lower()),
        dataset_name=dataset["name"],
        dataset_split=_split(images),
        dataset_args={"images": images},
        metric_type=kind,
        metric_name=f"{title_of(metric)} (n = {more['n']:,})",
        metric_value=round(value, 4),
        metric_args={**arguments, **more},
    )


def _split(images: str) -> str | None:
    """The name of a split of the data, where the record's words are about one."""
    found = re.match(r"the (\w+) split of the data", images)
    return found[1] if found else None


def _emissions(records: ModelRecords) -> dict[str, Any] | None:
    """What codecarbon reports, as hf.co/docs/hub/model-cards-co2 has it."""
    training, found = records.training, records.emissions
    if training is None or found is None:
        return None
    from_scratch = training["model"]["started_from"] == "scratch" or training["pretraining"]
    emissions = {
        "emissions": found["grams"],
        "source": " ".join(filter(None, ("codecarbon", found["version"]))),
        "training_type": "pre-training" if from_scratch else "fine-tuning",
        "hardware_used": training["hardware"],
    }
    return emissions | ({"geographical_location": found["country"]} if found["country"] else {})
