"""What a comparison leaves behind: a table on the terminal, JSON, pictures and a page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import saelens_sparse
from saelens_sparse.compare.figures import draw_all
from saelens_sparse.compare.metrics import Deviation, Summary, deviation, summarize
from saelens_sparse.compare.options import Comparison
from saelens_sparse.compare.records import Step, load_steps
from saelens_sparse.compare.state import State
from saelens_sparse.compare.tables import (
    dictionary_table,
    evaluation_table,
    headline,
    loss_table,
    main_table,
)
from saelens_sparse.reports.presentation import (
    Section,
    can_draw,
    html_details,
    html_gallery,
    html_image,
    html_page,
    html_table,
    html_text,
    plain_table,
)
from saelens_sparse.reports.results import environment
from saelens_sparse.reports.whole_files import damage, write_whole


@dataclass(frozen=True)
class Findings:
    """
    All that is known about a comparison, finished or not.

    Args:
        status: "complete", "interrupted" or "failed".
        steps: Of both arms by architecture, as many of one as of the other, at least one.
        summaries: Of both arms.
        apart: How far their MSE is apart.
        evaluations: Of `evaluate`, None for an arm that has not come to it.
        shared: Of `dictionaries.share`, None if there are no two dictionaries.
        opened: What stock SAELens said of the sparse SAE, without the plugin.
        notes: What the reader must know to read the numbers right.
    """

    status: str
    steps: dict[str, list[Step]]
    summaries: tuple[Summary, Summary]
    apart: Deviation
    evaluations: list[dict[str, Any] | None]
    shared: dict[str, Any] | None
    opened: str | None
    notes: list[str]


def collect(
    comparison: Comparison,
    state: State,
    status: str,
    shared: dict[str, Any] | None,
    opened: str | None,
) -> Findings | None:
    """Read what the arms have left; None if they have not both taken a step."""
    steps = {folder.architecture: load_steps(folder.steps) for folder in comparison.folders}
    # An interrupted arm may be a step behind: compare the steps that both took.
    common = min(len(taken) for taken in steps.values())
    if not common:
        return None
    steps = {name: taken[:common] for name, taken in steps.items()}
    batch_size = comparison.shared["train_batch_size_tokens"]
    a, b = (summarize(name, taken, batch_size) for name, taken in steps.items())
    evaluations: list[dict[str, Any] | None] = [
        None
        if damage(folder.evaluation, "skipped")
        else json.loads(folder.evaluation.read_text(encoding="utf-8"))
        for folder in comparison.folders
    ]
    return Findings(
        status=status,
        steps=steps,
        summaries=(a, b),
        apart=deviation(*steps.values()),
        evaluations=evaluations,
        shared=shared,
        opened=opened,
        notes=_notes(comparison, state, evaluations),
    )


def write_report(comparison: Comparison, state: State, findings: Findings) -> None:
    """Write JSON, pictures and page to the output folder, and print the table."""
    output = comparison.output
    a, b = findings.summaries
    cached = _cached(comparison)
    title = headline(a, b, findings.apart, findings.evaluations, cached, comparison.n_steps)
    table = main_table(a, b, findings.apart, findings.evaluations, cached)
    where = _environment(comparison)
    results = {
        "headline": title,
        "status": findings.status,
        "settings": state.settings,
        "run": state.run,
        "resumed_at": state.resumed_at,
        "environment": where,
        "arms": [asdict(summary) for summary in findings.summaries],
        "mse_deviation": asdict(findings.apart),
        "evaluations": findings.evaluations,
        "shared_latents": findings.shared,
        "opened_in_stock_saelens": findings.opened,
        "notes": findings.notes,
    }
    write_whole(output / "results.json", json.dumps(_finite(results), indent=2) + "\n")

    pictures: dict[str, Path] = {}
    if can_draw():
        pictures = draw_all(
            findings.steps, findings.apart, findings.shared, title, output / "figures"
        )
        (output / "figures" / "curves.png").replace(output / "curves.png")
    page = html_page(title, _sections(comparison, findings, table, pictures, where))
    write_whole(output / "report.html", page)

    print(f"\n{plain_table(table)}\n")
    if findings.shared is not None:
        print(f"{plain_table(dictionary_table(list(findings.steps), findings.shared))}\n")
    for note in findings.notes:
        print(f"Note: {note}")
    if findings.opened is not None:
        print(f"Opened by stock SAELens without the plugin: {findings.opened}")
    print(f"Report: {output / 'report.html'} (and results.json, pictures, steps, SAEs)")
    print(f"\n{title}")


def _sections(
    comparison: Comparison,
    findings: Findings,
    table: Sequence[Sequence[str]],
    pictures: Mapping[str, Path],
    where: Mapping[str, Any],
) -> list[Section]:
    a, b = findings.summaries
    names = list(findings.steps)
    notes = html_text(*findings.notes) if findings.notes else ""
    sections = [Section("", html_text(_subject(comparison, findings, where)) + html_table(table))]
    if notes:
        sections.append(Section("To read the numbers right", notes))
    if pictures:
        images = [
            html_image(path, f"{name.replace('_', ' ')}, {a.architecture} and {b.architecture}")
            for name, path in pictures.items()
        ]
        sections.append(Section("Training, side by side", html_gallery(images)))
    sections.append(Section("Loss terms", html_table(loss_table(a, b))))
    evaluations = evaluation_table(names, findings.evaluations)
    if len(evaluations) > 1:
        sections.append(Section("SAELens's evals of the trained SAEs", html_table(evaluations)))
    if findings.shared is not None:
        sections.append(
            Section(
                "Latents that both dictionaries share",
                html_text(
                    "Decoder vectors are matched by their cosine. Latents that never fired of late "
                    "are left out. Both arms begin with the same weights, so a latent may also "
                    "match because it has hardly moved: the last rows tell how many are still "
                    "like their own initial value."
                )
                + html_table(dictionary_table(names, findings.shared)),
            )
        )
    if findings.opened is not None:
        text = f"Stock SAELens, without the plugin, opens the sparse SAE: {findings.opened}."
        sections.append(Section("The saved SAE", html_text(text)))
    sections.append(
        Section(
            "Settings",
            html_table([("", "value"), *((name, str(value)) for name, value in where.items())])
            + "".join(
                html_details(f"Runner config of {name}", json.dumps(config, indent=2))
                for name, config in comparison.configs.items()
            ),
        )
    )
    return sections


def _subject(comparison: Comparison, findings: Findings, where: Mapping[str, Any]) -> str:
    """A sentence on what was trained on what."""
    config, summary = comparison.shared, findings.summaries[0]
    sae = config["sae"]
    return (
        f"{Path(config['model_name']).name}, {config['hook_name']}: d_in {sae['d_in']:,}, "
        f"d_sae {sae['d_sae']:,}, {summary.steps:,} of {comparison.n_steps:,} steps of "
        f"{config['train_batch_size_tokens']:,} tokens, seed {config['seed']}, {where['device']}."
    )


def _notes(
    comparison: Comparison, state: State, evaluations: Sequence[Mapping[str, Any] | None]
) -> list[str]:
    notes: list[str] = []
    config = comparison.shared
    if _cached(comparison):
        notes.append(
            "Activations were generated once and read from a cache by both arms. The pace with "
            "the language model is computed from that of the SAE steps and that of the model, "
            "measured after the training."
        )
    else:
        notes.append(
            "Each arm runs the language model itself, on the same text from the same seed; "
            "use_cached_activations would have it run once."
        )
    if comparison.unprefetched:
        notes.append(
            "prefetch_llm_batches is off in both arms: one would fetch its batches during the "
            "other's step. A run that prefetches hides a part of the language model's time."
        )
    own = [name for name, runner in comparison.runners.items() if runner == "own"]
    if own:
        notes.append(f"{own[0]} is trained by SparseTrainingRunner, the other by SAELens's runner.")
    fields = [set(arm["sae"]) for arm in comparison.configs.values()]
    for name, has, lacks in zip(comparison.configs, fields, reversed(fields), strict=True):
        if alone := sorted(has - lacks):
            notes.append(f"Only {name} has {', '.join(f'sae.{field}' for field in alone)}.")
    if comparison.dropped:
        fields_left = ", ".join(f"sae.{field}" for field in comparison.dropped)
        notes.append(f"Neither architecture has the config's {fields_left}.")
    notes += [
        f"The training was resumed after step {step}: SAELens then fills its activation "
        "buffer anew, for both arms alike, and the first step is slower."
        for step in state.resumed_at
    ]
    reasons = {evaluation["skipped"] for evaluation in evaluations if evaluation}
    notes += [f"No CE loss: {reason}." for reason in sorted(filter(None, reasons))]
    if config["device"].startswith("cuda"):
        notes.append("Memory is PyTorch's on the GPU; each arm has its own process on it.")
    return notes


def _cached(comparison: Comparison) -> bool:
    return bool(comparison.shared.get("use_cached_activations"))


def _environment(comparison: Comparison) -> dict[str, Any]:
    """What the numbers depend on besides the settings."""
    device = torch.device(comparison.shared["device"]).type
    return environment(device, commit=None) | {"saelens_sparse": saelens_sparse.__version__}


def _finite(value: Any) -> Any:
    """The same for JSON, which has no number for NaN and infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
