"""Opens a saved SAE in SAELens with saelens_sparse out of reach, and applies it to activations.

    python scripts/open_in_stock_saelens.py SAE_FOLDER ACTIVATIONS_FOLDER

ACTIVATIONS_FOLDER is what SAELens's CacheActivationsRunner writes. Prints one line.
"""

import sys

import datasets
import torch
from sae_lens import SAE

PROMPTS = 16


@torch.no_grad()
def describe(sae_folder: str, activations_folder: str) -> str:
    """One line on the SAE and on how well it reconstructs the first cached activations."""
    if "saelens_sparse" in sys.modules:
        raise RuntimeError("saelens_sparse is already imported")
    # From here on an import of the plugin, by anyone, fails.
    sys.modules["saelens_sparse"] = None  # pyright: ignore[reportArgumentType]
    sae = SAE.load_from_disk(sae_folder)
    rows = datasets.Dataset.load_from_disk(activations_folder).with_format("torch")[:PROMPTS]
    # The first token of each prompt is `<bos>`, on which the SAE was not trained.
    activations = rows[sae.cfg.metadata.hook_name][:, 1:].reshape(-1, sae.cfg.d_in)
    residual = activations - sae(activations)
    variance = (activations - activations.mean(0)).pow(2).sum()
    return (
        f"{type(sae).__name__} ({sae.cfg.architecture()}), {sae.cfg.d_in} -> {sae.cfg.d_sae:,}, "
        f"explained variance {1 - residual.pow(2).sum() / variance:.3f} "
        f"on {len(activations):,} activations"
    )


if __name__ == "__main__":
    print(describe(*sys.argv[1:]))
