# SPDX-License-Identifier: Apache-2.0
"""
How good features are without fine-tuning: few-shot least squares, nearest neighbours, a linear classifier.

Features are what a classifier would see, of the model in evaluation mode, each image once. All three judge frozen
features by labelled images (the bank) and tell the accuracy on others (the queries). The first two have nothing to
tune and take seconds, so that `Probe` can watch them during training.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..acceleration.speed_up import only_pooled_output
from ..data.dataset import ImageClassificationDataset
from ..data.pixels import Normalize
from ..data.splits import ImageData, check_for_probes
from ..data.streams import ImageStream


SHOTS = (1, 5, 10, 25)
FEW_SHOT_L2 = 2.0**10
FEW_SHOT_SEEDS = 3
_BIAS_FEATURE = 100.0
NEIGHBORS, TEMPERATURE = 20, 0.07
L2_GRID = tuple(10.0**power for power in range(-2, 6))


# ---------------------------------------------------------------------------------------------------------------------
# Features


class Features(NamedTuple):
    """`values` (N, D) float32 and `labels` (N,) int64, both numpy."""

    values: np.ndarray
    labels: np.ndarray


def image_features(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """
    (B, C, H, W) -> (B, D): what a classifier sees. That is the pooled output, after the representation layer if there
    is one; of an encoder without pooling the class token, or the mean over patches if there is no class token either.

    Args:
        model: a `ViTScratchModel`, or any module that has one as `vit`.
    """
    encoder = getattr(model, "vit", model)
    outputs = encoder(pixel_values, **only_pooled_output(encoder))
    if outputs.pooler_output is not None:
        return outputs.pooler_output
    tokens, config = outputs.last_hidden_state, encoder.config
    return tokens[:, 0] if config.use_cls_token else tokens[:, config.num_prefix_tokens :].mean(dim=1)


@torch.no_grad()
def extract_features(
    model: nn.Module,
    dataset: Dataset,
    batch_size: int = 128,
    num_workers: int = 0,
    normalize: Callable[[Tensor], Tensor] | None = None,
    features: Callable[[nn.Module, Tensor], Tensor] = image_features,
) -> Features:
    """
    Features of every image of a dataset, once, in its order; with several processes each computes its share, and all
    get the whole. Leaves the modes of the model's modules and the random state as they were.

    Args:
        model: on its device.
        dataset: map-style, of {"pixel_values": (C, H, W), "labels": int}; other entries are left out.
        batch_size: per process.
        num_workers: processes that read images, per process.
        normalize: what makes the dataset's pixels those that the model takes, on its device. Default: nothing.
        features: from model and pixels (B, C, H, W) to (B, D).

    Raises:
        ValueError: for an empty dataset, or features that are not finite.
    """
    count, state = len(dataset), PartialState()
    if count == 0:
        raise ValueError("There are no images to take features of.")
    # Every process has as many: those that fill up are cut off again below.
    share = [
        index % count
        for index in range(state.process_index, _round_up(count, state.num_processes), state.num_processes)
    ]
    # A generator of its own: the loader draws a seed for its workers.
    loader = DataLoader(
        Subset(dataset, share), batch_size, num_workers=num_workers, collate_fn=_collate, generator=torch.Generator()
    )
    device = next(model.parameters()).device
    values, labels = [], []
    with _evaluating(model):
        for batch in loader:
            pixel_values = batch["pixel_values"].to(device)
            values.append(features(model, pixel_values if normalize is None else normalize(pixel_values)).float())
            labels.append(batch["labels"].to(device))
    together = [_interleaved(torch.cat(parts), state.num_processes)[:count] for parts in (values, labels)]
    values, labels = (tensor.cpu().numpy() for tensor in together)
    if not np.isfinite(values).all():
        raise ValueError("Features are not finite: the weights of the model are broken.")
    return Features(values, labels.astype(np.int64))


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _interleaved(mine: Tensor, processes: int) -> Tensor:
    """From each process's share, (n, ...), to the whole in the order of the dataset, (processes * n, ...)."""
    return gather(mine.contiguous()).unflatten(0, (processes, -1)).transpose(0, 1).flatten(0, 1)


