"""A small world of synthetic sounds with captions, made offline.

    python -m dataset.synthetic OUTPUT_FOLDER

makes sounds that a person can tell apart and name, in two acoustic domains:
clips of the *studio* come with captions and are few; clips of the *field*,
with other backgrounds, room and microphone, are the task to solve.

    pairs/            studio clips and synthetic_index.tsv, their captions
    target/           field clips in ESC-50's layout, and labels.csv
    text_model/       a small BERT for the vocabulary, without weights
    synthetic.json    the settings; written last

and with --unlabelled N

    unlabelled/       N more field clips
    unlabelled.txt    their paths, one a line, relative to OUTPUT_FOLDER
    captions.csv      captions without audio, of these and of other sounds

The same settings make the same files, byte for byte (on one machine: the last
bit of a sample can depend on the processor).
"""

import argparse
import csv
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import soundfile

from dataset.text_model import make_text_model

GENERATOR_VERSION = 3
SETTINGS_FILE = "synthetic.json"
FOLDS = 5
CORPUS_SIZE = 800
TEXT_PROMPT = "this is a sound of"
# Format of every eighth clip in turn: file ending, rate in Hz, channels.
# There is no OGG: libsndfile numbers its streams at random.
FORMATS = 4 * [("wav", 16000, 1)] + [
    ("flac", 16000, 1),
    ("wav", 22050, 1),
    ("wav", 16000, 2),
    ("flac", 22050, 2),
]

# ---- Signals ---------------------------------------------------------------
# A signal is float64, (samples,). `rate` is its sample rate in Hz.


def _times(seconds, rate):
    """Time of every sample in seconds."""
    return np.arange(round(seconds * rate)) / rate


def _tone(frequency, rate, harmonics=(1.0,)):
    """Harmonics of a frequency in Hz that is given for every sample."""
    phase = 2 * np.pi * np.cumsum(frequency) / rate
    return sum(
        level * np.sin(number * phase)
        for number, level in enumerate(harmonics, start=1)
    )


def _filter(signal, rate, response):
    """Scale the spectrum by a function of the frequencies in Hz."""
    size = _fft_size(len(signal))
    frequencies = np.fft.rfftfreq(size, 1 / rate)
    spectrum = np.fft.rfft(signal, size) * response(frequencies)
    return np.fft.irfft(spectrum, size)[: len(signal)]


def _fft_size(count):
    """The next power of two: an FFT of any other size can be very slow."""
    return 1 << (count - 1).bit_length()


def _lowpass(cutoff):
    """Response that falls by 12 dB an octave above a cutoff in Hz."""
    return lambda frequencies: 1 / (1 + (frequencies / cutoff) ** 2)


def _bandpass(centre, width):
    """Response with a peak; the width is in octaves."""
    return lambda frequencies: np.exp(
        -((np.log2(np.maximum(frequencies, 1) / centre) / width) ** 2)
    )


def _noise(rng, seconds, rate, response):
    """Filtered white noise with a mean power of one."""
    white = rng.standard_normal(round(seconds * rate))
    noise = _filter(white, rate, response)
    return noise / np.sqrt(np.mean(noise**2))


def _slow_curve(rng, seconds, rate, per_second):
    """A random curve between 0 and 1 with so many points a second."""
    points = rng.uniform(size=2 + int(np.ceil(seconds * per_second)))
    places = np.arange(len(points)) / per_second
    return np.interp(_times(seconds, rate), places, points)


def _onsets(rng, seconds, per_second, jitter=0.0):
    """Times of events in seconds, the first one within the first half.

    Jitter is a fraction of their interval.
    """
    count = int(np.ceil(seconds * per_second))
    onsets = rng.uniform(0, 0.8) + np.arange(count)
    onsets += rng.uniform(-jitter, jitter, count)
    onsets = np.maximum(onsets, 0) / per_second
    # Else a short clip of slow events may be silent.
    onsets[0] = min(onsets[0], seconds / 2)
    return onsets[onsets < seconds]


