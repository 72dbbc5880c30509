"""Models of published latencies that timm has not, for fit_latencies.py: torchvision's and
open_clip's, and YOLOv8 and YOLO11, written out as their YAML files describe them.

The detectors need no package but torch, have 80 classes, random weights and merged batch norms.
Their counts are those that ultralytics publishes: tests/benchmarks/test_row_models.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dimefm_edge.latency.operators import Operator
from dimefm_edge.latency.trace import trace_classifier, trace_ops

OTHER_MODELS = {
    "googlenet [Imagenet]": "torchvision/googlenet@224",
    "shufflenet_v2 [Imagenet]": "torchvision/shufflenet_v2_x0_5@224",
    "squeezenet1_1/SqueezeNet-1.1 [Imagenet]": "torchvision/squeezenet1_1@224",
    "regnet [Imagenet]": "regnetx_032@224",
    "mobile_vit [Imagenet]": "mobilevit_s@256",
    "nasnet [nasnetalarge.tf_in1k]": "nasnetalarge@224",
    "openai_clip [ViT-B/16]": "open_clip/ViT-B-16@224",
    "googlenet": "torchvision/googlenet@224",
    "squeezenet": "torchvision/squeezenet1_1@227",
    "shufflenet_v2": "torchvision/shufflenet_v2_x1_0@224",
    "alexnet": "torchvision/alexnet@224",
    "mnasnet1_3": "torchvision/mnasnet1_3@224",
    "squeezenet1_0": "torchvision/squeezenet1_0@224",
    "squeezenet1_1": "torchvision/squeezenet1_1@224",
    "6x ViT-B MLP blocks, 197 tokens": "blocks/vit_b_mlp_x6@224",
    **{f"shufflenet_v2_x{s}_{t}": f"torchvision/shufflenet_v2_x{s}_{t}@224"
       for s, t in ((0, 5), (1, 0), (1, 5), (2, 0))},
    **{f"YOLO11{s}": f"ultralytics/yolo11{s}@640" for s in "nsmlx"},
    **{f"YOLOv8{s}": f"ultralytics/yolov8{s}@640" for s in "nsmlx"},
}  # fmt: skip
"""Models without a timm name, and what they are; detectors are used on GPUs and CPUs only, where
their heads run on the device."""
_SCALES = {  # depth, width, most channels
    "yolov8": {"n": (0.33, 0.25, 1024), "s": (0.33, 0.5, 1024), "m": (0.67, 0.75, 768),
               "l": (1.0, 1.0, 512), "x": (1.0, 1.25, 512)},
    "yolo11": {"n": (0.5, 0.25, 1024), "s": (0.5, 0.5, 1024), "m": (0.5, 1.0, 512),
               "l": (1.0, 1.0, 512), "x": (1.0, 1.5, 512)},
}  # fmt: skip
_CLASSES, _BINS = 80, 16


def trace_any(name: str, image_size: int | None, batch: int) -> list[Operator]:
    """timm's models by name, and torchvision/, open_clip/ and ultralytics/ ones."""
    package, _, model = name.rpartition("/")
    if not package:
        return trace_classifier(name, image_size, batch)
    if package == "torchvision":
        import torchvision

        options = {"aux_logits": False, "init_weights": False} if model == "googlenet" else {}
        module = getattr(torchvision.models, model)(**options)
    elif package == "blocks":
        module = _MlpBlocks()
    elif package == "open_clip":
        import open_clip

        clip = open_clip.create_model(model)
        text = open_clip.tokenize(["a photo"]).to("meta")
        module = _BothTowers(clip, text)
    else:
        module = build_detector(model)
    return trace_ops(module.float(), image_size or 224, batch)


