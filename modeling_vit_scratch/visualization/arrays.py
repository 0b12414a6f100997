# SPDX-License-Identifier: Apache-2.0
"""
From a model and `pixel_values` (B, C, H, W) to arrays: attention, patch filters, position embeddings, and Grad-CAM.
Attention weights are exact under every attention implementation: hooks make each layer compute them with eager
attention, one layer in memory at a time. Half precision rounds them, so rows are divided by their sum, in float32.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

from ..common.errors import InputError
from ..common.pretrained import load_pretrained
from ..data.listing import URLS, list_folder
from ..modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchPreTrainedModel
from ..page import attention as any_model
from ..page import pictures


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module has its own mode again."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True


def open_model(
    source: str, revision: str = "main", image_size: tuple[int, int] | None = None
) -> tuple[ViTScratchPreTrainedModel, Any]:
    """A model in float32, on the GPU if there is one, without its head if that has no weights; and its processor."""
    options: dict[str, Any] = {"dtype": torch.float32} | ({"image_size": list(image_size)} if image_size else {})
    kind, hub = ViTScratchForImageClassification, {"revision": revision}
    model, processor, missing = load_pretrained(kind, f"The model {source}", source, hub, **options)
    needed = {key for key in missing if not key.startswith(("classifier.", "vit.pooler."))}
    if needed:
        raise InputError(f"{source} lacks {len(needed)} of the network's weights, e.g. {min(needed)}.")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return (model.vit if missing else model), processor


def find_photos(sources: list[str]) -> list[str]:
    """Images by path or URL; for a folder all images below it, in the order of their names."""
    found = []
    for source in sources:
        if os.path.isdir(source):
            found += [item.path for item in list_folder(source)]
        elif source.startswith(URLS) or os.path.exists(source):
            found.append(source)
        else:
            raise InputError(f"There is no file {source}. Give images, or folders of images.")
    return found


def read_photo(file: str, model: ViTScratchPreTrainedModel, processor: Any) -> Tensor:
    """`pixel_values` (1, C, H, W) of an image. InputError if the patches do not divide the processor's size."""
    pixel_values = processor(file, return_tensors="pt")["pixel_values"]
    try:
        patch_grid(model, pixel_values)
    except ValueError as error:
        raise InputError(f"{file}: {error} --image_size sets it.") from error
    return pixel_values


def patch_grid(model: ViTScratchPreTrainedModel, pixel_values: Tensor) -> tuple[int, int]:
    """Rows and columns of patches. Raises ValueError for images that the patch does not divide."""
    return model.base_model.embeddings.patch_embeddings.grid(pixel_values)


