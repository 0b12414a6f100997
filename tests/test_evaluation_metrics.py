# SPDX-License-Identifier: Apache-2.0
"""Scores against scikit-learn, torch and plain loops; intervals against the binomial; the temperature's fit."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binom
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    f1_score,
    log_loss,
    top_k_accuracy_score,
)

from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.evaluation.metrics import (
    brier_scores,
    confidences,
    negative_log_likelihoods,
    per_class,
    probabilities,
    reliability,
    score,
)
from modeling_vit_scratch.evaluation.report import fit_temperature


@pytest.fixture
def one_label():
    """Logits (300, 8) that know something, and classes."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 8, 300)
    return generator.normal(size=(300, 8)) + 2.0 * np.eye(8)[labels], labels


@pytest.fixture
def many_labels():
    """Logits (200, 5), and 0 and 1 for each; nobody has the last label."""
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 2, (200, 5))
    labels[:, 4] = 0
    return generator.normal(size=(200, 5)) + labels, labels


def ece_by_hand(confidence, correct, bins):
    """Guo et al., equation 3, bin by bin."""
    total = 0.0
    for number in range(bins):
        inside = (confidence > number / bins) & (confidence <= (number + 1) / bins)
        if inside.any():
            total += inside.sum() * abs(correct[inside].mean() - confidence[inside].mean())
    return total / len(confidence)


def values_of(scores):
    return {one["metric"]: one["value"] for one in scores}


def test_one_label_against_scikit_learn(one_label):
    logits, labels = one_label
    values, best = probabilities(logits), logits.argmax(1)
    ours = values_of(score(values, labels, resamples=0))
    assert ours == pytest.approx(
        {
            "accuracy": accuracy_score(labels, best),
            "top5_accuracy": top_k_accuracy_score(labels, logits, k=5),
            "macro_f1": f1_score(labels, best, average="macro"),
            "nll": log_loss(labels, values),
            "brier": brier_score_loss(labels, values, scale_by_half=False),
            "ece": ece_by_hand(values.max(1), best == labels, 15),
            "adaptive_ece": ours["adaptive_ece"],
        },
        abs=1e-12,
    )
    assert F.cross_entropy(torch.tensor(logits), torch.tensor(labels)).item() == pytest.approx(ours["nll"], abs=1e-12)


def test_several_labels_against_scikit_learn(many_labels):
    logits, labels = many_labels
    values = probabilities(logits, is_multi_label=True)
    ours, answer = values_of(score(values, labels, resamples=0)), logits >= 0
    theirs = {
        "mean_average_precision": average_precision_score(labels[:, :4], logits[:, :4], average="macro"),
        "macro_f1": f1_score(labels, answer, average="macro", zero_division=0),
        "micro_f1": f1_score(labels, answer, average="micro"),
        "exact_match": accuracy_score(labels, answer),
        "nll": F.binary_cross_entropy_with_logits(torch.tensor(logits), torch.tensor(labels).double()).item(),
        "brier": ((values - labels) ** 2).mean(),
    }
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-12)
    rows = per_class(values, labels, list("abcde"), threshold=0.5)
    assert [row["average_precision"] for row in rows[:4]] == pytest.approx(
        average_precision_score(labels[:, :4], logits[:, :4], average=None), abs=1e-12
    )
    assert rows[4]["average_precision"] is None


def test_bins_of_equal_numbers_by_hand():
    confidence, correct = np.array([0.2, 0.9, 0.4, 0.6]), np.array([0, 1, 1, 1])
    diagram = reliability(confidence, correct, bins=2, equal_mass=True)
    assert diagram.counts.tolist() == [2, 2]
    assert diagram.expected_error == pytest.approx((abs(0.5 - 0.3) + abs(1 - 0.75)) / 2)


def test_a_confidence_on_an_edge_is_in_the_bin_below():
    diagram = reliability(np.array([0.0, 0.5, 0.51, 1.0]), np.ones(4), bins=2)
    assert diagram.counts.tolist() == [2, 2]


def test_certain_and_wrong_is_finite():
    values, labels = np.array([[1.0, 0.0]]), np.array([1])
    assert np.isfinite(negative_log_likelihoods(values, labels)).all()
    assert brier_scores(values, labels) == pytest.approx([2.0])


def test_views_are_averaged_as_probabilities(one_label):
    logits = one_label[0][:, :4]
    views = np.stack([logits, 3.0 * logits], axis=1)
    by_torch = torch.tensor(views).softmax(-1).mean(1).numpy()
    assert probabilities(views) == pytest.approx(by_torch, abs=1e-12)


def test_intervals_of_an_accuracy_are_the_binomial_ones():
    labels = np.zeros(400, dtype=int)
    values = np.tile([0.8, 0.2], (400, 1))
    values[:100] = [0.3, 0.7]
    accuracy = score(values, labels, resamples=4000)[0]
    theirs = binom.ppf([0.025, 0.975], 400, 0.75) / 400
    assert accuracy["interval"] == pytest.approx(theirs, abs=0.006)
    again = score(values, labels, resamples=4000)[0]
    assert again["interval"] == accuracy["interval"]  # the seed says all
    assert score(values[100:], labels[100:], resamples=200)[0]["wilson_interval"][0] < 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Temperature


def test_the_temperature_of_calibrated_logits_is_one_and_that_of_twice_them_two():
    generator = np.random.default_rng(0)
    logits = 2.0 * generator.normal(size=(20_000, 6))
    labels = (probabilities(logits).cumsum(1) < generator.random((20_000, 1))).sum(1)
    fitted = fit_temperature(logits, labels)
    assert fitted == pytest.approx(1.0, abs=0.03)
    assert fit_temperature(2.0 * logits, labels) == pytest.approx(2.0 * fitted, abs=1e-4)
    several = (generator.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(int)
    assert fit_temperature(3.0 * logits, several) == pytest.approx(3.0, abs=0.06)


def test_it_lowers_nll_and_leaves_the_answers_alone(one_label):
    logits, labels = 4.0 * one_label[0], one_label[1]
    temperature = fit_temperature(logits, labels)
    before, after = probabilities(logits), probabilities(logits, temperature)
    nll = [negative_log_likelihoods(values, labels).mean() for values in (before, after)]
    assert nll[1] < nll[0]
    for other in (0.99 * temperature, 1.01 * temperature):
        assert negative_log_likelihoods(probabilities(logits, other), labels).mean() > nll[1]
    assert (before.argmax(1) == after.argmax(1)).all()
    assert confidences(after, labels)[1].mean() == confidences(before, labels)[1].mean()


def test_without_a_mistake_there_is_no_temperature():
    with pytest.raises(InputError, match="No temperature fits"):
        fit_temperature(np.eye(3), np.arange(3))
