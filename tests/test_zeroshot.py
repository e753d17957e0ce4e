"""Zero-shot evaluation by the real command line, against plain loops."""

import bisect
import fractions
import io
import itertools
import json
import math
import re
import textwrap

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
import torch.nn.functional as F
from conftest import (
    NETWORK,
    PITCHES,
    ROOT,
    torchrun,
    write_esc_layout,
    write_tone,
)

import experiment
import microsoft_zeroshot
from dataset import prepare_zeroshot
from dataset.text import CaptionTokenizer
from models.weights import (
    AtomicCheckpointer,
    export_microsoft,
    load_weights,
)
from models.zeroshot import (
    accuracy_interval,
    class_embeddings,
    class_scores,
    clip_embeddings,
    prompted,
)

PROMPT = "this is a sound of "


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clap):
    """Twelve tones; one is 2.6 s long, one missing, one no audio at all."""
    folder = tmp_path_factory.mktemp("esc")
    write_esc_layout(folder)
    write_tone(folder / "audio" / "3.wav", 300, seed=5, seconds=2.6)
    (folder / "audio" / "4.wav").unlink()
    (folder / "audio" / "5.wav").write_text("no audio")
    AtomicCheckpointer(folder / "save", {"clap": clap}).save_checkpoint()
    export_microsoft(clap, str(folder / "clap.pth"))
    return folder


@pytest.fixture
def evaluate(folder, text_model, tmp_path):
    """Runs the script; returns results.json and predictions.csv."""

    def run(name="run", hparams="esc", **changes):
        flags = {
            "data_folder": folder,
            "labels_path": folder / "labels.csv",
            "ssl_checkpoints_dir": folder / "save",
            "text_model": text_model,
            "clap": json.dumps(NETWORK).replace('"', ""),
            "output_folder": tmp_path / name,
            "num_workers": 0,
            "noprogressbar": True,
        } | changes
        argv = [f"--{k}={v}" for k, v in flags.items() if v is not None]
        yaml = ROOT / f"hparams/{hparams}/microsoft_zeroshot.yaml"
        microsoft_zeroshot.main([str(yaml), *argv])
        results = json.loads((tmp_path / name / "results.json").read_text())
        return results, pd.read_csv(tmp_path / name / "predictions.csv")

    return run


def naive_scores(clap, tokenize, folder, prompts=(PROMPT + "{}",)):
    """Clip by clip, window by window, as the docstrings promise."""
    scores, classes = {}, []
    with torch.no_grad():
        for name in PITCHES:
            texts = [prompt.replace("{}", name) for prompt in prompts]
            total = sum(clap.encode_text(tokenize([t]))[0] for t in texts)
            classes.append(F.normalize(total, dim=0))
        classes = torch.stack(classes)
        for path in sorted((folder / "audio").glob("*.wav")):
            try:
                samples, _ = soundfile.read(path, dtype="float32")
            except soundfile.LibsndfileError:
                continue
            wav = torch.from_numpy(samples)
            if len(wav) < 16000:
                windows = [torch.cat([wav, wav])[:16000]]
            else:
                starts = [0, 16000, len(wav) - 16000]
                windows = [wav[s : s + 16000] for s in starts]
            embeddings = [clap.encode_audio(w[None])[0] for w in windows]
            clip = F.normalize(sum(embeddings), dim=0)
            scores[str(path)] = (classes @ clip).numpy()
    return scores


@pytest.mark.parametrize("batch_size", [1, 5])
def test_scores_equal_plain_loops(
    evaluate, clap, text_model, folder, batch_size
):
    results, table = evaluate(batch_size=batch_size)
    expected = naive_scores(clap, CaptionTokenizer(text_model), folder)
    assert set(table["wav_path"]) == set(expected)
    names = list(PITCHES)
    for _, row in table.iterrows():
        scores = expected[row["wav_path"]]
        order = np.argsort(-scores)
        assert row["prediction"] == row["top1"] == names[order[0]]
        assert [row[f"top{i}"] for i in (1, 2, 3)] == [names[i] for i in order]
        found = [row[f"score{i}"] for i in (1, 2, 3)]
        np.testing.assert_allclose(found, scores[order], atol=1e-5)
    correct = table["prediction"] == table["label"]
    assert results["accuracy"] == pytest.approx(correct.mean())
    assert results["chance"] == pytest.approx(1 / 3)
    for fold, accuracy in results["folds"].items():
        in_fold = table["fold"].astype(str) == fold
        assert accuracy == pytest.approx(correct[in_fold].mean())
    assert results["fold_mean"] == pytest.approx(
        np.mean(list(results["folds"].values()))
    )
    for name, figures in results["classes"].items():
        of_class = table["label"] == name
        assert figures["clips"] == of_class.sum()
        assert figures["accuracy"] == pytest.approx(correct[of_class].mean())


