"""What a comparison leaves behind: a table on the terminal, JSON, pictures and a page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import saelens_sparse
from saelens_sparse.compare import tables
from saelens_sparse.compare.comparison import EVALUATION, STEPS, Comparison
from saelens_sparse.compare.figures import draw_all
from saelens_sparse.compare.state import State
from saelens_sparse.compare.steps import deviation, load_steps, summarize, table_of
from saelens_sparse.compare.whole_runs import load_runs
from saelens_sparse.reports.files import damage
from saelens_sparse.reports.presentation import Section, can_draw, plain_table, write_page
from saelens_sparse.reports.results import environment
from saelens_sparse.whole_files import write_whole
from saelens_sparse.whole_run.record import RunRecord
from saelens_sparse.whole_run.shown import draw_runs, run_notes, run_table
from saelens_sparse.whole_run.suggestions import MAX_SUGGESTIONS, of_runner, suggestions

CACHED = "Activations were generated once and read from a cache by both sides."
TIMED_AFTER = "The whole runs were timed after the training, with the language model."
UNCACHED = (
    "Each side runs the language model itself, on the same text from the same seed; "
    "use_cached_activations would have it run once."
)
MATCHED = (
    "Decoder vectors are matched by their cosine. Latents that never fired of late are left out. "
    "Both sides begin with the same weights, so a latent may also match because it has hardly "
    "moved: the last rows tell how many are still like their own initial value."
)


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
        status: A key of `command.EXIT_STATUS`.
        shared: Of `dictionaries.share`, None if that has not been computed.
        opened: What stock SAELens said of the sparse SAE, without the plugin.
    """
    output, config, folders = comparison.output, comparison.config, comparison.folders
    results: dict[str, Any] = {"status": status, "settings": state.settings.model_dump()}
    taken = [load_steps(folder / STEPS) for folder in folders]
    common = min(map(len, taken))  # an interrupted side may be a step behind
    if not common:
        write_whole(output / "results.json", json.dumps(results, indent=2) + "\n")
        return
    steps = {f.name: table_of(of[:common]) for f, of in zip(folders, taken, strict=True)}
    batch_size = config["train_batch_size_tokens"]
    where = environment(torch.device(config["device"]).type, commit=None)
    results |= {
        "run": state.run,
        "resumed_at": state.resumed_at,
        "environment": where | {"saelens_sparse": saelens_sparse.__version__},
        "arms": [summarize(name, of, batch_size) for name, of in steps.items()],
        "mse_deviation": deviation(*steps.values()),
        "evaluations": [
            None if damage(path, "skipped") else json.loads(path.read_text())
            for path in (folder / EVALUATION for folder in folders)
        ],
        "shared_latents": shared,
        "opened_in_stock_saelens": opened,
    }
    runs, problem = load_runs(folders)
    results["whole_runs"] = [run.model_dump() for run in runs]
    results["suggestions"] = _suggestions(runs, config)
    results["notes"] = _notes(comparison, results) + ([problem] if problem else [])
    results = {"headline": tables.headline(results), **results}
    write_whole(output / "results.json", json.dumps(_finite(results), indent=2) + "\n")
    pictures = draw_all(steps, results, output) if can_draw() else {}
    parts = output / "figures" / "whole_runs.png"
    if runs and can_draw():
        draw_runs(runs, parts)
    where = {"A whole run, taken apart": parts} if runs and can_draw() else {}
    write_page(output / "report.html", results["headline"], _sections(results, pictures, where))
    print(f"\n{results['headline']}\n")
    if runs:
        print(f"{plain_table(run_table(runs))}\n")
    for suggestion in results["suggestions"]:
        print(f"To gain more: {suggestion}")
    print(f"\n{plain_table(tables.main_table(results))}\n")
    if shared is not None:
        print(f"{plain_table(tables.dictionary_table(results))}\n")
    for note in results["notes"]:
        print(f"Note: {note}")
    if opened is not None:
        print(f"Opened by stock SAELens without the plugin: {opened}")
    print(f"Report: {output / 'report.html'} (and results.json, pictures, steps, SAEs)")


def _suggestions(runs: Sequence[RunRecord], config: Mapping[str, Any]) -> list[str]:
    """What to change in the second side's run; its runner first, where that was not this one's."""
    if not runs:
        return []
    uncached = {**config, "use_cached_activations": False}
    *others, last = (run for run in runs if run.architecture == runs[-1].architecture)
    found = suggestions(last, uncached)
    if others:
        found = [*of_runner(others[0], last), *found]
    return [str(one) for one in found[:MAX_SUGGESTIONS]]


def _sections(
    results: dict[str, Any], pictures: dict[str, Path], parts: dict[str, Path]
) -> list[Section]:
    """
    The page's; those of nothing are left out.

    Args:
        results: With the keys of `results.json`.
        pictures: Of the training, by name.
        parts: The picture of whole runs by what it shows, if there is one.
    """
    configs, where = results["settings"]["arms"], results["environment"]
    config = next(iter(configs.values()))
    batch, sae = config["train_batch_size_tokens"], config["sae"]
    subject = (
        f"{Path(config['model_name']).name}, {config['hook_name']}: d_in {sae['d_in']:,}, d_sae "
        f"{sae['d_sae']:,}, {results['arms'][0]['steps']:,} of "
        f"{-(-config['training_tokens'] // batch):,} steps of {batch:,} tokens, seed "
        f"{config['seed']}, {where['device']}."
    )
    sides = " and ".join(configs)
    runs = [RunRecord.model_validate(run) for run in results["whole_runs"]]
    images = {f"{name.replace('_', ' ')}, {sides}": path for name, path in pictures.items()}
    evals, opened = tables.evaluation_table(results), results["opened_in_stock_saelens"]
    details = {f"Runner config of {n}": json.dumps(c, indent=2) for n, c in configs.items()}
    settings = [("", "value"), *((name, str(value)) for name, value in where.items())]
    sections = [
        Section("", [subject], parts, [run_table(runs)] if runs else []),
        Section("To gain more", results["suggestions"]),
        Section("Training in numbers", tables=[tables.main_table(results)]),
        Section("To read the numbers right", results["notes"]),
        Section("Training, side by side", images=images),
        Section("Loss terms", tables=[tables.loss_table(results)]),
        Section("SAELens's evals of the trained SAEs", tables=[evals] if len(evals) > 1 else []),
    ]
    if results["shared_latents"] is not None:
        shared = tables.dictionary_table(results)
        sections += [Section("Latents that both dictionaries share", [MATCHED], tables=[shared])]
    if opened is not None:
        text = f"Stock SAELens, without the plugin, opens the sparse SAE: {opened}."
        sections += [Section("The saved SAE", [text])]
    sections += [Section("Settings", tables=[settings], details=details)]
    return [section for section in sections if section.text or section.images or section.tables]


def _notes(comparison: Comparison, results: dict[str, Any]) -> list[str]:
    """What the reader must know to read the numbers right."""
    notes = [CACHED if comparison.config.get("use_cached_activations") else UNCACHED]
    notes += comparison.notes
    notes += [
        f"The training was resumed after step {step}: SAELens then fills its activation "
        "buffer anew, for both sides alike, and the first step is slower."
        for step in results["resumed_at"]
    ]
    reasons = {evaluation["skipped"] for evaluation in results["evaluations"] if evaluation}
    notes += [f"No CE loss: {reason}." for reason in sorted(filter(None, reasons))]
    runs = [RunRecord.model_validate(run) for run in results["whole_runs"]]
    if runs:
        notes.append(TIMED_AFTER)
        notes += run_notes(runs, torch.device(comparison.config["device"]).type)
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