def _collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    return default_collate([{name: example[name] for name in ("pixel_values", "labels")} for example in examples])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; afterwards every module has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def balanced_subset(labels: list[int], maximum: int, seed: int = 0) -> list[int]:
    """Indices of at most so many images, as many of every class as there are to be had, the same for the same seed."""
    generator, rank = np.random.default_rng(seed), np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        indices = np.flatnonzero(np.asarray(labels) == label)
        rank[generator.permutation(indices)] = np.arange(len(indices))
    return sorted(np.argsort(rank, kind="stable")[:maximum].tolist())


# ---------------------------------------------------------------------------------------------------------------------
# Few-shot least squares: the paper, section 4.1


@dataclass(frozen=True)
class LeastSquares:
    """A linear map from standardised features and a constant to a number for each class; the highest one wins."""

    mean: np.ndarray  # (D,)
    std: np.ndarray  # (D,)
    weights: np.ndarray  # (D + 1, K)

    def scores(self, values: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, K)"""
        return _with_constant((values - self.mean) / self.std) @ self.weights


def fit_least_squares(features: Features, num_classes: int, l2: float = FEW_SHOT_L2) -> LeastSquares:
    """
    Regularised least squares in closed form, as the paper's authors compute it (big_vision, evaluators/fewshot_lsr.py):
    features are standardised and get a constant of 100, which makes for a bias that is hardly regularised; targets are
    1 for the class and -1 for all others. In float64.
    """
    values = features.values.astype(np.float64)
    mean, std = values.mean(axis=0), values.std(axis=0) + 1e-5
    inputs = _with_constant((values - mean) / std)  # (N, D + 1)
    targets = 2.0 * np.eye(num_classes)[features.labels] - 1.0  # (N, K)
    # The smaller of two equal forms: (X'X + l2)^-1 X'Y = X'(XX' + l2)^-1 Y.
    if inputs.shape[0] >= inputs.shape[1]:
        eigenvalues, basis = np.linalg.eigh(inputs.T @ inputs)
        left, right = basis, basis.T @ (inputs.T @ targets)
    else:
        eigenvalues, basis = np.linalg.eigh(inputs @ inputs.T)
        left, right = inputs.T @ basis, basis.T @ targets
    return LeastSquares(mean, std, (left / (eigenvalues + l2)) @ right)


def _with_constant(values: np.ndarray) -> np.ndarray:
    return np.pad(values, ((0, 0), (0, 1)), constant_values=_BIAS_FEATURE)


def choose_shots(labels: np.ndarray, num_classes: int, shots: int, seed: int) -> np.ndarray:
    """Indices of so many images of every class, as big_vision chooses them; all of a class that has fewer."""
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(np.flatnonzero(labels == label)) for label in range(num_classes)]
    return np.concatenate([order[:shots] for order in orders])


def few_shot_accuracies(
    bank: Features,
    queries: Features,
    num_classes: int,
    shots: tuple[int, ...] = SHOTS,
    seeds: int = FEW_SHOT_SEEDS,
    l2: float = FEW_SHOT_L2,
    first_seed: int = 0,
) -> dict[int, list[float]]:
    """
    The accuracy of `fit_least_squares` on so many images of every class: for each number of shots, one for each of the
    seeds from `first_seed` on, which choose the images. Numbers that no class has are left out: they would repeat
    another.
    """
    largest = int(np.bincount(bank.labels).max())
    accuracies: dict[int, list[float]] = {}
    for number in shots:
        if number > largest:
            continue
        accuracies[number] = []
        for seed in range(first_seed, first_seed + seeds):
            chosen = choose_shots(bank.labels, num_classes, number, seed)
            fitted = fit_least_squares(Features(bank.values[chosen], bank.labels[chosen]), num_classes, l2)
            accuracies[number].append(_accuracy(fitted.scores(queries.values).argmax(axis=1), queries.labels))
    return accuracies


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float((predictions == labels).mean())


# ---------------------------------------------------------------------------------------------------------------------
# Nearest neighbours


def knn_accuracy(
    bank: Features, queries: Features, num_classes: int, neighbors: int = NEIGHBORS, temperature: float = TEMPERATURE
) -> float:
    """
    The accuracy of weighted nearest neighbours (Wu et al., arXiv:1805.01978; 20 neighbours and 0.07 as in DINO, Caron
    et al., arXiv:2104.14294): each of the nearest by cosine similarity s votes for its class with exp(s / temperature).
    """
    images, targets = (_unit(torch.from_numpy(part.values)) for part in (bank, queries))
    labels, neighbors = torch.from_numpy(bank.labels), min(neighbors, len(bank.labels))
    predictions = []
    for part in targets.split(1024):  # bounds the memory of the similarities
        similarity, nearest = (part @ images.T).topk(neighbors, dim=1)
        votes = torch.zeros(len(part), num_classes, dtype=torch.float64)
        votes.scatter_add_(1, labels[nearest], (similarity.double() / temperature).exp())
        predictions.append(votes.argmax(dim=1))
    return _accuracy(torch.cat(predictions).numpy(), queries.labels)


def _unit(values: Tensor) -> Tensor:
    return nn.functional.normalize(values.float(), dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Linear classifier


@dataclass(frozen=True)
class LinearProbe:
    """
    What `linear_probe` has found.

    Attributes:
        accuracy: on the queries.
        l2: the chosen strength of the regulariser.
        held_out_accuracies: for every strength tried, on the part of the bank that was held out to choose it.
    """

    accuracy: float
    l2: float
    held_out_accuracies: dict[float, float]


def linear_probe(
    bank: Features, queries: Features, l2_grid: tuple[float, ...] = L2_GRID, held_out: float = 0.2, seed: int = 0
) -> LinearProbe:
    """
    Multinomial logistic regression on standardised features, by L-BFGS (scikit-learn): the loss is the sum of the
    cross-entropies and of l2 / 2 |w|^2. The strength is the one with the best accuracy on a part of the bank, the same
    part of every class; the classifier is then fitted to the whole bank. The queries choose nothing.

    Raises:
        ValueError: if the bank is too small to hold out two images of every class.
    """
    counts = np.bincount(bank.labels)
    if counts[counts > 0].min() < 2:
        raise ValueError("The linear probe holds out a part of every class: give at least two images of each.")
    size = max(round(held_out * len(bank.labels)), int((counts > 0).sum()))
    kept, held = train_test_split(np.arange(len(bank.labels)), test_size=size, stratify=bank.labels, random_state=seed)
    accuracies = {}
    for l2 in l2_grid:
        fitted = _logistic_regression(bank.values[kept], bank.labels[kept], l2)
        accuracies[l2] = float(fitted.score(bank.values[held], bank.labels[held]))
    best = max(l2_grid, key=lambda l2: (accuracies[l2], l2))  # of equals the strongest
    fitted = _logistic_regression(bank.values, bank.labels, best)
    return LinearProbe(float(fitted.score(queries.values, queries.labels)), best, accuracies)


def _logistic_regression(values: np.ndarray, labels: np.ndarray, l2: float) -> Any:
    return make_pipeline(StandardScaler(), LogisticRegression(C=1.0 / l2, max_iter=1000)).fit(values, labels)


def run_probes(
    bank: Features, queries: Features, num_classes: int, seed: int = 0, with_linear: bool = True
) -> dict[str, dict[str, Any]]:
    """
    All three: by name `accuracy` on the queries, and what goes with it. Few-shot has the mean over `accuracies`, of
    draws that no other seed has.
    """
    found: dict[str, dict[str, Any]] = {"knn": {"accuracy": knn_accuracy(bank, queries, num_classes)}}
    few_shot = few_shot_accuracies(bank, queries, num_classes, first_seed=FEW_SHOT_SEEDS * seed)
    for shots, accuracies in few_shot.items():
        found[f"fewshot_{shots}"] = {"accuracy": float(np.mean(accuracies)), "accuracies": accuracies}
    if with_linear:
        linear = linear_probe(bank, queries, seed=seed)
        tried = {f"{l2:g}": accuracy for l2, accuracy in linear.held_out_accuracies.items()}
        found["linear"] = {"accuracy": linear.accuracy, "l2": linear.l2, "held_out_accuracies": tried}
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """What `run_probes` has found, a line each."""
    lines = [f"{'probe':<12}{'accuracy':>10}"]
    for name, result in found.items():
        more = (
            f"  {len(result['accuracies'])} draws, sd {100 * np.std(result['accuracies'], ddof=1):.2f}"
            if ("accuracies" in result)
            else f"  l2 {result['l2']:g}"
            if "l2" in result
            else ""
        )
        lines.append(f"{name:<12}{100 * result['accuracy']:>8.2f} %{more}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# During training


class Probe(TrainerCallback):
    """
    Logs the accuracy of nearest neighbours and of few-shot least squares, as `probe_knn_accuracy` and
    `probe_fewshot_5_accuracy` (the mean over the seeds), whenever the Trainer evaluates, and every so many steps.

    With --ema_decay they are those of the averaged weights. Training goes on with the bits it would have without.

    Args:
        trainer: whose model is probed, and whose log is written to.
        kinds: of `PROBES` of the command line.
        bank, queries: datasets as `extract_features` takes them; not augmented.
        num_classes: of their labels.
        every: steps; None for the evaluations only.
        features: as in `extract_features`.
    """

    def __init__(
        self,
        trainer: Trainer,
        kinds: list[str],
        bank: Dataset,
        queries: Dataset,
        num_classes: int,
        every: int | None = None,
        features: Callable[[nn.Module, Tensor], Tensor] = image_features,
    ) -> None:
        self.trainer, self.kinds, self.bank, self.queries = trainer, kinds, bank, queries
        self.num_classes, self.every, self.features = num_classes, every, features
        self.normalize = Normalize.from_processor(trainer.processing_class)
        self.is_training, self.last_step = False, -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.is_training = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.is_training = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.every is not None and state.global_step % self.every == 0:
            average = getattr(self.trainer, "average", None)
            with nullcontext() if average is None else average.applied_to(self.trainer.model):
                self._log(state.global_step)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # An evaluation after training is of a model that may be of another step.
        if self.is_training and state.global_step != self.last_step:
            self._log(state.global_step)

    def _log(self, step: int) -> None:
        self.last_step = step
        self.trainer.log({f"probe_{name}": value for name, value in self.accuracies().items()})

    def accuracies(self) -> dict[str, float]:
        """The accuracies of now, by name."""
        args = self.trainer.args
        bank, queries = (
            extract_features(
                self.trainer.model,
                dataset,
                args.per_device_eval_batch_size,
                args.dataloader_num_workers,
                self.normalize,
                self.features,
            )
            for dataset in (self.bank, self.queries)
        )
        found = {}
        if "knn" in self.kinds:
            found["knn_accuracy"] = knn_accuracy(bank, queries, self.num_classes)
        if "fewshot" in self.kinds:
            for shots, values in few_shot_accuracies(bank, queries, self.num_classes).items():
                found[f"fewshot_{shots}_accuracy"] = float(np.mean(values))
        return found


def build_probe(trainer: Trainer, data: ImageData) -> Probe:
    """
    What --probe asks for: it learns from images of the training part, without augmentation, and is tested on held-out
    ones. Of a stream, which can't be chosen from, it learns from half of the held-out images.

    Raises:
        InputError: for images without labels.
    """
    check_for_probes(data)
    arguments, processor, held_out = trainer.args, trainer.processing_class, data.validation
    maximum, seed = arguments.probe_images, arguments.seed
    if isinstance(data.train, ImageStream):
        chosen = balanced_subset(held_out.labels, 2 * maximum, seed)
        parts = held_out.select(chosen[::2]), held_out.select(chosen[1::2])
    else:
        parts = (part.select(balanced_subset(part.labels, maximum, seed)) for part in (data.train, held_out))
    channels = trainer.model.config.num_channels
    bank, queries = (ImageClassificationDataset(part, processor, channels) for part in parts)
    return Probe(trainer, arguments.probe, bank, queries, len(data.label_names), arguments.probe_steps)
