# SPDX-License-Identifier: Apache-2.0
"""A classifier for the labels of the data: kept, put in their order, or replaced, with a line that says which."""

from typing import Any

import torch
from torch import nn

from ..modeling_vit_scratch import ViTScratchForImageClassification


def fit_classifier(
    model: ViTScratchForImageClassification, label_names: list[str], is_fresh: bool, bias: float, is_multi_label: bool
) -> str:
    """
    Gives the classifier one row for each label, in the order of the data. Its rows are kept if the labels are the same,
    and if both or neither allow several labels for an image.

    Args:
        model: to change.
        label_names: of the data; [] for no classifier.
        is_fresh: whether the classifier was not loaded.
        bias: of a new classifier; its weights are zero.
        is_multi_label: whether an image has any number of labels.

    Returns:
        A line that says what was done.
    """
    config = model.config
    old = [config.id2label[index] for index in range(config.num_labels)]
    same_problem = is_multi_label == (config.problem_type == "multi_label_classification")
    same_labels = len(set(old)) == len(old) and set(old) == set(label_names)
    keeps, had_representation = not is_fresh and same_labels and same_problem, config.representation_size is not None
    if keeps:
        order = [old.index(name) for name in label_names]
        heads = [head for head in (model.classifier, model.distillation_classifier) if head is not None]
        with torch.no_grad():
            for parameter in (parameter for head in heads for parameter in head.parameters()):
                parameter.copy_(parameter[order])
    else:
        # The whole head is replaced, with the tanh layer that pretraining had before it: the paper, 3.2.
        model.vit.pooler.dense, config.representation_size = None, None
        model.distillation_classifier, config.use_distillation_head = None, False
        head = nn.Linear(config.hidden_size, len(label_names), dtype=model.dtype) if label_names else nn.Identity()
        for parameter, value in zip(head.parameters(), (0.0, bias)):
            nn.init.constant_(parameter, value)
        config.head_bias_init = bias
        model.classifier, model.num_labels = head, len(label_names)
    for field, value in label_fields(label_names, is_multi_label).items():
        setattr(config, field, value)
    config.temperature = 1.0  # it was fitted to the weights as they were
    if not label_names:
        return "Its encoder is taken, without a classifier."
    if keeps and old == label_names:
        return f"Its classifier is kept: the {len(old)} labels are the same."
    if keeps:
        return f"Its classifier is kept, with its {len(old)} rows put in the order of the data's labels."
    was = "it had none" if is_fresh or not old else f"it had {len(old)} other labels"
    if not is_fresh and set(old) == set(label_names) and not same_problem:
        was = f"the old one was for {'one label' if is_multi_label else 'several labels'} of an image"
    gone = " The representation layer of its pre-training is gone with the old one." if had_representation else ""
    return f"A fresh classifier for {len(label_names)} labels, starting at zero: {was}.{gone}"


def label_fields(label_names: list[str], is_multi_label: bool) -> dict[str, Any]:
    """The fields of a configuration that follow from the labels, in the order of the class indices."""
    problem = "multi_label_classification" if is_multi_label else "single_label_classification"
    return {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: index for index, name in enumerate(label_names)},
        # Never left to be guessed from the type of the labels.
        "problem_type": problem if label_names else None,
    }