def test_the_notebook_of_the_readme(clap, text_model, folder, tmp_path, capsys):
    text = (ROOT / "README.md").read_text().partition("### In a notebook")[2]
    block = text[text.index("    import torch") : text.index("The last line")]
    network = "".join(f", {key}={value}" for key, value in NETWORK.items())
    for theirs, ours in {
        "_pretrained=False": f"_pretrained=False{network}",
        "bert-base-uncased": text_model,
        "results/teacher/save": f"{folder}/save",
        "dog.wav": f"{folder}/audio/3.wav",
        '["dog", "rain"]': str(list(PITCHES)),
        "clap.pth": f"{tmp_path}/clap.pth",
    }.items():
        assert theirs in block
        block = block.replace(theirs, ours)
    exec(textwrap.dedent(block), {})
    scores = naive_scores(clap, CaptionTokenizer(text_model), folder)
    printed = re.findall(r"-?[0-9]+\.[0-9]+", capsys.readouterr().out)
    expected = scores[f"{folder}/audio/3.wav"]
    np.testing.assert_allclose(np.float64(printed), expected, atol=1e-4)
    load_weights(clap, clap_ckpt_path=tmp_path / "clap.pth")


def test_scores_under_autocast_are_those_without():
    torch.manual_seed(0)
    clips, classes = (F.normalize(torch.randn(n, 512), dim=1) for n in (40, 9))
    with torch.autocast("cpu", torch.bfloat16):
        scores = class_scores(clips, classes)
    expected = (clips.double() @ classes.double().T).float()
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)
    clips[7, 3] = torch.nan  # would be guessed to be of the first class
    with pytest.raises(ValueError, match="are not finite: the weights"):
        class_scores(clips, classes)


@pytest.mark.parametrize("flag", ["precision", "eval_precision"])
def test_scores_of_a_run_in_bf16(evaluate, clap, text_model, folder, flag):
    _, table = evaluate(**{flag: "bf16"})
    expected = naive_scores(clap, CaptionTokenizer(text_model), folder)
    best = [max(expected[path]) for path in table["wav_path"]]
    np.testing.assert_allclose(table["score1"], best, atol=0.02)
    assert (table["score1"] != best).any()
    # Scores themselves are not rounded so.
    scores = torch.tensor(table["score1"].to_numpy(), dtype=torch.float32)
    assert (scores.bfloat16() != scores).any()


def test_what_was_not_scored_is_counted_and_named(evaluate, folder):
    results, table = evaluate()
    lost = {"missing": 1, "unreadable": 1, "not_scored": 0}
    assert results["counts"] == {"clips": 10, **lost}
    assert results["missing"] == [str(folder / "audio" / "4.wav")]
    assert list(results["unreadable"]) == [str(folder / "audio" / "5.wav")]
    assert len(table) == 10


def test_weights_and_prompts_are_on_record(evaluate, folder):
    results, table = evaluate()
    [weights] = results["weights"]
    assert weights["source"] == "ssl_checkpoints_dir"
    assert len(weights["sha256"]) == 64
    assert results["labels"]["dog"] == ["this is a sound of dog"]
    other, same = evaluate(
        "other", ssl_checkpoints_dir=None, clap_ckpt_path=folder / "clap.pth"
    )
    assert other["weights"][0]["source"] == "clap_ckpt_path"
    pd.testing.assert_frame_equal(table, same)


def test_prompts_are_averaged(clap, text_model):
    tokenize = CaptionTokenizer(text_model)
    templates = [PROMPT, "the {} barks"]
    found = class_embeddings(clap, tokenize, ["dog", "rain"], templates)
    with torch.no_grad():
        for i, name in enumerate(("dog", "rain")):
            texts = [f"this is a sound of {name}", f"the {name} barks"]
            mean = sum(clap.encode_text(tokenize([t]))[0] for t in texts)
            torch.testing.assert_close(found[i], F.normalize(mean, dim=0))
    assert prompted("a ", "b") == prompted("a", "b") == prompted("a {}", "b")
    assert prompted("{}, a {}", "b") == "b, a b"


def test_a_batch_without_clips_has_no_embeddings(clap):
    found = clip_embeddings(clap, torch.empty(0), [])
    assert found.shape == (0, NETWORK["d_proj"])


