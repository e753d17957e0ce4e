r"""Curate audio-caption pairs: those whose embeddings are similar enough.

Domain-unspecific (DU), all captions against all audio:

    python retrieve_from_emb_thresh.py \
        hparams/curation/audioset_insper_duv2_retr.yaml \
        --emb_dir=<output_folder>/save --audio_bs=4000 --sim_threshold=0.75

Augmented domain-specific (ADS), the captions that retrieve_ds_t2t.py chose for
a task against all audio; the task is esc, us8k or tut:

    python retrieve_from_emb_thresh.py \
        hparams/curation/esc_insper_audioset_dudsv3_retr.yaml \
        --emb_dir=<output_folder>/save --aud_ds_path= --sim_threshold=0.7

The embeddings are those of microsoft_curation_toemb.py. The pairs are exactly
those whose similarity reaches the threshold (curation/similarity.py), in order
of audio row, then caption row. They go to `<emb_dir>/<name>_curation.csv`
(ID,wav_path,caption,similarity,start,end), and what each threshold would keep
to `<name>_report.json` and `<name>_report.png`. --dry_run=True writes only
these; --target_pairs=200000 takes the lowest threshold, from 0 up in steps of
0.01, that no more pairs reach, in place of --sim_threshold. Of these pairs the
limits --max_captions_per_audio and --max_audios_per_caption may then keep
fewer. A caption that is listed twice makes two pairs with a clip, but counts
once for these limits. With `torchrun --nproc_per_node=N` the processes share
the search, and the files are the same. The method is that of arXiv 2305.01864.
"""

import contextlib
import functools
import glob
import logging
import os
import sys
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import torch
from speechbrain.utils.distributed import (
    ddp_barrier,
    ddp_broadcast,
    if_main_process,
)
from tqdm import tqdm

import experiment
from curation.embeddings import check_same_weights, open_embeddings
from curation.fastest import fastest_product
from curation.products import precisions
from curation.report import make_report, report_figure
from curation.similarity import keep_best, pairs_over
from curation.tally import EDGES, Tally
from files import alone, write_json, written_whole

logger = logging.getLogger(__name__)

HEADER = b"ID,wav_path,caption,similarity,start,end\n"
_TEXT = pa.large_string()  # all captions together may exceed 2 GB
_LINES = pa.schema(
    {
        "ID": pa.int64(),
        "wav_path": _TEXT,
        "caption": _TEXT,
        "similarity": pa.decimal128(8, 6),  # has six digits, always
        "start": pa.float64(),
        "end": pa.float64(),
    }
)
_BUFFER_PAIRS = 2**20
_LINES_AT_ONCE = 2**14


class PairSink:
    """Counts pairs, and streams them to a CSV file.

    Arguments
    ---------
    audio, text : curation.embeddings.Embeddings
        Whose manifests name the rows.
    file : file
        Binary file to write to; None only counts.
    max_pairs : int
        Stop before more are written; None for no limit.

    Attributes
    ----------
    pairs, audios : int
        Numbers so far, of pairs and of the audio rows in them.
    kept : array of int
        (text rows,) pairs of each caption.
    """

    def __init__(self, audio, text, file=None, max_pairs=None):
        self.manifest, self.max_pairs = audio.manifest, max_pairs
        self.writer = None
        if file is not None:
            self.captions = pa.array(text.manifest["caption"], _TEXT)
            file.write(HEADER)
            options = pa.csv.WriteOptions(include_header=False)
            self.writer = pa.csv.CSVWriter(file, _LINES, write_options=options)
        self.pairs, self.audios = 0, 0
        self.kept = np.zeros(len(text), dtype=np.int64)

    def add(self, audio_rows, text_rows, similarities):
        """Take all pairs of some audio rows, as `pairs_over` yields them.

        Raises
        ------
        SystemExit
            There are more than `max_pairs`.
        """
        if not len(audio_rows):
            return
        total = self.pairs + len(audio_rows)
        is_new = np.diff(audio_rows, prepend=-1) != 0
        if self.writer is not None:
            if self.max_pairs is not None and total > self.max_pairs:
                raise SystemExit(
                    f"More than --max_pairs={self.max_pairs} pairs by audio "
                    f"row {audio_rows[-1]} of {len(self.manifest)}: nothing is "
                    "written. Raise --sim_threshold (--dry_run=True tells how "
                    "many pairs each keeps), or have it chosen with "
                    "--target_pairs, or use --max_captions_per_audio or "
                    "--max_audios_per_caption"
                )
            self._write(audio_rows, text_rows, similarities)
        self.pairs = total
        self.audios += int(is_new.sum())
        self.kept += np.bincount(text_rows, minlength=len(self.kept))

    def _write(self, *pairs):
        """Append lines."""
        for begin in range(0, len(pairs[0]), _LINES_AT_ONCE):
            audio_rows, text_rows, similarities = (
                p[begin : begin + _LINES_AT_ONCE] for p in pairs
            )
            # An audio row is looked up once, not per pair.
            is_new = np.diff(audio_rows, prepend=-1) != 0
            audio = self.manifest.take(audio_rows[is_new])
            audio = audio.take(pa.array(is_new.cumsum() - 1))
            ids = self.pairs + begin + np.arange(len(audio))
            times = (
                pa.array(audio[name].to_numpy(), from_pandas=True)
                if name in audio.column_names
                else pa.nulls(len(audio))
                for name in ("start", "end")
            )
            values = pc.round(pa.array(similarities, pa.float64()), 6)
            captions = self.captions.take(pa.array(text_rows))
            columns = [ids, audio["wav_path"], captions, values, *times]
            lines = pa.table(columns, names=_LINES.names)
            self.writer.write(lines.cast(_LINES))


