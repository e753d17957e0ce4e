"""Times in lists of pairs: what they mean, and what is wrong is named."""

import numpy as np
import pytest

from dataset.manifest import read_pairs


def read(path, header, *cells):
    rows = [f"wav_path,caption,{header}", *(f"a.wav,rain,{c}" for c in cells)]
    path.write_text("\n".join(rows))
    return read_pairs(str(path), "curation_csv")


def test_times_are_seconds_or_empty(tmp_path):
    pairs = read(tmp_path / "a.csv", "start,end", "0,1.5", "2,2", "3,", " ,")
    np.testing.assert_array_equal(pairs["start"], [0, 2, 3, np.nan])
    np.testing.assert_array_equal(pairs["end"], [1.5, 2, np.nan, np.nan])
    assert "start" not in read(tmp_path / "a.csv", "ID", "1")


@pytest.mark.parametrize(
    ("header", "cells"),
    [("start,end", (",1.5", "1,2", ",")), ("end", ("1.5", "2", ""))],
)
def test_a_part_without_start_begins_with_the_file(tmp_path, header, cells):
    pairs = read(tmp_path / "a.csv", header, *cells)
    start = [0, 1 if header == "start,end" else 0, np.nan]
    np.testing.assert_array_equal(pairs["start"], start)
    np.testing.assert_array_equal(pairs["end"], [1.5, 2, np.nan])


@pytest.mark.parametrize("name", ["start", "end"])
@pytest.mark.parametrize("cell", ["inf", "-inf", "nan", "-0.5", "1 s"])
def test_what_is_no_time(tmp_path, name, cell):
    path = tmp_path / "a.csv"
    message = f"^--curation_csv={path}: row 3 has the {name} '{cell}', which"
    with pytest.raises(ValueError, match=message):
        read(path, name, "0", cell, "-1")


def test_the_row_of_a_wrong_time_is_named_behind_equal_ones(tmp_path):
    with pytest.raises(ValueError, match="row 5 has the start 'soon'"):
        read(tmp_path / "a.csv", "start", "0", "0", "0", "soon")


def test_a_part_that_ends_before_it_starts(tmp_path):
    path = tmp_path / "a.csv"
    message = f"^--curation_csv={path}: row 4 has the end 1.5, before its start"
    with pytest.raises(ValueError, match=message):
        read(path, "start,end", "2,", "2,2", "2,1.5")


def test_pairs_of_nothing_are_named(tmp_path):
    path = tmp_path / "a.csv"
    for rows, message in (
        ("", " has no rows$"),
        ("a.wav,rain\n ,hail\n,wind\n", ": row 3 has no wav_path$"),
    ):
        path.write_text(f"wav_path,caption\n{rows}")
        with pytest.raises(
            ValueError, match=f"^--curation_csv={path}{message}"
        ):
            read_pairs(str(path), "curation_csv")


def test_a_recording_has_one_path_however_it_is_spelt(tmp_path):
    rows = ["caption,more,wav_path", "x,1,b/../a.wav", "y,2,./a.wav"]
    path = tmp_path / "a.csv"
    path.write_text("\n".join([*rows, f"z,3,{tmp_path}//a.wav"]))
    for folder in (tmp_path, tmp_path / "elsewhere"):
        given = None if folder == tmp_path else str(folder)
        pairs = read_pairs(str(path), audio_folder=given)
        assert list(pairs) == ["ID", "wav_path", "caption", "more"]
        assert pairs["ID"].tolist() == ["0", "1", "2"]
        expected = [f"{folder}/a.wav"] * 2 + [f"{tmp_path}/a.wav"]
        assert pairs["wav_path"].tolist() == expected
