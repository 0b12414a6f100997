# SPDX-License-Identifier: Apache-2.0
"""What the figures of visualize.py show, and how many photos they take, for its --help."""

# Figures of photos. The paper averages the attention distance over 128 (Figure 11); the others fit on a page.
LIMITS = {"distance": 128, "rollout": 8, "heads": 1, "gradcam": 8, "sheet": 128}

DESCRIPTIONS: dict[str, str] = {
    "filters": """
What the first layer looks for (Figure 7, left, of the paper).

The patch embedding multiplies each patch with as many filters as tokens are wide. Their first 28 principal
components are shown, the strongest first: a trained model has plain colours, edges and waves, of low frequency
before high, as one would choose to describe a small patch; a model that has learned nothing shows noise. Of a
hybrid, the filters are those of the ResNet's first convolution.
""",
    "positions": """
What the model knows about positions (Figure 7, centre, and D.4 of the paper).

Each tile belongs to one patch, and shows the cosine similarity of its position embedding with that of every patch.
In trained models neighbours are similar and, even with learned 1-D embeddings, rows and columns appear. In untrained
ones there are only single points.
""",
    "distance": """
How far each head looks (Figure 7, right, and D.7 of the paper).

A dot is a head of a layer: the distance in pixels between a patch and what it attends to, weighted by attention,
averaged over patches and photos. In trained models some heads of the first layers look at neighbours, as a
convolution would, and others at the whole image; in the last layers nearly all look far. A head on the dashed line
looks as far as one that attends to all patches alike. The paper takes 128 photos; give a folder.
""",
    "rollout": """
What the model looks at, through all layers (Figures 6 and 14, and D.8 of the paper).

Attention rollout (Abnar & Zuidema, 2020): the attention of a layer, averaged over heads, mixes tokens, and the
residual connection keeps them; the product over all layers says how much of each patch is in what represents the
image. A photo is lit where the map is large. It shows where information can have come from, not what speaks for
a class: see gradcam. A map that is the same for every photo is that of a model that has learned little.
""",
    "heads": """
What every head of every layer looks at, in one photo.

A map for each head: the attention of the class token to the patches or, in a model that pools by the mean, the mean
attention of all patches. Each is scaled by its own largest weight, so that maps show places, not amounts. Look for
heads with a fixed pattern, heads that follow objects, and heads that are alike.
""",
    "gradcam": """
Which patches speak for a class.

Grad-CAM (Selvaraju et al., 2017), on the tokens of the last layer before its attention: channels weighted by the
gradient of the class's logit, summed, negative values cut. By default the class is the one that the model
predicts; --label names another, to see what would speak for it. It is a rough map, in patches.
""",
    "sheet": """
All figures of a model on one page.

Filters, position similarity and attention distance above; attention rollout and Grad-CAM of the first three photos
and every head for the first one below. Where a model has no such figure, the sheet says why. Each figure is
explained in its own --help.
""",
}

AUGMENTATION = """
What training sees: images as they are, and as augmentation and mixing make them, epoch by epoch.

Takes the flags of scripts/finetune.py, whose --help lists them, --recipe too, and writes augmentation.png into
--output_dir (default: outputs/preview).
"""
