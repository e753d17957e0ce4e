"""How every script starts: from the command line to objects and a folder.

    hparams, run_opts = experiment.start(sys.argv[1:], needs="opt_class")

The command line is `script.py hparams.yaml --key=value ...`, as in SpeechBrain:
a key is either one of SpeechBrain's run options or a top-level key of the
YAML file. Every flag may be given, left out, or left empty (`--key=` or
`--key=null`), which is the same as left out.

A YAML file whose first key is `base: other.yaml` is that file with other
defaults, and with the keys under `adds` besides; flags override both.
(HyperPyYAML includes files as values of keys, but does not inherit a whole
one.)
"""

import contextlib
import copy
import ctypes
import datetime
import difflib
import functools
import importlib.metadata
import logging
import math
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import warnings

import ruamel.yaml
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml, resolve_references
from hyperpyyaml.core import recursive_update
from ruamel.yaml.scalarstring import DoubleQuotedScalarString
from speechbrain.utils.distributed import (
    ddp_broadcast,
    ddp_init_group,
    if_main_process,
)
from speechbrain.utils.run_opts import RunOptions

logger = logging.getLogger(__name__)

# A flag that ends so names a file or folder: an input, which must exist before
# any work starts, but for --output_folder.
_PATH_SUFFIXES = ("_path", "_pathfile", "_csv", "_dir", "_folder")
# SpeechBrain's options that would not do here what they say.
_COMPILED = "give --compile=True, which compiles what gains by it"
_REFUSED = {
    "compile_module_keys": _COMPILED,
    "compile_using_fullgraph": _COMPILED,
    "compile_using_dynamic_shape_tracing": _COMPILED,
    "jit": _COMPILED,
    "jit_module_keys": _COMPILED,
    "remove_vector_weight_decay": "only some gradients would be clipped then",
    "log_config": "logs are the same in all scripts",
    "optimizer_step_limit": "a run would go on beyond it when resumed. Give "
    "--number_of_epochs and --subset_pct",
}
# The same, in scripts that train nothing.
_OF_TRAINING = dict.fromkeys(
    (
        *("test_only", "find_unused_parameters", "grad_accumulation_factor"),
        *("max_grad_norm", "skip_nonfinite_grads", "nonfinite_patience"),
        *("ckpt_interval_minutes", "ckpt_interval_steps"),
        *("profile_training", "profile_warmup", "profile_steps"),
        *("data_parallel_backend", "data_parallel_count"),
    ),
    "it is of training",
) | dict.fromkeys(
    ("auto_mix_prec", "bfloat16_mix_prec"),
    "it is of training, give --precision",
)
# What SpeechBrain's own parser notes among them.
_NO_OPTIONS = ("param_file", "overridden_args")
# What HyperPyYAML takes for the value of a key, in any text.
_REFERENCE = re.compile("<[^<>]+>")
# How the copy of a YAML file in a run's folder begins, as SpeechBrain's.
_RECORD = "# Generated "
# Seconds until the wait for other processes is told.
_PATIENCE = 20
# Texts that mean nothing: YAML's, and Python's.
_NULLS = ("", "~", "null", "Null", "NULL", "None")


