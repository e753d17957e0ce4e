"""What a threshold keeps, for choosing one: a table and a picture."""

import numpy as np

from curation.tally import EDGES

TOP_CAPTIONS = 20
_LABEL_LENGTH = 72  # characters of a caption in the picture


def make_report(tally, num_audio, threshold, kept, captions, unit="clips"):
    """Gather the figures of a search.

    Arguments
    ---------
    tally : curation.tally.Tally
        Of the search; `with_report`, or lower thresholds count as the lowest
        searched one.
    num_audio : int
        Number of audio rows.
    threshold : float
        The threshold chosen.
    kept : array of int
        (captions,) pairs kept with each caption, limits applied.
    captions : list of str
        (captions,).
    unit : str
        What an audio row is: clips, or windows if a clip may have several.

    Returns
    -------
    dict
        For a JSON file. `curve` holds, for each threshold from 0 to 1, the
        pairs that reach it and the clips (or windows, under that name) and
        rows of captions in them, before limits; from `exact_from` upwards
        exact, and below up to those pairs that are within `margin` of the
        threshold. `histogram` has one edge more than counts; what rounding put
        above 1 is in its last bin.
    """
    curves = tally.curves()
    pairs = curves["pairs"]
    counts = -np.diff(pairs)
    counts[-1] += pairs[-1]
    chosen = EDGES >= 0
    # Equal captions are one, whatever rows they are in.
    totals = {}
    for row in np.flatnonzero(kept):
        totals[captions[row]] = totals.get(captions[row], 0) + int(kept[row])
    frequent = sorted(totals.items(), key=lambda item: (-item[1], item[0]))
    return {
        "threshold": threshold,
        "audio_rows": num_audio,
        "caption_rows": len(captions),
        "highest": None if np.isinf(tally.highest) else tally.highest,
        "exact_from": None if np.isinf(tally.threshold) else tally.threshold,
        "margin": tally.margin,
        "curve": {
            "threshold": EDGES[chosen].tolist(),
            "pairs": pairs[chosen].tolist(),
            unit: curves["clips"][chosen].tolist(),
            "captions": curves["texts"][chosen].tolist(),
        },
        "histogram": {"edges": EDGES.tolist(), "counts": counts.tolist()},
        "frequent_captions": [
            {"caption": caption, "pairs": count}
            for caption, count in frequent[:TOP_CAPTIONS]
        ],
    }


def report_figure(report, title):
    """Picture of a report. Characters that the font lacks become boxes.

    Arguments
    ---------
    report : dict
        Of `make_report`.
    title : str

    Returns
    -------
    matplotlib.figure.Figure
    """
    # It takes half a second, for which a wrong flag need not wait.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 9))
    figure.suptitle(title, parse_math=False)
    grid = figure.add_gridspec(
        2, 2, left=0.06, right=0.98, bottom=0.06, top=0.91, hspace=0.28,
        wspace=0.08,
    )  # fmt: skip
    _draw_histogram(figure.add_subplot(grid[0, 0]), report)
    _draw_curve(figure.add_subplot(grid[1, 0]), report)
    _draw_captions(figure.add_subplot(grid[:, 1]), report)
    return figure


def _draw_histogram(axes, report):
    """All similarities, as far as there are any."""
    edges = np.array(report["histogram"]["edges"])
    counts = np.array(report["histogram"]["counts"])
    axes.stairs(counts, edges, fill=True)
    if counts.any():
        _count_in_powers(axes)
        used = np.flatnonzero(counts)
        left = min(edges[used[0]], report["threshold"])
        right = max(edges[used[-1] + 1], report["threshold"])
        axes.set_xlim(left - 0.02, right + 0.02)
    axes.axvline(report["threshold"], color="black", linestyle="--")
    axes.set_xlabel("similarity")
    axes.set_ylabel("pairs in steps of 0.01")
    axes.set_title("All pairs", y=1)


def _draw_curve(axes, report):
    """What each threshold keeps."""
    curve = report["curve"]
    for name, count in curve.items():
        if name != "threshold":
            axes.plot(curve["threshold"], count, label=name)
    if any(curve["pairs"]):
        _count_in_powers(axes)
    axes.axvline(
        report["threshold"],
        color="black",
        linestyle="--",
        label=f"threshold {report['threshold']:g}",
    )
    axes.set_xlim(0, 1)
    axes.set_xlabel("threshold")
    axes.set_ylabel("kept, before limits")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title("Kept at each threshold", y=1)


def _count_in_powers(axes):
    """A logarithmic axis of counts: 1, 10, 100, 1 k."""
    from matplotlib.ticker import EngFormatter

    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5)
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.minorticks_off()


def _draw_captions(axes, report):
    """The most frequent captions in their bars, the first on top."""
    frequent = report["frequent_captions"]
    counts = [item["pairs"] for item in frequent]
    axes.barh(range(len(frequent)), counts, alpha=0.35)
    for row, item in enumerate(frequent):
        axes.text(
            0.01,
            row,
            f"{item['pairs']:,}   {_shortened(item['caption'])}",
            transform=axes.get_yaxis_transform(),
            verticalalignment="center",
            clip_on=True,
            parse_math=False,  # a caption may hold $, which is no formula
        )
    axes.set_ylim(max(len(frequent), 10) - 0.5, -0.5)
    axes.set_yticks([])
    axes.set_xlabel("pairs kept")
    title = "Most frequent captions" if frequent else "No pair is kept"
    axes.set_title(title, y=1)


def _shortened(caption):
    """A caption on one line of bounded length."""
    text = " ".join(caption.split())
    if len(text) <= _LABEL_LENGTH:
        return text
    return text[: _LABEL_LENGTH - 1] + "…"