def best_per_audio(batches, kinds, count):
    """The best pairs of each audio row, in order.

    Arguments
    ---------
    batches : iterable of tuple of array
        Pairs as `pairs_over` yields them.
    kinds : array of int
        (captions,) equal for equal captions, of which an audio row keeps the
        first only; None keeps all.
    count : int
        Pairs an audio row; None for all.

    Yields
    ------
    tuple of array
    """
    for pairs in batches:
        if kinds is not None:
            keys = pairs[0] * len(kinds) + kinds[pairs[1]]
            first = np.unique(keys, return_index=True)[1]
            pairs = _taken(pairs, np.sort(first))
        if count is not None:
            pairs = _taken(pairs, keep_best(*pairs, count))
        yield pairs


def best_per_caption(batches, kinds, count):
    """The best pairs of each caption, all at once, in order.

    They are in memory until the end, and at most as many again.

    Arguments
    ---------
    batches : iterable of tuple of array
        Pairs as `best_per_audio` yields them.
    kinds : array of int
        As there.
    count : int
        Pairs a caption.

    Yields
    ------
    tuple of array
    """
    buffer, size = [], 0
    room = max(2 * count * (kinds.max(initial=-1) + 1), _BUFFER_PAIRS)
    for pairs in batches:
        buffer.append(pairs)
        size += len(pairs[0])
        if size > room:
            buffer = [_best_of_captions(buffer, kinds, count)]
            size = len(buffer[0][0])
    if buffer:
        yield _best_of_captions(buffer, kinds, count)


def _best_of_captions(buffer, kinds, count):
    audio, text, similarities = _joined(buffer)
    best = keep_best(kinds[text], audio, similarities, count)
    return audio[best], text[best], similarities[best]


def lowest_start(tally, target):
    """A threshold that the one for a number of pairs cannot be below.

    Arguments
    ---------
    tally : curation.tally.Tally
        Of a search that counted all similarities.
    target : int
        Number of pairs.

    Returns
    -------
    float
        One of `EDGES`, from 0 up.
    """
    too_many = np.flatnonzero(tally.curves()["pairs"] > target)
    zero = np.flatnonzero(EDGES == 0)[0]
    if not len(too_many):
        return EDGES[zero]
    # Pairs counted at an edge truly reach it less the margin, and so more than
    # the target reach an edge some steps lower.
    steps = int(np.ceil(100 * tally.margin))
    return EDGES[max(too_many[-1] - steps + 1, zero)]


