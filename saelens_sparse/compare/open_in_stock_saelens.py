"""
Opens a saved SAE in SAELens with saelens_sparse out of reach, and prints a line on it.

    python -P .../open_in_stock_saelens.py SAE_FOLDER FINAL.safetensors

FINAL.safetensors holds `activations`, as a side leaves them, which the SAE is tried on. This file
imports nothing of the package that it is in.
"""

import sys
from typing import Any, cast

import torch

assert "saelens_sparse" not in sys.modules
cast("dict[str, Any]", sys.modules)["saelens_sparse"] = None  # no one can import it any more
from sae_lens import SAE  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

sae = SAE.load_from_disk(sys.argv[1])
activations = load_file(sys.argv[2])["activations"].to(sae.dtype)
with torch.no_grad():
    residual = activations - sae(activations)
unexplained = residual.pow(2).sum() / (activations - activations.mean(0)).pow(2).sum()
sys.stdout.write(
    f"{type(sae).__name__} ({sae.cfg.architecture()}), {sae.cfg.d_in} -> {sae.cfg.d_sae:,}, "
    f"explained variance {1 - unexplained:.3f} on {len(activations):,} activations\n"
)
