"""Train the teacher of the studies on real images and save it as an open_clip folder.

    python benchmarks/real_teacher.py --data ../shared/data --out /tmp/studies/teacher-1
    python benchmarks/real_teacher.py --data ../shared/data --out /tmp/studies/teacher \
        --init /tmp/studies/teacher-1 --steps 700 --lr 1.5e-3 --min-crop 0.5 --cutmix 0

Learns Tiny-ImageNet's 202 classes and CIFAR-10's 10 in one model, each class as sentences: its
names in frames, and the WordNet gloss. Every step contrasts the batch with one sentence of
every class (UniCL, arXiv 2204.03610); images grow from 32 to 64 px on the way (progressive
learning, arXiv 2104.00298) and are mixed by CutMix (arXiv 1905.04899), its share being the
target. The second command trains on at 64 px without mixing: after the first the model fits too
little (61% of its own CIFAR-10 images, 58% of the test's). Resumable: run the same again; a
finished teacher is kept. studies.py runs both when its teacher is missing. On an H200
`--model resnet34d --steps 3000` and then `--steps 750` took 5.5 minutes beside a second teacher.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.utils.model_ema import ModelEmaV3
from tokenizers import Tokenizer

from dimefm_edge.data.augment import random_crops, seeded_generator
from dimefm_edge.data.images import decode_batches, open_labelled, row_batches
from dimefm_edge.data.sentences import open_sentences
from dimefm_edge.files import atomic_file
from dimefm_edge.preprocess import PreprocessSpec

if __package__:
    from benchmarks.small_maps import with_small_maps
    from benchmarks.train_teacher import (
        encode_text,
        normalise,
        save_teacher,
        train_tokenizer,
        zero_shot_top1,
    )  # fmt: skip
else:
    from small_maps import with_small_maps
    from train_teacher import (
        encode_text,
        normalise,
        save_teacher,
        train_tokenizer,
        zero_shot_top1,
    )  # fmt: skip

SIDE = 64
CONFIG: dict[str, Any] = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": SIDE, "timm_model_name": "resnet18d", "timm_pool": "avg"},
    "text_cfg": {"context_length": 20, "width": 256, "heads": 4, "layers": 3},
}
SETS = ("cifar10", "tiny-imagenet")
SIZES = ((0.7, 32), (0.9, 48), (1.0, 64))
"""Image side up to each share of the training."""
FRAMES = (
    "a photo of a {}.", "a small photo of a {}.", "a close-up of a {}.",
    "a picture showing a {}.", "a {}", "one {} in the picture", "{}",
)  # fmt: skip
DONE_FILE, STATE_FILE = "teacher.json", "training_state.pt"
SECOND_STAGE = ("--steps", "700", "--lr", "1.5e-3", "--min-crop", "0.5", "--cutmix", "0")


@dataclass(frozen=True)
class Classes:
    """Names of every class, the first being its own, and glosses by name."""

    folders: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]
    glosses: dict[str, str]

    @classmethod
    def read(cls, data_dir: Path) -> Classes:
        listed = json.loads((data_dir / "teacher/classes.json").read_text())
        by_folder = {e["wnid"]: tuple(e["names"]) for e in listed["tiny-imagenet"]}
        by_folder |= {e["names"][0]: tuple(e["names"]) for e in listed["cifar10"]}
        glosses: dict[str, str] = {}
        with gzip.open(data_dir / "text/oewn_noun_verb_glosses.txt.gz", "rt") as stream:
            for line in stream:
                word, _, gloss = line.strip().partition(": ")
                glosses.setdefault(word.lower(), gloss)
        folders = tuple(sorted(by_folder))
        return cls(folders, tuple(by_folder[f] for f in folders), glosses)

    def sentences(self, rng: np.random.Generator) -> list[str]:
        """One sentence of every class."""
        written = []
        for names in self.names:
            name = names[0] if rng.random() < 0.6 else names[int(rng.integers(len(names)))]
            gloss = self.glosses.get(name.lower())
            if gloss and rng.random() < 0.15:
                written.append(f"{name}: {gloss}")
            else:
                written.append(FRAMES[int(rng.integers(len(FRAMES)))].format(name))
        return written


def read_pixels(source: str) -> tuple[np.ndarray, Any]:
    """(N, 64, 64, 3) uint8 and the labelled set."""
    labelled = open_labelled(source)
    spec = PreprocessSpec(image_size=SIDE)
    batches = row_batches([range(len(labelled.pool))], 512)
    pixels = [batch.pixels for batch in decode_batches(labelled.pool, batches, spec)]
    return np.concatenate(pixels), labelled


def training_images(data_dir: Path, classes: Classes) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 3, 64, 64) uint8 and (N,) rows of `classes`."""
    images, labels = [], []
    for name in SETS:
        pixels, labelled = read_pixels(str(data_dir / f"teacher/{name}-labeled-*.tar"))
        of = np.asarray([classes.folders.index(folder) for folder in labelled.classnames])
        images.append(pixels)
        labels.append(of[labelled.labels])
    return (
        torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2),
        torch.from_numpy(np.concatenate(labels)),
    )


