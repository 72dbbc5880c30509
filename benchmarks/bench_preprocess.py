"""From a JPEG's bytes to a model's input: ours against open_clip's transform, plain PIL, OpenCV.

The subjects take turns on photo-like JPEGs (photos.py), on one thread; times are medians, ratios
medians over rounds of the other over ours.

- `ours`: `load_inputs`; `ours_new_size`: for a size not seen before, whose weights are not kept
  yet; `exact`: with `exact=True`, bit for bit as in training.
- `open_clip`: PIL and open_clip's own transform (torchvision's Resize, CenterCrop, ToTensor).
- `pil`: the same in PIL and numpy as one would write it; no torch.
- `opencv`: decode, resize by INTER_CUBIC, crop, normalise. It does not antialias, and so is not
  the same picture: `difference` says how far off each is from training, in levels of 0 to 255.
- `floor`: Pillow's decoder alone at the scale that ours asks for. The entropy coding has to be
  undone whatever the scale (`entropy`: decoding at 1/8), so nothing can go below that.

The work is counted: bytes read, pixels decoded, pixels resampled, multiply-adds of resampling.
With `--scenes`, the sample teacher's top-1 on scenes as JPEGs of 128 to 777 px, both ways.

    pip install --no-deps --target=/tmp/cv opencv-python-headless
    PYTHONPATH=.:kernels:/tmp/cv OMP_NUM_THREADS=1 python benchmarks/bench_preprocess.py \
        --json --scenes 1920 | python benchmarks/record.py preprocess
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
from open_clip.transform import image_transform
from photos import jpeg, photo
from PIL import Image

from dimefm_edge.data.scenes import scene_test_set
from dimefm_edge.image_files import read_picture
from dimefm_edge.labels import build_label_bank
from dimefm_edge.latency.measure import machine_info, sample_interleaved
from dimefm_edge.model_input import load_inputs, load_pixels
from dimefm_edge.preprocess import PreprocessSpec
from dimefm_edge.resample import Bands, fit_bands
from dimefm_edge.subjects import load_subject

SIZES = ((320, 240), (640, 480), (1280, 960), (4032, 3024))
SCENE_SIDES = (128, 200, 256, 400, 520, 777)

Call = Callable[[bytes], npt.NDArray[np.float32]]


def plain_pil(spec: PreprocessSpec) -> Call:
    """What one writes from the model card: whole picture resized, float arithmetic at the end."""
    side = spec.image_size
    mean, std = np.float32(spec.mean), np.float32(spec.std)

    def prepare(data: bytes) -> npt.NDArray[np.float32]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        scale = side / min(image.size)
        size = tuple(int(length * scale) for length in image.size)
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (round((length - side) / 2) for length in size)
        image = image.crop((left, top, left + side, top + side))
        values = (np.asarray(image).astype(np.float32) / 255 - mean) / std
        return np.ascontiguousarray(values.transpose(2, 0, 1))

    return prepare


def opencv(spec: PreprocessSpec) -> Call | None:
    """None where OpenCV is not installed."""
    try:
        import cv2
    except ImportError:
        return None
    cv2.setNumThreads(1)
    side = spec.image_size
    mean, std = np.float32(spec.mean), np.float32(spec.std)

    def prepare(data: bytes) -> npt.NDArray[np.float32]:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        height, width = image.shape[:2]
        scale = side / min(height, width)
        size = (int(width * scale), int(height * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
        left, top = (round((length - side) / 2) for length in size)
        image = cv2.cvtColor(image[top : top + side, left : left + side], cv2.COLOR_BGR2RGB)
        values = (image.astype(np.float32) / 255 - mean) / std
        return np.ascontiguousarray(values.transpose(2, 0, 1))

    return prepare


def subjects_of(spec: PreprocessSpec) -> dict[str, Call]:
    """Bytes to (3, S, S) float32, by name."""
    transform = image_transform(spec.image_size, is_train=False, mean=spec.mean, std=spec.std)
    calls: dict[str, Call | None] = {
        "ours": lambda data: load_inputs([data], spec)[0],
        "exact": lambda data: load_inputs([data], spec, exact=True)[0],
        "open_clip": lambda data: transform(Image.open(io.BytesIO(data))).numpy(),
        "pil": plain_pil(spec),
        "opencv": opencv(spec),
    }
    return {name: call for name, call in calls.items() if call is not None}


def counted_work(data: bytes, spec: PreprocessSpec) -> dict[str, Any]:
    """What ours does for one JPEG whose short side is more than the model's."""
    side = spec.image_size
    picture = read_picture(data, least_side=2 * side)
    step = min(picture.size) / picture.reduction / side
    reads = [round(min(length, step * side)) for length in picture.image.size]
    columns, rows = (
        fit_bands(length, (0.0, step * side), side, spec.interpolation) for length in reads
    )

    def products(bands: Bands) -> int:
        return sum(weights.size for _, _, weights in bands.blocks)

    return {
        "bytes_read": len(data),
        "bits_per_pixel": 8 * len(data) / (picture.size[0] * picture.size[1]),
        "reduction": picture.reduction,
        "pixels_decoded": picture.image.width * picture.image.height,
        "pixels_resampled": reads[0] * reads[1],
        "resampling_mmacs": 3e-6 * (products(columns) * reads[1] + products(rows) * side),
        "bytes_out": 4 * 3 * side * side,
    }


