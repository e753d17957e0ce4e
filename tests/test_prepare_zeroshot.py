"""Zero-shot test sets in their official layouts, checked and listed."""

import logging
from pathlib import Path

import pandas as pd
import pytest
from conftest import write_noise

from dataset.prepare_zeroshot import (
    BUILT_IN_LABELS,
    main,
    prepare_zeroshot,
    read_labels,
)

ESC10 = Path(__file__).parents[2] / "shared/esc10"
ESC_HEADER = "filename,fold,target,category,esc10,src_file,take\n"
ESC_ROWS = (
    "1-7-A-0.wav,1,0,dog,True,7,A\n"
    "2-8-A-12.wav,2,12,crackling_fire,True,8,A\n"
    "5-9-B-5.wav,5,5,cat,False,9,B\n"
)


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def wavs(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        write_noise(folder / name, 0.1, 8000)


def rows(data):
    return list(data.clips.itertuples(index=False, name=None))


@pytest.fixture
def esc(tmp_path):
    root = tmp_path / "esc"
    put(root / "meta/esc50.csv", ESC_HEADER + ESC_ROWS)
    wavs(root / "audio", "1-7-A-0.wav", "2-8-A-12.wav", "5-9-B-5.wav")
    return root


@pytest.fixture
def us8k(tmp_path):
    root = tmp_path / "UrbanSound8K"
    put(
        root / "metadata/UrbanSound8K.csv",
        "slice_file_name,fsID,start,end,salience,fold,classID,class\n"
        "100-3-0-0.wav,100,0.0,0.3,1,5,3,dog_bark\n"
        "200-0-1-2.wav,200,1.0,5.0,2,10,0,air_conditioner\n",
    )
    wavs(root / "audio/fold5", "100-3-0-0.wav")
    wavs(root / "audio/fold10", "200-0-1-2.wav")
    return root


@pytest.fixture
def tut(tmp_path):
    """Both parts; b1 is in no fold, and evaluate.txt is all of evaluation."""
    development = tmp_path / "tut/TUT-acoustic-scenes-2017-development"
    put(
        development / "meta.txt",
        "audio/a1.wav\tcafe/restaurant\ta\n"
        "audio/a2.wav\tcity_center\ta\n"
        "audio/b1.wav\tbeach\tb\n",
    )
    setup = development / "evaluation_setup"
    put(setup / "fold1_evaluate.txt", "audio/a2.wav\tcity_center\n")
    put(setup / "fold3_evaluate.txt", "audio/a1.wav\tcafe/restaurant\n")
    wavs(development / "audio", "a1.wav", "a2.wav", "b1.wav")
    evaluation = tmp_path / "tut/TUT-acoustic-scenes-2017-evaluation"
    put(evaluation / "evaluation_setup/evaluate.txt", "audio/a1.wav\ttram\n")
    wavs(evaluation / "audio", "a1.wav")
    return tmp_path / "tut"


# ---- Class lists -----------------------------------------------------------


@pytest.mark.parametrize(
    "dataset, count, known",
    [
        (
            "esc",
            50,
            {
                0: ("dog", "dog"),
                12: ("crackling_fire", "crackling fire"),
                49: ("hand_saw", "hand saw"),
            },
        ),
        (
            "us8k",
            10,
            {
                0: ("air_conditioner", "air conditioner"),
                8: ("siren", "siren"),
                9: ("street_music", "street music"),
            },
        ),
        (
            "tut",
            15,
            {
                1: ("cafe/restaurant", "cafe or restaurant"),
                3: ("city_center", "city center"),
                14: ("park", "park"),
            },
        ),
    ],
)
def test_built_in_labels(dataset, count, known):
    labels = read_labels(BUILT_IN_LABELS[dataset])
    assert len(labels) == labels["text"].nunique() == count
    for i, names in known.items():
        assert tuple(labels.iloc[i]) == names


@pytest.mark.skipif(not ESC10.is_dir(), reason="needs ../shared/esc10")
def test_labels_are_in_the_order_of_the_official_numbers():
    labels = read_labels(BUILT_IN_LABELS["esc"])["label"]
    meta = pd.read_csv(ESC10 / "meta/esc50.csv")
    assert [labels[i] for i in meta["target"]] == meta["category"].tolist()


@pytest.mark.skipif(not ESC10.is_dir(), reason="needs ../shared/esc10")
def test_real_esc10():
    data = prepare_zeroshot("esc", str(ESC10), esc10=True)
    assert len(data.clips) == 320 and not data.missing
    assert len(data.labels) == 10 and data.labels["label"][0] == "dog"
    assert data.clips["fold"].value_counts().to_dict() == dict.fromkeys(
        "1234", 80
    )


def test_text_is_the_label_with_spaces_where_there_is_none(tmp_path):
    path = put(tmp_path / "labels.csv", "label\nold_bell\nrain\n")
    assert read_labels(path)["text"].tolist() == ["old bell", "rain"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("name\ndog\n", "lacks the column"),
        ("label,text\n", "lists no classes"),
        ("label,text\ndog,dog\ncat,\n", "row 3 has an empty cell"),
        ("label\ndog\ncat\ndog\n", "lists the class 'dog' twice"),
        (
            "label,text\nhound,dog\ncat,cat\npuppy,dog\n",
            "the class 'puppy' has the text of 'hound', 'dog'",
        ),
        ("label\nold_bell\nold bell\n", "'old bell' has the text of 'old_b"),
    ],
)
def test_broken_class_list(tmp_path, content, message):
    path = put(tmp_path / "labels.csv", content)
    with pytest.raises(ValueError, match=message) as error:
        read_labels(path)
    assert str(path) in str(error.value)


