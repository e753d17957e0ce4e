"""Every weight file: read into a CLAP model, and written from one.

Three forms are read, and nothing in them is executed:

- PANNs' `Cnn14_mAP=0.431.pth` (zenodo.org/records/3987831): a dictionary with
  the state of CNN14 under `model` and training state beside it;
- Microsoft's `CLAP_weights_2022.pth` (zenodo.org/records/7312125): the state
  of the whole model under `model`;
- a SpeechBrain checkpoint folder, as the training scripts write it.
"""

import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import time

import numpy as np
import torch
from speechbrain.utils.checkpoints import METAFNAME, Checkpointer
from speechbrain.utils.distributed import ddp_barrier, if_main_process

from files import written_whole

logger = logging.getLogger(__name__)

# What the sampler in PANNs' file is pickled with: plain arrays, under the
# names that NumPy 1 and NumPy 2 give their constructors.
_ARRAY_TYPES = [
    (getattr(np._core.multiarray, name), f"numpy.{core}.multiarray.{name}")
    for name in ("_reconstruct", "scalar")
    for core in ("core", "_core")
] + [np.ndarray, np.dtype, *(type(np.dtype(code)) for code in "?bhilqBHILQefd")]

_DFT = "spectrogram_extractor.stft.conv_{}.weight"
_PARTIAL_META = f"{METAFNAME}.partial"

# Beside the checkpoints of a run: what it was trained with.
SETTINGS_FILE = "settings.json"
# Settings of the network that weights depend on, and that neither the shapes of
# its parameters nor its filterbank, which is one of them, tell.
_HEARING = ("sample_rate", "window_size", "hop_size", "duration")


class AtomicCheckpointer(Checkpointer):
    """A Checkpointer whose checkpoints exist whole or not at all.

    SpeechBrain writes a checkpoint's meta file, which makes it one, before
    the weights. Here it is renamed into place after them, so that a process
    killed while saving leaves the previous checkpoint as the latest.
    """

    def remove_partial(self):
        """Remove what a process that was killed left: no whole checkpoint.

        Only where no other process saves any.
        """
        if if_main_process():
            for folder in self.checkpoints_dir.glob("CKPT+*"):
                if not (folder / METAFNAME).exists():
                    shutil.rmtree(folder)

    def _save_checkpoint_metafile(self, fpath, meta_to_include, *args):
        # The latest even if the clock was set back since the one before.
        times = [c.meta["unixtime"] for c in self.list_checkpoints()]
        now = max([time.time(), *(before + 1e-3 for before in times)])
        meta = {"unixtime": now, **meta_to_include}
        partial = fpath.with_name(_PARTIAL_META)
        return super()._save_checkpoint_metafile(partial, meta, *args)

    def save_checkpoint(self, *args, **kwargs):
        """As SpeechBrain's, with the meta file renamed last.

        Raises
        ------
        OSError
            It cannot be written, as on a full disk.
        """
        try:
            checkpoint = super().save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError) as error:
            self.remove_partial()
            free = shutil.disk_usage(self.checkpoints_dir).free / 2**20
            raise OSError(
                f"No checkpoint could be written to {self.checkpoints_dir}, "
                f"where {free:.0f} MiB are free: {error}. If the disk is full, "
                "or a limit reached (a quota, or ulimit -f), make room; "
                "log.txt has the command that goes on from the checkpoint "
                "before"
            ) from error
        if checkpoint is not None:
            partial = checkpoint.path / _PARTIAL_META
            os.replace(partial, checkpoint.path / METAFNAME)
        # Deleting old ones is collective: all processes must see the same.
        ddp_barrier()
        return checkpoint


