"""What `python -m paddle_moe logs` shows: tables and a picture of a `logs.Summary`."""

from __future__ import annotations

import os
from typing import Any

from paddle_moe.console import print_table
from paddle_moe.logs import LayerLoad, RankSummary, Summary

_EP_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#a6761d", "#7570b3")
_KERNEL_COLOUR, _COLLECTIVE_COLOUR, _ALARM_COLOUR = "#33415c", "#f4a259", "#b00020"


# ---------------------------------------------------------------- tables


def print_summary(summary: Summary) -> None:
    replicas = any(rank.dp_rank for rank in summary.ranks)
    columns = ("ep", "tp", "experts", "calls", "rows", "kernel ms", "collective ms", "warn", "err", "state")
    print_table(
        "Ranks",
        (*(["dp"] if replicas else []), *columns),
        [
            (
                *([rank.dp_rank] if replicas else []),
                rank.ep_rank,
                rank.tp_rank,
                "{}..{}".format(*rank.experts) if rank.experts else "-",
                rank.calls,
                f"{rank.rows:,}",
                f"{rank.kernel_ms:,.1f}",
                f"{rank.collective_ms:,.1f}",
                len(rank.warnings),
                len(rank.errors),
                _state(rank),
            )
            for rank in summary.ranks
        ],
    )
    if summary.layers:
        print_table(
            "Tokens per expert, whole EP grid",
            ("layer", "experts", "rows", "mean", "busiest", "idlest", "imbalance max/mean"),
            [_layer_row(layer) for layer in summary.layers],
        )
    else:
        print('No usable "moe_call" event: nothing to say about experts.')
    if summary.missing_ranks:
        print(f"No log here from rank {', '.join(map(str, summary.missing_ranks))} of the job.")
    for heading, lines in (("Warning", summary.warnings), ("Error", summary.errors)):
        for line in lines:
            print(f"{heading}  {line}")


def _state(rank: RankSummary) -> str:
    if rank.failed:
        state = "failed"
    elif rank.finished:
        state = "finished"
    else:
        state = "ended by the watchdog" if rank.killed_by_watchdog else "running or killed"
    return state + (f", {rank.unreadable_lines} unreadable lines" if rank.unreadable_lines else "")


def _layer_row(layer: LayerLoad) -> tuple:
    tokens = layer.tokens_per_expert
    busiest, idlest = max(tokens, key=tokens.__getitem__), min(tokens, key=tokens.__getitem__)
    total = sum(tokens.values())
    return (
        layer.layer or "-",
        len(tokens),
        f"{total:,}",
        f"{total / len(tokens):,.1f}",
        f"#{busiest}: {tokens[busiest]:,}",
        f"#{idlest}: {tokens[idlest]:,}",
        "-" if layer.imbalance is None else f"{layer.imbalance:.2f}",
    )


# ---------------------------------------------------------------- picture