def batches(tensors: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """Batches of up to `size` consecutive images (1, C, H, W) of the same shape."""
    for _, same in itertools.groupby(tensors, key=lambda tensor: tensor.shape):
        while batch := list(itertools.islice(same, size)):
            yield torch.cat(batch)


def as_pixels(pixel_values: Tensor, processor: Any) -> np.ndarray:
    """Undoes the processor's normalisation: (B, C, H, W) -> (B, H, W, 3), uint8."""
    return pictures.as_pixels(pixel_values.double().cpu().numpy(), processor)


@torch.no_grad()
def watch_attention(
    model: ViTScratchPreTrainedModel, pixel_values: Tensor, callback: Callable[[int, Tensor], None]
) -> None:
    """Runs the encoder. `callback` gets each layer's index, from 0, and attention weights (B, A, T, T), float32."""
    base = model.base_model

    def ask(module: nn.Module, arguments: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return arguments, {**kwargs, "output_attentions": True}

    def pass_on(index: int, module: nn.Module, arguments: tuple, output: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
        attended, weights = output
        weights = weights.float()
        callback(index, weights / weights.sum(dim=-1, keepdim=True))
        return attended, None  # frees the weights before those of the next layer

    handles = []
    try:
        for index, layer in enumerate(base.layers):
            handles.append(layer.attention.register_forward_pre_hook(ask, with_kwargs=True))
            handles.append(layer.attention.register_forward_hook(partial(pass_on, index)))
        with evaluating(model):
            base(pixel_values.to(base.device), output_attentions=False, output_hidden_states=False)
    finally:
        for handle in handles:
            handle.remove()


def _pooled_rows(model: ViTScratchPreTrainedModel, weights: Tensor) -> Tensor:
    """The attention to patches of the pooled tokens, (B, ..., T, T) -> (B, ..., N): a row, or the mean of rows."""
    config = model.base_model.config
    prefix = config.num_prefix_tokens
    is_token = config.pooling in ("cls", "cls_mean")
    rows = weights[..., 0, :] if is_token else weights[..., prefix:, :].mean(dim=-2)
    return rows[..., prefix:]


def head_maps(model: ViTScratchPreTrainedModel, pixel_values: Tensor) -> np.ndarray:
    """
    The attention of every head of every layer to the patches, (B, L, A, rows, columns), float32: of the class token or,
    with mean pooling, the mean over patches. The rest of the sum 1 goes to class token, distillation token, registers.
    """
    maps: list[Tensor] = []
    watch_attention(model, pixel_values, lambda _, weights: maps.append(_pooled_rows(model, weights).cpu()))
    return torch.stack(maps, dim=1).unflatten(-1, patch_grid(model, pixel_values)).numpy()


def patch_distances(grid: tuple[int, int], patch: tuple[int, int]) -> np.ndarray:
    """Distances between the centres of all patches in pixels, (N, N), float64; patches row by row."""
    y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return np.hypot(np.subtract.outer(y, y) * patch[0], np.subtract.outer(x, x) * patch[1])


def mean_distance(weights: Tensor, distances: Tensor, num_prefix_tokens: int) -> Tensor:
    """Mean attention distance between patches: (B, A, T, T) weights, (N, N) distances -> (B, A)."""
    weights = weights[..., num_prefix_tokens:, num_prefix_tokens:]
    means = torch.einsum("baqk,qk->baq", weights, distances.to(weights))
    # A patch that attends to no patch counts as 0.
    return (means / weights.sum(dim=-1).clamp(min=torch.finfo(weights.dtype).tiny)).mean(dim=-1)


def attention_distances(model: ViTScratchPreTrainedModel, pixel_values: Tensor) -> np.ndarray:
    """
    Mean attention distance of every head (the paper, D.7), (B, L, A), float32: the distance in pixels between a patch
    and all patches, weighted by its attention, averaged over patches. Figures 7 and 11 average it over 128 images.
    Where heads attend to the class token, the paper's values are smaller: its rows are not divided by their sum without
    it (issue 162 of google-research/vision_transformer).
    """
    config, found = model.base_model.config, []
    distances = torch.from_numpy(patch_distances(patch_grid(model, pixel_values), config.patch_hw))

    def measure(index: int, weights: Tensor) -> None:
        found.append(mean_distance(weights, distances, config.num_prefix_tokens).cpu())

    watch_attention(model, pixel_values, measure)
    return torch.stack(found, dim=1).numpy()


def attention_rollout(model: ViTScratchPreTrainedModel, pixel_values: Tensor) -> np.ndarray:
    """
    Attention rollout (Abnar & Zuidema, arXiv:2005.00928; the paper, D.8) through all layers, (B, T, T), float64: row t
    says how much of each input token is in output token t, and sums to 1.
    """
    rollout: Tensor | None = None

    def multiply(index: int, weights: Tensor) -> None:
        nonlocal rollout
        rollout = any_model.roll_out(weights, rollout)

    watch_attention(model, pixel_values, multiply)
    return rollout.cpu().numpy()


def rollout_maps(model: ViTScratchPreTrainedModel, pixel_values: Tensor) -> np.ndarray:
    """How much of each patch is in the pooled tokens (the paper, Figures 6 and 14): (B, rows, columns), float64."""
    rollout = torch.from_numpy(attention_rollout(model, pixel_values))
    return _pooled_rows(model, rollout).unflatten(-1, patch_grid(model, pixel_values)).numpy()


class Filters(NamedTuple):
    """The n strongest principal components of filters."""

    components: np.ndarray  # (n, height, width, C), float64, of length 1, with a positive largest entry
    explained: np.ndarray  # (n,), the fractions of variance
    num_filters: int


def patch_filters(model: ViTScratchPreTrainedModel, num_components: int = 28) -> Filters:
    """
    Up to `num_components` principal components of the patch embedding's filters (Figure 7, left, of the paper): the
    rows of E in equation 1; in a hybrid of the stem's root convolution, standardised as in the forward pass.
    """
    embeddings = model.base_model.embeddings.patch_embeddings
    if embeddings.stem is None:
        weight = embeddings.projection.weight.detach().double()
    else:
        weight = embeddings.stem.root_conv.weight.detach().double()
        std, mean = torch.std_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
        weight = (weight - mean) / (std + 1e-5)
    points = weight.flatten(1).cpu().numpy()  # (D, C * height * width)
    analysis = PCA(min(num_components, *points.shape), svd_solver="full").fit(points)
    components = analysis.components_.reshape(-1, *weight.shape[1:]).transpose(0, 2, 3, 1)
    return Filters(components, analysis.explained_variance_ratio_, len(points))


def position_similarity(model: ViTScratchPreTrainedModel, grid: tuple[int, int] | None = None) -> np.ndarray:
    """
    Cosine similarity of the position embeddings before the first layer (Figure 7, centre, and D.4 of the paper), (rows,
    columns, rows, columns), float64: `[r, c]` is the map for the patch in row r and column c. They are resampled to
    `grid`, rows and columns of patches, if it is not the stored one. Raises InputError if the model has none.
    """
    base = model.base_model
    if base.embeddings.position_embeddings is None:
        kind = base.config.position_embedding
        why = {
            "none": "it does not know where a patch is",
            "relative_1d": "it embeds distances between patches, inside its attention",
            "rope_2d": "it turns queries and keys, inside its attention",
        }[kind]
        raise InputError(
            f"The model has position_embedding={kind!r}: {why}, and there are no position embeddings to compare. "
            "Models with learned_1d, learned_2d or sincos_2d have them."
        )
    return any_model.position_similarity(base.embeddings, grid or base.config.grid_hw)


def grad_cam(
    model: ViTScratchPreTrainedModel, pixel_values: Tensor, classes: list[int] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Grad-CAM (Selvaraju et al., arXiv:1610.02391), which patches speak for a class, by default the predicted one: maps
    (B, rows, columns), float32, not below 0; the classes (B,); the logits (B, K). Channels of the last layer's tokens
    after its first LayerNorm are weighted by the mean gradient of the class's logit over patches, and summed. (After
    that layer's attention, patches have no gradient in a model that pools by the class token.)
    """
    if not hasattr(model, "classifier") or not model.num_labels:
        raise InputError("Grad-CAM explains a class, and the model has no classifier. Fine-tune it first.")
    unknown = [label for label in classes or [] if not 0 <= label < model.num_labels]
    if unknown:
        raise InputError(f"There is no class {unknown[0]}: the model has the classes 0 to {model.num_labels - 1}.")
    base, tokens = model.base_model, []

    def start_here(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        tokens.append(output.detach().requires_grad_())
        return tokens[0]

    handle = base.layers[-1].layernorm_before.register_forward_hook(start_here)
    try:
        with torch.enable_grad(), evaluating(model):
            logits = model(pixel_values.to(base.device)).logits
            chosen = logits.argmax(dim=1) if classes is None else torch.tensor(classes, device=logits.device)
            total = logits.gather(1, chosen[:, None]).sum()  # an image's logit depends on its own tokens alone
            (gradient,) = torch.autograd.grad(total, tokens[0])
    finally:
        handle.remove()
    prefix = base.config.num_prefix_tokens
    weights = gradient[:, prefix:].float().mean(dim=1)  # (B, D)
    maps = torch.einsum("bnd,bd->bn", tokens[0].detach()[:, prefix:].float(), weights).relu()
    maps = maps.unflatten(1, patch_grid(model, pixel_values))
    return maps.cpu().numpy(), chosen.cpu().numpy(), logits.detach().float().cpu().numpy()
