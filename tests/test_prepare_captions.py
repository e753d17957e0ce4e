"""Captions found in official layouts, checked, counted and split."""

import hashlib
import json
import logging
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from dataset import prepare_captions as module
from dataset.prepare_captions import prepare_captions

AUDIOCAPS = Path(__file__).parents[2] / "shared/audiocaps"
HEADER = "audiocap_id,youtube_id,start_time,caption\n"
RATE = 8000


def wav(path, seconds=0.1):
    """A short audio file, in the format that its ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, round(RATE * seconds))
    soundfile.write(path, noise, RATE)
    return str(path)


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def read(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def pairs(save):
    """All pairs in the two manifests, as (dataset, wav_path, caption)."""
    both = pd.concat(
        [read(save / "train_raw.csv"), read(save / "valid_raw.csv")]
    )
    both = both[both["dataset"] != "spare_index"]
    return sorted(zip(both["dataset"], both["wav_path"], both["caption"]))


def spare(data):
    """Add a recording, for there must be one to train and one to validate."""
    text(data / "spare_index.tsv", "spare.wav\tspare\n")
    wav(data / "spare.wav")


def skipped(save):
    frame = read(save / "skipped_audio.csv")
    return dict(zip(frame["wav_path"], frame["reason"]))


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.fixture
def save(tmp_path):
    return tmp_path / "out" / "save"


def ready_csv(tmp_path, clips=20, captions=2):
    """A ready CSV of several recordings with several captions each."""
    rows = ["wav_path,caption"]
    for clip in range(clips):
        wav(tmp_path / f"audio/{clip:02}.wav")
        rows += [f"audio/{clip:02}.wav,{clip} {i}" for i in range(captions)]
    return text(tmp_path / "ready.csv", "\n".join(rows))


# ---- Layouts --------------------------------------------------------------


def test_audiocaps_any_csv_name_and_every_audio_name(data, save):
    text(
        data / "captions/whatever.csv",
        HEADER
        + "1,aaaaaaaaaaa,30,with its start\n"
        + "2,bbbbbbbbbbb,0,only the id\n"
        + "3,ccccccccccc,10,a Y before it\n"
        + "4,ddddddddddd,10,a Y and a start\n"
        + "5,-e_eeeeeee,7,\n"
        + "6,fffffffffff,40,nowhere\n"
        + "7,fffffffffff,40,nowhere again\n",
    )
    a = wav(data / "wavs/aaaaaaaaaaa_30.wav")
    b = wav(data / "wavs/deep/bbbbbbbbbbb.flac")
    c = wav(data / "other/Yccccccccccc.ogg")
    d = wav(data / "Yddddddddddd_10.WAV")
    wav(data / "-e_eeeeeee_7.wav")
    wav(data / "unlisted.wav", 1)
    counts = prepare_captions(save, data)
    assert pairs(save) == sorted(
        [
            ("audiocaps", a, "with its start"),
            ("audiocaps", b, "only the id"),
            ("audiocaps", c, "a Y before it"),
            ("audiocaps", d, "a Y and a start"),
        ]
    )
    assert skipped(save) == {"fffffffffff_40": "missing"}
    assert counts["datasets"] == {
        "audiocaps": {
            "clips": 4,
            "captions": 4,
            "hours": round(0.4 / 3600, 4),
            "missing": 1,
            "unreadable": 0,
            "no_caption": 1,
            "duplicates": 0,
            "held_out": 0,
        }
    }


def test_audiocaps_named_by_captions_is_one_clip_each(data, save):
    """As audiocaps-download has it: a file for each caption."""
    spare(data)
    rows = ["11,aaaaaaaaaaa,30,one", "12,aaaaaaaaaaa,30,two"]
    rows += ["13,bbbbbbbbbbb,0,three", "14,bbbbbbbbbbb,0,four"]
    text(data / "ac/val.csv", HEADER + "\n".join([*rows, "15,c,0,gone"]))
    for number in (11, 12, 14):
        wav(data / f"ac/val/{number}.wav")
    # Of other lists: numbers are no names that tell whose a file is.
    wav(data / "ac/elsewhere/13.wav")
    text(data / "own/own_index.tsv", "val/15.wav\tmine\n")
    own = wav(data / "own/val/15.wav")
    counts = prepare_captions(save, data)
    a, b = (str(data / f"ac/val/{number}.wav") for number in (11, 14))
    assert pairs(save) == sorted(
        [
            *(("audiocaps", a, caption) for caption in ("one", "two")),
            *(("audiocaps", b, caption) for caption in ("three", "four")),
            ("own_index", own, "mine"),
        ]
    )
    assert counts["datasets"]["audiocaps"]["missing"] == 1


def test_a_data_set_without_its_audio_is_told(data, save):
    spare(data)
    text(data / "ac/Train.CSV", HEADER + "1,aaaaaaaaaaa,30,x\n")
    with pytest.raises(ValueError, match="^All audio of audiocaps is missing"):
        prepare_captions(save, data)
    assert skipped(save) == {"aaaaaaaaaaa_30": "missing"}


def test_audiocaps_as_a_spreadsheet_writes_it(data, save):
    spare(data)
    header = '\ufeff"audiocap_id","youtube_id","start_time","caption"\r\n'
    text(data / "a.csv", header + '"1","aaaaaaaaaaa","30","a, b"\r\n\r\n')
    path = wav(data / "aaaaaaaaaaa.wav")
    prepare_captions(save, data)
    assert pairs(save) == [("audiocaps", path, "a, b")]


def test_audiocaps_starts_as_pandas_writes_them(data, save):
    """Where one is missing, whole numbers become floats."""
    rows = "1,a,30.0,x\n2,b,0.0,y\n3,c,70.0,z\n4,d,,w\n"
    text(data / "train.csv", HEADER + rows)
    names = ("a_30.wav", "Yb_0.wav", "c_70.0.wav", "d.wav")
    paths = [wav(data / name) for name in names]
    wav(data / "c_70.wav")
    prepare_captions(save, data)
    assert [path for _, path, _ in pairs(save)] == sorted(paths)


def test_audiocaps_takes_no_audio_of_other_data_sets(data, save):
    rows = "1,aaaaaaaaaaa,30,x\n2,bbbbbbbbbbb,0,y\n3,ccccccccccc,0,z\n"
    text(data / "AudioCaps/csv/train.csv", HEADER + rows)
    text(data / "AudioCaps/csv/val/val.csv", HEADER + "4,ddddddddddd,0,v\n")
    a = wav(data / "audio/aaaaaaaaaaa.wav")
    d = wav(data / "AudioCaps/csv/ddddddddddd.wav")
    fsd50k(data / "FSD50K", "dev", {"1": ("", "")})
    wav(data / "FSD50K/FSD50K.dev_audio/bbbbbbbbbbb.wav")
    text(data / "Birds/birds_index.tsv", "audio/ccccccccccc.wav\tbird\n")
    c = wav(data / "Birds/audio/ccccccccccc.wav")
    prepare_captions(save, data)
    assert pairs(save) == [
        ("audiocaps", d, "v"),
        ("audiocaps", a, "x"),
        ("birds_index", c, "bird"),
    ]
    assert skipped(save) == {
        "bbbbbbbbbbb_0": "missing",
        "ccccccccccc_0": "missing",
    }


def test_audio_in_a_format_that_is_not_read_is_not_missing(data, save):
    spare(data)
    rows = "1,aaaaaaaaaaa,30,x\n2,bbbbbbbbbbb,0,y\n3,ccccccccccc,0,z\n"
    text(data / "train.csv", HEADER + rows)
    # The whole video is there, and the clip beside it can be read.
    text(data / "aaaaaaaaaaa_30.mp4", "video")
    a = wav(data / "aaaaaaaaaaa.wav")
    b = text(data / "bbbbbbbbbbb.m4a", "AAC")
    counts = prepare_captions(save, data, max_bad_audio=0.5)
    assert pairs(save) == [("audiocaps", a, "x")]
    found = skipped(save)
    assert found["ccccccccccc_0"] == "missing"
    assert "a format that is not read: convert it" in found[str(b)]
    count = counts["datasets"]["audiocaps"]
    assert (count["missing"], count["unreadable"]) == (1, 1)
    with pytest.raises(ValueError, match=r"bbb.m4a \(is in a format that"):
        prepare_captions(save, data)


def test_audiocaps_prefers_the_clip_over_the_whole_video(data, save):
    spare(data)
    text(data / "train.csv", HEADER + "1,aaaaaaaaaaa,30,x\n")
    wav(data / "aaaaaaaaaaa.wav")
    clip = wav(data / "far/away/aaaaaaaaaaa_30.wav")
    prepare_captions(save, data)
    assert pairs(save) == [("audiocaps", clip, "x")]


def clotho(folder, split, names, caption="{name} {i}"):
    header = "file_name," + ",".join(f"caption_{i}" for i in range(1, 6))
    rows = [
        ",".join([name] + [caption.format(name=name, i=i) for i in range(5)])
        for name in names
    ]
    text(folder / f"clotho_captions_{split}.csv", "\n".join([header] + rows))


def test_clotho_beside_and_below_in_any_format(data, save):
    clotho(data / "Clotho", "development", ["Rain on roof.wav", "b.c.wav"])
    clotho(data / "Clotho", "validation", ["rüb.wav"])
    rain = wav(data / "Clotho/development/Rain on roof.wav")
    dotted = wav(data / "Clotho/development/b.c.flac")
    val = wav(data / "Clotho/clotho_audio_files/validation/rüb.wav")
    counts = prepare_captions(save, data)
    assert pairs(save) == sorted(
        ("clotho", path, f"{name} {i}")
        for path, name in (
            (rain, "Rain on roof.wav"),
            (dotted, "b.c.wav"),
            (val, "rüb.wav"),
        )
        for i in range(5)
    )
    assert counts["datasets"]["clotho"]["clips"] == 3
    assert counts["datasets"]["clotho"]["captions"] == 15


def test_clotho_in_the_folder_of_its_split_alone(data, save):
    spare(data)
    clotho(data / "z/Clotho", "development", ["same.wav", "near.wav"])
    # Nearer in the tree, and earlier in the alphabet, but not the split's.
    wav(data / "z/Clotho/a/same.wav")
    same = wav(data / "z/audio/development/same.wav")
    wav(data / "z/audio/near.flac")
    prepare_captions(save, data)
    assert {path for _, path, _ in pairs(save)} == {same}
    assert skipped(save) == {"development/near.wav": "missing"}


def test_equal_names_the_nearest(data, save):
    spare(data)
    clotho(data / "z/Clotho", "development", ["near.wav"])
    wav(data / "a/near.wav")
    near = wav(data / "z/audio/near.flac")
    prepare_captions(save, data)
    assert {path for _, path, _ in pairs(save)} == {near}


def test_macs_text_stays_text(data, save):
    spare(data)
    text(
        data / "MACS/MACS.yaml",
        "files:\n"
        "- filename: airport-1.wav\n"
        "  annotations:\n"
        "  - {annotator_id: 1, sentence: No, tags: [x]}\n"
        "  - {annotator_id: 2, sentence: '2019-01-01', tags: []}\n"
        "- filename: park-2.wav\n"
        "  annotations:\n"
        "  - {annotator_id: 1, sentence: 'Birds, children.'}\n",
    )
    airport = wav(data / "TAU/audio/airport-1.flac")
    counts = prepare_captions(save, data)
    assert pairs(save) == [
        ("macs", airport, "2019-01-01"),
        ("macs", airport, "No"),
    ]
    assert skipped(save) == {"park-2.wav": "missing"}
    assert counts["datasets"]["macs"]["missing"] == 1


def test_macs_null_is_no_caption(data, save):
    spare(data)
    nulls = ("null", "NULL", "~", "", "None")
    text(
        data / "MACS.yaml",
        "files:\n- filename: a.wav\n  annotations:\n"
        + "".join(f"  - sentence: {null}\n" for null in nulls)
        + "  - sentence: None of the birds sing\n",
    )
    path = wav(data / "a.wav")
    counts = prepare_captions(save, data)
    assert pairs(save) == [("macs", path, "None of the birds sing")]
    assert counts["datasets"]["macs"]["no_caption"] == len(nulls)


def fsd50k(folder, split, clips, metadata="FSD50K.metadata"):
    """FSD50K's layout; clips: name -> (title, description), None without."""
    rows = ["fname,labels,mids"] + [f'{name},"A,B","/m/1"' for name in clips]
    text(folder / f"FSD50K.ground_truth/{split}.csv", "\n".join(rows))
    info = {
        name: {"title": clip[0], "description": clip[1], "tags": ["t"]}
        for name, clip in clips.items()
        if clip
    }
    text(
        folder / metadata / f"{split}_clips_info_FSD50K.json", json.dumps(info)
    )