def test_a_list_without_a_table(tmp_path):
    path = put(tmp_path / "classes.txt", "air_horn\n\n rain, heavy \n")
    assert read_labels(path).to_numpy().tolist() == [
        ["air_horn", "air horn"],
        ["rain, heavy", "rain, heavy"],
    ]
    put(path, "\n")
    with pytest.raises(ValueError, match=r"classes\.txt lists no classes"):
        read_labels(path)


def test_a_table_by_its_name_in_capitals(tmp_path):
    path = put(tmp_path / "A.CSV", "label,text\ndog,a dog\nrain,it rains\n")
    assert read_labels(path)["text"].tolist() == ["a dog", "it rains"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "dog_bark\nrain\ndog bark\n", "has the text of 'dog_bark'"),
        ("a.tsv", "dog\ta dog barks\n", r"has TABs: give a \.csv file"),
    ],
)
def test_broken_list_without_a_table(tmp_path, name, content, message):
    path = put(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        read_labels(path)


def test_class_list_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_labels(tmp_path / "labels.csv")


# ---- Layouts ---------------------------------------------------------------


def test_esc(esc):
    data = prepare_zeroshot("esc", str(esc))
    assert list(data.clips) == ["ID", "wav_path", "label", "fold"]
    audio = f"{esc}/audio"
    assert rows(data) == [
        ("1-7-A-0", f"{audio}/1-7-A-0.wav", "dog", "1"),
        ("2-8-A-12", f"{audio}/2-8-A-12.wav", "crackling_fire", "2"),
        ("5-9-B-5", f"{audio}/5-9-B-5.wav", "cat", "5"),
    ]
    assert len(data.labels) == 50 and data.missing == {}


def test_esc10_as_a_spreadsheet_writes_it(esc):
    meta = esc / "meta" / "esc50.csv"
    clips = prepare_zeroshot("esc", str(esc), esc10=True).clips
    meta.write_text(meta.read_text().replace("True", "TRUE"))
    again = prepare_zeroshot("esc", str(esc), esc10=True).clips
    pd.testing.assert_frame_equal(again, clips)


def test_esc10_keeps_its_clips_and_classes(esc):
    data = prepare_zeroshot("esc", str(esc), esc10=True)
    assert data.clips["ID"].tolist() == ["1-7-A-0", "2-8-A-12"]
    names = ["dog", "crackling_fire"]
    expected = pd.DataFrame({"label": names, "text": ["dog", "crackling fire"]})
    pd.testing.assert_frame_equal(data.labels, expected)
    assert data.true_classes().tolist() == [0, 1]


def test_esc_layout_with_other_classes(esc, tmp_path):
    meta = "filename,fold,category\n1-7-A-0.wav,1,dog\n"
    put(esc / "meta/esc50.csv", meta)
    path = put(tmp_path / "labels.csv", "label,text\ndog,hound\nowl,owl\n")
    data = prepare_zeroshot("esc", str(esc), labels_path=str(path))
    assert data.labels["text"].tolist() == ["hound", "owl"]
    assert data.clips["label"].tolist() == ["dog"]


def test_esc_layout_with_folders(esc):
    meta = "filename,fold,category\ndog/001.wav,1,dog\nrain/001.wav,2,rain\n"
    put(esc / "meta/esc50.csv", meta)
    for name in ("dog", "rain"):
        wavs(esc / "audio" / name, "001.wav")
    assert rows(prepare_zeroshot("esc", str(esc))) == [
        ("dog/001", f"{esc}/audio/dog/001.wav", "dog", "1"),
        ("rain/001", f"{esc}/audio/rain/001.wav", "rain", "2"),
    ]


def test_us8k(us8k):
    data = prepare_zeroshot("us8k", str(us8k))
    audio = f"{us8k}/audio"
    assert rows(data) == [
        ("100-3-0-0", f"{audio}/fold5/100-3-0-0.wav", "dog_bark", "5"),
        ("200-0-1-2", f"{audio}/fold10/200-0-1-2.wav", "air_conditioner", "10"),
    ]
    assert len(data.labels) == 10


def test_tut(tut):
    data = prepare_zeroshot("tut", str(tut))
    development = f"{tut}/TUT-acoustic-scenes-2017-development/audio"
    evaluation = f"{tut}/TUT-acoustic-scenes-2017-evaluation/audio"
    assert rows(data) == [
        ("development/a1", f"{development}/a1.wav", "cafe/restaurant", "3"),
        ("development/a2", f"{development}/a2.wav", "city_center", "1"),
        ("development/b1", f"{development}/b1.wav", "beach", "development"),
        ("evaluation/a1", f"{evaluation}/a1.wav", "tram", "evaluation"),
    ]
    assert len(data.labels) == 15


def test_tut_parts(tut):
    def ids(folder, part):
        data = prepare_zeroshot("tut", str(folder), tut_part=part)
        return data.clips["ID"].tolist()

    evaluation = tut / "TUT-acoustic-scenes-2017-evaluation"
    assert ids(tut, "evaluation") == ["evaluation/a1"]
    assert len(ids(tut, "development")) == 3
    # A part given as the folder stands for itself.
    assert ids(evaluation, "both") == ["evaluation/a1"]
    assert ids(evaluation, "evaluation") == ["evaluation/a1"]
    with pytest.raises(FileNotFoundError, match="2017-development"):
        ids(evaluation, "development")


@pytest.mark.parametrize("lacking", ["development", "evaluation"])
def test_a_tut_part_alone_is_to_be_given_itself(tut, lacking):
    name = f"TUT-acoustic-scenes-2017-{lacking}"
    (tut / name).rename(tut / "elsewhere")
    with pytest.raises(FileNotFoundError) as error:
        prepare_zeroshot("tut", str(tut))
    assert f"holds no {name}" in str(error.value)
    assert "For the other part alone give its own folder" in str(error.value)
    with pytest.raises(FileNotFoundError, match="folders below it$"):
        prepare_zeroshot("tut", str(tut), tut_part=lacking)


def test_a_single_fold_is_a_list_of_one(tut):
    data = prepare_zeroshot("tut", str(tut))
    for fold, ID in (("development", "development/b1"), (3, "development/a1")):
        assert data.of_folds(fold, "folds").clips["ID"].tolist() == [ID]
    with pytest.raises(ValueError, match=r"^--folds=\['a'\]: .* 1, 3, eval"):
        data.of_folds("a", "folds")


def test_no_folds_are_refused(esc):
    data = prepare_zeroshot("esc", str(esc))
    with pytest.raises(
        ValueError, match=r"^--zs_valid_folds=\[\]: .* 1, 2, 5$"
    ):
        data.of_folds([], "zs_valid_folds")


def test_tut_meta_is_preferred_to_evaluate(tut):
    evaluation = tut / "TUT-acoustic-scenes-2017-evaluation"
    put(evaluation / "meta.txt", "audio/a1.wav\tbus\tx\n")
    data = prepare_zeroshot("tut", str(evaluation))
    assert data.clips["label"].tolist() == ["bus"]


@pytest.mark.parametrize("dataset", ["esc", "us8k", "tut"])
def test_one_folder_down(dataset, request, tmp_path):
    root = request.getfixturevalue(dataset)
    direct = prepare_zeroshot(dataset, str(root))
    above = prepare_zeroshot(dataset, str(tmp_path))
    pd.testing.assert_frame_equal(above.clips, direct.clips)


def test_two_data_sets_below_are_ambiguous(tmp_path):
    for name in ("first", "second"):
        put(tmp_path / name / "meta/esc50.csv", ESC_HEADER + ESC_ROWS)
    with pytest.raises(ValueError, match=r"first.*second"):
        prepare_zeroshot("esc", str(tmp_path))


# ---- Missing and wrong -----------------------------------------------------


def test_missing_clips_are_named(esc, caplog):
    gone = esc / "audio/2-8-A-12.wav"
    gone.unlink()
    with caplog.at_level(logging.WARNING):
        data = prepare_zeroshot("esc", str(esc))
    assert data.missing == {str(gone): "2"}
    assert data.clips["ID"].tolist() == ["1-7-A-0", "5-9-B-5"]
    assert "1 of 3" in caplog.text and str(gone) in caplog.text


def test_folds_have_their_own_missing_clips(esc):
    more = "3-1-A-0.wav,1,0,dog,True,1,A\n4-1-A-0.wav,2,0,dog,True,1,A\n"
    put(esc / "meta/esc50.csv", ESC_HEADER + ESC_ROWS + more)
    data = prepare_zeroshot("esc", str(esc))
    for folds, names in (([1], "3"), ([5, 2], "4"), ([2, 1], "34"), ([5], "")):
        missing = data.of_folds(folds, "folds").missing
        assert list(missing) == [f"{esc}/audio/{n}-1-A-0.wav" for n in names]


def test_only_the_first_missing_clips_are_logged(esc, caplog):
    many = "".join(f"9-{i}-A-0.wav,1,0,dog,True,1,A\n" for i in range(5))
    put(esc / "meta/esc50.csv", ESC_HEADER + ESC_ROWS + many)
    with caplog.at_level(logging.WARNING):
        data = prepare_zeroshot("esc", str(esc))
    assert len(data.missing) == 5
    assert "9-2-A-0" in caplog.text and "9-3-A-0" not in caplog.text


def test_all_audio_missing(esc):
    for path in (esc / "audio").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="None of the 3 clips"):
        prepare_zeroshot("esc", str(esc))


