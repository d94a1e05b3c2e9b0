"""What a comparison leaves behind: a table on the terminal, JSON, pictures and a page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

import saelens_sparse
from saelens_sparse.compare.figures import draw_all
from saelens_sparse.compare.options import Comparison
from saelens_sparse.compare.state import EVALUATION, STEPS, State
from saelens_sparse.compare.steps import deviation, load_steps, summarize, table_of
from saelens_sparse.compare.tables import (
    dictionary_table,
    evaluation_table,
    headline,
    loss_table,
    main_table,
)
from saelens_sparse.reports.files import damage, write_whole
from saelens_sparse.reports.presentation import Section, can_draw, plain_table, write_page
from saelens_sparse.reports.results import environment


def report(
    comparison: Comparison,
    state: State,
    status: str,
    shared: dict[str, Any] | None = None,
    opened: str | None = None,
) -> None:
    """
    Write JSON, pictures and page of what the sides have left, and print the tables.

    Args:
        comparison: Finished or not.
        state: Of its folder.
        status: "complete", "interrupted" or "failed".
        shared: Of `dictionaries.share`, None if that has not been computed.
        opened: What stock SAELens said of the sparse SAE, without the plugin.

    Raises:
        OSError: something cannot be written.
    """
    output = comparison.output
    results: dict[str, Any] = {"status": status, "settings": state.settings.model_dump()}
    steps = [load_steps(folder / STEPS) for folder in comparison.folders]
    # An interrupted side may be a step behind: compare the steps that both took.
    common = min(map(len, steps))
    if not common:
        write_whole(output / "results.json", json.dumps(results, indent=2) + "\n")
        return
    sides = {
        folder.name: table_of(taken[:common])
        for folder, taken in zip(comparison.folders, steps, strict=True)
    }
    batch_size = comparison.config["train_batch_size_tokens"]
    device = torch.device(comparison.config["device"]).type
    evaluations = [
        None if damage(path, "skipped") else json.loads(path.read_text(encoding="utf-8"))
        for path in (folder / EVALUATION for folder in comparison.folders)
    ]
    results |= {
        "run": state.run,
        "resumed_at": state.resumed_at,
        "environment": environment(device, commit=None)
        | {"saelens_sparse": saelens_sparse.__version__},
        "arms": [summarize(name, taken, batch_size) for name, taken in sides.items()],
        "mse_deviation": deviation(*sides.values()),
        "evaluations": evaluations,
        "shared_latents": shared,
        "opened_in_stock_saelens": opened,
    }
    results["notes"] = _notes(comparison, results)
    results = {"headline": headline(results), **results}
    write_whole(output / "results.json", json.dumps(_finite(results), indent=2) + "\n")
    pictures = draw_all(sides, results, output) if can_draw() else {}
    write_page(output / "report.html", results["headline"], _sections(results, pictures))

    print(f"\n{plain_table(main_table(results))}\n")
    if shared is not None:
        print(f"{plain_table(dictionary_table(results))}\n")
    for note in results["notes"]:
        print(f"Note: {note}")
    if opened is not None:
        print(f"Opened by stock SAELens without the plugin: {opened}")
    print(f"Report: {output / 'report.html'} (and results.json, pictures, steps, SAEs)")
    print(f"\n{results['headline']}")


def _sections(results: dict[str, Any], pictures: dict[str, Path]) -> list[Section]:
    configs = results["settings"]["arms"]
    where = results["environment"]
    config = next(iter(configs.values()))
    subject = (
        f"{Path(config['model_name']).name}, {config['hook_name']}: d_in {config['sae']['d_in']:,}, "
        f"d_sae {config['sae']['d_sae']:,}, {results['arms'][0]['steps']:,} of "
        f"{-(-config['training_tokens'] // config['train_batch_size_tokens']):,} steps of "
        f"{config['train_batch_size_tokens']:,} tokens, seed {config['seed']}, {where['device']}."
    )
    sides = " and ".join(configs)
    images = {f"{name.replace('_', ' ')}, {sides}": path for name, path in pictures.items()}
    evaluations = evaluation_table(results)
    opened = f"Stock SAELens, without the plugin, opens the sparse SAE: {results['opened_in_stock_saelens']}."
    matched = (
        "Decoder vectors are matched by their cosine. Latents that never fired of late are left "
        "out. Both sides begin with the same weights, so a latent may also match because it has "
        "hardly moved: the last rows tell how many are still like their own initial value."
    )
    sections = [
        Section("", text=[subject], tables=[main_table(results)]),
        Section("To read the numbers right", text=results["notes"]),
        Section("Training, side by side", images=images),
        Section("Loss terms", tables=[loss_table(results)]),
        Section(
            "SAELens's evals of the trained SAEs",
            tables=[evaluations] if len(evaluations) > 1 else [],
        ),
    ]
    if results["shared_latents"] is not None:
        tables = [dictionary_table(results)]
        sections.append(Section("Latents that both dictionaries share", [matched], tables=tables))
    if results["opened_in_stock_saelens"] is not None:
        sections.append(Section("The saved SAE", text=[opened]))
    sections.append(
        Section(
            "Settings",
            tables=[[("", "value"), *((name, str(value)) for name, value in where.items())]],
            details={
                f"Runner config of {name}": json.dumps(config, indent=2)
                for name, config in configs.items()
            },
        )
    )
    return [section for section in sections if section.text or section.images or section.tables]


def _notes(comparison: Comparison, results: dict[str, Any]) -> list[str]:
    """What the reader must know to read the numbers right."""
    if comparison.config.get("use_cached_activations"):
        source = (
            "Activations were generated once and read from a cache by both sides. The pace with "
            "the language model is computed from that of the SAE steps and that of the model, "
            "measured after the training."
        )
    else:
        source = (
            "Each side runs the language model itself, on the same text from the same seed; "
            "use_cached_activations would have it run once."
        )
    notes = [source, *comparison.notes]
    notes += [
        f"The training was resumed after step {step}: SAELens then fills its activation "
        "buffer anew, for both sides alike, and the first step is slower."
        for step in results["resumed_at"]
    ]
    reasons = {evaluation["skipped"] for evaluation in results["evaluations"] if evaluation}
    notes += [f"No CE loss: {reason}." for reason in sorted(filter(None, reasons))]
    if comparison.config["device"].startswith("cuda"):
        notes.append("Memory is PyTorch's on the GPU; each side has its own process on it.")
    return notes


def _finite(value: Any) -> Any:
    """The same for JSON, which has no number for NaN and infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
