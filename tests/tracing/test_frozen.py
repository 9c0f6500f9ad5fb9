"""What must not be pruned is frozen with a reason that a user can read, and the rest goes on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.tracing.analyze import analyze


class Way(nn.Module):
    """Named modules and a forward given as a function of the model and its input."""

    def __init__(self, way: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.way = way
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def conv(inner: int, outer: int) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, 3, padding=1)


def between(middle: nn.Module, width: int = 8, out: int = 8) -> nn.Module:
    """`free` -> `a` -> `middle` -> `c` -> `d`, all convs but the middle, which `free` and `c` never meet."""
    return Way(
        lambda m, x: m.d(F.relu(m.c(m.middle(m.a(F.relu(m.free(x))))))),
        free=conv(3, 6),
        a=conv(6, width),
        middle=middle,
        c=conv(out, 7),
        d=conv(7, 5),
    )


class Flip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1)


class ChannelMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class Cut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        one, other = x.split([4, 4], 1)
        return one * torch.sigmoid(other)


class Eca(nn.Module):
    """Efficient channel attention: a short convolution along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.slide = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.slide(x.mean((2, 3))[:, None])
        return x * torch.sigmoid(scores)[:, 0, :, None, None]


class ResponseNorm(nn.Module):
    """Channels, along the last dimension, by the mean over all channels of their norms (GRN of ConvNeXt V2)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        sizes = x.norm(dim=(1, 2), keepdim=True)
        x = x + torch.addcmul(self.bias, self.weight, x * (sizes / (sizes.mean(-1, keepdim=True) + 1e-6)))
        return x.permute(0, 3, 1, 2)


class Spatial(nn.Module):
    """A map of places by statistics over the channels (CBAM)."""

    def __init__(self) -> None:
        super().__init__()
        self.map = conv(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        statistics = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.map(statistics))


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.one(x) if x.mean() > 0 else self.two(x)
        return y


class Sequence(nn.Module):
    """[N, C, H, W] through a recurrent or attention module and back."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        many = isinstance(self.inner, nn.MultiheadAttention)
        out = (self.inner(tokens, tokens, tokens) if many else self.inner(tokens))[0]
        return out.transpose(1, 2).unflatten(2, x.shape[2:])


class SelfAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        return torch.bmm(torch.softmax(torch.bmm(tokens, tokens.transpose(1, 2)), -1), tokens).view_as(x)


MIDDLES: dict[str, tuple[Callable[[], nn.Module], int, int, str]] = {
    "lstm": (lambda: Sequence(nn.LSTM(8, 8, batch_first=True)), 8, 8, "recurrent layers are not pruned (LSTM)"),
    "gru": (lambda: Sequence(nn.GRU(8, 8, batch_first=True)), 8, 8, "recurrent layers are not pruned (GRU)"),
    "attention module": (
        lambda: Sequence(nn.MultiheadAttention(8, 2, batch_first=True)),
        8,
        8,
        "attention is not pruned by channels",
    ),
    "attention by hand": (SelfAttention, 8, 8, "activations are multiplied with activations"),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(conv(8, 8)), 8, 8, "parametrization"),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(conv(8, 8)), 8, 8, "parametrization"),
    "layer norm": (lambda: nn.LayerNorm([8, 8, 8]), 8, 8, "LayerNorm normalises over all its channels"),
    "efficient channel attention": (Eca, 8, 8, "a convolution runs along its channels (conv1d)"),
    "global response norm": (ResponseNorm, 8, 8, "reduced to one value (mean over the channels)"),
    "spatial attention": (Spatial, 8, 8, "reduced to one value (mean over the channels)"),
    "split by numbers": (Cut, 8, 4, "split at a fixed place (split); sizes taken from the tensor"),
    "softmax": (lambda: nn.Softmax(1), 8, 8, "softmax runs over its channels"),
    "mean over channels": (ChannelMean, 8, 8, "reduced to one value (mean over the channels)"),
    "flip": (Flip, 8, 8, "flip runs over its channels"),
    "data-dependent branch": (Branch, 8, 8, "'middle' decides by the data"),
}


@pytest.mark.parametrize("name", MIDDLES)
def test_the_channels_that_meet_it_are_frozen_and_the_others_are_not(name: str) -> None:
    build, width, out, words = MIDDLES[name]
    torch.manual_seed(0)
    structure = analyze(between(build(), width, out), (torch.randn(2, 3, 8, 8),))
    assert structure.names == ("free", "c")
    assert words in structure.frozen["a"]
    assert structure.frozen["d"] == "its channels are the model's output"


@pytest.mark.parametrize(("middle", "layer"), [(Eca(), "slide"), (Spatial(), "map")])
def test_a_layer_of_one_channel_is_not_said_to_be_what_it_reads(middle: nn.Module, layer: str) -> None:
    structure = analyze(between(middle), (torch.randn(2, 3, 8, 8),))
    assert structure.frozen[f"middle.{layer}"] == "its channels could only go all together"


def test_hook_based_weight_norm_is_frozen_too() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch deprecates it, users still have it
        middle = nn.utils.weight_norm(conv(8, 8))
    structure = analyze(between(middle), (torch.randn(2, 3, 8, 8),))
    assert structure.names == ("free", "c")
    assert "weight_norm" in structure.frozen["middle"]


