"""A training step of the full-size model, by the script and the ordinary way.

    python -m benchmarks.step [--batch 16] [--steps 3]

CNN14 at 44.1 kHz and 5 s and BERT-base with random weights, Adam, batches of
noise with captions of AudioCaps' lengths. A step is the forward and backward
pass and the optimizer's update; data loading is not part of it (see
benchmarks.loading).

The ordinary way pads every caption to 100 tokens, computes the spectrogram's
DFT as a convolution (torchlibrosa), leaves convolutions to PyTorch, channels
first, and all in fp32, with PyTorch's Adam as it is. It is run twice: as a user
would (A), and with the allocator's setting that the script makes for itself
(B). The script's side in bf16 is left out where the processor's products are
slower in it.

On a GPU the ordinary way runs once, under bf16 autocast like the script, which
runs as it is and with --compile=True, in batches of eight times as many pairs
and four times as many steps. Then the largest batch is looked for, by steps
that double until the memory is too small for one, and by halves between the
last two; but not with --compile=True, which would compile for each size.

The script's side is `CLAPBrain.fit_batch`, with its checks, clipping and
multi-positive loss. Both start from the same weights; compared is the loss of
the first batch before training, without dropout.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
import types

import pandas as pd
import torch

from benchmarks.embed import (
    SAMPLES,
    make_world,
    ordinary_model,
    padding_tokenizer,
)
from benchmarks.measure import (
    KEEPING,
    Row,
    device,
    in_process,
    is_warm_soon,
    machine,
    on_gpu,
    peak_memory,
    product_speed,
    show,
    synchronized,
    worthwhile,
)

HPARAMS = "hparams/insper/microsoft_clap_train.yaml"
# Steps until the process has the memory that it keeps.
WARM_UP = 2
SIDES = {
    "ordinary (A)": ("ordinary", "fp32", {}),
    "ordinary (B)": ("ordinary", "fp32", KEEPING),
    "script, fp32": ("ours", "fp32", {}),
    "script, bf16": ("ours", "bf16", {}),
}
GPU_SIDES = {
    "ordinary (A)": ("ordinary", "bf16", {}),
    "script, bf16": ("ours", "bf16", {}),
    "script, bf16, --compile": ("compiled", "bf16", {}),
}


def batches_of(folder, batch, steps, tokenize):
    """Waves (batch, samples) and tokens of each step."""
    captions = pd.read_csv(f"{folder}/captions.csv")["caption"]
    captions = itertools.cycle(captions)
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        wavs = 0.1 * torch.randn(batch, SAMPLES, generator=draw)
        yield wavs, tokenize(list(itertools.islice(captions, batch)))


def ours(folder, precision, *flags):
    """The script's way.

    Returns
    -------
    tuple of callable
        A step: waves, tokens -> None; the loss of a batch, without dropout;
        and from captions to tokens.
    """
    import experiment
    from dataset.pipelines import PairBatch
    from microsoft_clap_train import CLAPBrain

    hparams, run_opts = experiment.start(
        [
            HPARAMS,
            f"--text_model={folder}/text_model",
            "--clap={text_pretrained: False}",
            f"--clap_ckpt_path={folder}/clap.pth",
            f"--output_folder={folder}/{precision}{len(flags)}",
            f"--precision={precision}",
            *flags,
        ],
        needs="opt_class",
    )
    brain = CLAPBrain(
        modules={"clap": hparams["clap"]},
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
    )
    hparams["load_weights"]()
    brain.on_fit_start()
    brain.unreadable, brain.num_clips = {}, 1
    brain.train_sampler = types.SimpleNamespace(rank=0)

    def pairs(wavs, tokens):
        rows = torch.arange(len(wavs))
        return PairBatch(wavs, tokens, clip_ids=rows, caption_ids=rows)

    def loss_of(*item):
        brain.modules.eval()
        batch = pairs(*item)
        with torch.no_grad(), brain.training_ctx:
            outputs = brain.compute_forward(batch, None)
            loss = brain.compute_objectives(outputs, batch, None).item()
        brain.modules.train()
        return loss

    def step(*item):
        brain.step += 1
        brain.fit_batch(pairs(*item))

    return step, loss_of, hparams["tokenizer"]


def compiled(folder, precision):
    """The script's way with PyTorch's compiler."""
    return ours(folder, precision, "--compile=True")


def ordinary(folder, precision):
    """The baseline of the docstring, as `ours`."""
    clap = ordinary_model(folder).to(device())
    optimizer = torch.optim.Adam(clap.parameters(), lr=1e-4)

    def forward(wavs, tokens):
        with torch.autocast(device(), torch.bfloat16, precision == "bf16"):
            tokens = {k: v.to(device()) for k, v in tokens.items()}
            audio, text, scale = clap(wavs.to(device()), tokens)
        logits = scale * audio @ text.T
        labels = torch.arange(len(wavs), device=device())
        losses = [
            torch.nn.functional.cross_entropy(x, labels)
            for x in (logits, logits.T)
        ]
        return sum(losses) / 2

    def loss_of(*item):
        clap.eval()
        with torch.no_grad():
            loss = forward(*item).item()
        clap.train()
        return loss

    def step(*item):
        optimizer.zero_grad()
        forward(*item).backward()
        optimizer.step()

    return step, loss_of, padding_tokenizer(folder)


def run_side(make, folder, precision, batch, steps):
    """Measure one way in this process.

    Returns
    -------
    dict
        Median seconds of the steps after the warm-up, peak memory, the loss
        before, and on a GPU the largest batch, unless the network is compiled.
    """
    step, loss_of, tokenize = make(folder, precision)
    warm_up = 1 if make is ordinary and is_warm_soon() else WARM_UP
    data = list(batches_of(folder, batch, warm_up + steps, tokenize))
    if on_gpu():
        # As loaders give them. What is done once for each length of the
        # captions is done in the warm-up.
        data = [(wavs.pin_memory(), tokens) for wavs, tokens in data]
        data = data + data
    run, times = {"loss": loss_of(*data[0])}, []
    for item in data:
        begin = synchronized()
        step(*item)
        times.append(synchronized() - begin)
    run["seconds"] = statistics.median(times[-steps:])
    run["memory"] = peak_memory()
    if on_gpu() and make is not compiled:
        run["largest"] = largest_batch(lambda size: step(*sized(data[0], size)))
    return run


def sized(item, size):
    """A batch of another size, with the same rows again and again."""
    wavs, tokens = item
    rows = torch.arange(size) % len(wavs)
    return wavs[rows], {k: v[rows] for k, v in tokens.items()}


def largest_batch(step):
    """The largest that fits into the memory of the GPU, to 3 %.

    Arguments
    ---------
    step : callable
        Takes a size.

    Returns
    -------
    int
    """
    fits, size, fails = 1, 512, None
    while fails is None or fails - fits > max(1, fits // 32):
        try:
            step(size)
        except torch.OutOfMemoryError:
            fails = size
        else:
            fits = size
        torch.cuda.empty_cache()
        size = 2 * fits if fails is None else (fits + fails) // 2
    return fits


def flop_of_a_step(folder, batch, precision):
    """FLOP of the script's step, counted by PyTorch."""
    from torch.utils.flop_counter import FlopCounterMode

    from dataset.text import CaptionTokenizer
    from models.clap import CLAP

    text_model = f"{folder}/text_model"
    clap = CLAP(text_model, text_pretrained=False).to(device())
    tokenize = CaptionTokenizer(text_model)
    [(wavs, tokens)] = batches_of(folder, batch, 1, tokenize)
    tokens = {k: v.to(device()) for k, v in tokens.items()}

    def of_shapes(sums, a, b, **_):
        return 2 * math.prod(a) * b[-1]

    # PyTorch does not count products that are added in place.
    added = {torch.ops.aten.baddbmm_: of_shapes}
    with FlopCounterMode(display=False, custom_mapping=added) as counter:
        with torch.autocast(device(), torch.bfloat16, precision == "bf16"):
            audio, text, _ = clap(wavs.to(device()), tokens)
        (audio.sum() + text.sum()).backward()
    return counter.get_total_flops()


