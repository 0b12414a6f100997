# SPDX-License-Identifier: Apache-2.0
"""The model of a prediction: pixels to scores and embeddings, and the fingerprint of its weights and settings."""

import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from ..acceleration.speed_up import speed_up
from ..common.errors import InputError
from ..common.pretrained import load_pretrained, require_finite
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


class Predictor:
    """Predicts `top_k` labels and embeddings of batches of images. With `top_k` 0 the model may be an encoder."""

    def __init__(
        self, model: ViTScratchForImageClassification | ViTScratchModel, processor: ViTScratchImageProcessor,
        top_k: int, has_embeddings: bool, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.model, self.processor = speed_up(model.to(device, dtype).eval()), processor
        self.config: ViTScratchConfig = model.config
        self.top_k, self.has_embeddings, self.device, self.dtype = top_k, has_embeddings, device, dtype
        self._normalize, self._pooled = Normalize(processor), threading.local()
        self._pool: ThreadPoolExecutor | None = None
        indices = range(self.config.num_labels if top_k else 0)
        self.label_names = [str(self.config.id2label[index]) for index in indices]
        self.width = self.config.representation_size or self.config.pooled_width  # of an embedding
        if has_embeddings and isinstance(model, ViTScratchForImageClassification):
            model.classifier.register_forward_pre_hook(
                lambda classifier, inputs: setattr(self._pooled, "value", inputs[0])
            )

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
        labels, scores, embeddings = zip(*run(self._predict, parts))
        vectors = np.concatenate(embeddings) if self.has_embeddings else None
        return Prediction(np.concatenate(labels), np.concatenate(scores), vectors)

    @torch.inference_mode()
    def _predict(self, pixels: torch.Tensor) -> Prediction:
        pixel_values = self._normalize(pixels.to(self.device, non_blocking=True)).to(self.dtype)
        output, pooled = self.model(pixel_values), None
        if self.has_embeddings:
            pooled = output.pooler_output if isinstance(self.model, ViTScratchModel) else self._pooled.value
            require_finite(pooled)
            pooled, self._pooled.value = pooled.float().cpu().numpy(), None
        if not self.top_k:
            return Prediction(np.zeros((len(pixels), 0), np.int32), np.zeros((len(pixels), 0), np.float32), pooled)
        require_finite(output.logits)
        scores, labels = self._scores(output.logits.float()).sort(dim=-1, descending=True, stable=True)
        return Prediction(labels[:, : self.top_k].cpu().numpy(), scores[:, : self.top_k].cpu().numpy(), pooled)

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
    return Predictor(model, processor, arguments.top_k, arguments.embeddings, device, getattr(torch, arguments.dtype))


def fingerprint(predictor: Predictor) -> str:
    """SHA-256 of weights, configuration and processor, which decide scores and labels."""
    digest = hashlib.sha256()
    for key, tensor in sorted(predictor.model.state_dict().items()):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for settings in (predictor.config.to_dict(), predictor.processor.to_dict()):
        kept = {key: value for key, value in settings.items() if key not in ("_name_or_path", "transformers_version")}
        digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    return digest.hexdigest()