def bench_size(
    width: int, height: int, spec: PreprocessSpec, *, seconds: float, runs: int
) -> dict[str, Any]:
    """One photo of a size through every subject."""
    data = jpeg(photo(width, height, seed=1))
    calls = subjects_of(spec)
    timed: dict[str, Callable[[], object]] = {
        name: lambda call=call: call(data) for name, call in calls.items()
    }
    timed["ours_new_size"] = lambda: (fit_bands.cache_clear(), calls["ours"](data))
    timed["floor"] = lambda: read_picture(data, least_side=2 * spec.image_size)
    timed["entropy"] = lambda: read_picture(data, least_side=1)
    _, samples = sample_interleaved(timed, min_runs=runs, max_seconds=seconds)
    level = (1 / (255 * np.asarray(spec.std))).reshape(3, 1, 1)
    wanted = calls["exact"](data)
    apart = {name: np.abs(call(data) - wanted) / level for name, call in calls.items()}
    return {
        "name": f"{width}x{height}",
        "work": counted_work(data, spec),
        "p50_ms": {name: float(np.median(times)) for name, times in samples.items()},
        "ratio": {
            name: float(np.median(times / samples["ours"]))
            for name, times in samples.items()
            if name != "ours"
        },
        "difference": {
            name: {"mean_levels": float(found.mean()), "max_levels": float(found.max())}
            for name, found in apart.items()
            if name in ("ours", "opencv")  # the others are exact to a rounding of floats
        },
        "rounds": len(samples["ours"]),
    }


def bench_scenes(count: int) -> dict[str, Any]:
    """The sample teacher on scenes as JPEG files, prepared exactly and fast."""
    teacher, drawn = load_subject("sample"), scene_test_set()
    assert teacher.encode_texts is not None
    bank = build_label_bank("scenes", drawn.classnames, drawn.templates, teacher.encode_texts)
    rows = np.linspace(0, len(drawn) - 1, count).astype(int).tolist()
    labels = np.asarray([drawn.label(row) for row in rows])
    files = [
        jpeg(drawn.image(row).resize((SCENE_SIDES[i % len(SCENE_SIDES)],) * 2))
        for i, row in enumerate(rows)
    ]
    exact, fast = (
        teacher.encode_pixels(load_pixels(files, teacher.preprocess, exact=is_exact))
        for is_exact in (True, False)
    )
    named = [(embeds @ bank.embeds.T).argmax(1) for embeds in (exact, fast)]
    cosines = (exact * fast).sum(1)
    return {
        "images": count,
        "exact_top1_pct": 100 * float((named[0] == labels).mean()),
        "fast_top1_pct": 100 * float((named[1] == labels).mean()),
        "same_answer_pct": 100 * float((named[0] == named[1]).mean()),
        "mean_cosine": float(cosines.mean()),
        "least_cosine": float(cosines.min()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image-sizes", type=int, nargs="*", default=(224, 64))
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each subject and size")
    parser.add_argument("--scenes", type=int, default=0, help="images of the accuracy check")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = psutil.getloadavg()[0]
    values: dict[str, Any] = {}
    for side in args.image_sizes:
        spec = PreprocessSpec(side)
        values[f"to_{side}"] = [
            bench_size(*size, spec, seconds=args.seconds, runs=args.runs) for size in SIZES
        ]
    values["load_average"] = {"before": load, "after": psutil.getloadavg()[0]}
    if args.scenes:
        values["scenes"] = bench_scenes(args.scenes)
    values["machine"] = machine_info()
    print(json.dumps(values, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
