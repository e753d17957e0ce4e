"""Embedding of captions and clips, by the script and the ordinary way.

    python -m benchmarks.embed [--captions 1024] [--clips 128] [--runs 3]

The full-size model, BERT-base and CNN14 at 44.1 kHz and 5 s, with random
weights; captions with the lengths of AudioCaps' (in BERT's tokens), clips of
noise, WAV files of 10 s at 48 kHz. Timed is what lies between the loaded model
and the finished .npy, after a warm-up on the first 64 of each, or four where
memory is not kept. The script's loader starts its processes anew each time.

The ordinary way pads every caption to 100 tokens, reads every file whole,
resamples it with a new resampler and takes five seconds of it, computes the
spectrogram's DFT as a convolution (torchlibrosa), leaves convolutions to
PyTorch, channels first, and all in fp32, in batches of 64 as they come. It is
run twice: as a user would (A), and with the allocator's setting that the script
makes for itself (B).

The script runs in fp32 and, where the processor's products are faster in it, in
bf16 (--precision=auto finds out).

A GPU gets 256 times as many captions and clips, the ordinary way an eighth of
these, once, and the limit is the script's encoder by itself, with batches that
lie ready. A row more has the script with all but its encoder, whose embeddings
are zeros: reading, tokenizing and writing.
"""

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
import time

import numpy as np
import pandas as pd
import soundfile
import torch
import torch.nn.functional as F
import torchaudio

from benchmarks.measure import (
    KEEPING,
    Row,
    device,
    in_process,
    is_warm_soon,
    machine,
    median,
    on_gpu,
    peak_memory,
    product_speed,
    show,
    synchronized,
    worthwhile,
)

HPARAMS = "hparams/curation/microsoft_audioset_insper_toemb.yaml"
# Captions of AudioCaps' training set by their number of tokens, from 4 on,
# [CLS] and [SEP] included (the longest 0.4 % are left out).
LENGTHS = [162, 1317, 2740, 4153, 4486, 5166, 5143, 4737, 4006, 3357, 2923]
LENGTHS += [2353, 1929, 1524, 1176, 966, 775, 627, 495, 365, 306, 250, 200]
LENGTHS += [153, 129, 97, 84]
SAMPLES = 220500  # of a window: 5 s at 44.1 kHz
SECONDS, RATE = 10, 48000  # of a file
FILES = 128  # to which further paths are links
ROWS = 64  # of a batch, the ordinary way
GPU_TIMES, GPU_PART = 256, 8
SIDES = {
    "ordinary (A)": ("ordinary", "fp32", {}),
    "ordinary (B)": ("ordinary", "fp32", KEEPING),
    "script, fp32": ("ours", "fp32", {}),
    "script, bf16": ("ours", "bf16", {}),
}


def make_world(folder, n_captions, n_clips):
    """Captions, clips, a tokenizer and weights, the same at every run."""
    from transformers import BertConfig

    from dataset.text_model import make_text_model
    from models.clap import CLAP
    from models.weights import export_microsoft

    rng = np.random.default_rng(0)
    # One token each, but of as many letters as words have.
    words = [
        f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" + i % 7 * "x"
        for i in range(676)
    ]
    shares = np.array(LENGTHS) / sum(LENGTHS)
    lengths = rng.choice(len(LENGTHS), n_captions, p=shares) + 2
    captions = [" ".join(rng.choice(words, length)) for length in lengths]
    table = pd.DataFrame({"caption": captions})
    table.to_csv(f"{folder}/captions.csv", index=False)
    make_text_model(words, f"{folder}/text_model")
    # BERT-base's own size, with the small tokenizer beside it.
    BertConfig().save_pretrained(f"{folder}/text_model")
    paths = [f"{folder}/{i}.wav" for i in range(n_clips)]
    for path, first in zip(paths[FILES:], itertools.cycle(paths[:FILES])):
        os.symlink(first, path)
    for path in paths[:FILES]:
        noise = rng.uniform(-0.3, 0.3, SECONDS * RATE)
        soundfile.write(path, noise.astype(np.float32), RATE)
    with open(f"{folder}/audio.txt", "w") as file:
        file.writelines(f"{path}\n" for path in paths)
    torch.manual_seed(0)
    clap = CLAP(f"{folder}/text_model", text_pretrained=False)
    export_microsoft(clap, f"{folder}/clap.pth")


def workers():
    """Loader processes: beside a GPU, the cores but for some that copy."""
    return os.cpu_count() * 3 // 4 if on_gpu() else os.cpu_count()


