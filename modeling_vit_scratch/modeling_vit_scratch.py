# SPDX-License-Identifier: Apache-2.0
# modeling_vit_scratch 0.2.0
"""
The Vision Transformer as transformers wants it: initialisation, outputs, heads, loss, masked model, backbone.

The network itself is `encoder_vit_scratch.py`; shapes are those of its legend. The interface is that of transformers'
ViT. "The paper" is Dosovitskiy et al. (arXiv:2010.11929v2), its code github.com/google-research/vision_transformer.
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .compatibility_vit_scratch import (
    BackboneMixin,
    capture_outputs,
    create_bidirectional_mask,
    filter_output_hidden_states,
    init,
    make_importable,
)
from .configuration_vit_scratch import ViTScratchConfig
from .encoder_vit_scratch import (
    ViTScratchAttention,
    ViTScratchEmbeddings,
    ViTScratchEncoder,
    ViTScratchLayer,
    ViTScratchMLP,
    ViTScratchPooler,
)
from .parts_vit_scratch import ViTScratchAttentionPooling, ViTScratchGatedMLP, ViTScratchLayerScale
from .positions_vit_scratch import ViTScratchPositionEmbeddings, ViTScratchRelativePositions
from .stem_vit_scratch import ViTScratchStem  # noqa: F401 (up to 5.0, only what this file imports is found with a folder)
from .variants_vit_scratch import VARIANTS  # noqa: F401 (the same)


make_importable(__name__)

AnyModel = TypeVar("AnyModel", bound="ViTScratchPreTrainedModel")


def lecun_normal_(weight: Tensor) -> Tensor:
    """Flax's default for a kernel: variance 1 / fan-in, cut at two standard deviations of the uncut normal."""
    std = weight[0].numel() ** -0.5 / 0.87962566103423978  # the standard deviation that is left by the cut
    return init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class ViTScratchPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of every model here."""

    config_class = ViTScratchConfig
    config: ViTScratchConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ViTScratchPatchEmbeddings", "ViTScratchEmbeddings", "ViTScratchLayer"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ViTScratchLayer, "attentions": ViTScratchAttention}
    _input_embed_layer = "patch_embeddings"

    # The package sets the loader, which reads other formats and adapts to other sizes. Alone, this file does without.
    checkpoint_loader: Callable | None = None
    image_processor: Any = None  # the one that fits, where that loader knows it

    def __init__(self, config: ViTScratchConfig, *args: Any, **kwargs: Any) -> None:
        config.validate_vit()
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls: type[AnyModel], pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> AnyModel:
        """As in transformers; with the package, also what its `checkpoint.loading.from_pretrained` adds."""
        load, own_loader = super().from_pretrained, ViTScratchPreTrainedModel.checkpoint_loader
        if own_loader is None:
            loaded = load(pretrained_model_name_or_path, *args, **kwargs)
            config = (loaded[0] if isinstance(loaded, tuple) else loaded).config
            if pretrained_model_name_or_path is not None:
                hub = {name: kwargs.get(name) for name in ("cache_dir", "revision", "subfolder", "token")}
                hub = {name: value for name, value in hub.items() if value}
                stored = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub)
                is_as_large = math.prod(stored.grid_hw) == math.prod(config.grid_hw)  # so it has loaded
                if stored.position_embedding.endswith("1d") and is_as_large and stored.grid_hw != config.grid_hw:
                    raise ValueError(
                        f"image_size={config.image_size}: the positions are for {stored.image_size}. Leave it out, the "
                        "model takes images of any size. Or import modeling_vit_scratch, which resamples positions."
                    )
            return loaded
        return own_loader(cls, load, pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers; with the image processor that the loader found or adapted, if there is one."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(save_directory)

    def post_init(self) -> None:
        """As in transformers; first, dense layers that start in a way of their own are marked for `_init_weights`."""
        for module in self.modules():
            if isinstance(module, (ViTScratchAttention, ViTScratchAttentionPooling)):
                # The gain makes up for fusing: xavier's bound is that of three separate D x D matrices.
                module.qkv.kernel_init = partial(init.xavier_uniform_, gain=math.sqrt(2))
            elif isinstance(module, (ViTScratchMLP, ViTScratchGatedMLP)):
                module.fc1.bias_std = module.fc2.bias_std = 1e-6
            elif isinstance(module, ViTScratchPooler) and module.dense is not None:
                module.dense.kernel_init = lecun_normal_
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As in the paper's code. The functions of `init` leave alone what a checkpoint has filled."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            getattr(module, "kernel_init", init.xavier_uniform_)(module.weight)
            if module.bias is not None:
                init.normal_(module.bias, getattr(module, "bias_mean", 0.0), getattr(module, "bias_std", 0.0))
        elif isinstance(module, nn.Conv2d):
            lecun_normal_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm):
            init.constant_(module.weight, module.weight_init)
            init.zeros_(module.bias)
        elif isinstance(module, (ViTScratchPositionEmbeddings, ViTScratchRelativePositions)):
            for weight in module.parameters():
                init.normal_(weight, std=std)
        elif isinstance(module, ViTScratchEmbeddings):
            for token in (module.cls_token, module.distillation_token, module.mask_token):
                if token is not None:
                    init.zeros_(token)
            if module.register_tokens is not None:
                init.normal_(module.register_tokens, std=std)  # equal registers would stay equal
        elif isinstance(module, ViTScratchAttentionPooling):
            init.normal_(module.probe, std=std)
        elif isinstance(module, ViTScratchLayerScale):
            init.constant_(module.weight, module.init_value)
        else:
            super()._init_weights(module)


class ViTScratchModel(ViTScratchPreTrainedModel, ViTScratchEncoder):
    """
    The encoder without a head.

    Args:
        config: the architecture.
        add_pooling_layer: whether to compute `pooler_output`.
        use_mask_token: whether there is a mask token, for `bool_masked_pos`.
    """

    def __init__(self, config: ViTScratchConfig, add_pooling_layer: bool = True, use_mask_token: bool = False) -> None:
        super().__init__(config, use_mask_token)
        self.pooler = ViTScratchPooler(config) if add_pooling_layer else None
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, attention_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:  # fmt: skip
        """
        Args:
            pixel_values: (B, C, H, W), normalised as the image processor does; any H and W that the patch divides.
            bool_masked_pos: (B, N) or (B, rows, columns), true where the mask token replaces the patch.
            attention_mask: (B, T), zero for tokens that no token attends to.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`. The weights of `output_attentions` are
                true under every attention implementation. transformers' `interpolate_pos_encoding` changes nothing:
                every size works.

        Returns:
            `last_hidden_state` (B, T, D) after the final LayerNorm, `pooler_output` as `ViTScratchPooler` makes it.

        Raises:
            ValueError: if `pixel_values` have the wrong type or shape, or a mask doesn't fit them.
        """
        if pixel_values is None or not torch.is_floating_point(pixel_values):
            got = None if pixel_values is None else pixel_values.dtype
            raise ValueError(
                f"pixel_values must be normalised floating-point numbers, got {got}: use the image processor."
            )
        for name in ("interpolate_pos_encoding", "output_hidden_states"):  # the decorator collects hidden states
            kwargs.pop(name, None)
        kwargs.setdefault("output_attentions", self.config.output_attentions)
        # A model in half precision takes the float32 pixels of the image processor.
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        mask = None
        if attention_mask is not None:
            mask = self._expand_mask(attention_mask, pixel_values, kwargs["output_attentions"])
        sequence = super().forward(pixel_values, bool_masked_pos, mask, **kwargs)
        pooled = None if self.pooler is None else self.pooler(sequence, attention_mask=attention_mask)
        return BaseModelOutputWithPooling(last_hidden_state=sequence, pooler_output=pooled)

    def _expand_mask(self, attention_mask: Tensor, pixel_values: Tensor, output_attentions: bool | None) -> Any:
        """The mask (B, T) in the form that the attention implementation takes."""
        rows, columns = self.embeddings.patch_embeddings.grid(pixel_values)
        wanted = (pixel_values.shape[0], self.config.num_prefix_tokens + rows * columns)
        if wanted != (got := tuple(attention_mask.shape)):
            raise ValueError(f"attention_mask must have the shape (batch, tokens) = {wanted}, got {got}.")
        config, tokens = copy.copy(self.config), pixel_values.new_empty(*wanted, 1)  # only its shape and type count
        config._attn_implementation = "eager" if output_attentions else config._attn_implementation
        return create_bidirectional_mask(config=config, inputs_embeds=tokens, attention_mask=attention_mask)


def image_classification_loss(
    labels: Tensor, logits: Tensor, config: ViTScratchConfig, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """
    The loss that `config.problem_type` names, in float32.

    Args:
        labels: for `"single_label_classification"` (the default if K > 1), classes (B,) of any integer type, or
            probabilities of the classes (B, K), e.g. from mixup. For `"multi_label_classification"`, 0 to 1 (B, K). For
            `"regression"` (the default if K = 1), numbers (B,) or (B, K).
        logits: (B, K).
        config: the model's; read, never written.
        num_items_in_batch: what the sum of losses is divided by, as `Trainer` counts it: the entries of `labels` that
            are not -100, over all batches that make one update. Default: those of this batch.

    Raises:
        ValueError: if the labels don't fit the problem type.
    """
    problem = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
    is_classes = problem == "single_label_classification" and not torch.is_floating_point(labels)
    if labels.numel() != (logits.shape[0] if is_classes else logits.numel()):
        raise ValueError(
            f"Labels of shape {tuple(labels.shape)}, {labels.dtype}, don't fit logits of shape {tuple(logits.shape)}, "
            f"problem_type={config.problem_type!r}. Give integer classes (batch,) or probabilities (batch, labels); "
            "several labels for an image need config.problem_type='multi_label_classification'."
        )
    logits = logits.float()
    targets = labels.flatten().long() if is_classes else labels.view_as(logits).float()
    if problem == "regression":
        total = F.mse_loss(logits, targets, reduction="sum")
    elif problem == "multi_label_classification":
        total = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    else:
        total = F.cross_entropy(logits, targets, reduction="sum")
        if not is_classes:
            total = total * logits.shape[1]  # an image has one loss, but its K probabilities are K entries
            unsure = config.problem_type is None and not torch.compiler.is_compiling()
            if unsure and (targets.sum(dim=1) - 1).abs().max() > 1e-2:
                way_out = "Set config.problem_type: 'multi_label_classification' takes several labels for an image."
                raise ValueError(f"The rows of float labels must sum to 1 to be probabilities of classes. {way_out}")
    count = labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if torch.is_tensor(count) else count)


class ViTScratchForImageClassification(ViTScratchPreTrainedModel):
    """The encoder with a linear classifier on its pooled output (3.1)."""

    def __init__(self, config: ViTScratchConfig) -> None:
        super().__init__(config)
        self.num_labels, width = config.num_labels, config.representation_size or config.pooled_width
        self.vit = ViTScratchModel(config)
        self.classifier = nn.Linear(width, self.num_labels) if self.num_labels else nn.Identity()
        has_second = config.use_distillation_head and self.num_labels
        self.distillation_classifier = nn.Linear(config.hidden_size, self.num_labels) if has_second else None
        for head in filter(None, (self.classifier, self.distillation_classifier)):
            head.kernel_init = init.zeros_ if config.zero_init_head else init.xavier_uniform_
            head.bias_mean = config.head_bias_init
        self.loss_function = image_classification_loss  # set here: transformers would choose by the name of the class
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None, **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:  # fmt: skip
        """
        Args:
            pixel_values, attention_mask, kwargs: as in `ViTScratchModel.forward`.
            labels, num_items_in_batch: as in `image_classification_loss`.

        Returns:
            `logits` (B, K), outside of training divided by the temperature; with labels, `loss`, a float32 scalar, of
            the logits before that.
        """
        outputs = self.vit(pixel_values, attention_mask=attention_mask, return_dict=True, **kwargs)
        logits, loss = self.classifier(outputs.pooler_output), None
        if self.distillation_classifier is not None:
            logits = (logits + self.distillation_classifier(outputs.last_hidden_state[:, 1])) / 2
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, num_items_in_batch=num_items_in_batch)
        if self.config.calibrated and not self.training:
            logits = logits / self.config.temperature
        more = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        return ImageClassifierOutput(loss=loss, logits=logits, **more)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """(B, N, C * height * width) -> (B, C, H, W): undoes `patchify`."""
    images = patches.reshape(patches.shape[0], *grid, -1, *patch)  # (B, rows, columns, C, height, width)
    return images.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class ViTScratchForMaskedImageModeling(ViTScratchPreTrainedModel):
    """The encoder with a linear decoder that paints masked patches (SimMIM, Xie et al., arXiv:2111.09886)."""

    def __init__(self, config: ViTScratchConfig) -> None:
        super().__init__(config)
        if config.stem_layers is not None:
            raise ValueError(
                "Masked image modeling masks tokens, and a ResNet stem has seen the pixels around each: "
                "take stem_layers=None."
            )
        self.vit = ViTScratchModel(config, add_pooling_layer=False, use_mask_token=True)
        self.decoder = nn.Linear(config.hidden_size, config.num_channels * math.prod(config.patch_hw))
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, attention_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedImageModelingOutput:  # fmt: skip
        """
        Args: as in `ViTScratchModel.forward`.

        Returns:
            `reconstruction` (B, C, H, W); with `bool_masked_pos`, `loss`, the mean absolute error on masked pixels.
        """
        masks = {"bool_masked_pos": bool_masked_pos, "attention_mask": attention_mask}
        outputs = self.vit(pixel_values, **masks, return_dict=True, **kwargs)
        grid, patch = self.vit.embeddings.patch_embeddings.grid(pixel_values), self.config.patch_hw
        patches = self.decoder(outputs.last_hidden_state[:, self.config.num_prefix_tokens :])  # (B, N, C * patch area)
        reconstruction = unpatchify(patches, grid, patch)  # (B, C, H, W)
        loss = None
        if bool_masked_pos is not None:
            mask = bool_masked_pos.reshape(-1, 1, *grid).to(reconstruction.device)
            mask = mask.repeat_interleave(patch[0], dim=2).repeat_interleave(patch[1], dim=3)  # (B, 1, H, W)
            error = F.l1_loss(reconstruction.float(), pixel_values.float(), reduction="none")
            loss = (error * mask).sum() / (mask.sum() * self.config.num_channels).clamp(min=1)
        more = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        return MaskedImageModelingOutput(loss=loss, reconstruction=reconstruction, **more)


class ViTScratchBackbone(BackboneMixin, ViTScratchPreTrainedModel):
    """The encoder as a backbone: feature maps of the layers named in `config.out_features`."""

    _keys_to_ignore_on_load_unexpected = [r"pooler\.", r"classifier\.", r"decoder\.", r"mask_token"]

    def __init__(self, config: ViTScratchConfig) -> None:
        super().__init__(config)
        self.vit = ViTScratchModel(config, add_pooling_layer=False)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """
        Args: as in `ViTScratchModel.forward`.

        Returns:
            `feature_maps`, for each of `out_features` (B, D, rows, columns) after the final LayerNorm.
        """
        outputs = self.vit(pixel_values, **kwargs | {"return_dict": True, "output_hidden_states": True})
        grid, prefix = self.vit.embeddings.patch_embeddings.grid(pixel_values), self.config.num_prefix_tokens
        states = [s for stage, s in zip(self.stage_names, outputs.hidden_states) if stage in self.out_features]
        maps = tuple(self.vit.layernorm(s)[:, prefix:].transpose(1, 2).unflatten(2, grid) for s in states)
        return BackboneOutput(maps, hidden_states=outputs.hidden_states, attentions=outputs.attentions)


__all__ = [
    "ViTScratchBackbone", "ViTScratchForImageClassification", "ViTScratchForMaskedImageModeling", "ViTScratchModel",
    "ViTScratchPreTrainedModel",
]  # fmt: skip
