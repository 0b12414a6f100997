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


def _origin(config: ViTScratchConfig) -> dict[str, Any]:
    """What the checkpoint that a model came from differs in from others of its format."""
    return getattr(config, "source_format", None) or {}


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
VECTOR = Rule(
    lambda t, c: t[0].flatten(), lambda t, c: [t.reshape((1,) * (_origin(c).get("norm_axes", 1) - 1) + (-1,))]
)
# DINOv2's mask token is (1, D), that of ViT and DINOv3 (1, 1, D)
MASK_TOKEN = Rule(
    lambda t, c: t[0].reshape(1, 1, -1),
    lambda t, c: [t if c.layer_scale_init_value is None or c.position_embedding == "rope_2d" else t[0]],
)
# CLIP's class token is (D,), that of ViT (1, 1, D); the positions of CLIP and SigLIP are (N, D), those of ViT (1, N, D)
CLASS_TOKEN = Rule(
    lambda t, c: t[0].reshape((1,) * (3 - t[0].dim()) + t[0].shape),
    lambda t, c: [t[0, 0] if _origin(c).get("cls") == "class_embedding" else t],
)
POSITIONS = Rule(
    CLASS_TOKEN.read, lambda t, c: [t[0] if _origin(c).get("positions") == "position_embedding.weight" else t]
)
# SigLIP 2's patches have a dense layer, (D, height * width * C) <-> (D, C, height, width)
PATCHES = Rule(
    lambda t, c: t[0] if t[0].dim() == 4 else _copy(t[0].unflatten(1, (*c.patch_hw, -1)).permute(0, 3, 1, 2)),
    lambda t, c: [t.permute(0, 2, 3, 1).flatten(1) if _origin(c).get("model_type", "")[:7] == "siglip2" else t],
)
# a 1 x 1 convolution <-> a dense layer
POINTWISE = Rule(lambda t, c: t[0].flatten(1), lambda t, c: [t[:, :, None, None]])
# What "*" stands for in a name, and the rule for the bias of a weight with this rule.
_PARTS = {FUSED_HEADS: ("query", "key", "value"), FUSED: ("{q}", "{k}", "{v}"), QUERY_APART: ("q", "kv")}
_BIAS_RULES = {FUSED_HEADS: FUSED_HEADS_BIAS, FUSED: FUSED, QUERY_APART: QUERY_APART, VECTOR: VECTOR}

# Ours, and theirs: the official code and big_vision (.npz of Flax's parameters); timm, and what has its names (DeiT,
# DeiT III, DINO, MAE, DINOv2 as their authors publish them); transformers (ViT, DeiT, ViTMAE, ViTMSN, I-JEPA, DINOv2
# with and without registers, DINOv3, CLIP, SigLIP, AIMv2); torchvision. The first line of a group is what its names
# begin with. Of ours, a name with a dot at the end stands for a weight and a bias. Where no rule is given it is SAME,
# and TRANSPOSED for the kernels of Flax.
_GROUPS: list[list[tuple[Any, ...]]] = [
    [
        ("vit.embeddings.", "{prefix}", "", "{prefix}", ""),
        ("cls_token", "cls", "cls_token", ("embeddings.{cls}", CLASS_TOKEN), "class_token"),
        ("distillation_token", None, "dist_token", "embeddings.distillation_token", None),
        ("register_tokens", None, "{registers}", "embeddings.register_tokens", None),
        ("mask_token", None, ("mask_token", ONE_TOKEN), ("embeddings.mask_token", MASK_TOKEN), None),
        ("position_embeddings.weight", "{positions}", "pos_embed", ("embeddings.{positions}", POSITIONS),
         "encoder.pos_embedding"),
        ("patch_embeddings.projection.", ("embedding/", CONVOLUTION), "patch_embed.proj.",
         ("embeddings.{patch}.", PATCHES), "conv_proj."),
        ("patch_embeddings.layernorm.", None, "patch_embed.norm.", "embeddings.rms_norm.", None),
        ("layernorm.", None, "norm_pre.", "pre_layrnorm.", None),
        ("patch_embeddings.stem.root_conv.", ("conv_root/", CONVOLUTION), None, None, None),
        ("patch_embeddings.stem.root_norm.", ("gn_root/", VECTOR), None, None, None),
    ],
    [
        ("vit.embeddings.patch_embeddings.stem.stages.{s}.{u}.", "{prefix}block{s1}/unit{u1}/", None, None, None),
        ("shortcut_conv.", ("conv_proj/", CONVOLUTION), None, None, None),
        ("shortcut_norm.", ("gn_proj/", VECTOR), None, None, None),
        *((f"conv{n}.", (f"conv{n}/", CONVOLUTION), None, None, None) for n in (1, 2, 3)),
        *((f"norm{n}.", (f"gn{n}/", VECTOR), None, None, None) for n in (1, 2, 3)),
    ],
    [
        ("vit.layers.{i}.", "{prefix}Transformer/encoderblock_{i}/", "blocks.{i}.", "{prefix}{layers}.{i}.",
         "encoder.layers.encoder_layer_{i}."),
        ("layernorm_before.", "LayerNorm_0/", "norm1.", "{norm1}.", "ln_1."),
        ("attention.qkv.", ("{attention}/*/", FUSED_HEADS), "attn.qkv.", ("{attention}.*.", FUSED),
         "self_attention.in_proj_"),
        ("attention.q_norm.", None, "attn.q_norm.", None, None),
        ("attention.k_norm.", None, "attn.k_norm.", None, None),
        ("attention.proj.", ("{attention}/out/", MERGED_HEADS), "attn.proj.", "{out}.", "self_attention.out_proj."),
        ("layer_scale_attention.weight", None, "{scale1}", "layer_scale1.lambda1", None),
        ("layernorm_after.", "{norm2}/", "norm2.", "{norm2}.", "ln_2."),
        ("mlp.fc1.", "{mlp}/Dense_0/", "{fc1}.", "{fc1}.", "mlp.{fc1}."),
        ("mlp.fc2.", "{mlp}/Dense_1/", "{fc2}.", "{fc2}.", "mlp.{fc2}."),
        ("layer_scale_mlp.weight", None, "{scale2}", "layer_scale2.lambda1", None),
    ],
    [
        ("vit.pooler.attention.", "{prefix}MAPHead_0/", "attn_pool.", "{prefix}head.", None),
        ("probe", "probe", "latent", "probe", None),
        ("qkv.", ("MultiHeadDotProductAttention_0/*/", FUSED_HEADS), ("*.", QUERY_APART), "attention.in_proj_", None),
        ("proj.", ("MultiHeadDotProductAttention_0/out/", MERGED_HEADS), "proj.", "attention.out_proj.", None),
        ("layernorm.", "LayerNorm_0/", "norm.", "layernorm.", None),
        ("mlp.fc1.", "MlpBlock_0/Dense_0/", "mlp.fc1.", "mlp.fc1.", None),
        ("mlp.fc2.", "MlpBlock_0/Dense_1/", "mlp.fc2.", "mlp.fc2.", None),
    ],
    [
        ("", "{prefix}", "", "", ""),
        ("vit.layernorm.", "Transformer/encoder_norm/", "norm.", "{prefix}{norm}.", "encoder.ln."),
        ("vit.pooler.layernorm.", None, "fc_norm.", "{prefix}{norm}.", None),
        ("vit.pooler.dense.", "pre_logits/", "pre_logits.fc.", "{prefix}pooler.dense.", "heads.pre_logits."),
        ("classifier.", "head/", "{head}.", "{classifier}.", "{head}."),
        ("distillation_classifier.", None, "head_dist.", "distillation_classifier.", None),
        ("decoder.", None, None, ("decoder.0.", POINTWISE), None),
    ],
]  # fmt: skip
Row = tuple[str, tuple[str, ...], Rule]


