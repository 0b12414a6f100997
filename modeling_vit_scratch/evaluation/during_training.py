# SPDX-License-Identifier: Apache-2.0
"""
What a run measures while it trains. Metrics of held-out images, by `evaluate` and scikit-learn: nothing is loaded from
the Hub. And probes of frozen features: few-shot least squares, nearest neighbours, and a linear classifier, fitted to
the features of labelled images (train) and evaluated on those of others (test). The first two take seconds.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import datasets
import evaluate
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    mean_absolute_error,
    r2_score,
    root_mean_squared_error,
)
from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from tqdm.auto import tqdm
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerState
from transformers.image_processing_utils import BaseImageProcessor

from ..acceleration.speed_up import only_pooled_output
from ..data.collation import ImageCollator, Normalize, prepare_workers
from ..data.dataset import ImageClassificationDataset
from ..data.splits import ImageData, check_for_probes
from ..data.streams import ImageStream


TOP_K = 5


class ImageClassificationMetric(evaluate.Metric):
    """
    Accuracy, top-5 accuracy (with more than five classes) and macro F1, of the best classes, best first, (N, k), and
    the true ones (N,). With several labels, `multi_label_scores` at 0.5 of logits (N, K) and labels 0 and 1 (N, K).
    """

    def __init__(self, num_labels: int, is_multi_label: bool = False, is_regression: bool = False) -> None:
        self.num_labels, self.is_multi_label, self.is_regression = num_labels, is_multi_label, is_regression
        super().__init__(keep_in_memory=True)

    def _build_data_dir(self) -> str:
        return ""  # the library's folder in HOME, which a container may lack, would hold nothing

    def _info(self) -> evaluate.MetricInfo:
        predictions, references = datasets.List(datasets.Value("int64")), datasets.Value("int64")
        if self.is_multi_label or self.is_regression:
            predictions = references = datasets.List(datasets.Value("float32"))
        features = datasets.Features({"predictions": predictions, "references": references})
        return evaluate.MetricInfo(description="Metrics of image classification.", citation="", features=features)

    def _compute(self, predictions: list[list[float]], references: list[Any]) -> dict[str, float]:
        ranked, labels = np.asarray(predictions), np.asarray(references)
        if self.is_regression:
            return regression_scores(ranked[:, 0], labels[:, 0])
        if self.is_multi_label:
            return multi_label_scores(ranked, labels > 0.5, ranked >= 0)
        scores = {"accuracy": float(accuracy_score(labels, ranked[:, 0]))}
        if self.num_labels > TOP_K:
            scores["top5_accuracy"] = float((ranked[:, :TOP_K] == labels[:, None]).any(axis=1).mean())
        # Over the classes that occur, in the labels or in the predictions: scikit-learn's own default.
        scores["macro_f1"] = float(f1_score(labels, ranked[:, 0], average="macro", zero_division=0))
        return scores


def regression_scores(values: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """RMSE, MAE and R2 of numbers (N,)."""
    measures = {"rmse": root_mean_squared_error, "mae": mean_absolute_error}
    measures |= {"r2": r2_score} if len(targets) > 1 else {}
    return {name: float(measure(targets, values)) for name, measure in measures.items()}


def multi_label_scores(values: np.ndarray, labels: np.ndarray, answers: np.ndarray) -> dict[str, float]:
    """
    Mean average precision (over labels that an image has), F1 (macro and samples: over labels or images with a label or
    an answer), and exact match: of logits or probabilities, labels and answers (N, K); 0 where there is none.
    """
    present, mean = labels.any(axis=0), 0.0
    if present.any():
        mean = average_precision_score(labels[:, present], values[:, present], average="macro")
    scores = {"mean_average_precision": float(mean)}
    for average in ("micro", "macro", "samples"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty mean
            value = f1_score(labels, answers, average=average, zero_division=np.nan)
        scores[f"{average}_f1"] = float(np.nan_to_num(value))
    return scores | {"exact_match": float((labels == answers).all(axis=1).mean())}


def rank_labels(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """For `Trainer(preprocess_logits_for_metrics=)`: logits (B, K) to the best classes (B, up to 5), best first."""
    return logits.topk(min(TOP_K, logits.shape[-1]), dim=-1).indices


def build_compute_metrics(
    num_labels: int, is_multi_label: bool = False, is_regression: bool = False
) -> Callable[..., dict[str, float]]:
    """For `Trainer(compute_metrics=)`, with and without `batch_eval_metrics`: metrics and the number of `images`."""
    metric, images = ImageClassificationMetric(num_labels, is_multi_label, is_regression), 0

    def compute_metrics(prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        nonlocal images
        parts = prediction.predictions, prediction.label_ids
        ranked, labels = (torch.as_tensor(part).cpu().numpy() for part in parts)
        metric.add_batch(predictions=ranked, references=labels.reshape(-1, 1) if is_regression else labels)
        images += len(labels)
        if not compute_result:
            return {}
        scores, images = {**metric.compute(), "images": images}, 0
        return scores

    return compute_metrics


# --- Probes -----------------------------------------------------------------------------------------------------------


KINDS = ("knn", "fewshot", "linear")
SHOTS = (1, 5, 10, 25)
FEW_SHOT_L2 = 2.0**10
FEW_SHOT_SEEDS = 3
NEIGHBORS, TEMPERATURE = 20, 0.07
L2_GRID = tuple(10.0**power for power in range(-2, 6))
HELD_OUT = 0.2  # of the training images, to choose from L2_GRID


class Features(NamedTuple):
    """Features (N, D), float32, and labels (N,), int64, of N images."""

    values: np.ndarray
    labels: np.ndarray


def image_features(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """The encoder's pooled output, (B, C, H, W) -> (B, D); without a pooler its class token, or mean over patches."""
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
    processor: BaseImageProcessor | None = None,
    desc: str | None = None,
) -> Features:
    """
    Features of all images of a dataset, in its order and evaluation mode, in every process. Modes of modules and the
    random state do not change. Without a `processor`, pixel values have to be normalised. `desc` names a progress bar.
    Raises ValueError for an empty dataset, or features that are not finite.
    """
    count, state = len(dataset), PartialState()
    if count == 0:
        raise ValueError("There are no images to take features of.")
    # All processes get equally many images; the duplicates at the end are cut off below.
    sampler = DistributedSampler(dataset, state.num_processes, state.process_index, shuffle=False)
    loader = DataLoader(
        dataset, batch_size, sampler=sampler, num_workers=num_workers, collate_fn=ImageCollator(),
        generator=torch.Generator(),  # of its own: the loader draws a seed for its workers
    )  # fmt: skip
    prepare_workers(loader)
    device, values, labels = next(model.parameters()).device, [], []
    to_float = Normalize(processor)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for batch in tqdm(loader, desc=desc, unit="batch", disable=None if desc and state.is_main_process else True):
            pixel_values = to_float(batch["pixel_values"].to(device))
            values.append(image_features(model, pixel_values).float())
            labels.append(batch["labels"].to(device))
    finally:
        for module, mode in modes.items():
            module.training = mode
    # Each process has every so many-th image: (processes * n, ...) to (processes, n, ...) to the dataset's order.
    values, labels = (
        gather(torch.cat(parts)).unflatten(0, (state.num_processes, -1)).transpose(0, 1).flatten(0, 1).cpu().numpy()
        for parts in (values, labels)
    )
    values, labels = values[:count], labels[:count]
    if not np.isfinite(values).all():
        raise ValueError("Features are not finite: the weights of the model are broken.")
    return Features(values, labels.astype(np.int64))


