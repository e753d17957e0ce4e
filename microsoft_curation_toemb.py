r"""Embed unpaired audio and captions, for curation.

    python microsoft_curation_toemb.py \
        hparams/curation/microsoft_audioset_insper_toemb.yaml \
        --output_folder=results/embeddings --audio_pathfile=audioset.txt \
        --text_pathfile=captions.csv --ssl_checkpoints_dir=results/.../save

The list of audio holds one path a line, relative ones starting from its
folder; the CSV has a column `caption`. Either may be left out. The embeddings
go into <output_folder>/save, unit-norm float16, each with its manifest row for
row and a record of what it was made with (see curation/embeddings.py). A
stopped run goes on by the same command and ends in the same bytes; with
`torchrun --nproc_per_node=N` the processes share the work.
"""

import logging
import math
import os
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import speechbrain as sb
import torch
from speechbrain.utils.autocast import AMPConfig
from speechbrain.utils.distributed import (
    ddp_barrier,
    ddp_broadcast,
    if_main_process,
    run_on_main,
)
from torch.utils.data import DataLoader

import experiment
from curation.embeddings import (
    DONE,
    NOT_FINITE,
    SKIPPED,
    EmbeddingWriter,
    batched,
    captions_writer,
    dump_captions,
    encoded,
    read_captions,
    read_record,
    text_hash,
)
from curation.fastest import product_seconds
from dataset.audio import AudioError
from dataset.manifest import of_headers
from dataset.pipelines import (
    CropDataset,
    WindowCollator,
    WindowDataset,
    batches_of_windows,
    shared_texts,
    stacker,
)
from files import (
    path_in,
    read_lines,
    read_table,
    write_csv,
    written_whole,
)
from models.packed import pack_weights
from models.weights import state_hash
from models.zeroshot import clip_embeddings, text_embeddings

logger = logging.getLogger(__name__)

AUDIO, TEXT = "audio_audioset", "text_insper"
# Windows that a CPU encodes at once: the buffers of more take it longer than
# their products, and the first batch is sooner there.
CPU_BATCH = 16
# Files that are looked for before any is embedded.
_LOOKED_FOR = 1000


