"""Train a small CLIP teacher on image-sentence pairs and save it as an open_clip folder.

    python benchmarks/train_teacher.py --out dimefm_edge/assets/sample_teacher

It is the sample teacher that ships in the package (real_teacher.py trains the one of the studies
on real images): an open_clip model with a byte-level BPE of its own (`tokenizer.json`), trained
with CLIP's contrastive loss. Linear heads also name what was drawn, of the image and of each
patch: contrast alone learns it slowly.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel

from dimefm_edge.data import scenes
from dimefm_edge.data.scene_drawing import IMAGE_SIZE

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

SCENES_CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": 64, "patch_size": 8, "width": 192, "layers": 8, "head_width": 32,
    },
    "text_cfg": {"context_length": 32, "width": 128, "heads": 4, "layers": 3},
}  # fmt: skip


@dataclass
class Pairs:
    """(N, S, S, 3) uint8 images, and a sentence writer for image i."""

    images: np.ndarray
    sentence: Callable[[int, np.random.Generator], str]
    corpus: list[str]
    flip: bool
    min_scale: float
    drawn: SceneLabels


@dataclass
class SceneLabels:
    """What was drawn, for the auxiliary losses."""

    attributes: np.ndarray
    """(N, A) bool: what each image holds."""
    objects: np.ndarray
    """(N, 2, 6) float32: texture, colour, shape, x, y, radius; radius 0 for no object."""

    SIZES = (len(scenes.TEXTURES), len(scenes.COLOURS), len(scenes.SHAPES))

    @classmethod
    def of(cls, drawn: list[scenes.Scene]) -> SceneLabels:
        names = (scenes.TEXTURES, tuple(scenes.COLOURS), scenes.SHAPES)
        objects = np.zeros((len(drawn), 2, 6), np.float32)
        for row, scene in enumerate(drawn):
            for slot, item in enumerate(scene.objects):
                kinds = [known.index(word) for known, word in zip(names, item.combo, strict=True)]
                objects[row, slot] = (*kinds, item.x, item.y, item.radius)
        return cls(scene_attributes(drawn), objects)


def scene_pairs(count: int) -> Pairs:
    images = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    drawn = []
    for index in range(count):
        image, scene = scenes.scene_pair(index)
        images[index] = np.asarray(image)
        drawn.append(scene)
    return Pairs(
        images,
        lambda i, rng: scenes.describe(drawn[i], rng),
        [scenes.scene_sentence(i) for i in range(50_000)],
        flip=False,
        min_scale=0.8,
        drawn=SceneLabels.of(drawn),
    )


def scene_attributes(drawn: list[scenes.Scene]) -> np.ndarray:
    """What is in each scene, alone and in pairs (red, star, red star, star on the left):
    never a whole held-out combination."""
    found: list[set[tuple[str, ...]]] = []
    for scene in drawn:
        names: set[tuple[str, ...]] = {(scene.background,)}
        for item in scene.objects:
            words = (item.texture, item.colour, item.shape)
            names |= {(w,) for w in (*words, item.size)} | set(itertools.combinations(words, 2))
        if scene.relation is not None:
            first, second = scene.objects
            names |= {(first.shape, scene.relation), (scene.relation, second.shape)}
        found.append(names)
    known = sorted(set().union(*found))
    return np.stack([[name in names for name in known] for names in found])


def train_tokenizer(corpus: list[str], *, vocab_size: int, context_length: int) -> Tokenizer:
    """Byte-level BPE, lower-cased; `<end>` has the highest id, which open_clip pools at."""
    from tokenizers import normalizers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=["<pad>", "<start>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(["<end>"])
    end = tokenizer.token_to_id("<end>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", end)]
    )
    tokenizer.enable_truncation(context_length)
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>", length=context_length)
    return tokenizer


def random_crops(count: int, pairs: Pairs, generator: torch.Generator) -> torch.Tensor:
    """Random resized crops and flips: (B, 2, 3) affine matrices, crop to image."""
    rand = torch.rand(count, 4, generator=generator)
    side = (pairs.min_scale + (1 - pairs.min_scale) * rand[:, 0]).sqrt()
    aspect = torch.exp((rand[:, 1] - 0.5) * (0.4 if pairs.flip else 0.1))
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = (side * aspect).clamp(max=1.0)
    theta[:, 1, 1] = (side / aspect).clamp(max=1.0)
    theta[:, 0, 2] = (rand[:, 2] * 2 - 1) * (1 - theta[:, 0, 0])
    theta[:, 1, 2] = (rand[:, 3] * 2 - 1) * (1 - theta[:, 1, 1])
    if pairs.flip:
        theta[:, 0, 0] *= torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    return theta


def crop(batch: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """Cut crops out of a float batch (B, 3, S, S), one grid_sample."""
    grid = F.affine_grid(theta, list(batch.shape), align_corners=False)
    return F.grid_sample(batch, grid, padding_mode="reflection", align_corners=False)


class SceneHeads(torch.nn.Module):
    """Auxiliary losses on scenes: the embedding names the attributes of the image, and each
    patch the object that it lies in (token labelling, arXiv 2104.10858)."""

    def __init__(self, embed_dim: int, width: int, labels: SceneLabels) -> None:
        super().__init__()
        self.labels = labels
        self.of_image = torch.nn.Linear(embed_dim, labels.attributes.shape[1])
        self.of_patch = torch.nn.Linear(width, 1 + sum(labels.SIZES))
        torch.nn.init.constant_(self.of_image.bias, -4.0)

    def forward(
        self, embeds: torch.Tensor, patches: torch.Tensor, theta: torch.Tensor, rows: np.ndarray
    ) -> torch.Tensor:
        truth = torch.from_numpy(self.labels.attributes[rows]).float()
        image_loss = F.binary_cross_entropy_with_logits(
            self.of_image(embeds), truth, reduction="sum"
        )
        side = int(patches.shape[1] ** 0.5)
        centres = F.affine_grid(theta, [len(rows), 1, side, side], align_corners=False)
        centres = centres.view(len(rows), 1, -1, 2)
        objects = torch.from_numpy(self.labels.objects[rows])[:, :, None]
        distance = (centres - (2 * objects[..., 3:5] - 1)).norm(dim=-1)  # (B, 2, patches)
        inside = distance < 2 * objects[..., 5]
        slot = inside.float().argmax(1)
        is_inside = inside.any(1)
        logits = self.of_patch(patches)
        patch_loss = F.binary_cross_entropy_with_logits(logits[..., 0], is_inside.float())
        which = objects[:, :, 0, :3].gather(1, slot[..., None].expand(-1, -1, 3))[is_inside].long()
        for k, part in enumerate(logits[..., 1:][is_inside].split(self.labels.SIZES, dim=1)):
            patch_loss = patch_loss + F.cross_entropy(part, which[:, k])
        return 0.1 * image_loss / len(rows) + patch_loss


def encode_text(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """open_clip's encode_text on the longest sentence's tokens: causal, so padding is idle."""
    length = int((ids != 0).sum(1).max())
    ids = ids[:, :length].to(model.positional_embedding.device)
    x = model.token_embedding(ids) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    x = x[torch.arange(len(x), device=x.device), ids.argmax(1)] @ model.text_projection
    return F.normalize(x, dim=-1)


def contrastive_loss(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    logits = scale * image_embeds @ text_embeds.T
    pairs = torch.arange(len(logits))
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


@torch.no_grad()
def zero_shot_top1(
    model: torch.nn.Module, tokenizer: Tokenizer, images: torch.Tensor, labels: torch.Tensor,
    classnames: list[str], templates: list[str],
) -> float:  # fmt: skip
    model.eval()
    weights = []
    for name in classnames:
        ids = [tokenizer.encode(t.replace("{c}", name)).ids for t in templates]
        embeds = encode_text(model, torch.tensor(ids)).mean(0)
        weights.append(F.normalize(embeds, dim=0))
    text = torch.stack(weights)
    hits = 0
    for start in range(0, len(images), 250):
        with torch.autocast(images.device.type, torch.bfloat16):
            embeds = model.encode_image(images[start : start + 250], normalize=True).float()
        hits += int(((embeds @ text.T).argmax(1) == labels[start : start + 250]).sum())
    model.train()
    return 100 * hits / len(images)


def normalise(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def test_sets() -> dict[str, tuple[Any, ...]]:
    sets: dict[str, tuple[Any, ...]] = {}
    for name in ("scenes", "scenes-relations"):
        test = scenes.scene_test_set(name)
        pixels = np.stack([np.asarray(test.image(i)) for i in range(len(test))])
        labels = torch.tensor([test.label(i) for i in range(len(test))])
        images = normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        sets[name] = (images, labels, list(test.classnames), list(test.templates))
    return sets


def save_teacher(
    model: torch.nn.Module, tokenizer: Tokenizer, config: dict[str, Any], card: str, out: Path
) -> None:
    """Write an open_clip `local-dir` folder: config, fp16 safetensors, tokenizer, model card."""
    out.mkdir(parents=True, exist_ok=True)
    state = {
        k: (v.half() if v.is_floating_point() else v).contiguous()
        for k, v in model.state_dict().items()
    }
    config = json.loads(json.dumps(config))
    preprocess = {
        "mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest",
    }  # fmt: skip
    save_file(state, out / "open_clip_model.safetensors", metadata={"format": "pt"})
    (out / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2) + "\n"
    )
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    (out / "README.md").write_text(card)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    started = time.monotonic()
    pairs = scene_pairs(args.pairs)
    print(f"{len(pairs.images)} pairs in {time.monotonic() - started:.0f} s", flush=True)
    config = json.loads(json.dumps(SCENES_CONFIG))
    context = config["text_cfg"]["context_length"]
    tokenizer = train_tokenizer(pairs.corpus, vocab_size=args.vocab, context_length=context)
    config["text_cfg"]["vocab_size"] = tokenizer.get_vocab_size()
    vision = dict(config["vision_cfg"])
    model = open_clip.CLIP(config["embed_dim"], vision, dict(config["text_cfg"]))
    if args.init:
        model.load_state_dict(load_file(args.init / "open_clip_model.safetensors"))
    decay = [p for n, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in n]
    plain = [p for n, p in model.named_parameters() if p.ndim < 2 or "embedding" in n]
    optimizer = torch.optim.AdamW(
        [
            {"params": decay, "weight_decay": args.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=args.lr,
        betas=(0.9, 0.98),
    )
    heads = SceneHeads(config["embed_dim"], vision["width"], pairs.drawn)
    optimizer.add_param_group({"params": heads.parameters(), "weight_decay": 0.0})
    image_tower = torch.compile(model.visual) if args.compile else model.visual
    sets = test_sets()
    images = torch.from_numpy(pairs.images).permute(0, 3, 1, 2)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    step, deadline, scores = 0, time.monotonic() + 60 * args.minutes, {}
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    )
    begun, progress, next_report = time.monotonic(), 0.0, 0.0
    while progress < 1:
        order = rng.permutation(len(images))
        for start in range(0, len(order) - args.batch + 1, args.batch):
            rows = order[start : start + args.batch]
            # The schedule follows the clock, so a slower machine still ends its cosine.
            progress = min(1.0, (time.monotonic() - begun) / (deadline - begun))
            warm = min(1.0, (step + 1) / 300)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * warm * (0.5 * (1 + np.cos(np.pi * progress)) + 0.01)
            theta = random_crops(len(rows), pairs, generator)
            batch = crop(normalise(images[rows]), theta)
            ids = [tokenizer.encode(pairs.sentence(int(i), rng)).ids for i in rows]
            with torch.autocast("cpu", torch.bfloat16):
                model.visual.output_tokens = True
                features, patches = image_tower(batch)
                model.visual.output_tokens = False
                text_embeds = encode_text(model, torch.tensor(ids))
            scale = model.logit_scale.exp().clamp(max=100)
            image_embeds = F.normalize(features.float(), dim=-1)
            loss = contrastive_loss(image_embeds, text_embeds.float(), scale)
            loss = loss + heads(features.float(), patches.float(), theta, rows)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 4 == 0:
                averaged.update_parameters(model)
            step += 1
            if progress >= next_report or progress >= 1:
                next_report += 0.1
                scores = {k: zero_shot_top1(model, tokenizer, *v) for k, v in sets.items()}
                print(
                    f"{progress:5.0%} step {step} loss {loss.item():.3f} scale {scale.item():.1f} "
                    + " ".join(f"{k} {v:.1f}%" for k, v in scores.items()),
                    flush=True,
                )
                save_teacher(model, tokenizer, config, model_card(args, scores, step), args.out)
            if progress >= 1:
                break
    torch.optim.swa_utils.update_bn(
        (normalise(images[i * 256 : (i + 1) * 256]) for i in range(len(images) // 256)),
        averaged.module.visual,
    )
    ema = {k: zero_shot_top1(averaged.module, tokenizer, *v) for k, v in sets.items()}
    print("ema " + " ".join(f"{k} {v:.1f}%" for k, v in ema.items()), flush=True)
    best, scores = (
        (averaged.module, ema) if sum(ema.values()) > sum(scores.values()) else (model, scores)
    )
    save_teacher(best, tokenizer, config, model_card(args, scores, step), args.out)


def model_card(args: argparse.Namespace, scores: dict[str, float], step: int) -> str:
    table = "\n".join(f"| {name} | {score:.1f}% |" for name, score in scores.items())
    return f"""# scenes teacher

A small CLIP (open_clip architecture code) trained from scratch by
`benchmarks/train_teacher.py` on procedural `scenes` pairs (no photographs, no people, no
third-party data).

- Training: {step} steps of {args.batch} pairs, {args.minutes:g} minutes, AdamW, lr {args.lr:g}.
- Weights: fp16 safetensors, licence Apache-2.0. Text: byte-level BPE, `tokenizer.json`.
- Use: the default teacher of `dimefm-edge distill`, for trying and testing the tool. It knows
  nothing beyond its training data; do not use its answers for anything else.

| zero-shot test set | top-1 |
|---|---|
{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--pairs", type=int, default=80_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--init", type=Path, help="a folder written before: train on from it")
    parser.add_argument("--compile", action="store_true", help="a third faster, needs g++")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    # On CPUs the flash backward takes twice the time of plain matrix products at 64 tokens.
    with sdpa_kernel(SDPBackend.MATH):
        train(args)


if __name__ == "__main__":
    main()