def main(argv):
    """Measure all sides in turn; returns and prints the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--precision", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        make = {"ours": ours, "compiled": compiled, "ordinary": ordinary}
        make, sizes = make[args.side], (args.batch, args.steps)
        print(json.dumps(run_side(make, args.folder, args.precision, *sizes)))
        return None
    if on_gpu():
        args.batch, args.steps = 8 * args.batch, 4 * args.steps
    sizes = ["--batch", str(args.batch), "--steps", str(args.steps)]
    runs, sides = {}, worthwhile(GPU_SIDES if on_gpu() else SIDES)
    with tempfile.TemporaryDirectory() as folder:
        make_world(folder, args.batch * (WARM_UP + args.steps), 0)
        for side, (name, precision, environment) in sides.items():
            flags = ["--side", name, "--folder", folder]
            flags += ["--precision", precision, *sizes]
            runs[side] = in_process("benchmarks.step", flags, environment)
            print(f"{side}: {runs[side]}", flush=True)
        flop = {
            precision: flop_of_a_step(folder, args.batch, precision)
            for _, precision, _ in sides.values()
        }
    rows = []
    ways = [runs[side] for side in sides if side.startswith("ordinary")]
    for side, (name, precision, _) in sides.items():
        run = runs[side]
        speed = flop[precision] / run["seconds"] / product_speed(precision)
        is_ours = name != "ordinary"
        rows.append(
            Row(
                f"training step, {args.batch} pairs",
                side,
                run["seconds"],
                "s",
                *(w["seconds"] / run["seconds"] for w in ways if is_ours),
                of_limit=speed if is_ours else None,
                limit=f"{precision} product",
                memory=run["memory"],
                difference=f"loss {run['loss'] - ways[0]['loss']:+.1e}",
            )
        )
    for side, run in runs.items():
        if "largest" in run:
            size = run["largest"]
            ratio = None if run is ways[0] else size / ways[0]["largest"]
            rows.append(Row("largest batch", side, size, "pairs", ratio))
    each = (f"{v / 1e12:.2f} TFLOP a step, {k}" for k, v in flop.items())
    print(machine(), *each, sep="; ")
    show(rows)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
