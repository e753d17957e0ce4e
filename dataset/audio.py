"""The one audio loader: windows of any audio file, read with seek.

A window is decoded from just before its first sample to just after its last
one, never from the whole file, and resampled with a margin so that its
samples are those of the whole file resampled and cut, to the last bit or two
of the rounding.
"""

import errno
import fractions
import functools
import math
import os

import numpy as np
import soundfile
import torch
import torchaudio

# Every format that libsndfile decodes, by the file endings in use.
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus", ".aiff", ".aif")

# What downloads of videos are often left in.
UNREAD_SUFFIXES = (".m4a", ".mp4", ".aac", ".webm", ".mkv", ".wma")

# Resampling between rates of a ratio of large numbers takes a kernel of about
# their product of values. Every common pair of rates is far below this one.
LARGEST_KERNEL = 2**24
# Other rates are taken for the nearest ratio with a kernel of this size, whose
# seconds of work and hundreds of MB the larger one would cost in each process.
# It is off by less than a thousandth, and 11024:44100, taken for 1:4, by a
# ten thousandth.
NEAREST_KERNEL = 2**20
# Integers of 32 bits that someone stored as floats are still taken. Beyond,
# spectrograms overflow.
LOUDEST = 2.0**31
# Frames before those wanted that an MP3 decoder needs after a seek: its blocks
# of 1152 borrow bits from several earlier ones, and overlap.
_MP3_BEFORE = 16 * 1152
# libsndfile's SF_COUNT_MAX: so many frames has what does not tell its length.
_ENDLESS = 2**63 - 1


# What is said of a file that is not there.
MISSING = "is missing"


class AudioError(Exception):
    """An audio file that cannot be used; the message is the reason."""


def open_audio(path):
    """Open an audio file, or say why it cannot be used.

    Arguments
    ---------
    path : str
        A file in any format that libsndfile reads.

    Returns
    -------
    soundfile.SoundFile

    Raises
    ------
    AudioError
        The file is missing, is not audio, holds no samples, or does not tell
        its length.
    OSError
        The process has too many files open, or too little memory.
    """
    try:
        file = soundfile.SoundFile(path)
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        raise AudioError(_why_not_opened(str(path), error)) from error
    if file.frames <= 0:
        file.close()
        raise AudioError("holds no samples")
    if file.frames == _ENDLESS:
        file.close()
        raise AudioError(
            "does not tell its length, like FLAC that was written to a pipe: "
            "write it to a file anew"
        )
    return file


def _why_not_opened(path, error):
    """The reason that libsndfile's error stands for, where it is known."""
    try:
        open(path, "rb").close()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return MISSING
    except IsADirectoryError:
        return "is a folder"
    except OSError as reason:
        # That is no fault of the file's.
        if reason.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        return f"cannot be opened: {reason.strerror}"
    if path.lower().endswith(UNREAD_SUFFIXES):
        return (
            "is in a format that is not read: convert it to one of "
            f"{' '.join(AUDIO_SUFFIXES)}"
        )
    if os.path.getsize(path) == 0:
        return "is empty: 0 bytes"
    return f"cannot be opened: {error}"


def probe_seconds(path):
    """Length of an audio file in seconds, from its header.

    Raises
    ------
    AudioError
        As `open_audio`.
    """
    with open_audio(path) as file:
        return file.frames / file.samplerate


def nearest_ratio(orig_rate, sample_rate):
    """The ratio in which a file is resampled, in small enough numbers.

    Returns
    -------
    tuple
        So many frames of the file make so many samples. Exact if its kernel
        is not over `LARGEST_KERNEL`.
    """
    ratio = fractions.Fraction(orig_rate, sample_rate)
    if ratio.numerator * ratio.denominator > LARGEST_KERNEL:
        # About denominator**2 * ratio is the size of the kernel.
        ratio = ratio.limit_denominator(math.isqrt(int(NEAREST_KERNEL / ratio)))
    return ratio.numerator, ratio.denominator