@pytest.mark.parametrize("metadata", ["FSD50K.metadata", "FSD50K.ground_truth"])
def test_fsd50k_title_and_description(data, save, metadata):
    root = data / "FSD50K"
    fsd50k(
        root,
        "dev",
        {
            "1": (
                "Dog_bark.wav",
                "My &quot;dog&quot;,<br />5 &lt; 6 and 3 < 4 &lt;live&gt;.\r\n"
                '<b>Loud</b>! <a href="http://x.y/z">http://x.y</a>\n'
                'See http://a.b/c <img src="http://i.j/k.png"> '
                "www.d.e  there",
            ),
            "2": ("Rain.AIFF", ""),
            "3": ("", "only described"),
            "4": ("", " \n"),
            "5": None,
            "6": ("v1.5 take", "lost"),
        },
        metadata,
    )
    fsd50k(root, "eval", {"7": ("Cat.m4a", "mews")}, metadata)
    wav(data / "other/6.wav")
    wav(root / "FSD50K.eval_audio/6.wav")
    paths = {n: wav(root / f"FSD50K.dev_audio/{n}.wav") for n in "12345"}
    paths["7"] = wav(root / "FSD50K.eval_audio/7.ogg")
    counts = prepare_captions(save, data)
    first = 'Dog_bark. My "dog", 5 < 6 and 3 < 4 <live>. Loud! See there'
    assert pairs(save) == [
        ("fsd50k", paths["1"], first),
        ("fsd50k", paths["2"], "Rain"),
        ("fsd50k", paths["3"], "only described"),
        ("fsd50k", paths["7"], "Cat. mews"),
    ]
    assert counts["datasets"]["fsd50k"]["no_caption"] == 2
    assert skipped(save) == {"FSD50K.dev_audio/6.wav": "missing"}


def test_half_of_a_surrogate_pair_is_replaced(data, save):
    """As where a text was cut within an emoji."""
    spare(data)
    fsd50k(data, "dev", {"1": ("rain \ud83d", "\ude00on \U0001f327")})
    path = wav(data / "FSD50K.dev_audio/1.wav")
    prepare_captions(save, data)
    caption = "rain \ufffd. \ufffdon \U0001f327"
    assert pairs(save) == [("fsd50k", path, caption)]


