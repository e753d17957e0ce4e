"""Windows equal those of the whole file, decoded and resampled at once."""

import errno
import itertools
import math
import os

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import write_noise

from dataset.audio import (
    LARGEST_KERNEL,
    LOUDEST,
    NEAREST_KERNEL,
    AudioError,
    AudioReader,
    Resampler,
    nearest_ratio,
    open_audio,
    probe_seconds,
    read_samples,
)

FORMATS = {
    "wav8": dict(format="WAV", subtype="PCM_U8"),
    "wav16": dict(format="WAV", subtype="PCM_16"),
    "wav24": dict(format="WAV", subtype="PCM_24"),
    "wav32": dict(format="WAV", subtype="PCM_32"),
    "float": dict(format="WAV", subtype="FLOAT"),
    "flac": dict(format="FLAC", subtype="PCM_16"),
    "ogg": dict(format="OGG", subtype="VORBIS"),
    "opus": dict(format="OGG", subtype="OPUS"),
    "aiff": dict(format="AIFF", subtype="PCM_16"),
    "mp3": dict(format="MP3"),
}
PERIODS = [
    (orig, new)
    for orig, new in itertools.permutations(
        (1, 2, 3, 80, 147, 160, 441, 997), 2
    )
    if math.gcd(orig, new) == 1
]


def whole(path, sample_rate):
    """Reference: decode all, mean of the channels, resample all."""
    frames, rate = soundfile.read(path, dtype="float32", always_2d=True)
    mono = torch.from_numpy(frames.mean(axis=1))
    return torchaudio.transforms.Resample(rate, sample_rate)(mono)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_formats(tmp_path, form, channels):
    if form == "mp3":
        channels = min(channels, 2)  # it has no more
    rate = 48000 if form == "opus" else 44100
    path = write_noise(tmp_path / "a", 2.0, rate, channels, **FORMATS[form])
    expected = whole(path, rate)
    with open_audio(path) as file:
        samples = read_samples(file, rate, 30011, 50021)
    # A seek in MP3 restarts the decoder, whose state fades.
    atol = 1e-4 if form == "mp3" else 0
    torch.testing.assert_close(
        samples, expected[30011:50021], rtol=0, atol=atol
    )