@pytest.mark.parametrize(
    ("flag", "prompts"),
    [
        ("click", ["click {}"]),
        ("hear {} here", ["hear {} here"]),
        ("[click, '{} wails']", ["click {}", "{} wails"]),
        ("{}", ["{}"]),
        ("", [PROMPT + "{}"]),
    ],
)
def test_prompt_flags(evaluate, clap, text_model, folder, flag, prompts):
    """They are on record, and scores are of them."""
    results, table = evaluate(text_prompt=flag, ssl_checkpointer="latest")
    assert results["labels"] == {
        name: [prompt.replace("{}", name) for prompt in prompts]
        for name in PITCHES
    }
    assert [prompted(p, "{}") for p in results["prompts"]] == prompts
    tokenize = CaptionTokenizer(text_model)
    scores = naive_scores(clap, tokenize, folder, prompts)
    found = table.set_index("wav_path")["score1"]
    for path, expected in scores.items():
        assert found[path] == pytest.approx(expected.max(), abs=1e-5)


@pytest.mark.parametrize("folds", ["[2]", "2"])
def test_folds(evaluate, folds, tmp_path):
    results, table = evaluate(folds=folds)
    assert set(table["fold"]) == {2}
    assert list(results["folds"]) == ["2"]
    record = tmp_path / "run" / "hyperparams.yaml"
    before = record.read_text()
    with pytest.raises(ValueError, match=r"folds=\[7\].*1, 2"):
        evaluate(folds=folds.replace("2", "7"))
    # The results that are there are not of these.
    assert record.read_text() == before
    evaluate(batch_size=3)
    assert "batch_size: 3" in record.read_text()


def test_other_data_sets(evaluate, tmp_path):
    us8k = tmp_path / "us8k"
    (us8k / "metadata").mkdir(parents=True)
    (us8k / "audio" / "fold3").mkdir(parents=True)
    write_tone(us8k / "audio" / "fold3" / "a.wav", 300, seed=0)
    (us8k / "metadata" / "UrbanSound8K.csv").write_text(
        "slice_file_name,fsID,start,end,salience,fold,classID,class\n"
        "a.wav,1,0,0.6,1,3,0,air_conditioner\n"
    )
    results, table = evaluate(
        "a", hparams="us8k", data_folder=us8k, labels_path=None
    )
    assert results["chance"] == 0.1
    assert list(results["folds"]) == ["3"]
    assert table["label"].tolist() == ["air_conditioner"]

    tut = tmp_path / "TUT-acoustic-scenes-2017-evaluation"
    (tut / "audio").mkdir(parents=True)
    write_tone(tut / "audio" / "1.wav", 300, seed=0, seconds=2.0)
    (tut / "meta.txt").write_text("audio/1.wav\tcafe/restaurant\n")
    results, _ = evaluate("b", hparams="tut", data_folder=tut, labels_path=None)
    assert results["chance"] == pytest.approx(1 / 15)
    assert list(results["folds"]) == ["evaluation"]
    assert results["labels"]["city_center"] == [
        "this is a sound of city center"
    ]


def test_torchrun_is_refused(evaluate, monkeypatch):
    def main(argv):
        torchrun("microsoft_zeroshot.py", argv)

    monkeypatch.setattr(microsoft_zeroshot, "main", main)
    with pytest.raises(AssertionError, match="one process: without torchrun"):
        evaluate()


def test_every_flag_may_be_empty(evaluate):
    expected, _ = evaluate("a")
    with open(ROOT / "hparams/shared/microsoft_zeroshot.yaml") as file:
        keys = {
            x.split(":")[0] for x in file if x[0].isalpha() and "!" not in x
        }
    given = {"data_folder", "labels_path", "text_model", "num_workers"}
    assert keys > {*given, "ssl_checkpointer"}
    given.add("ssl_checkpoints_dir")
    empty = dict.fromkeys(keys.difference(given), "")
    results, _ = evaluate("b", **empty)
    assert results == expected


def test_flags_of_the_data_reach_its_preparation(
    evaluate, folder, tmp_path, monkeypatch
):
    seen = {}

    def prepare(**keywords):
        seen.update(keywords)
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_zeroshot, "prepare_zeroshot", prepare)
    start = experiment.start

    def noted(*args, **kwargs):
        hparams, run_opts = start(*args, **kwargs)
        seen.update(hparams["load_weights"].keywords)
        seen["short"] = hparams["reader"].short
        return hparams, run_opts

    monkeypatch.setattr(experiment, "start", noted)
    wanted = {
        "data_folder": str(folder),
        "labels_path": str(folder / "labels.csv"),
        "esc10": True,
        "tut_part": "evaluation",
        "clap_ckpt_path": str(folder / "clap.pth"),
        "ssl_checkpoints_dir": str(folder / "save"),
        "ssl_checkpointer": "latest",
    }
    with pytest.raises(KeyboardInterrupt):
        evaluate(hparams="tut", short_audio="zero", **wanted)
    wanted |= {"dataset": "tut", "short": "zero"}
    assert {name: seen[name] for name in wanted} == wanted