def test_fsd50k_title_keeps_a_dot_that_is_no_ending(data, save):
    spare(data)
    fsd50k(data, "dev", {"6": ("v1.5 take", "two")})
    path = wav(data / "FSD50K.dev_audio/6.wav")
    prepare_captions(save, data)
    assert pairs(save) == [("fsd50k", path, "v1.5 take. two")]


def test_index_files_with_several_captions_and_odd_text(data, save):
    odd = ["None", "NA", "$HOME costs 3 $", 'he says "hi", then', "naïve 雨"]
    quoted = "\n".join(odd).replace('"', '""')
    text(
        data / "deep/birds_index.tsv",
        f'audio/$a, "b".wav\t"{quoted}"\n'.replace(
            'audio/$a, "b".wav', '"audio/$a, ""b"".wav"'
        )
        + "../up.wav\t  two   blanks \n"
        + f'{data}/abs.wav\tmid "quoted" word\n'
        + "audio/gone.wav\tgone\n",
    )
    path = wav(data / 'deep/audio/$a, "b".wav')
    up, absolute = wav(data / "up.wav"), wav(data / "abs.wav")
    counts = prepare_captions(save, data)
    assert pairs(save) == sorted(
        [("birds_index", path, caption) for caption in odd]
        + [("birds_index", up, "two blanks")]
        + [("birds_index", absolute, 'mid "quoted" word')]
    )
    assert skipped(save) == {str(data / "deep/audio/gone.wav"): "missing"}
    assert counts["datasets"]["birds_index"]["clips"] == 3


def test_several_data_sets_and_a_ready_csv(tmp_path, data, save):
    text(data / "AudioCaps/train.csv", HEADER + "1,aaaaaaaaaaa,30,x\n")
    clip = wav(data / "AudioCaps/train/aaaaaaaaaaa.wav")
    text(data / "more_index.tsv", "b.wav\ty\n")
    other = wav(data / "b.wav")
    ready = text(
        tmp_path / "lists/ready.csv",
        "caption,similarity,wav_path,ID,start\n"
        "x,0.9,../data/AudioCaps/train/aaaaaaaaaaa.wav,1,0.05\n"
        "z,0.8,../data/b.wav,1,\n",
    )
    counts = prepare_captions(save, data, ready)
    assert pairs(save) == sorted(
        [
            ("audiocaps", clip, "x"),
            ("more_index", other, "y"),
            ("csv", clip, "x"),
            ("csv", other, "z"),
        ]
    )
    both = pd.concat(
        [read(save / "train_raw.csv"), read(save / "valid_raw.csv")]
    )
    columns = ["ID", "wav_path", "caption", "dataset", "duration", "start"]
    assert list(both.columns) == columns
    assert both["ID"].is_unique
    assert set(both["duration"]) == {"0.1"}
    assert dict(zip(both["ID"], both["start"])) == {
        "audiocaps_0": "",
        "more_index_0": "",
        "csv_0": "0.05",
        "csv_1": "",
    }
    assert list(counts["datasets"]) == ["audiocaps", "more_index", "csv"]
    # The recordings of the CSV are those of the folder, whatever their paths.
    assert counts["train"]["clips"] + counts["valid"]["clips"] == 2


def test_no_start_column_without_one_in_the_csv(tmp_path, save):
    prepare_captions(save, train_csv_path=ready_csv(tmp_path))
    for name in ("train_raw.csv", "valid_raw.csv"):
        assert list(read(save / name).columns) == [
            "ID",
            "wav_path",
            "caption",
            "dataset",
            "duration",
        ]


def test_duplicates_are_dropped_and_windows_are_not(tmp_path, save):
    wav(tmp_path / "a.wav")
    ready = text(
        tmp_path / "r.csv",
        "wav_path,caption,start\n"
        "a.wav,x,0\na.wav,x,0\na.wav, x ,0\na.wav,x,0.05\na.wav,y,0\n",
    )
    counts = prepare_captions(save, train_csv_path=ready, overfit_size=9)
    counts = counts["datasets"]["csv"]
    assert (counts["captions"], counts["duplicates"]) == (3, 2)
    train = read(save / "train_raw.csv")
    assert sorted(zip(train["caption"], train["start"])) == [
        ("x", "0.0"),
        ("x", "0.05"),
        ("y", "0.0"),
    ]


@pytest.mark.parametrize("used", [True, False])
def test_official_test_splits(data, save, caplog, used):
    caplog.set_level(logging.INFO)
    text(data / "ac/train.csv", HEADER + "1,aaaaaaaaaaa,30,ac train\n")
    text(data / "ac/test.csv", HEADER + "2,bbbbbbbbbbb,30,ac test\n")
    clotho(data / "cl", "development", ["c.wav"])
    clotho(data / "cl", "evaluation", ["d.wav"])
    fsd50k(data / "fsd", "dev", {"1": ("fsd dev", "")})
    fsd50k(data / "fsd", "eval", {"2": ("fsd eval", "")})
    for stem in ("aaaaaaaaaaa", "bbbbbbbbbbb", "c", "d"):
        wav(data / f"audio/{stem}.wav")
    wav(data / "fsd/FSD50K.dev_audio/1.wav")
    wav(data / "fsd/FSD50K.eval_audio/2.wav")
    counts = prepare_captions(save, data, official_test_splits=used)
    stems = {Path(path).stem for _, path, _ in pairs(save)}
    test_stems = {"bbbbbbbbbbb", "d", "2"} if used else set()
    assert stems == {"aaaaaaaaaaa", "c", "1"} | test_stems
    held = {n: c["held_out"] for n, c in counts["datasets"].items()}
    expected = (0, 0, 0) if used else (1, 5, 1)
    assert tuple(held[n] for n in ("audiocaps", "clotho", "fsd50k")) == expected
    assert f"duplicate, {expected[1]} held out" in caplog.text


@pytest.mark.parametrize(
    ("stem", "is_test"),
    [
        ("Test", True),
        ("audiocaps_test", True),
        ("test (1)", True),
        ("AudioCaps.Test.v2", True),
        ("tests", False),
        ("test-2024", True),
        ("AudioCaps-TEST_v2", True),
        ("latest", False),
        ("testing", False),
    ],
)
def test_names_of_the_test_split_of_audiocaps(data, save, stem, is_test):
    text(data / "train.csv", HEADER + "1,a,30,x\n2,b,30,y\n")
    text(data / f"{stem}.csv", HEADER + "3,c,30,z\n")
    for name in "abc":
        wav(data / f"{name}.wav")
    counts = prepare_captions(save, data, official_test_splits=False)
    assert counts["datasets"]["audiocaps"]["held_out"] == is_test


