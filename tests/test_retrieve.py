"""Curation by threshold through its command line, on a small store."""

import csv
import itertools
import json
import types

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, torchrun, torchrun_watched
from matplotlib.figure import Figure

import retrieve_from_emb_thresh as script
from curation import fastest, similarity
from curation.embeddings import Manifest
from curation.report import make_report, report_figure
from curation.tally import EDGES, Tally
from dataset.manifest import read_pairs
from files import alone

CURATION = ROOT / "hparams" / "curation"
DU = "audioset_insper_duv2"
THRESHOLD = 0.4
CAPTIONS = [
    "a dog barks, twice",
    'he says "no"',
    "rain\nand\r\nwind",
    "a $5 coin drops, $word",
    "ein Glöckchen läutet 雨",
    "",
    " spaces around ",
    "thunder\rhail",
    *(f"sound number {i}" for i in range(22)),
]


def store(folder, stem, vectors, manifest):
    np.save(folder / f"{stem}_embeddings.npy", vectors)
    # pandas leaves a lone \r without quotes, and then reads a line's end.
    path = folder / f"{stem}.csv"
    manifest.to_csv(path, index=False, quoting=csv.QUOTE_NONNUMERIC)


def random_vectors(count, seed):
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((count, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float16)


@pytest.fixture(scope="module")
def audio():
    names = ["a,b.wav", 'q"uote.wav', "$HOME.wav", "new\nline.wav", "ü 雨.wav"]
    names += [f"{i}.wav" for i in range(45)]
    starts = [i * 0.1 if i % 3 else np.nan for i in range(50)]
    paths = [f"/data/{name}" for name in names]
    ends = [start + 5 for start in starts]
    return pd.DataFrame({"wav_path": paths, "start": starts, "end": ends})


@pytest.fixture(scope="module")
def naive():
    """Similarities rounded as fp16 stores give them."""
    stored = (random_vectors(50, 0), random_vectors(30, 5))
    audio, text = (v.astype(np.float64) for v in stored)
    return audio @ text.T


@pytest.fixture
def folder(tmp_path, audio):
    store(tmp_path, "audio_audioset", random_vectors(50, 0), audio)
    captions = pd.DataFrame({"ID": range(30), "caption": CAPTIONS})
    for stem in ("text_insper", "esc_insper_t2t"):
        store(tmp_path, stem, random_vectors(30, 5), captions)
    return tmp_path


@pytest.fixture
def run(folder, monkeypatch):
    """Runs the script; returns rows of the CSV and the report, or None."""
    # Several rounds of parts of lines, as in a large search.
    monkeypatch.setattr(script, "_LINES_AT_ONCE", 7)
    monkeypatch.setattr("curation.embeddings._ROWS_AT_ONCE", 6)
    monkeypatch.setattr("files._PIECE_ROWS", 13)

    def run(yaml=DU, picture=False, **flags):
        draw = report_figure if picture else lambda *_: Figure(figsize=(1, 1))
        monkeypatch.setattr(script, "report_figure", draw)
        flags = {
            "emb_dir": folder,
            "sim_threshold": THRESHOLD,
            "noprogressbar": True,
        } | flags
        argv = [f"--{k}={v}" for k, v in flags.items() if v is not None]
        script.main([str(CURATION / f"{yaml}_retr.yaml"), *argv])
        path, rows = folder / f"{yaml}_curation.csv", None
        if path.exists():
            with open(path, encoding="utf-8", newline="") as file:
                rows = list(csv.reader(file))
        path, report = folder / f"{yaml}_report.json", None
        if path.exists():
            report = json.loads(path.read_text("utf-8"))
        return rows, report

    return run


def expected_rows(pairs, naive, audio):
    rows = [["ID", "wav_path", "caption", "similarity", "start", "end"]]
    for i, (a, t) in enumerate(pairs):
        times = [audio[name][a] for name in ("start", "end")]
        cells = ["" if np.isnan(time) else str(time) for time in times]
        cells = [cell.removesuffix(".0") for cell in cells]
        value = f"{naive[a, t]:.6f}"
        rows.append([str(i), audio["wav_path"][a], CAPTIONS[t], value, *cells])
    return rows


def over(naive, threshold):
    return [tuple(p) for p in np.argwhere(naive >= threshold).tolist()]


@pytest.mark.parametrize("flags", [
    {}, {"audio_bs": 7}, {"search_precision": "bf16"},
    {"search_precision": "int8"},
    {"search_precision": "fp32", "with_report": True}, {"max_pairs": 10000},
])  # fmt: skip
def test_csv_holds_exactly_the_pairs(run, naive, audio, flags):
    rows, _ = run(**flags)
    assert rows == expected_rows(over(naive, THRESHOLD), naive, audio)
    assert len(rows) > 60
    cells = {cell for row in rows[1:] for cell in row}
    assert cells >= {*CAPTIONS[:8], *audio["wav_path"][:5]}


def test_fewer_dimensions_give_the_same_file(
    run, naive, audio, folder, monkeypatch
):
    monkeypatch.setattr(fastest, "_NUM_AXES", (5,))
    # Wide products alone take time.
    monkeypatch.setattr(
        fastest,
        "product_seconds",
        lambda dtype, width, device, enough: width,
    )
    used = []

    def noted(*args, **kwargs):
        used.append(kwargs["axes"])
        return similarity.pairs_over(*args, **kwargs)

    monkeypatch.setattr(script, "pairs_over", noted)
    run()
    rows, report = run(with_report=False)
    # The one before is not of this file, in which other limits may hold.
    assert report is None
    assert not (folder / f"{DU}_report.png").exists()
    assert used[0] is None and used[1].shape == (16, 5)
    assert rows == expected_rows(over(naive, THRESHOLD), naive, audio)


def test_pairs_are_counted_by_class(run, folder, naive):
    classes = ["rain", "dog", "siren"]
    table = pd.DataFrame({"caption": CAPTIONS})
    table["class"] = [classes[i % 2] for i in range(29)] + ["siren"]
    assert not (naive[:, 29] >= 0.6).any()
    store(folder, "esc_insper_t2t", random_vectors(30, 5), table)
    name = "esc_insper_audioset_dudsv3"
    _, report = run(name, sim_threshold=0.6)
    counts = dict.fromkeys(classes, 0)
    for _, text in over(naive, 0.6):
        counts[table["class"][text]] += 1
    assert report["kept"]["pairs_by_class"] == counts
    log = (folder / f"{name}_log" / "log.txt").read_text()
    assert "No pairs for siren" in log
    assert f"Pairs by class: rain {counts['rain']}, dog " in log


def test_training_reads_it(run, folder, naive, audio):
    run()
    pairs = read_pairs(str(folder / f"{DU}_curation.csv"), "curation_csv")
    expected = over(naive, THRESHOLD)
    assert pairs["caption"].tolist() == [CAPTIONS[t] for _, t in expected]
    for name in ("start", "end"):
        times = audio[name][[a for a, _ in expected]]
        np.testing.assert_array_equal(pairs[name], times)


@pytest.mark.parametrize("task, default", [
    ("esc", 0.7), ("us8k", 0.7), ("tut", 0.65)
])  # fmt: skip
def test_ads_takes_the_captions_of_its_task(
    run, folder, naive, audio, task, default
):
    if task != "esc":
        for path in folder.glob("esc_insper*"):
            path.rename(folder / path.name.replace("esc", task))
    (folder / "text_insper_embeddings.npy").unlink()
    yaml = f"{task}_insper_audioset_dudsv3"
    rows, report = run(yaml, sim_threshold="")
    assert report["threshold"] == default
    assert rows == expected_rows(over(naive, default), naive, audio)


def test_stores_that_are_not_there_say_what_makes_them(run, folder):
    for yaml, stem, advice in (
        (
            "us8k_insper_audioset_dudsv3",
            "us8k_insper_t2t",
            "run retrieve_ds_t2",
        ),
        (DU, "text_insper", "give the save folder of a finished embedding run"),
    ):
        path = folder / f"{stem}_embeddings.npy"
        path.unlink(missing_ok=True)
        message = f"^{path} does not exist: {advice}"
        with pytest.raises(FileNotFoundError, match=message):
            run(yaml)


def test_default_threshold_of_du(run, naive):
    assert run(sim_threshold=None)[1]["threshold"] == 0.75


def test_manifests_elsewhere(run, folder, tmp_path_factory, naive):
    other = tmp_path_factory.mktemp("lists") / "files.txt"
    other.write_text("".join(f"other/{i}.wav\n" for i in range(50)))
    captions = pd.DataFrame({"caption": [f"number {i}" for i in range(30)]})
    captions.to_csv(other.with_name("captions.csv"), index=False)
    rows, _ = run(
        aud_ds_path=other, txt_ds_path=other.with_name("captions.csv")
    )
    pairs = over(naive, THRESHOLD)
    # Relative paths start from the list, wherever the pairs are written.
    expected = [f"{other.parent}/other/{a}.wav" for a, _ in pairs]
    assert [row[1] for row in rows[1:]] == expected
    assert [row[2] for row in rows[1:]] == [f"number {t}" for _, t in pairs]
    assert {row[4] for row in rows[1:]} == {""}


def test_limits_keep_the_best(run, naive, audio, monkeypatch):
    pairs = over(naive, 0.2)

    def best(pairs, kind, count):
        kept = []
        for group in {p[kind] for p in pairs}:
            members = [p for p in pairs if p[kind] == group]
            members.sort(key=lambda p: (-naive[p], p))
            kept += members[:count]
        return sorted(kept)

    by_audio = best(pairs, 0, 2)
    assert len(by_audio) < len(pairs)
    rows, _ = run(sim_threshold=0.2, max_captions_per_audio=2)
    assert rows == expected_rows(by_audio, naive, audio)
    # Small buffers: the best are chosen again and again.
    monkeypatch.setattr(script, "_BUFFER_PAIRS", 1)
    flags = {"sim_threshold": 0.2, "max_audios_per_caption": 3, "audio_bs": 4}
    rows, report = run(**flags)
    expected = best(pairs, 1, 3)
    assert rows == expected_rows(expected, naive, audio)
    assert report["kept"] == {
        "pairs": len(expected),
        "clips": len({a for a, _ in expected}),
        "captions": len({t for _, t in expected}),
    }
    rows, _ = run(**flags, max_captions_per_audio=2)
    assert rows == expected_rows(best(by_audio, 1, 3), naive, audio)


def test_windows_of_a_clip_are_counted_as_such(run, folder, naive, capsys):
    manifest = pd.DataFrame(
        {
            "wav_path": [f"{i // 2}.wav" for i in range(50)],
            "start": [5.0 * (i % 2) for i in range(50)],
        }
    )
    store(folder, "audio_audioset", random_vectors(50, 0), manifest)
    _, report = run(picture=True)
    kept = over(naive, THRESHOLD)
    count = len({a for a, _ in kept})
    assert report["kept"]["windows"] == count
    assert report["curve"]["windows"][40] == count
    assert "clips" not in report["kept"] | report["curve"]
    assert (
        f"{len(kept)} pairs of {count} windows and" in capsys.readouterr().out
    )


def test_limits_count_equal_captions_once(run, folder, naive):
    """Rows 20 and 21 have the caption and the embedding of row 9."""
    vectors = random_vectors(30, 5)
    vectors[20:22] = vectors[9]
    captions = CAPTIONS.copy()
    captions[20:22] = [captions[9]] * 2
    frame = pd.DataFrame({"ID": range(30), "caption": captions})
    store(folder, "text_insper", vectors, frame)
    same = naive.copy()
    same[:, 20:22] = same[:, [9]]
    assert len(run(sim_threshold=0)[0]) == (same >= 0).sum() + 1
    once = np.delete(same, [20, 21], axis=1)
    texts = np.delete(np.array(captions), [20, 21])

    def found(**limits):
        rows, _ = run(sim_threshold=0, **limits)
        return [tuple(row[1:4]) for row in rows[1:]]

    def expected(kept, paths):
        return [
            (paths[a], texts[t], f"{once[a, t]:.6f}")
            for a, t in np.argwhere(kept)
        ]

    paths = pd.read_csv(folder / "audio_audioset.csv")["wav_path"]
    ranks = (-once).argsort(axis=1).argsort(axis=1)
    assert found(max_captions_per_audio=5) == expected(
        (ranks < 5) & (once >= 0), paths
    )
    ranks = (-once).argsort(axis=0).argsort(axis=0)
    assert found(max_audios_per_caption=3) == expected(
        (ranks < 3) & (once >= 0), paths
    )


@pytest.mark.parametrize(
    ("flags", "most"),
    [
        ({}, 7),
        ({"max_captions_per_audio": 2}, 7),
        ({"max_audios_per_caption": 2}, None),
        ({"dry_run": True}, None),
    ],
)
def test_a_search_stops_early_if_it_would_write_all_pairs(flags, most):
    names = ["target_pairs", "max_captions_per_audio", "max_audios_per_caption"]
    hparams = dict.fromkeys(names) | {"max_pairs": 7, "sim_threshold": 0.4}
    hparams |= {"dry_run": False, "with_report": False, **flags}
    text = types.SimpleNamespace(manifest=pd.DataFrame({"caption": ["rain"]}))
    limits = []

    def find(threshold, with_report, kinds, per_audio, most):
        limits.append(most)
        return iter(())

    script.chosen_pairs(find, None, text, hparams)
    assert limits == [most]


def test_equal_captions_count_once_whichever_a_clip_reaches():
    """In a store of another program their embeddings may differ."""
    kinds = np.array([0, 1, 0])
    pairs = (
        np.array([0, 0, 1, 1, 2]),
        np.array([1, 2, 0, 2, 0]),
        np.array([0.6, 0.9, 0.8, 0.9, 0.7]),
    )
    [found] = script.best_per_audio([pairs], kinds, None)
    assert found[0].tolist() == [0, 0, 1, 2]
    assert found[1].tolist() == [1, 2, 0, 0]
    [found] = script.best_per_caption([found], kinds, 2)
    assert found[0].tolist() == [0, 0, 1]
    assert found[1].tolist() == [1, 2, 0]
    assert found[2].tolist() == [0.6, 0.9, 0.8]


def test_max_pairs_stops_and_leaves_what_was_there(run, folder, naive):
    path = folder / f"{DU}_curation.csv"
    run(sim_threshold=0.6)
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="--max_pairs=20 .*--target_pairs"):
        run(max_pairs=20, audio_bs=4)
    assert path.read_bytes() == before
    assert not list(folder.glob("*.partial"))
    count = len(over(naive, THRESHOLD))
    assert len(run(max_pairs=count)[0]) == count + 1
    with pytest.raises(SystemExit, match="--max_pairs"):
        run(max_pairs=count - 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("target", [40, 93, 700, 10000])
def test_target_pairs_takes_the_lowest_threshold(
    run, naive, audio, target, precision
):
    fits = [e for e in EDGES if e >= 0 and (naive >= e).sum() <= target]
    rows, report = run(
        target_pairs=target, search_precision=precision, audio_bs=9
    )
    assert report["threshold"] == fits[0]
    assert rows == expected_rows(over(naive, fits[0]), naive, audio)


def test_target_pairs_tells_what_it_overrides_and_counts(run, naive, capsys):
    edge = min(e for e in EDGES if e >= 0 and (naive >= e).sum() <= 120)
    assert edge != THRESHOLD
    rows, _ = run(target_pairs=120)
    printed = capsys.readouterr().out
    reach = f"=0.4; {len(rows) - 1} pairs reach it"
    assert f"{edge:g}, in place of --sim_threshold{reach}" in printed
    assert "may keep fewer" not in printed
    assert len(run(target_pairs=120, max_captions_per_audio=1)[0]) < len(rows)
    printed = capsys.readouterr().out
    assert reach in printed
    assert "counts pairs before --max_captions_per_audio" in printed


def test_chosen_pairs_alone_stay_in_memory(monkeypatch):
    sizes = []

    def joined(buffer, join=script._joined):
        pairs = join(buffer)
        sizes.append(len(pairs[0]))
        return pairs

    monkeypatch.setattr(script, "_joined", joined)
    monkeypatch.setattr(script, "_BUFFER_PAIRS", 1)
    rng = np.random.default_rng(0)
    batches = [
        (np.full(10, i), np.arange(10), rng.uniform(0.5, 1, 10))
        for i in range(100)
    ]
    _, pairs = script.best_on_grid(batches, 0.5, 30)
    assert 20 < len(pairs[0]) <= 30 and max(sizes) <= 70
    [pairs] = script.best_per_caption(batches, np.arange(10), 2)
    assert len(pairs[0]) == 20 and max(sizes) <= 70


@pytest.mark.parametrize(
    ("target", "edge", "kept"), [(4, 0.25, 4), (3, 0.26, 3), (2, 0.51, 2)]
)
def test_pairs_at_the_threshold_that_is_found_are_kept(target, edge, kept):
    values = np.array([1, 1, 0.5, 0.25])
    batches = [
        (np.full(2, i), np.arange(2), values[part])
        for i, part in enumerate((slice(2), slice(2, 4)))
    ]
    found, pairs = script.best_on_grid(batches, 0.25, target)
    assert found == edge
    assert pairs[2].tolist() == values[:kept].tolist()


def test_target_pairs_that_copies_exceed(run, folder):
    vectors = np.zeros((30, 16), np.float16)
    vectors[:, 0] = 1
    np.save(folder / "text_insper_embeddings.npy", vectors)
    np.save(folder / "audio_audioset_embeddings.npy", vectors[[0] * 50])
    with pytest.raises(SystemExit, match="--target_pairs=7: more pairs"):
        run(target_pairs=7)


def test_no_pair_is_a_result(run, naive, capsys):
    rows, report = run(sim_threshold=0.99, search_precision="fp32")
    assert rows == expected_rows([], naive, None)
    # The script's own log goes to stdout.
    printed = capsys.readouterr().out
    assert f"the highest similarity is {naive.max():.6f}" in printed
    assert report["highest"] == naive.max()
    assert report["kept"] == {"pairs": 0, "clips": 0, "captions": 0}


def test_dry_run_writes_the_report_alone(run, folder, naive):
    rows, report = run(
        dry_run=True, with_report=False, max_pairs=1, picture=True
    )
    assert rows is None
    assert report["dry_run"]
    assert report["kept"]["pairs"] == (naive >= THRESHOLD).sum()
    assert (folder / f"{DU}_report.png").stat().st_size > 10000
    assert not run()[1]["dry_run"]
    limits = {"max_captions_per_audio": 2, "max_audios_per_caption": 1}
    limits["search_precision"] = "fp32"
    kept = run(**limits)[1]["kept"]
    assert kept["pairs"] < report["kept"]["pairs"]
    assert run(**limits, dry_run=True, max_pairs=1)[1]["kept"] == kept


def test_report_counts_what_each_threshold_keeps(run, naive):
    _, report = run(search_precision="fp32")
    curve = report["curve"]
    assert curve["threshold"] == [k / 100 for k in range(101)]
    reach = [naive >= e for e in curve["threshold"]]
    assert curve["pairs"] == [r.sum() for r in reach]
    assert curve["clips"] == [r.any(axis=1).sum() for r in reach]
    assert curve["captions"] == [r.any(axis=0).sum() for r in reach]
    edges = np.arange(-100, 101) / 100
    counts = [
        ((naive >= low) & (naive < high)).sum()
        for low, high in itertools.pairwise(edges)
    ]
    assert report["histogram"]["edges"] == edges.tolist()
    assert report["histogram"]["counts"] == counts
    assert report["kept"]["clips"] == curve["clips"][40]
    assert report["kept"]["captions"] == curve["captions"][40]
    frequencies = dict(zip(CAPTIONS, (naive >= THRESHOLD).sum(axis=0)))
    best = sorted(frequencies.items(), key=lambda item: (-item[1], item[0]))
    assert report["frequent_captions"] == [
        {"caption": c, "pairs": n} for c, n in best[:20]
    ]


def test_equal_captions_are_one_in_the_report():
    tally = Tally(3)
    kept = np.array([4, 0, 3])
    report = make_report(tally, 9, 0.5, kept, ["rain", "dog", "rain"])
    assert report["frequent_captions"] == [{"caption": "rain", "pairs": 7}]


def test_report_tells_what_is_exact():
    tally = Tally(2)
    tally.start(0.3)
    tally.margin = 0.01
    report = make_report(tally, 9, 0.5, np.zeros(2, int), ["rain", "dog"])
    assert (report["exact_from"], report["margin"]) == (0.3, 0.01)
    assert (report["audio_rows"], report["caption_rows"]) == (9, 2)


def test_similarities_above_1_are_in_the_last_bin():
    tally = Tally(1)
    tally.start(0.5)
    tally.add_pairs(np.array([0]), np.array([0]), np.array([1.0003]))
    report = make_report(tally, 1, 0.5, np.array([1]), ["rain"])
    assert report["histogram"]["counts"] == [0] * 199 + [1]
    assert report["curve"]["pairs"][100] == 1


def test_picture_of_nothing(tmp_path):
    report = make_report(Tally(0), 0, 0.5, np.zeros(0, int), [])
    figure = report_figure(report, "nothing")
    figure.savefig(tmp_path / "nothing.png")
    assert figure.axes[2].get_title() == "No pair is kept"
    assert report["highest"] is None
    assert sum(report["curve"]["pairs"]) == 0


def test_picture_shows_the_threshold_and_captions_as_they_are(run):
    _, report = run()
    report["frequent_captions"][7]["caption"] = "a $5 coin, a $1 coin"
    figure = report_figure(report, "a $title$")
    histogram, curve, captions = figure.axes
    for axes in (histogram, curve):
        assert axes.get_yscale() == "log"
        marks = [line.get_xdata()[0] for line in axes.lines]
        assert THRESHOLD in marks
    for line in curve.lines[:3]:
        assert line.get_ydata().tolist() == report["curve"][line.get_label()]
    # The first caption is on top.
    assert captions.yaxis_inverted()
    counts = [item["pairs"] for item in report["frequent_captions"]]
    assert [bar.get_width() for bar in captions.patches] == counts
    labels = [text.get_text() for text in captions.texts]
    pairs = report["frequent_captions"][7]["pairs"]
    assert labels[7] == f"{pairs}   a $5 coin, a $1 coin"
    assert not any(text.get_parse_math() for text in captions.texts)


def test_flags_that_make_no_sense(run):
    with pytest.raises(SystemExit, match="^Give --emb_dir: "):
        run(emb_dir="")
    for name, value in {
        "sim_threshold": "high",
        "audio_bs": 0,
        "max_pairs": "many",
        "search_precision": "int4",
        "max_captions_per_audio": 1.5,
        "target_pairs": -3,
    }.items():
        with pytest.raises(SystemExit, match=f"--{name}={value}: give "):
            run(**{name: value})
    with pytest.raises(SystemExit, match="5 may give more than --max_pairs=3"):
        run(target_pairs=5, max_pairs=3)
    run(target_pairs=5, max_pairs=3, dry_run=True)


@pytest.mark.parametrize("flag", [
    {"precision": "bf16"}, {"eval_precision": "bf16"}, {"auto_mix_prec": True},
    {"bfloat16_mix_prec": True},
])  # fmt: skip
def test_precisions_of_networks_are_refused(run, flag):
    [name] = flag
    with pytest.raises(SystemExit, match=f"^--{name} .* --search_precision"):
        run(**flag)


def test_there_is_a_dry_run_and_no_other(run):
    with pytest.raises(SystemExit, match="^--debug .* --dry_run=True"):
        run(debug=True)


def test_stores_of_different_size_are_refused(run, folder):
    vectors = np.eye(30, 8, dtype=np.float16)
    np.save(folder / "text_insper_embeddings.npy", vectors)
    with pytest.raises(ValueError, match="not of one model"):
        run()


@pytest.mark.parametrize(
    "flags",
    [
        {"audio_bs": 7},
        {"audio_bs": 7, "target_pairs": 40, "max_audios_per_caption": 2},
    ],
)
def test_torchrun_shares_the_search(run, folder, flags, tmp_path):
    """Two gloo processes, of which one has more blocks."""
    # Counts below the threshold come from the fast product, whose format is
    # otherwise chosen by its speed at the time.
    flags = {"search_precision": "fp32", **flags}
    rows, report = run(**flags)
    for path in folder.glob(f"{DU}_*"):
        if path.is_file():
            path.unlink()
    flags = {"emb_dir": folder, "sim_threshold": THRESHOLD, **flags}
    watch = """
search = script.pairs_over

def noted(*args, rows, **kwargs):
    note(rows)
    return search(*args, rows=rows, **kwargs)

script.pairs_over = noted
"""
    shares = torchrun_watched(
        "retrieve_from_emb_thresh.py",
        [
            str(CURATION / f"{DU}_retr.yaml"),
            *(f"--{key}={value}" for key, value in flags.items()),
        ],
        tmp_path,
        watch,
    )
    assert set(shares[0]) == {"(0, 28)"} and set(shares[1]) == {"(28, 50)"}
    with open(folder / f"{DU}_curation.csv", newline="") as file:
        assert list(csv.reader(file)) == rows
    assert json.loads((folder / f"{DU}_report.json").read_text()) == report
    assert (folder / f"{DU}_report.png").exists()
    assert not list(folder.glob("*partial*"))


@pytest.mark.parametrize(
    ("repeated", "expected"),
    [([], False), ([0, 1], True), ([4, 5], True), ([5, 9], False)],
)
def test_windows_are_neighbours_of_one_file(
    tmp_path, monkeypatch, repeated, expected
):
    """Also where batches of the manifest meet, here after five rows."""
    monkeypatch.setattr("curation.embeddings._ROWS_AT_ONCE", 5)
    paths = [f"{'x' if i in repeated else i}.wav" for i in range(10)]
    manifest = Manifest([pd.DataFrame({"wav_path": paths})], tmp_path)
    assert script.has_windows(manifest) == expected


def test_a_second_search_is_refused(run, folder):
    """Several processes would take the pairs of the other search."""
    command = [f"{CURATION}/audioset_insper_duv2_retr.yaml"]
    command += [f"--emb_dir={folder}", "--dry_run=True"]
    with (
        alone(folder / f"{DU}_search.lock"),
        pytest.raises(AssertionError, match=r"_search\.lock: another process"),
    ):
        torchrun("retrieve_from_emb_thresh.py", command)
    # Of torchrun's processes that were killed, one goes on alone.
    (folder / f"{DU}_search.lock").touch()
    (folder / f"{DU}_pairs.partial.1").touch()
    with (
        alone(folder / f"{DU}_search.lock"),
        pytest.raises(OSError, match=r"_search\.lock: another process"),
    ):
        script.main(command)
    assert (folder / f"{DU}_pairs.partial.1").exists()
    (folder / f"{DU}_search.lock").touch()
    script.main(command)
    assert not (folder / f"{DU}_search.lock").exists()
    assert not (folder / f"{DU}_pairs.partial.1").exists()


def test_max_pairs_with_torchrun_leaves_nothing(run, folder):
    command = [
        str(CURATION / f"{DU}_retr.yaml"),
        *(f"--emb_dir={folder}", f"--sim_threshold={THRESHOLD}"),
        *("--audio_bs=4", "--max_pairs=20"),
    ]
    with pytest.raises(AssertionError, match="More than --max_pairs=20"):
        torchrun("retrieve_from_emb_thresh.py", command)
    assert not list(folder.glob("*partial*"))
    assert not (folder / f"{DU}_curation.csv").exists()


@pytest.mark.parametrize("most", [None, 6, 7])
def test_processes_stop_at_what_all_may_find(monkeypatch, tmp_path, most):
    """One process, as the main one of a group sees itself."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(script, "if_main_process", lambda: True)
    monkeypatch.setattr(script, "ddp_barrier", lambda: None)
    taken = []

    def batches():
        for i in range(5):
            taken.append(i)
            yield np.full(3, i), np.arange(3), np.ones(3)

    found = list(script.gathered(batches(), tmp_path / "pairs", most))
    assert len(taken) == len(found) == (3 if most else 5)
    assert not list(tmp_path.iterdir())