@pytest.mark.parametrize("rate", [22050, 44100])
def test_mp3_is_the_same_from_anywhere(tmp_path, rate):
    """Loud moments borrow bits of quiet ones, many of its blocks before."""
    rng = np.random.default_rng(0)
    loudness = np.repeat(10.0 ** -rng.uniform(0, 4, 200), rate // 25)
    frames = loudness * rng.uniform(-0.5, 0.5, len(loudness))
    path = tmp_path / "a.mp3"
    soundfile.write(path, frames, rate, format="MP3", compression_level=0.9)
    expected = whole(path, rate)
    for begin in range(0, 7 * rate, rate // 9):
        with open_audio(path) as file:
            samples = read_samples(file, rate, begin, begin + 3000)
        torch.testing.assert_close(
            samples, expected[begin : begin + 3000], rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000, 11025])
@pytest.mark.parametrize("target", [16000, 32000, 44100])
def test_resampled_window_is_that_of_the_whole(tmp_path, rate, target):
    path = write_noise(tmp_path / "a.wav", 1.5, rate, 2)
    expected = whole(path, target)
    n = len(expected)
    for begin, end in [
        (0, 100),
        (0, n),
        (777, 9001),
        (n - 3001, n),
        (n - 1, n),
    ]:
        with open_audio(path) as file:
            samples = read_samples(file, target, begin, end)
        # Convolutions of other lengths may round otherwise, by an ulp or two.
        torch.testing.assert_close(
            samples, expected[begin:end], rtol=0, atol=2e-7
        )


@pytest.mark.parametrize("orig, new", PERIODS)
@pytest.mark.parametrize("largest", [LARGEST_KERNEL, 1])
def test_resampling_is_torchaudios(orig, new, largest, monkeypatch):
    """For noise, and for a single frame: all weights by themselves."""
    monkeypatch.setattr("dataset.audio.LARGEST_KERNEL", largest)
    ours = Resampler(orig, new)
    theirs = torchaudio.transforms.Resample(orig, new)
    draw = torch.Generator().manual_seed(0)
    frame = torch.zeros(3 * orig + 40)
    frame[orig + 20] = 1
    lengths = (1, 2, orig, orig + 1, 5 * orig + 3, 20 * orig + 1000)
    noises = [torch.rand(length, generator=draw) for length in lengths]
    for x, atol in ((frame, 0), *((noise, 1e-5) for noise in noises)):
        found = ours(torch.nn.functional.pad(x, ours.margins(len(x))))
        expected = theirs(x)
        assert len(found) >= -(-len(x) * new // orig)
        # torchaudio counts the samples in fp32.
        found = found[: len(expected)]
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_crop_reaches_both_ends_and_takes_a_start(tmp_path):
    path = write_noise(tmp_path / "a.wav", 3.0, 16000)
    samples = whole(path, 16000)
    reader = AudioReader(16000, 1.0)
    assert torch.equal(reader.crop(path, 0.0)[0], samples[:16000])
    assert torch.equal(reader.crop(path, 1.0)[0], samples[-16000:])
    assert torch.equal(reader.crop(path, 0.5)[0], samples[16000:32000])
    assert torch.equal(reader.crop(path, start=0.5)[0], samples[8000:24000])
    assert torch.equal(reader.crop(path, start=99)[0], samples[-16000:])


def test_all_places_of_a_crop_are_alike(tmp_path):
    """Of two, one for each half of the fractions."""
    path = write_noise(tmp_path / "a.wav", 1 + 1 / 16000, 16000)
    reader = AudioReader(16000, 1.0)
    starts = [reader.crop(path, f)[1] * 16000 for f in (0, 0.49, 0.51, 0.99)]
    assert starts == [0, 0, 1, 1]


def test_the_last_frame_is_in_a_window(tmp_path):
    """Where it makes half a sample."""
    path = write_noise(tmp_path / "a.wav", 1 + 1 / 16000, 16000)
    assert AudioReader(8000, 1.0).starts(path) == [0, 1 / 8000]


def test_crop_within_a_part(tmp_path):
    path = write_noise(tmp_path / "a.wav", 3.0, 16000)
    reader = AudioReader(16000, 1.0)
    found = [
        reader.crop(path, fraction, start, end)[1]
        for fraction in (0.0, 0.5, 1.0)
        for start, end in ((0.5, 2.0), (0.5, 1.5), (0.5, 0.5), (1.5, 9.0))
    ]
    expected = [0.5, 0.5, 0.5, 1.5, 0.75, 0.5, 0.5, 1.75, 1, 0.5, 0.5, 2]
    np.testing.assert_allclose(found, expected, atol=1 / 16000)


@pytest.mark.parametrize("fraction", [0.0, 0.7])
def test_a_part_shorter_than_a_window_is_read_alone(tmp_path, fraction):
    path = write_noise(tmp_path / "a.wav", 3.0, 16000)
    samples = whole(path, 16000)
    reader = AudioReader(16000, 1.0)
    window, start = reader.crop(path, fraction, 2.5, 2.9)
    assert start == 2.5
    assert torch.equal(window, samples[40000:46400].repeat(3)[:16000])
    padded, _ = AudioReader(16000, 1.0, "zero").crop(path, fraction, 2.5, 2.9)
    assert torch.equal(padded[:6400], window[:6400])
    assert not padded[6400:].any()
    # A window whose ends were rounded is one still.
    assert torch.equal(reader.crop(path, 0, 2, 2.999)[0], samples[-16000:])
    # Beyond the end there is nothing to read.
    found = reader.crop(path, fraction, 2.8, 9)[0]
    assert torch.equal(found, samples[-3200:].repeat(5))
    assert torch.equal(reader.crop(path, 0, 3.1, 3.2)[0], samples[-16000:])


def test_codecs_without_seek_are_read(tmp_path):
    path = tmp_path / "gsm.wav"
    write_noise(path, 3.0, 8000, format="WAV", subtype="GSM610")
    samples, _ = soundfile.read(path, dtype="float32")
    with soundfile.SoundFile(path) as file:
        assert not file.seekable()
    reader = AudioReader(8000, 1.0)
    for fraction, begin in ((0.0, 0), (0.5, len(samples) // 2 - 4000)):
        window = reader.crop(str(path), fraction)[0].numpy()
        np.testing.assert_array_equal(window, samples[begin : begin + 8000])
    windows = torch.cat([*reader.windows(str(path))])[:16000]
    np.testing.assert_array_equal(windows.numpy(), samples[:16000])


def test_windows_cover_the_clip(tmp_path):
    path = write_noise(tmp_path / "a.wav", 2.5, 16000)
    samples = whole(path, 16000)
    windows = AudioReader(16000, 1.0).windows(path)
    expected = [samples[:16000], samples[16000:32000], samples[24000:]]
    assert torch.equal(windows, torch.stack(expected))
    exact = write_noise(tmp_path / "b.wav", 2.0, 16000)
    assert AudioReader(16000, 1.0).windows(exact).shape == (2, 16000)


def test_a_window_is_found_again_at_its_start(tmp_path):
    path = write_noise(tmp_path / "a.wav", 3.3, 44100)
    reader = AudioReader(16000, 1.0)
    window, start = reader.crop(path, 0.37)
    assert 0 < start < 2.3
    assert torch.equal(reader.crop(path, start=start)[0], window)
    starts = reader.starts(path)
    again = [reader.crop(path, start=s)[0] for s in starts]
    assert torch.equal(torch.stack(again), reader.windows(path))
    assert starts == [0, 1, 2, 2.3]


def test_short_clips_are_repeated_or_padded(tmp_path):
    path = write_noise(tmp_path / "a.wav", 0.3, 16000)
    samples = whole(path, 16000)
    repeated, _ = AudioReader(16000, 1.0, "repeat").crop(path)
    assert torch.equal(repeated, samples.repeat(4)[:16000])
    padded, _ = AudioReader(16000, 1.0, "zero").crop(path)
    assert torch.equal(padded[:4800], samples)
    assert padded.shape == repeated.shape == (16000,)
    assert padded[4800:].abs().max() == 0
    whole_window, _ = AudioReader(16000, 0.3, "zero").crop(path)
    assert torch.equal(whole_window, samples)
    with pytest.raises(ValueError, match="repeat"):
        AudioReader(16000, 1.0, "mirror")


def test_only_the_window_is_decoded(tmp_path, monkeypatch):
    path = write_noise(tmp_path / "a.flac", 30.0, 48000)
    decoded = []
    read = soundfile.SoundFile.read

    def counting(self, frames=-1, **kwargs):
        decoded.append(frames)
        return read(self, frames, **kwargs)

    monkeypatch.setattr(soundfile.SoundFile, "read", counting)
    AudioReader(44100, 1.0).crop(path, 0.7)
    assert 48000 <= sum(decoded) < 49000


def test_unusable_files(tmp_path):
    reader = AudioReader(16000, 1.0)
    (tmp_path / "text.wav").write_text("no audio")
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16000)
    soundfile.write(
        tmp_path / "nan.wav", np.full(100, np.nan), 16000, subtype="FLOAT"
    )
    for name in ("text", "empty", "none", "nan", "absent"):
        with pytest.raises(AudioError):
            reader.crop(str(tmp_path / f"{name}.wav"))
    with pytest.raises(AudioError, match="NaN"):
        reader.crop(str(tmp_path / "nan.wav"))


def test_the_reason_why_a_file_cannot_be_opened(tmp_path):
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "zero.wav").touch()
    (tmp_path / "text.wav").write_text("no audio")
    (tmp_path / "video.MP4").write_text("no audio either")
    (tmp_path / "link.wav").symlink_to(tmp_path / "absent.wav")
    for name, reason in (
        ("absent.wav", "^is missing$"),
        ("link.wav", "^is missing$"),
        ("folder.wav", "^is a folder$"),
        ("zero.wav", "^is empty: 0 bytes$"),
        ("text.wav", "^cannot be opened: .*text.wav"),
        ("video.MP4", r"^is in a format that is not read: .* \.wav \.flac"),
    ):
        with pytest.raises(AudioError, match=reason):
            open_audio(str(tmp_path / name))


def test_what_the_system_refuses_is_told(tmp_path, monkeypatch):
    """And ends a run where that is no fault of the file's."""
    (tmp_path / "a.wav").write_text("no audio")

    def refuse(code):
        def refused(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("builtins.open", refused)

    refuse(errno.EACCES)
    with pytest.raises(AudioError, match="^cannot be opened: Permission den"):
        open_audio(str(tmp_path / "a.wav"))
    refuse(errno.EMFILE)
    with pytest.raises(OSError, match="Too many open files"):
        open_audio(str(tmp_path / "a.wav"))


def test_flac_of_unknown_length(tmp_path):
    """As it is written to a pipe: its header counts 0 samples, in 36 bits."""
    path = tmp_path / "a.flac"
    write_noise(path, 1.0, 16000)
    header = bytearray(path.read_bytes())
    header[21:26] = bytes([header[21] & 0xF0, 0, 0, 0, 0])
    path.write_bytes(header)
    for look in (open_audio, probe_seconds, AudioReader(16000, 1.0).starts):
        with pytest.raises(AudioError, match="does not tell its length"):
            look(str(path))


def test_truncated_flac(tmp_path):
    path = tmp_path / "a.flac"
    write_noise(path, 4.0, 16000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    reader = AudioReader(16000, 1.0)
    assert reader.crop(str(path), 0.0)[0].shape == (16000,)
    with pytest.raises(AudioError):
        reader.crop(str(path), 1.0)


@pytest.mark.parametrize("rate", [11024, 11127, 22255, 44056, 44101, 47951])
def test_the_nearest_ratio_where_the_kernel_would_be_too_large(rate):
    """The kernel of 47951:44100 would have 2 * 10^9 values."""

    def error(orig, new):
        return abs(orig * 44100 / (new * rate) - 1)

    news = np.arange(1, 5000)
    origs = np.round(news * rate / 44100)
    errors = error(origs, news)[(origs >= 1) & (origs * news <= NEAREST_KERNEL)]
    orig, new = nearest_ratio(rate, 44100)
    assert error(orig, new) == pytest.approx(errors.min(), rel=1e-6)
    assert errors.min() < 2e-4


def test_a_tone_at_an_odd_rate_keeps_its_pitch_and_length(tmp_path):
    seconds = np.arange(4 * 11024) / 11024
    path = str(tmp_path / "a.wav")
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * 1000 * seconds), 11024)
    reader = AudioReader(44100, 3.0)
    window, start = reader.crop(path, 1.0)
    spectrum = torch.fft.rfft(window * torch.hann_window(len(window)))
    assert spectrum.abs().argmax() / 3.0 == pytest.approx(1000, abs=0.5)
    assert start == pytest.approx(1, abs=1e-3)
    assert reader.starts(path) == [0, start]


@pytest.mark.parametrize(
    ("rate", "taken_for"), [(11024, 11025), (44101, 44100)]
)
def test_windows_at_an_odd_rate_are_those_of_the_whole(
    tmp_path, rate, taken_for
):
    path = write_noise(tmp_path / "a.wav", 1.5, rate, 2)
    frames, _ = soundfile.read(path, dtype="float32", always_2d=True)
    soundfile.write(tmp_path / "b.wav", frames, taken_for)
    expected = whole(tmp_path / "b.wav", 44100)
    n = len(expected)
    for begin, end in [(0, n), (777, 9001), (n - 3001, n), (n - 1, n)]:
        with open_audio(path) as file:
            samples = read_samples(file, 44100, begin, end)
        torch.testing.assert_close(
            samples, expected[begin:end], rtol=0, atol=2e-7
        )
    reader = AudioReader(44100, 1.0)
    torch.testing.assert_close(
        reader.windows(path)[-1], expected[-44100:], rtol=0, atol=2e-7
    )


@pytest.mark.parametrize("value", [1e30, -1e30])
def test_values_that_no_audio_has(tmp_path, value):
    """Their spectrogram would be infinite, and the embedding NaN."""
    samples = np.zeros(16000)
    samples[5000] = value
    path = str(tmp_path / "a.wav")
    soundfile.write(path, samples, 16000, subtype="FLOAT")
    with pytest.raises(AudioError, match="holds samples over"):
        AudioReader(16000, 1).crop(path)


def test_the_loudest_audio_has_finite_embeddings(tmp_path, tiny_clap):
    path = str(tmp_path / "a.wav")
    noise = np.random.default_rng(0).choice([-LOUDEST, LOUDEST], 16000)
    soundfile.write(path, noise, 16000, subtype="FLOAT")
    window, _ = AudioReader(16000, 1).crop(path)
    with torch.no_grad():
        assert tiny_clap.encode_audio(window[None]).isfinite().all()


def test_silence_is_a_sound(tmp_path, tiny_clap):
    soundfile.write(tmp_path / "a.wav", np.zeros(16000), 16000)
    wav, _ = AudioReader(16000, 1.0).crop(str(tmp_path / "a.wav"))
    assert torch.isfinite(tiny_clap.encode_audio(wav[None])).all()