def test_a_recording_of_a_test_split_is_held_out_of_every_list(
    tmp_path, data, save
):
    clotho(data / "Clotho", "evaluation", ["d.wav"])
    wav(data / "Clotho/evaluation/d.wav")
    (data / "link.wav").symlink_to("Clotho/evaluation/d.wav")
    listed = "../Clotho/evaluation/d.wav\tx\n../link.wav\ty\na.wav\tz\n"
    text(data / "more/k_index.tsv", listed)
    path = wav(data / "more/a.wav")
    ready = ready_csv(tmp_path, clips=1, captions=1)
    text(ready, ready.read_text() + "\ndata/link.wav,x\n")
    counts = prepare_captions(save, data, ready, official_test_splits=False)
    assert [found for _, found, _ in pairs(save)] == [
        str(tmp_path / "audio/00.wav"),
        path,
    ]
    held = {n: c["held_out"] for n, c in counts["datasets"].items()}
    assert held == {"clotho": 5, "k_index": 2, "csv": 1}
    curated = curation_csv(tmp_path, ["data/link.wav", "data/Clotho/a.wav"])
    wav(data / "Clotho/a.wav")
    counts = prepare_captions(
        save, data, ready, official_test_splits=False, curation_csv=curated
    )
    [path] = pd.read_csv(save / "curated_raw.csv")["wav_path"]
    assert path == str(data / "Clotho/a.wav")
    assert counts["curated"]["held_out"] == 1
    assert prepare_captions(save, data, ready)["datasets"]["clotho"]["clips"]


def test_links_to_folders_are_followed_without_going_round(
    tmp_path, data, save
):
    text(tmp_path / "disk/train.csv", HEADER + "1,aaaaaaaaaaa,30,x\n")
    wav(tmp_path / "disk/audio/aaaaaaaaaaa.wav")
    spare(data)
    (data / "AudioCaps").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/audio/loop").symlink_to(data)
    prepare_captions(save, data)
    path = str(data / "AudioCaps/audio/aaaaaaaaaaa.wav")
    assert pairs(save) == [("audiocaps", path, "x")]


def test_a_csv_that_cannot_be_opened_is_warned_of(data, save, caplog):
    spare(data)
    text(data / "train.csv", HEADER + "1,aaaaaaaaaaa,30,x\n")
    path = wav(data / "aaaaaaaaaaa.wav")
    (data / "gone.csv").symlink_to(data / "nowhere")
    prepare_captions(save, data)
    assert pairs(save) == [("audiocaps", path, "x")]
    [warning] = [r for r in caplog.records if r.levelname == "WARNING"]
    assert "Left out, cannot be read: " in warning.getMessage()
    assert str(data / "gone.csv") in warning.getMessage()


def test_hidden_files_are_no_annotations(data, save):
    """On disks of other systems macOS puts a file ._x beside each x."""
    for name in ("birds_index.tsv", "train.csv"):
        attributes = b"\0\5\x16\7\0\2\0\0Mac OS X\xff\xfe"
        (data / f"._{name}").write_bytes(attributes + b"\n,audiocap_id\n")
    (data / ".train.csv").write_text(HEADER + "1,a,30\n")
    (data / ".#train.csv").symlink_to(data / "lock")
    with pytest.raises(ValueError, match="nothing recognised"):
        prepare_captions(save, data)
    text(data / "birds_index.tsv", "a.wav\tx\n.b.wav\ty\n")
    paths = [wav(data / name) for name in ("a.wav", ".b.wav")]
    prepare_captions(save, data)
    assert [path for _, path, _ in pairs(save)] == sorted(paths)


def test_the_tree_is_listed_once(data, save, monkeypatch):
    text(data / "a/train.csv", HEADER + "1,aaaaaaaaaaa,30,x\n")
    clotho(data / "b", "development", ["d.wav"])
    wav(data / "a/audio/aaaaaaaaaaa.wav")
    wav(data / "b/development/d.wav")
    listed = []
    scandir = os.scandir

    def counting(path):
        listed.append(str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counting)
    prepare_captions(save, data)
    assert len(listed) == len(set(listed)) == 5


# ---- Missing and unreadable audio -----------------------------------------


def test_unreadable_files_are_listed_and_counted(tmp_path, save, caplog):
    ready = ready_csv(tmp_path, clips=10)
    text(tmp_path / "audio/03.wav", "no audio")
    wav(tmp_path / "audio/04.wav", 0)
    (tmp_path / "audio/05.wav").unlink()
    counts = prepare_captions(save, train_csv_path=ready, max_bad_audio=0.3)
    found = skipped(save)
    bad, empty, gone = (str(tmp_path / f"audio/0{i}.wav") for i in (3, 4, 5))
    assert set(found) == {bad, empty, gone}
    assert found[bad].startswith("cannot be opened")
    assert found[empty] == "holds no samples"
    assert found[gone] == "missing"
    count = counts["datasets"]["csv"]
    assert (count["clips"], count["missing"], count["unreadable"]) == (7, 1, 2)
    assert not {path for _, path, _ in pairs(save)} & set(found)
    assert "1 audio files are missing and 2 unreadable" in caplog.text


def test_too_many_unreadable_files_stop_it(tmp_path, save):
    ready = ready_csv(tmp_path, clips=10)
    text(tmp_path / "audio/03.wav", "no audio")
    # 1 of the 9 that are present: missing ones do not water it down.
    (tmp_path / "audio/05.wav").unlink()
    with pytest.raises(ValueError, match=r"1 of 9 .*03\.wav.*skipped_audio"):
        prepare_captions(save, train_csv_path=ready, max_bad_audio=0.105)
    assert len(skipped(save)) == 2
    assert not (save / "prepare.json").exists()
    prepare_captions(save, train_csv_path=ready, max_bad_audio=0.112)


def test_all_unreadable_is_an_error_whatever_is_allowed(tmp_path, save):
    ready = ready_csv(tmp_path, clips=2)
    for name in ("00", "01"):
        text(tmp_path / f"audio/{name}.wav", "no audio")
    with pytest.raises(ValueError, match="2 of 2 audio files cannot be read"):
        prepare_captions(save, train_csv_path=ready, max_bad_audio=1)


def test_all_missing_names_what_was_looked_for(data, save, monkeypatch):
    text(data / "train.csv", HEADER + "1,aaaaaaaaaaa,30,x\n2,b,0,y\n")
    # A bare name must not be found in the current folder.
    monkeypatch.chdir(data)
    text(data / "b_0", "")
    with pytest.raises(ValueError, match="aaaaaaaaaaa_30, b_0\\."):
        prepare_captions(save, data)
    assert skipped(save) == {"aaaaaaaaaaa_30": "missing", "b_0": "missing"}


def test_nothing_left_is_an_error(data, save):
    text(data / "test.csv", HEADER + "1,aaaaaaaaaaa,30,x\n")
    wav(data / "aaaaaaaaaaa.wav")
    with pytest.raises(ValueError, match="No captions are left"):
        prepare_captions(save, data, official_test_splits=False)


# ---- Wrong input ----------------------------------------------------------


def test_neither_source(save):
    with pytest.raises(ValueError, match="--data_annot_folder, --train_csv"):
        prepare_captions(save)


def test_absent_folder(tmp_path, save):
    with pytest.raises(FileNotFoundError, match=r"annot_folder=.*nowhere"):
        prepare_captions(save, tmp_path / "nowhere")


