# SPDX-License-Identifier: Apache-2.0
"""
What other people call the tensors of a Vision Transformer: a table per format, of our name, theirs and the rule between
the values. `{i}` counts layers, `{s}` and `{u}` the stem's stages and units; other fields are what releases differ in.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..configuration_vit_scratch import ViTScratchConfig
from .families import RELATIVE, ROTARY, TIMM_STEM


class Rule(NamedTuple):
    """`read` makes our tensor of theirs, `write` theirs of ours; both know the configuration."""

    read: Callable[[list[Tensor], ViTScratchConfig], Tensor]
    write: Callable[[Tensor, ViTScratchConfig], list[Tensor]]


def _heads(config: ViTScratchConfig) -> tuple[int, int]:
    return config.num_attention_heads, config.hidden_size // config.num_attention_heads


def _copy(tensor: Tensor) -> Tensor:
    """In memory as its shape says: `contiguous` leaves odd strides on axes of one."""
    return tensor.clone(memory_format=torch.contiguous_format)


SAME = Rule(lambda t, c: t[0], lambda t, c: [t])
# (inputs, outputs) <-> (outputs, inputs)
TRANSPOSED = Rule(lambda t, c: t[0].T.contiguous(), lambda t, c: [t.T.contiguous()])
# (height, width, inputs, outputs) <-> (outputs, inputs, height, width)
CONVOLUTION = Rule(lambda t, c: _copy(t[0].permute(3, 2, 0, 1)), lambda t, c: [_copy(t.permute(2, 3, 1, 0))])
# query, key, value apart (keys may have no bias) <-> one after another
FUSED = Rule(lambda t, c: torch.cat(t), lambda t, c: list(t.split(c.hidden_size)))
# a query apart from keys and values <-> one after another
QUERY_APART = Rule(lambda t, c: torch.cat(t), lambda t, c: list(t.split([c.hidden_size, 2 * c.hidden_size])))
# three of (D, heads, head width) <-> (3 D, D)
FUSED_HEADS = Rule(
    lambda t, c: torch.cat([kernel.flatten(1).T for kernel in t]),
    lambda t, c: [weight.T.unflatten(1, _heads(c)).contiguous() for weight in t.chunk(3)],
)
FUSED_HEADS_BIAS = Rule(
    lambda t, c: torch.cat([bias.flatten() for bias in t]), lambda t, c: [b.unflatten(0, _heads(c)) for b in t.chunk(3)]
)
# (heads, head width, D) <-> (D, D)
MERGED_HEADS = Rule(
    lambda t, c: t[0].flatten(0, 1).T.contiguous(), lambda t, c: [t.T.unflatten(0, _heads(c)).contiguous()]
)
# (1, D) <-> (1, 1, D)
ONE_TOKEN = Rule(lambda t, c: t[0][None], lambda t, c: [t[0]])
# of any rank <-> a vector: Flax before 0.3.6 kept the axes that GroupNorm averages over, (1, 1, 1, C)
VECTOR = Rule(lambda t, c: t[0].flatten(), lambda t, c: [t])
# DINOv2's mask token is (1, D), that of ViT and DINOv3 (1, 1, D)
MASK_TOKEN = Rule(
    lambda t, c: t[0].reshape(1, 1, -1),
    lambda t, c: [t if c.layer_scale_init_value is None or c.position_embedding == "rope_2d" else t[0]],
)
# a 1 x 1 convolution <-> a dense layer
POINTWISE = Rule(lambda t, c: t[0].flatten(1), lambda t, c: [t[:, :, None, None]])
Row = tuple[str, str | tuple[str, ...], Rule]


def _both(ours: str, theirs: str, rule: Rule = SAME, names: tuple[str, str] = ("weight", "bias")) -> list[Row]:
    """The rows of a layer with weight and bias."""
    bias_rule = VECTOR if rule is VECTOR else SAME
    return [(f"{ours}.weight", f"{theirs}{names[0]}", rule), (f"{ours}.bias", f"{theirs}{names[1]}", bias_rule)]


def _three(template: str, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(template.replace("*", name) for name in names)


# The official code and big_vision: .npz of Flax's parameters
_FLAX = ("kernel", "bias")
_SCALE = ("scale", "bias")
_FLAX_QKV = ("query", "key", "value")
_BLOCK = "{prefix}Transformer/encoderblock_{i}/"
_MAP = "{prefix}MAPHead_0/"
_MAP_ATTENTION = _MAP + "MultiHeadDotProductAttention_0/"
_UNIT = "vit.embeddings.patch_embeddings.stem.stages.{s}.{u}"
_THEIR_UNIT = "{prefix}block{s1}/unit{u1}/"

NPZ_ROWS: list[Row] = [
    ("vit.embeddings.cls_token", "{prefix}cls", SAME),
    ("vit.embeddings.position_embeddings.weight", "{prefix}{positions}", SAME),
    *_both("vit.embeddings.patch_embeddings.projection", "{prefix}embedding/", CONVOLUTION, _FLAX),
    ("vit.embeddings.patch_embeddings.stem.root_conv.weight", "{prefix}conv_root/kernel", CONVOLUTION),
    *_both("vit.embeddings.patch_embeddings.stem.root_norm", "{prefix}gn_root/", VECTOR, _SCALE),
    (f"{_UNIT}.shortcut_conv.weight", f"{_THEIR_UNIT}conv_proj/kernel", CONVOLUTION),
    *_both(f"{_UNIT}.shortcut_norm", f"{_THEIR_UNIT}gn_proj/", VECTOR, _SCALE),
    *((f"{_UNIT}.conv{n}.weight", f"{_THEIR_UNIT}conv{n}/kernel", CONVOLUTION) for n in (1, 2, 3)),
    *(row for n in (1, 2, 3) for row in _both(f"{_UNIT}.norm{n}", f"{_THEIR_UNIT}gn{n}/", VECTOR, _SCALE)),
    *_both("vit.layers.{i}.layernorm_before", _BLOCK + "LayerNorm_0/", SAME, _SCALE),
    ("vit.layers.{i}.attention.qkv.weight", _three(_BLOCK + "{attention}/*/kernel", _FLAX_QKV), FUSED_HEADS),
    ("vit.layers.{i}.attention.qkv.bias", _three(_BLOCK + "{attention}/*/bias", _FLAX_QKV), FUSED_HEADS_BIAS),
    *_both("vit.layers.{i}.attention.proj", _BLOCK + "{attention}/out/", MERGED_HEADS, _FLAX),
    *_both("vit.layers.{i}.layernorm_after", _BLOCK + "{norm2}/", SAME, _SCALE),
    *_both("vit.layers.{i}.mlp.fc1", _BLOCK + "{mlp}/Dense_0/", TRANSPOSED, _FLAX),
    *_both("vit.layers.{i}.mlp.fc2", _BLOCK + "{mlp}/Dense_1/", TRANSPOSED, _FLAX),
    *_both("vit.layernorm", "{prefix}Transformer/encoder_norm/", SAME, _SCALE),
    ("vit.pooler.attention.probe", _MAP + "probe", SAME),
    ("vit.pooler.attention.qkv.weight", _three(_MAP_ATTENTION + "*/kernel", _FLAX_QKV), FUSED_HEADS),
    ("vit.pooler.attention.qkv.bias", _three(_MAP_ATTENTION + "*/bias", _FLAX_QKV), FUSED_HEADS_BIAS),
    *_both("vit.pooler.attention.proj", _MAP_ATTENTION + "out/", MERGED_HEADS, _FLAX),
    *_both("vit.pooler.attention.layernorm", _MAP + "LayerNorm_0/", SAME, _SCALE),
    *_both("vit.pooler.attention.mlp.fc1", _MAP + "MlpBlock_0/Dense_0/", TRANSPOSED, _FLAX),
    *_both("vit.pooler.attention.mlp.fc2", _MAP + "MlpBlock_0/Dense_1/", TRANSPOSED, _FLAX),
    *_both("vit.pooler.dense", "{prefix}pre_logits/", TRANSPOSED, _FLAX),
    *_both("classifier", "{prefix}head/", TRANSPOSED, _FLAX),
]

# timm, and what has its names: DeiT, DeiT III, DINO, MAE, DINOv2 as their authors publish them
TIMM_ROWS: list[Row] = [
    ("vit.embeddings.cls_token", "cls_token", SAME),
    ("vit.embeddings.distillation_token", "dist_token", SAME),
    ("vit.embeddings.register_tokens", "{registers}", SAME),
    ("vit.embeddings.mask_token", "mask_token", ONE_TOKEN),
    ("vit.embeddings.position_embeddings.weight", "pos_embed", SAME),
    *_both("vit.embeddings.patch_embeddings.projection", "patch_embed.proj."),
    *_both("vit.embeddings.patch_embeddings.layernorm", "patch_embed.norm."),
    *_both("vit.embeddings.layernorm", "norm_pre."),
    *_both("vit.layers.{i}.layernorm_before", "blocks.{i}.norm1."),
    *_both("vit.layers.{i}.attention.qkv", "blocks.{i}.attn.qkv."),
    *_both("vit.layers.{i}.attention.q_norm", "blocks.{i}.attn.q_norm."),
    *_both("vit.layers.{i}.attention.k_norm", "blocks.{i}.attn.k_norm."),
    *_both("vit.layers.{i}.attention.proj", "blocks.{i}.attn.proj."),
    ("vit.layers.{i}.layer_scale_attention.weight", "blocks.{i}.{scale1}", SAME),
    *_both("vit.layers.{i}.layernorm_after", "blocks.{i}.norm2."),
    *_both("vit.layers.{i}.mlp.fc1", "blocks.{i}.{fc1}."),
    *_both("vit.layers.{i}.mlp.fc2", "blocks.{i}.{fc2}."),
    ("vit.layers.{i}.layer_scale_mlp.weight", "blocks.{i}.{scale2}", SAME),
    *_both("vit.layernorm", "norm."),
    *_both("vit.pooler.layernorm", "fc_norm."),
    ("vit.pooler.attention.probe", "attn_pool.latent", SAME),
    ("vit.pooler.attention.qkv.weight", ("attn_pool.q.weight", "attn_pool.kv.weight"), QUERY_APART),
    ("vit.pooler.attention.qkv.bias", ("attn_pool.q.bias", "attn_pool.kv.bias"), QUERY_APART),
    *_both("vit.pooler.attention.proj", "attn_pool.proj."),
    *_both("vit.pooler.attention.layernorm", "attn_pool.norm."),
    *_both("vit.pooler.attention.mlp.fc1", "attn_pool.mlp.fc1."),
    *_both("vit.pooler.attention.mlp.fc2", "attn_pool.mlp.fc2."),
    *_both("vit.pooler.dense", "pre_logits.fc."),
    *_both("classifier", "{head}."),
    *_both("distillation_classifier", "head_dist."),
]

# transformers: ViT, DeiT, ViTMAE, ViTMSN, I-JEPA, DINOv2 with and without registers, DINOv3, CLIP, SigLIP, AIMv2
_LAYER = "{prefix}{layers}.{i}."

TRANSFORMERS_ROWS: list[Row] = [
    ("vit.embeddings.cls_token", "{prefix}embeddings.{cls}", SAME),
    ("vit.embeddings.distillation_token", "{prefix}embeddings.distillation_token", SAME),
    ("vit.embeddings.register_tokens", "{prefix}embeddings.register_tokens", SAME),
    ("vit.embeddings.mask_token", "{prefix}embeddings.mask_token", MASK_TOKEN),
    ("vit.embeddings.position_embeddings.weight", "{prefix}embeddings.{positions}", SAME),
    *_both("vit.embeddings.patch_embeddings.projection", "{prefix}embeddings.{patch}."),
    *_both("vit.embeddings.patch_embeddings.layernorm", "{prefix}embeddings.rms_norm."),
    *_both("vit.embeddings.layernorm", "{prefix}pre_layrnorm."),
    *_both("vit.layers.{i}.layernorm_before", _LAYER + "{norm1}."),
    ("vit.layers.{i}.attention.qkv.weight", _three(_LAYER + "{attention}.*.weight", ("{q}", "{k}", "{v}")), FUSED),
    ("vit.layers.{i}.attention.qkv.bias", _three(_LAYER + "{attention}.*.bias", ("{q}", "{k}", "{v}")), FUSED),
    *_both("vit.layers.{i}.attention.proj", _LAYER + "{out}."),
    ("vit.layers.{i}.layer_scale_attention.weight", _LAYER + "layer_scale1.lambda1", SAME),
    *_both("vit.layers.{i}.layernorm_after", _LAYER + "{norm2}."),
    *_both("vit.layers.{i}.mlp.fc1", _LAYER + "{fc1}."),
    *_both("vit.layers.{i}.mlp.fc2", _LAYER + "{fc2}."),
    ("vit.layers.{i}.layer_scale_mlp.weight", _LAYER + "layer_scale2.lambda1", SAME),
    *_both("vit.layernorm", "{prefix}{norm}."),
    *_both("vit.pooler.layernorm", "{prefix}{norm}."),
    *_both("vit.pooler.dense", "{prefix}pooler.dense."),
    ("vit.pooler.attention.probe", "{prefix}head.probe", SAME),
    *_both("vit.pooler.attention.qkv", "{prefix}head.attention.in_proj_"),
    *_both("vit.pooler.attention.proj", "{prefix}head.attention.out_proj."),
    *_both("vit.pooler.attention.layernorm", "{prefix}head.layernorm."),
    *_both("vit.pooler.attention.mlp.fc1", "{prefix}head.mlp.fc1."),
    *_both("vit.pooler.attention.mlp.fc2", "{prefix}head.mlp.fc2."),
    *_both("classifier", "{classifier}."),
    *_both("distillation_classifier", "distillation_classifier."),
    *_both("decoder", "decoder.0.", POINTWISE),
]

_TV_LAYER = "encoder.layers.encoder_layer_{i}."

TORCHVISION_ROWS: list[Row] = [
    ("vit.embeddings.cls_token", "class_token", SAME),
    ("vit.embeddings.position_embeddings.weight", "encoder.pos_embedding", SAME),
    *_both("vit.embeddings.patch_embeddings.projection", "conv_proj."),
    *_both("vit.layers.{i}.layernorm_before", _TV_LAYER + "ln_1."),
    *_both("vit.layers.{i}.attention.qkv", _TV_LAYER + "self_attention.in_proj_"),
    *_both("vit.layers.{i}.attention.proj", _TV_LAYER + "self_attention.out_proj."),
    *_both("vit.layers.{i}.layernorm_after", _TV_LAYER + "ln_2."),
    *_both("vit.layers.{i}.mlp.fc1", _TV_LAYER + "mlp.{fc1}."),
    *_both("vit.layers.{i}.mlp.fc2", _TV_LAYER + "mlp.{fc2}."),
    *_both("vit.layernorm", "encoder.ln."),
    *_both("vit.pooler.dense", "heads.pre_logits."),
    *_both("classifier", "{head}."),
]


class Format(NamedTuple):
    """`leftovers` and `unsupported` are patterns of names, with the reason why they are left out or refused."""

    name: str
    title: str
    rows: list[Row]
    marks: tuple[str, ...]  # names that the others don't have, after any prefix
    dialects: Mapping[str, tuple[str, ...]] = {}  # for each field of the table its values, most usual first
    leftovers: Mapping[str, str] = {}
    unsupported: Mapping[str, str] = {}
    fixed: Mapping[str, tuple[Any, ...]] = {}  # what their code computes with and no file says


# The paper's network, and what it would have with another value: other networks have it, or not, by their names.
_PLAIN = {
    "use_gated_mlp": (False,), "mlp_bias": (True,), "proj_bias": (True,), "key_bias": (True,), "patch_bias": (True,),
    "norm_type": ("layernorm",), "use_patch_norm": (False,), "use_pre_norm": (False,), "use_final_norm": (True,),
    "norm_after_pooling": (False,), "position_embedding_placement": ("stem",), "position_embedding": ("learned_1d",),
    "pooling": ("cls",),
}  # fmt: skip
_MAE_DECODER = "MAE's decoder, which only pre-training uses"

NPZ = Format(
    "npz", "official JAX checkpoint", NPZ_ROWS,
    marks=("embedding/kernel", "encoder_norm/scale", "query/kernel", "pos_embedding"),
    dialects={
        # Flax numbered layers by their place in a block before 2020, and by their kind since.
        "attention": ("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0"),
        "norm2": ("LayerNorm_2", "LayerNorm_1"),
        "mlp": ("MlpBlock_3", "MlpBlock_0"),
        "positions": ("Transformer/posembed_input/pos_embedding", "Transformer/pos_embedding", "pos_embedding"),
    },
    leftovers={r"^(opt|chrono|states?|step)(/|$)": "the optimizer's state"},
    unsupported={r"(MixerBlock|token_mixing)": "is an MLP-Mixer"},
    fixed=_PLAIN | {
        "hidden_act": ("gelu_pytorch_tanh", "gelu_new"), "layer_norm_eps": (1e-6,),
        "position_embedding": ("learned_1d", "sincos_2d"), "pooling": ("cls", "mean", "map"),
    },
)  # fmt: skip
TIMM = Format(
    "timm", "timm checkpoint", TIMM_ROWS,
    marks=("patch_embed.proj.weight", "norm1.weight", "attn.qkv.weight", "pos_embed"),
    dialects={
        "registers": ("reg_token", "register_tokens"),
        "scale1": ("ls1.gamma", "gamma_1"),
        "scale2": ("ls2.gamma", "gamma_2"),
        "head": ("head", "head.0", "head.1"),  # users' own, of dropout and one linear layer
        "fc1": ("mlp.fc1", "mlp.w12"),  # DINOv2's giant, as its authors publish it
        "fc2": ("mlp.fc2", "mlp.w3"),
    },
    leftovers={
        r"^decoder_(embed|blocks|norm|pred|pos_embed)\b": _MAE_DECODER,
        r"^head\.(mlp|last_layer)\.": "DINO's projection head, which only pre-training uses",
    },
    unsupported={
        r"^patch_embed\.backbone\.": TIMM_STEM, r"relative_position|rel_pos": RELATIVE, r"^rope\b|\.rope\b": ROTARY,
    },
    fixed=_PLAIN | {
        "hidden_act": ("gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu"), "layer_norm_eps": (1e-6,),
        "position_embedding": ("learned_1d", "none"), "norm_after_pooling": (False, True),
        "pooling": ("cls", "mean", "map"),
    },
)  # fmt: skip
TRANSFORMERS = Format(
    "transformers", "transformers checkpoint", TRANSFORMERS_ROWS,
    marks=(
        "embeddings.patch_embeddings.projection.weight", "embeddings.patch_embeddings.weight",
        "embeddings.patch_embedding.weight", "embeddings.patch_embed.weight", "embeddings.position_embeddings",
        "embeddings.position_embedding.weight", "query.weight", "q_proj.weight",
    ),
    dialects={
        "cls": ("cls_token", "class_embedding"),
        "positions": ("position_embeddings", "position_embedding.weight"),
        "patch": ("patch_embeddings.projection", "patch_embeddings", "patch_embedding", "patch_embed"),
        "layers": ("encoder.layer", "encoder.layers", "layers", "model.layer", "layer"),
        "norm1": ("layernorm_before", "norm1", "layer_norm1", "rms_norm1"),
        "norm2": ("layernorm_after", "norm2", "layer_norm2", "rms_norm2"),
        "norm": ("layernorm", "post_layernorm", "norm", "rms_norm"),
        "attention": ("attention.attention", "attention", "self_attn"),
        "q": ("query", "q_proj"),
        "k": ("key", "k_proj"),
        "v": ("value", "v_proj"),
        "out": ("attention.output.dense", "attention.o_proj", "self_attn.out_proj", "attention.out_proj"),
        "fc1": ("intermediate.dense", "mlp.fc1", "mlp.weights_in", "mlp.up_proj"),
        "fc2": ("output.dense", "mlp.fc2", "mlp.weights_out", "mlp.down_proj", "ffn.down_proj"),
        "classifier": ("classifier", "cls_classifier", "classifier.0", "classifier.1"),
    },
    leftovers={
        r"^decoder\.(mask_token|decoder_\w+)": _MAE_DECODER, r"embeddings\.position_ids$": "a counter, no weight",
    },
    unsupported={r"relative_position": RELATIVE},
    fixed=_PLAIN,
)  # fmt: skip
TORCHVISION = Format(
    "torchvision", "torchvision checkpoint", TORCHVISION_ROWS,
    marks=("conv_proj.weight", "encoder.pos_embedding", "in_proj_weight", "class_token"),
    dialects={
        "fc1": ("0", "linear_1"), "fc2": ("3", "linear_2"), "head": ("heads.head", "heads", "heads.0", "heads.1"),
    },
    unsupported={r"^conv_proj\.conv_bn_relu": "has a convolutional stem with BatchNorm"},
    fixed=_PLAIN | {"hidden_act": ("gelu",), "layer_norm_eps": (1e-6,)},
)  # fmt: skip
NATIVE = Format(
    "vit_scratch", "checkpoint of this package", [],  # every name stands for itself
    marks=("position_embeddings.weight", "attention.qkv.weight", "attention.proj.weight"),
)  # fmt: skip

FORMATS = {form.name: form for form in (NPZ, TIMM, TRANSFORMERS, TORCHVISION, NATIVE)}


def recognise(names: Iterable[str]) -> Format | None:
    """The format most of whose marks are among the names, which may have a prefix; None if there is none."""
    text = "\n".join(names)

    def count(form: Format) -> int:
        return sum(re.search(rf"(?:^|[./]){re.escape(mark)}$", text, re.MULTILINE) is not None for mark in form.marks)

    best = max(FORMATS.values(), key=count)
    return best if count(best) else None


def find_dialect(form: Format, names: Iterable[str]) -> dict[str, str]:
    """The value of each field of the table with which a row's name occurs; the usual one if none does."""
    text, dialect = "\n".join(names), {}
    templates = [name for _, theirs, _ in form.rows for name in ([theirs] if isinstance(theirs, str) else theirs)]
    for field_name, values in form.dialects.items():
        used = [name for name in templates if f"{{{field_name}}}" in name]
        found = (v for v in values if any(re.search(_pattern(name, field_name, v), text, re.M) for name in used))
        dialect[field_name] = next(found, values[0])
    return dialect


def _pattern(template: str, field_name: str, value: str) -> str:
    """A regular expression for names of a template with one field known."""
    parts = re.split(r"\{(\w+)\}", template)
    known = {field_name: re.escape(value), "i": r"\d+"}
    filled = [known.get(part, r"[\w./]*?") if index % 2 else re.escape(part) for index, part in enumerate(parts)]
    return f"^{''.join(filled)}$"


def expand(form: Format, config: ViTScratchConfig, dialect: Mapping[str, str]) -> Iterator[tuple[str, list[str], Rule]]:
    """Every row of the table for a configuration: our name, theirs, the rule."""
    stem = enumerate(config.stem_layers or [])
    units = [{"s": s, "u": u, "s1": s + 1, "u1": u + 1} for s, count in stem for u in range(count)]
    layers = [{"i": i} for i in range(config.num_hidden_layers)]
    for ours, theirs, rule in form.rows:
        counters = layers if "{i}" in ours else units if "{u}" in ours else [{}]
        names = [theirs] if isinstance(theirs, str) else list(theirs)
        if len(names) == 3 and ours.endswith("qkv.bias") and not config.key_bias:
            del names[1]
        for counter in counters:
            yield ours.format(**counter), [name.format(**dialect, **counter) for name in names], rule
