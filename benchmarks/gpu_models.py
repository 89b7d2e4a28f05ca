"""The models of ``gpu.py``, in plain torch: a ResNet-50 and a BERT-base, and small ones of either kind for a CPU.

Weights are random: what matters here is the work.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


class Bottleneck(nn.Module):
    """ResNet's block of three convolutions, with a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.narrow = convolution(inputs, width, 1)
        self.across = convolution(width, width, 3, stride)
        self.widen = convolution(width, 4 * width, 1)
        same = inputs == 4 * width and stride == 1
        self.shortcut = nn.Identity() if same else convolution(inputs, 4 * width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.widen(self.across(self.narrow(x).relu()).relu())
        return (inner + self.shortcut(x)).relu()


class ResNet(nn.Module):
    """Takes pictures as bytes, [n, 3, height, width]."""

    def __init__(self, depths: list[int], width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(convolution(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        blocks: list[nn.Module] = []
        channels = width
        for level, depth in enumerate(depths):
            for index in range(depth):
                blocks.append(Bottleneck(channels, width * 2**level, 2 if level and not index else 1))
                channels = 4 * width * 2**level
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, 1000)

    def forward(self, pictures: Tensor) -> Tensor:
        x = pictures.float() / 127.5 - 1.0
        answer: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return answer


class Layer(nn.Module):
    """A transformer's encoder layer, as BERT has it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.parts = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        query, key, value = self.parts(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attended = functional.scaled_dot_product_attention(query, key, value)
        x = self.norms[0](x + self.merge(attended.transpose(1, 2).reshape(n, length, width)))
        answer: Tensor = self.norms[1](x + self.narrow(functional.gelu(self.widen(x))))
        return answer


class Bert(nn.Module):
    """Takes token numbers, [n, length]."""

    def __init__(self, layers: int, width: int, heads: int, words: int = 30522, longest: int = 512) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.places = nn.Parameter(torch.randn(longest, width) * 0.02)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.words(tokens) + self.places[: tokens.shape[1]])
        answer: Tensor = self.layers(x)[:, 0]
        return answer


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs))


def resnet50() -> nn.Module:
    return ResNet([3, 4, 6, 3], 64)


def picture() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (3, 224, 224), np.uint8)


def bert_base() -> nn.Module:
    return Bert(12, 768, 12)


def text() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 30522, 128, np.int64)


def small_resnet() -> nn.Module:
    return ResNet([1, 1, 1, 1], 16)


def small_picture() -> np.ndarray[Any, Any]:
    return picture()[:, :96, :96].copy()


def small_bert() -> nn.Module:
    return Bert(2, 192, 4, words=5000)


def small_text() -> np.ndarray[Any, Any]:
    return text()[:64] % 5000


@functools.cache
def _on_device(factory: str, sample: str, options: str, device: str, batch: int) -> Callable[[], None]:
    """One run of a model alone, on inputs that lie on the device; ``options`` in JSON."""
    chosen = json.loads(options)
    torch.set_num_threads(int(chosen["threads"]))
    layout = torch.channels_last if chosen.get("channels_last") else torch.contiguous_format
    module = globals()[factory]().eval().to(device, memory_format=layout)
    inputs = torch.from_numpy(np.stack([globals()[sample]()] * batch)).to(device)
    dtype = getattr(torch, chosen["autocast"]) if "autocast" in chosen else None

    def run() -> None:
        with torch.inference_mode(), torch.autocast(device, dtype, enabled=dtype is not None):
            module(inputs)
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(5):
        run()
    return run


def bare_loop(factory: str, sample: str, options: str, device: str, batch: int, seconds: float) -> float:
    """Elements per second of the model alone, run again and again."""
    run = _on_device(factory, sample, options, device, batch)
    done = 0
    begun = time.perf_counter()
    while time.perf_counter() < begun + seconds:
        run()
        done += batch
    return done / (time.perf_counter() - begun)


def bandwidth(megabytes: int, repeats: int = 10) -> dict[str, float]:
    """Gigabytes per second between host and GPU, the best of some runs each."""
    size = megabytes * 2**20
    there = torch.empty(size, dtype=torch.uint8, device="cuda")
    found = {}
    for kind in ("pinned", "pageable"):
        here = torch.zeros(size, dtype=torch.uint8, pin_memory=kind == "pinned")
        for name, source, target in (("host_to_device", here, there), ("device_to_host", there, here)):
            best = 0.0
            for _ in range(repeats):
                torch.cuda.synchronize()
                begun = time.perf_counter()
                target.copy_(source, non_blocking=True)
                torch.cuda.synchronize()
                best = max(best, size / (time.perf_counter() - begun) / 1e9)
            found[f"{kind}_{name}"] = round(best, 2)
    return found