def test_nothing_recognised_lists_what_was_looked_for(data, save):
    text(data / "esc50.csv", "filename,fold,target\n1.wav,1,0\n")
    text(data / "dev.csv", "name,text\n1,x\n")
    wav(data / "1.wav")
    with pytest.raises(ValueError) as error:
        prepare_captions(save, data)
    for part in (
        str(data),
        "audiocap_id,youtube_id,start_time,caption",
        "clotho_captions_",
        "MACS.yaml",
        "FSD50K.ground_truth",
        "*_index.tsv",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        ("train.csv", "audiocap_id,youtube_id,start\n1,a,2\n", "start_time, c"),
        ("train.csv", HEADER + "1,a,2,x, y\n", "Row #2: .* got 5"),
        ("train.csv", HEADER + '1,a,2,"x\n', "Row #2: unexpected end"),
        ("train.csv", HEADER, "lists no clips"),
        ("train.csv", HEADER.encode() + b"1,a,2,caf\xe9\n", "'utf-8'"),
        (
            "clotho_captions_validation.csv",
            "file_name,caption_1\n",
            "caption_5",
        ),
        ("clotho_captions_validation.csv", "", "Empty CSV"),
        ("MACS.yaml", "files: [", "is not YAML"),
        ("MACS.yaml", "files:\n- filename: a.wav\n", "KeyError..annotations"),
        ("MACS.yaml", "just text", "is not a list `files`"),
        ("a_index.tsv", b"a.wav\tcaf\xe9\n", "is not UTF-8"),
        ("a_index.tsv", 'a.wav\t"b\n', "line 1: unexpected end"),
        ("a_index.tsv", "a.wav\n", "line 1: not path"),
        ("a_index.tsv", "a.wav\tb\n\tc\n", "line 2: not path"),
        ("FSD50K.ground_truth/dev.csv", "name\n1\n", "column.s. fname"),
        ("dev_clips_info_FSD50K.json", "{", "is not JSON"),
        ("dev_clips_info_FSD50K.json", "[]", "does not give a `title`"),
        ("dev_clips_info_FSD50K.json", '{"1": {"title": "x"}}', "description"),
    ],
)
def test_broken_annotations_name_the_file(data, save, name, content, wrong):
    fsd50k(data, "dev", {"1": ("x", "y")}, metadata=".")
    wav(data / "1.wav")
    path = data / name
    path.write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    with pytest.raises(ValueError, match=wrong) as error:
        prepare_captions(save, data)
    assert str(path) in str(error.value)


def test_fsd50k_without_its_metadata(data, save):
    text(data / "dev.csv", "fname,labels,mids,split\n1,A,/m/1,train\n")
    wav(data / "1.wav")
    with pytest.raises(FileNotFoundError, match="dev_clips_info_FSD50K"):
        prepare_captions(save, data)


def test_metadata_of_a_split_that_is_held_out_is_not_needed(data, save):
    spare(data)
    fsd50k(data, "eval", {"1": ("x", "y")})
    (data / "FSD50K.metadata/eval_clips_info_FSD50K.json").unlink()
    path = wav(data / "FSD50K.eval_audio/1.wav")
    text(data / "k_index.tsv", f"{path}\theld out\na.wav\tz\n")
    used = wav(data / "a.wav")
    prepare_captions(save, data, official_test_splits=False)
    assert pairs(save) == [("k_index", used, "z")]
    with pytest.raises(FileNotFoundError, match="eval_clips_info_FSD50K"):
        prepare_captions(save, data)


def test_ready_csv_without_captions_names_its_flag(tmp_path, save):
    ready = text(tmp_path / "r.csv", "wav_path,text\na.wav,x\n")
    with pytest.raises(ValueError, match=r"--train_csv_path=.*caption"):
        prepare_captions(save, train_csv_path=ready)


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("valid_pct", 5, "above 0 and below 1"),
        ("valid_pct", 1, "above 0 and below 1"),
        ("valid_pct", -0.1, "above 0 and below 1"),
        ("valid_pct", None, "above 0 and below 1"),
        ("valid_pct", "0.1", "above 0 and below 1"),
        ("subset_pct", 0, "above 0 and at most 1"),
        ("subset_pct", 1.1, "above 0 and at most 1"),
        ("subset_pct", float("nan"), "above 0 and at most 1"),
        ("max_bad_audio", 5, "from 0 to 1"),
        ("overfit_size", 0, "at least 1"),
        ("overfit_size", 2.5, "at least 1"),
        ("overfit_size", True, "at least 1"),
    ],
)
def test_arguments_out_of_range(tmp_path, save, flag, value, allowed):
    with pytest.raises(ValueError, match=f"--{flag}={value}: .*{allowed}"):
        prepare_captions(
            save, train_csv_path=tmp_path / "r.csv", **{flag: value}
        )


# ---- The split ------------------------------------------------------------


def clips(path):
    return set(read(path)["wav_path"])


def test_split_by_recording(tmp_path, save):
    ready = ready_csv(tmp_path, clips=20, captions=3)
    counts = prepare_captions(save, train_csv_path=ready, valid_pct=0.2)
    train, valid = clips(save / "train_raw.csv"), clips(save / "valid_raw.csv")
    assert (len(train), len(valid), train & valid) == (16, 4, set())
    assert len(pairs(save)) == 60
    hours = {"train": round(1.6 / 3600, 4), "valid": round(0.4 / 3600, 4)}
    for part, clip_count in (("train", 16), ("valid", 4)):
        assert counts[part] == {
            "clips": clip_count,
            "captions": clip_count * 3,
            "hours": hours[part],
        }


def test_a_recording_under_two_paths_is_one(tmp_path, save):
    ready = ready_csv(tmp_path, clips=20, captions=1)
    rows = [ready.read_text()]
    for i in range(20):
        (tmp_path / f"link{i:02}.wav").symlink_to(f"audio/{i:02}.wav")
        rows.append(f"link{i:02}.wav,under another name")
    # Once only, though its clip has two names.
    rows.append("audio/00.wav,under another name")
    linked = text(tmp_path / "linked.csv", "\n".join(rows))
    alone = tmp_path / "alone"
    prepare_captions(alone, train_csv_path=ready, valid_pct=0.3)
    prepare_captions(save, train_csv_path=linked, valid_pct=0.3)
    for name in ("train_raw.csv", "valid_raw.csv"):
        # The same as without links, each with the caption of its link.
        assert clips(save / name) == clips(alone / name)
        assert len(read(save / name)) == 2 * len(read(alone / name))


@pytest.mark.parametrize(
    ("number", "valid_pct", "expected"),
    [(2, 0.001, 1), (2, 0.99, 1), (20, 0.5, 10)],
)
def test_size_of_the_validation_set(
    tmp_path, save, number, valid_pct, expected
):
    ready = ready_csv(tmp_path, clips=number)
    prepare_captions(save, train_csv_path=ready, valid_pct=valid_pct)
    assert len(clips(save / "valid_raw.csv")) == expected
    assert len(clips(save / "train_raw.csv")) == number - expected


def test_a_single_recording_leaves_none_to_validate_on(tmp_path, save):
    ready = ready_csv(tmp_path, clips=1)
    with pytest.raises(ValueError, match=r"set is empty: .*audio/00\.wav"):
        prepare_captions(save, train_csv_path=ready)
    assert not (save / "prepare.json").exists()
    counts = prepare_captions(save, train_csv_path=ready, overfit_size=2)
    assert counts["train"] == counts["valid"]


def test_a_table_is_hashed_in_pieces_as_if_whole(monkeypatch):
    table = pd.DataFrame({"a": list('x,"yz'), "b": [0.5, None, 1, 2, 3]})
    whole = hashlib.sha256(table.to_csv(index=False).encode()).hexdigest()
    for rows in (2, 5, 9):
        monkeypatch.setattr(module, "_HASHED_ROWS", rows)
        assert module._hash(table) == whole


