"""
Opens a saved SAE in SAELens with saelens_sparse out of reach, and applies it to activations.

    python -P .../open_in_stock_saelens.py SAE_FOLDER FINAL.safetensors

FINAL.safetensors holds `activations`, as a side leaves them. Prints one line. This file imports
nothing of the package that it is in.
"""

import sys
from typing import Any

import torch


@torch.no_grad()
def describe(sae_folder: str, activations_file: str) -> str:
    """One line on the SAE and on how well it reconstructs the activations."""
    if "saelens_sparse" in sys.modules:
        raise RuntimeError("saelens_sparse is already imported")
    # From here on an import of the plugin, by anyone, fails.
    modules: dict[str, Any] = sys.modules
    modules["saelens_sparse"] = None
    from sae_lens import SAE
    from safetensors.torch import load_file

    sae = SAE.load_from_disk(sae_folder)
    activations = load_file(activations_file)["activations"].to(sae.dtype)
    residual = activations - sae(activations)
    variance = (activations - activations.mean(0)).pow(2).sum()
    return (
        f"{type(sae).__name__} ({sae.cfg.architecture()}), {sae.cfg.d_in} -> {sae.cfg.d_sae:,}, "
        f"explained variance {1 - residual.pow(2).sum() / variance:.3f} "
        f"on {len(activations):,} activations"
    )


if __name__ == "__main__":
    print(describe(*sys.argv[1:]))
