"""3x3 convolutions on a CPU by Winograd's method.

A direct convolution takes 144 products for a tile of 4x4 outputs and a pair of
channels. This takes 36, between a transform of the inputs and one of the sums,
all of them products of matrices. PyTorch chooses such methods on a GPU, but not
on a CPU.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
arXiv 1509.09308, section 4: Y = A [(G g G') * (B d B')] A'.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

# B, G and A by outputs along an axis, which tiles of 2 more inputs make.
INPUTS = {
    2: [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
    4: [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
}
WEIGHTS = {
    2: [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
    4: [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
}
OUTPUTS = {
    2: [[1, 1, 1, 0], [0, 1, -1, -1]],
    4: [
        [1, 1, 1, 1, 1, 0],
        [0, 1, -1, 2, -2, 0],
        [0, 1, 1, 4, 4, 0],
        [0, 1, -1, 8, -8, 1],
    ],
}
# Transformed inputs that a thread works on at once: its cache should hold them.
CACHED_VALUES = 400_000


class Tiling:
    """Images in tiles, and the transforms of these, in fp32 or float64.

    Arguments
    ---------
    x : torch.Tensor
        (batch, channels, height, width), images of the size in question.
    """

    def __init__(self, x):
        self.height, self.width = x.shape[2:]
        # What tiles have beyond the image's edge is computed for nothing.
        self.size = (4, 4 if self.width > 2 else 2)
        self.rows = -(-self.height // self.size[0])
        self.columns = -(-self.width // self.size[1])
        # Half precision would not bear the transforms.
        dtype = torch.promote_types(x.dtype, torch.float32)
        self.inputs, self.weights, self.outputs = (
            torch.kron(
                *(torch.tensor(matrices[n], dtype=dtype) for n in self.size)
            )
            for matrices in (INPUTS, WEIGHTS, OUTPUTS)
        )

    def parts(self, batch, in_channels, out_channels):
        """Slices of the batch and of rows of tiles to be worked on at once."""
        # No fewer tiles than channels: reading the weights again for each part
        # would take longer than the products.
        values = CACHED_VALUES * torch.get_num_threads()
        tiles = values // (len(self.inputs) * in_channels)
        tiles = max(tiles, out_channels)
        images = max(1, tiles // (self.rows * self.columns))
        rows = max(1, tiles // (images * self.columns))
        for image in range(0, batch, images):
            for row in range(0, self.rows, rows):
                yield (
                    slice(image, min(image + images, batch)),
                    slice(row, min(row + rows, self.rows)),
                )

    def tiles(self, x, part, margin):
        """Tiles of images, which overlap by twice their margin.

        Arguments
        ---------
        x : torch.Tensor
            (batch, channels, height, width).
        part : tuple of slice
            One of `parts`.
        margin : int
            1 for a convolution's inputs, 0 for its outputs.

        Returns
        -------
        torch.Tensor
            (tiles, values of a tile, channels).
        """
        images, rows = part
        height, width = self.size
        top, bottom = rows.start * height - margin, rows.stop * height + margin
        x = x[images, :, max(top, 0) : bottom].permute(0, 2, 3, 1)
        x = x.to(self.inputs.dtype)
        right = self.columns * width - self.width + margin
        padding = (
            *(0, 0),
            *(margin, right),
            *(max(-top, 0), max(bottom - self.height, 0)),
        )
        x = F.pad(x, padding)
        tiles = x.unfold(1, height + 2 * margin, height)
        tiles = tiles.unfold(2, width + 2 * margin, width)
        tiles = tiles.permute(0, 1, 2, 4, 5, 3)
        return tiles.reshape(-1, tiles.shape[3] * tiles.shape[4], x.shape[3])


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
        (values of a tile, out_channels, in_channels).
    """
    matrix = tiling.weights.flip(1) if flipped else tiling.weights
    weight = weight.to(matrix.dtype)
    return (matrix @ weight.reshape(-1, 9).T).view(-1, *weight.shape[:2])


def convolve(x, weights, tiling, dtype):
    """A 3x3 convolution with padding 1.

    Arguments
    ---------
    x : torch.Tensor
        (batch, in_channels, height, width).
    weights : torch.Tensor
        (values of a tile, in_channels, out_channels).
    tiling : Tiling
        Of these images.
    dtype : torch.dtype
        Of the result.

    Returns
    -------
    torch.Tensor
        (batch, out_channels, height, width), channels last in memory.
    """
    out_channels = weights.shape[2]
    y = torch.empty(
        len(x), tiling.height, tiling.width, out_channels, dtype=dtype
    )
    height, width = tiling.size
    for part in tiling.parts(len(x), *weights.shape[1:]):
        tiles = torch.matmul(tiling.inputs, tiling.tiles(x, part, margin=1))
        sums = torch.bmm(tiles.transpose(0, 1), weights)
        sums = torch.matmul(tiling.outputs, sums.transpose(0, 1))
        images, rows = part
        down = rows.stop - rows.start
        image = (
            sums.view(-1, down, tiling.columns, height, width, out_channels)
            .transpose(2, 3)
            .reshape(-1, down * height, tiling.columns * width, out_channels)
        )
        y[images, rows.start * height : rows.stop * height] = image[
            :, : tiling.height - rows.start * height, : tiling.width
        ]
    return y.permute(0, 3, 1, 2)


class WinogradConvolution(torch.autograd.Function):
    """A 3x3 convolution with padding 1 and its gradients.

    It computes in fp32 also in half precision, of what images and weights
    there are.
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
        return convolve(x, weights, tiling, dtype)

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, gradient):
        """Gradients of the images and of the weights."""
        x, weight = ctx.saved_tensors
        tiling = Tiling(x)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            weights = transformed(weight, tiling, flipped=True)
            of_x = convolve(gradient, weights, tiling, x.dtype)
        if ctx.needs_input_grad[1]:
            size = len(tiling.inputs), *weight.shape[:2]
            sums = torch.empty(size, dtype=tiling.inputs.dtype)
            parts = tiling.parts(len(x), x.shape[1], len(weight))
            for i, part in enumerate(parts):
                tiles = torch.matmul(tiling.inputs, tiling.tiles(x, part, 1))
                of_sums = torch.matmul(
                    tiling.outputs.T, tiling.tiles(gradient, part, 0)
                )
                sums.baddbmm_(
                    of_sums.permute(1, 2, 0), tiles.transpose(0, 1), beta=i > 0
                )
            of_weight = sums.view(len(sums), -1).T @ tiling.weights
            of_weight = of_weight.view(weight.shape).to(weight.dtype)
        return of_x, of_weight, None


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
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        # Without instructions for bf16, a direct convolution in it takes many
        # times as long. (With them, the two have not been compared.)
        precisions = [torch.float32]
        if not torch.cpu._is_avx512_bf16_supported():
            precisions.append(torch.bfloat16)
        # Fewer channels would take longer to transform than they save. Without
        # images there is nothing to sum a gradient from.
        pays = dtype in precisions and self.in_channels >= 64
        if x.is_cpu and pays and len(x):
            return WinogradConvolution.apply(x, self.weight, dtype)
        return super().forward(x)