def flags_of(folder, precision):
    """Command line of the script, with its own defaults where they matter."""
    return [
        HPARAMS,
        f"--text_model={folder}/text_model",
        f"--clap_ckpt_path={folder}/clap.pth",
        f"--output_folder={folder}/{precision}",
        f"--audio_pathfile={folder}/audio.txt",
        f"--text_pathfile={folder}/captions.csv",
        f"--num_workers={workers()}",
        f"--precision={precision}",
    ]


def ours(folder, precision):
    """The script's own two steps, timed.

    Returns
    -------
    dict
        Seconds of both, the peak of memory, and on a GPU the seconds of both
        encoders by themselves, and of all else.
    """
    import experiment
    import microsoft_curation_toemb as script

    hparams, run_opts = experiment.start(
        flags_of(folder, precision), needs="audio_pathfile"
    )
    run_opts["precision"] = precision
    brain = script.EmbeddingBrain(
        modules={"clap": hparams["clap"]}, hparams=hparams, run_opts=run_opts
    )
    hparams["load_weights"]()
    brain.modules.eval()
    brain.weights_hash = "of the benchmark"
    script.pack_weights(
        hparams["clap"], script.AMPConfig.from_name(precision).dtype
    )
    table = script.read_captions(hparams["text_pathfile"], "text_pathfile")
    paths = script.read_audio_list(hparams["audio_pathfile"])
    save_folder, run = hparams["save_folder"], {}

    def dump_text(captions):
        brain.dump_text(brain.text_writer(captions), captions)

    def dump_in(folder, dump, items):
        brain.hparams.save_folder = folder
        begin = time.perf_counter()
        dump(items)
        return time.perf_counter() - begin

    ways = {"audio": (brain.dump_audio, paths), "text": (dump_text, table)}
    for kind, (dump, items) in ways.items():
        dump_in(f"{save_folder}/warm-up", dump, items[:ROWS])
        run[kind] = dump_in(save_folder, dump, items)
    run["memory"] = peak_memory()
    if on_gpu():
        run |= encoders_alone(brain, len(paths), len(table))
        without_encoder(brain)
        for kind, (dump, items) in ways.items():
            seconds = dump_in(f"{save_folder}/without", dump, items)
            run[f"{kind} without"] = seconds
    return run


def without_encoder(brain):
    """Have a brain give zeros for embeddings."""
    size = brain.hparams.clap.d_proj

    def embed_audio(batch):
        batch.windows.to(brain.device, non_blocking=True)
        return torch.zeros(len(batch.rows), size)

    def embed_text(captions):
        brain.hparams.tokenizer(captions)
        return torch.zeros(len(captions), size)

    brain.embed_audio, brain.embed_text = embed_audio, embed_text


@torch.inference_mode()
def encoders_alone(brain, n_clips, n_captions):
    """Seconds of both encoders with batches on the GPU.

    Captions are all as long as the mean.
    """
    clap, hparams = brain.modules.clap, brain.hparams
    windows = 0.1 * torch.randn(hparams.audio_bs, SAMPLES, device=brain.device)
    ones = torch.ones(
        hparams.text_bs, mean_length(), dtype=torch.long, device=brain.device
    )
    tokens = {"input_ids": ones, "attention_mask": ones}
    times = {}
    with brain.training_ctx:
        for kind, encode, batch, count in (
            ("audio", clap.encode_audio, windows, n_clips),
            ("text", clap.encode_text, tokens, n_captions),
        ):
            encode(batch)
            begin = synchronized()
            for _ in range(10):
                encode(batch)
            seconds = (synchronized() - begin) / 10
            size = len(windows if kind == "audio" else ones)
            times[f"{kind} alone"] = seconds / size * count
    return times


def mean_length():
    """Tokens of a caption, on average."""
    lengths = np.array(LENGTHS)
    numbers = np.arange(4, 4 + len(lengths))
    return round((lengths * numbers).sum() / lengths.sum())


