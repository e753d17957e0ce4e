"""CSV files and lists: what is written is read, what is wrong is named."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from dataset.manifest import read_pairs
from files import (
    alone,
    check_paths,
    path_in,
    read_lines,
    read_pieces,
    read_table,
    take_times,
    write_csv,
    written_whole,
)

ODD = [
    "a,b",
    'c"d',
    "$e",
    "f\ng",
    "h\ri",
    "j\r\nk",
    " l ",
    "é雨",
    "",
    "NA",
    "007",
    "long" * 2**16,
]


def test_any_text_comes_back(tmp_path):
    frame = pd.DataFrame({"wav_path": ODD, "caption": ODD[::-1]})
    write_csv(frame.assign(start=0.1), tmp_path / "a.csv")
    table = read_table(tmp_path / "a.csv")
    assert table["wav_path"].tolist() == ODD
    assert table["caption"].tolist() == ODD[::-1]
    assert table["start"].tolist() == ["0.1"] * len(ODD)


def test_plain_cells_have_no_quotes(tmp_path):
    frame = pd.DataFrame({"wav_path": ["a.wav", "b.wav"], "start": [1, np.nan]})
    write_csv(frame, tmp_path / "a.csv")
    expected = b"wav_path,start\na.wav,1.0\nb.wav,\n"
    assert (tmp_path / "a.csv").read_bytes() == expected


def test_byte_order_marks_and_windows_line_ends(tmp_path):
    text = "\N{BYTE ORDER MARK}caption,ID\r\nrain,1\r\n\r\nhail,2\r\n"
    (tmp_path / "a").write_bytes(text.encode())
    table = read_table(tmp_path / "a", ["caption"])
    assert table["caption"].tolist() == ["rain", "hail"]
    assert list(read_lines(tmp_path / "a")) == [
        "caption,ID",
        "rain,1",
        "hail,2",
    ]


@pytest.mark.parametrize("cell", ["rain", '"rain"'])
def test_lines_before_the_header_may_be_blank(tmp_path, cell):
    (tmp_path / "a").write_text(f"\n\ncaption\n{cell}\n")
    assert read_table(tmp_path / "a")["caption"].tolist() == ["rain"]


def test_an_empty_line_of_one_column_is_an_empty_cell(tmp_path):
    (tmp_path / "a").write_bytes(b"\r\ncaption\r\nrain\r\n\r\nhail\r\n")
    captions = read_table(tmp_path / "a", ["caption"])["caption"]
    assert captions.tolist() == ["rain", "", "hail"]
    (tmp_path / "a").write_bytes(b"caption\n\nrain\n\n\n")
    assert read_table(tmp_path / "a")["caption"].tolist() == ["", "rain"]
    (tmp_path / "a").write_bytes(b'caption\nrain\n""\n')
    assert read_table(tmp_path / "a")["caption"].tolist() == ["rain", ""]
    (tmp_path / "a").write_bytes(b"caption\n\n\n")
    assert read_table(tmp_path / "a").empty


@pytest.mark.parametrize("columns", [["caption"], ["caption", "ID"]])
def test_a_table_in_pieces_is_the_table(tmp_path, monkeypatch, columns):
    frame = pd.DataFrame({"caption": ["rain", "", "a, b"] * 7, "ID": "1"})
    path = tmp_path / "a.csv"
    write_csv(frame[columns], path)
    # The last block, of 16 bytes, is nothing but ends of lines.
    path.write_bytes(path.read_bytes() + b"\n" * 20)
    monkeypatch.setattr("files._BLOCK_BYTES", 16)
    monkeypatch.setattr("files._PIECE_ROWS", 2)
    first, *others = read_pieces(path, columns)
    assert first.empty and first.columns.tolist() == columns
    assert {len(piece) for piece in others} <= {1, 2}
    whole = pd.concat(others, ignore_index=True)
    assert whole["caption"].tolist() == ["rain", "", "a, b"] * 7
    pd.testing.assert_frame_equal(whole, read_table(path))
    path.write_text("caption,ID\n")
    (piece,) = read_pieces(path)
    assert piece.empty and piece.columns.tolist() == ["caption", "ID"]


@pytest.mark.parametrize("size", range(20, 33))
def test_blocks_may_end_within_a_cell_of_many_lines(
    tmp_path, monkeypatch, size
):
    captions = ["a\nb", "c", "\n\n\n", "d\re", "f\r\ng"] * 9
    frame = pd.DataFrame({"caption": captions, "ID": "1"})
    write_csv(frame, tmp_path / "a.csv")
    monkeypatch.setattr("files._BLOCK_BYTES", size)
    table = read_table(tmp_path / "a.csv")
    assert table["caption"].tolist() == captions


@pytest.mark.parametrize("folder", ["~", "file:"])
def test_a_path_is_a_path(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "a.csv").write_text("caption\nrain\n")
    assert read_table(f"{folder}/a.csv")["caption"].tolist() == ["rain"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"ID,caption\n1,rain\n2,rain, hail\n",
            "Row #3: Expected 2 .* got 3.*in quotes$",
        ),
        (b"ID,caption\n1,rain\n2\n", r"Row #3: Expected 2 .* got 1: \w+$"),
        (b"ID,caption\n1,rain, hail\n2,a, b\n", "Row #2: Expected 2"),
        (b'ID,caption\n1,rain\n2,"a dog\n3,hail\n', "Row #3: unexpected end"),
        (b'ID,caption\n1,rain\n2,a dog\n3,"hail', "Row #4: .*left open"),
        (b'ID,caption\n1,"a dog" barks\n', "Row #2: .*left open"),
        (b'ID,"caption\n1,rain\n', "Row #1: .*left open"),
        (b"", "Empty CSV"),
        (b"ID,caption\n1,caf\xe9\n", "cannot be read: .*; save it as UTF-8$"),
        (b"ID,text\n1,rain\n", r"lacks the column.*caption; its header is ID,"),
        (b"ID;caption\n1;a, b\n", "is ID;caption; separate columns by commas$"),
        (b'ID;caption\n"1";"rain"\n', "; separate columns by commas$"),
        (b"ID\tcaption\n1\train\n", "; separate columns by commas$"),
        (b"ID\n1\n", "its header is ID$"),
        (b"ID, caption\n1,rain\n", "; delete the blanks around names$"),
        (b"caption,caption\nrain,hail\n", r"two columns of one name: \[.*\]$"),
        (b"caption,,\nrain,,\n", "; delete those without a name$"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_table(path, ["caption"])
    assert str(caught.value).startswith(str(path))
    with pytest.raises(ValueError, match=rf"--curation_csv={path}"):
        read_pairs(str(path), "curation_csv")


def test_the_first_row_without_a_path_is_named():
    table = pd.DataFrame({"wav_path": ["a.wav", " ", "", ""]})
    with pytest.raises(ValueError, match=r"^a\.csv: row 3 has no wav_path"):
        check_paths(table, "a.csv")


@pytest.mark.parametrize("text", ["-1", "inf", "nan", "0:30"])
def test_times_are_seconds_from_0_on(text):
    table = pd.DataFrame({"start": ["0", "", " ", "1.5"]})
    take_times(table, "a.csv")
    np.testing.assert_array_equal(table["start"], [0, np.nan, np.nan, 1.5])
    table = pd.DataFrame({"end": ["0", "1.5", "0", text]})
    message = rf"^a\.csv: row 5 has the end '{text}', which is no number"
    with pytest.raises(ValueError, match=message):
        take_times(table, "a.csv")


def test_lines_keep_their_blanks(tmp_path):
    (tmp_path / "a").write_text(" a b \n\n \n\tc")
    assert list(read_lines(tmp_path / "a")) == [" a b ", "\tc"]


def test_lists_that_cannot_be_read(tmp_path):
    (tmp_path / "a").write_bytes(b"caf\xe9.wav\n")
    for name in ("a", "b"):
        with pytest.raises(ValueError, match=f"{name} cannot be read") as why:
            list(read_lines(tmp_path / name))
        assert str(why.value).endswith("as UTF-8") == (name == "a")


def test_paths_go_up_as_the_system_does(tmp_path):
    (tmp_path / "real" / "lists").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "lists")
    for folder, path, expected in (
        ("link", "../a.wav", "real/a.wav"),
        ("link", "b/../a.wav", "link/a.wav"),
        ("real/lists", "../a.wav", "real/a.wav"),
        ("link", "./b//a.wav", "link/b/a.wav"),
        ("link", f"{tmp_path}/link/../a.wav", "real/a.wav"),
    ):
        found = path_in(f"{tmp_path}/{folder}", path)
        assert found == f"{tmp_path}/{expected}"


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    path.write_text("before")
    with pytest.raises(KeyError), written_whole(path) as file:
        file.write(b"half")
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert path.read_text() == "before"
    with written_whole(path) as file:
        file.write(b"whole")
        assert path.read_text() == "before"
    assert path.read_text() == "whole"
    partial = tmp_path / "a.partial"
    partial.write_text("left by a process that was killed")
    with written_whole(path) as file:
        file.write(b"new")
        with pytest.raises(OSError, match=f"{path} cannot .* another process"):
            write_csv(pd.DataFrame(), path)
        file.write(b"er")
    assert path.read_text() == "newer"
    absent = tmp_path / "absent" / "a"
    with pytest.raises(OSError, match=f"^{absent} cannot be written: "):
        write_csv(pd.DataFrame(), absent)
    # What goes wrong elsewhere keeps its own message.
    with pytest.raises(FileNotFoundError), written_whole(path):
        (tmp_path / "absent").read_text()


def test_a_file_that_another_process_just_finished_is_left_alone(
    tmp_path, monkeypatch
):
    """It takes its place between this one's opening and locking of it."""
    path, lock = tmp_path / "a", fcntl.flock

    def late(*args):
        monkeypatch.setattr(fcntl, "flock", lock)
        (tmp_path / "a.partial").replace(tmp_path / "theirs")
        (tmp_path / "theirs").write_text("theirs")
        lock(*args)

    monkeypatch.setattr(fcntl, "flock", late)
    with written_whole(path) as file:
        file.write(b"ours")
    assert path.read_text() == "ours"
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert len(list(tmp_path.iterdir())) == 2


LOCKED_AND_KILLED = """
import os, signal, sys, time
from files import alone

with alone(sys.argv[1]):
    if os.fork():
        time.sleep(60)
    print(os.getpid(), flush=True)
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
"""


def test_a_lock_ends_with_its_process(tmp_path):
    """A child of that, as a loader's process, does not hold it longer."""
    command = [sys.executable, "-c", LOCKED_AND_KILLED, tmp_path / "lock"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        child = int(process.stdout.readline())
        process.wait()
        try:
            with alone(tmp_path / "lock"):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_files_are_written_on_disks_without_locks(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    write_csv(pd.DataFrame({"a": [1]}), tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text() == "a\n1\n"
    assert len(list(tmp_path.iterdir())) == 1
