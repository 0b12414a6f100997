# SPDX-License-Identifier: Apache-2.0
"""Losses of classification against torch and numpy's float64, and under accumulation and two processes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forked import run_forked
from sklearn.utils.class_weight import compute_class_weight
from tiny_images import build, flags, weights

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.training.arguments import LOSSES
from modeling_vit_scratch.training.optimization import ClassificationLoss, class_weights


LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)) * 3
CLASSES = torch.tensor([0, 3, 1, 1, 2, 0])
SOFT = F.one_hot(CLASSES, 4) * 0.7 + F.one_hot(CLASSES.roll(1), 4) * 0.3
WEIGHTS = np.array([0.5, 1.0, 2.0, 0.25])


def sigmoid_xent(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """big_vision at 0127fb6, utils.py, in float64: log_sigmoid(x) is -log(1 + exp(-x))."""
    log_p, log_not_p = -np.logaddexp(0, -logits), -np.logaddexp(0, logits)
    return -np.sum(labels * log_p + (1.0 - labels) * log_not_p, axis=-1)


@pytest.mark.parametrize("labels", [CLASSES, SOFT], ids=["classes", "probabilities"])
def test_the_sigmoid_loss_is_that_of_big_vision(labels):
    targets = np.eye(4)[labels] if labels.dim() == 1 else labels.double().numpy()
    wanted = sigmoid_xent(LOGITS.double().numpy(), targets)
    assert ClassificationLoss("sigmoid", 4)({"logits": LOGITS}, labels).item() == pytest.approx(wanted.mean(), rel=1e-6)
    smoothed = ClassificationLoss("sigmoid", 4, label_smoothing=0.1)({"logits": LOGITS}, labels).item()
    if labels.dim() == 1:
        wanted = sigmoid_xent(LOGITS.double().numpy(), 0.9 * targets + 0.1 / 4)
    assert smoothed == pytest.approx(wanted.mean(), rel=1e-6)  # probabilities are smoothed where they are made


def test_extreme_logits_give_a_finite_loss():
    for kind in LOSSES:
        loss = ClassificationLoss(kind, 2)({"logits": torch.tensor([[500.0, -500.0]])}, torch.tensor([1]))
        assert 400 < loss.item() < 1100


def test_the_binary_loss_is_that_of_deit():
    # facebookresearch/deit, engine.py: targets = targets.gt(0.0), then torch.nn.BCEWithLogitsLoss.
    wanted = torch.nn.BCEWithLogitsLoss()(LOGITS.double(), SOFT.gt(0.0).double()).item()
    assert ClassificationLoss("bce", 4)({"logits": LOGITS}, SOFT).item() == pytest.approx(wanted, rel=1e-6)
    wanted = torch.nn.BCEWithLogitsLoss()(LOGITS.double(), F.one_hot(CLASSES).double()).item()
    assert ClassificationLoss("bce", 4)({"logits": LOGITS}, CLASSES).item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("labels", [CLASSES, SOFT], ids=["classes", "probabilities"])
def test_softmax_with_weights_is_torchs_but_for_the_divisor(labels, smoothing):
    loss = ClassificationLoss("softmax", 4, smoothing, WEIGHTS)({"logits": LOGITS}, labels).item()
    smoothing = smoothing if labels.dim() == 1 else 0.0
    theirs = torch.nn.CrossEntropyLoss(torch.tensor(WEIGHTS), reduction="sum", label_smoothing=smoothing)
    target = labels if labels.dim() == 1 else labels.double()
    assert loss == pytest.approx(theirs(LOGITS.double(), target).item() / 6, rel=1e-6)


def test_over_the_whole_training_set_balanced_weights_are_torchs_mean():
    weights = class_weights(["balanced"], CLASSES.tolist(), 4)
    np.testing.assert_allclose(weights, compute_class_weight("balanced", classes=np.arange(4), y=CLASSES.numpy()))
    loss = ClassificationLoss("softmax", 4, class_weights=weights)({"logits": LOGITS}, CLASSES).item()
    theirs = torch.nn.CrossEntropyLoss(torch.tensor(weights))
    assert loss == pytest.approx(theirs(LOGITS.double(), CLASSES).item(), rel=1e-6)
    given = class_weights(["1", "3", "1", "2"], CLASSES.tolist(), 4)
    np.testing.assert_allclose(given / given[0], [1, 3, 1, 2])
    assert given[CLASSES].mean() == pytest.approx(1.0)
    assert class_weights(["balanced"], [0, 0, 2], 4).tolist() == [0.75, 0.0, 1.5, 0.0]


@pytest.mark.parametrize("kind", ["sigmoid", "bce"])
def test_weights_of_binary_losses_weigh_images(kind):
    plain = [ClassificationLoss(kind, 4)({"logits": LOGITS[i : i + 1]}, CLASSES[i : i + 1]).item() for i in range(6)]
    weighted = ClassificationLoss(kind, 4, class_weights=WEIGHTS)({"logits": LOGITS}, CLASSES).item()
    assert weighted == pytest.approx(np.mean(WEIGHTS[CLASSES] * plain), rel=1e-6)


@pytest.mark.parametrize(
    ("wish", "message"),
    [(["1", "2"], "2 values for 4 labels"), (["1", "2", "x", "1"], "no numbers"), (["1", "2", "0", "1"], "positive")],
)
def test_wrong_weights_are_told(wish, message):
    with pytest.raises(ValueError, match=message):
        class_weights(wish, CLASSES.tolist(), 4)


# ---------------------------------------------------------------------------------------------------------------------
# The update

KINDS = {
    "sigmoid": ["--loss", "sigmoid"],
    "sigmoid smoothed": ["--loss", "sigmoid", "--label_smoothing_factor", "0.1"],
    "bce": ["--loss", "bce"],
    "weights": ["--class_weights", "1", "3", "2"],
    "weights smoothed": ["--class_weights", "1", "3", "2", "--label_smoothing_factor", "0.1"],
    "sigmoid weights": ["--loss", "sigmoid", "--class_weights", "1", "3", "2"],
    "soft sigmoid": ["--loss", "sigmoid"],
    "soft bce weights": ["--loss", "bce", "--class_weights", "1", "3", "2"],
}


class Labelled(torch.utils.data.Dataset):
    """Seven fixed random images, with classes or probabilities."""

    def __init__(self, is_soft: bool) -> None:
        generator = torch.Generator().manual_seed(3)
        self.pixel_values = torch.randn(7, 3, 16, 24, generator=generator)
        classes = torch.randint(3, (7,), generator=generator)
        mixed = F.one_hot(classes, 3) * 0.6 + F.one_hot(classes.roll(1), 3) * 0.4
        self.labels = mixed if is_soft else classes

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_that_of_the_whole_batch_however_it_is_cut(pets, tmp_path, kind):
    changes = {}
    for batch, accumulation in ((7, 1), (4, 2), (2, 4)):  # 7; 4 + 3; 2 + 2 + 2 + 1
        more = ["--optim", "sgd", "--learning_rate", "0.1", "--lr_scheduler_type", "constant", "--warmup_steps", "0"]
        more += ["--max_steps", "1", "--max_grad_norm", "0", "--per_device_train_batch_size", str(batch)]
        more += ["--gradient_accumulation_steps", str(accumulation), "--dataloader_num_workers", "0", *KINDS[kind]]
        trainer = build(tmp_path / f"{batch}", *flags(pets, *more))
        trainer.train_dataset = Labelled(kind.startswith("soft"))
        before = weights(trainer)
        trainer.train()
        after = weights(trainer)
        changes[batch] = torch.cat([(after[key] - before[key]).flatten() for key in after])
    for batch in (4, 2):
        assert changes[batch].norm() / changes[7].norm() == pytest.approx(1.0, abs=5e-5)
        assert torch.allclose(changes[batch], changes[7], atol=1e-6)
    assert changes[7].norm() > 0.003


def train_as_process(rank: int, processes: int, pets: str, folder: str) -> None:
    """One of the processes of a run with each of a few losses; the first one writes the weights."""
    for kind in ("sigmoid smoothed", "soft bce weights", "weights"):
        more = ["--optim", "sgd", "--learning_rate", "0.1", "--max_steps", "2", "--dataloader_num_workers", "0"]
        more += ["--dataloader_drop_last", "True"]  # the last batch would be filled up with other images
        more += ["--per_device_train_batch_size", str(4 // processes), *KINDS[kind]]
        trainer = build(f"{folder}/{kind}-{processes}", *flags(pets, *more))
        assert trainer.args.world_size == processes
        trainer.train_dataset = Labelled(kind.startswith("soft"))
        trainer.train()
        if rank == 0:
            torch.save(weights(trainer), f"{folder}/{kind}-{processes}.pt")


def test_two_processes_give_the_weights_of_one(pets, tmp_path):
    for processes in (1, 2):
        run_forked(train_as_process, processes, processes, pets, str(tmp_path))
    for kind in ("sigmoid smoothed", "soft bce weights", "weights"):
        one, two = (torch.load(tmp_path / f"{kind}-{processes}.pt") for processes in (1, 2))
        assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-6, kind


# ---------------------------------------------------------------------------------------------------------------------
# Flags and the bias of the head


def test_the_loss_of_the_command_line_is_that_of_the_trainer(pets, tmp_path):
    trainer = build(tmp_path / "out", *flags(pets, "--loss", "bce", "--mixup", "0.8", "--class_weights", "balanced"))
    batch = trainer.prepare_batch(next(iter(trainer.get_train_dataloader())))
    trainer.model.eval()
    loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    wanted = torch.nn.BCEWithLogitsLoss()(outputs.logits, batch["labels"].gt(0).float())  # as many of every class
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert "class_weights" not in trainer.model.config.to_dict()


def test_flags_of_the_loss_are_checked(pets, tmp_path):
    for more, message in (
        (["--loss", "hinge"], "--loss: invalid choice"),
        (["--loss", "bce", "--label_smoothing_factor", "0.1"], "Keep one of them"),
        (["--class_weights", "1", "2"], "2 values for 3 labels"),
    ):
        with pytest.raises(InputError, match=message):
            build(tmp_path / "out", *flags(pets, *more))


def test_the_bias_of_the_head_starts_where_the_configuration_says(tmp_path, pets):
    config = ViTScratchConfig.from_variant(
        "test/4", num_labels=3, head_bias_init=-6.9, zero_init_head=True, use_distillation_token=True,
        use_distillation_head=True,
    )  # fmt: skip
    model = ViTScratchForImageClassification(config)
    for head in (model.classifier, model.distillation_classifier):
        assert head.bias.tolist() == pytest.approx([-6.9] * 3)
        assert not head.weight.any()
    assert not model.vit.layers[0].attention.qkv.bias.any()
    model.classifier.bias.data.fill_(1.0)
    model.save_pretrained(tmp_path / "saved")
    loaded = ViTScratchForImageClassification.from_pretrained(tmp_path / "saved")
    assert loaded.classifier.bias.tolist() == [1.0] * 3
    assert loaded.config.head_bias_init == -6.9
    # A fresh head for other labels starts at zero, or where the command line says.
    start = ["--model_name_or_path", str(tmp_path / "saved")]
    fresh = build(tmp_path / "out", *flags(pets, *start)).model
    assert not fresh.classifier.bias.any()
    assert fresh.config.head_bias_init == 0
    fresh = build(tmp_path / "out", *flags(pets, *start, "--config_overrides", "head_bias_init=-2")).model
    assert fresh.classifier.bias.tolist() == [-2.0] * 3
    with pytest.raises(ValueError, match="head_bias_init=nan"):
        ViTScratchConfig(head_bias_init=float("nan"))