def balanced_subset(labels: list[int], maximum: int, seed: int = 0) -> list[int]:
    """Sorted indices of at most `maximum` random images, with classes as equal in size as possible."""
    generator, rank = np.random.default_rng(seed), np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        indices = np.flatnonzero(np.asarray(labels) == label)
        rank[generator.permutation(indices)] = np.arange(len(indices))
    return sorted(np.argsort(rank, kind="stable")[:maximum].tolist())


def least_squares(train: Features, test: np.ndarray, num_classes: int, l2: float = FEW_SHOT_L2) -> np.ndarray:
    """The scores (N, K) of test features by least squares (the paper, 4.1), as big_vision's fewshot_lsr.py."""
    values = train.values.astype(np.float64)
    mean, std = values.mean(axis=0), values.std(axis=0) + 1e-5

    def standardise(values: np.ndarray) -> np.ndarray:  # and appends 100, for a bias that is hardly regularised
        return np.pad((values - mean) / std, ((0, 0), (0, 1)), constant_values=100.0)

    targets = 2.0 * np.eye(num_classes)[train.labels] - 1.0  # (N, K)
    return Ridge(alpha=l2, fit_intercept=False).fit(standardise(values), targets).predict(standardise(test))


def choose_shots(labels: np.ndarray, num_classes: int, shots: int, seed: int) -> np.ndarray:
    """Indices of up to `shots` images of every class, chosen as in big_vision."""
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(np.flatnonzero(labels == label)) for label in range(num_classes)]
    return np.concatenate([order[:shots] for order in orders])