class OrdinaryCNN14(torch.nn.Module):
    """PANNs' network as their Table I has it, its DFT a convolution."""

    def __init__(self):
        super().__init__()
        import torchlibrosa

        self.spectrogram = torchlibrosa.stft.Spectrogram(1024, 320)
        self.register_buffer("melW", torch.empty(513, 64))
        self.bn0 = torch.nn.BatchNorm2d(64)
        sizes = [1, 64, 128, 256, 512, 1024, 2048]
        for i in range(1, 7):
            block = torch.nn.Module()
            for j, size in ((1, sizes[i - 1]), (2, sizes[i])):
                block.add_module(
                    f"conv{j}",
                    torch.nn.Conv2d(size, sizes[i], 3, padding=1, bias=False),
                )
                block.add_module(f"bn{j}", torch.nn.BatchNorm2d(sizes[i]))
            self.add_module(f"conv_block{i}", block)
        self.fc1 = torch.nn.Linear(2048, 2048)

    def forward(self, wavs):
        """(batch, samples) -> (batch, 2048)."""
        with torch.autocast(wavs.device.type, enabled=False):
            mel = self.spectrogram(wavs) @ self.melW
            x = 10 * mel.clamp(min=1e-10).log10()
        x = self.bn0(x.transpose(1, 3)).transpose(1, 3)
        for i in range(1, 7):
            block = getattr(self, f"conv_block{i}")
            x = F.relu_(block.bn1(block.conv1(x)))
            x = F.relu_(block.bn2(block.conv2(x)))
            x = F.avg_pool2d(x, 2 if i < 6 else 1)
            x = F.dropout(x, 0.2, self.training)
        x = x.mean(dim=3)
        x = x.amax(dim=2) + x.mean(dim=2)
        x = F.relu_(self.fc1(F.dropout(x, 0.5, self.training)))
        return F.dropout(x, 0.5, self.training)


def ordinary_model(folder):
    """CLAP with that CNN14 and transformers' own BERT."""
    from transformers import AutoConfig, AutoModel

    from models.clap import CLAP
    from models.weights import load_weights

    clap = CLAP(f"{folder}/text_model", text_pretrained=False)
    load_weights(clap, clap_ckpt_path=f"{folder}/clap.pth")
    state = clap.audio_encoder.base.state_dict()
    state["melW"] = state["logmel_extractor.melW"]
    cnn14 = OrdinaryCNN14()
    # Not what it computes the DFT with, which it knows by itself.
    missing = cnn14.load_state_dict(state, strict=False).missing_keys
    assert all(key.startswith("spectrogram.") for key in missing), missing
    clap.audio_encoder.base = cnn14
    # CLAP's leaves out of the last layer what it has no use for.
    config = AutoConfig.from_pretrained(f"{folder}/text_model")
    bert = AutoModel.from_config(config)
    bert.load_state_dict(clap.caption_encoder.base.state_dict())
    clap.caption_encoder.base = bert
    return clap


def padding_tokenizer(folder):
    """The ordinary way from captions to tokens: 100 of each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/text_model")

    def tokenize(texts):
        tokens = tokenizer(
            texts, padding="max_length", max_length=100, return_tensors="pt"
        )
        return dict(tokens)

    return tokenize


@torch.no_grad()
def ordinary(folder, precision):
    """The baseline of the docstring.

    Returns
    -------
    dict
        Seconds of both, of all that there is, and the peak of memory.
    """
    clap = ordinary_model(folder).eval().to(device())
    tokenize = padding_tokenizer(folder)
    captions = pd.read_csv(f"{folder}/captions.csv")["caption"].tolist()
    with open(f"{folder}/audio.txt") as file:
        paths = file.read().splitlines()
    part = GPU_PART if on_gpu() else 1

    def encode_text(texts):
        tokens = {k: v.to(device()) for k, v in tokenize(texts).items()}
        return clap.encode_text(tokens).cpu()

    def encode_audio(some):
        windows = []
        for path in some:
            samples, rate = soundfile.read(path, dtype="float32")
            resample = torchaudio.transforms.Resample(rate, 44100)
            whole = resample(torch.from_numpy(samples))
            begin = (len(whole) - SAMPLES) // 2
            windows.append(whole[begin : begin + SAMPLES])
        return clap.encode_audio(torch.stack(windows).to(device())).cpu()

    run = {}
    for kind, encode, items in (
        ("text", encode_text, captions),
        ("audio", encode_audio, paths),
    ):
        encode(items[: 4 if is_warm_soon() else ROWS])
        begin, items = time.perf_counter(), items[: len(items) // part]
        parts = [
            encode(items[i : i + ROWS]) for i in range(0, len(items), ROWS)
        ]
        embeddings = torch.cat(parts).numpy()
        np.save(f"{folder}/ordinary_{kind}.npy", embeddings)
        run[kind] = part * (time.perf_counter() - begin)
    return run | {"memory": peak_memory()}


def flop_of(folder, n_captions, n_clips, precision):
    """FLOP of the script's networks, counted by PyTorch.

    Those of convolutions depend on how a precision has them computed, and on
    the windows of a batch, which share the transforms of weights.

    Returns
    -------
    dict
        Of all captions without padding, and of all windows.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from microsoft_curation_toemb import CPU_BATCH
    from models.clap import CLAP

    clap = CLAP(f"{folder}/text_model", text_pretrained=False).eval()
    clap.to(device())
    token = torch.ones(1, mean_length(), dtype=torch.long, device=device())
    windows = torch.zeros(CPU_BATCH, SAMPLES, device=device())
    with (
        torch.no_grad(),
        torch.autocast(device(), torch.bfloat16, precision == "bf16"),
        FlopCounterMode(display=False) as counter,
    ):
        clap.encode_text({"input_ids": token, "attention_mask": token})
        text = counter.get_total_flops()
        clap.encode_audio(windows)
        audio = (counter.get_total_flops() - text) / CPU_BATCH
    return {"text": n_captions * text, "audio": n_clips * audio}


