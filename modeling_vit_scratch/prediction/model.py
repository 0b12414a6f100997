# SPDX-License-Identifier: Apache-2.0
"""The model of a prediction: pixels to scores and embeddings, and the fingerprint of its weights and settings."""

import copy
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ..acceleration.openvino import PAYS_FROM, Program, is_installed
from ..acceleration.speed_up import WORTH_IT, bfloat16_gain, precision_advice, speed_up
from ..common.errors import InputError
from ..common.pretrained import hash_weights, load_pretrained, loading, require_finite
from ..common.uncertainty import Uncertainty, load
from ..configuration_vit_scratch import ViTScratchConfig
from ..data.collation import Normalize
from ..image_processing_vit_scratch import ViTScratchImageProcessor
from ..modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchModel
from .arguments import PredictionArguments


# Images that a CPU thread takes at a time: more don't fit into its cache, which makes small networks a fifth slower.
PER_THREAD = 16


class Prediction(NamedTuple):
    """Of B images the best k labels, best first; of equal scores the lower label index first."""

    labels: np.ndarray  # (B, k)
    scores: np.ndarray  # (B, k)
    embeddings: np.ndarray | None  # (B, D) float32, the pooled output
    sets: np.ndarray | None = None  # (B, K), the labels of likely enough ones, best first, then -1
    abstain: np.ndarray | None = None  # (B,), whether the best score is too low for an answer
    novelty: np.ndarray | None = None  # (B,) float32, and its percentiles: see `Novelty`
    novelty_percentile: np.ndarray | None = None