def best_on_grid(batches, start, target):
    """Keep the pairs over the lowest edge that no more than a target reach.

    Holds twice that many pairs, and those of one batch, in memory.

    Arguments
    ---------
    batches : iterable of tuple of array
        All pairs that reach `start`.
    start : float
        The lowest edge to consider, one of `EDGES`.
    target : int
        Number of pairs.

    Returns
    -------
    tuple
        The edge, and the pairs.

    Raises
    ------
    SystemExit
        More pairs have a similarity of 1.
    """
    edges = EDGES[start <= EDGES]
    reached = np.zeros(len(edges), dtype=np.int64)
    kept, size, at = [_NO_PAIRS], 0, 0
    for pairs in batches:
        similarities = np.sort(pairs[2])
        reached += len(similarities) - np.searchsorted(similarities, edges)
        if reached[-1] > target:
            raise SystemExit(
                f"--target_pairs={target}: more pairs have a similarity of 1. "
                "Are audio or captions listed repeatedly?"
            )
        at = int(np.argmax(reached <= target))
        kept.append(_taken(pairs, pairs[2] >= edges[at]))
        size += len(kept[-1][0])
        if size > 2 * target:
            kept = [_reaching(kept, edges[at])]
            size = len(kept[0][0])
    return float(edges[at]), _reaching(kept, edges[at])


def _reaching(buffer, threshold):
    pairs = _joined(buffer)
    return _taken(pairs, pairs[2] >= threshold)


def _joined(buffer):
    return tuple(np.concatenate(part) for part in zip(*buffer))


def _taken(pairs, index):
    return tuple(part[index] for part in pairs)


_NO_PAIRS = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))


def check_settings(hparams, device):
    """Stop with a message if a flag has no sensible value.

    Arguments
    ---------
    hparams : dict
    device : str
        Where products are computed.

    Raises
    ------
    SystemExit
        It names the flag.
    """
    experiment.check_numbers(hparams, ["sim_threshold"], -1, 1)
    limits = ["max_captions_per_audio", "max_audios_per_caption"]
    names = ["audio_bs", "max_pairs", "target_pairs", *limits]
    experiment.check_numbers(hparams, names, 1, whole=True)
    most, target = hparams["max_pairs"], hparams["target_pairs"]
    if None not in (most, target) and most < target and not hparams["dry_run"]:
        raise SystemExit(
            f"--target_pairs={target} may give more than --max_pairs={most}: "
            "give one of them"
        )
    choices = ["auto", *precisions(device)]
    experiment.check_choice(hparams, "search_precision", choices)


def has_windows(manifest):
    """Whether neighbouring rows are of one file.

    Arguments
    ---------
    manifest : curation.embeddings.Manifest

    Returns
    -------
    bool
    """
    last = None
    for piece in manifest:
        paths = piece["wav_path"].array
        if len(paths) and (paths[0] == last or (paths[1:] == paths[:-1]).any()):
            return True
        last = paths[-1] if len(paths) else last
    return False


def pairs_by_class(manifest, kept):
    """Pairs of each class for which captions were chosen (DS); logged too.

    Arguments
    ---------
    manifest : curation.embeddings.Manifest
        Of the captions, with a column `class`, or without any.
    kept : array of int
        Pairs of each caption.

    Returns
    -------
    dict
        Class -> pairs, in order of their captions.
    """
    if "class" not in manifest.schema.names:
        return {}
    counts = pd.Series(kept).groupby(manifest["class"], sort=False).sum()
    counts = counts.to_dict()
    logger.info(
        "Pairs by class: %s",
        ", ".join(f"{name} {count}" for name, count in counts.items()),
    )
    without = [name for name, count in counts.items() if not count]
    if without:
        logger.warning("No pairs for %s", ", ".join(without))
    return counts


