# SPDX-License-Identifier: Apache-2.0
# modeling_vit_scratch 0.2.0
"""Configuration of the Vision Transformer: every architecture choice once.

Field names follow transformers' `ViTConfig` wherever it has the field, so that the dictionary of a `ViTConfig` is
accepted as it is. "The paper" is Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021 (arXiv:2010.11929v2).
"""

import difflib
import math
from typing import Any

from transformers.activations import ACT2FN

from .compatibility_vit_scratch import BackboneConfigMixin, PreTrainedConfig, make_importable, strict
from .variants_vit_scratch import VARIANTS


_CHOICES: dict[str, tuple[str, ...]] = {
    "position_embedding": ("learned_1d", "learned_2d", "sincos_2d", "relative_1d", "rope_2d", "none"),
    "position_embedding_placement": ("stem", "every_layer", "every_layer_shared"),
    "position_embedding_interpolation": (
        "bilinear", "bicubic", "bicubic_antialias", "bicubic_align_corners", "bicubic_offset", "bilinear_antialias",
    ),
    "pooling": ("cls", "mean", "cls_mean", "map"),
    "norm_type": ("layernorm", "rmsnorm"),
    "problem_type": ("single_label_classification", "multi_label_classification", "regression"),
}  # fmt: skip

# More than ten times the largest ViT that anyone has trained (22 billion parameters: width 6,144, 48 layers, MLP width
# 24,576; Dehghani et al., arXiv:2302.05442), and little enough that a damaged or hostile config.json ends in an error
# before it fills the memory.
MOST: dict[str, int] = {
    "hidden_size": 65_536,
    "num_hidden_layers": 1_000,
    "intermediate_size": 524_288,
    "representation_size": 524_288,
    "num_channels": 10_000,
    "num_register_tokens": 10_000,
    "image_size": 65_536,
    "patch_size": 65_536,
    "stem_layers": 1_000,
    "stem_width_factor": 100,
    "num_labels": 1_000_000,
}

# Of the files that travel with a model; each has it in its second line, and config.json as `code_version`.
CODE_VERSION = "0.2.0"

# A `ViTConfig` always carries these, whether its model uses them or not. Masked image modeling here reconstructs at
# the patch size, and the tanh layer before a head is `representation_size`: both follow from other fields.
_FOREIGN_FIELDS = ("encoder_stride", "pooler_output_size", "pooler_act")


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


make_importable(__name__)