def few_shot_accuracies(
    train: Features, test: Features, num_classes: int, first_seed: int = 0
) -> dict[int, list[float]]:
    """The accuracies of `least_squares` for `FEW_SHOT_SEEDS` draws, by number of `SHOTS` that some class has."""

    def accuracy(shots: int, seed: int) -> float:
        chosen = choose_shots(train.labels, num_classes, shots, seed)
        scores = least_squares(Features(train.values[chosen], train.labels[chosen]), test.values, num_classes)
        return float((scores.argmax(axis=1) == test.labels).mean())

    largest, seeds = np.bincount(train.labels).max(), range(first_seed, first_seed + FEW_SHOT_SEEDS)
    return {shots: [accuracy(shots, seed) for seed in seeds] for shots in SHOTS if shots <= largest}


def knn_accuracy(
    train: Features, test: Features, neighbors: int = NEIGHBORS, temperature: float = TEMPERATURE
) -> float:
    """
    The accuracy of weighted nearest neighbours (Wu et al., arXiv:1805.01978; defaults as in DINO, Caron et al.,
    arXiv:2104.14294): each neighbour of cosine similarity s votes for its class with exp(s / temperature).
    """

    def vote(distances: np.ndarray) -> np.ndarray:  # between features of length 1: d^2 = 2 - 2s
        return np.exp((1 - distances**2 / 2) / temperature)

    neighbors = min(neighbors, len(train.labels))
    classifier = KNeighborsClassifier(neighbors, weights=vote, algorithm="brute")
    return float(classifier.fit(normalize(train.values), train.labels).score(normalize(test.values), test.labels))


class LinearProbe(NamedTuple):
    """Test accuracy, the chosen strength of the regulariser, and by strength the accuracies that chose it."""

    accuracy: float
    l2: float
    held_out_accuracies: dict[float, float]


def linear_probe(train: Features, test: Features, l2_grid: tuple[float, ...] = L2_GRID, seed: int = 0) -> LinearProbe:
    """
    Multinomial logistic regression on standardised features, with the loss sum of cross-entropies + l2 / 2 |w|^2. The
    strength l2 has the best accuracy on a stratified part of the training images that is held out; the classifier is
    then fitted to all of them. Raises ValueError if a class has only one training image.
    """
    counts = np.bincount(train.labels)
    if counts[counts > 0].min() < 2:
        raise ValueError("The linear probe holds out a part of every class: give at least two images of each.")
    size = max(round(HELD_OUT * len(train.labels)), int((counts > 0).sum()))
    strengths = sorted(l2_grid, reverse=True)  # of equals the strongest
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        {"logisticregression__C": [1.0 / l2 for l2 in strengths]},
        cv=StratifiedShuffleSplit(1, test_size=size, random_state=seed),
    ).fit(*train)
    accuracies = dict(zip(reversed(strengths), search.cv_results_["mean_test_score"][::-1].tolist()))
    return LinearProbe(float(search.score(*test)), strengths[search.best_index_], accuracies)