def test_class_that_is_not_in_the_list(esc, tmp_path):
    labels = put(tmp_path / "labels.csv", "label\ndog\ncat\n")
    with pytest.raises(ValueError) as error:
        prepare_zeroshot("esc", str(esc), labels_path=str(labels))
    for part in (
        *("meta/esc50.csv", "row 3", "crackling_fire", str(labels)),
        "--labels_path (--zs_labels_path in training)",
    ):
        assert part in str(error.value)


def test_classes_without_clips_are_warned_of(esc, tmp_path, caplog):
    prepare_zeroshot("esc", str(esc))
    assert "47 of the 50 classes" in caplog.text
    assert "--labels_path (--zs_labels_path in training)" in caplog.text
    caplog.clear()
    prepare_zeroshot("esc", str(esc), esc10=True)
    labels = put(tmp_path / "l.csv", "label\ndog\ncat\ncrackling_fire\n")
    # The clip of a class that is missing is of that class still.
    (esc / "audio/5-9-B-5.wav").unlink()
    prepare_zeroshot("esc", str(esc), labels_path=str(labels))
    assert "--labels_path" not in caplog.text


def test_tut_rows_count_from_the_first_line(tut):
    meta = tut / "TUT-acoustic-scenes-2017-development/meta.txt"
    put(meta, "audio/a1.wav\tbus\ta\naudio/a2.wav\tmoon\ta\n")
    with pytest.raises(ValueError, match=r"meta.txt, row 2: .*'moon'"):
        prepare_zeroshot("tut", str(tut))