class EmbeddingBrain(sb.Brain):
    """Encodes windows and captions; nothing is trained."""

    @torch.inference_mode()
    def embed_audio(self, batch):
        """WindowBatch -> (items, d_proj) unit-norm."""
        with self.training_ctx:
            return clip_embeddings(
                self.modules.clap, batch.windows, batch.counts
            )

    def embed_text(self, captions):
        """List of captions -> (captions, d_proj) unit-norm."""
        with self.training_ctx:
            return text_embeddings(
                self.modules.clap, self.hparams.tokenizer, captions
            )

    def settings(self, **more):
        """What embeddings depend on but for rounding, for the record.

        Batch sizes are not among it, so that a run that was stopped for want
        of memory can go on with smaller ones.
        """
        return {
            "weights": self.weights_hash,
            "precision": self.precision,
            **more,
        }

    def dump_audio(self, paths, reserved=0):
        """Embed audio files into the store `audio_audioset`.

        Arguments
        ---------
        paths : pyarrow.LargeStringArray
            Audio files, each once.
        reserved : int
            Bytes of the disk that the captions will need.

        Raises
        ------
        RuntimeError
            Some files could not be read at the time, and can be read now.
        OSError, ValueError
            As `EmbeddingWriter`, its `work` and `finish_audio`.
        """
        hparams = self.hparams
        windows = windows_of(
            paths,
            hparams.windows_per_clip,
            hparams.reader,
            self.noprogressbar or not if_main_process(),
        )
        growing = {}
        if hparams.windows_per_clip == "all":
            # Those of a file begin at 0, so that their numbers are told too.
            starts = windows.starts.tolist()
            growing["windows"] = text_hash([str(start) for start in starts])
        writer = EmbeddingWriter(
            hparams.save_folder,
            AUDIO,
            "wav_path",
            len(windows),
            hparams.clap.d_proj,
            self.settings(
                list=text_hash(paths),
                hop_size=hparams.clap.hop_size,
                windows_per_clip=hparams.windows_per_clip,
                sample_rate=hparams.reader.sample_rate,
                duration=hparams.clap.duration,
                short=hparams.reader.short,
            ),
            growing=growing,
            reserved=reserved,
        )
        if writer.finished:
            logger.info("%s is complete already", AUDIO)
            warn_of_skipped(writer.base)
            return
        run_on_main(warn_of_missing, args=[paths])
        on_gpu = self.device_type == "cuda"
        batch_size = hparams.audio_bs
        if not on_gpu:
            batch_size = min(batch_size, CPU_BATCH)
        if hparams.windows_per_clip == "mean":
            batches = batches_of_windows(
                paths.to_pylist(),
                hparams.reader,
                batch_size,
                self.noprogressbar or not if_main_process(),
            )
        else:
            batches = batched(range(len(windows)), batch_size)
        pending, bar = writer.work(batches, "clip", self.noprogressbar)
        loader = DataLoader(
            windows,
            batch_sampler=pending,
            collate_fn=WindowCollator(
                stacker(hparams.num_workers, batch_size, hparams.reader)
            ),
            num_workers=hparams.num_workers,
            pin_memory=on_gpu,
        )
        with bar:
            for batch, vectors in encoded(loader, self.embed_audio):
                writer.write(batch.rows, vectors, batch.starts)
                writer.skip(list(batch.unreadable))
                bar.update(len(batch.rows) + len(batch.unreadable))
        ddp_barrier()
        readable = None
        if if_main_process():
            readable = finish_audio(writer, windows, hparams.clap.duration)
        readable = ddp_broadcast(readable, src=0)
        if readable:
            raise RuntimeError(
                f"{readable} files of --audio_pathfile could not be read at "
                "the time and can be read now: run the same command again"
            )

    def text_writer(self, table):
        """A writer of the store `text_insper` (`captions_writer`).

        Arguments
        ---------
        table : pandas.DataFrame
            `caption`, and `ID` and `wav_path` where known.

        Returns
        -------
        curation.embeddings.EmbeddingWriter
        """
        hparams = self.hparams
        return captions_writer(
            hparams.save_folder,
            TEXT,
            table,
            hparams.clap.d_proj,
            self.settings(**hparams.tokenizer.settings()),
        )

    def dump_text(self, writer, table):
        """Embed captions into the store `text_insper`.

        Arguments
        ---------
        writer, table
            As `text_writer` returns and takes them.
        """
        hparams = self.hparams
        dump_captions(
            writer,
            table,
            hparams.tokenizer,
            self.embed_text,
            hparams.text_bs,
            self.device_type,
            self.noprogressbar,
        )


def choose_precision(precision, device):
    """What `precision` means on a device.

    Arguments
    ---------
    precision : str
        fp32, bf16, fp16 (GPU only), or auto for the fastest one.
    device : str

    Returns
    -------
    str
        A CPU takes bf16 only if it multiplies at least 1.5 times as fast with
        it: of two of the same make, one may do and the other not.

    Raises
    ------
    SystemExit
        It is none of these.
    """
    on_cpu = torch.device(device).type == "cpu"
    choices = ["auto", "fp32", "bf16"] + ["fp16"] * (not on_cpu)
    experiment.check_choice({"precision": precision}, "precision", choices)
    if precision != "auto":
        return precision
    if not on_cpu:
        # Not one that emulates it, as those before Ampere do.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native else "fp16"
    fp32, bf16 = (
        product_seconds(dtype, width=1024)
        for dtype in (torch.float32, torch.bfloat16)
    )
    return "bf16" if 1.5 * bf16 < fp32 else "fp32"