def test_confusion_matrix_counts():
    truth, guesses = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0])
    figure = microsoft_zeroshot.confusion_figure(truth, guesses, "abc", 0.5)
    [axes] = figure.axes
    cells = {
        (text.get_position()[1], text.get_position()[0]): text.get_text()
        for text in axes.texts
    }
    assert cells == {(0, 0): "1", (0, 1): "1", (1, 1): "1", (2, 0): "1"}
    shares = axes.images[0].get_array()
    assert shares[0].tolist() == [0.5, 0.5, 0]


def test_names_of_classes_are_no_formulas():
    names = [r"do$\foo$g", "$5"]
    figure = microsoft_zeroshot.confusion_figure([0, 1], [0, 1], names, 1)
    figure.savefig(io.BytesIO(), format="png")
    [axes] = figure.axes
    assert [t.get_text() for t in axes.get_xticklabels()] == names


def test_confusion_matrix_of_very_many_classes():
    """A number or a name in each place would take minutes and gigabytes."""
    classes = np.arange(900)
    names = [f"class {k}" for k in classes]
    figure = microsoft_zeroshot.confusion_figure(classes, classes, names, 1)
    [axes] = figure.axes
    assert not axes.texts and len(axes.get_xticks()) == 100
    assert [t.get_text() for t in axes.get_yticklabels()] == names[::9]
    assert max(figure.get_size_inches()) < 40


def test_clips_that_are_not_scored_are_counted(evaluate):
    results, table = evaluate(debug=True, batch_size=2)
    counts = results["counts"]
    # The third batch is a clip of three windows.
    assert counts["clips"] == len(table) == 3
    assert counts["not_scored"] == 8 and counts["missing"] == 1


def test_results_of_other_weights_do_not_stay(evaluate, tmp_path, monkeypatch):
    """Where the disk is full once the table is written."""

    def write_json(content, path):
        raise OSError(f"{path} cannot be written")

    evaluate()
    monkeypatch.setattr(microsoft_zeroshot, "write_json", write_json)
    with pytest.raises(OSError, match="cannot be written"):
        evaluate()
    folder = tmp_path / "run"
    assert [path.name for path in folder.glob("*.csv")] == ["predictions.csv"]
    assert not [*folder.glob("*.json"), *folder.glob("*.png")]


def test_accuracy_interval():
    """Against the normal approximation, and at the ends."""
    correct = np.arange(400) < 300
    low, high = accuracy_interval(correct)
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - half, abs=0.005)
    assert high == pytest.approx(0.75 + half, abs=0.005)
    assert accuracy_interval(np.ones(9)) == (1.0, 1.0)
    assert accuracy_interval(np.zeros(9)) == (0.0, 0.0)
    with pytest.raises(ValueError, match="no clips"):
        accuracy_interval([])


@pytest.mark.parametrize("count", [1, 47, 79])
def test_the_interval_is_that_of_all_resamples(count):
    p = fractions.Fraction(count, 80)
    of_each = (math.comb(80, k) * p**k * (1 - p) ** (80 - k) for k in range(81))
    reached = list(itertools.accumulate(of_each))
    ends = [bisect.bisect_left(reached, q) / 80 for q in (0.025, 0.975)]
    assert accuracy_interval(np.arange(80) < count) == pytest.approx(ends)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssl_checkpoints_dir": ""}, "Name the weights"),
        ({"data_folder": ""}, "data_folder"),
        ({"ssl_checkpoints_dir": "nowhere"}, "ssl_checkpoints_dir=nowhere"),
        ({"esc10": True}, "no clips of ESC-10"),
        ({"clap": "{width: 4}"}, "does not fit the model"),
        ({"text_prompt": "[]"}, r"--text_prompt=\[\]: give a text"),
        ({"text_prompt": "[a, {}]"}, "a list of texts in quotes"),
        ({"batch_size": 0}, "--batch_size=0"),
        ({"num_workers": -1}, "--num_workers=-1: give a whole number"),
        ({"num_workers": 1.5}, "--num_workers=1.5: give a whole number"),
    ],
)
def test_wrong_input(evaluate, changes, message):
    with pytest.raises((ValueError, OSError, SystemExit), match=message):
        evaluate(**changes)