def augment(
    images: torch.Tensor, targets: torch.Tensor, size: int, generator: torch.Generator,
    *, min_crop: float, cutmix: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Crop to (B, 3, size, size), mirror, jitter, and CutMix a share of the batches.

    Random numbers and targets stay on the CPU: nothing waits for a GPU.
    """
    theta = random_crops(len(images), min_crop=min_crop, flip=True, generator=generator)
    grid = F.affine_grid(theta.to(images.device), [len(images), 3, size, size], align_corners=False)
    x = F.grid_sample(normalise(images), grid, padding_mode="reflection", align_corners=False)
    jitter = torch.rand(2, len(x), 1, 1, 1, generator=generator).to(x.device) - 0.5
    x = x * (1 + 0.6 * jitter[0]) + 0.6 * jitter[1]
    draw = torch.rand(4, generator=generator)
    if draw[0] < cutmix:
        height, width = (int(size * share) for share in ((1 - draw[1]).sqrt(),) * 2)
        top = int(draw[2] * (size - height + 1))
        left = int(draw[3] * (size - width + 1))
        x[:, :, top : top + height, left : left + width] = x.flip(0)[
            :, :, top : top + height, left : left + width
        ]
        cut = height * width / size**2
        targets = (1 - cut) * targets + cut * targets.flip(0)
    return x.contiguous(memory_format=torch.channels_last), targets


def contrast(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, targets: torch.Tensor,
    scale: torch.Tensor, *, smoothing: float = 0.05,
) -> torch.Tensor:  # fmt: skip
    """Images to classes, and classes to the batch's images of them; targets are on the CPU."""
    logits = scale * image_embeds @ text_embeds.T
    rows = F.cross_entropy(logits, targets.to(logits.device), label_smoothing=smoothing)
    present = targets.sum(0).nonzero()[:, 0]
    of_class = targets.T[present] / targets.T[present].sum(1, keepdim=True)
    columns = logits.T[present.to(logits.device)]
    return (rows + F.cross_entropy(columns, of_class.to(logits.device))) / 2


def encode_by_length(
    model: torch.nn.Module, tokenizer: Tokenizer, sentences: list[str]
) -> torch.Tensor:
    """Short sentences are not padded to the longest: (C, E)."""
    ids = torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(sentences)])
    order = (ids != 0).sum(1).argsort()
    parts = [encode_text(model, ids[part]) for part in order.chunk(3)]
    return torch.cat(parts)[order.argsort()]


def scores_of(model: torch.nn.Module, tokenizer: Tokenizer, data_dir: Path) -> dict[str, float]:
    """Zero-shot top-1 on both test sets, in percent."""
    scores = {}
    for name in SETS:
        pixels, test = read_pixels(str(data_dir / "zeroshot" / name))
        device = next(model.parameters()).device
        images = normalise(torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2))
        labels = torch.from_numpy(test.labels).to(device)
        scores[name] = zero_shot_top1(
            model, tokenizer, images, labels, list(test.classnames), list(test.templates)
        )
    return scores


def build_model(
    corpus: Iterator[str], vocab_size: int, image_model: str
) -> tuple[Any, Tokenizer, dict[str, Any]]:
    config = json.loads(json.dumps(CONFIG))
    config["vision_cfg"]["timm_model_name"] = image_model
    context = config["text_cfg"]["context_length"]
    tokenizer = train_tokenizer(list(corpus), vocab_size=vocab_size, context_length=context)
    config["text_cfg"]["vocab_size"] = tokenizer.get_vocab_size()
    torch.manual_seed(0)
    model = open_clip.CLIP(config["embed_dim"], dict(config["vision_cfg"]), config["text_cfg"])
    model.visual = model.visual.to(memory_format=torch.channels_last)
    return model, tokenizer, config


