"""3x3 convolutions on a CPU by Winograd's method, or a product of matrices.

A direct convolution takes 144 products for a tile of 4x4 outputs and a pair of
channels. This takes 36, as products of matrices, between a transform of the
inputs and one of the sums, which are compiled by Numba. PyTorch chooses such
methods on a GPU, but not on a CPU.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
arXiv 1509.09308, section 4: Y = A' [(G g G') * (B' d B)] A.
"""

import functools
import math
import typing

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from compiled import njit

# Transformed inputs that each thread works on at once.
PART_VALUES = 800_000
# Channels of a tile that are transformed at once: the first cache holds them.
_CHUNK = 64


class Axis(typing.NamedTuple):
    """The method along one axis of a tile.

    Arguments
    ---------
    inputs, weights, outputs : tuple of tuple of float
        B', G and A', by rows.
    margin : int
        By how many inputs a tile exceeds its outputs, at either end.
    """

    inputs: tuple
    weights: tuple
    outputs: tuple
    margin: int

    @property
    def size(self):
        """Outputs of a tile."""
        return len(self.outputs)

    @property
    def gradients(self):
        """A, which takes gradients of outputs to those of sums."""
        return tuple(zip(*self.outputs))


FOURS = Axis(
    inputs=(
        (4, 0, -5, 0, 1, 0),
        (0, -4, -4, 1, 1, 0),
        (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 2, -1, -2, 1, 0),
        (0, 4, 0, -5, 0, 1),
    ),
    weights=(
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
    outputs=(
        (1, 1, 1, 1, 1, 0),
        (0, 1, -1, 2, -2, 0),
        (0, 1, 1, 4, 4, 0),
        (0, 1, -1, 8, -8, 1),
    ),
    margin=1,
)
# An axis that is two long and has zeros beyond: its outputs, w1 x0 + w2 x1 and
# w0 x0 + w1 x1, share w1 (x0 + x1).
WHOLE = Axis(
    inputs=((1, 1), (0, 1), (1, 0)),
    weights=((0, 1, 0), (0, -1, 1), (1, -1, 0)),
    outputs=((1, 1, 0), (1, 0, 1)),
    margin=0,
)


class Layout(typing.NamedTuple):
    """Where values of tiles lie in a flat array of images, or of planes.

    A plane holds one value of each tile.

    Arguments
    ---------
    image, tile, y, x : int
        Distance to the next one of each; the channels are neighbours.
    height, width : int
        What is beyond is zero, and is not written.
    step_y, step_x : int
        Distance of tiles in pixels.
    margin_y, margin_x : int
        By how many pixels tiles begin before.
    """

    image: int
    tile: int
    y: int
    x: int
    height: int
    width: int
    step_y: int = 0
    step_x: int = 0
    margin_y: int = 0
    margin_x: int = 0


@functools.cache
def compiled(by_rows, by_columns):
    """The transform of tiles by a matrix along each axis, M t N'.

    Arguments
    ---------
    by_rows, by_columns : tuple of tuple of float
        M and N. In the compiled code they are constants, and products with 0
        and 1 vanish.

    Returns
    -------
    callable
        (source, its Layout, target, its Layout, first, count, rows, columns,
        channels) for rows of tiles `first` to `first + count`, of which an
        image has `rows`, each of `columns` tiles. Source and target are flat
        arrays of float32.
    """
    left, right = (np.array(m, np.float32) for m in (by_rows, by_columns))
    (p, m), (q, n) = left.shape, right.shape

    # Without liberties in the arithmetic (fastmath): which of a loop's versions
    # runs depends on where buffers are, and all must give the same.
    @njit(nogil=True, parallel=True)
    def transform(
        source, at, target, to, first, count, rows, columns, channels
    ):
        for row in numba.prange(count):
            image, down = divmod(first + row, rows)
            tile = np.zeros((m, n, _CHUNK), np.float32)
            middle = np.zeros((p, n, _CHUNK), np.float32)
            result = np.zeros((p, q, _CHUNK), np.float32)
            for across in range(columns):
                for channel in range(0, channels, _CHUNK):
                    # Unsigned, or else an index might count from the end, and
                    # the loops over channels would not be vectorised.
                    size = np.uint64(min(_CHUNK, channels - channel))
                    begin = image * at.image + channel
                    begin += (row * columns + across) * at.tile
                    for i in range(m):
                        y = down * at.step_y - at.margin_y + i
                        for j in range(n):
                            x = across * at.step_x - at.margin_x + j
                            if 0 <= y < at.height and 0 <= x < at.width:
                                place = np.uint64(begin + y * at.y + x * at.x)
                                for c in range(size):
                                    tile[i, j, c] = source[place + c]
                            else:
                                for c in range(size):
                                    tile[i, j, c] = 0
                    for j in range(n):
                        for c in range(size):
                            for i in range(p):
                                total = np.float32(0)
                                for k in range(m):
                                    if left[i, k] != 0:
                                        total += left[i, k] * tile[k, j, c]
                                middle[i, j, c] = total
                    for i in range(p):
                        for c in range(size):
                            for j in range(q):
                                total = np.float32(0)
                                for k in range(n):
                                    if right[j, k] != 0:
                                        total += right[j, k] * middle[i, k, c]
                                result[i, j, c] = total
                    begin = image * to.image + channel
                    begin += (row * columns + across) * to.tile
                    for i in range(p):
                        y = down * to.step_y + i
                        for j in range(q):
                            x = across * to.step_x + j
                            if y < to.height and x < to.width:
                                place = np.uint64(begin + y * to.y + x * to.x)
                                for c in range(size):
                                    target[place + c] = result[i, j, c]

    return transform


class Tiling:
    """Images in tiles, and the transforms of these.

    Arguments
    ---------
    x : torch.Tensor
        (batch, channels, height, width), images of the size in question.
    """

    def __init__(self, x):
        self.batch, _, self.height, self.width = x.shape
        # What tiles have beyond the image's edge is computed for nothing.
        self.axes = FOURS, FOURS if self.width > 2 else WHOLE
        self.rows, self.columns = (
            -(-length // axis.size)
            for length, axis in zip(x.shape[2:], self.axes)
        )
        self.weights = torch.kron(
            *(
                torch.tensor(axis.weights, dtype=torch.float32)
                for axis in self.axes
            )
        )

    @property
    def num_planes(self):
        """Values of a transformed tile."""
        return len(self.weights)

    def parts(self, in_channels, out_channels):
        """Rows of tiles of all images to be worked on at once, as ranges."""
        values = PART_VALUES * torch.get_num_threads()
        tiles = values // (self.num_planes * in_channels)
        # No fewer tiles than channels: reading the weights again for each part
        # would take longer than the products.
        rows = max(1, max(tiles, out_channels) // self.columns)
        count = self.batch * self.rows
        for first in range(0, count, rows):
            yield range(first, min(first + rows, count))

    def planes_of(self, images, part, matrices):
        """Tiles of images, transformed.

        Arguments
        ---------
        images : torch.Tensor
            (batch, height, width, channels), float32.
        part : range
            One of `parts`.
        matrices : str
            "inputs" or "gradients", of `Axis`.

        Returns
        -------
        torch.Tensor
            (values of a tile, tiles, channels).
        """
        channels = images.shape[3]
        planes = torch.empty(
            self.num_planes, len(part) * self.columns, channels
        )
        margins = [
            axis.margin if matrices == "inputs" else 0 for axis in self.axes
        ]
        self._transform(
            [getattr(axis, matrices) for axis in self.axes],
            (images, self._layout_of_images(channels, margins)),
            (planes, self._layout_of_planes(planes)),
            part,
        )
        return planes

    def write(self, planes, images, part):
        """Transform sums to outputs.

        Arguments
        ---------
        planes : torch.Tensor
            (values of a tile, tiles, channels), float32.
        images : torch.Tensor
            (batch, height, width, channels), float32, to be filled in part.
        part : range
            One of `parts`.
        """
        self._transform(
            [axis.outputs for axis in self.axes],
            (planes, self._layout_of_planes(planes)),
            (images, self._layout_of_images(planes.shape[2], (0, 0))),
            part,
        )

    def _layout_of_images(self, channels, margins):
        row = self.width * channels
        size = self.height, self.width
        steps = (axis.size for axis in self.axes)
        return Layout(
            self.height * row, 0, row, channels, *size, *steps, *margins
        )

    def _layout_of_planes(self, planes):
        plane, channels = planes.stride()[:2]
        size = [len(axis.weights) for axis in self.axes]
        return Layout(0, channels, size[1] * plane, plane, *size)

    def _transform(self, matrices, source, target, part):
        (source, at), (target, to) = source, target
        threads = torch.get_num_threads()
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        # Where both have OpenMP's threads, Numba has set their number for
        # PyTorch, too, when it began.
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        compiled(*matrices)(
            *(source.detach().view(-1).numpy(), at),
            *(target.view(-1).numpy(), to),
            *(part.start, len(part), self.rows, self.columns),
            source.shape[-1],
        )


def transformed(weight, tiling, flipped=False):
    """Weights as `convolve` takes them.

    Arguments
    ---------
    weight : torch.Tensor
        (out_channels, in_channels, 3, 3).
    tiling : Tiling
    flipped : bool
        Backwards along both axes.

    Returns
    -------
    torch.Tensor
        (values of a tile, out_channels, in_channels), float32.
    """
    matrix = tiling.weights.flip(1) if flipped else tiling.weights
    return (matrix @ weight.float().reshape(-1, 9).T).view(
        -1, *weight.shape[:2]
    )


def convolve(images, weights, tiling):
    """A 3x3 convolution with padding 1.

    Arguments
    ---------
    images : torch.Tensor
        (batch, height, width, in_channels), as `pixels` returns them.
    weights : torch.Tensor
        (values of a tile, in_channels, out_channels), float32.
    tiling : Tiling
        Of these images.

    Returns
    -------
    torch.Tensor
        (batch, out_channels, height, width), float32, channels last in memory.
    """
    y = torch.empty(*images.shape[:3], weights.shape[2])
    for part in tiling.parts(*weights.shape[1:]):
        planes = tiling.planes_of(images, part, "inputs")
        tiling.write(torch.bmm(planes, weights), y, part)
    return y.permute(0, 3, 1, 2)


def pixels(x):
    """Images (batch, height, width, channels), float32 and contiguous."""
    return x.permute(0, 2, 3, 1).float().contiguous()


class WinogradConvolution(torch.autograd.Function):
    """A 3x3 convolution with padding 1 and its gradients.

    It computes in fp32 also in half precision, which would not bear the
    transforms, of what images and weights there are.
    """

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(ctx, x, weight, dtype):
        """The convolution.

        Arguments
        ---------
        x : torch.Tensor
            (batch, in_channels, height, width).
        weight : torch.Tensor
            (out_channels, in_channels, 3, 3).
        dtype : torch.dtype
            Of the result.

        Returns
        -------
        torch.Tensor
            (batch, out_channels, height, width).
        """
        ctx.save_for_backward(x, weight)
        tiling = Tiling(x)
        weights = transformed(weight, tiling).transpose(1, 2)
        return convolve(pixels(x), weights, tiling).to(dtype)

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, gradient):
        """Gradients of the images and of the weights."""
        x, weight = ctx.saved_tensors
        tiling, gradients = Tiling(x), pixels(gradient)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            weights = transformed(weight, tiling, flipped=True)
            of_x = convolve(gradients, weights, tiling).to(x.dtype)
        if ctx.needs_input_grad[1]:
            sums = torch.empty(tiling.num_planes, *weight.shape[:2])
            images, parts = pixels(x), tiling.parts(x.shape[1], len(weight))
            for i, part in enumerate(parts):
                planes = tiling.planes_of(images, part, "inputs")
                of_sums = tiling.planes_of(gradients, part, "gradients")
                sums.baddbmm_(of_sums.transpose(1, 2), planes, beta=i > 0)
            # Its transpose, by rows of planes, would take twice as long.
            of_weight = tiling.weights.T @ sums.flatten(1)
            of_weight = of_weight.T.reshape(weight.shape).to(weight.dtype)
        return of_x, of_weight, None


def has_bf16_vectors():
    """Whether the processor has instructions for bf16, but none for tiles."""
    return (
        torch.cpu._is_avx512_bf16_supported()
        and not torch.cpu._is_amx_tile_supported()
    )


def two_wide(x, weight):
    """A 3x3 convolution with padding 1 of images that are two wide.

    Both outputs of a row see all six pixels of three rows, through two of the
    kernel's three columns each. That is one product of matrices; a direct
    convolution also multiplies the third column, with the zeros of the padding.

    Arguments
    ---------
    x : torch.Tensor
        (batch, in_channels, height, 2).
    weight : torch.Tensor
        (out_channels, in_channels, 3, 3), as precise as the images.

    Returns
    -------
    torch.Tensor
        (batch, out_channels, height, 2), channels last in memory.
    """
    rows = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, 0, 1, 1)).flatten(2)
    threes = rows.unfold(1, 3, 1).transpose(2, 3).flatten(2)
    # In place they overlap, which a product takes ten times as long for.
    threes = threes.contiguous()
    kernels = weight.permute(0, 2, 3, 1).contiguous()
    kernels = torch.stack([kernels[:, :, 1:], kernels[:, :, :2]])
    y = F.linear(threes, kernels.flatten(2).flatten(0, 1))
    return y.unflatten(2, (2, -1)).permute(0, 3, 1, 2)


