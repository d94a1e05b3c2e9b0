"""What the demo reports: its arms in numbers, the table, the headline and the plot."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

# The first steps allocate and compile; they are left out of the medians.
WARM_UP_STEPS = 5
# Losses are compared by their mean over this part of the steps, the last one.
FINAL_PART = 0.1
# Okabe and Ito's vermillion and blue: distinct in every common form of colour blindness.
STOCK_COLOR, SPARSE_COLOR = "#D55E00", "#0072B2"


@dataclass(frozen=True)
class Step:
    """One training step, as demo_arm.py records it."""

    step: int
    seconds: float
    loss: float
    mse_loss: float
    aux_loss: float
    explained_variance: float
    l0: float
    dead_latents: int
    implementation: str | None
    peak_memory_bytes: int | None
    batches_crc32: int
    threads: int


@dataclass(frozen=True)
class Summary:
    """One arm of the demo in a few numbers. Times cover the SAE's steps, without their input."""

    architecture: str
    steps: int
    first_loss: float
    final_mse_loss: float
    explained_variance: float
    l0: float
    dead_latents: int
    ms_per_step: float
    ms_per_step_with_aux_loss: float | None
    ms_per_final_step: float | None
    total_seconds: float
    tokens_per_second: float
    peak_memory_mib: float | None
    batches_crc32: int
    threads: int


