r"""Train a student on curated pairs, with a teacher's soft labels.

    python softclap_train.py hparams/insper/softclap_train.yaml \
        --train_csv_path=results/teacher/.../save/train_raw.csv \
        --curation_csv=results/embeddings/save/..._curation.csv \
        --curation_prob=0.5 --ssl_checkpoints_dir=results/teacher/.../save

The student starts from the teacher's weights. Its batches are curated pairs,
with the probability curation_prob, or the teacher's own pairs again (replay).
Each row of its targets is (1 - softclap_beta) times the one-hot, or what takes
its place where clips or captions repeat, plus softclap_beta times a softmax of
the teacher's similarities at softclap_tau: between the audio clips of the batch
for audio-to-text, between its captions for text-to-audio. So clips that sound
alike are less of a wrong answer to each other's captions. The method is that of
arXiv 2305.01864.

The temperature 0.1 is about that at which training starts (0.07, as in CLIP):
of a batch of 128, a clip of similarity 0.9 to another weighs e^-1 of that one
itself, one of 0.5 e^-5, and all others, at 0, five thousandths together. A
lower one approaches hard labels, a higher one gives weight to clips that have
nothing in common.

Validation is that of microsoft_clap_train.py: the loss with hard labels, or
zero-shot accuracy with --use_zs_loader.
"""

import logging
import sys

import speechbrain as sb
import torch

import experiment
from microsoft_clap_train import CLAPBrain, train
from models.losses import soft_targets
from models.weights import load_weights, state_hash

logger = logging.getLogger(__name__)


class SoftCLAPBrain(CLAPBrain):
    """Contrastive training on targets that follow a frozen teacher in part.

    `main` sets `teacher`, which is no part of `modules`: it is not trained,
    not wrapped for several processes, and not in the student's checkpoints.
    """

    settings = (*CLAPBrain.settings, "softclap_beta", "softclap_tau")

    def run_settings(self):
        """See `CLAPBrain.run_settings`; the teacher is one of them."""
        teacher = state_hash(self.teacher.state_dict())
        return super().run_settings() | {"teacher": teacher[:12]}

    def targets(self, batch, stage, gather):
        """The hard targets and, in training, the teacher's view of the pairs.

        See `CLAPBrain.targets`.
        """
        hard = super().targets(batch, stage, gather)
        if stage != sb.Stage.TRAIN:
            return hard
        with torch.no_grad():
            embeddings = self.teacher(batch.wavs, batch.tokens)[:2]
        return tuple(
            soft_targets(
                targets,
                own,
                gather(own),
                self.hparams.softclap_beta,
                self.hparams.softclap_tau,
            )
            for targets, own in zip(hard, embeddings)
        )


def load_teacher(hparams):
    """The frozen teacher, in eval mode, with the weights that flags name.

    Arguments
    ---------
    hparams : dict
        `teacher` and where its weights are.

    Returns
    -------
    models.clap.CLAP

    Raises
    ------
    FileNotFoundError, ValueError
        As `models.weights.load_weights`.
    """
    if hparams["teacher_checkpoints_dir"]:
        source = {
            "ssl_checkpoints_dir": hparams["teacher_checkpoints_dir"],
            "ssl_checkpointer": hparams["teacher_checkpointer"],
        }
    elif hparams["clap_ckpt_path"]:
        source = {"clap_ckpt_path": hparams["clap_ckpt_path"]}
    else:
        source = {
            "ssl_checkpoints_dir": hparams["ssl_checkpoints_dir"],
            "ssl_checkpointer": hparams["ssl_checkpointer"],
        }
    logger.info("The teacher's weights:")
    try:
        load_weights(hparams["teacher"], **source)
    except ValueError as error:
        raise ValueError(
            "The teacher, whose network is the student's unless --teacher says "
            f"otherwise (--teacher='{{width: 32}}'): {error}"
        ) from error
    return hparams["teacher"].eval().requires_grad_(False)


def check_teacher(hparams):
    """Stop with a message if the flags name no teacher, or a wrong one.

    Warns if there is nothing new to learn from.

    Arguments
    ---------
    hparams : dict

    Raises
    ------
    SystemExit
        It names the flag.
    """
    experiment.check_numbers(hparams, ["softclap_beta"], 0, 1)
    experiment.check_numbers(hparams, ["softclap_tau"], 0)
    if not hparams["softclap_tau"] > 0:
        raise SystemExit(
            f"--softclap_tau={hparams['softclap_tau']}: give a number over 0"
        )
    if (
        hparams["teacher_checkpointer"] is not None
        and not hparams["teacher_checkpoints_dir"]
    ):
        raise SystemExit(
            "--teacher_checkpointer chooses a checkpoint of "
            "--teacher_checkpoints_dir, which is not given"
        )
    if not (
        hparams["teacher_checkpoints_dir"]
        or hparams["clap_ckpt_path"]
        or hparams["ssl_checkpoints_dir"]
    ):
        raise SystemExit(
            "Name the teacher: --teacher_checkpoints_dir=<run>/save, or "
            "--ssl_checkpoints_dir or --clap_ckpt_path, from which the student "
            "starts too"
        )
    if not hparams["curation_prob"]:
        logger.warning(
            "--curation_prob=%s: the student is trained without curated pairs",
            hparams["curation_prob"],
        )
    student, teacher = hparams["clap"], hparams["teacher"]
    if student.sample_rate != teacher.sample_rate:
        raise SystemExit(
            f"The teacher hears {teacher.sample_rate} Hz and the student "
            f"{student.sample_rate} Hz: they must see the same crops"
        )
    if teacher.text_model != student.text_model:
        tokenizer = hparams["tokenizer"]
        own = type(tokenizer)(teacher.text_model, tokenizer.text_max_length)
        if own.settings()["tokenizer"] != tokenizer.settings()["tokenizer"]:
            raise SystemExit(
                f"The teacher's text model, {teacher.text_model}, has other "
                f"tokens than the student's, {student.text_model}: captions "
                "are made tokens once, for both"
            )


def main(argv):
    """Train as the command line says."""
    hparams, run_opts = experiment.start(argv, needs="teacher")
    check_teacher(hparams)
    brain = SoftCLAPBrain(
        modules={"clap": hparams["clap"]},
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    brain.teacher = load_teacher(hparams).to(brain.device)
    train(brain)
    experiment.finish()


if __name__ == "__main__":
    main(sys.argv[1:])