def load_weights(
    clap,
    tokenizer=None,
    pann_ckpt_path=None,
    clap_ckpt_path=None,
    ssl_checkpoints_dir=None,
    ssl_checkpointer=None,
    recompute_mel=False,
):
    """Load every source that is named, in this order; the last one wins.

    Arguments
    ---------
    clap : models.clap.CLAP
        Model to fill.
    tokenizer : dataset.text.CaptionTokenizer
        What its captions are made tokens with, to warn of another one than in
        the training.
    pann_ckpt_path : str
        PANNs' file, for the audio encoder's base.
    clap_ckpt_path : str
        File in the form of Microsoft's release, for the whole model.
    ssl_checkpoints_dir : str
        Checkpoint folder of a training run, for the whole model.
    ssl_checkpointer : str
        Which of its checkpoints; see `find_checkpoint`.
    recompute_mel : bool
        Put the filterbank for the model's own sample rate in place of the
        loaded one.

    Returns
    -------
    list of dict
        `source`, `path` and `sha256` of each file that was loaded.

    Raises
    ------
    FileNotFoundError
        A source that was named does not exist or holds no weights.
    ValueError
        A source does not fit the model; missing, unexpected and misshapen
        parameters are named, or how the model heard in its training. Or a
        checkpoint is chosen, and no folder of any.
    """
    if ssl_checkpointer and not ssl_checkpoints_dir:
        raise ValueError(
            f"--ssl_checkpointer={ssl_checkpointer} chooses a checkpoint of "
            "--ssl_checkpoints_dir, which is not given"
        )
    computed_melW = clap.audio_encoder.base.logmel_extractor.melW.clone()
    loaded = []
    if pann_ckpt_path:
        state = read_state(pann_ckpt_path, "pann_ckpt_path")
        _load_strict(clap.audio_encoder.base, state, pann_ckpt_path)
        loaded.append(("pann_ckpt_path", pann_ckpt_path))
    if clap_ckpt_path:
        state = read_state(clap_ckpt_path, "clap_ckpt_path")
        _load_strict(clap, state, clap_ckpt_path)
        loaded.append(("clap_ckpt_path", clap_ckpt_path))
    if ssl_checkpoints_dir:
        path = find_checkpoint(ssl_checkpoints_dir, ssl_checkpointer)
        state = read_state(path, "ssl_checkpoints_dir")
        _load_strict(clap, state, path)
        _check_training(clap, tokenizer, path, recompute_mel)
        loaded.append(("ssl_checkpoints_dir", path))
    melW = clap.audio_encoder.base.logmel_extractor.melW
    if recompute_mel:
        melW.copy_(computed_melW)
    # Files of half precision round it.
    elif not torch.allclose(melW, computed_melW, rtol=1e-2, atol=1e-6):
        logger.warning(
            "The mel filterbank of the loaded weights, which is kept, is not "
            "the one for %d Hz, fmin %g and fmax %g: were these others in its "
            "training? For training on, --recompute_mel takes that one instead",
            *(clap.settings[name] for name in ("sample_rate", "fmin", "fmax")),
        )
    return [
        {"source": flag, "path": str(path), "sha256": _sha256(path)}
        for flag, path in loaded
    ]


def find_checkpoint(folder, which=None):
    """The model's file in a SpeechBrain checkpoint folder.

    Arguments
    ---------
    folder : str
        Folder of `CKPT+...` folders, the run that holds it as `save`, or one
        `CKPT+...` folder itself.
    which : str
        "acc" or "loss" for the best by that, "latest", or the name of one
        checkpoint. None takes the best by accuracy, else by loss, else the
        latest: the first of these that any checkpoint has a value for.

    Returns
    -------
    pathlib.Path
        `.../CKPT+.../clap.ckpt`.

    Raises
    ------
    FileNotFoundError
        There is no such folder, no checkpoint in it, or no model in that.
    """
    named = f"The checkpoint folder {folder}"
    folder = pathlib.Path(folder).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"{named} does not exist")
    if (folder / METAFNAME).exists():
        if which not in (None, folder.name):
            raise FileNotFoundError(
                f"{named} is one checkpoint, of which '{which}' cannot be "
                "chosen: give the folder that it is in"
            )
        folder, which = folder.parent, folder.name
    elif (folder / "save").is_dir():
        folder = folder / "save"
    checkpointer = Checkpointer(folder)
    checkpoints = checkpointer.find_checkpoints()
    if not checkpoints:
        raise FileNotFoundError(
            f"{named} holds no checkpoint: no CKPT+*/{METAFNAME} in {folder}"
        )
    for key, extreme in (("acc", "max_key"), ("loss", "min_key")):
        if which not in (None, key):
            continue
        chosen = checkpointer.find_checkpoint(**{extreme: key})
        if chosen is not None:
            why = f"best by {key}, {chosen.meta[key]:.4f}"
            break
    else:
        matching = [c for c in checkpoints if c.path.name == which]
        if which in (None, "latest"):
            chosen, why = checkpoints[0], "the latest"
        elif matching:
            chosen, why = matching[0], "as named"
        else:
            keys = set().union(*(c.meta for c in checkpoints))
            names = [key for key in ("acc", "loss") if key in keys]
            names += ["latest", *(c.path.name for c in checkpoints)]
            raise FileNotFoundError(
                f"{named} has no checkpoint '{which}'; give one of "
                f"{', '.join(names)}"
            )
    path = chosen.path / "clap.ckpt"
    if not path.exists():
        raise FileNotFoundError(f"{named}: {chosen.path} holds no clap.ckpt")
    logger.info("Checkpoint %s (%s)", chosen.path, why)
    return path


def read_state(path, flag):
    """The parameters in a weight file, with CLAP's or CNN14's names.

    Arguments
    ---------
    path : str
        File of any of the three forms.
    flag : str
        The flag that named it, for errors.

    Returns
    -------
    dict
        Name -> tensor. Left out are the DFT kernels, once they are found to
        be those that the FFT front end computes with, and `position_ids`,
        which older files of BERT hold.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Not a weight file, or its front end is another one.
    """
    named = f"--{flag}={path}"
    if os.path.isdir(path):
        raise FileNotFoundError(
            f"{named} is a folder: give a file, or a run's checkpoints as "
            "--ssl_checkpoints_dir"
        )
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{named} does not exist")
    try:
        with torch.serialization.safe_globals(_ARRAY_TYPES):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # PyTorch goes on with advice to run what is in the file.
        reason = re.split("[.:] |\n", str(error))[0] or repr(error)
        raise ValueError(
            f"{named} is no file of PyTorch that holds tensors alone: {reason}"
        ) from error
    state = content.get("model", content) if isinstance(content, dict) else {}
    state = state if isinstance(state, dict) else {}
    state = {
        name.removeprefix("module."): tensor
        for name, tensor in state.items()
        if torch.is_tensor(tensor)
        and not name.endswith("embeddings.position_ids")
    }
    if not state:
        raise ValueError(f"{named} holds no parameters")
    for i, part in enumerate(("real", "imag")):
        for name in [n for n in state if n.endswith(_DFT.format(part))]:
            if not _is_dft(state.pop(name), i):
                raise ValueError(
                    f"{named}: {name} is not the DFT under a Hann window that "
                    "this front end computes"
                )
    return state


