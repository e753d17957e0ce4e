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
(B). On a GPU it runs under bf16 autocast like the script, and A and B are the
same. The script's side in bf16 is left out where the processor's products are
slower in it.

The script's side is `CLAPBrain.fit_batch`, with its checks, clipping and
multi-positive loss. Both start from the same weights; compared is the loss of
the first batch before training, without dropout.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import types

import pandas as pd
import torch

from benchmarks.embed import make_world, ordinary_model, padding_tokenizer
from benchmarks.measure import (
    KEEPING,
    Row,
    device,
    in_process,
    machine,
    peak_memory,
    product_speed,
    show,
    synchronized,
    worthwhile,
)

HPARAMS = "hparams/insper/microsoft_clap_train.yaml"
SAMPLES = 220500
# Steps until the process has the memory that it keeps.
WARM_UP = 2
SIDES = {
    "ordinary (A)": ("ordinary", "fp32", {}),
    "ordinary (B)": ("ordinary", "fp32", KEEPING),
    "script, fp32": ("ours", "fp32", {}),
    "script, bf16": ("ours", "bf16", {}),
}


def batches_of(folder, batch, steps, tokenize):
    """Waves (batch, samples) and tokens of each step."""
    captions = pd.read_csv(f"{folder}/captions.csv")["caption"].tolist()
    draw = torch.Generator().manual_seed(0)
    for i in range(steps):
        wavs = 0.1 * torch.randn(batch, SAMPLES, generator=draw)
        yield wavs, tokenize(captions[i * batch : (i + 1) * batch])


def ours(folder, precision, batch, steps):
    """Seconds of each step by the script, and the first loss."""
    import experiment
    from dataset.pipelines import PairBatch
    from microsoft_clap_train import CLAPBrain

    hparams, run_opts = experiment.start(
        [
            HPARAMS,
            f"--text_model={folder}/text_model",
            "--clap={text_pretrained: False}",
            f"--clap_ckpt_path={folder}/clap.pth",
            f"--output_folder={folder}/{precision}",
            f"--precision={precision}",
        ]
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

    data = batches_of(folder, batch, WARM_UP + steps, hparams["tokenizer"])
    data = [pairs(*item) for item in data]
    brain.modules.eval()
    with torch.no_grad(), brain.training_ctx:
        outputs = brain.compute_forward(data[0], None)
        loss = brain.compute_objectives(outputs, data[0], None).item()
    brain.modules.train()

    def step(pairs):
        brain.step += 1
        brain.fit_batch(pairs)

    return timed(step, data) | {"loss": loss}


def ordinary(folder, precision, batch, steps):
    """The baseline of the docstring."""
    clap = ordinary_model(folder).to(device())
    optimizer = torch.optim.Adam(clap.parameters(), lr=1e-4)

    def loss_of(wavs, tokens):
        is_gpu = device() == "cuda"
        with torch.autocast(device(), torch.bfloat16, is_gpu):
            tokens = {k: v.to(device()) for k, v in tokens.items()}
            audio, text, scale = clap(wavs.to(device()), tokens)
        logits = scale * audio @ text.T
        labels = torch.arange(len(wavs), device=device())
        losses = [
            torch.nn.functional.cross_entropy(x, labels)
            for x in (logits, logits.T)
        ]
        return sum(losses) / 2

    tokenize = padding_tokenizer(folder)
    data = list(batches_of(folder, batch, WARM_UP + steps, tokenize))
    clap.eval()
    with torch.no_grad():
        loss = loss_of(*data[0]).item()
    clap.train()

    def step(item):
        optimizer.zero_grad()
        loss_of(*item).backward()
        optimizer.step()

    return timed(step, data) | {"loss": loss}


def timed(step, data):
    """Median seconds of the steps after the warm-up, and peak memory."""
    times = []
    for item in data:
        begin = synchronized()
        step(item)
        times.append(synchronized() - begin)
    return {
        "seconds": statistics.median(times[WARM_UP:]),
        "memory": peak_memory(),
    }


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
        run = {"ours": ours, "ordinary": ordinary}[args.side]
        sizes = args.batch, args.steps
        print(json.dumps(run(args.folder, args.precision, *sizes)))
        return None
    sizes = ["--batch", str(args.batch), "--steps", str(args.steps)]
    runs, sides = {}, worthwhile(SIDES)
    with tempfile.TemporaryDirectory() as folder:
        make_world(folder, args.batch * (WARM_UP + args.steps), 0)
        for side, (name, precision, environment) in sides.items():
            flags = ["--side", name, "--folder", folder]
            flags += ["--precision", precision, *sizes]
            runs[side] = in_process("benchmarks.step", flags, environment)
        flop = {
            precision: flop_of_a_step(folder, args.batch, precision)
            for _, precision, _ in sides.values()
        }
    rows = []
    ways = [runs[side] for side in list(sides)[:2]]
    for side, (name, precision, _) in sides.items():
        run = runs[side]
        speed = flop[precision] / run["seconds"] / product_speed(precision)
        is_ours = name == "ours"
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
    each = (f"{v / 1e12:.2f} TFLOP a step, {k}" for k, v in flop.items())
    print(machine(), *each, sep="; ")
    show(rows)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