class Predictor:
    """Predicts `top_k` labels and embeddings of batches of images. With `top_k` 0 the model may be an encoder."""

    def __init__(
        self, model: ViTScratchForImageClassification | ViTScratchModel, processor: ViTScratchImageProcessor,
        top_k: int, has_embeddings: bool, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
        uncertainty: Uncertainty | None = None,
    ) -> None:  # fmt: skip
        self.model, self.processor = speed_up(model.to(device, dtype).eval()), processor
        self.config: ViTScratchConfig = model.config
        self.top_k, self.has_embeddings, self.device, self.dtype = top_k, has_embeddings, device, dtype
        self.label_names = [str(self.config.id2label[index]) for index in range(self.config.num_labels if top_k else 0)]
        self.is_regression = top_k == 1 and self.config.problem_type == "regression"
        # What evaluate.py --calibrate has fitted: from which score each label is in the set, (K,), and how new it is.
        thresholds = getattr(self.config, "label_thresholds", None) if self.config.calibrated else None
        self.uncertainty, self.score_threshold = uncertainty, None
        if uncertainty and (self.config.calibrated or self.config.temperature == 1.0):
            thresholds = [uncertainty.set_threshold] * len(self.label_names)
            self.score_threshold = uncertainty.score_threshold
        self.thresholds = np.array(thresholds, dtype=np.float32) if top_k and thresholds else None
        self._normalize, self._pooled = Normalize(processor), threading.local()
        self._pool: ThreadPoolExecutor | None = None
        self.program: Program | None = None  # computes in place of the model
        if has_embeddings and isinstance(model, ViTScratchForImageClassification):
            model.classifier.register_forward_pre_hook(
                lambda classifier, inputs: setattr(self._pooled, "value", inputs[0])
            )

    def use_openvino(self) -> None:
        """From now on OpenVINO computes, with as many threads as torch has now. InputError if it can't: see Program."""
        threads, shape = torch.get_num_threads(), (self.config.num_channels, *self.config.image_hw)
        self.program = Program(self.model, shape, self.has_embeddings, threads, streams=threads)

    def __call__(self, pixels: torch.Tensor) -> Prediction:
        """Of pixels (B, C, H, W), uint8."""
        if torch.device(self.device).type != "cpu":
            return self._predict(pixels)
        # Each thread computes its own images. If all shared each operation, they would wait each time for the slowest,
        # whose core is decoding a photo.
        threads, run = torch.get_num_threads(), map
        parts = pixels.split(min(PER_THREAD, -(-len(pixels) // threads)))
        if len(parts) > 1 < threads:  # a single part uses all threads
            self._pool = self._pool or ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
            run = self._pool.map
        found = zip(*run(self._predict, parts))
        return Prediction(*(None if values[0] is None else np.concatenate(values) for values in found))

    @torch.inference_mode()
    def _predict(self, pixels: torch.Tensor) -> Prediction:
        logits, pooled = self._outputs(self._normalize(pixels.to(self.device, non_blocking=True)))
        more = {}
        if pooled is not None:
            require_finite(pooled)
            pooled = pooled.float().cpu()
            if self.uncertainty:
                distances = self.uncertainty.novelty(pooled)
                more |= zip(("novelty", "novelty_percentile"), (values.numpy() for values in distances))
            pooled = pooled.numpy()
        if not self.top_k:
            return Prediction(
                np.zeros((len(pixels), 0), np.int32), np.zeros((len(pixels), 0), np.float32), pooled, **more
            )
        require_finite(logits)
        sort = self._scores(logits.float()).sort(dim=-1, descending=True, stable=True)
        scores, labels = (values.cpu().numpy() for values in sort)
        if self.thresholds is not None:
            is_in = scores >= self.thresholds[labels]
            is_in[:, 0] |= self.uncertainty is not None  # with one label per image, a set is never empty
            more["sets"] = np.where(is_in, labels, -1)
        if self.score_threshold is not None:
            more["abstain"] = scores[:, 0] < self.score_threshold
        return Prediction(labels[:, : self.top_k], scores[:, : self.top_k], pooled, **more)

    def _outputs(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits and embeddings, those of both that there are."""
        is_encoder = isinstance(self.model, ViTScratchModel)
        if self.program is not None:
            found = self.program(pixel_values)
            return None if is_encoder else found[0], found[-1] if self.has_embeddings else None
        output = self.model(pixel_values.to(self.dtype))
        return (None, output.pooler_output) if is_encoder else (output.logits, self._pooled.__dict__.pop("value", None))

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        """As in a pipeline of transformers: sigmoid for models with several labels per image or a single one."""
        if self.config.problem_type == "regression":
            return logits
        if self.config.problem_type == "multi_label_classification" or self.config.num_labels == 1:
            return logits.sigmoid()
        return logits.softmax(-1)


def load_predictor(arguments: PredictionArguments, device: torch.device | str = "cpu") -> Predictor:
    """Raises InputError if MODEL can't be loaded, has no classifier, or fewer labels than --top_k."""
    name, hub = arguments.model, {"revision": arguments.model_revision, "cache_dir": arguments.cache_dir}
    kind = ViTScratchForImageClassification if arguments.top_k else ViTScratchModel
    model, processor, missing = load_pretrained(kind, f"MODEL {name}", name, hub)
    config = model.config
    if arguments.top_k and (missing or not config.num_labels):
        raise InputError(
            f"MODEL {name} has no trained classifier. Train one with scripts/finetune.py, or ask for --top_k 0 "
            "--embeddings."
        )
    if missing:
        raise InputError(f"MODEL {name} lacks weights: {', '.join(sorted(missing)[:5])}.")
    if arguments.top_k > config.num_labels:
        raise InputError(f"--top_k {arguments.top_k}: MODEL {name} has {config.num_labels} labels.")
    config.calibrated = arguments.calibrated
    with loading(f"MODEL {name}"):
        uncertainty = load(name, hub, config.temperature)
    device = torch.device(device)
    if arguments.dtype == "auto":
        arguments.dtype, reason = choose_dtype(model, device)
        print(f"--dtype auto: {arguments.dtype}, {reason}.", file=sys.stderr)
    elif arguments.dtype == "bfloat16" and (advice := precision_advice(device, True, "--dtype bfloat16")):
        print(advice, file=sys.stderr)
    dtype = getattr(torch, arguments.dtype)
    return Predictor(model, processor, arguments.top_k, arguments.embeddings, device, dtype, uncertainty)


@torch.inference_mode()
def choose_dtype(model: ViTScratchForImageClassification | ViTScratchModel, device: torch.device) -> tuple[str, str]:
    """float32 or bfloat16, and why: see --dtype auto. The made-up images, noise from coarse to fine, are fixed."""
    if device.type == "cpu" and (gain := bfloat16_gain()) <= WORTH_IT:
        return "float32", f"bfloat16 is {gain:.1f} times as fast on this processor"
    is_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" and not is_gpu:
        return "float32", "this device has no bfloat16 of its own"
    if not isinstance(model, ViTScratchForImageClassification):
        return "float32", "an encoder has no scores to compare"
    generator, size, images = torch.Generator().manual_seed(0), model.config.image_hw, []
    for side in (2, 4, 8, 16):
        noise = torch.randn(4, model.config.num_channels, side, side, generator=generator)
        images.append(F.interpolate(noise, size=size, mode="bicubic"))
    exact, half = (
        copy.deepcopy(model).to(device, dtype).eval()(torch.cat(images).to(device, dtype)).logits.float().softmax(-1)
        for dtype in (torch.float32, torch.bfloat16)
    )
    difference = (exact - half).abs().max().item()
    name = "bfloat16" if difference <= 0.02 else "float32"
    return name, f"as scores of made-up images differ by up to {difference:.4f} between the two"


def choose_backend(predictor: Predictor, wanted: str, known: str, count: int) -> str:
    """
    "torch", or OpenVINO's name and version where that computes from now on. "auto" keeps what is `known` of a run that
    was begun, and otherwise takes OpenVINO where it is installed and `count` images are worth it. InputError if
    OpenVINO has to compute and can't; where "auto" was free, torch computes, and the reason is told.
    """
    is_open, predictor.program = wanted == "auto" and not known, None
    if is_open:
        is_possible = torch.device(predictor.device).type == "cpu" and predictor.dtype != torch.float16
        known = "openvino" if count >= PAYS_FROM and is_possible and is_installed() else "torch"
    if (known if wanted == "auto" else wanted) == "torch":
        return "torch"
    try:
        predictor.use_openvino()
    except InputError as error:
        if not is_open:
            raise InputError(f"{error} Give --backend torch, and --overwrite if the run was begun.") from error
        print(f"torch computes: {error}", file=sys.stderr)
        return "torch"
    return f"openvino {version('openvino')}"


def fingerprint(predictor: Predictor) -> str:
    """SHA-256 of weights, configuration, processor and thresholds, which decide the output."""
    digest = hash_weights(predictor.model)
    for settings in (predictor.config.to_dict(), predictor.processor.to_dict()):
        kept = {key: value for key, value in settings.items() if key not in ("_name_or_path", "transformers_version")}
        digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    if predictor.uncertainty:
        digest.update(predictor.uncertainty.fingerprint.encode())
    return digest.hexdigest()