def _sequence(onsets, seconds, rate, make_event):
    """Sum of events, each made anew and cut where the signal ends."""
    signal = np.zeros(round(seconds * rate))
    for onset in onsets:
        begin = int(onset * rate)
        event = make_event()[: len(signal) - begin]
        signal[begin : begin + len(event)] += event
    return signal


def _decay(seconds, rate, time_constant):
    """An envelope that falls exponentially from one."""
    return np.exp(-_times(seconds, rate) / time_constant)


def _gate(signal, rate):
    """Fade a signal in and out within 5 ms, lest it click."""
    size = min(round(0.005 * rate), len(signal) // 2)
    signal[:size] *= np.linspace(0, 1, size)
    signal[len(signal) - size :] *= np.linspace(1, 0, size)
    return signal


# ---- Sounds ----------------------------------------------------------------
# Each makes a signal from (rng, seconds, rate, pitch in Hz, speed per second).


def _siren(rng, seconds, rate, pitch, speed):
    """A tone that glides up and down by half an octave either way."""
    sweep = speed * _times(seconds, rate) + rng.uniform()
    frequency = pitch * 2 ** (0.5 * np.sin(2 * np.pi * sweep))
    return _tone(frequency, rate, (1, 0.5, 0.3, 0.15))


def _hum(rng, seconds, rate, pitch, speed):
    """Steady harmonics of mains, strongest at the even ones."""
    frequency = np.full(round(seconds * rate), pitch)
    harmonics = [
        (1.0 if number % 2 == 0 else 0.4) / number * rng.uniform(0.5, 1)
        for number in range(1, 13)
    ]
    beat = 1 + 0.1 * np.sin(2 * np.pi * speed * _times(seconds, rate))
    return beat * _tone(frequency, rate, harmonics)


def _clock(rng, seconds, rate, pitch, speed):
    """Short clicks, every other one a little lower."""
    pitches = [pitch, 0.8 * pitch]

    def tick():
        pitches.reverse()
        ring = _tone(np.full(round(0.05 * rate), pitches[0]), rate)
        click = ring + 0.5 * rng.standard_normal(len(ring))
        return click * _decay(0.05, rate, 0.006)

    return _sequence(_onsets(rng, seconds, speed), seconds, rate, tick)


def _bird(rng, seconds, rate, pitch, speed):
    """Short whistles that glide, in one direction each."""

    def chirp():
        length = rng.uniform(0.06, 0.14)
        glide = np.linspace(-1, 1, round(length * rate)) * rng.choice([-1, 1])
        whistle = _tone(pitch * 2 ** (0.3 * glide), rate, (1, 0.1))
        return whistle * np.sin(np.linspace(0, np.pi, len(whistle)))

    onsets = _onsets(rng, seconds, speed, jitter=0.3)
    return _sequence(onsets, seconds, rate, chirp)


def _steam(rng, seconds, rate, pitch, speed):
    """Bursts of high noise that start suddenly."""

    def burst():
        length = rng.uniform(0.3, 0.6) / speed
        noise = _noise(rng, length, rate, _bandpass(pitch, 0.7))
        return _gate(noise * _decay(length, rate, length / 2), rate)

    return _sequence(_onsets(rng, seconds, speed, 0.1), seconds, rate, burst)


def _engine(rng, seconds, rate, pitch, speed):
    """A train of dull pulses, too fast to count."""

    def stroke():
        ring = _tone(np.full(round(0.08 * rate), pitch), rate, (1, 0.6, 0.4))
        rattle = 0.4 * _noise(rng, 0.08, rate, _lowpass(800))
        pulse = (ring + rattle) * _decay(0.08, rate, 0.015)
        return pulse * rng.uniform(0.6, 1)

    onsets = _onsets(rng, seconds, speed, jitter=0.08)
    return _sequence(onsets, seconds, rate, stroke)


def _bell(rng, seconds, rate, pitch, speed):
    """Strikes with the partials of a church bell; the high ones die first."""
    ratios = np.array([0.5, 1, 1.19, 1.5, 2, 2.6, 3.9])
    levels = np.array([0.5, 1, 0.7, 0.4, 0.8, 0.4, 0.3])
    times = _times(2.0, rate)

    def strike():
        return sum(
            level
            * np.sin(2 * np.pi * ratio * pitch * times)
            * np.exp(-times * 1.5 * ratio)
            for ratio, level in zip(ratios, levels)
        )

    return _sequence(_onsets(rng, seconds, speed, 0.05), seconds, rate, strike)


def _rain(rng, seconds, rate, pitch, speed):
    """Very many drops of all sizes; `speed` is their number a second."""
    size = round(seconds * rate)
    drops = np.zeros(size)
    places = rng.integers(size, size=int(seconds * speed))
    drops[places] = rng.exponential(size=len(places)) * rng.choice(
        [-1, 1], size=len(places)
    )
    drops = _filter(drops, rate, _bandpass(pitch, 1.2))
    drops /= np.sqrt(np.mean(drops**2))
    return drops + 0.3 * _noise(rng, seconds, rate, _bandpass(pitch, 1.2))


def _wind(rng, seconds, rate, pitch, speed):
    """Low noise that swells, with a whistle that follows the swell."""
    swell = 0.15 + _slow_curve(rng, seconds, rate, speed)
    air = _noise(rng, seconds, rate, _lowpass(pitch))
    howl = _noise(rng, seconds, rate, _bandpass(2 * pitch, 0.15))
    return swell * air + 0.6 * swell**2 * howl


def _alarm(rng, seconds, rate, pitch, speed):
    """Beeps of one pitch with a hard edge, as of an electronic alarm clock."""

    def beep():
        frequency = np.full(round(0.5 / speed * rate), pitch)
        return _gate(_tone(frequency, rate, (1, 0, 0.3)), rate)

    return _sequence(_onsets(rng, seconds, speed), seconds, rate, beep)


def _telephone(rng, seconds, rate, pitch, speed):
    """Rings of two tones that take turns quickly."""
    times = _times(0.6 / speed, rate)
    turns = np.where(np.sin(2 * np.pi * 13 * times) > 0, 1.25, 1)

    def ring():
        return _gate(_tone(pitch * turns, rate, (1, 0.4, 0.2)), rate)

    return _sequence(_onsets(rng, seconds, speed), seconds, rate, ring)


def _footsteps(rng, seconds, rate, pitch, speed):
    """Thuds, each followed by the scuff of a sole."""

    def step():
        thud = _tone(np.full(round(0.2 * rate), pitch), rate, (1, 0.5))
        scuff = _noise(rng, 0.2, rate, _bandpass(900, 1))
        swell = np.sin(np.linspace(0, np.pi, len(scuff))) ** 2
        sound = thud * _decay(0.2, rate, 0.04) + 0.25 * scuff * swell
        return sound * rng.uniform(0.7, 1)

    onsets = _onsets(rng, seconds, speed, jitter=0.06)
    return _sequence(onsets, seconds, rate, step)


@dataclass(frozen=True)
class Sound:
    """A class of sounds.

    Arguments
    ---------
    label : str
        Its name in the metadata.
    text : str
        Its name behind a prompt.
    synthesise : callable
        (rng, seconds, rate, pitch, speed) -> signal.
    pitch : tuple of float
        Lowest and highest pitch in Hz.
    speed : tuple of float
        Fewest and most events a second.
    pitch_words, speed_words : tuple of str
        Adjectives of the lowest and of the highest third; "" for none.
    phrases : tuple of str
        What it is called; adjectives take the place of "{}".
    """

    label: str
    text: str
    synthesise: Callable
    pitch: tuple
    speed: tuple
    pitch_words: tuple
    speed_words: tuple
    phrases: tuple


SOUNDS = (
    Sound(
        "siren",
        "siren",
        _siren,
        pitch=(450, 1100),
        speed=(0.4, 1.2),
        pitch_words=("low pitched", "high pitched"),
        speed_words=("slow", "fast"),
        phrases=(
            "a {} siren wailing",
            "{} wailing of an emergency siren",
            "a {} siren rising and falling",
        ),
    ),
    Sound(
        "electric_hum",
        "electric hum",
        _hum,
        pitch=(50, 130),
        speed=(0.3, 2),
        pitch_words=("deep", "bright"),
        speed_words=("", ""),
        phrases=(
            "a {} electric hum",
            "{} humming of a transformer",
            "the {} hum of an electric device",
        ),
    ),
    Sound(
        "clock_tick",
        "ticking clock",
        _clock,
        pitch=(1500, 4500),
        speed=(1.5, 6),
        pitch_words=("dull", "bright"),
        speed_words=("slow", "fast"),
        phrases=(
            "a {} ticking clock",
            "{} ticking of a clock",
            "a clock with a {} tick",
        ),
    ),
    Sound(
        "chirping_bird",
        "chirping bird",
        _bird,
        pitch=(2200, 5500),
        speed=(2, 6),
        pitch_words=("low pitched", "high pitched"),
        speed_words=("slow", "quick"),
        phrases=(
            "a {} chirping bird",
            "{} chirping of a bird",
            "a bird singing with {} chirps",
        ),
    ),
    Sound(
        "hissing_steam",
        "hissing steam",
        _steam,
        pitch=(2500, 6000),
        speed=(0.8, 2.5),
        pitch_words=("dull", "sharp"),
        speed_words=("slow", "quick"),
        phrases=(
            "{} hissing steam",
            "{} bursts of steam from a valve",
            "a valve hissing with {} steam",
        ),
    ),
    Sound(
        "engine",
        "engine",
        _engine,
        pitch=(70, 200),
        speed=(8, 20),
        pitch_words=("deep", "light"),
        speed_words=("slow", "fast"),
        phrases=(
            "a {} engine running",
            "{} puttering of a motor",
            "a motor idling with a {} rattle",
        ),
    ),
    Sound(
        "bell",
        "ringing bell",
        _bell,
        pitch=(350, 1100),
        speed=(0.8, 2),
        pitch_words=("deep", "bright"),
        speed_words=("slow", "fast"),
        phrases=(
            "a {} ringing bell",
            "{} strikes of a church bell",
            "a {} bell tolling",
        ),
    ),
    Sound(
        "rain",
        "rain",
        _rain,
        pitch=(2000, 4000),
        speed=(150, 2500),
        pitch_words=("", ""),
        speed_words=("light", "heavy"),
        phrases=(
            "{} rain falling",
            "{} rain on a roof",
            "drops of {} rain pattering down",
        ),
    ),
    Sound(
        "wind",
        "wind",
        _wind,
        pitch=(150, 500),
        speed=(0.7, 2),
        pitch_words=("low", "whistling"),
        speed_words=("steady", "gusty"),
        phrases=(
            "{} wind blowing",
            "gusts of {} wind",
            "{} wind howling round a house",
        ),
    ),
    Sound(
        "alarm_beep",
        "beeping alarm",
        _alarm,
        pitch=(1400, 3200),
        speed=(2, 6),
        pitch_words=("low pitched", "high pitched"),
        speed_words=("slow", "fast"),
        phrases=(
            "a {} beeping alarm",
            "{} beeps of an alarm clock",
            "an alarm going off with {} beeps",
        ),
    ),
    Sound(
        "telephone",
        "ringing telephone",
        _telephone,
        pitch=(700, 1600),
        speed=(0.6, 1.2),
        pitch_words=("low pitched", "high pitched"),
        speed_words=("slow", "quick"),
        phrases=(
            "a {} ringing telephone",
            "{} ringing of a phone",
            "a phone ringing with a {} tone",
        ),
    ),
    Sound(
        "footsteps",
        "footsteps",
        _footsteps,
        pitch=(60, 160),
        speed=(1.3, 3.2),
        pitch_words=("heavy", "light"),
        speed_words=("slow", "hurried"),
        phrases=(
            "{} footsteps",
            "{} footsteps on a floor",
            "someone walking with {} steps",
        ),
    ),
)

# ---- Scenes ----------------------------------------------------------------


def _hiss(rng, seconds, rate):
    """Noise of a cheap amplifier."""
    return _noise(rng, seconds, rate, np.ones_like)


def _rumble(rng, seconds, rate):
    """Low noise, as of a building."""
    return _noise(rng, seconds, rate, _lowpass(80))


def _fan(rng, seconds, rate):
    """Noise of air and the hum of the blades."""
    air = _noise(rng, seconds, rate, _lowpass(600))
    blades = np.full(len(air), rng.uniform(80, 160))
    return air + 0.5 * _tone(blades, rate, (1, 0.5, 0.3))


def _crowd(rng, seconds, rate):
    """Voices beyond understanding: bands of noise that come and go."""
    voices = [
        _slow_curve(rng, seconds, rate, 5) ** 2
        * _noise(rng, seconds, rate, _bandpass(centre, 0.3))
        for centre in rng.uniform(200, 2500, size=5)
    ]
    return sum(voices)


def _traffic(rng, seconds, rate):
    """The broad roar of a road that swells slowly."""
    roar = _noise(rng, seconds, rate, _lowpass(350))
    tyres = _noise(rng, seconds, rate, _bandpass(1000, 1))
    return (0.5 + _slow_curve(rng, seconds, rate, 0.7)) * (roar + 0.6 * tyres)


# How each background sounds and what it is called.
BACKGROUNDS = {
    "hiss": (_hiss, ("over soft noise", "with hiss in the background")),
    "rumble": (_rumble, ("over a low rumble", "with rumbling behind it")),
    "fan": (_fan, ("near a fan", "beside an air vent")),
    "crowd": (_crowd, ("in a crowd", "while people talk")),
    "traffic": (_traffic, ("beside a busy road", "with traffic behind it")),
}


@dataclass(frozen=True)
class Domain:
    """Acoustic conditions that clips share; ranges are (lowest, highest).

    Arguments
    ---------
    pitch : tuple of float
        Position in the range of each class, between 0 and 1.
    level : tuple of float
        Loudest tenth of a second in dB relative to full scale; lower where
        a peak would be clipped.
    snr : tuple of float
        Loudest tenth of a second of the sound over that of the background, in
        dB.
    reverb : tuple of float
        Time in seconds in which a reverberation falls by 60 dB.
    bandwidth : tuple of float
        Cutoff of the microphone in Hz.
    backgrounds : tuple of str
        Keys of `BACKGROUNDS`.
    """

    pitch: tuple
    level: tuple
    snr: tuple
    reverb: tuple
    bandwidth: tuple
    backgrounds: tuple


STUDIO = Domain(
    pitch=(0, 0.8),
    level=(-24, -3),
    snr=(15, 40),
    reverb=(0.01, 0.15),
    bandwidth=(7000, 11000),
    backgrounds=("hiss", "rumble"),
)
FIELD = Domain(
    pitch=(0.1, 1),
    level=(-27, -6),
    snr=(8, 25),
    reverb=(0.05, 0.35),
    bandwidth=(4500, 9000),
    backgrounds=("fan", "crowd", "traffic"),
)


@dataclass(frozen=True)
class Scene:
    """What one clip sounds like, apart from chance.

    Arguments
    ---------
    seconds : float
        Length.
    pitch, speed : float
        Positions in the ranges of the class, between 0 and 1.
    level, snr, reverb, bandwidth : float
        As `Domain`.
    background : str
        Key of `BACKGROUNDS`.
    """

    seconds: float
    pitch: float
    speed: float
    level: float
    snr: float
    reverb: float
    bandwidth: float
    background: str


def draw_scene(rng, domain):
    """Draw the conditions of a clip.

    Arguments
    ---------
    rng : numpy.random.Generator
        Source of chance.
    domain : Domain
        Ranges to draw from.

    Returns
    -------
    Scene
    """
    return Scene(
        seconds=rng.uniform(1.2, 4),
        pitch=rng.uniform(*domain.pitch),
        speed=rng.uniform(),
        level=rng.uniform(*domain.level),
        snr=rng.uniform(*domain.snr),
        reverb=rng.uniform(*domain.reverb),
        bandwidth=rng.uniform(*domain.bandwidth),
        background=str(rng.choice(domain.backgrounds)),
    )


def render(rng, sound, scene, rate, channels):
    """Synthesise a clip.

    Arguments
    ---------
    rng : numpy.random.Generator
        Source of chance.
    sound : Sound
        The class.
    scene : Scene
        The conditions.
    rate : int
        Sample rate in Hz.
    channels : int
        1, or 2 for two microphones a little apart.

    Returns
    -------
    array
        (samples, channels), between -1 and 1.
    """
    signal = sound.synthesise(
        rng,
        scene.seconds,
        rate,
        _between(sound.pitch, scene.pitch),
        _between(sound.speed, scene.speed),
    )
    signal = _reverberate(rng, signal, rate, scene.reverb)
    make_background, _ = BACKGROUNDS[scene.background]
    background = make_background(rng, scene.seconds, rate)
    clip = signal / _loudness(signal, rate)
    clip += background / _loudness(background, rate) / _gain(scene.snr)
    clip = _filter(clip, rate, _lowpass(scene.bandwidth))
    clip *= _gain(scene.level) / _loudness(clip, rate)
    if channels == 2:
        # Rolled by a few samples: a path that is some centimetres longer.
        clip = np.stack([clip, 0.8 * np.roll(clip, 3)], axis=1)
    else:
        clip = clip[:, None]
    return clip / max(1, np.abs(clip).max())


def _between(limits, position):
    """The value at a position between 0 and 1 on a logarithmic scale."""
    low, high = limits
    return low * (high / low) ** position


def _gain(decibels):
    """The factor of a level in dB."""
    return 10 ** (decibels / 20)


def _loudness(signal, rate):
    """Root mean square of the loudest tenth of a second."""
    size = min(round(0.1 * rate), len(signal))
    energy = np.concatenate([[0], np.cumsum(signal**2)])
    return np.sqrt((energy[size:] - energy[:-size]).max() / size)


def _reverberate(rng, signal, rate, seconds):
    """Add a diffuse tail that falls by 60 dB in so many seconds."""
    tail = rng.standard_normal(round(seconds * rate))
    tail *= _decay(seconds, rate, seconds / np.log(1000))
    tail /= np.sqrt(np.sum(tail**2))
    size = _fft_size(len(signal) + len(tail))
    spectrum = np.fft.rfft(signal, size) * np.fft.rfft(tail, size)
    return signal + 0.7 * np.fft.irfft(spectrum, size)[: len(signal)]


# ---- Captions --------------------------------------------------------------

OTHER_SOUNDS = (
    "a dog barking",
    "people talking",
    "a woman speaking",
    "a man laughing",
    "a baby crying",
    "children playing",
    "a cat meowing",
    "a crowd applauding",
    "music playing from a radio",
    "a piano playing a slow melody",
    "someone strumming a guitar",
    "a drum beating",
    "waves breaking on a beach",
    "water pouring into a glass",
    "a stream flowing over stones",
    "thunder rolling",
    "a fire crackling",
    "leaves rustling",
    "a door creaking",
    "a door slamming shut",
    "glass breaking",
    "dishes clattering",
    "someone typing on a keyboard",
    "paper being crumpled",
    "a saw cutting wood",
    "a hammer hitting a nail",
    "a drill boring into a wall",
    "a train passing",
    "an airplane flying overhead",
    "a helicopter hovering",
    "a car horn honking",
    "a frog croaking",
    "a rooster crowing",
    "a cow mooing",
    "a horse galloping",
    "insects buzzing",
    "someone coughing",
    "someone snoring",
)
TEMPLATES = (
    "{}",
    "{}",
    "{}",
    "the sound of {}",
    "this is {}",
    "{} can be heard",
)


def describe(rng, sound, scene):
    """Say what a clip sounds like, in one of many ways.

    Arguments
    ---------
    rng : numpy.random.Generator
        Source of chance.
    sound : Sound
        The class.
    scene : Scene
        The conditions; what is said of them is true, but not all is said.

    Returns
    -------
    str
    """
    adjectives = [
        _word(scene.speed, (1 / 3, 2 / 3), sound.speed_words),
        _word(scene.pitch, (1 / 3, 2 / 3), sound.pitch_words),
    ]
    # Few people mention everything.
    said = [word for word in adjectives if rng.uniform() < 0.5]
    loudness = _word(scene.level, (-22, -10), ("quiet", "loud"))
    said = [loudness, *said] if rng.uniform() < 0.3 else said
    phrase = str(rng.choice(sound.phrases)).format(" ".join(said))
    return _sentence(rng, phrase, scene)


def _word(value, limits, words):
    """The first word below the limits, the second above, none between."""
    below, above = limits
    return words[0] if value < below else words[1] if value > above else ""


def _sentence(rng, phrase, scene):
    """Put a phrase into a template, perhaps with the background."""
    if rng.uniform() < 0.3:
        _, names = BACKGROUNDS[scene.background]
        phrase += f" {rng.choice(names)}"
    caption = str(rng.choice(TEMPLATES)).format(phrase)
    caption = " ".join(caption.split())
    return re.sub(r"\ba (?=[aeiou])", "an ", caption)


def make_corpus(rng, size):
    """Captions without audio, two thirds about sounds of `SOUNDS`.

    Arguments
    ---------
    rng : numpy.random.Generator
        Source of chance.
    size : int
        Number of captions, all of them different.

    Returns
    -------
    list of str
    """
    corpus = {}
    while len(corpus) < size:
        scene = draw_scene(rng, STUDIO if rng.uniform() < 0.5 else FIELD)
        if rng.uniform() < 2 / 3:
            sound = SOUNDS[rng.integers(len(SOUNDS))]
            corpus[describe(rng, sound, scene)] = None
        else:
            phrase = str(rng.choice(OTHER_SOUNDS))
            corpus[_sentence(rng, phrase, scene)] = None
    return list(corpus)


# ---- Files -----------------------------------------------------------------
# Every clip and list has a random stream of its own, (seed, part, number), so
# that the number of clips of a part changes no other part.
PAIRS, TARGET, UNLABELLED, CORPUS = range(4)


def make_synthetic(
    folder, seed=1, clips_per_class=20, target_per_class=20, unlabelled=0
):
    """Make the data set, unless it is there already.

    Arguments
    ---------
    folder : str
        Folder to make. It appears when it is complete.
    seed : int
        Seed of everything.
    clips_per_class : int
        Clips with captions of each class.
    target_per_class : int
        Clips of each class to classify.
    unlabelled : int
        Clips without captions, of all classes together; if 0, there is no
        corpus of captions either.

    Raises
    ------
    ValueError
        A number of clips is too small.
    FileExistsError
        The folder holds something else, or was made with other settings.
    """
    if min(clips_per_class, target_per_class) < 1 or unlabelled < 0:
        raise ValueError(
            "Give at least 1 as --clips_per_class and --target_per_class, and "
            "0 or more as --unlabelled"
        )
    settings = {
        "version": GENERATOR_VERSION,
        "seed": seed,
        "clips_per_class": clips_per_class,
        "target_per_class": target_per_class,
        "unlabelled": unlabelled,
    }
    if os.path.exists(folder):
        _check_settings(folder, settings)
        return
    partial = f"{os.path.normpath(folder)}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    captions = _write_pairs(partial, seed, clips_per_class)
    _write_target(partial, seed, target_per_class)
    corpus = make_corpus(_stream(seed, CORPUS), CORPUS_SIZE)
    if unlabelled:
        _write_unlabelled(partial, seed, unlabelled)
        _write_table(partial, "captions.csv", {"caption": corpus})
    names = [f"{TEXT_PROMPT} {sound.text}" for sound in SOUNDS]
    make_text_model(
        captions + corpus + names, os.path.join(partial, "text_model")
    )
    with open(
        os.path.join(partial, SETTINGS_FILE), "w", encoding="utf-8"
    ) as file:
        json.dump(settings, file, indent=2)
    os.rename(partial, folder)


def _check_settings(folder, settings):
    """Raise unless a folder was made with these settings."""
    path = os.path.join(folder, SETTINGS_FILE)
    if not os.path.isfile(path):
        raise FileExistsError(
            f"{folder} exists and was not made by this command: give another "
            "folder, or delete it"
        )
    with open(path, encoding="utf-8") as file:
        earlier = json.load(file)
    if earlier != settings:
        raise FileExistsError(
            f"{folder} was made with other settings, {earlier} instead of "
            f"{settings}: delete it to make it anew"
        )


def _stream(seed, part, number=0):
    """The random stream of a clip or list."""
    return np.random.default_rng((seed, part, number))


def _write_clip(rng, sound, scene, number, stem):
    """Render the clip with a number in its part; its path gets a suffix."""
    suffix, rate, channels = FORMATS[number % len(FORMATS)]
    path = f"{stem}.{suffix}"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    clip = render(rng, sound, scene, rate, channels)
    soundfile.write(path, clip, rate, subtype="PCM_16")
    return path


def _write_table(folder, name, columns):
    """Write a CSV of columns, making its folder."""
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    pd.DataFrame(columns).to_csv(path, index=False, lineterminator="\n")


def _write_pairs(folder, seed, clips_per_class):
    """Write the clips with captions and return the captions."""
    folder = os.path.join(folder, "pairs")
    rows = []
    for index, sound in enumerate(SOUNDS):
        for i in range(clips_per_class):
            rng = _stream(seed, PAIRS, i * len(SOUNDS) + index)
            scene = draw_scene(rng, STUDIO)
            captions = dict.fromkeys(
                describe(rng, sound, scene) for _ in range(rng.integers(1, 4))
            )
            stem = os.path.join(folder, "audio", f"{sound.label}_{i:03d}")
            path = _write_clip(rng, sound, scene, i, stem)
            rows.append((os.path.relpath(path, folder), "\n".join(captions)))
    path = os.path.join(folder, "synthetic_index.tsv")
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(rows)
    return [caption for _, captions in rows for caption in captions.split("\n")]


def _write_target(folder, seed, target_per_class):
    """Write the clips to classify in ESC-50's layout."""
    folder = os.path.join(folder, "target")
    rows = []
    for index, sound in enumerate(SOUNDS):
        for i in range(target_per_class):
            number = i * len(SOUNDS) + index
            rng = _stream(seed, TARGET, number)
            fold = i % FOLDS + 1
            stem = f"{fold}-{number}-A-{index}"
            path = _write_clip(
                rng,
                sound,
                draw_scene(rng, FIELD),
                i,
                os.path.join(folder, "audio", stem),
            )
            rows.append(
                {
                    "filename": os.path.basename(path),
                    "fold": fold,
                    "target": index,
                    "category": sound.label,
                    "esc10": False,
                    "src_file": number,
                    "take": "A",
                }
            )
    _write_table(folder, os.path.join("meta", "esc50.csv"), rows)
    labels = [{"label": s.label, "text": s.text} for s in SOUNDS]
    _write_table(folder, "labels.csv", labels)


def _write_unlabelled(folder, seed, count):
    """Write clips whose names and order tell nothing of their classes."""
    paths = []
    for i in range(count):
        rng = _stream(seed, UNLABELLED, i)
        sound = SOUNDS[rng.integers(len(SOUNDS))]
        stem = os.path.join(folder, "unlabelled", f"{i:05d}")
        path = _write_clip(rng, sound, draw_scene(rng, FIELD), i, stem)
        paths.append(os.path.relpath(path, folder))
    list_path = os.path.join(folder, "unlabelled.txt")
    with open(list_path, "w", encoding="utf-8") as file:
        file.writelines(f"{path}\n" for path in paths)


def main(argv):
    """Make the data set as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m dataset.synthetic",
        description="Make synthetic sounds with captions.",
    )
    parser.add_argument("output_folder")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--clips_per_class",
        type=int,
        default=20,
        help="clips with captions of each class",
    )
    parser.add_argument(
        "--target_per_class",
        type=int,
        default=20,
        help="clips of each class to classify",
    )
    parser.add_argument(
        "--unlabelled", type=int, default=0, help="clips without captions"
    )
    args = parser.parse_args(argv)
    make_synthetic(
        args.output_folder,
        args.seed,
        args.clips_per_class,
        args.target_per_class,
        args.unlabelled,
    )
    print(f"Synthetic sounds in {args.output_folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