def precision_of_folder(save_folder, device):
    """That of the stores there, finished or not; auto if there are none.

    A resumed run does not measure again, and may not choose again.

    Arguments
    ---------
    save_folder : str
    device : str

    Returns
    -------
    str

    Raises
    ------
    SystemExit
        The device cannot go on in it.
    """
    for stem in (AUDIO, TEXT):
        for path in (f"{stem}.json", f"{stem}.partial.json"):
            path = os.path.join(save_folder, path)
            if not os.path.exists(path):
                continue
            settings = read_record(path, ("settings",))["settings"]
            if settings["precision"] == "fp16" and device == "cpu":
                raise SystemExit(
                    f"{path} is of embeddings in fp16, which needs a GPU: go "
                    "on with one, or give another --output_folder"
                )
            return settings["precision"]
    return "auto"


def windows_of(paths, windows_per_clip, reader, hides_bar):
    """The windows to embed, an item for each row.

    Arguments
    ---------
    paths : pyarrow.LargeStringArray
        Audio files.
    windows_per_clip : str
        "centre" for one window of each, "all" for consecutive ones, a row
        each, "mean" for the mean over these, as in zero-shot evaluation.
    reader : dataset.audio.AudioReader
        Reads them.
    hides_bar : bool
        Whether to show no progress where all files are looked into.

    Returns
    -------
    dataset.pipelines.WindowDataset
    """
    if windows_per_clip == "mean":
        return WindowDataset(paths, reader)
    if windows_per_clip == "centre":
        return CropDataset(paths, reader)

    def starts_in(path):
        try:
            return reader.starts(path)
        except AudioError:
            return [math.nan]

    starts = of_headers(starts_in, paths.to_pylist(), hides_bar)
    which = np.repeat(np.arange(len(paths)), [len(some) for some in starts])
    items = paths.take(pa.array(which))
    return CropDataset(items, reader, np.concatenate(starts))


def finish_audio(writer, windows, duration):
    """Write what lies beside the audio embeddings, then the store itself.

    Nothing is written if a disk was away for some time: items that were
    skipped and can be read now are left to the next run.

    Arguments
    ---------
    writer : EmbeddingWriter
        With all of its items embedded or skipped.
    windows : dataset.pipelines.WindowDataset
        The items; says once more why files were skipped.
    duration : float
        Length of the windows in seconds.

    Returns
    -------
    int
        Number of files to embed in the next run; 0 if all is written.

    Raises
    ------
    ValueError
        All items were skipped; nothing but the list of these is left.
    """
    index = np.flatnonzero(writer.fate == DONE)
    reasons, readable = {}, []
    for i in np.flatnonzero(np.isin(writer.fate, (SKIPPED, NOT_FINITE))):
        if writer.fate[i] == NOT_FINITE:
            reason = "its embedding is not finite"
        else:
            *_, reason = windows[i]
        if reason is None:
            readable.append(i)
        else:
            reasons[windows.wav_paths[i].as_py()] = reason
    if readable:
        writer.retry(readable)
        return len(windows.wav_paths.take(pa.array(readable)).unique())
    skipped = pd.DataFrame(reasons.items(), columns=["path", "reason"])
    write_csv(skipped, f"{writer.base}_skipped.csv")
    if not len(index):
        writer.remove_partial()
        raise ValueError(
            f"None of the {len(reasons)} files of --audio_pathfile can be "
            f"read: see {writer.base}_skipped.csv"
        )
    kept = windows.wav_paths.take(pa.array(index)).to_pandas()
    with written_whole(f"{writer.base}_files.txt") as file:
        file.writelines(f"{path}\n".encode() for path in kept)
    starts = writer.at[index]
    times = {"start": starts, "end": starts + duration}
    manifest = pd.DataFrame({"wav_path": kept, **times})
    writer.finish(index, manifest, {"skipped": len(reasons)})
    log = logger.warning if reasons else logger.info
    log(
        "%s: %d windows embedded, %d files skipped%s",
        AUDIO,
        len(index),
        len(reasons),
        f" (see {writer.base}_skipped.csv)" if reasons else "",
    )
    return 0