def run_probes(
    train: Features,
    test: Features,
    num_classes: int,
    kinds: Sequence[str] = KINDS,
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[str, Any]]:
    """Probes' results by name, `accuracy` and more. Seeds share no draw. `report` gets a line before each probe."""
    found: dict[str, dict[str, Any]] = {}
    if "knn" in kinds:
        report(f"Nearest neighbours of {len(test.labels):,} images among {len(train.labels):,}.")
        found["knn"] = {"accuracy": knn_accuracy(train, test)}
    if "fewshot" in kinds:
        report("Least squares on a few images of each class.")
        for shots, accuracies in few_shot_accuracies(train, test, num_classes, FEW_SHOT_SEEDS * seed).items():
            found[f"fewshot_{shots}"] = {"accuracy": float(np.mean(accuracies)), "accuracies": accuracies}
    if "linear" in kinds:
        report(f"Logistic regression, {len(L2_GRID) + 1} times: this takes longest, and --skip_linear leaves it out.")
        linear = linear_probe(train, test, seed=seed)
        tried = {f"{l2:g}": accuracy for l2, accuracy in linear.held_out_accuracies.items()}
        found["linear"] = linear._asdict() | {"held_out_accuracies": tried}
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """The results of `run_probes`, a line each."""
    lines = [f"{'probe':<12}{'accuracy':>10}"]
    for name, result in found.items():
        more = f"  l2 {result['l2']:g}" if "l2" in result else ""
        if draws := result.get("accuracies"):
            more = f"  {len(draws)} draws, sd {100 * np.std(draws, ddof=1):.2f}"
        lines.append(f"{name:<12}{100 * result['accuracy']:>8.2f} %{more}")
    return "\n".join(lines)


class Probe(TrainerCallback):
    """Logs `probe_NAME_accuracy` at evaluations and `every` so many steps. Training's weights stay the same bits."""

    def __init__(
        self, trainer: Trainer, kinds: list[str], train: Dataset, test: Dataset, num_classes: int, every: int | None
    ) -> None:
        self.trainer, self.kinds, self.train, self.test = trainer, kinds, train, test
        self.num_classes, self.every = num_classes, every
        self.last_step = -1

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.every is not None and state.global_step % self.every == 0:
            average = getattr(self.trainer, "average", None)
            with nullcontext() if average is None else average.applied_to(self.trainer.model):
                self._log(state.global_step)

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # After training, the model that is evaluated may be of another step.
        if self.trainer.is_in_train and state.global_step != self.last_step:
            self._log(state.global_step)

    def _log(self, step: int) -> None:
        self.last_step = step
        self.trainer.log({f"probe_{name}": value for name, value in self.accuracies().items()})

    def accuracies(self) -> dict[str, float]:
        args = self.trainer.args
        loading = args.per_device_eval_batch_size, args.dataloader_num_workers, self.trainer.processing_class
        train, test = (extract_features(self.trainer.model, images, *loading) for images in (self.train, self.test))
        found = run_probes(train, test, self.num_classes, self.kinds)
        return {f"{name}_accuracy": result["accuracy"] for name, result in found.items()}


def build_probe(trainer: Trainer, data: ImageData) -> Probe:
    """The probe of --probe: of held-out images, fitted to training images or, for a stream, half of the held-out."""
    check_for_probes(data)
    arguments, held_out = trainer.args, data.validation
    maximum, seed = arguments.probe_images, arguments.seed
    if isinstance(data.train, ImageStream):
        chosen = balanced_subset(held_out.labels, 2 * maximum, seed)
        parts = held_out.select(chosen[::2]), held_out.select(chosen[1::2])
    else:
        parts = (part.select(balanced_subset(part.labels, maximum, seed)) for part in (data.train, held_out))
    processor, channels = trainer.processing_class, trainer.model.config.num_channels
    train, test = (ImageClassificationDataset(part, processor, channels) for part in parts)
    return Probe(trainer, arguments.probe, train, test, len(data.label_names), arguments.probe_steps)