def test_clip_listed_twice(esc):
    put(esc / "meta/esc50.csv", ESC_HEADER + ESC_ROWS + ESC_ROWS)
    with pytest.raises(ValueError, match=r"row 5: .*/1-7-A-0.wav'"):
        prepare_zeroshot("esc", str(esc))


def test_metadata_without_clips_or_columns(esc):
    meta = put(esc / "meta/esc50.csv", ESC_HEADER)
    with pytest.raises(ValueError, match="lists no clips"):
        prepare_zeroshot("esc", str(esc))
    meta.write_text("filename,category\n1-7-A-0.wav,dog\n")
    with pytest.raises(ValueError, match=r"lacks the column.* fold"):
        prepare_zeroshot("esc", str(esc))


def test_tut_without_scenes(tut):
    part = tut / "TUT-acoustic-scenes-2017-evaluation"
    path = put(part / "evaluation_setup/evaluate.txt", "audio/a1.wav\n")
    with pytest.raises(ValueError, match=r"evaluate.txt cannot be read"):
        prepare_zeroshot("tut", str(part))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"meta.txt.*evaluate.txt"):
        prepare_zeroshot("tut", str(part))


@pytest.mark.parametrize(
    "dataset, looked_for",
    [
        ("esc", "meta/esc50.csv"),
        ("us8k", "metadata/UrbanSound8K.csv"),
        ("tut", "TUT-acoustic-scenes-2017-development"),
    ],
)
def test_folder_without_the_data_set(tmp_path, dataset, looked_for):
    with pytest.raises(FileNotFoundError, match=looked_for):
        prepare_zeroshot(dataset, str(tmp_path))