def warn_of_skipped(base):
    """Name the list of files that a finished store lacks, if it lacks any."""
    path = f"{base}_skipped.csv"
    skipped = len(read_table(path)) if os.path.exists(path) else 0
    if skipped:
        logger.warning(
            "It lacks %d files that could not be read (see %s): once they are "
            "mended, another --output_folder takes them in",
            skipped,
            path,
        )


def warn_of_missing(paths):
    """Tell of files that are not there before hours of work with the others.

    Arguments
    ---------
    paths : pyarrow.LargeStringArray
        Audio files; of many, some are looked for.
    """
    some = paths[:: -(-len(paths) // _LOOKED_FOR)].to_pylist()
    missing = [path for path in some if not os.path.exists(path)]
    if missing:
        logger.warning(
            "Of %d files of --audio_pathfile that were looked for, %d are not "
            "there, as %s: they will be skipped. To have them, stop, and mend "
            "the list",
            len(some),
            len(missing),
            missing[0],
        )


def read_audio_list(path):
    """Absolute paths of a list, each once; duplicates are reported.

    Returns
    -------
    pyarrow.LargeStringArray

    Raises
    ------
    ValueError
        The list cannot be read, or is empty.
    """
    folder = os.path.dirname(os.path.abspath(path))
    try:
        listed = shared_texts(
            path_in(folder, line.strip()) for line in read_lines(path)
        )
    except ValueError as error:
        raise ValueError(f"--audio_pathfile={error}") from error
    if not len(listed):
        raise ValueError(f"--audio_pathfile={path} lists no files")
    distinct = listed.unique()
    if len(distinct) < len(listed):
        logger.warning(
            "%d paths in %s are there more than once and are embedded once",
            len(listed) - len(distinct),
            path,
        )
    # What that took.
    pa.default_memory_pool().release_unused()
    return distinct


def main(argv):
    """Embed as the command line says."""
    hparams, run_opts = experiment.start(
        argv,
        needs="audio_pathfile",
        refused={
            "eval_precision": "give --precision",
            "debug": "give short lists",
        },
    )
    if not (hparams["audio_pathfile"] or hparams["text_pathfile"]):
        raise SystemExit("Give --audio_pathfile, --text_pathfile or both")
    experiment.require_weights(hparams)
    experiment.check_numbers(hparams, ["audio_bs", "text_bs"], 1, whole=True)
    experiment.check_numbers(hparams, ["num_workers"], 0, whole=True)
    experiment.check_choice(
        hparams, "windows_per_clip", ("centre", "mean", "all")
    )
    precision = hparams["precision"]
    if precision == "auto":
        precision = precision_of_folder(
            hparams["save_folder"], run_opts["device"]
        )
    # One process decides: others might measure otherwise.
    run_opts["precision"] = ddp_broadcast(
        choose_precision(precision, run_opts["device"]), src=0
    )
    brain = EmbeddingBrain(
        modules={"clap": hparams["clap"]}, hparams=hparams, run_opts=run_opts
    )
    hparams["load_weights"]()
    brain.modules.eval()
    brain.weights_hash = state_hash(hparams["clap"].state_dict())
    dtype = AMPConfig.from_name(brain.precision).dtype
    pack_weights(hparams["clap"], dtype)
    # Captions are read before the hours that audio takes, in case they cannot
    # be, or their store not be made, but embedded after it: the fork of audio's
    # loader processes gives freed buffers back (experiment.keep_freed_memory),
    # and so has few to give.
    writer, reserved = None, 0
    if hparams["text_pathfile"]:
        table = read_captions(hparams["text_pathfile"], "text_pathfile")
        writer = brain.text_writer(table)
        reserved = writer.needed
    if hparams["audio_pathfile"]:
        brain.dump_audio(read_audio_list(hparams["audio_pathfile"]), reserved)
    if writer is not None:
        brain.dump_text(writer, table)
    run_on_main(hparams["write_records"])
    experiment.finish()


if __name__ == "__main__":
    main(sys.argv[1:])