def save_picture(summary: Summary, path: str | os.PathLike) -> None:
    """Draws tokens per expert (bars for one layer, a heat map for several) over time per rank, as a PNG.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(
            "the picture needs matplotlib, which is not installed: pip install matplotlib"
        ) from error

    load_height = 3.4 if len(summary.layers) <= 1 else 1.2 + 0.28 * min(max(len(summary.layers), 6), 64)
    time_height = 1.1 + 0.34 * min(max(len(summary.ranks), 3), 64)
    with rc_context({"text.parse_math": False, "text.usetex": False}):  # a $ in a layer's name is a $
        figure = Figure(
            figsize=(11, 0.9 + load_height + time_height), dpi=140, facecolor="white", layout="constrained"
        )
        FigureCanvasAgg(figure)
        load_axes, time_axes = figure.subplots(2, 1, height_ratios=(load_height, time_height))
        figure.suptitle(_headline(summary), x=0.012, ha="left", fontsize=13, fontweight="bold")
        if not summary.layers:
            load_axes.text(
                0.5, 0.5, "no moe_call event", ha="center", va="center", transform=load_axes.transAxes
            )
            load_axes.set_axis_off()
        elif len(summary.layers) == 1:
            _draw_bars(load_axes, summary.layers[0])
        else:
            _draw_heat_map(figure, load_axes, summary.layers)
        _draw_times(time_axes, summary.ranks)
        figure.savefig(path, format="png")


def _headline(summary: Summary) -> str:
    experts = {expert for layer in summary.layers for expert in layer.tokens_per_expert}
    parts = [f"{len(summary.ranks)} ranks", f"{len(experts)} experts"]
    if len(summary.layers) > 1:
        parts.append(f"{len(summary.layers)} layers")
    parts.append(f"{max((rank.calls for rank in summary.ranks), default=0):,} calls per rank")
    if summary.errors:
        parts.append(f"errors: {len(summary.errors)}")
    if summary.missing_ranks:
        parts.append(f"ranks without a log: {len(summary.missing_ranks)}")
    return "  ·  ".join(parts)


def _draw_bars(axes: Any, layer: LayerLoad) -> None:
    experts = list(layer.tokens_per_expert)
    tokens = list(layer.tokens_per_expert.values())
    colours = _colours_of_ep_ranks(layer)
    axes.bar(
        experts,
        tokens,
        width=0.8 if len(experts) <= 64 else 0.92,
        color=[colours[layer.ep_rank_of_expert[expert]] for expert in experts],
    )
    mean = sum(tokens) / len(tokens)
    axes.axhline(mean, color="#444444", linewidth=1.1, linestyle=(0, (5, 3)), label=f"mean {mean:,.0f}")
    imbalance = "no tokens" if layer.imbalance is None else f"imbalance {layer.imbalance:.2f} (max / mean)"
    _set_title(axes, f"Tokens per expert{_in_layer(layer)}: {imbalance}", above_strip=True)
    axes.set_ylabel("token rows")
    axes.set_ylim(0, max(max(tokens), 1) * 1.06)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.075), frameon=False, fontsize=9, borderaxespad=0.1)
    _tidy(axes, grid="y")
    _label_experts(axes, layer, colours)


def _draw_heat_map(figure: Any, axes: Any, layers: list[LayerLoad]) -> None:
    experts = sorted({expert for layer in layers for expert in layer.tokens_per_expert})
    first, count = experts[0], experts[-1] - experts[0] + 1
    rows = []
    for layer in layers:
        mean = sum(layer.tokens_per_expert.values()) / len(layer.tokens_per_expert) or 1.0
        rows.append([layer.tokens_per_expert.get(first + i, float("nan")) / mean for i in range(count)])
    extent = (first - 0.5, first + count - 0.5, len(layers) - 0.5, -0.5)
    image = axes.imshow(rows, aspect="auto", cmap="magma_r", vmin=0, extent=extent, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03)
    bar.set_label("tokens / mean of the layer")
    bar.outline.set_visible(False)
    worst = max(
        (layer for layer in layers if layer.imbalance), key=lambda layer: layer.imbalance, default=None
    )
    note = f"worst imbalance {worst.imbalance:.2f} (max / mean){_in_layer(worst)}" if worst else "no tokens"
    _set_title(axes, f"Tokens per expert and layer: {note}", above_strip=True)
    step = -(-len(layers) // 32)
    axes.set_yticks(
        range(0, len(layers), step), [layers[i].layer for i in range(0, len(layers), step)], fontsize=8
    )
    axes.set_ylabel("layer")
    _tidy(axes)
    widest = max(layers, key=lambda layer: max(layer.tokens_per_expert))
    _label_experts(axes, widest, _colours_of_ep_ranks(widest))


def _label_experts(axes: Any, layer: LayerLoad, colours: dict[int, Any]) -> None:
    """Numbers the experts below the panel and names the EP rank that owns each range above it."""
    experts = list(layer.tokens_per_expert)
    step = next(
        step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256, len(experts)) if len(experts) / step <= 33
    )
    axes.set_xticks([expert for expert in experts if expert % step == 0])
    axes.set_xlim(experts[0] - 0.6, experts[-1] + 0.6)
    axes.set_xlabel("expert (global id)")
    for ep_rank, colour in colours.items():
        owned = [expert for expert in experts if layer.ep_rank_of_expert[expert] == ep_rank]
        left, right = owned[0] - 0.4, owned[-1] + 0.4
        above = {
            "xycoords": axes.get_xaxis_transform(),
            "textcoords": "offset points",
            "annotation_clip": False,
        }
        axes.plot(
            [left, right],
            [1.01, 1.01],
            color=colour,
            linewidth=3,
            transform=above["xycoords"],
            clip_on=False,
            solid_capstyle="butt",
        )
        if len(colours) <= 32:
            text = f"EP rank {ep_rank}" if len(colours) <= 8 else str(ep_rank)
            axes.annotate(
                text,
                ((left + right) / 2, 1.01),
                (0, 3),
                color=colour,
                fontsize=9,
                fontweight="bold",
                ha="center",
                va="bottom",
                **above,
            )


def _draw_times(axes: Any, ranks: list[RankSummary]) -> None:
    longest = max((rank.kernel_ms + rank.collective_ms for rank in ranks), default=0.0)
    unit, scale = ("s", 1e-3) if longest >= 10_000 else ("ms", 1.0)
    replicas = any(rank.dp_rank for rank in ranks)
    names = [
        (f"DP {rank.dp_rank}  " if replicas else "") + f"EP {rank.ep_rank}  TP {rank.tp_rank}"
        for rank in ranks
    ]
    kernel = [rank.kernel_ms * scale for rank in ranks]
    collective = [rank.collective_ms * scale for rank in ranks]
    axes.barh(names, kernel, height=0.62, color=_KERNEL_COLOUR, label="kernel")
    axes.barh(
        names,
        collective,
        height=0.62,
        left=kernel,
        color=_COLLECTIVE_COLOUR,
        label="collective (with waiting)",
    )
    for i, rank in enumerate(ranks):
        total = kernel[i] + collective[i]
        problems = [f"errors: {len(rank.errors)}"] if rank.errors else []
        problems += [] if rank.finished else ["no end in the log"]
        share = f"  ({collective[i] / total:.0%} collective)" if total else ""
        axes.text(
            total + longest * scale * 0.008,
            i,
            "   ".join([f"{total:,.1f} {unit}{share}", *problems]),
            va="center",
            fontsize=9,
            color=_ALARM_COLOUR if problems else "#222222",
        )
    axes.set_xlim(0, longest * scale * 1.35 or 1.0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.invert_yaxis()
    axes.set_xlabel(f"time summed over the calls of the run ({unit})")
    _set_title(axes, "Time per rank")
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, fontsize=9, borderaxespad=0.1
    )
    _tidy(axes, grid="x")


def _colours_of_ep_ranks(layer: LayerLoad) -> dict[int, Any]:
    ep_ranks = sorted(set(layer.ep_rank_of_expert.values()))
    if len(ep_ranks) <= len(_EP_COLOURS):
        return {ep_rank: _EP_COLOURS[i] for i, ep_rank in enumerate(ep_ranks)}
    from matplotlib import colormaps

    return {
        ep_rank: colormaps["turbo"](0.05 + 0.9 * i / (len(ep_ranks) - 1))
        for i, ep_rank in enumerate(ep_ranks)
    }


def _in_layer(layer: LayerLoad) -> str:
    return f" in {layer.layer}" if layer.layer else ""


def _set_title(axes: Any, text: str, above_strip: bool = False) -> None:
    axes.set_title(text, loc="left", fontsize=11, pad=22 if above_strip else 6)


def _tidy(axes: Any, grid: str | None = None) -> None:
    for side in ("top", "right", *(() if grid else ("left", "bottom"))):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=3, labelsize=9)
    if grid:
        axes.grid(axis=grid, color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