def test_a_shuffle_behind_a_branch_that_starts_at_zero_is_still_caught() -> None:
    """A fresh residual branch ends in a zero scale: unless the weights are scrambled it would prove anything."""
    norm = nn.BatchNorm2d(5)
    nn.init.zeros_(norm.weight)
    model = Way(
        lambda m, x: m.short(x) + m.norm(m.d(m.flip(m.a(x)))),
        short=conv(3, 5),
        a=conv(3, 8),
        flip=Flip(),
        d=conv(8, 5),
        norm=norm,
    )
    structure = analyze(model, (torch.randn(2, 3, 8, 8),))
    assert structure.names == ()
    assert "flip" in structure.frozen["a"]


def test_modules_that_the_trace_never_reached_are_named() -> None:
    model = Way(lambda m, x: m.c(F.relu(m.a(x))), a=conv(3, 8), idle=conv(8, 8), c=conv(8, 5))
    structure = analyze(model, (torch.randn(2, 3, 8, 8),))
    assert structure.names == ("a",)
    assert structure.frozen["idle"] == "the example inputs never reach it"


def test_modules_under_no_grad_or_behind_detach_are_named() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = F.relu(m.backbone(x))
        y: Tensor = m.c(F.relu(m.a(x)))
        return y

    structure = analyze(Way(way, backbone=conv(3, 8), a=conv(8, 6), c=conv(6, 5)), (torch.randn(2, 3, 8, 8),))
    assert structure.names == ("a",)
    assert "no gradient path" in structure.frozen["backbone"]


def test_weights_used_outside_their_own_forward_are_frozen() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.c(F.relu(F.conv2d(F.relu(m.a(x)), m.b.weight, m.b.bias, padding=1)))
        return y

    structure = analyze(Way(way, a=conv(3, 8), b=conv(8, 8), c=conv(8, 5)), (torch.randn(2, 3, 8, 8),))
    assert structure.names == ()
    assert structure.frozen["b"] == "its weights are used outside its own forward (in the model's forward)"


def test_a_decision_in_the_models_own_forward_freezes_everything() -> None:
    model = Way(lambda m, x: m.c(F.relu(m.a(x))) * (2 if float(x.sum()) > 0 else 1), a=conv(3, 8), c=conv(8, 5))
    structure = analyze(model, (torch.randn(2, 3, 8, 8),))
    assert structure.names == ()
    assert "decides by the data" in structure.frozen["a"]


def test_a_decision_by_a_constant_freezes_nothing() -> None:
    class Switched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = conv(3, 8), conv(8, 5)
            self.register_buffer("on", torch.tensor(True))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.c(F.relu(self.a(x)) if self.on else self.a(x))
            return y

    assert analyze(Switched(), (torch.randn(2, 3, 8, 8),)).names == ("a",)


def test_of_a_split_only_the_part_that_cannot_move_is_frozen() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.a(x))
        y: Tensor = m.c(x[:, :4]) + m.d(x[:, 4:])
        return y

    structure = analyze(Way(way, a=conv(3, 8), c=conv(4, 5), d=conv(4, 5)), (torch.randn(2, 3, 8, 8),))
    (group,) = structure.groups
    assert (group.name, group.width) == ("a", 4)
    assert {s.offset for s in group.slices if s.role == "produce"} == {4}


def test_a_reason_is_one_readable_line() -> None:
    for build, width, out, _ in MIDDLES.values():
        for reason in analyze(between(build(), width, out), (torch.randn(2, 3, 8, 8),)).frozen.values():
            assert "\n" not in reason
            assert "Backward" not in reason
            assert len(reason) < 400


class Blur(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.ones(8, 1, 3, 3) / 9)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, padding=1, groups=8)


class Scaled(nn.Module):
    """By a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.rand(1, 8, 1, 1) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,dc->ndhw", x, self.weight)


class Equalised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight / 9, self.bias, padding=1)


@pytest.mark.parametrize(
    ("middle", "words"),
    [
        (Blur(), "'middle' convolves with middle.kernel [8, 1, 3, 3] in a number of groups that does not follow"),
        (Scaled(), "'middle' lays a tensor [1, 8, 1, 1] along its channels, which is not narrowed with them"),
        (Mixed(), "'middle' lays middle.weight [8, 8] along its channels, which is not narrowed with them"),
        (Equalised(8, 8, 3), "'middle' computes a weight in every forward, which is not narrowed with its channels"),
    ],
)
def test_a_tensor_of_a_forwards_own_is_named_instead_of_the_sizes_it_breaks_at(middle: nn.Module, words: str) -> None:
    torch.manual_seed(0)
    structure = analyze(between(middle), (torch.randn(2, 3, 9, 9),))
    assert structure.names[0] == "free"
    assert structure.frozen["a"].startswith(words)
    assert "RuntimeError" not in structure.frozen["a"]


def test_what_feeds_a_quantised_layer_is_told_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model, {"4"}, dtype=torch.qint8)
        structure = analyze(quantised, (torch.randn(2, 5),))
    assert structure.names == ("0",)
    assert structure.frozen["2"].startswith("it feeds '4': a quantised layer keeps its weight packed")


class Decides(nn.Module):
    """Its only output is a number of a class."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x).argmax(-1)


def test_a_model_of_which_no_gradient_comes_back_is_frozen_with_that_reason() -> None:
    structure = analyze(Decides(), (torch.randn(2, 4),))
    assert structure.names == ()
    assert "no gradient path" in structure.frozen["scores"]