def start(argv, needs, required=None, refused=None, keeps_memory=True):
    """Everything between the command line and a script's own work.

    Joins the process group where torchrun started several, names the output
    folder, builds the objects of the YAML file and starts the logs.

    Arguments
    ---------
    argv : list of str
        Command line without the script's name.
    needs : str
        A key that YAML files of this script have, and others have not.
    required : dict
        Keys without which the script can't begin -> what to give for them.
    refused : dict
        Options of SpeechBrain that it does not heed -> what to give instead.
    keeps_memory : bool
        Whether freed memory is kept for the next step: see
        `keep_freed_memory`. Right for networks, whose steps are all alike. If
        not, threads share it: see `share_freed_memory`.

    Returns
    -------
    tuple of dict
        The hyperparameters, read-only from here on, and the run options that
        were given, with `device`. `write_records` of the former is to be called
        as soon as what the folder holds is made, or gone on with, by these.

    Raises
    ------
    SystemExit
        The command line is wrong; the message says what and names the flag.
    """
    if sys.flags.optimize > 1:
        raise SystemExit(
            "Python leaves docstrings out, which libraries read: unset "
            "PYTHONOPTIMIZE, or start it without -OO"
        )
    if keeps_memory:
        keep_freed_memory()
    else:
        share_freed_memory()
    if sys.platform == "linux":
        # As before Python 3.14: loader processes share the lists of millions of
        # files and captions, which others are sent copies of.
        multiprocessing.set_start_method("fork", force=True)
    # They are forked after the tokenizer was used.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # It is compiled for each length of captions and size of a batch, for so
    # long that captions were embedded faster in fp32, which has others.
    torch.backends.cuda.enable_cudnn_sdp(False)
    hparams_file, run_opts, overrides = parse_arguments(argv, needs)
    keys = _top_level(hparams_file, overrides)
    refused = _REFUSED | (refused or {})
    if "opt_class" not in keys:
        refused = _OF_TRAINING | refused
    for key, advice in refused.items():
        if run_opts.get(key):
            raise SystemExit(f"--{key} is not taken: {advice}")
    for key, advice in (required or {}).items():
        if not keys[key]:
            raise SystemExit(f"Give --{key}: {advice}")
    run_opts = fit_to_device(run_opts)
    _join_processes(run_opts)
    same_command = name_output_folder(hparams_file, overrides)
    _check_folder(overrides.get("output_folder"), needs)
    _quote_texts(overrides)
    try:
        with open(hparams_file, encoding="utf-8") as file:
            hparams = load_hyperpyyaml(
                file,
                # A copy, in which the references of added keys are resolved.
                copy.deepcopy(overrides),
                # Keys are checked by now, and files may add some.
                overrides_must_match=False,
            )
    except ValueError as error:
        # Of an object that cannot be made so.
        raise SystemExit(f"{argv[0]} with these flags: {error}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        # One of transformers, which has no number.
        text_model = _top_level(hparams_file, overrides)["text_model"]
        raise SystemExit(
            f"--text_model={text_model} cannot be had. Give that of the "
            "model's training: a folder, or a name on the hub where there is a "
            "network; of one without weights of its own, with --clap="
            f"'{{text_pretrained: False}}' ({error})"
        ) from error
    if run_opts.pop("compile", False):
        compile_networks(hparams, run_opts.pop("compile_mode", None))
    folder = hparams["output_folder"]
    _check_place(folder)
    if if_main_process():
        # SpeechBrain's copy of an earlier command may be read-only.
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, os.path.basename(__file__)))
    sb.create_experiment_directory(folder, save_env_desc=False)
    hparams["write_records"] = functools.partial(
        _write_records, folder, argv[0], hparams_file, overrides
    )
    # What is there already may have been made with other flags, and stay.
    # No barrier: another process may look when it is written already.
    if if_main_process() and not os.path.exists(_record_of(folder)):
        hparams["write_records"]()
    # SpeechBrain's log file takes debug messages, of which it has thousands.
    for package in ("matplotlib", "numba"):
        logging.getLogger(package).setLevel(logging.WARNING)
    advice = "The same command may be given again"
    if "prev_ckpt_dir" in hparams:
        command = resume_command(argv, folder, same_command)
        advice = f"To go on with this run after a stop:\n  {command}"
        logger.info(advice)
    _end_quietly(advice)
    if if_main_process():
        _say_errors_shortly(os.path.join(folder, "log.txt"))
    return hparams, run_opts


def _join_processes(run_opts):
    """Join the process group, if the environment says that there is one.

    torchrun sets what it takes; a cluster, or a shell within a job, may have
    set some of it for a process that is meant to be alone.
    """
    waiting = threading.Timer(
        _PATIENCE,
        logger.warning,
        (
            "Still waiting for the others of WORLD_SIZE=%s processes. For one "
            "alone, unset RANK and LOCAL_RANK",
            os.environ.get("WORLD_SIZE"),
        ),
    )
    waiting.start()
    try:
        ddp_init_group(RunOptions.from_dictionary(run_opts))
    except ValueError as error:
        others = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in others if name not in os.environ]
        if not missing:
            raise SystemExit(
                "This process cannot join those that torchrun started: "
                f"{' '.join(str(error).split())}"
            ) from error
        raise SystemExit(
            "RANK and LOCAL_RANK are set, as for one process of several, but "
            f"not {', '.join(missing)}. Unset them, or start by torchrun"
        ) from error
    finally:
        waiting.cancel()
        # A thread that still ends would be in the way of a fork.
        waiting.join()