def test_the_seed_alone_decides_the_split(tmp_path, monkeypatch):
    data = tmp_path / "data"
    for folder in ("a", "b", "c"):
        rows = []
        for i in range(6):
            wav(data / folder / f"{i}.wav")
            rows.append(f"{i}.wav\t{folder} {i}")
        text(data / folder / "x_index.tsv", "\n".join(rows))
    walk = os.walk

    def backwards(top, **options):
        tree = list(walk(top, **options))
        return ((f, d, files[::-1]) for f, d, files in reversed(tree))

    tables = {}
    for name, seed in (("first", 1), ("other", 2), ("again", 1)):
        if name == "again":
            monkeypatch.setattr(module.os, "walk", backwards)
        prepare_captions(tmp_path / name, data, valid_pct=0.5, seed=seed)
        tables[name] = [
            (tmp_path / name / f"{part}_raw.csv").read_text()
            for part in ("train", "valid")
        ]
    assert tables["first"] == tables["again"]
    assert clips(tmp_path / "first/valid_raw.csv") != clips(
        tmp_path / "other/valid_raw.csv"
    )


def test_the_order_of_the_rows_does_not_move_the_split(tmp_path, save):
    ready = ready_csv(tmp_path)
    header, *rows = ready.read_text().split("\n")
    turned = text(tmp_path / "turned.csv", "\n".join([header] + rows[::-1]))
    valid = []
    for path in (ready, turned):
        prepare_captions(save, train_csv_path=path, valid_pct=0.5)
        valid.append(clips(save / "valid_raw.csv"))
    assert valid[0] == valid[1]


def test_subset_of_the_training_recordings(tmp_path, save):
    ready = ready_csv(tmp_path, clips=20)
    subsets, valid = [], []
    for subset_pct in (0.001, 0.25, 0.5, 1):
        prepare_captions(
            save, train_csv_path=ready, valid_pct=0.2, subset_pct=subset_pct
        )
        subsets.append(clips(save / "train_raw.csv"))
        valid.append(clips(save / "valid_raw.csv"))
    assert [len(subset) for subset in subsets] == [1, 4, 8, 16]
    assert subsets[0] < subsets[1] < subsets[2] < subsets[3]
    assert len(valid[0]) == 4
    assert valid.count(valid[0]) == 4


def test_overfit_on_the_same_few_pairs(tmp_path, save):
    ready = ready_csv(tmp_path, clips=20)
    for size, expected in ((3, 3), (100, 38)):
        counts = prepare_captions(
            save, train_csv_path=ready, valid_pct=0.01, overfit_size=size
        )
        train = read(save / "train_raw.csv")
        assert len(train) == expected == counts["valid"]["captions"]
        assert train.equals(read(save / "valid_raw.csv"))
    # Shuffled: not the rows in the order of the CSV.
    assert list(train["ID"]) != [f"csv_{i}" for i in range(40)]


# ---- Running again --------------------------------------------------------


def test_same_arguments_use_the_files_again(tmp_path, save, caplog):
    caplog.set_level(logging.INFO)
    ready = ready_csv(tmp_path, clips=4)
    counts = prepare_captions(save, train_csv_path=ready)
    record = json.loads((save / "prepare.json").read_text())
    assert record["counts"] == counts and list(record["data"]) == ["csv"]
    assert record["arguments"] == {
        "data_annot_folder": None,
        "train_csv_path": str(ready),
        "valid_pct": 0.05,
        "subset_pct": 1.0,
        "overfit_size": None,
        "official_test_splits": True,
        "max_bad_audio": 0.05,
        "seed": 1234,
        "curation_csv": None,
        "data_curation_folder": None,
    }
    assert "same arguments" not in caplog.text
    text(save / "train_raw.csv", "left alone")
    caplog.clear()
    assert prepare_captions(save, train_csv_path=ready) == counts
    assert (save / "train_raw.csv").read_text() == "left alone"
    assert "same arguments" in caplog.text
    assert "csv: 4 clips" in caplog.text and "Split by" in caplog.text


@pytest.mark.parametrize("has_checkpoints", [False, True])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("captions", "captions or audio files of csv"),
        ("audio", "captions or audio files of audiocaps"),
        ("data set", "captions or audio files of new_index"),
        ("curated", "captions or audio files of curation_csv"),
        ("mended", r".* of csv, 1 files of .*skipped_audio.csv .*/03\.wav"),
        ("removed", "captions or audio files of csv"),
        ("replaced", "captions or audio files of csv"),
    ],
)
def test_changed_data_is_prepared_again_but_not_beside_checkpoints(
    tmp_path, data, save, caplog, change, named, has_checkpoints
):
    ready = ready_csv(tmp_path, clips=5)
    curated = curation_csv(tmp_path, ["audio/00.wav", "audio/01.wav"])
    text(tmp_path / "audio/03.wav", "no audio")
    text(data / "train.csv", HEADER + "1,aaaaaaaaaaa,30,x\n2,b,0,y\n")
    wav(data / "aaaaaaaaaaa.wav")

    def prepare():
        prepare_captions(
            save, data, ready, curation_csv=curated, max_bad_audio=0.5
        )
        return (save / "train_raw.csv").read_text()

    before = prepare()
    text(data / "notes.txt", "nothing of the data")
    wav(data / "unlisted.wav")
    os.utime(ready, (0, 0))
    text(save / "train_raw.csv", "left alone")
    if has_checkpoints:
        (save / "CKPT+1").mkdir()
    assert prepare() == "left alone"
    if change == "captions":
        text(ready, ready.read_text() + "\naudio/02.wav,more")
    elif change == "audio":
        wav(data / "b.wav")
    elif change == "data set":
        text(data / "new_index.tsv", "unlisted.wav\tnew")
    elif change == "curated":
        curation_csv(tmp_path, ["audio/00.wav"])
    elif change == "removed":
        (tmp_path / "audio/04.wav").unlink()
    elif change == "replaced":
        wav(tmp_path / "audio/04.wav", 0.2)
    else:
        wav(tmp_path / "audio/03.wav")
    caplog.clear()
    if has_checkpoints:
        assert prepare() == "left alone"
        assert re.search(f"{named}.*began with; another --out", caplog.text)
    else:
        assert (prepare() == before) == (change == "curated")
        assert re.search(f"prepared again: {named}", caplog.text)


def test_other_arguments_prepare_again(tmp_path, save, caplog):
    ready = ready_csv(tmp_path, clips=4)
    prepare_captions(save, train_csv_path=ready)
    assert not caplog.records
    counts = prepare_captions(save, train_csv_path=ready, valid_pct=0.5)
    assert counts["valid"]["clips"] == 2
    assert "valid_pct (0.05 -> 0.5)" in caplog.text
    assert len(clips(save / "valid_raw.csv")) == 2


def test_a_run_with_checkpoints_keeps_its_pairs(tmp_path, save):
    ready = ready_csv(tmp_path, clips=4)
    prepare_captions(save, train_csv_path=ready)
    (save / "CKPT+1").mkdir()
    files = {path: path.read_bytes() for path in save.glob("*.*")}
    assert len(files) == 4
    with pytest.raises(ValueError, match=r"valid_pct \(0.05 -> 0.5\).*same"):
        prepare_captions(save, train_csv_path=ready, valid_pct=0.5)
    lines = ready.read_text().splitlines()
    other = text(tmp_path / "other.csv", "\n".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"train_csv_path .* -> .*other.csv"):
        prepare_captions(save, train_csv_path=other)
    # The same pairs, listed elsewhere, whatever became of their audio.
    moved = ready.rename(tmp_path / "moved.csv")
    (tmp_path / "audio/00.wav").unlink()
    prepare_captions(save, train_csv_path=moved, max_bad_audio=0.5)
    assert files == {path: path.read_bytes() for path in save.glob("*.*")}


