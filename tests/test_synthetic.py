"""The synthetic sounds and the text model that is made for their captions."""

import csv
import json
import re

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from dataset import synthetic, text_model
from dataset.prepare_captions import prepare_captions
from dataset.prepare_zeroshot import prepare_zeroshot
from dataset.synthetic import (
    BACKGROUNDS,
    FIELD,
    OTHER_SOUNDS,
    SOUNDS,
    STUDIO,
    Scene,
    describe,
    draw_scene,
    make_corpus,
    make_synthetic,
    render,
)

# The words by which a reader would know the class.
WORDS = {
    "siren": "siren",
    "electric_hum": "hum|humming",
    "clock_tick": "ticking|tick",
    "chirping_bird": "bird",
    "hissing_steam": "steam",
    "engine": "engine|motor",
    "bell": "bell",
    "rain": "rain",
    "wind": "wind",
    "alarm_beep": "alarm",
    "telephone": "telephone|phone",
    "footsteps": "footsteps|steps",
}
CLIPS, TARGET, UNLABELLED = 8, 5, 13


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "world"
    make_synthetic(str(folder), 1, CLIPS, TARGET, UNLABELLED)
    return folder


@pytest.fixture(scope="module")
def pairs(world):
    """(path, captions) of every clip in the index."""
    with open(world / "pairs/synthetic_index.tsv", newline="") as file:
        return [
            (world / "pairs" / path, captions.split("\n"))
            for path, captions in csv.reader(file, delimiter="\t")
        ]


def label_of(path):
    return path.stem.rsplit("_", 1)[0]


def classes_in(text):
    return {k for k, w in WORDS.items() if re.search(rf"\b({w})\b", text)}


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def scene(**changes):
    settings = {
        "seconds": 2.0,
        "pitch": 0.5,
        "speed": 0.5,
        "level": -15.0,
        "snr": 40.0,
        "reverb": 0.01,
        "bandwidth": 10000.0,
        "background": "hiss",
    }
    return Scene(**settings | changes)


# ---- Files -----------------------------------------------------------------


def test_same_settings_make_the_same_bytes(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_synthetic(str(tmp_path / name), seed, 1, 1, 2)
    first, second, third = (contents(tmp_path / name) for name in "abc")
    assert first == second
    audio = [p for p in first if p.endswith((".wav", ".flac"))]
    assert len(audio) == 2 * len(SOUNDS) + 2
    assert all(first[path] != third[path] for path in audio if path in third)
    assert first["captions.csv"] != third["captions.csv"]


def test_number_of_clips_changes_no_other_part(world, tmp_path):
    make_synthetic(str(tmp_path / "few"), 1, 2, 1, 0)
    few, many = contents(tmp_path / "few"), contents(world)
    assert "captions.csv" not in few and "unlabelled.txt" not in few
    audio = {path for path in few if "audio/" in path}
    assert len(audio) == 3 * len(SOUNDS)
    assert {p for p in audio if "pairs/" in p} < many.keys()
    for path in audio & many.keys():
        assert few[path] == many[path]


def test_target_is_read_as_esc50(world):
    data = prepare_zeroshot(
        "esc", str(world / "target"), str(world / "target/labels.csv")
    )
    assert not data.missing
    assert data.labels["label"].tolist() == list(WORDS)
    counts = data.clips.groupby(["fold", "label"]).size()
    assert len(counts) == 5 * len(SOUNDS) and set(counts) == {1}
    meta = pd.read_csv(world / "target/meta/esc50.csv")
    names = meta["fold"].astype(str) + "-" + meta["src_file"].astype(str)
    names += "-" + meta["take"] + "-" + meta["target"].astype(str)
    assert (meta["filename"].str.rsplit(".", n=1).str[0] == names).all()
    assert (meta["category"] == np.array(list(WORDS))[meta["target"]]).all()


def test_pairs_are_read_as_an_index(world, pairs, tmp_path):
    counts = prepare_captions(str(tmp_path), str(world / "pairs"))
    found = counts["datasets"]["synthetic_index"]
    assert found["clips"] == len(pairs) == CLIPS * len(SOUNDS)
    assert found["captions"] == sum(len(captions) for _, captions in pairs)
    assert found["missing"] == found["unreadable"] == 0


def test_unlabelled(world):
    paths = (world / "unlabelled.txt").read_text().splitlines()
    assert len(paths) == len(set(paths)) == UNLABELLED
    on_disk = {
        f"unlabelled/{path.name}" for path in (world / "unlabelled").iterdir()
    }
    assert set(paths) == on_disk
    captions = pd.read_csv(world / "captions.csv")["caption"]
    assert captions.is_unique and len(captions) == synthetic.CORPUS_SIZE


def test_formats_and_lengths(pairs):
    formats, seconds = set(), []
    for path, _ in pairs:
        info = soundfile.info(path)
        formats.add((path.suffix, info.samplerate, info.channels))
        seconds.append(info.duration)
        assert info.subtype == "PCM_16"
    assert formats == {
        (".wav", 16000, 1),
        (".flac", 16000, 1),
        (".wav", 22050, 1),
        (".wav", 16000, 2),
        (".flac", 22050, 2),
    }
    assert 1.19 < min(seconds) < 1.7 and 3.5 < max(seconds) < 4.01


def test_second_run_does_nothing_and_other_settings_are_refused(tmp_path):
    folder = tmp_path / "world"
    make_synthetic(str(folder), 1, 1, 1)
    (folder / "pairs/synthetic_index.tsv").write_text("kept")
    make_synthetic(str(folder), 1, 1, 1)
    assert (folder / "pairs/synthetic_index.tsv").read_text() == "kept"
    with pytest.raises(FileExistsError, match="other settings.*delete"):
        make_synthetic(str(folder), 2, 1, 1)


def test_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="not made by this command"):
        make_synthetic(str(tmp_path), 1, 1, 1)
    assert (tmp_path / "mine").read_text() == "precious"