@pytest.mark.parametrize("folder", [None, "", "/does/not/exist"])
def test_folder_that_does_not_exist(folder):
    flags = r"^--data_folder \(--data_zs_folder in training\) is "
    with pytest.raises(FileNotFoundError, match=f"{flags}'{folder or ''}'"):
        prepare_zeroshot("esc", folder)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"dataset": "esc50"},
            r"^--dataset \(--zs_dataset in training\) is 'esc50': give esc, us",
        ),
        ({"dataset": "tut", "tut_part": "test"}, "--tut_part=test: give"),
        ({"dataset": "us8k", "esc10": True}, "esc10 selects"),
    ],
)
def test_unknown_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare_zeroshot(data_folder=str(tmp_path), **arguments)


# ---- Command ---------------------------------------------------------------


def read(path):
    return pd.read_csv(path, dtype=str)


def test_command(esc, tmp_path, capsys):
    output = tmp_path / "new" / "train.csv"
    main(["esc", str(esc), "--folds", "1", "2", "--output", str(output)])
    assert read(output).to_dict("list") == {
        "ID": ["1-7-A-0", "2-8-A-12"],
        "wav_path": [
            f"{esc}/audio/1-7-A-0.wav",
            f"{esc}/audio/2-8-A-12.wav",
        ],
        "caption": [
            "this is a sound of dog",
            "this is a sound of crackling fire",
        ],
        "fold": ["1", "2"],
    }
    assert capsys.readouterr().out == f"2 pairs in {output}\n"


@pytest.mark.parametrize(
    ("prompt", "caption"),
    [
        ("I hear a", "I hear a hound"),
        ("I hear {} now", "I hear hound now"),
        ("{}, I hear {}", "hound, I hear hound"),
    ],
)
def test_command_options(esc, tmp_path, prompt, caption):
    output = tmp_path / "train.csv"
    put(tmp_path / "labels.csv", "label,text\ndog,hound\ncrackling_fire,f\n")
    main(
        ["esc", str(esc), "--folds", "1", "--output", str(output), "--esc10"]
        + ["--labels_path", str(tmp_path / "labels.csv")]
        + ["--text_prompt", prompt]
    )
    assert read(output)["caption"].tolist() == [caption]


def test_command_refuses_a_fold_that_is_not_there(us8k, tmp_path):
    output = tmp_path / "train.csv"
    with pytest.raises(ValueError, match=r"folds=.*4.*has the folds 5, 10$"):
        main(["us8k", str(us8k), "--folds", "4", "--output", str(output)])
    assert not output.exists()