def summarize(architecture: str, steps: Sequence[Step], batch_size: int) -> Summary:
    """Reduce an arm's steps, of which there is at least one, to what the table shows."""
    final = steps[-max(1, round(FINAL_PART * len(steps))) :]
    timed = steps[min(WARM_UP_STEPS, len(steps) // 2) :]
    plain = [step.seconds for step in timed if step.aux_loss == 0]
    with_aux_loss = [step.seconds for step in timed if step.aux_loss != 0]
    peak = steps[-1].peak_memory_bytes
    total_seconds = sum(step.seconds for step in steps)
    return Summary(
        architecture=architecture,
        steps=len(steps),
        first_loss=steps[0].loss,
        final_mse_loss=fmean(step.mse_loss for step in final),
        explained_variance=fmean(step.explained_variance for step in final),
        l0=fmean(step.l0 for step in final),
        dead_latents=steps[-1].dead_latents,
        ms_per_step=1e3 * median(plain or with_aux_loss),
        ms_per_step_with_aux_loss=1e3 * median(with_aux_loss) if with_aux_loss else None,
        # Where L0 falls, so does what a step of the sparse arm costs.
        ms_per_final_step=1e3 * median(step.seconds for step in final)
        if l0_varies(steps)
        else None,
        total_seconds=total_seconds,
        tokens_per_second=batch_size * len(steps) / total_seconds,
        peak_memory_mib=None if peak is None else peak / 2**20,
        batches_crc32=steps[-1].batches_crc32,
        threads=steps[-1].threads,
    )


def l0_varies(steps: Sequence[Step]) -> bool:
    """Whether the number of active latents is not fixed by the architecture."""
    return max(step.l0 for step in steps) > 2 * min(step.l0 for step in steps)


def format_table(stock: Summary, sparse: Summary) -> str:
    """The table that the demo ends with: a column for each arm, and one that compares them."""
    rows = [("", stock.architecture, sparse.architecture, f"{sparse.architecture} is")]

    def add(label: str, field: str, pattern: str, compare: Callable[[float, float], str]) -> None:
        a, b = getattr(stock, field), getattr(sparse, field)
        if a is not None and b is not None:
            rows.append((label, pattern.format(a), pattern.format(b), compare(a, b)))

    add("loss of the first step", "first_loss", "{:.4f}", _relative)
    add("final loss (MSE)", "final_mse_loss", "{:.4f}", _relative)
    add("explained variance", "explained_variance", "{:.4f}", lambda a, b: f"{b - a:+.4f}")
    add("L0", "l0", "{:.2f}", lambda a, b: f"{b - a:+.2f}")
    add("dead latents", "dead_latents", "{:,}", lambda a, b: f"{b - a:+,}")
    add("ms per SAE step (median)", "ms_per_step", "{:.1f}", _speed)
    add("  with dead latents (AuxK)", "ms_per_step_with_aux_loss", "{:.1f}", _speed)
    add("  at the final L0", "ms_per_final_step", "{:.1f}", _speed)
    add("all SAE steps, s", "total_seconds", "{:.1f}", _speed)
    add("tokens/s", "tokens_per_second", "{:,.0f}", lambda a, b: _speed(b, a))
    add("memory that training adds, MiB", "peak_memory_mib", "{:,.0f}", _share)

    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _relative(stock: float, sparse: float) -> str:
    return f"{sparse / stock - 1:+.2%}"


def _speed(stock_time: float, sparse_time: float) -> str:
    return f"{stock_time / sparse_time:.2f}x as fast"


def _share(stock: float, sparse: float) -> str:
    return f"{sparse / stock:.0%} of it" if stock else ""


def headline(stock: Summary, sparse: Summary) -> str:
    """One sentence on how the arms compare, from what was measured."""
    if stock.batches_crc32 != sparse.batches_crc32:
        return "The arms were given different batches: they cannot be compared"
    speed = _speed(stock.total_seconds, sparse.total_seconds)
    loss = _relative(stock.final_mse_loss, sparse.final_mse_loss)
    return f"{sparse.architecture} trains {speed} as {stock.architecture}; final loss {loss}"


def plot(arms: Mapping[str, Sequence[Step]], title: str, path: Path) -> None:
    """Draw the loss over steps and over seconds, and L0 where it varies, both arms in each.

    Args:
        arms: The steps of the stock arm and of the sparse arm, in this order.
        title: Stands above both panels.
        path: The PNG to write.
    """
    with_l0 = any(l0_varies(steps) for steps in arms.values())
    figure = Figure(figsize=(16 if with_l0 else 11, 4.6), layout="constrained")
    by_step, by_second, *others = figure.subplots(1, 3 if with_l0 else 2)
    by_second.sharey(by_step)
    # A broad line for stock under a thin one: both stay visible where they coincide.
    styles = [
        {"color": STOCK_COLOR, "linewidth": 4.5, "alpha": 0.5},
        {"color": SPARSE_COLOR, "linewidth": 1.5},
    ]
    for (architecture, steps), style in zip(arms.items(), styles, strict=True):
        losses = [step.mse_loss for step in steps]
        seconds = list(accumulate(step.seconds for step in steps))
        by_step.plot([step.step for step in steps], losses, label=architecture, **style)
        by_second.plot(seconds, losses, **style)
        for l0_by_step in others:
            l0_by_step.plot([step.step for step in steps], [step.l0 for step in steps], **style)
        by_second.axvline(seconds[-1], color=style["color"], linestyle=":", linewidth=1)
        by_second.text(
            seconds[-1],
            0.98,
            f"{architecture} \n{seconds[-1]:.3g} s ",
            transform=by_second.get_xaxis_transform(),
            ha="right",
            va="top",
            color=style["color"],
            fontweight="bold",
        )
    first_aux_step = next((s.step for steps in arms.values() for s in steps if s.aux_loss), None)
    if first_aux_step is not None:
        by_step.axvline(first_aux_step, color="0.6", linestyle=":", linewidth=1)
        by_step.text(
            first_aux_step,
            0.03,
            "from here on dead latents \nare trained too (AuxK) ",
            transform=by_step.get_xaxis_transform(),
            ha="right",
            color="0.4",
            fontsize="small",
        )
    stock, sparse = arms.values()
    apart = max(abs(b.mse_loss / a.mse_loss - 1) for a, b in zip(stock, sparse, strict=True))
    by_step.set(
        title=f"Over steps: at most {apart:.2%} apart",
        xlabel="training step",
        ylabel="reconstruction loss (squared error per token)",
        yscale="log",
    )
    by_second.set(title="Over time", xlabel="time in SAE training steps (s)")
    # Room above the curves, for the legend and the times.
    low, high = by_step.get_ylim()
    by_step.set_ylim(low, high * (high / low) ** 0.2)
    by_step.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    by_step.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    by_step.yaxis.set_minor_locator(NullLocator())
    by_step.legend(frameon=False, loc="upper right")
    for l0_by_step in others:
        l0_by_step.set(
            title="Active latents",
            xlabel="training step",
            ylabel="L0 (active latents per token)",
            yscale="log",
        )
        _mark_switch(l0_by_step, sparse)
    for axes in (by_step, by_second, *others):
        axes.grid(visible=True, color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontweight="bold")
    figure.savefig(path, dpi=150)


def _mark_switch(axes: Axes, steps: Sequence[Step]) -> None:
    """Say where the sparse arm went over from dense products to sparse ones."""
    switch = next((step.step for step in steps if step.implementation != "fused"), None)
    if switch is None or switch == steps[0].step:
        return
    axes.axvline(switch, color="0.6", linestyle=":", linewidth=1)
    in_left_half = switch < steps[-1].step / 2
    axes.text(
        switch,
        0.97 if in_left_half else 0.03,
        " from here on only what \n is active is computed ",
        transform=axes.get_xaxis_transform(),
        ha="left" if in_left_half else "right",
        va="top" if in_left_half else "bottom",
        color="0.4",
        fontsize="small",
    )
