"""The paper's networks, as a PyTorch user writes them."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Returns features (batch, outputs, height / stride, width / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + self.shortcut(x))


def resnet(blocks: Sequence[int], width: int, num_classes: int) -> nn.Sequential:
    """A residual network: each stage but the first halves the image and doubles the width.

    Args:
        blocks: Number of blocks of each stage.
        width: Channels of the 3x3 stem and the first stage.
        num_classes: Size of the output.
    """
    layers = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)]
    inputs = width
    for stage, number in enumerate(blocks):
        for block in range(number):
            outputs = width * 2**stage
            layers.append(BasicBlock(inputs, outputs, 2 if stage > 0 and block == 0 else 1))
            inputs = outputs
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes)]
    return nn.Sequential(*layers, *head)


def vgg(convolutions: Sequence[int], width: int, num_classes: int) -> nn.Sequential:
    """A VGG network with batch normalization and one linear layer as its head.

    Args:
        convolutions: Number of 3x3 convolutions of each stage; max-pooling halves between stages.
        width: Channels of the first stage; each next one has twice as many, up to eight times.
        num_classes: Size of the output.
    """
    layers: list[nn.Module] = []
    inputs = 3
    for stage, number in enumerate(convolutions):
        if stage > 0:
            layers.append(nn.MaxPool2d(2))
        for _ in range(number):
            outputs = width * min(2**stage, 8)
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            inputs = outputs
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes)]
    return nn.Sequential(*layers, *head)


NETWORKS: dict[str, Callable[..., nn.Sequential]] = {
    "resnet20": lambda width=16, num_classes=10: resnet((3, 3, 3), width, num_classes),
    "resnet18": lambda width=64, num_classes=200: resnet((2, 2, 2, 2), width, num_classes),
    "vgg19": lambda width=64, num_classes=100: vgg((2, 2, 4, 4, 4), width, num_classes),
}
"""The paper's networks by name, at their published width and number of classes."""