@pytest.mark.parametrize(
    "name", ["train_raw.csv", "valid_raw.csv", "skipped_audio.csv"]
)
def test_an_absent_output_is_made_again(tmp_path, save, name):
    ready = ready_csv(tmp_path, clips=4)
    prepare_captions(save, train_csv_path=ready)
    (save / name).unlink()
    prepare_captions(save, train_csv_path=ready)
    assert (save / name).exists()


def test_a_run_that_failed_is_not_taken_for_one_that_did_not(tmp_path, save):
    ready = ready_csv(tmp_path, clips=4)
    prepare_captions(save, train_csv_path=ready)
    broken = tmp_path / "audio/00.wav"
    broken.write_bytes(bytes(broken.stat().st_size))  # the same data at sight
    with pytest.raises(ValueError, match="cannot be read"):
        prepare_captions(save, train_csv_path=ready, seed=5)
    # With the first arguments, the files are not simply used again.
    with pytest.raises(ValueError, match="cannot be read"):
        prepare_captions(save, train_csv_path=ready)


def test_a_run_that_broke_off_leaves_no_record(tmp_path, save, monkeypatch):
    """Of earlier arguments, beside lists of its own."""

    def full(content, path):
        raise OSError("No space left on device")

    ready = ready_csv(tmp_path, clips=4)
    prepare_captions(save, train_csv_path=ready)
    before = (save / "train_raw.csv").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", full)
        with pytest.raises(OSError, match="No space left"):
            prepare_captions(save, train_csv_path=ready, valid_pct=0.5)
    assert (save / "train_raw.csv").read_bytes() != before
    prepare_captions(save, train_csv_path=ready)
    assert (save / "train_raw.csv").read_bytes() == before


def test_logs_a_line_per_data_set_and_one_for_the_split(data, save, caplog):
    caplog.set_level(logging.INFO, logger="dataset.prepare_captions")
    text(data / "train.csv", HEADER + "1,aaaaaaaaaaa,30,x\n2,b,0,y\n")
    wav(data / "aaaaaaaaaaa.wav")
    text(data / "k_index.tsv", "c.wav\ty\n")
    wav(data / "c.wav", 36)
    prepare_captions(save, data)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[1:3] == [
        "audiocaps: 1 clips (0.00 h), 1 captions; 1 clips missing, 0 "
        "unreadable; 0 captions empty, 0 duplicate, 0 held out",
        "k_index: 1 clips (0.01 h), 1 captions; 0 clips missing, 0 "
        "unreadable; 0 captions empty, 0 duplicate, 0 held out",
    ]
    assert caplog.records[3].levelname == "WARNING"
    assert "1 audio files are missing" in lines[3]
    assert lines[4].startswith("Split by recording: 1 captions of 1 clips")
    assert len(lines) == 5


# ---- Real captions, and many ----------------------------------------------


@pytest.mark.skipif(
    not (AUDIOCAPS / "val.csv").exists(),
    reason=f"needs the AudioCaps captions in {AUDIOCAPS}",
)
def test_real_audiocaps_captions(data, save):
    (data / "val.csv").symlink_to(AUDIOCAPS / "val.csv")
    real = read(AUDIOCAPS / "val.csv")
    names = (real["youtube_id"] + "_" + real["start_time"]).unique()
    for name in names[:7]:
        wav(data / f"audio/{name}.wav")
    counts = prepare_captions(save, data)["datasets"]["audiocaps"]
    assert counts["clips"] == 7
    assert counts["missing"] == len(names) - 7 == len(skipped(save))
    assert set(skipped(save)) == set(names[7:])
    assert (
        counts["duplicates"]
        == real.duplicated(["youtube_id", "start_time", "caption"]).sum()
    )
    of_seven = (real["youtube_id"] + "_" + real["start_time"]).isin(names[:7])
    expected = set(real["caption"][of_seven])
    assert {caption for _, _, caption in pairs(save)} == expected


def test_the_folder_is_walked_once_however_many_captions(
    data, save, monkeypatch
):
    spare(data)
    rows = [f"{i},{i:011},0,caption {i}" for i in range(1000)]
    text(data / "train.csv", HEADER + "\n".join(rows))
    for folder in ("a", "b"):
        wav(data / f"{folder}/{0:011}.wav")
    walk, walked = os.walk, []

    def counting(top, *args, **options):
        walked.append(top)
        return walk(top, *args, **options)

    monkeypatch.setattr(os, "walk", counting)
    counts = prepare_captions(save, data)
    assert counts["datasets"]["audiocaps"]["missing"] == 999
    assert len(walked) == 1


def curation_csv(folder, names):
    rows = [f"{i},{name},a sound,0.8,0.05" for i, name in enumerate(names)]
    header = "ID,wav_path,caption,similarity,start"
    return text(folder / "curated.csv", "\n".join([header, *rows]) + "\n")


def test_curated_pairs_are_kept_whole(tmp_path, save):
    ready = ready_csv(tmp_path, clips=4)
    for i in range(20):
        wav(tmp_path / "curated" / f"{i}.wav")
    names = [f"{i}.wav" for i in range(20)] + ["0.wav", "gone.wav"]
    path = curation_csv(tmp_path / "lists", names)
    counts = prepare_captions(
        save,
        train_csv_path=ready,
        curation_csv=path,
        data_curation_folder=tmp_path / "curated",
    )
    curated = pd.read_csv(save / "curated_raw.csv")
    assert curated["wav_path"].tolist() == [
        str(tmp_path / "curated" / name) for name in names[:-1]
    ]
    assert set(curated["start"]) == {0.05}
    assert counts["curated"]["captions"] == 21
    assert counts["curated"]["clips"] == 20
    skipped = pd.read_csv(save / "skipped_audio.csv")
    assert skipped.values.tolist() == [
        [str(tmp_path / "curated" / "gone.wav"), "missing"]
    ]


def test_curated_pairs_that_cannot_be_used_are_counted(tmp_path, save, caplog):
    caplog.set_level(logging.INFO)
    ready = ready_csv(tmp_path, clips=4)
    names = [f"{i}.wav" for i in range(7)]
    for name in names[:5]:
        wav(tmp_path / name)
    text(tmp_path / "5.wav", "no audio")
    path = curation_csv(tmp_path, [*names, "6.wav"])
    # A clip with a caption in one row only, and clips without any.
    rows = "x,0.wav, ,0.8,0.05\nx,4.wav,,0.8,0.05\nx,gone.wav,,0.8,0.05\n"
    text(path, path.read_text().replace("4.wav,a sound", "4.wav,") + rows)

    def prepare():
        return prepare_captions(
            save, train_csv_path=ready, curation_csv=path, max_bad_audio=0.5
        )

    hours = round(0.4 / 3600, 4)
    lost = {"missing": 1, "unreadable": 1, "no_caption": 4}
    lost |= {"validated": 0, "held_out": 0}
    expected = {"clips": 4, "captions": 4, "hours": hours, **lost}
    assert prepare()["curated"] == expected
    assert len(read(save / "curated_raw.csv")) == 4
    assert list(skipped(save)) == [str(tmp_path / n) for n in names[5:]]
    for times in (1, 2):
        assert (
            caplog.text.count(
                "4 captions of 4 clips (0.00 h); 1 clips "
                "missing, 1 unreadable; 4 captions empty"
            )
            == times
        )
        assert (
            caplog.text.count(
                "1 audio files are missing and 1 unreadable: "
                f"see {save}/skipped_audio.csv"
            )
            == times
        )
        prepare()
    (save / "curated_raw.csv").unlink()
    assert prepare()["curated"] == expected
    assert len(read(save / "curated_raw.csv")) == 4