def _rows(column: int) -> list[Row]:
    """The rows of the format in a column of the table."""
    rows: list[Row] = []
    for prefixes, *group in _GROUPS:
        for ours, *formats in group:
            name, rule = cell if isinstance(cell := formats[column], tuple) else (cell, SAME)
            if name is None:
                continue
            theirs = tuple(prefixes[column + 1] + name.replace("*", part) for part in _PARTS.get(rule, ("*",)))
            if not ours.endswith("."):
                rows.append((prefixes[0] + ours, theirs, rule))
                continue
            weight = "weight" if not name.endswith("/") else "scale" if "norm" in ours else "kernel"
            rule = TRANSPOSED if rule is SAME and weight == "kernel" else rule
            for kind, their_kind, its_rule in (("weight", weight, rule), ("bias", "bias", _BIAS_RULES.get(rule, SAME))):
                rows.append((prefixes[0] + ours + kind, tuple(each + their_kind for each in theirs), its_rule))
    return rows


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
    "npz", "official JAX checkpoint", _rows(0),
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
    "timm", "timm checkpoint", _rows(1),
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
    "transformers", "transformers checkpoint", _rows(2),
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
    "torchvision", "torchvision checkpoint", _rows(3),
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


def find_dialect(form: Format, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The value of each field of the table with which a row's name occurs; the usual one if none does."""
    text, dialect = "\n".join(shapes), {}
    templates = [name for _, theirs, _ in form.rows for name in theirs]
    for field_name, values in form.dialects.items():
        used = [name for name in templates if f"{{{field_name}}}" in name]
        found = (v for v in values if any(re.search(_pattern(name, field_name, v), text, re.M) for name in used))
        dialect[field_name] = next(found, values[0])
    if form is NPZ:
        prefixes = [name.removesuffix("embedding/kernel") for name in shapes if name.endswith("embedding/kernel")]
        prefixes += [name.split("Transformer/")[0] for name in shapes if "Transformer/" in name]
        dialect["prefix"] = min(prefixes, key=len, default="")
        norms = [shape for name, shape in shapes.items() if re.search(r"(gn_root|gn\d|gn_proj)/scale$", name)]
        dialect["norm_axes"] = max(map(len, norms), default=1)
    elif form is TRANSFORMERS:
        pattern = re.compile(r"((?:\w+\.)?)(embeddings|encoder|layers|layernorm)\.")
        prefix = dialect["prefix"] = next((match[1] for name in shapes if (match := pattern.match(name))), "")
        norms = form.dialects["norm"]  # other parts have one too
        dialect["norm"] = next((norm for norm in norms if f"{prefix}{norm}.weight" in shapes), norms[0])
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
        names = list(theirs)
        if len(names) == 3 and ours.endswith("qkv.bias") and not config.key_bias:
            del names[1]
        for counter in counters:
            yield ours.format(**counter), [name.format(**dialect, **counter) for name in names], rule