def compile_networks(hparams, mode):
    """Have PyTorch's compiler fuse what CNN14 does between its convolutions.

    SpeechBrain's `--compile` would do this with all of CLAP, text encoder
    included, for each length that captions have, and not where audio or text
    is encoded by itself.

    Arguments
    ---------
    hparams : dict
        With `clap`, and `teacher` if there is one, if the script has networks.
    mode : str or None
        `--compile_mode`: see `torch.compile`.
    """
    # Its spectrogram is complex: the compiler says that it leaves it alone.
    warnings.filterwarnings("ignore", message=".*complex operators")
    for name in {"clap", "teacher"} & hparams.keys():
        hparams[name].audio_encoder.base.compile(mode=mode)


def _end_quietly(advice):
    """Have Ctrl-C end a script with advice in place of a traceback."""
    process = os.getpid()

    def end(signum, _):
        # At once, with no more left than a kill leaves: libraries make other
        # errors of a KeyboardInterrupt, or lose it.
        signal.signal(signum, signal.SIG_DFL)
        try:
            # Not in a loader's process, which has this too.
            if os.getpid() == process and if_main_process():
                logger.error("Stopped by Ctrl-C. %s", advice)
        finally:
            os.kill(os.getpid(), signum)

    signal.signal(signal.SIGINT, end)


def _say_errors_shortly(log):
    """Have errors of the kinds that name a user's file or flag end in a line.

    Arguments
    ---------
    log : str
        SpeechBrain's log file, which alone has their tracebacks.
    """
    say_whole = sys.excepthook

    def say(kind, error, traceback):
        if not issubclass(kind, OSError | RuntimeError | ValueError):
            say_whole(kind, error, traceback)
            return
        logger.debug("Exception:", exc_info=(kind, error, traceback))
        text = str(error)
        if re.match(r"DataLoader worker .* killed by signal: Killed", text):
            text += "Most likely for want of memory: give fewer --num_workers"
        logger.error("%s: %s (traceback: %s)", kind.__name__, text, log)

    sys.excepthook = say


def _record_of(folder):
    """Where SpeechBrain's recipes have a copy of their YAML file."""
    return os.path.join(folder, "hyperparams.yaml")


def _write_records(folder, given, root, overrides):
    """Write down a command's hyperparameters and environment.

    SpeechBrain, too, writes `hyperparams.yaml`, but before a run can refuse a
    command, and names the base in place of the YAML file that was given.
    """
    with open(root, encoding="utf-8") as file:
        resolved = resolve_references(file, overrides).read()
    with open(_record_of(folder), "w", encoding="utf-8") as file:
        today = datetime.date.today()
        file.write(f"{_RECORD}{today} from:\n# {os.path.abspath(given)}\n")
        file.write(resolved)
    _describe_environment(folder)