def test_curated_pairs_of_the_validation_set_are_left_out(
    tmp_path, save, caplog
):
    caplog.set_level(logging.INFO)
    ready = ready_csv(tmp_path, clips=10)
    names = [f"audio/{i:02}.wav" for i in range(10)]
    (tmp_path / "link.wav").symlink_to("audio/03.wav")
    path = curation_csv(tmp_path, [*names, *names, "link.wav"])
    counts = prepare_captions(
        save, train_csv_path=ready, valid_pct=0.7, curation_csv=path
    )
    valid, curated = (
        [os.path.realpath(p) for p in read(save / name)["wav_path"]]
        for name in ("valid_raw.csv", "curated_raw.csv")
    )
    assert str(tmp_path / "audio/03.wav") in valid
    assert len(curated) == 6 and not set(curated) & set(valid)
    assert counts["curated"]["captions"] == 6
    assert counts["curated"]["validated"] == 15
    assert "Of curated captions, 15 are left out since" in caplog.text
    curation_csv(tmp_path, ["link.wav"])
    with pytest.raises(ValueError, match="no pairs to train on: 1 are"):
        prepare_captions(
            tmp_path / "other",
            train_csv_path=ready,
            valid_pct=0.7,
            curation_csv=path,
        )


@pytest.mark.parametrize("flag", ["train_csv_path", "curation_csv"])
def test_times_in_another_unit(tmp_path, save, caplog, flag):
    ready_csv(tmp_path, clips=4, captions=1)
    flags = {"train_csv_path": tmp_path / "ready.csv"}
    rows = [f"audio/{i:02}.wav,a sound {i},20,70\n" for i in range(4)]
    flags[flag] = tmp_path / "times.csv"
    text(flags[flag], "wav_path,caption,start,end\n" + "".join(rows))
    with pytest.raises(ValueError, match=f"4 pairs of --{flag} start .* secon"):
        prepare_captions(save, **flags, valid_pct=0.3)
    assert not (save / "prepare.json").exists()
    prepare_captions(save, **flags, valid_pct=0.3, max_bad_audio=1)
    [said] = [m for m in caplog.messages if "its last window" in m]
    assert f"as {tmp_path}/audio/00.wav at 20 of 0.1 s" in said


def test_curated_pairs_whose_audio_is_gone(tmp_path, save):
    ready = ready_csv(tmp_path, clips=4)
    path = curation_csv(tmp_path, ["a.wav", "b.wav"])
    with pytest.raises(ValueError, match=r"2 of 2 .*--data_curation_folder"):
        prepare_captions(save, train_csv_path=ready, curation_csv=path)
    assert not (save / "prepare.json").exists()


def test_curated_clips_of_held_out_videos_are_left_out(data, save, tmp_path):
    """AudioSet has the recordings of AudioCaps under names of its own."""
    spare(data)
    videos = ["aaaaaaaaaaa", "bb_bb-bbbb_", "Yccccccccc_"]
    rows = [f"{i},{video},30,x {i}" for i, video in enumerate(videos)]
    text(data / "ac/test.csv", HEADER + "\n".join(rows))
    text(data / "ac/train.csv", HEADER + "9,eeeeeeeeeee,0,y")
    for video in (*videos, "eeeeeeeeeee"):
        wav(data / f"ac/{video}_30.wav")
        wav(data / f"ac/{video}_0.wav")
    held_out = ["aaaaaaaaaaa", "Ybb_bb-bbbb_", "Yccccccccc__30000_40000"]
    kept = ["Ycccccccccc", "aaaaaaaaaaab", "Zaaaaaaaaaaa", "bb_bb-bbbb"]
    for name in (*held_out, *kept):
        wav(tmp_path / f"as/{name}.wav")
    names = [f"{name}.wav" for name in held_out + kept]
    counts = prepare_captions(
        save,
        data,
        curation_csv=curation_csv(tmp_path / "as", names),
        official_test_splits=False,
    )
    curated = read(save / "curated_raw.csv")["wav_path"]
    assert [Path(path).stem for path in curated] == kept
    assert counts["curated"]["held_out"] == 3


def test_curated_clips_of_validated_videos_are_left_out(data, save, tmp_path):
    videos = [11 * letter for letter in "abcdefgh"]
    rows = [f"{i},{video},30,x {i}" for i, video in enumerate(videos)]
    text(data / "ac/train.csv", HEADER + "\n".join(rows))
    for video in videos:
        wav(data / f"ac/{video}_30.wav")
        wav(tmp_path / f"as/Y{video}.wav")
    prepare_captions(
        save,
        data,
        curation_csv=curation_csv(
            tmp_path / "as", [f"Y{video}.wav" for video in videos]
        ),
        valid_pct=0.25,
    )
    lists = [read(save / f"{name}_raw.csv") for name in ("train", "curated")]
    trained_on, curated = (
        {re.sub("Y|_30", "", Path(path).stem) for path in table["wav_path"]}
        for table in lists
    )
    assert len(trained_on) == 6
    assert curated == trained_on


def test_curated_clips_that_are_left_out_twice_count_once(data, save, tmp_path):
    """One of the two recordings is validated on; both have held-out names."""
    videos = ["aaaaaaaaaaa", "bbbbbbbbbbb"]
    rows = [f"{i},{video},30,x" for i, video in enumerate(videos)]
    text(data / "ac/test.csv", HEADER + "\n".join(rows))
    text(data / "new_index.tsv", "0.wav\ta sound\n1.wav\tanother\n")
    for i, video in enumerate(videos):
        wav(data / f"ac/{video}_30.wav")
        wav(data / f"{i}.wav")
        (tmp_path / f"Y{video}.wav").symlink_to(data / f"{i}.wav")
    wav(tmp_path / "kept.wav")
    names = [*(f"Y{video}.wav" for video in videos), "kept.wav"]
    counts = prepare_captions(
        save,
        data,
        curation_csv=curation_csv(tmp_path, names),
        official_test_splits=False,
    )
    found = {key: counts["curated"][key] for key in ("validated", "held_out")}
    assert found == {"validated": 1, "held_out": 1}
    assert len(read(save / "curated_raw.csv")) == 1


def test_unreadable_audio_by_the_command_line(data, save):
    rows = [f"{i}.wav\tsound {i}\n" for i in range(4)]
    text(data / "new_index.tsv", "".join(rows))
    for i in range(4):
        wav(data / f"{i}.wav")
    text(data / "0.wav", "no audio")
    command = [str(data), str(save)]
    with pytest.raises(ValueError, match=r"1 of 4 .*--max_bad_audio=0\.05"):
        module.main(command)
    module.main([*command, "--max_bad_audio=0.25"])
    assert len(pairs(save)) == 3


def test_lists_alone_by_the_command_line(data, save, tmp_path):
    for part in ("development", "evaluation"):
        clotho(data, part, [f"{part}{i}.wav" for i in range(3)])
        for i in range(3):
            wav(data / part / f"{part}{i}.wav")
    module.main([str(data), str(save)])
    expected = tmp_path / "expected"
    prepare_captions(expected, str(data))
    for name in ("train_raw.csv", "valid_raw.csv"):
        assert (save / name).read_text() == (expected / name).read_text()
    assert any("evaluation" in path for _, path, _ in pairs(save))
    module.main([str(data), str(save), "--leave_test_splits_out"])
    assert not any("evaluation" in path for _, path, _ in pairs(save))