@strict
class ViTScratchConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    The architecture of a `ViTScratchModel` and of its heads. The defaults give B/16 of the paper at 224 pixels.

    Args:
        hidden_size (`int`, defaults to 768): width D of the tokens.
        num_hidden_layers (`int`, defaults to 12): number of encoder layers L.
        num_attention_heads (`int`, defaults to 12): heads; must divide `hidden_size`.
        intermediate_size (`int`, defaults to 3072): width of the MLP.
        hidden_act (`str`, defaults to `"gelu"`): the MLP's activation, a name of transformers' `ACT2FN`. The paper's
            own code computes GELU by its tanh approximation: `"gelu_pytorch_tanh"`.
        hidden_dropout_prob (`float`, defaults to 0): dropout after the positions are added and after every dense
            layer but the qkv projection (the paper, B.1).
        attention_probs_dropout_prob (`float`, defaults to 0): dropout on the attention weights.
        initializer_range (`float`, defaults to 0.02): standard deviation of fresh position and register embeddings.
        use_gated_mlp (`bool`, defaults to `False`): an MLP of two branches of `intermediate_size`, of which the
            activated one scales the other (Shazeer, arXiv:2002.05202); with `hidden_act="silu"` it is SwiGLU.
        mlp_bias (`bool`, defaults to `True`): bias in the MLP.
        norm_type (`str`, defaults to `"layernorm"`): `"layernorm"`, or `"rmsnorm"`, which subtracts no mean.
        layer_norm_eps (`float`, defaults to 1e-6): epsilon of every LayerNorm, as in the paper's code.
        use_patch_norm (`bool`, defaults to `False`): a norm of the patches before positions are added (AIMv2).
        use_pre_norm (`bool`, defaults to `False`): a norm of all tokens before the first layer (CLIP).
        use_final_norm (`bool`, defaults to `True`): the norm after the last layer, of equation 4.
        image_size (`int` or `[height, width]`, defaults to 224): pixels; the grid that learned positions are stored
            for. Inputs of any other size that the patch divides work too: positions are resampled.
        patch_size (`int` or `[height, width]`, defaults to 16): pixels; must divide `image_size`.
        num_channels (`int`, defaults to 3): channels of the input.
        patch_bias (`bool`, defaults to `True`): bias in the patch projection.
        qkv_bias (`bool`, defaults to `True`): bias in the query, key and value projections.
        key_bias (`bool`, defaults to `True`): `False` leaves the bias to queries and values.
        proj_bias (`bool`, defaults to `True`): bias in the attention's output projection.
        qk_norm (`bool`, defaults to `False`): LayerNorm on queries and keys, per head (Dehghani et al.,
            arXiv:2302.05442).
        position_embedding (`str`, defaults to `"learned_1d"`): `"learned_1d"`, `"learned_2d"` (row and column
            halves), `"relative_1d"` and `"none"` are the paper's D.4; `"sincos_2d"` is the fixed one of MoCo v3;
            `"rope_2d"` turns queries and keys by row and column, as DINOv3 (Siméoni et al., arXiv:2508.10104).
        rope_theta (`float`, defaults to 100): the base of the periods of `"rope_2d"`.
        position_embedding_placement (`str`, defaults to `"stem"`): `"stem"`, `"every_layer"` or
            `"every_layer_shared"` (the paper, Table 8).
        position_embedding_interpolation (`str`, defaults to `"bilinear"`): the kernel that resamples positions to
            another grid: `"bilinear"` with corners aligned, as the paper's code; `"bilinear_antialias"`, as NaFlex;
            `"bicubic"`, as transformers; `"bicubic_antialias"`, as timm; `"bicubic_align_corners"`, as torchvision;
            `"bicubic_offset"`, as the authors' code of DINO and DINOv2, which scales to 0.1 patches more.
        cls_token_position (`bool`, defaults to `True`): whether the class token has a position of its own
            (equation 1 of the paper; DeiT III has none). Only for `"learned_1d"`.
        pooling (`str`, defaults to `"cls"`): what represents the image: the class token; the `"mean"` over patches;
            `"cls_mean"`, both in a row (DINOv2); `"map"`, a learned query that attends to the patches (SigLIP).
        norm_after_pooling (`bool`, defaults to `False`): whether the final norm comes after pooling, not before, as in
            fine-tuned MAE (He et al., arXiv:2111.06377) and CLIP. Not for `pooling="map"`.
        use_cls_token (`bool`, *optional*): whether there is a class token. Default: if `pooling` needs it.
        representation_size (`int`, *optional*): width of the tanh layer between pooling and classifier, which the
            paper's pre-training head has (3.1). Default: no such layer.
        num_register_tokens (`int`, defaults to 0): extra tokens (Darcet et al., arXiv:2309.16588).
        drop_path_rate (`float`, defaults to 0): stochastic depth rate of the last layer; grows linearly from 0.
        use_distillation_token (`bool`, defaults to `False`): DeiT's token after the class token (Touvron et al.,
            arXiv:2012.12877, 3); it has a position if the class token has one.
        use_distillation_head (`bool`, defaults to `False`): a second classifier, on that token; the logits are the
            mean of the two, as at DeiT's inference.
        use_mask_token (`bool`, defaults to `False`): keep a mask token in models that do without, as DINOv2 does.
        stem_layers (`list[int]`, *optional*): a hybrid model (the paper, 3.1): bottleneck units in each stage of a
            ResNet before the patches; `[]` is its root block alone. The stem halves the image twice and once more
            for each stage after the first; `patch_size` counts pixels of the image all the same. Default: no stem.
        stem_width_factor (`float`, defaults to 1): times 64, the width of the stem's first stage.
        layer_scale_init_value (`float`, *optional*): start of the scale on each residual branch (Touvron et al.,
            arXiv:2103.17239). Default: no scale.
        zero_init_head (`bool`, defaults to `False`): start the classifier's kernel at zero, as the paper does to
            fine-tune.
        head_bias_init (`float`, defaults to 0): where the classifier's bias starts. For a sigmoid loss over many
            classes, about the logarithm of one in so many: the paper's code has -10 for ImageNet-21k, and -6.9 for 1k.
        temperature (`float`, defaults to 1): what the logits are divided by outside of training, so that scores are
            probabilities that hold (Guo et al., arXiv:1706.04599); the loss never is. `scripts/evaluate.py` fits it.
        calibrated (`bool`, defaults to `True`): whether they are: `from_pretrained(..., calibrated=False)` is without.

    Raises:
        ValueError: for values that cannot work together; the message has the value, the limit and a way out.

    Example:

        >>> config = ViTScratchConfig.from_variant("S/16", num_labels=10)
        >>> config.hidden_size, config.grid_hw
        (384, (14, 14))
    """

    model_type = "vit_scratch"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    use_gated_mlp: bool = False
    mlp_bias: bool = True
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float | int = 0.02
    norm_type: str = "layernorm"
    layer_norm_eps: float | int = 1e-6
    use_patch_norm: bool = False
    use_pre_norm: bool = False
    use_final_norm: bool = True
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    patch_bias: bool = True
    qkv_bias: bool = True
    key_bias: bool = True
    proj_bias: bool = True
    qk_norm: bool = False
    position_embedding: str = "learned_1d"
    rope_theta: float | int = 100.0
    position_embedding_placement: str = "stem"
    position_embedding_interpolation: str = "bilinear"
    cls_token_position: bool = True
    pooling: str = "cls"
    norm_after_pooling: bool = False
    use_cls_token: bool | None = None
    representation_size: int | None = None
    num_register_tokens: int = 0
    use_distillation_token: bool = False
    use_distillation_head: bool = False
    use_mask_token: bool = False
    stem_layers: list[int] | tuple[int, ...] | None = None
    stem_width_factor: float | int = 1
    drop_path_rate: float | int = 0.0
    layer_scale_init_value: float | int | None = None
    zero_init_head: bool = False
    head_bias_init: float | int = 0.0
    temperature: float | int = 1.0
    calibrated: bool = True

    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_absurd(kwargs.get("num_labels"))
        # The config.json of another architecture must not rename this one.
        kwargs.pop("model_type", None)
        kwargs.pop("code_version", None)  # the code that saves is the code that is saved
        for name in _FOREIGN_FIELDS:
            kwargs.pop(name, None)
        self._refuse_misspelt(kwargs)
        if self.use_cls_token is None:
            self.use_cls_token = self.pooling in ("cls", "cls_mean")
        self._refuse_wrong_labels(kwargs.get("num_labels"))
        if self.id2label is not None and self.label2id is None:
            self.label2id = {label: int(index) for index, label in self.id2label.items()}
        # The whole map, so that a folder saved from one class loads through every Auto class; and never a map that
        # points to the repository a model came from, since the code is saved next to the weights.
        kwargs.pop("auto_map", None)
        self.auto_map = dict(AUTO_MAP)
        out_indices, out_features = kwargs.pop("out_indices", None), kwargs.pop("out_features", None)
        self.stage_names = ["stem"] + [f"stage{i}" for i in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(out_indices=out_indices, out_features=out_features)
        super().__post_init__(**kwargs)
        self.validate_vit()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "ViTScratchConfig":
        """
        As in transformers, but overrides are validated together with the dictionary, not set on the result; and
        `num_labels=K` replaces the labels that the dictionary has.
        """
        fields = {name: kwargs.pop(name) for name in list(kwargs) if name in cls.__dataclass_fields__}
        config_dict = dict(config_dict)
        labels = fields.get("id2label")
        num_labels = len(labels) if labels is not None else kwargs.get("num_labels")
        if num_labels is not None and num_labels != len(config_dict.get("id2label") or {}):
            config_dict.pop("id2label", None)
        if labels is not None or "id2label" not in config_dict:
            config_dict.pop("label2id", None)
        if fields.get("pooling") in ("cls", "cls_mean"):  # a stored class token stays where it isn't pooled
            config_dict.pop("use_cls_token", None)
        return super().from_dict({**config_dict, **fields}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without what follows from other fields: it would contradict an override."""
        output = super().to_dict()
        output.pop("stage_names", None)
        output["code_version"] = CODE_VERSION
        if output.get("out_features") == [self.stage_names[-1]]:
            del output["out_features"], output["out_indices"]
        return output

    @classmethod
    def from_variant(cls, name: str, **overrides: Any) -> "ViTScratchConfig":
        """
        The configuration of a named variant, e.g. `from_variant("B/16", num_labels=10)`.

        Args:
            name: size and patch size, one of `VARIANTS`.
            overrides: any other field, e.g. `image_size=384`; also those that the variant sets.

        Raises:
            ValueError: if there is no such variant; the message lists them.
        """
        if name not in VARIANTS:
            names = [other for other in VARIANTS if not other.startswith("test/")]  # the tests' own
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"There is no variant {name!r}.{hint} Variants: {', '.join(names)}. For another patch size, "
                'override it: from_variant("B/16", patch_size=14).'
            )
        return cls(**{**VARIANTS[name], **overrides})

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        return _pair(self.image_size)

    @property
    def patch_hw(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return _pair(self.patch_size)

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        (height, width), (patch_height, patch_width) = self.image_hw, self.patch_hw
        return height // patch_height, width // patch_width

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the first patch: the class and distillation tokens, if there are any, and the registers."""
        return int(self.use_cls_token) + int(self.use_distillation_token) + self.num_register_tokens

    @property
    def pooled_width(self) -> int:
        """Channels of what pooling makes of the tokens."""
        return self.hidden_size * (2 if self.pooling == "cls_mean" else 1)

    @property
    def stem_width(self) -> int:
        """Channels of the stem's root block."""
        return int(64 * self.stem_width_factor)

    @property
    def stem_stride(self) -> int:
        """How many pixels the stem makes one of, along each side; 1 without a stem."""
        return 1 if self.stem_layers is None else 4 * 2 ** max(len(self.stem_layers) - 1, 0)

    # transformers refuses `output_attentions` outside "eager"; this model computes the weights under every
    # implementation.
    @property
    def output_attentions(self) -> bool | None:
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value: bool | None) -> None:
        self._output_attentions = value

    def validate_output_attentions(self) -> None:
        """Nothing to refuse: see `output_attentions`."""

    def validate_vit(self) -> None:
        """
        Checks every field by itself and with the others. Part of `@strict` validation; also run by every model,
        since fields can be set after the configuration was made.

        Raises:
            ValueError: with the value, the limit and a way out.
        """
        self._refuse_absurd()
        self._check_choices()
        self._check_numbers()
        self._check_fit()

    def _check_choices(self) -> None:
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if value not in choices and not (field == "problem_type" and value is None):
                raise ValueError(f"{field}={value!r} is unknown. Choose one of: {', '.join(map(repr, choices))}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"hidden_act={self.hidden_act!r} is unknown. Choose 'gelu', 'gelu_pytorch_tanh' or another of "
                f"transformers' activations: {', '.join(sorted(ACT2FN))}."
            )

    def _check_numbers(self) -> None:
        for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1.")
        for field in ("image_size", "patch_size"):
            value = getattr(self, field)
            sides = [value, value] if isinstance(value, int) else list(value)
            if len(sides) != 2 or any(isinstance(side, bool) or side < 1 for side in sides):
                raise ValueError(f"{field}={value} must be a positive number of pixels, or two: [height, width].")
        for field in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            if not 0.0 <= getattr(self, field) < 1.0:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 0 and below 1.")
        for field in ("initializer_range", "num_register_tokens"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)} must not be negative.")
        if not math.isfinite(self.head_bias_init):
            raise ValueError(f"head_bias_init={self.head_bias_init} must be a finite number, e.g. -6.9.")
        if not self.layer_norm_eps > 0:
            raise ValueError(f"layer_norm_eps={self.layer_norm_eps} must be positive, e.g. 1e-6.")
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta={self.rope_theta} must be positive, e.g. 100.")
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be positive and finite; 1 changes nothing.")
        if (width := self.representation_size) is not None and width < 1:
            raise ValueError(f"representation_size={width} must be at least 1, or None for no layer.")

    def _check_fit(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            heads = [n for n in range(1, self.hidden_size + 1) if self.hidden_size % n == 0]
            near = min(heads, key=lambda n: abs(n - self.num_attention_heads))
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must divide hidden_size={self.hidden_size}. The "
                f"nearest number of heads that does is {near}."
            )
        for side, image, patch in zip(("height", "width"), self.image_hw, self.patch_hw):
            if image % patch:
                fits = [n for n in (image // patch * patch, -(-image // patch) * patch) if n]
                raise ValueError(
                    f"The patch {side} {patch} must divide the image {side} {image} (image_size={self.image_size}, "
                    f"patch_size={self.patch_size}). An image {side} of {' or '.join(map(str, fits))} would work."
                )
        if self.position_embedding in ("learned_2d", "sincos_2d"):
            multiple = 2 if self.position_embedding == "learned_2d" else 4
            if self.hidden_size % multiple:
                raise ValueError(
                    f"position_embedding={self.position_embedding!r} needs a hidden_size that {multiple} divides, not "
                    f"{self.hidden_size}: rows and columns share it."
                )
        if self.position_embedding == "rope_2d" and (head := self.hidden_size // self.num_attention_heads) % 4:
            raise ValueError(
                f"position_embedding='rope_2d' needs heads of a width that 4 divides, not {head}: rows and columns "
                "share it. Change num_attention_heads."
            )
        is_added = self.position_embedding not in ("relative_1d", "rope_2d", "none")
        if not is_added and self.position_embedding_placement != "stem":
            raise ValueError(
                f"position_embedding_placement={self.position_embedding_placement!r} has no meaning for "
                f"position_embedding={self.position_embedding!r}. Leave it at 'stem'."
            )
        if self.use_distillation_token and not self.use_cls_token:
            raise ValueError("use_distillation_token=True needs the class token. Set use_cls_token=True.")
        if self.use_distillation_head and not (self.use_distillation_token and self.pooling == "cls"):
            raise ValueError(
                "use_distillation_head=True classifies the distillation token, beside the class token: set "
                "use_distillation_token=True and pooling='cls'."
            )
        if self.norm_after_pooling and (self.pooling == "map" or not self.use_final_norm):
            raise ValueError(
                "norm_after_pooling=True moves the final norm behind the pooling: it needs use_final_norm=True and "
                "another pooling than 'map', which attends to normalised tokens."
            )
        self._check_stem()
        if self.pooling in ("cls", "cls_mean") and not self.use_cls_token:
            raise ValueError(
                f"pooling={self.pooling!r} needs the class token. Leave use_cls_token unset, or take pooling='mean'."
            )

    def _check_stem(self) -> None:
        if self.stem_layers is None:
            return
        if any(units < 1 for units in self.stem_layers):
            raise ValueError(f"stem_layers={self.stem_layers} must have at least 1 unit in each stage; [] is no stage.")
        if self.stem_width < 32 or self.stem_width % 32:
            raise ValueError(
                f"stem_width_factor={self.stem_width_factor} gives {self.stem_width} channels, which the stem's "
                "32 groups of GroupNorm must divide. Take a multiple of 0.5."
            )
        if any(patch % self.stem_stride for patch in self.patch_hw):
            raise ValueError(
                f"The stem of stem_layers={self.stem_layers} reduces the image {self.stem_stride} times, which must "
                f"divide patch_size={self.patch_size}. Take patch_size={self.stem_stride} for patches of one cell."
            )

    def _refuse_absurd(self, num_labels: Any = None) -> None:
        """First of all: what follows makes lists of the length that the numbers say."""
        labels = len(self.id2label) if isinstance(self.id2label, dict) else num_labels
        for field, most in MOST.items():
            value = labels if field == "num_labels" else getattr(self, field)
            for number in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(number, (int, float)) and number > most:
                    raise ValueError(f"{field}={value} is above {most:,}, more than any Vision Transformer has.")

    def _refuse_misspelt(self, kwargs: dict[str, Any]) -> None:
        """Unknown arguments become attributes in transformers; one that is nearly a field's name is a mistake."""
        fields = [name for name in self.__dataclass_fields__ if not name.startswith("_")] + ["num_labels"]
        for name in set(kwargs) - set(fields):
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.9)
            if near:
                raise ValueError(f"There is no field {name!r}. Did you mean {near[0]!r}?")

    def _refuse_wrong_labels(self, num_labels: int | None) -> None:
        if num_labels is not None and num_labels < 0:
            raise ValueError(f"num_labels={num_labels} must not be negative.")
        for field in ("id2label", "label2id"):
            if not isinstance(getattr(self, field), dict | None):
                raise ValueError(f"{field} must be a dictionary, got {type(getattr(self, field)).__name__}.")
        if self.id2label is None:
            return
        if wrong := [index for index in self.id2label if not str(index).isdecimal()]:
            raise ValueError(f"The keys of id2label must be whole numbers from 0 on, got {wrong[:3]}.")
        if wrong := [label for label in self.id2label.values() if not isinstance(label, str | int | float)]:
            raise ValueError(f"The labels in id2label must be text, got {wrong[0]!r}.")
        id2label, label2id = {int(index): label for index, label in self.id2label.items()}, self.label2id
        if num_labels is not None and num_labels != len(id2label):
            raise ValueError(
                f"num_labels={num_labels} contradicts id2label, which has {len(id2label)} labels. Give one of the two."
            )
        if sorted(id2label) != list(range(len(id2label))):
            raise ValueError(
                f"The keys of id2label must be 0 to {len(id2label) - 1} without a gap, got {sorted(id2label)[:10]}."
            )
        if label2id is None:
            return
        wrong = [label for index, label in id2label.items() if int(label2id.get(label, -1)) != index]
        if wrong or len(label2id) != len(set(id2label.values())):
            raise ValueError(
                f"label2id must be the inverse of id2label; they differ at {(wrong or list(label2id))[:3]}."
                " Leave label2id out: it is derived."
            )


AUTO_MAP: dict[str, str] = {
    "AutoConfig": "configuration_vit_scratch.ViTScratchConfig",
    "AutoModel": "modeling_vit_scratch.ViTScratchModel",
    "AutoModelForImageClassification": "modeling_vit_scratch.ViTScratchForImageClassification",
    "AutoModelForMaskedImageModeling": "modeling_vit_scratch.ViTScratchForMaskedImageModeling",
    "AutoBackbone": "modeling_vit_scratch.ViTScratchBackbone",
    "AutoImageProcessor": "image_processing_vit_scratch.ViTScratchImageProcessor",
}

__all__ = ["VARIANTS", "ViTScratchConfig"]