class _MlpBlocks(nn.Module):
    """Six MLPs of ViT-B on 197 tokens, with nothing before or after them."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Sequential
        self.blocks = layer(*(
            layer(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))
            for _ in range(6)
        ))  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        tokens: Tensor = self.blocks(image.new_empty(len(image), 197, 768))
        return tokens


class _BothTowers(nn.Module):
    def __init__(self, clip: nn.Module, text: Tensor) -> None:
        super().__init__()
        self.clip, self.text = clip, text

    def forward(self, image: Tensor) -> Any:
        return self.clip(image, self.text)


def build_detector(name: str) -> nn.Module:
    """Build `yolov8n` ... `yolo11x` with random weights: (B, 3, S, S) -> (B, 84, boxes)."""
    return _Yolo(name[:-1], name[-1])


class _Conv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, *,
                 groups: int = 1, is_linear: bool = False) -> None:  # fmt: skip
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)
        super().__init__(conv, nn.Identity() if is_linear else nn.SiLU())


class _Bottleneck(nn.Module):
    def __init__(self, width: int, *, is_residual: bool = True, squeeze: float = 1.0) -> None:
        super().__init__()
        inner = int(width * squeeze)
        self.cv1, self.cv2 = _Conv(width, inner, 3), _Conv(inner, width, 3)
        self.is_residual = is_residual

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.cv2(self.cv1(x))
        return x + out if self.is_residual else out


class _C3k(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width // 2
        self.cv1, self.cv2 = _Conv(width, inner), _Conv(width, inner)
        self.cv3 = _Conv(2 * inner, width)
        self.m = nn.Sequential(*(_Bottleneck(inner) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))
        return out


class _Split(nn.Module):
    """C2f and C3k2: all that the blocks give is kept and mixed."""

    def __init__(self, inputs: int, outputs: int, width: int, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.cv1 = _Conv(inputs, 2 * width)
        self.cv2 = _Conv((2 + len(blocks)) * width, outputs)
        self.m = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            parts.append(block(parts[-1]))
        out: Tensor = self.cv2(torch.cat(parts, 1))
        return out


class _Sppf(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = _Conv(width, width // 2), _Conv(2 * width, width)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        out: Tensor = self.cv2(torch.cat(parts, 1))
        return out


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads, self.head_dim = width // 64, 64
        self.qkv = _Conv(width, 2 * width, is_linear=True)  # keys of half the head's width
        self.proj = _Conv(width, width, is_linear=True)
        self.pe = _Conv(width, width, 3, groups=width, is_linear=True)

    def forward(self, x: Tensor) -> Tensor:
        half = self.head_dim // 2
        qkv = self.qkv(x).view(len(x), self.heads, 2 * self.head_dim, -1)
        q, k, v = qkv.split([half, half, self.head_dim], 2)
        scores = ((q.transpose(-2, -1) @ k) * half**-0.5).softmax(-1)
        mixed = (v @ scores.transpose(-2, -1)).view(x.shape)
        out: Tensor = self.proj(mixed + self.pe(v.reshape(x.shape)))
        return out


class _C2psa(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        half = width // 2
        self.cv1, self.cv2 = _Conv(width, width), _Conv(width, width)
        self.attn = nn.ModuleList(_Attention(half) for _ in range(depth))
        self.ffn = nn.ModuleList(
            nn.Sequential(_Conv(half, width), _Conv(width, half, is_linear=True))
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        kept, mixed = self.cv1(x).chunk(2, 1)
        for attn, ffn in zip(self.attn, self.ffn, strict=True):
            mixed = mixed + attn(mixed)
            mixed = mixed + ffn(mixed)
        out: Tensor = self.cv2(torch.cat((kept, mixed), 1))
        return out


class _Detect(nn.Module):
    def __init__(self, channels: list[int], *, is_v8: bool) -> None:
        super().__init__()
        box = max(16, channels[0] // 4, 4 * _BINS)
        score = max(channels[0], min(_CLASSES, 100))
        self.boxes = nn.ModuleList(
            nn.Sequential(_Conv(c, box, 3), _Conv(box, box, 3), nn.Conv2d(box, 4 * _BINS, 1))
            for c in channels
        )
        self.scores = nn.ModuleList(
            nn.Sequential(*self._mix(c, score, is_v8), *self._mix(score, score, is_v8),
                          nn.Conv2d(score, _CLASSES, 1))
            for c in channels
        )  # fmt: skip
        self.dfl = nn.Conv2d(_BINS, 1, 1, bias=False)

    @staticmethod
    def _mix(inputs: int, outputs: int, is_v8: bool) -> list[nn.Module]:
        if is_v8:
            return [_Conv(inputs, outputs, 3)]
        return [_Conv(inputs, inputs, 3, groups=inputs), _Conv(inputs, outputs)]

    def forward(self, maps: list[Tensor]) -> Tensor:
        heads = zip(maps, self.boxes, self.scores, strict=True)
        both = [torch.cat((boxes(x), scores(x)), 1) for x, boxes, scores in heads]
        joined = torch.cat([x.flatten(2) for x in both], 2)
        box, score = joined.split((4 * _BINS, _CLASSES), 1)
        batch, _, anchors = box.shape
        bins = box.view(batch, 4, _BINS, anchors).transpose(2, 1).softmax(1)
        near, far = self.dfl(bins).view(batch, 4, anchors).chunk(2, 1)
        points, strides = box.new_empty(1, 2, anchors), box.new_empty(1, anchors)
        first, last = points - near, points + far
        corners = torch.cat(((first + last) / 2, last - first), 1) * strides
        return torch.cat((corners, score.sigmoid()), 1)


class _Yolo(nn.Module):
    def __init__(self, family: str, scale: str) -> None:
        super().__init__()
        self.depth, self.width, self.most = _SCALES[family][scale]
        self.is_v8, self.is_deep = family == "yolov8", scale in "mlx"
        w = self._channels
        stem = [_Conv(3, w(64), 3, 2), _Conv(w(64), w(128), 3, 2)]
        outs = (128, 256, 512, 1024) if self.is_v8 else (256, 512, 512, 1024)
        stages: list[nn.Module] = []
        inputs = w(128)
        for place, out in enumerate(outs):
            if place:
                wide = (256, 512, 1024)[place - 1]
                stages.append(_Conv(inputs, w(wide), 3, 2))
                inputs = w(wide)
            stages.append(
                self._block(
                    inputs,
                    out,
                    (3, 6, 6, 3)[place],
                    is_shallow=place < 2,
                    squeeze=0.25 if place < 2 else 0.5,
                    is_residual=True,
                )
            )
            inputs = w(out)
        ends: list[nn.Module] = [_Sppf(inputs)]
        if not self.is_v8:
            ends.append(_C2psa(inputs, self._repeats(2)))
        self.first = nn.Sequential(*stem, *stages[:3])  # gives the map of stride 8
        self.second, self.third = nn.Sequential(*stages[3:5]), nn.Sequential(*stages[5:], *ends)
        eight, sixteen, last = w(outs[1]), w(512), w(1024)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.down1, self.down2 = _Conv(w(256), w(256), 3, 2), _Conv(w(512), w(512), 3, 2)
        self.mix1 = self._block(last + sixteen, 512, 3)
        self.mix2 = self._block(w(512) + eight, 256, 3)
        self.mix3 = self._block(w(256) + w(512), 512, 3)
        self.mix4 = self._block(w(512) + last, 1024, 3, is_shallow=False)
        self.detect = _Detect([w(256), w(512), w(1024)], is_v8=self.is_v8)

    def _channels(self, wanted: int) -> int:
        return math.ceil(min(wanted, self.most) * self.width / 8) * 8

    def _repeats(self, count: int) -> int:
        return max(round(count * self.depth), 1)

    def _block(self, inputs: int, out: int, repeats: int, *, is_shallow: bool = True,
               squeeze: float = 0.5, is_residual: bool = False) -> nn.Module:  # fmt: skip
        outputs = self._channels(out)
        if self.is_v8:
            width = outputs // 2
            count = self._repeats(repeats)
            blocks: list[Any] = [_Bottleneck(width, is_residual=is_residual) for _ in range(count)]
            return _Split(inputs, outputs, width, blocks)
        width = int(outputs * squeeze)
        is_plain = is_shallow and not self.is_deep
        blocks = [
            _Bottleneck(width, squeeze=0.5) if is_plain else _C3k(width)
            for _ in range(self._repeats(2))
        ]
        return _Split(inputs, outputs, width, blocks)

    def forward(self, image: Tensor) -> Tensor:
        eight = self.first(image)
        sixteen = self.second(eight)
        last = self.third(sixteen)
        high = self.mix1(torch.cat((self.up(last), sixteen), 1))
        out8 = self.mix2(torch.cat((self.up(high), eight), 1))
        out16 = self.mix3(torch.cat((self.down1(out8), high), 1))
        out32 = self.mix4(torch.cat((self.down2(out16), last), 1))
        out: Tensor = self.detect([out8, out16, out32])
        return out