class Resampler:
    """torchaudio's resampling, without the zeros of its kernel.

    A sample is a sum over the dozen or so frames around it, but torchaudio
    convolves with a row of a whole period for each sample of one: hundreds of
    weights, all others zero. Here some successive samples share a product of
    matrices, with the frames that these need. Sums have the same terms.

    Source: J. O. Smith, "Digital Audio Resampling", and the kernel of
    `torchaudio.transforms.Resample`.

    Arguments
    ---------
    orig, new : int
        The period: so many frames make so many samples.
    """

    def __init__(self, orig, new):
        transform = torchaudio.transforms.Resample(orig, new)
        kernel, self.width = transform.kernel[:, 0], transform.width
        support = int((kernel != 0).sum(dim=1).max())
        # Periods in one, so that parts of it need fewer frames than it has;
        # but not where a file of a few frames a second makes thousands of each.
        count = -(-4 * support // orig)
        count = max(min(count, LARGEST_KERNEL // (4 * kernel.numel())), 1)
        self.orig, self.new = count * orig, count * new
        rows = [
            torch.nn.functional.pad(kernel, (i * orig, (count - 1 - i) * orig))
            for i in range(count)
        ]
        kernel, self.parts = torch.cat(rows), []
        # Parts that need about half as many frames again as they advance.
        num_parts = max(min(self.orig // (2 * support), self.new), 1)
        begin = 0
        for part in kernel.tensor_split(num_parts):
            used = torch.nonzero((part != 0).any(dim=0))[:, 0]
            first, last = used[0].item(), used[-1].item()
            weights = part[:, first : last + 1].T.contiguous()
            self.parts.append((begin, first, weights))
            begin += len(part)

    def margins(self, num_frames):
        """Zeros that are wanted before and behind so many frames."""
        count = num_frames // self.orig + 1
        return self.width, count * self.orig - num_frames + self.width

    def __call__(self, frames):
        """Resample.

        Arguments
        ---------
        frames : torch.Tensor
            (frames,) float32, with the margins.

        Returns
        -------
        torch.Tensor
            (samples,) float32; the last ones may be of the margin.
        """
        count = (len(frames) - 2 * self.width) // self.orig
        samples = frames.new_empty(count, self.new)
        for begin, first, weights in self.parts:
            needed, made = weights.shape
            rows = frames.as_strided((count, needed), (self.orig, 1), first)
            torch.mm(rows, weights, out=samples[:, begin : begin + made])
        return samples.view(-1)


@functools.lru_cache(maxsize=32)
def _resampler(orig, new):
    """A resampler, made once, and the periods that half of its filter spans."""
    resampler = Resampler(orig, new)
    return resampler, -(-resampler.width // orig)


def _read(file, begin, end, resample=None):
    """Frames begin..end of an open file as float32 mono, and their number.

    With the margins that a `Resampler` wants, if there is one.
    """
    # libsndfile takes several times as long to make the same floats.
    is_16_bit = file.subtype == "PCM_16"
    dtype = "int16" if is_16_bit else "float32"
    before = min(_MP3_BEFORE, begin) if file.format == "MP3" else 0
    try:
        if file.seekable():
            file.seek(begin - before)
        else:  # as telephones' codecs
            file = open_audio(file.name)
            file.read(begin - before, dtype=dtype)
        frames = file.read(end - begin + before, dtype=dtype, always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise AudioError(f"cannot be decoded: {error}") from error
    frames = frames[before:]
    front, behind = resample.margins(len(frames)) if resample else (0, 0)
    padded = np.empty(front + len(frames) + behind, np.float32)
    padded[:front] = padded[front + len(frames) :] = 0
    mono = padded[front : front + len(frames)]
    scale = np.float32(2**-15 if is_16_bit else 1)
    # numpy's mean over so few is slow.
    first, *others = frames.T
    np.multiply(first, scale, out=mono)
    for other in others:
        mono += other * scale
    if others:
        mono /= np.float32(file.channels)
    return torch.from_numpy(padded), len(frames)


def read_samples(file, sample_rate, begin, end):
    """Samples begin..end of an open file at another rate.

    Arguments
    ---------
    file : soundfile.SoundFile
        As `open_audio` returns it.
    sample_rate : int
        Rate of the result in Hz.
    begin, end : int
        First sample and the one after the last, counted at `sample_rate`.

    Returns
    -------
    torch.Tensor
        Mean of the channels, float32, (end - begin,); shorter where the file
        ends earlier. The same samples as those of the whole file resampled.

    Raises
    ------
    AudioError
        Nothing could be decoded there, or it holds values that no audio has.
    """
    orig, new = nearest_ratio(file.samplerate, sample_rate)
    if orig == new:
        samples, _ = _read(file, begin, min(end, file.frames))
    else:
        resample, margin = _resampler(orig, new)
        first = max(begin // new - margin, 0)
        last = -(-end // new) + margin
        last = min(last * orig, file.frames)
        frames, count = _read(file, first * orig, last, resample)
        end = min(end - first * new, -(-new * count // orig))
        samples = resample(frames)[begin - first * new : end]
    if not len(samples):
        raise AudioError("is truncated: no samples where its header has some")
    # In one pass; of NaN, no comparison holds.
    low, high = (value.item() for value in torch.aminmax(samples))
    if not (low >= -LOUDEST and high <= LOUDEST):
        finite = math.isfinite(low) and math.isfinite(high)
        over = f"samples over {LOUDEST:g}: not audio"
        raise AudioError(
            f"holds {over if finite else 'NaN or infinite samples'}"
        )
    return samples


class AudioReader:
    """Reads windows of a fixed length, mono, at a fixed rate.

    Arguments
    ---------
    sample_rate : int
        Rate of the windows in Hz.
    duration : float
        Length of the windows in seconds.
    short : str
        What fills the window of a shorter file: "repeat" plays it again,
        "zero" adds silence behind it.

    Raises
    ------
    ValueError
        `short` is neither.
    """

    def __init__(self, sample_rate, duration, short="repeat"):
        if short not in ("repeat", "zero"):
            raise ValueError(f"short is '{short}': give 'repeat' or 'zero'")
        self.sample_rate = int(sample_rate)
        self.num_samples = round(duration * sample_rate)
        self.short = short

    def crop(self, path, fraction=0.5, start=None, end=None):
        """One window of a file, or of a part of it.

        Arguments
        ---------
        path : str
            The audio file.
        fraction : float
            Where in a longer file: 0 is its first window, 1 its last one,
            0.5 the centre. Uniform random fractions give random crops.
        start : float
            Start of the part in seconds, which without `end` is one window
            long; past the last window of the file, that one.
        end : float
            Where the part ends, in seconds. A shorter one than a window is
            read alone, and fills the window as a short file does.

        Returns
        -------
        tuple
            The window, (num_samples,) float32, and where it starts in the
            file, in seconds.

        Raises
        ------
        AudioError
            The file cannot be read there.
        """
        with open_audio(path) as file:
            length, size = self._length(file), self.num_samples
            if start is not None and end is not None:
                end_of_part = min(end, length / self.sample_rate)
                part = round((end_of_part - start) * self.sample_rate)
                # Times may be rounded to milliseconds.
                if 0 < part < size - self.sample_rate // 500:
                    size = part
            first, last = 0, max(length - size, 0)
            if start is not None:
                first = min(max(round(start * self.sample_rate), 0), last)
                end = start if end is None else end
                last_of_part = round(end * self.sample_rate) - size
                last = min(max(last_of_part, first), last)
            begin = min(first + int(fraction * (last - first + 1)), last)
            return self._window(file, begin, size), begin / self.sample_rate

    def starts(self, path):
        """Where the consecutive windows that cover a file start, in seconds.

        Raises
        ------
        AudioError
            As `open_audio`.
        """
        with open_audio(path) as file:
            return [begin / self.sample_rate for begin in self._begins(file)]

    def windows(self, path):
        """Consecutive windows that cover a whole file.

        The last window of a file that is not a whole number of windows long
        ends with the file, and so overlaps the one before it.

        Arguments
        ---------
        path : str
            The audio file.

        Returns
        -------
        torch.Tensor
            (windows, num_samples) float32.

        Raises
        ------
        AudioError
            The file cannot be read.
        """
        with open_audio(path) as file:
            begins = self._begins(file)
            return torch.stack(
                [
                    self._window(file, begin, self.num_samples)
                    for begin in begins
                ]
            )

    def _length(self, file):
        """Length of an open file in samples at the reader's rate."""
        orig, new = nearest_ratio(file.samplerate, self.sample_rate)
        return math.ceil(file.frames * new / orig)

    def _begins(self, file):
        """First samples of the windows that cover an open file."""
        spare = max(self._length(file) - self.num_samples, 0)
        count = -(-spare // self.num_samples) + 1
        return [min(i * self.num_samples, spare) for i in range(count)]

    def _window(self, file, begin, size):
        """So many samples of an open file from `begin` on, made a window."""
        samples = read_samples(file, self.sample_rate, begin, begin + size)
        missing = self.num_samples - len(samples)
        if missing == 0:
            return samples
        if self.short == "zero":
            return torch.nn.functional.pad(samples, (0, missing))
        return samples.repeat(-(-self.num_samples // len(samples)))[
            : self.num_samples
        ]