def _describe_environment(folder):
    """Write `env.log`: the versions of Python, its packages and this code.

    SpeechBrain's own lists what the shell's `pip` finds, which may be that of
    another Python, and takes a second.
    """
    revision = "unknown"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        revision = subprocess.check_output(
            ["git", "rev-parse", "HEAD"],
            cwd=os.path.dirname(os.path.abspath(__file__)),
            stderr=subprocess.DEVNULL,
            text=True,
        ).strip()
    packages = {}
    for package in importlib.metadata.distributions():
        about = package.metadata
        # Of two, the first in Python's path is the one that is imported.
        packages.setdefault(about["Name"], about["Version"])
    packages.pop(None, None)  # an installation that broke off
    lines = [
        f"Python {sys.version}",
        f"CUDA {torch.version.cuda}",
        f"Revision {revision}",
        *(f"{name}=={packages[name]}" for name in sorted(packages)),
    ]
    with open(os.path.join(folder, "env.log"), "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def require_weights(hparams):
    """Stop a script that would otherwise run an untrained model.

    Raises
    ------
    SystemExit
        No flag names weights.
    """
    if not (hparams["clap_ckpt_path"] or hparams["ssl_checkpoints_dir"]):
        raise SystemExit(
            "Name the weights to use: --clap_ckpt_path=FILE or "
            "--ssl_checkpoints_dir=<run>/save"
        )


def require_one_process():
    """Stop a script that cannot share its work if torchrun started it.

    Raises
    ------
    SystemExit
    """
    if torch.distributed.is_initialized():
        raise SystemExit("This script runs in one process: without torchrun")


def take_precision(run_opts):
    """Have a script that only evaluates take --precision as --eval_precision.

    SpeechBrain's --precision is of training alone. Either may be given.

    Arguments
    ---------
    run_opts : dict
        Options that were given; `eval_precision` takes the place of
        `precision`.

    Raises
    ------
    SystemExit
        Both are given.
    """
    if "precision" in run_opts:
        if "eval_precision" in run_opts:
            raise SystemExit(
                "--precision and --eval_precision are the same here: give one"
            )
        run_opts["eval_precision"] = run_opts.pop("precision")


def check_numbers(hparams, names, lowest, highest=math.inf, whole=False):
    """Stop a script if a flag has no sensible value.

    Arguments
    ---------
    hparams : dict
    names : sequence of str
        Keys that may be None, or a number within the limits.
    lowest, highest : float
    whole : bool
        Whether only integers will do.

    Raises
    ------
    SystemExit
        The first that is wrong is named.
    """
    limits = f"from {lowest} to {highest}"
    if highest == math.inf:
        limits = f"of {lowest} or more"
    for name in names:
        value = hparams[name]
        if value is None:
            continue
        kinds = int if whole else int | float
        if (
            isinstance(value, bool)
            or not isinstance(value, kinds)
            or not (lowest <= value <= highest and math.isfinite(value))
        ):
            kind = "whole number" if whole else "number"
            raise SystemExit(f"--{name}={value}: give a {kind} {limits}")


def check_choice(hparams, name, choices):
    """Stop a script if a flag is none of its choices.

    Arguments
    ---------
    hparams : dict
    name : str
        The key.
    choices : sequence of str

    Raises
    ------
    SystemExit
        It names the flag and the choices.
    """
    if hparams[name] not in choices:
        raise SystemExit(
            f"--{name}={hparams[name]}: give one of {', '.join(choices)}"
        )


def check_prompt(hparams):
    """Stop a script that scores classes if their prompt is no text.

    Arguments
    ---------
    hparams : dict
        With `text_prompt`, which may be a list of some.

    Raises
    ------
    SystemExit
    """
    prompt = hparams["text_prompt"]
    prompts = prompt if isinstance(prompt, list | tuple) else [prompt]
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise SystemExit(
            f"--text_prompt={prompt}: give a text, or a list of texts in "
            "quotes, as \"['this is a sound of', 'I can hear {} outside']\""
        )


def rank_and_world_size():
    """This process's number, and how many there are."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def of_all_processes(value):
    """What each process has, in a list in order of rank, in each of them.

    Arguments
    ---------
    value : object
        What this process has; it is pickled.

    Returns
    -------
    list
    """
    _, world_size = rank_and_world_size()
    values = [value] * world_size
    if world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def finish():
    """The last step of a script that torchrun may have started.

    The processes leave together: one that exits while others still talk to
    it can bring them down after all the work is done.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def parse_arguments(argv, needs=None):
    """Read a command line, stricter and more forgiving than SpeechBrain's.

    Values may hold `=` and spaces; an unknown or abbreviated key is an error
    and not ignored; so is a key given twice.

    Arguments
    ---------
    argv : list of str
        Command line without the script's name.
    needs : str
        A key that the script's YAML files have, and others have not.

    Returns
    -------
    tuple
        Path of the YAML file (a base, if it has one), dict of run options,
        dict of overrides.

    Raises
    ------
    SystemExit
        With a message that names the flag and says what to do; or help was
        asked for, and is given.
    """
    if "--help" in argv or "-h" in argv:
        sys.stdout.write(
            f"{sys.modules['__main__'].__doc__}\nFlags, --key=value, are the "
            "keys of the YAML file, which says what they\nare, and "
            "SpeechBrain's options.\n"
        )
        raise SystemExit
    if not argv or argv[0].startswith("--"):
        raise SystemExit(
            f"usage: python {sys.argv[0]} hparams.yaml [--key=value ...], or "
            "--help"
        )
    for token in argv:
        try:
            token.encode()
        except UnicodeEncodeError:
            raise SystemExit(
                f"{token!r} is not UTF-8, which files of results are in: "
                "rename it, or link to it by another name"
            ) from None
    (hparams_file, inherited), tokens = _read_hparams(argv[0]), argv[1:]
    if inherited:
        root = _top_level(hparams_file)
        for key in inherited.keys() & root.keys():
            _check_type(key, inherited[key], root[key])
    defaults = _top_level(hparams_file, inherited)
    if needs is not None and needs not in defaults:
        raise SystemExit(
            f"{argv[0]} is of another script: it has no key {needs}"
        )
    options = RunOptions().as_dict()
    for key in _NO_OPTIONS:
        del options[key]
    known = sorted(defaults.keys() | options.keys())
    run_opts, overrides = {}, {}
    for key, text in _flags(tokens, defaults | options):
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise SystemExit(
                f"--{key} is neither a key of {argv[0]} nor an option"
                + (f" (did you mean --{close[0]}?)" if close else "")
            )
        if key in run_opts or key in overrides:
            raise SystemExit(f"--{key} is given twice")
        if key == "save_folder":
            raise SystemExit(
                "--save_folder is always <output_folder>/save, where resumed "
                "runs and other scripts look for it: give --output_folder"
            )
        value = _value_of(key, text, defaults.get(key))
        if value is None:
            if defaults.get(key) is not None:
                logger.warning(
                    "--%s is empty: its default holds (%s)", key, defaults[key]
                )
        elif key in defaults:
            _check_type(key, value, defaults[key])
            overrides[key] = value
        else:
            run_opts[key] = _run_option(key, value, options[key])
    run, previous = (
        overrides.get(key) for key in ("output_folder", "prev_ckpt_dir")
    )
    if run and previous:
        same = (run, os.path.join(run, "save"))
        if os.path.realpath(previous) not in map(os.path.realpath, same):
            raise SystemExit(
                f"--output_folder={run} and --prev_ckpt_dir={previous} are two "
                "runs: give one of them"
            )
    recursive_update(inherited, overrides)
    overrides = inherited
    for key, value in overrides.items():
        is_input = _is_path(key) and key != "output_folder"
        if not (is_input and value):
            continue
        if not os.path.exists(str(value)):
            raise SystemExit(f"--{key}={value} does not exist")
        is_folder = key.endswith(("_dir", "_folder"))
        if is_folder and not os.path.isdir(str(value)):
            raise SystemExit(f"--{key}={value} is no folder")
        # One of weights may be meant for another flag, as their loader says.
        is_file = not is_folder and not key.endswith("_ckpt_path")
        if is_file and os.path.isdir(str(value)):
            raise SystemExit(f"--{key}={value} is a folder: give a file")
    # Objects are built with these, which say nothing of flags.
    if "seed" in overrides:
        check_numbers(overrides, ["seed"], 0, 2**32 - 1, whole=True)
    if "short_audio" in overrides:
        check_choice(overrides, "short_audio", ("repeat", "zero"))
    # SpeechBrain takes one of the two; the YAML files set minutes.
    if overrides.get("ckpt_interval_steps"):
        overrides.setdefault("ckpt_interval_minutes", 0)
    return hparams_file, run_opts, overrides


def fit_to_device(run_opts):
    """Choose the device, and drop options that need a GPU where there is none.

    Arguments
    ---------
    run_opts : dict
        Run options that were given.

    Returns
    -------
    dict
        Those that hold, with `device` always set.

    Raises
    ------
    SystemExit
        There is no such device; or fp16 is asked for on a CPU, which cannot do
        it; or the compiler with a version of Python that it is wrong with.
    """
    run_opts = dict(run_opts)
    if "compile_mode" in run_opts and not run_opts.get("compile"):
        logger.warning("--compile_mode is not used without --compile=True")
    run_opts.setdefault("device", sb.utils.distributed.infer_device())
    try:
        device = torch.device(run_opts["device"])
        if device.type != "cuda":
            torch.empty(0, device=device)
    except (AssertionError, RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type == "meta":
        raise SystemExit(
            f"--device={run_opts['device']} is not there: give cpu, cuda, or "
            "cuda:1 ..."
        )
    if device.type == "cuda" and (device.index or 0) >= (
        torch.cuda.device_count()
    ):
        raise SystemExit(
            f"--device={run_opts['device']}: PyTorch finds "
            f"{torch.cuda.device_count()} GPUs, of which each process of "
            "torchrun takes one"
        )
    if device.type != "cpu":
        # A fault of that version (CPython's issue 125608): what is compiled for
        # training, with dropout, is not compiled again for evaluation.
        if run_opts.get("compile") and sys.version_info[:3] == (3, 13, 0):
            raise SystemExit(
                "--compile=True: what is compiled with Python 3.13.0 is wrong. "
                "Take Python 3.13.1 or newer, or 3.12"
            )
        return run_opts
    run_opts["device"] = "cpu"
    for key in ("auto_mix_prec", "data_parallel_backend", "compile"):
        if run_opts.pop(key, False):
            logger.warning(
                "--%s is for a GPU and there is none: going on without", key
            )
    for key in ("precision", "eval_precision"):
        if run_opts.get(key) == "fp16":
            raise SystemExit(f"--{key}=fp16 needs a GPU; bf16 works on a CPU")
    run_opts.setdefault("distributed_backend", "gloo")
    return run_opts


def name_output_folder(hparams_file, overrides):
    """Give the run its folder: the one named, the one resumed, or a new one.

    A new one is `<output_base>/<experiment_name>/<time_stamp>`, the same in
    every process.

    Arguments
    ---------
    hparams_file : str
        The YAML file; `time_stamp` is a key of it.
    overrides : dict
        `output_folder` or `time_stamp` is set here.

    Returns
    -------
    bool
        Whether the same command finds the same folder again.

    Raises
    ------
    SystemExit
        A resume was asked for that names no run.
    """
    previous = overrides.get("prev_ckpt_dir")
    if overrides.get("resume_interrupt"):
        if previous is None:
            raise SystemExit(
                "--resume_interrupt=True needs --prev_ckpt_dir=<run>/save"
            )
        run = os.path.abspath(previous)
        if os.path.basename(run) == "save":
            run = os.path.dirname(run)
        if not os.path.isdir(os.path.join(run, "save")):
            raise SystemExit(
                f"--prev_ckpt_dir={previous} is not the save folder of a run"
            )
        overrides["output_folder"] = run
    elif previous is not None:
        raise SystemExit(
            "--prev_ckpt_dir is given without --resume_interrupt=True"
        )
    if overrides.get("prev_checkpointer") not in (None, "latest"):
        raise SystemExit(
            "--prev_checkpointer: a run goes on from its latest checkpoint. "
            "To start a new one from another, use --ssl_checkpoints_dir and "
            "--ssl_checkpointer."
        )
    if "output_folder" in overrides or "time_stamp" in overrides:
        return True
    if "time_stamp" in _top_level(hparams_file):
        # To the microsecond: jobs of an array start together.
        stamp = f"{datetime.datetime.now():%Y-%m-%d+%H-%M-%S-%f}"
        overrides["time_stamp"] = ddp_broadcast(stamp, src=0)
        return False
    return True


def resume_command(argv, output_folder, same_command):
    """The command that goes on with a run, ready for a shell.

    Arguments
    ---------
    argv : list of str
        The run's command line without the script's name.
    output_folder : str
        Its folder.
    same_command : bool
        Whether `argv` finds the folder again by itself.

    Returns
    -------
    str
    """
    launcher = ["python"]
    if torch.distributed.is_initialized():
        # torchrun's own variables: processes of a machine, and machines.
        count = os.environ.get("LOCAL_WORLD_SIZE", "1")
        machines = os.environ.get("GROUP_WORLD_SIZE", "1")
        launcher = ["torchrun", f"--nproc_per_node={count}"]
        if machines != "1":
            launcher.append(f"--nnodes={machines}")
    if not same_command:
        replaced = ("--resume_interrupt", "--prev_ckpt_dir")
        kept, key = [], ""
        for token in argv:
            # One without dashes is the value of the flag before it.
            if token.startswith("--"):
                key = token.partition("=")[0]
            if key not in replaced:
                kept.append(token)
        argv = kept + [
            "--resume_interrupt=True",
            f"--prev_ckpt_dir={os.path.join(output_folder, 'save')}",
        ]
    return shlex.join([*launcher, sys.argv[0], *argv])


@functools.cache
def keep_freed_memory():
    """Have glibc keep the large buffers that each step frees and asks again.

    By default it gives them back, and the kernel clears every page anew. They
    are given back before a process is forked, as loaders do: pages that two
    processes share are copied at the next write, which takes longer than to
    clear them, and the copies stay as long as the other process. Elsewhere
    than on Linux with glibc nothing happens.
    """
    libc = _glibc()
    if libc is None:
        return
    # Numbers of the parameters in <malloc.h>; the values are C ints.
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, -1)  # never
    libc.mallopt(top_pad, 2**28)
    os.register_at_fork(before=lambda: libc.malloc_trim(0))


def share_freed_memory():
    """Have glibc give a thread what another has freed.

    By default each has a store of its own. Elsewhere than on Linux with glibc
    nothing happens.
    """
    libc = _glibc()
    if libc is not None:
        arena_max = -8
        libc.mallopt(arena_max, 1)


def _glibc():
    """That library with the functions that are wanted, or None."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt, libc.malloc_trim  # noqa: B018
    except (OSError, AttributeError):
        return None
    return libc


def _read_hparams(path):
    """A YAML file as the one at the root of its bases, and changes to that.

    Returns
    -------
    tuple
        Path of a file without a base, and dict of overrides.

    Raises
    ------
    SystemExit
        There is no such file, or it changes keys that its base has not.
    """
    if not os.path.isfile(path):
        raise SystemExit(f"There is no hyperparameter file {path}")
    try:
        with open(path, encoding="utf-8") as file:
            if file.readline().startswith(_RECORD):
                raise SystemExit(
                    f"{path} is the record of a run, where flags do not reach "
                    f"what depends on them. Give {file.readline()[2:].strip()} "
                    "and the run's flags"
                )
            file.seek(0)
            own = ruamel.yaml.YAML().load(file)
    except (ValueError, ruamel.yaml.YAMLError) as error:
        raise SystemExit(f"{path} is no YAML file: {error}") from None
    if not isinstance(own, dict):
        raise SystemExit(f"{path} has no keys: give one of hparams/")
    if "base" not in own:
        return path, {}
    base = os.path.join(os.path.dirname(path), str(own.pop("base")))
    if os.path.realpath(base) == os.path.realpath(path):
        raise SystemExit(f"{path} names itself as its base")
    root, changes = _read_hparams(base)
    added = own.pop("adds", None) or {}
    for key in own.keys() - _top_level(root, changes).keys():
        raise SystemExit(
            f"{path}: {base} has no key {key} to change; new ones go under adds"
        )
    recursive_update(changes, own)
    return root, changes | dict(added)


def _top_level(hparams_file, changes=None):
    """Keys of a YAML file with their raw defaults, nothing being built."""
    with open(hparams_file, encoding="utf-8") as file:
        changes = copy.deepcopy(changes)
        return ruamel.yaml.YAML().load(resolve_references(file, changes))


def _flags(tokens, defaults):
    """Keys and texts of a command line; a switch alone is True."""
    tokens = list(tokens)
    while tokens:
        token = tokens.pop(0)
        key, equals, text = token.removeprefix("--").partition("=")
        if not token.startswith("--"):
            raise SystemExit(f"'{token}' is no flag; flags are --key=value")
        if not equals:
            is_switch = isinstance(defaults.get(key), bool)
            given = tokens and not tokens[0].startswith("--")
            text = tokens.pop(0) if given else "True" if is_switch else ""
        yield key, text


def _value_of(key, text, default):
    """A flag's value, in the kind of its default; None if it is empty."""
    text = _located(key, text)
    if _REFERENCE.search(text):
        raise SystemExit(
            f"--{key}={text}: <...> stands for another key in YAML files; "
            "rename it, or link to it by another name"
        )
    value = _parse_value(key, text)
    is_text = isinstance(default, str) or _is_path(key)
    is_list = isinstance(value, list) and key != "text_prompt"
    if is_text and (is_list or isinstance(value, bool | int | float | dict)):
        # The experiment 007 is not the experiment 7, and {} is a prompt.
        return text
    return value


def _is_path(key):
    return key.endswith(_PATH_SUFFIXES)


def _located(key, text):
    """A path with the user's folder for ~, which a shell leaves after "="."""
    may_be = _is_path(key) or key in ("output_base", "text_model")
    if not may_be:
        return text
    if text.partition("/")[0] == "~":
        text = os.path.expanduser(text)
    # Where it goes up from behind a link, which libraries lose.
    plain, real = os.path.normpath(text), os.path.realpath(text)
    return text if os.path.realpath(plain) == real else real


def _parse_value(key, text):
    """A flag's text as YAML would have it: number, boolean, null, {} or [].

    All else stays as it was typed; YAML would cut a path at " #".
    """
    if text.strip() in _NULLS:
        return None
    try:
        value = ruamel.yaml.YAML(typ="safe").load(text)
    except ruamel.yaml.YAMLError as error:
        # A prompt may begin with {}, but hardly anything with [.
        if text.lstrip().startswith("["):
            raise SystemExit(
                f"--{key}={text} is no list: {error.problem}. Put quotes "
                "around its texts"
            ) from None
        return text
    if isinstance(value, bool | int | float):
        return value
    return value if text.lstrip()[:1] in ("{", "[") else text


def _check_type(key, value, default):
    """Stop if a key's value is no switch, no number or no mapping, as it is.

    Or if a mapping has keys that the default, an object's arguments, has not.
    """
    is_switch = isinstance(default, bool)
    if is_switch and not isinstance(value, bool):
        raise SystemExit(f"--{key}={value}: give True or False")
    is_number = isinstance(default, int | float) and not is_switch
    if is_number and (
        isinstance(value, bool) or not isinstance(value, int | float)
    ):
        raise SystemExit(f"--{key}={value}: give a number")
    if not isinstance(default, dict):
        if isinstance(value, dict):
            raise SystemExit(f"--{key}={dict(value)}: give no {{}}")
        return
    form = f"--{key}='{{name: value, ...}}'"
    if not isinstance(value, dict):
        raise SystemExit(f"--{key}={value}: give {form}")
    if str(default.tag.value).startswith("!new:"):
        for name in value.keys() - default.keys():
            close = difflib.get_close_matches(str(name), default, n=1)
            raise SystemExit(
                f"{form} has no {name}"
                + (f" (did you mean {close[0]}?)" if close else "")
            )


def _quote_texts(overrides):
    """Have each text in quotes when HyperPyYAML writes it.

    It does so in lines of 80 columns, and would lose one of two spaces there.
    """
    is_mapping = isinstance(overrides, dict)
    for key, value in overrides.items() if is_mapping else enumerate(overrides):
        if isinstance(value, str):
            overrides[key] = DoubleQuotedScalarString(value)
        elif isinstance(value, dict | list):
            _quote_texts(value)


def _check_folder(folder, needs):
    """Stop if a run cannot have this folder, since it is none, or another's.

    Raises
    ------
    SystemExit
        It, or what it would lie in, is a file, or may not be written to; or a
        process trains in it; or it is that of a training run and this one is
        none.
    """
    if folder is None:
        return
    _check_place(folder)
    # Here, since pyarrow comes with it, which begins a store of memory.
    from files import is_taken

    # Before that run's records are written over.
    lock = os.path.join(folder, "save", "train.lock")
    if if_main_process() and is_taken(lock):
        raise SystemExit(
            f"--output_folder={folder}: another process trains there. Wait for "
            "its end, or give another one"
        )
    record = _record_of(folder)
    if needs in ("opt_class", "teacher") or not os.path.isfile(record):
        return
    with open(record, encoding="utf-8", errors="replace") as file:
        if any(line.startswith("opt_class:") for line in file):
            raise SystemExit(
                f"--output_folder={folder} is that of a training run, whose "
                "records would be lost: give another one"
            )


def _check_place(folder):
    """Stop if a folder, given or derived, cannot be made or written to."""
    above = os.path.abspath(folder)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        raise SystemExit(f"--output_folder={folder}: {above} is no folder")
    if not os.access(above, os.W_OK):
        raise SystemExit(
            f"--output_folder={folder}: {above} may not be written to"
        )


def _run_option(key, value, default):
    """A run option in the type of its default."""
    if key in ("precision", "eval_precision"):
        check_choice({key: value}, key, ("fp32", "fp16", "bf16"))
    if default is None:
        return value
    try:
        if isinstance(default, bool) and not isinstance(value, bool):
            raise ValueError
        return type(default)(value)
    except (TypeError, ValueError):
        kind = type(default).__name__
        raise SystemExit(f"--{key}={value}: give a {kind}") from None