def train(args: argparse.Namespace) -> dict[str, float]:
    classes = Classes.read(args.data)
    model, tokenizer, config = build_model(
        iter(open_sentences([str(args.data / "text/*.gz")])), args.vocab, args.model
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = with_small_maps(model.to(device))
    images, labels = training_images(args.data, classes)
    images = images.to(device)
    one_hot = F.one_hot(labels, len(classes.folders)).float()
    decay = [p for n, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in n]
    plain = [p for n, p in model.named_parameters() if p.ndim < 2 or "embedding" in n]
    optimizer = torch.optim.AdamW(
        [
            {"params": decay, "weight_decay": args.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        fused=True,
    )
    averaged = ModelEmaV3(model, decay=0.998, use_warmup=True)
    args.out.mkdir(parents=True, exist_ok=True)
    state_path, first = args.out / STATE_FILE, 0
    sizes = SIZES if args.init is None else ((1.0, SIDE),)
    if args.init is not None:
        weights = load_file(args.init / "open_clip_model.safetensors")
        for module in (model, averaged.module):
            module.load_state_dict(weights)
    if state_path.is_file():
        state = torch.load(state_path, weights_only=True, map_location=device)
        for part, name in ((model, "model"), (averaged, "averaged"), (optimizer, "optimizer")):
            part.load_state_dict(state[name])
        first = state["step"]
    # Without the instructions for it, bfloat16 is 12 times slower than fp32 on a CPU.
    has_bf16 = device.type == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    begun = time.process_time()
    for step in range(first, args.steps):
        progress = step / args.steps
        warm = min(1.0, 12 * (step + 1) / args.steps)
        rate = args.lr * warm * (0.5 * (1 + np.cos(np.pi * progress)) + 0.005)
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        rng = np.random.default_rng([0, step])
        rows = torch.from_numpy(rng.choice(len(images), args.batch, replace=False))
        size = next(side for share, side in sizes if progress < share)
        batch, targets = augment(
            images[rows], one_hot[rows], size, seeded_generator(0, step),
            min_crop=args.min_crop, cutmix=args.cutmix,
        )  # fmt: skip
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16):
            image_embeds = model.encode_image(batch).float()
            text_embeds = encode_by_length(model, tokenizer, classes.sentences(rng)).float()
        scale = model.logit_scale.exp().clamp(max=100)
        loss = contrast(F.normalize(image_embeds, dim=-1), text_embeds, targets, scale)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        averaged.update(model, step=step)
        done = step + 1
        if done % 50 == 0:
            spent = time.process_time() - begun
            print(
                f"{done}/{args.steps} size {size} loss {loss.item():.3f} scale {scale.item():.1f} "
                f"{spent:.0f} CPU s",
                flush=True,
            )
        if done % args.save_every == 0 or done == args.steps:
            state = {
                "step": done,
                "model": model.state_dict(),
                "averaged": averaged.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            with atomic_file(state_path) as stream:
                torch.save(state, stream)
        if done % (4 * args.save_every) == 0:
            print(scores_of(averaged.module, tokenizer, args.data), flush=True)
    final = averaged.module
    with torch.no_grad():
        final.logit_scale.clamp_(max=float(np.log(100)))
    scores = scores_of(final, tokenizer, args.data)
    save_teacher(final, tokenizer, config, model_card(args, scores), args.out)
    return scores


def model_card(args: argparse.Namespace, scores: dict[str, float]) -> str:
    table = "\n".join(f"| {name} | {score:.1f}% |" for name, score in scores.items())
    return f"""# real teacher

A small CLIP (open_clip architecture code) trained from scratch by `benchmarks/real_teacher.py`
on labelled Tiny-ImageNet and CIFAR-10 images; research use only.

- Training: {args.steps} steps of {args.batch} images, AdamW, lr {args.lr:g}, CutMix, 32 to 64 px.
- Weights: fp16 safetensors. Text: byte-level BPE, `tokenizer.json`.

| zero-shot test set | top-1 |
|---|---|
{table}
"""


def real_teacher(args: argparse.Namespace) -> dict[str, Any]:
    """Train the teacher, or go on, or read what the finished one scored."""
    done = args.out / DONE_FILE
    if not done.is_file():
        torch.set_num_threads(args.threads)
        torch.set_flush_denormal(True)
        scores = train(args)
        with atomic_file(done) as stream:
            stream.write(json.dumps({"steps": args.steps, "top1_pct": scores}, indent=1).encode())
        (args.out / STATE_FILE).unlink()
    values: dict[str, Any] = json.loads(done.read_text())
    return values


def studies_teacher(out: Path, data_dir: Path) -> None:
    """Both commands of this file's docstring, unless `out` is finished."""
    if not (out / DONE_FILE).is_file():
        first = out.with_name(f"{out.name}-1")
        real_teacher(parse_args(["--data", str(data_dir), "--out", str(first)]))
        words = ["--data", str(data_dir), "--out", str(out), "--init", str(first)]
        real_teacher(parse_args([*words, *SECOND_STAGE]))


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", default=CONFIG["vision_cfg"]["timm_model_name"], help="timm's")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--save-every", type=int, default=300, help="steps; scores every fourth")
    parser.add_argument("--batch", type=int, default=384)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--min-crop", type=float, default=0.3)
    parser.add_argument("--cutmix", type=float, default=0.5, help="share of the batches")
    parser.add_argument("--init", type=Path, help="a finished teacher: train on, at 64 px")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(words)


def main() -> None:
    print(json.dumps(real_teacher(parse_args())))


if __name__ == "__main__":
    main()