def test_stopped_run_leaves_no_folder_and_can_be_rerun(tmp_path, monkeypatch):
    folder = tmp_path / "world"

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "make_text_model", stop)
        with pytest.raises(KeyboardInterrupt):
            make_synthetic(str(folder), 1, 1, 1)
    assert not folder.exists()
    stale = tmp_path / "world.partial/stale"
    stale.write_text("from the stopped run")
    make_synthetic(str(folder), 1, 1, 1)
    assert not (folder / "stale").exists() and not stale.parent.exists()
    settings = json.loads((folder / "synthetic.json").read_text())
    assert settings["seed"] == 1 and settings["clips_per_class"] == 1


@pytest.mark.parametrize("numbers", [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_numbers_of_clips_are_checked(tmp_path, numbers):
    with pytest.raises(ValueError, match="at least 1"):
        make_synthetic(str(tmp_path / "world"), 1, *numbers)


def test_command(tmp_path, capsys):
    folder = tmp_path / "world"
    synthetic.main([str(folder), "--clips_per_class=1", "--target_per_class=1"])
    assert capsys.readouterr().out == f"Synthetic sounds in {folder}\n"
    assert json.loads((folder / "synthetic.json").read_text()) == {
        "version": synthetic.GENERATOR_VERSION,
        "seed": 1,
        "clips_per_class": 1,
        "target_per_class": 1,
        "unlabelled": 0,
    }


# ---- Sounds ----------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [16000, 22050])
def test_every_sound_has_the_length_and_level_of_its_scene(rate, channels):
    for index, sound in enumerate(SOUNDS):
        rng = np.random.default_rng(index)
        clip = render(rng, sound, scene(level=-30.0), rate, channels)
        assert clip.shape == (2 * rate, channels)
        power = np.convolve(clip[:, 0] ** 2, np.ones(rate // 10) / rate * 10)
        assert 10 * np.log10(power.max()) == pytest.approx(-30, abs=0.1)


def test_short_clips_of_slow_events_are_not_silent():
    short = scene(seconds=1.2, speed=0)
    for sound in SOUNDS:
        for seed in range(20):
            clip = render(np.random.default_rng(seed), sound, short, 16000, 1)
            assert np.abs(clip).max() > 0.05, (sound.label, seed)


def test_loud_clips_are_not_clipped():
    rng = np.random.default_rng(0)
    clip = render(rng, SOUNDS[2], scene(level=0.0), 16000, 1)
    assert np.sum(np.abs(clip) >= 1) == 1


@pytest.mark.parametrize("position, hertz", [(0, 1400), (0.5, 2117), (1, 3200)])
def test_pitch_is_what_the_scene_says(position, hertz):
    alarm = next(sound for sound in SOUNDS if sound.label == "alarm_beep")
    rng = np.random.default_rng(0)
    clip = render(rng, alarm, scene(pitch=position), 16000, 1)[:, 0]
    peak = np.abs(np.fft.rfft(clip)).argmax() / 2
    assert peak == pytest.approx(hertz, rel=0.01)


def test_background_is_as_far_below_as_the_scene_says():
    """The quiet between two ticks of a clock is the background's level."""
    clock = next(sound for sound in SOUNDS if sound.label == "clock_tick")
    quiet = {}
    for snr in (10.0, 30.0):
        rng = np.random.default_rng(0)
        # A microphone without a limit leaves the background all its power.
        there = scene(speed=0, snr=snr, bandwidth=1e9, level=-30.0)
        clip = render(rng, clock, there, 16000, 1)[:, 0]
        frames = clip[: len(clip) // 400 * 400].reshape(-1, 400)
        power = np.median((frames**2).mean(axis=1))
        quiet[snr] = 10 * np.log10(power)
    assert quiet[10.0] - quiet[30.0] == pytest.approx(20, abs=1)
    assert quiet[30.0] == pytest.approx(-30 - 30, abs=1)


def spectrum_shape(path):
    """Mean and deviation over time of relative log power in 24 bands."""
    samples, rate = soundfile.read(path, always_2d=True)
    mono = samples.mean(axis=1)
    size = rate // 31
    frames = mono[: len(mono) // size * size].reshape(-1, size)
    power = np.abs(np.fft.rfft(frames * np.hanning(size))) ** 2
    edges = np.geomspace(1, 8000 * size / rate, 25).round().astype(int)
    edges = np.maximum.accumulate(np.maximum(edges, np.arange(1, 26)))
    bands = np.add.reduceat(power, edges[:-1], axis=1)
    # What is 50 dB below the loudest is background.
    log = np.log(np.maximum(bands / bands.max(), 1e-5))
    return np.concatenate([log.mean(axis=0), log.std(axis=0)])


def test_classes_can_be_told_apart(pairs):
    """Nearest class mean on the long-term spectrum; chance is 1/12."""
    features = np.array([spectrum_shape(path) for path, _ in pairs])
    labels = np.array([label_of(path) for path, _ in pairs])
    train = np.arange(len(pairs)) % CLIPS < CLIPS // 2
    means = np.array(
        [features[train & (labels == label)].mean(axis=0) for label in WORDS]
    )
    test = features[~train]
    distances = np.linalg.norm(test[:, None] - means, axis=2)
    guesses = np.array(list(WORDS))[distances.argmin(axis=1)]
    assert (guesses == labels[~train]).mean() > 0.7


# ---- Captions --------------------------------------------------------------


def test_captions_name_their_class_and_no_other(pairs):
    assert {label_of(path) for path, _ in pairs} == set(WORDS)
    for path, captions in pairs:
        assert 1 <= len(captions) <= 3
        assert len(set(captions)) == len(captions)
        for caption in captions:
            assert classes_in(caption) == {label_of(path)}
            assert "{" not in caption and "  " not in caption
            assert not re.search(r"\ba [aeiou]", caption)


def test_loudness_in_captions_is_that_of_the_file(pairs):
    heard = {"quiet": [], "loud": []}
    for path, captions in pairs:
        samples, rate = soundfile.read(path, always_2d=True)
        size = rate // 10
        power = np.convolve(samples[:, 0] ** 2, np.ones(size) / size)
        decibels = 10 * np.log10(power.max())
        for word, levels in heard.items():
            if any(word in caption.split() for caption in captions):
                levels.append(decibels)
    assert heard["quiet"] and max(heard["quiet"]) < -21.9
    # Peaks above full scale are turned down, so loud clips can lose a little.
    assert heard["loud"] and np.median(heard["loud"]) > -12


@pytest.mark.parametrize("sound", SOUNDS, ids=lambda sound: sound.label)
def test_adjectives_fit_the_scene(sound):
    def words(**changes):
        rng = np.random.default_rng(0)
        said = " ".join(
            describe(rng, sound, scene(**changes)) for _ in range(60)
        )
        return {
            word: bool(re.search(rf"\b{word}\b", said)) for word in near | far
        }

    near = {sound.pitch_words[0], sound.speed_words[0]} - {""}
    far = {sound.pitch_words[1], sound.speed_words[1]} - {""}
    # "light rain" and "light footsteps" are not at the same end.
    assert not near & far
    low, middle, high = (
        words(pitch=position, speed=position) for position in (0, 0.5, 1)
    )
    assert all(low[word] and not high[word] for word in near)
    assert all(high[word] and not low[word] for word in far)
    assert not any(middle.values())


def test_backgrounds_are_said_where_they_are():
    rng = np.random.default_rng(0)
    for background, (_, names) in BACKGROUNDS.items():
        there = scene(background=background)
        said = [describe(rng, SOUNDS[0], there) for _ in range(80)]
        for other, (_, phrases) in BACKGROUNDS.items():
            for phrase in phrases:
                found = any(phrase in caption for caption in said)
                assert found == (other == background), phrase
        assert names[0] in " ".join(said)


def test_domains_differ():
    assert not set(STUDIO.backgrounds) & set(FIELD.backgrounds)
    rng = np.random.default_rng(0)
    studio = [draw_scene(rng, STUDIO) for _ in range(50)]
    field = [draw_scene(rng, FIELD) for _ in range(50)]
    assert {s.background for s in studio} == set(STUDIO.backgrounds)
    assert {s.background for s in field} == set(FIELD.backgrounds)
    for name in ("level", "snr", "bandwidth"):
        mean = [np.mean([getattr(s, name) for s in d]) for d in (studio, field)]
        assert mean[0] > mean[1]
    for name in ("reverb", "pitch"):
        mean = [np.mean([getattr(s, name) for s in d]) for d in (studio, field)]
        assert mean[0] < mean[1]


def test_corpus_is_about_these_and_other_sounds():
    corpus = make_corpus(np.random.default_rng(0), 600)
    assert len(corpus) == len(set(corpus)) == 600
    others = [c for c in corpus if any(o in c for o in OTHER_SOUNDS)]
    assert 120 < len(others) < 300
    assert {o for o in OTHER_SOUNDS if any(o in c for c in others)} == set(
        OTHER_SOUNDS
    )
    named = [classes_in(c) for c in corpus if c not in others]
    assert all(len(classes) == 1 for classes in named)
    assert set.union(*named) == set(WORDS)


# ---- Text model ------------------------------------------------------------


def test_every_caption_and_prompt_is_tokenised_in_whole_words(world, pairs):
    tokenizer = AutoTokenizer.from_pretrained(world / "text_model")
    texts = [caption for _, captions in pairs for caption in captions]
    texts += pd.read_csv(world / "captions.csv")["caption"].tolist()
    texts += [f"this is a sound of {sound.text}" for sound in SOUNDS]
    for text in texts:
        tokens = tokenizer.tokenize(text)
        assert tokens == text.split()
        ids = tokenizer(text.upper())["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_text_model_loads(world):
    folder = world / "text_model"
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.hidden_size) == ("bert", 64)
    assert (config.num_hidden_layers, config.num_attention_heads) == (2, 2)
    assert (config.intermediate_size, config.max_position_embeddings) == (
        128,
        128,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = (folder / "vocab.txt").read_text().splitlines()
    assert config.vocab_size == len(tokenizer) == len(tokens)
    assert tokenizer.convert_ids_to_tokens(range(len(tokens))) == tokens
    assert tokenizer.model_max_length == 128
    assert not {path.suffix for path in folder.iterdir()} & {
        ".bin",
        ".safetensors",
    }
    model = AutoModel.from_config(config).eval()
    batch = tokenizer(["rain", "a siren"], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    assert hidden.shape == (2, batch["input_ids"].shape[1], 64)


def test_unknown_words_are_spelled(tmp_path):
    text_model.make_text_model(["Two café-s."], str(tmp_path), hidden_size=16)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("TWO Café-s.") == ["two", "cafe", "-", "s", "."]
    assert tokenizer.tokenize("9 zebras!") == (
        ["9", "z", "##e", "##b", "##r", "##a", "##s", "!"]
    )
    assert tokenizer.tokenize("日") == ["[UNK]"]
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == 16


def test_vocabulary_does_not_depend_on_the_order(tmp_path):
    captions = ["rain falling", "a bell", "wind"]
    text_model.make_text_model(captions, str(tmp_path / "a"))
    text_model.make_text_model(captions[::-1] * 2, str(tmp_path / "b"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_text_model_command(tmp_path, capsys):
    table = tmp_path / "captions.csv"
    table.write_text("caption\nrain falling\nnull\n")
    text_model.main([str(table), str(tmp_path / "model")])
    assert "2 captions" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.tokenize("null rain") == ["null", "rain"]
    table.write_text("text\nrain\n")
    with pytest.raises(ValueError, match="lacks the column.*caption"):
        text_model.main([str(table), str(tmp_path / "other")])
