# SPDX-License-Identifier: Apache-2.0
"""How many photos a figure takes; for --help, which needs no NumPy."""

# Figures of photos. The paper averages the attention distance over 128 (Figure 11); the others fit on a page.
LIMITS = {"distance": 128, "rollout": 8, "heads": 1, "gradcam": 8, "sheet": 128}
