"""Convolutional networks to put gates into: ResNets, for large pictures and small ones, and MobileNetV2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nearfield.nn.convolution import convolve
from nearfield.nn.pyramid import Pyramid, Stage
from nearfield.nn.residual import DropPath, drop_path_rates
from nearfield.systems.ela.layer import gate_maker

Gate = str | Callable[[int], nn.Module]


class Stem(nn.Module):
    """A convolution and its norm, an activation, and by `pool` the larger of 3 x 3 places at every second."""

    def __init__(
        self, dim_in: int, dim: int, kernel_size: int, stride: int, activation: nn.Module, pool: bool
    ):
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim, kernel_size, stride, kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(dim)
        self.act = activation
        self.pool = nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y2 x2 out"]:
        return convolve(lambda x: self.pool(self.act(self.bn(self.conv(x)))), x)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions, or with `wide` above 1 one between two of 1 x 1, and what came in added.

    The gate stands behind the last norm, before the shortcut is added.
    """

    def __init__(
        self,
        dim_in: int,
        dim: int,
        *,
        wide: int = 1,
        stride: int = 1,
        gate: nn.Module,
        drop_path: float = 0.0,
    ):
        super().__init__()
        out = self.dim = dim * wide
        sizes = [(dim_in, dim, 3, stride), (dim, dim, 3, 1)]
        if wide > 1:  # the stride is in the middle, as in torchvision and timm
            sizes = [(dim_in, dim, 1, 1), (dim, dim, 3, stride), (dim, out, 1, 1)]
        self.num_convs = len(sizes)
        for number, (before, after, size, step) in enumerate(sizes, 1):
            self.add_module(f"conv{number}", nn.Conv2d(before, after, size, step, size // 2, bias=False))
            self.add_module(f"bn{number}", nn.BatchNorm2d(after))
        self.gate = gate
        self.drop_path = DropPath(drop_path)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or dim_in != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(dim_in, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y2 x2 out"]:
        return convolve(self._inner, x)

    def _inner(self, x: Float[Tensor, "b dim y x"]) -> Float[Tensor, "b out y2 x2"]:
        y = x
        for number in range(1, self.num_convs + 1):
            y = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(y))
            y = F.relu(y) if number < self.num_convs else y
        return F.relu(self.downsample(x) + self.drop_path(self.gate(y)))


class InvertedBlock(nn.Module):
    """Channels made more, a 3 x 3 convolution of each, the gate on these, channels made fewer (MobileNetV2).

    Where nothing is made more (`expand=1`) there is no first convolution. What came in is added if it has the
    same shape.
    """

    def __init__(
        self,
        dim_in: int,
        dim: int,
        expand: int,
        *,
        stride: int = 1,
        gate: Callable[[int], nn.Module],
        drop_path: float = 0.0,
    ):
        super().__init__()
        hidden = dim_in * expand
        self.adds = stride == 1 and dim_in == dim
        self.conv_pw = nn.Conv2d(dim_in, hidden, 1, bias=False) if expand > 1 else nn.Identity()
        self.bn1 = nn.BatchNorm2d(hidden) if expand > 1 else nn.Identity()
        self.conv_dw = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.gate = gate(hidden)
        self.conv_pwl = nn.Conv2d(hidden, dim, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(dim)
        self.expand = expand
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y2 x2 out"]:
        return convolve(self._inner, x)

    def _inner(self, x: Float[Tensor, "b dim y x"]) -> Float[Tensor, "b out y2 x2"]:
        y = F.relu6(self.bn1(self.conv_pw(x))) if self.expand > 1 else x
        y = self.gate(F.relu6(self.bn2(self.conv_dw(y))))
        y = self.bn3(self.conv_pwl(y))
        return x + self.drop_path(y) if self.adds else y


class ConvNet(Pyramid):
    """Stages of convolutional blocks; convolutions begin as He and others propose."""

    def initialise(self) -> None:
        super().initialise()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def resnet(
    dims: Sequence[int],
    depths: Sequence[int],
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    gate: Gate = "ela-b",
    wide: int = 1,
    small: bool = False,
    drop_path: float = 0.0,
) -> ConvNet:
    """A ResNet with a gate in every block; `gate` is a name in `layer.GATES`, "none" for none.

    `wide` is what the output of a bottleneck block is wider by (4 in ResNet-50), 1 for plain blocks. `small`
    begins without making the map smaller, for pictures of 32 pixels.
    """
    make = gate_maker(gate)
    stages, before = [], dims[0]
    rates = drop_path_rates(drop_path, tuple(depths))
    for number, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        blocks = []
        for place in range(depth):
            stride = 2 if number and not place else 1
            rate = rates[number][place]
            blocks.append(
                ResidualBlock(before, dim, wide=wide, stride=stride, gate=make(dim * wide), drop_path=rate)
            )
            before = dim * wide
        stages.append(Stage(nn.Identity(), blocks))
    size, stride = (3, 1) if small else (7, 2)
    stem = Stem(in_channels, dims[0], size, stride, nn.ReLU(), pool=not small)
    return ConvNet(
        stem,
        stages,
        [dim * wide for dim in dims],
        num_classes=num_classes,
        strides=(1 if small else 4, 1, *(2,) * (len(dims) - 1)),
    )


# MobileNetV2's stages: how much wider inside, channels, blocks, stride.
MOBILE = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenet_v2(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    gate: Gate = "ela-b",
    width: float = 1.0,
    small: bool = False,
    drop_path: float = 0.0,
) -> ConvNet:
    """MobileNetV2 with a gate behind every 3 x 3 convolution. `width` scales the channels.

    `small` leaves out the stride of the stem and of the first stage that has one. The last part is the
    convolution to 1,280 channels.
    """
    make = gate_maker(gate)
    dims, stages, strides = [], [], []
    stem_dim = before = _of_eight(32 * width)
    rates = drop_path_rates(drop_path, tuple(depth for _, _, depth, _ in MOBILE))
    for number, (expand, channels, depth, step) in enumerate(MOBILE):
        dim, stride = _of_eight(channels * width), 1 if small and number == 1 else step
        blocks = []
        for place in range(depth):
            first = stride if not place else 1
            rate = rates[number][place]
            blocks.append(InvertedBlock(before, dim, expand, stride=first, gate=make, drop_path=rate))
            before = dim
        stages.append(Stage(nn.Identity(), blocks))
        dims.append(dim)
        strides.append(stride)
    last = _of_eight(1280 * max(1.0, width))
    stages.append(Stage(Stem(before, last, 1, 1, nn.ReLU6(), pool=False), []))
    stem = Stem(in_channels, stem_dim, 3, 1 if small else 2, nn.ReLU6(), pool=False)
    return ConvNet(
        stem,
        stages,
        [*dims, last],
        num_classes=num_classes,
        strides=(1 if small else 2, *strides, 1),
    )


def _of_eight(channels: float) -> int:
    """The nearest multiple of 8 that is no more than a tenth smaller, as MobileNets count channels."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near + 8 if near < 0.9 * channels else near


RESNET = (64, 128, 256, 512)
ela_resnet8 = partial(resnet, (16, 32, 64), (1, 1, 1), small=True, num_classes=10)
ela_resnet18 = partial(resnet, RESNET, (2, 2, 2, 2))
ela_resnet34 = partial(resnet, RESNET, (3, 4, 6, 3))
ela_resnet50 = partial(resnet, RESNET, (3, 4, 6, 3), wide=4)
ela_resnet101 = partial(resnet, RESNET, (3, 4, 23, 3), wide=4)
ela_mobilenet_v2 = mobilenet_v2
