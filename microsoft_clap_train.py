r"""Train a CLAP model on pairs of audio and captions.

    python microsoft_clap_train.py hparams/insper/microsoft_clap_train.yaml \
        --data_annot_folder=DATA --pann_ckpt_path='Cnn14_mAP=0.431.pth'

DATA holds AudioCaps, Clotho, MACS, FSD50K in their official layouts, or
`*_index.tsv` files; or give pairs as --train_csv_path=pairs.csv. On several
GPUs, `torchrun --nproc_per_node=N` instead of `python`. A stopped run goes on
by the command that it prints at its start.

The loss is CLIP's symmetric one (arXiv 2103.00020, Figure 3), with CLAP's
encoders (arXiv 2206.04769).
"""

import contextlib
import hashlib
import importlib
import json
import logging
import math
import os
import re
import sys
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import speechbrain as sb
import torch
from matplotlib.figure import Figure
from speechbrain.dataio.dataloader import SaveableDataLoader
from speechbrain.nnet.schedulers import update_learning_rate
from speechbrain.utils import train_logger
from speechbrain.utils.checkpoints import (
    ckpt_recency,
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.distributed import (
    if_main_process,
    main_process_only,
    run_on_main,
)
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader

import experiment
from dataset.manifest import probe_audio, read_pairs
from dataset.mixing import MixedBatchSampler
from dataset.pipelines import (
    PairCollator,
    PairDataset,
    stacker,
    window_loader,
)
from files import alone, write_csv, write_json, written_whole
from models.losses import (
    contrastive_loss,
    contrastive_targets,
    gather_with_gradient,
)
from models.retrieval import recalls
from models.weights import SETTINGS_FILE, find_checkpoint
from models.zeroshot import class_embeddings, class_scores, clip_embeddings

logger = logging.getLogger(__name__)

# Of the validation set, with which its loss is hardly more than chance.
_FEW_RECORDINGS = 20


@register_checkpoint_hooks
class Unreadable(dict):
    """Audio files that could not be read, path -> why; part of checkpoints."""

    @mark_as_saver
    def save(self, path):
        """Write them as JSON."""
        write_json(self, path)

    @mark_as_loader
    def load(self, path, end_of_epoch):
        """Add those of a checkpoint."""
        with open(path, encoding="utf-8") as file:
            self.update(json.load(file))


class CLAPBrain(sb.Brain):
    """Contrastive training with validation by loss or zero-shot accuracy.

    `train` sets what it needs besides the constructor's arguments.
    """

    # Flags that a run keeps to its end.
    settings = ("seed", "batch_size", "grad_accumulation_factor")
    settings += ("base_lr", "final_lr", "lr_schedule", "warmup_steps")
    settings += ("max_grad_norm", "skip_nonfinite_grads")
    settings += ("curation_prob", "short_audio", "use_zs_loader")
    # And what accuracies depend on, by which the best checkpoint is chosen.
    zs_settings = ("zs_dataset", "zs_labels_path", "zs_valid_folds")
    zs_settings += ("text_prompt",)
    plateau = ("factor", "patience", "dont_halve_until_epoch")

    def run_settings(self):
        """What a run keeps to its end: name -> number, text or list."""
        names = self.settings
        if self.hparams.use_zs_loader:
            names += self.zs_settings
        settings = {name: getattr(self.hparams, name) for name in names}
        _, world_size = experiment.rank_and_world_size()
        pairs = self.hparams.batch_size * world_size
        optimizer = self.hparams.opt_class
        plateau = vars(self.hparams.lr_plateau)
        return settings | {
            "step": f"{pairs} pairs",
            "precision": self.precision,
            "opt_class": optimizer.func.__name__,
            "opt_options": {
                k: v for k, v in optimizer.keywords.items() if k != "lr"
            },
            "lr_plateau": {name: plateau[name] for name in self.plateau},
            "teacher": None,  # of soft labels
            **self.hparams.tokenizer.settings(),
        }

    def compute_forward(self, batch, stage):
        """PairBatch -> audio and text embeddings (batch, d), scale."""
        self.note_unreadable(batch.unreadable, self.unreadable, self.num_clips)
        batch.to(self.device)
        return self.modules.clap(batch.wavs, batch.tokens)

    def compute_objectives(self, predictions, batch, stage):
        """Contrastive loss; in training, negatives come from all processes.

        Raises
        ------
        RuntimeError
            The loss of a validation batch is not finite.
        """
        audio, text, scale = predictions
        gather = gather_with_gradient if stage == sb.Stage.TRAIN else _itself
        audio_targets, text_targets = self.targets(batch, stage, gather)
        loss = contrastive_loss(
            audio,
            text,
            gather(audio),
            gather(text),
            # DataParallel returns the scale once for each of its replicas.
            scale.mean(),
            audio_targets,
            text_targets,
        )
        # SpeechBrain leaves such losses out of the mean: the broken model
        # would have a loss of 0, and take the place of the best checkpoint.
        if stage == sb.Stage.VALID and not loss.isfinite():
            raise RuntimeError(
                f"The validation loss is {loss.item()}: the network, or the "
                "statistics of its batch norms, are not finite, as after an "
                "overflow in fp16. Nothing of this epoch was saved. Start anew "
                "with --ssl_checkpoints_dir="
                f"{self.checkpointer.checkpoints_dir} or without it, and a "
                "lower --base_lr, or --precision=bf16"
            )
        if stage == sb.Stage.VALID:
            self.valid_pairs.append(
                (audio, text, batch.clip_ids, batch.caption_ids)
            )
        return loss

    def targets(self, batch, stage, gather):
        """What the similarities should be.

        Arguments
        ---------
        batch : dataset.pipelines.PairBatch
            This process's pairs, on the device.
        stage : speechbrain.Stage
            Training or validation.
        gather : callable
            From this process's rows to those of all processes.

        Returns
        -------
        tuple of torch.Tensor
            Distributions over texts for each audio, and over audios for each
            text; (batch, gathered batch) each.
        """
        targets = contrastive_targets(
            batch.clip_ids,
            batch.caption_ids,
            gather(batch.clip_ids),
            gather(batch.caption_ids),
        )
        return targets, targets

    def on_fit_start(self):
        """Resumes; says so if there is nothing left to do."""
        super().on_fit_start()
        epochs = self.hparams.epoch_counter.current
        if epochs >= self.hparams.number_of_epochs:
            logger.warning(
                "%s holds a complete run of %d epochs: nothing is trained. "
                "Raise --number_of_epochs, or give another --output_folder",
                self.hparams.output_folder,
                epochs,
            )
        elif self.hparams.lr_schedule == "cosine" and self.optimizer_step:
            before, now = self.optimizer.param_groups[0]["lr"], self.cosine_lr()
            past_warm_up = self.optimizer_step > self.hparams.warmup_steps
            if past_warm_up and now > 1.01 * before:
                logger.warning(
                    "The cosine is now that of %d epochs: the learning rate "
                    "goes from %.3g back to %.3g",
                    self.hparams.number_of_epochs,
                    before,
                    now,
                )

    def on_fit_batch_start(self, batch, should_step):
        """Seed this step's dropout, and set its learning rate."""
        # A function of the step, so that a resumed run draws the same masks.
        epoch = self.hparams.epoch_counter.current
        rank = self.train_sampler.rank
        seeds = (self.hparams.seed, epoch, self.step, rank)
        seed = np.random.SeedSequence(seeds).generate_state(1)[0]
        torch.manual_seed(int(seed))
        if self.hparams.lr_schedule == "cosine":
            for group in self.optimizer.param_groups:
                group["lr"] = self.cosine_lr()

    def cosine_lr(self):
        """Learning rate of the current step: linear warm-up, then cosine."""
        first, last = self.hparams.base_lr, self.hparams.final_lr
        an_epoch = len(self.train_sampler) // self.grad_accumulation_factor
        total = an_epoch * self.hparams.number_of_epochs
        warmup = min(self.hparams.warmup_steps, total - 1)
        if self.optimizer_step < warmup:
            return first * (self.optimizer_step + 1) / warmup
        done = min((self.optimizer_step - warmup) / (total - warmup), 1.0)
        return last + (first - last) * (1 + math.cos(math.pi * done)) / 2

    def check_gradients(self):
        """As SpeechBrain's, which takes long, if there is anything to find."""
        gradients = (p.grad for p in self.modules.parameters())
        # One number that is not finite shows in the norm of all.
        norm = get_total_norm(g for g in gradients if g is not None)
        if not norm.isfinite():
            super().check_gradients()

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Hold the scale in range."""
        self.hparams.clap.clamp_logit_scale()

    def note_unreadable(self, reasons, known, num_clips):
        """Report unreadable audio once, and stop when it is too much.

        Arguments
        ---------
        reasons : dict
            Path -> why it cannot be read.
        known : dict
            The same of all files before; it is added to.
        num_clips : int
            How many files there are.

        Raises
        ------
        RuntimeError
            They are a larger fraction than max_bad_audio.
        """
        for path in reasons.keys() - known.keys():
            logger.warning("Skipping %s: %s", path, reasons[path])
        known |= reasons
        if len(known) > self.hparams.max_bad_audio * num_clips:
            raise RuntimeError(
                f"{len(known)} of {num_clips} audio files cannot be read, more "
                "than the fraction --max_bad_audio="
                f"{self.hparams.max_bad_audio}. They are named above: mend or "
                "remove them, or allow more."
            )

    def _wrap_distributed(self):
        if not (self.distributed_launch and self.device_type == "cpu"):
            return super()._wrap_distributed()
        # SpeechBrain synchronises batch norm, which torch does on GPUs only.
        self.modules["clap"] = DistributedDataParallel(self.modules["clap"])

    def _should_save_intra_epoch_ckpt(self, *args):
        # Gradients that wait for an accumulation's end are not saved.
        return (
            super()._should_save_intra_epoch_ckpt(*args)
            and self.step % self.grad_accumulation_factor == 0
        )

    def _save_intra_epoch_ckpt(self):
        # Each process goes on with what the checkpoint of the first one says.
        self.avg_train_loss = _mean_of_all(self.avg_train_loss)
        super()._save_intra_epoch_ckpt()

    def on_stage_start(self, stage, epoch=None):
        """Start the figures of a stage."""
        if stage == sb.Stage.TRAIN:
            self.first_step, self.start_time = self.step, time.perf_counter()
        else:
            self.valid_pairs = []

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Collect the training's figures; after validation, end the epoch."""
        if stage == sb.Stage.TRAIN:
            seconds = time.perf_counter() - self.start_time
            pairs = self.train_sampler.global_batch_size
            steps = (epoch - 1) * len(self.train_sampler) + self.step
            of_each = experiment.of_all_processes(dict(self.unreadable))
            for unreadable in of_each:
                self.note_unreadable(
                    unreadable, self.unreadable, self.num_clips
                )
            self.train_stats = {
                "loss": _mean_of_all(float(stage_loss)),
                # Of no steps where the last checkpoint was at the last one.
                "clips_per_second": (self.step - self.first_step or math.nan)
                * pairs
                / seconds,
                "data_points": steps * pairs,
                "unreadable": len(self.unreadable),
            }
        else:
            self.end_epoch(epoch, float(stage_loss))

    def end_epoch(self, epoch, valid_loss):
        """Anneal the learning rate, log the epoch and save a checkpoint."""
        lr = self.optimizer.param_groups[0]["lr"]
        if self.hparams.lr_schedule == "plateau":
            _, next_lr = self.hparams.lr_plateau(
                [self.optimizer], epoch, valid_loss
            )
            update_learning_rate(self.optimizer, next_lr)
        stats = {"loss": valid_loss}
        if self.zeroshot_set is not None:
            stats["acc"] = self.zeroshot_accuracy()
        figures = dict(stats)
        if if_main_process():  # which alone logs them
            figures |= recalls(*map(torch.cat, zip(*self.valid_pairs)))
        self.valid_pairs = []
        scale = float(self.hparams.clap.logit_scale.exp())
        meta = {"epoch": epoch, "lr": lr, "logit_scale": scale}
        for stats_logger in self.loggers:
            stats_logger.log_stats(meta, self.train_stats, figures)
        self.checkpointer.save_checkpoint(meta={"epoch": epoch, **stats})
        self.keep_best()

    def keep_best(self):
        """Delete all checkpoints but the best, and the last, to resume."""
        by_accuracy = self.zeroshot_set is not None
        self.checkpointer.delete_checkpoints(
            num_to_keep=self.hparams.num_ckpt_keep,
            max_keys=["acc"] if by_accuracy else [],
            min_keys=[] if by_accuracy else ["loss"],
            importance_keys=[ckpt_recency],
        )

    @torch.no_grad()
    def zeroshot_accuracy(self):
        """Accuracy on the validation folds of the zero-shot data set.

        Raises
        ------
        RuntimeError
            None of the clips can be read, or too many cannot be.
        """
        loader, true_classes, texts = self.zeroshot_set
        paths = loader.dataset.wav_paths.to_pylist()
        clap, correct, count = self.hparams.clap, 0, 0
        with self.evaluation_ctx:
            classes = class_embeddings(
                clap,
                self.hparams.tokenizer,
                texts,
                self.hparams.text_prompt,
            )
            for batch in loader:
                self.note_unreadable(
                    {paths[row]: why for row, why in batch.unreadable.items()},
                    self.zeroshot_unreadable,
                    len(paths),
                )
                clips = clip_embeddings(clap, batch.windows, batch.counts)
                scores = class_scores(clips, classes)
                guesses = scores.argmax(dim=1).cpu().numpy()
                correct += int((guesses == true_classes[batch.rows]).sum())
                count += len(batch.rows)
        if not count:
            raise RuntimeError(
                f"None of the {len(paths)} clips of --data_zs_folder can be "
                "read: there is no zero-shot accuracy to choose a checkpoint by"
            )
        return correct / count


class EpochLogger(train_logger.FileTrainLogger):
    """A line for each epoch; one that is run again replaces its line."""

    @main_process_only
    def log_stats(self, stats_meta, *args, **kwargs):
        """See `speechbrain.utils.train_logger.FileTrainLogger`."""
        with contextlib.suppress(FileNotFoundError):
            with open(self.save_file, encoding="utf-8") as file:
                lines = file.readlines()
            with written_whole(self.save_file) as file:
                for line in lines:
                    found = re.match(r"epoch: (\d+), .*\n", line)
                    if found and int(found[1]) < stats_meta["epoch"]:
                        file.write(line.encode())
        super().log_stats(stats_meta, *args, **kwargs)


class HistoryLogger(train_logger.TrainLogger):
    """Keeps the figures of all epochs as a table and a picture.

    Arguments
    ---------
    folder : str
        `train_history.csv` and `train_history.png` are written there.
    """

    def __init__(self, folder):
        self.path = os.path.join(folder, "train_history")

    @main_process_only
    def log_stats(
        self,
        stats_meta,
        train_stats=None,
        valid_stats=None,
        test_stats=None,
        verbose=False,
    ):
        """Add an epoch, or put it in place of one that was run before."""
        row = dict(stats_meta)
        row |= {f"train_{k}": v for k, v in (train_stats or {}).items()}
        row |= {f"valid_{k}": v for k, v in (valid_stats or {}).items()}
        history = pd.DataFrame([row])
        if os.path.exists(f"{self.path}.csv"):
            before = pd.read_csv(f"{self.path}.csv")
            before = before[before["epoch"] < row["epoch"]]
            history = pd.concat([before, history], ignore_index=True)
        write_csv(history, f"{self.path}.csv")
        self.draw(history)

    def draw(self, history):
        """Losses, accuracy, learning rate and scale over the epochs."""
        figure = Figure(figsize=(13, 3.6), layout="constrained")
        panels = (
            [c for c in history if c.endswith("_loss")],
            [c for c in history if c.endswith(("_acc", "@1", "@10"))],
            ["lr"],
            ["logit_scale"],
        )
        for axes, columns in zip(figure.subplots(1, 4), panels):
            for column in columns:
                # Of recalls there are only those of the validation.
                label = re.sub("valid_(?=.*@)", "", column)
                axes.plot(history["epoch"], history[column], label=label)
            axes.set_xlabel("epoch")
            # Above, where it hides no line.
            axes.legend(
                loc="lower left",
                bbox_to_anchor=(0, 1),
                ncols=2,
                handlelength=1,
                fontsize="small",
                frameon=False,
            )
        with written_whole(f"{self.path}.png") as file:
            figure.savefig(file, format="png", dpi=120)


def _itself(rows):
    """Validation compares with the pairs of the same process only."""
    return rows


def _mean_of_all(loss):
    """Mean over processes, which have the same number of batches."""
    losses = experiment.of_all_processes(loss)
    return sum(losses) / len(losses)


def train(brain):
    """Prepare the data, load the weights to start from, and fit.

    Arguments
    ---------
    brain : CLAPBrain
        Fresh from its constructor.

    Raises
    ------
    OSError
        Another process trains in the same folder.
    """
    check_flags(brain.hparams)
    lock = os.path.join(brain.hparams.save_folder, "train.lock")
    with alone(lock) if if_main_process() else contextlib.nullcontext():
        brain.checkpointer.remove_partial()
        loaders = prepare(brain)
        # What reading the manifests took.
        pa.default_memory_pool().release_unused()
        brain.fit(brain.hparams.epoch_counter, *loaders)
    if brain.unreadable:
        logger.warning("%d audio files were skipped", len(brain.unreadable))
    # With --debug, a temporary folder; with --test_only, perhaps nothing.
    if brain.checkpointer.find_checkpoint() is not None:
        logger.info(
            "The best checkpoint, by validation %s, is %s; later commands take "
            "the last one with --ssl_checkpointer=latest",
            "loss" if brain.zeroshot_set is None else "accuracy",
            find_checkpoint(brain.checkpointer.checkpoints_dir),
        )


def prepare(brain):
    """All that comes before the first step.

    Arguments
    ---------
    brain : CLAPBrain
        It is given what it needs besides.

    Returns
    -------
    tuple of torch.utils.data.DataLoader
        Of the training and the validation pairs.
    """
    hparams = brain.hparams
    is_new = brain.checkpointer.find_checkpoint() is None
    if is_new:
        if not hparams.load_weights():
            logger.warning(
                "No weights are named, by --pann_ckpt_path, --clap_ckpt_path "
                "or --ssl_checkpoints_dir: the audio encoder starts at random"
            )
    else:
        logger.info(
            "%s holds a run already, which is gone on with: weights that flags "
            "name are not loaded",
            hparams.output_folder,
        )
        # Before the time that the pairs take; they are checked after it.
        record_settings(brain, [], is_new)
    curated = {}
    if hparams.curation_prob:
        curated = {
            "curation_csv": hparams.curation_csv,
            "data_curation_folder": hparams.data_curation_folder,
        }
    zeroshot = None
    if hparams.use_zs_loader:
        zeroshot = hparams.prepare_zeroshot()
        zeroshot = zeroshot.of_folds(hparams.zs_valid_folds, "zs_valid_folds")
    run_on_main(hparams.prepare_captions, kwargs=curated)
    names = ["train_raw", *(["curated_raw"] if curated else []), "valid_raw"]
    manifests = [
        read_pairs(os.path.join(hparams.save_folder, f"{name}.csv"))
        for name in names
    ]
    train_loader = make_train_loader(brain, manifests[:-1])
    brain.train_sampler = train_loader.batch_sampler
    record_settings(brain, names, is_new)
    run_on_main(hparams.write_records)
    brain.unreadable, brain.zeroshot_unreadable = Unreadable(), {}
    # Optional: runs of earlier versions have none.
    brain.checkpointer.add_recoverable(
        "unreadable", brain.unreadable, optional_load=True
    )
    brain.num_clips = pd.concat(manifests)["wav_path"].nunique()
    brain.zeroshot_set = None
    if zeroshot is not None:
        brain.zeroshot_set = make_zeroshot_set(brain, zeroshot, manifests[:-1])
    # A process may have been killed before it had deleted the others.
    brain.keep_best()
    # With --debug, an epoch is a few batches: no figures of a run.
    brain.loggers = [] if brain.debug else make_loggers(hparams)
    return train_loader, make_valid_loader(brain, manifests[-1])


def record_settings(brain, names, is_new):
    """Write down what a run began with, or refuse to go on with other ones.

    Arguments
    ---------
    brain : CLAPBrain
    names : list of str
        Manifests in the save folder, as far as they are of this command.
    is_new : bool
        Whether there is no checkpoint to go on from.

    Raises
    ------
    ValueError
        What differs is named.
    """
    hparams, settings = brain.hparams, brain.run_settings()
    for name in names:
        with open(f"{hparams.save_folder}/{name}.csv", "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        settings[f"{name}.csv"] = digest[:12]
    path = os.path.join(brain.checkpointer.checkpoints_dir, SETTINGS_FILE)
    record = {"training": settings, "network": hparams.clap.settings}
    # As it will be read: tuples are lists there.
    record = json.loads(json.dumps(record))
    if is_new:
        run_on_main(write_json, args=[record, path])
        return
    with open(path, encoding="utf-8") as file:
        began = json.load(file)
    # What only one of them has is of another version of this code, or goes with
    # a setting that both have.
    different = [
        f"{name} ({began[part][name]} -> {now[name]})"
        for part, now in record.items()
        for name in now
        if began[part].get(name, now[name]) != now[name]
    ]
    if different:
        raise ValueError(
            f"{hparams.output_folder} began with other settings, and a run "
            f"keeps them: {', '.join(different)}. Give the same again, or "
            "start a new run from this one's weights: another --output_folder, "
            f"and --ssl_checkpoints_dir={hparams.save_folder}"
        )


def check_flags(hparams):
    """Raise for flags that contradict each other; warn of unused ones."""
    experiment.check_choice(vars(hparams), "lr_schedule", ("plateau", "cosine"))
    experiment.check_prompt(vars(hparams))
    counts = ["batch_size", "number_of_epochs", "grad_accumulation_factor"]
    counts.append("num_ckpt_keep")
    experiment.check_numbers(vars(hparams), counts, 1, whole=True)
    _, world_size = experiment.rank_and_world_size()
    if hparams.batch_size * world_size < 2:
        raise SystemExit(
            "--batch_size=1: a pair is told from the others of its batch, and "
            "there are none. Give 2 or more"
        )
    counts = ["num_workers", "warmup_steps"]
    experiment.check_numbers(vars(hparams), counts, 0, whole=True)
    experiment.check_numbers(vars(hparams), ["base_lr"], 0)
    experiment.check_numbers(vars(hparams), ["final_lr"], 0, hparams.base_lr)
    fractions = ["curation_prob", "max_bad_audio"]
    experiment.check_numbers(vars(hparams), fractions, 0, 1)
    check_optimizer(hparams)
    for package in ("tensorboard", "wandb"):
        if getattr(hparams, f"use_{package}"):
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise SystemExit(
                    f"--use_{package} needs that package: pip install {package}"
                ) from error
    # A negative one would turn gradients round.
    if not hparams.max_grad_norm > 0:
        raise SystemExit(
            f"--max_grad_norm={hparams.max_grad_norm}: give a number over 0, "
            "and a large one, as 1e9, to leave gradients as they are"
        )
    for switch, data in (
        ("curation_prob", "curation_csv"),
        ("use_zs_loader", "data_zs_folder"),
    ):
        on, path = getattr(hparams, switch), getattr(hparams, data)
        if on and not path:
            raise SystemExit(f"--{switch}={on} needs --{data}")
        if path and not on:
            logger.warning("--%s is not used while --%s=%s", data, switch, on)


def check_optimizer(hparams):
    """Stop if an optimizer or a plateau scheduler cannot be made so.

    Raises
    ------
    SystemExit
        It names the flag.
    """
    weights = [torch.nn.Parameter(torch.zeros(1))]
    try:
        optimizer = hparams.opt_class(weights)
    except (TypeError, ValueError) as error:
        raise SystemExit(f"--opt_class: {error}") from error
    if optimizer.defaults["lr"] != hparams.base_lr:
        raise SystemExit(
            "--opt_class: give the learning rate as --base_lr, which schedules "
            "begin with"
        )
    plateau = {
        f"lr_plateau={{{name}}}": value
        for name, value in vars(hparams.lr_plateau).items()
    }
    counts = ["lr_plateau={patience}", "lr_plateau={dont_halve_until_epoch}"]
    experiment.check_numbers(plateau, counts, 0, whole=True)
    experiment.check_numbers(plateau, ["lr_plateau={factor}"], 0, 1)


def loader_options(brain):
    """What all loaders of a run have in common."""
    num_workers = brain.hparams.num_workers
    return {
        "num_workers": num_workers,
        # Forking a process of this size anew would cost seconds an epoch.
        "persistent_workers": num_workers > 0,
        "pin_memory": brain.device_type == "cuda",
    }


def pair_collator(hparams):
    """What makes the batches of a loader."""
    stack = stacker(hparams.num_workers, hparams.batch_size, hparams.reader)
    return PairCollator(hparams.tokenizer, stack)


def make_train_loader(brain, manifests):
    """Loader of mixed batches, registered for checkpoints within an epoch.

    Arguments
    ---------
    brain : CLAPBrain
        Whose checkpointer remembers the loader's position.
    manifests : list of pandas.DataFrame
        The paired data and, where used, the curated data.

    Returns
    -------
    speechbrain.dataio.dataloader.SaveableDataLoader
        Its batches are `dataset.pipelines.PairBatch`es.

    Raises
    ------
    ValueError
        There are too few pairs for a batch, or batches for a step.
    """
    hparams = brain.hparams
    sizes = [len(manifest) for manifest in manifests] + [0]
    rank, world_size = experiment.rank_and_world_size()
    sampler = MixedBatchSampler(
        num_pairs=sizes[0],
        num_curated=sizes[1],
        batch_size=hparams.batch_size,
        curation_prob=hparams.curation_prob,
        seed=hparams.seed,
        rank=rank,
        world_size=world_size,
    )
    steps, rest = divmod(len(sampler), hparams.grad_accumulation_factor)
    if not steps:
        raise ValueError(
            f"An epoch has {len(sampler)} batches, fewer than "
            f"--grad_accumulation_factor={hparams.grad_accumulation_factor} "
            "that make a step: give a smaller one, or a smaller batch_size"
        )
    total = steps * hparams.number_of_epochs
    logger.info(
        "%d epochs of %d steps of %d pairs: %d steps",
        hparams.number_of_epochs,
        steps,
        sampler.global_batch_size * hparams.grad_accumulation_factor,
        total,
    )
    if hparams.curation_prob:
        logger.info(
            "%g of the batches are curated, of %d pairs",
            hparams.curation_prob,
            sizes[1],
        )
    if hparams.lr_schedule == "cosine" and hparams.warmup_steps >= total:
        logger.warning(
            "The run has %d steps, which --warmup_steps=%d takes all: the "
            "learning rate will rise to its end, and never fall. Give fewer",
            total,
            hparams.warmup_steps,
        )
    if rest:
        logger.warning(
            "The last %d of the %d batches of an epoch fill no step of "
            "--grad_accumulation_factor=%d: their gradients are not used",
            rest,
            len(sampler),
            hparams.grad_accumulation_factor,
        )
    loader = SaveableDataLoader(
        PairDataset(manifests, hparams.reader, hparams.seed),
        batch_sampler=sampler,
        collate_fn=pair_collator(hparams),
        **loader_options(brain),
    )
    brain.checkpointer.add_recoverable("dataloader-TRAIN", loader)
    return loader


def make_valid_loader(brain, manifest):
    """Loader of the validation pairs, in their order.

    Arguments
    ---------
    brain : CLAPBrain
    manifest : pandas.DataFrame
        The pairs.

    Returns
    -------
    torch.utils.data.DataLoader
    """
    hparams, recordings = brain.hparams, manifest["wav_path"].nunique()
    if recordings < _FEW_RECORDINGS and not hparams.use_zs_loader:
        logger.warning(
            "The validation set has %d recordings, whose loss tells little of "
            "which checkpoint is the best: raise --valid_pct, choose by "
            "accuracy with --use_zs_loader, or take the latest",
            recordings,
        )
    # As equal as can be: among fewer pairs the loss is lower, and SpeechBrain's
    # mean counts all batches alike.
    count = -(-len(manifest) // hparams.batch_size)
    batches = np.array_split(np.arange(len(manifest)), count)
    return DataLoader(
        PairDataset([manifest], hparams.reader, hparams.seed),
        batch_sampler=[batch.tolist() for batch in batches],
        collate_fn=pair_collator(hparams),
        **loader_options(brain),
    )


def make_zeroshot_set(brain, data, manifests):
    """The validation folds of the zero-shot data set.

    Arguments
    ---------
    brain : CLAPBrain
    data : dataset.prepare_zeroshot.ZeroShotSet
        These folds.
    manifests : list of pandas.DataFrame
        What is trained on, to warn if it has the same recordings.

    Returns
    -------
    tuple
        Loader of `dataset.pipelines.WindowBatch`es, (clips,) indices of the
        true classes, and the names of the classes.
    """
    hparams, paths = brain.hparams, data.clips["wav_path"]
    # Before an epoch of training, rather than after it.
    _, unreadable = probe_audio(paths, hides_bar=not if_main_process())
    brain.note_unreadable(unreadable, brain.zeroshot_unreadable, len(paths))
    run_on_main(warn_of_trained_on, args=[paths, manifests])
    loader = window_loader(
        paths, hparams.reader, hparams.batch_size, **loader_options(brain)
    )
    return loader, data.true_classes(), data.labels["text"].tolist()


def warn_of_trained_on(paths, manifests):
    """Warn if clips to validate on are among the recordings to train on.

    Arguments
    ---------
    paths : sequence of str
        The clips.
    manifests : list of pandas.DataFrame
        What is trained on.
    """
    trained_on = pd.concat(manifests)["wav_path"].unique()
    trained_on = {os.path.realpath(path) for path in trained_on}
    num_known = sum(os.path.realpath(path) in trained_on for path in paths)
    if num_known:
        logger.warning(
            "%d of the %d clips of --zs_valid_folds are trained on: their "
            "accuracy, by which the checkpoint is chosen, is too high. Train "
            "without them, or give other folds",
            num_known,
            len(paths),
        )


def make_loggers(hparams):
    """The logs that the hyperparameters ask for."""
    folder = hparams.output_folder
    path = os.path.join(folder, "train_log.txt")
    loggers = [
        EpochLogger(path, precision=4),
        HistoryLogger(folder),
    ]
    if hparams.use_tensorboard:
        path = os.path.join(folder, "tensorboard")
        loggers.append(train_logger.TensorboardLogger(path))
    if hparams.use_wandb:
        import wandb  # an extra requirement

        loggers.append(
            train_logger.WandBLogger(
                wandb.init,
                project=hparams.wandb_project,
                name=hparams.experiment_name,
                # So that the same folder goes on with the same run.
                id=hashlib.sha256(os.path.abspath(folder).encode()).hexdigest(),
                dir=folder,
                resume="allow",
            )
        )
    return loggers


def main(argv):
    """Train as the command line says."""
    hparams, run_opts = experiment.start(argv, needs="opt_class")
    if "teacher" in hparams:
        raise SystemExit(
            f"{argv[0]} is of softclap_train.py: give "
            "hparams/insper/microsoft_clap_train.yaml, or a file based on it"
        )
    brain = CLAPBrain(
        modules={"clap": hparams["clap"]},
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    train(brain)
    experiment.finish()


if __name__ == "__main__":
    main(sys.argv[1:])