def fewest_channels(dtype):
    """Input channels from which Winograd's method is faster than PyTorch's.

    Fewer take longer to transform than they save. In bf16 it is faster where
    the processor has no instructions for that, and of many channels that are
    last in memory where it has them for vectors. Where it has them for tiles of
    matrices, their rate leaves no room for products in fp32 (by their
    specification; not measured).

    Arguments
    ---------
    dtype : torch.dtype
        Of the result.

    Returns
    -------
    float
        Infinity: PyTorch's is always taken.
    """
    if dtype == torch.float32:
        return 64
    if dtype != torch.bfloat16 or torch.cpu._is_amx_tile_supported():
        return math.inf
    return 256 if has_bf16_vectors() else 64


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with padding 1 and no bias, fast on a CPU.

    Arguments
    ---------
    in_channels, out_channels : int
    """

    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, x):
        """As `torch.nn.Conv2d`."""
        # PyTorch's compiler can't look into what Numba compiled.
        if not x.is_cpu or torch.compiler.is_compiling():
            return super().forward(x)
        dtype = x.dtype
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        if dtype == torch.bfloat16 and has_bf16_vectors() and x.shape[3] == 2:
            return two_wide(x.to(dtype), self.weight.to(dtype))
        # Without images there is nothing to sum a gradient from.
        if self.in_channels >= fewest_channels(dtype) and len(x):
            return WinogradConvolution.apply(x, self.weight, dtype)
        return super().forward(x)