def lowest_cosine(folder, precision, kind):
    """Lowest cosine between the script's rows and the ordinary."""
    stem = {"text": "text_insper", "audio": "audio_audioset"}[kind]
    path = f"{folder}/{precision}/save/{stem}_embeddings.npy"
    b = np.load(f"{folder}/ordinary_{kind}.npy").astype(np.float64)
    a = np.load(path)[: len(b)].astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(axis=1) / norms
    return float(cosine.min())


def main(argv):
    """Measure all sides in turn; returns and prints the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.embed")
    parser.add_argument("--captions", type=int, default=1024)
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--precision", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        run = {"ours": ours, "ordinary": ordinary}[args.side]
        print(json.dumps(run(args.folder, args.precision)))
        return None
    if on_gpu():
        args.captions, args.clips = (
            GPU_TIMES * count for count in (args.captions, args.clips)
        )
    sides = worthwhile(SIDES)
    runs = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        make_world(folder, args.captions, args.clips)
        for _ in range(args.runs):
            for side, (name, precision, environment) in sides.items():
                # A finished store would not be made again.
                if name == "ours":
                    shutil.rmtree(f"{folder}/{precision}", ignore_errors=True)
                flags = ["--side", name, "--folder", folder]
                flags += ["--precision", precision]
                runs[side].append(
                    in_process("benchmarks.embed", flags, environment)
                )
        # On a GPU the limit is another one.
        flop = {
            precision: flop_of(folder, args.captions, args.clips, precision)
            for _, precision, _ in sides.values()
            if not on_gpu()
        }
        counts = {"text": args.captions, "audio": args.clips}
        rows = [
            row
            for kind, count in counts.items()
            for side in sides
            for row in rows_of(folder, kind, count, side, runs, flop)
        ]
    each = (
        f"{flop[precision][kind] / count / 1e9:.1f} GFLOP a {name}, {precision}"
        for precision in flop
        for (kind, count), name in zip(counts.items(), ("caption", "window"))
    )
    print(machine(), *each, sep="; ")
    show(rows)
    return rows


def rows_of(folder, kind, count, side, runs, flop):
    """The row of one side and kind, on a GPU one more without the encoder."""
    name, precision, _ = SIDES[side]
    seconds = {s: median(r, kind) for s, r in runs.items()}
    unit = {"text": "captions/s", "audio": "clips/s"}[kind]
    job = f"embed {count} {unit.removesuffix('/s')}"
    memory = median(runs[side], "memory")
    row = Row(job, side, count / seconds[side], unit, memory=memory)
    rows = [row]
    if name == "ours":
        ways = [s for s in runs if s.startswith("ordinary")]
        ratios = [seconds[way] / seconds[side] for way in ways]
        row.ratio_a, row.ratio_b = (*ratios, None)[:2]
        if on_gpu():
            row.limit = "its encoder"
            row.of_limit = median(runs[side], f"{kind} alone") / seconds[side]
            rate = count / median(runs[side], f"{kind} without")
            rows.append(Row(job, f"{side}, without its encoder", rate, unit))
        else:
            row.limit = f"{precision} product"
            speed = flop[precision][kind] / seconds[side]
            row.of_limit = speed / product_speed(precision)
        low = lowest_cosine(folder, precision, kind)
        row.difference = f"cosine {low:.6f} or more"
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