def _is_dft(found, i):
    """Whether a tensor is one of `_dft_kernels`, as well as its format can."""
    size = found.shape[-1] if found.ndim else 0
    if found.shape != (size // 2 + 1, 1, size):
        return False
    kernel = _dft_kernels(size)[i].to(found.dtype)
    return torch.allclose(found.float(), kernel.float(), atol=1e-4)


def export_microsoft(clap, path):
    """Write a model in the form of Microsoft's 2022 release.

    Arguments
    ---------
    clap : models.clap.CLAP
        Model to write.
    path : str
        Target, written whole or not at all.
    """
    state = {name: t.detach().cpu() for name, t in clap.state_dict().items()}
    kernels = _dft_kernels(clap.window_size)
    for part, kernel in zip(("real", "imag"), kernels):
        state[f"audio_encoder.base.{_DFT.format(part)}"] = kernel
    with written_whole(path) as file:
        torch.save({"model": state}, file)


def _dft_kernels(size):
    """Real and imaginary DFT kernels under a Hann window, (bins, 1, size)."""
    samples = torch.arange(size, dtype=torch.float64)
    # The product's remainder first: the angle of a large one is inexact.
    turns = torch.outer(samples[: size // 2 + 1], samples).remainder(size)
    angle = 2 * torch.pi / size * turns
    window = torch.hann_window(size, dtype=torch.float64)
    return (
        (angle.cos() * window)[:, None].float(),
        (-angle.sin() * window)[:, None].float(),
    )


def _load_strict(module, state, path):
    """Load a state whose names and shapes must be exactly the module's."""
    own = module.state_dict()
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [
            f"{n} {tuple(state[n].shape)} instead of {tuple(own[n].shape)}"
            for n in own
            if n in state and state[n].shape != own[n].shape
        ],
    }
    said = [
        f"{len(names)} {kind}: {', '.join(names[:5])}"
        + (" ..." if len(names) > 5 else "")
        for kind, names in problems.items()
        if names
    ]
    if said:
        raise ValueError(
            f"{path} does not fit the model. Parameters {'; '.join(said)}. "
            "The network's settings (--clap) and its --text_model must be "
            "those that the weights were trained with."
        )
    broken = [
        name
        for name, values in state.items()
        if values.is_floating_point() and not values.isfinite().all()
    ]
    if broken:
        raise ValueError(
            f"{path} holds numbers that are not finite, in "
            f"{', '.join(broken[:5])}: a training that failed?"
        )
    module.load_state_dict(state)
    logger.info("Loaded %d parameters from %s", len(state), path)


def _check_training(clap, tokenizer, path, may_differ):
    """Raise or warn if a model would hear or read otherwise than in training.

    Arguments
    ---------
    clap : models.clap.CLAP
    tokenizer : dataset.text.CaptionTokenizer or None
        Another one is no more than warned of: a later version of the library
        may describe the same one otherwise.
    path : pathlib.Path
        Its weights, in the checkpoint's folder in the run's; other runs than
        those of this toolkit have no record of it.
    may_differ : bool
        Whether to go on with a warning if it would hear otherwise. A change of
        the windows' length is no more than that, since the network takes any.
    """
    record = path.parents[1] / SETTINGS_FILE
    if not record.exists():
        return
    record = json.loads(record.read_text())
    trained = record["network"]
    different = {
        name: f"{name} {trained[name]} in training, {value} now"
        for name, value in clap.settings.items()
        if name in _HEARING and value != trained[name]
    }
    if different.keys() - {"duration"} and not may_differ:
        raise ValueError(
            f"{path} does not fit the model: {'; '.join(different.values())}. "
            "Give the same --clap as in its training (another training may "
            "change it, with --recompute_mel=True)"
        )
    if different:
        logger.warning("%s: %s", path, "; ".join(different.values()))
    now = tokenizer.settings()["tokenizer"] if tokenizer else None
    if now and record["training"].get("tokenizer", now) != now:
        logger.warning(
            "%s was trained with other tokens than those of --text_model=%s: "
            "unless these are the same of another version, captions mean "
            "nothing to it",
            path,
            clap.text_model,
        )


def state_hash(state):
    """Hash of a model's parameters, whatever file they came from.

    Arguments
    ---------
    state : dict
        Name -> tensor.

    Returns
    -------
    str
        SHA-256, hexadecimal.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        values = state[name].detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()


def _sha256(path):
    """Hash of a file's content, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