def share_of(count, block_size):
    """The rows that this process searches: consecutive whole blocks.

    Blocks are those of one process alone, so that all products are the same.

    Arguments
    ---------
    count, block_size : int
        Number of audio rows, and of rows of a block.

    Returns
    -------
    tuple of int
        The first row and the one after the last.
    """
    rank, world_size = experiment.rank_and_world_size()
    blocks = -(-count // block_size)
    ends = [blocks * r // world_size * block_size for r in (rank, rank + 1)]
    return min(ends[0], count), min(ends[1], count)


def gathered(batches, path, most=None):
    """Pairs of all processes, in order of rank, in the main process.

    Arguments
    ---------
    batches : iterable of tuple of array
        This process's pairs.
    path : str
        Where they wait, in a file for each process, until all are found.
    most : int
        A process that has more need not look for further ones.

    Yields
    ------
    tuple of array
        In the main process alone.
    """
    if if_main_process():
        for stale in glob.glob(f"{glob.escape(path)}.*"):
            os.remove(stale)  # of a run that was stopped
    if not torch.distributed.is_initialized():
        yield from batches
        return
    ddp_barrier()
    count = 0
    rank, world_size = experiment.rank_and_world_size()
    with written_whole(f"{path}.{rank}") as file:
        for pairs in batches:
            for part in pairs:
                np.save(file, part)
            count += len(pairs[0])
            if most is not None and count > most:
                break
    ddp_barrier()
    if if_main_process():
        files = [f"{path}.{other}" for other in range(world_size)]
        try:
            for name in files:
                with open(name, "rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    while file.tell() < size:
                        yield tuple(np.load(file) for _ in range(3))
        finally:
            for name in files:
                os.remove(name)
    ddp_barrier()


def search(
    audio,
    text,
    tally,
    hparams,
    run_opts,
    threshold,
    with_report,
    kinds=None,
    per_audio=None,
    most=None,
):
    """Pairs over a threshold, found by all processes together.

    Arguments
    ---------
    audio, text : curation.embeddings.Embeddings
        The stores.
    tally : curation.tally.Tally
        Counts what is found; it is begun anew.
    hparams, run_opts : dict
        As `experiment.start` gives them.
    threshold : float
    with_report : bool
        Whether all similarities are counted.
    kinds, per_audio
        As `best_per_audio` takes them.
    most : int
        A process that has more pairs need not look for further ones.

    Yields
    ------
    tuple of array
        In the main process alone, as `pairs_over` does.
    """
    is_main = if_main_process()
    first, last = share_of(len(audio), hparams["audio_bs"])
    chosen = None
    if is_main:
        chosen = fastest_product(
            audio,
            text,
            threshold,
            with_report,
            hparams["search_precision"],
            run_opts["device"],
        )
        logger.info(
            "Products are in %s%s; the pairs do not depend on it",
            chosen[0],
            "" if chosen[1] is None else f", {chosen[1].shape[1]} axes",
        )
    precision, axes = ddp_broadcast(chosen, src=0)
    own = Tally(len(text))
    with tqdm(
        total=last - first,
        unit="clip",
        dynamic_ncols=True,
        disable=bool(run_opts.get("noprogressbar")) or not is_main,
    ) as bar:
        batches = pairs_over(
            audio,
            text,
            threshold,
            own,
            with_report,
            hparams["audio_bs"],
            device=run_opts["device"],
            precision=precision,
            axes=axes,
            rows=(first, last),
            progress=bar.update,
        )
        best = best_per_audio(batches, kinds, per_audio)
        path = f"{base_of(hparams)}_pairs.partial"
        yield from gathered(best, path, most)
    tally.start(threshold)
    for other in experiment.of_all_processes(own):
        tally.absorb(other)


def base_of(hparams):
    """What the paths of all results begin with."""
    return os.path.join(hparams["emb_dir"], hparams["curation_name"])


def makes_report(hparams):
    """Whether there will be one, for which all similarities are counted."""
    return hparams["with_report"] or hparams["dry_run"]


def chosen_pairs(find, tally, text, hparams):
    """The pairs that the command line asks for.

    Arguments
    ---------
    find : callable
        `search`, from its threshold on.
    tally : curation.tally.Tally
        That of `find`.
    text : curation.embeddings.Embeddings
        The store of the captions.
    hparams : dict

    Returns
    -------
    float
        The threshold that they reach.
    iterable of tuple of array
        The pairs, in the main process alone. `tally` is of them all once they
        have been taken.
    """
    threshold, target = hparams["sim_threshold"], hparams["target_pairs"]
    per_audio = hparams["max_captions_per_audio"]
    per_caption = hparams["max_audios_per_caption"]
    kinds = None
    if per_audio is not None or per_caption is not None:
        # A caption that is listed twice must not take two places.
        kinds = pd.factorize(text.manifest["caption"])[0]
    if target is None:
        stops = per_caption is None and not hparams["dry_run"]
        most = hparams["max_pairs"] if stops else None
        batches = find(threshold, makes_report(hparams), kinds, per_audio, most)
    else:
        for _ in find(np.inf, True):
            pass
        start = lowest_start(tally, target)
        threshold, pairs = best_on_grid(find(start, False), start, target)
        logger.info(
            "--target_pairs=%d: the threshold is %g, in place of "
            "--sim_threshold=%g; %d pairs reach it",
            target,
            threshold,
            hparams["sim_threshold"],
            len(pairs[0]),
        )
        if kinds is not None:
            logger.info(
                "--target_pairs counts pairs before --max_captions_per_audio "
                "and --max_audios_per_caption, which may keep fewer"
            )
        batches = best_per_audio([pairs], kinds, per_audio)
    if per_caption is not None:
        batches = best_per_caption(batches, kinds, per_caption)
    return threshold, batches


def write_pairs(batches, audio, text, hparams):
    """Write the CSV file, but for --dry_run, in the main process.

    Arguments
    ---------
    batches : generator of tuple of array
        The pairs.
    audio, text : curation.embeddings.Embeddings
        The stores.
    hparams : dict

    Returns
    -------
    PairSink
        It has seen them all.
    """
    base = base_of(hparams)
    writes = if_main_process() and not hparams["dry_run"]
    path = f"{base}_curation.csv"
    with (
        written_whole(path) if writes else contextlib.nullcontext() as file,
        contextlib.closing(batches),
    ):
        sink = PairSink(audio, text, file, hparams["max_pairs"])
        for pairs in batches:
            sink.add(*pairs)
        if writes:
            # A report of other pairs must not lie beside these.
            for suffix in ("json", "png"):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(f"{base}_report.{suffix}")
    return sink


def write_report(report, hparams):
    """Write a report for programs (JSON) and for eyes (PNG)."""
    base, title = base_of(hparams), hparams["curation_name"]
    write_json(report, f"{base}_report.json")
    if hparams["dry_run"]:
        title = f"{title}, dry run"
    figure = report_figure(report, title)
    with (
        written_whole(f"{base}_report.png") as file,
        warnings.catch_warnings(),
    ):
        # Those that fonts lack are boxes, of any number.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(file, format="png", dpi=100)


def retrieve(audio, text, hparams, run_opts):
    """Search, write the pairs and the report.

    Arguments
    ---------
    audio, text : curation.embeddings.Embeddings
        The stores.
    hparams, run_opts : dict
        As `experiment.start` gives them.
    """
    tally = Tally(len(text))
    find = functools.partial(search, audio, text, tally, hparams, run_opts)
    threshold, batches = chosen_pairs(find, tally, text, hparams)
    sink = write_pairs(batches, audio, text, hparams)
    if not if_main_process():
        return
    hparams["write_records"]()
    unit = "windows" if has_windows(audio.manifest) else "clips"
    num_captions = int((sink.kept > 0).sum())
    by_class = pairs_by_class(text.manifest, sink.kept)
    if makes_report(hparams):
        captions = text.manifest["caption"].tolist()
        report = make_report(
            tally, len(audio), threshold, sink.kept, captions, unit
        )
        report["kept"] = {
            "pairs": sink.pairs,
            unit: sink.audios,
            "captions": num_captions,
        }
        if by_class:
            report["kept"]["pairs_by_class"] = by_class
        # Or it would pass for that of a CSV file from another run.
        report["dry_run"] = hparams["dry_run"]
        write_report(report, hparams)
    if not sink.pairs:
        logger.warning(
            "No pair reaches the threshold %g: the highest similarity is %.6f",
            threshold,
            tally.highest,
        )
    logger.info(
        "%d pairs of %d %s and %d captions at the threshold %g. See %s_%s",
        sink.pairs,
        sink.audios,
        unit,
        num_captions,
        threshold,
        base_of(hparams),
        "report.png" if hparams["dry_run"] else "curation.csv",
    )


def main(argv):
    """Retrieve as the command line says."""
    of_networks = ("precision", "eval_precision", "auto_mix_prec")
    hparams, run_opts = experiment.start(
        argv,
        needs="aud_ds_path",
        required={
            "emb_dir": "<output_folder>/save of microsoft_curation_toemb.py"
        },
        refused={"debug": "give --dry_run=True"}
        | dict.fromkeys(
            (*of_networks, "bfloat16_mix_prec"), "give --search_precision"
        ),
        keeps_memory=False,
    )
    check_settings(hparams, run_opts["device"])
    folder = hparams["emb_dir"]
    audio = open_embeddings(
        folder, hparams["audio_stem"], "wav_path", hparams["aud_ds_path"]
    )
    text = open_embeddings(
        folder, hparams["text_stem"], "caption", hparams["txt_ds_path"]
    )
    check_same_weights(audio, text)
    # What reading the manifests took.
    pa.default_memory_pool().release_unused()
    lock = os.path.join(folder, f"{hparams['curation_name']}_search.lock")
    # Processes leave each other files under names that another run has too.
    with alone(lock) if if_main_process() else contextlib.nullcontext():
        retrieve(audio, text, hparams, run_opts)
    experiment.finish()


if __name__ == "__main__":
    main(sys.argv[1:])
