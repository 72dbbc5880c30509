"""A small, real distillation for tests, also run as a process of its own.

    python distill_case.py RUN_DIR [--steps N] [--save-every N] [--pause S] [--resume]
        [--text | --int8 | --elastic]

`--text` distils a text student. Under torchrun it is one rank. Stores, pixels, tokens and students
depend on nothing but fixed seeds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from dimefm_edge.batches import DistillData
from dimefm_edge.config import LossConfig, TextStudentConfig, TrainConfig
from dimefm_edge.cuts import elastic_stage
from dimefm_edge.data.neighbours import NeighbourTable
from dimefm_edge.data.pairs import Pairs
from dimefm_edge.data.sentences import open_sentences
from dimefm_edge.data.store import EmbeddingStore, StoreManifest, StoreWriter
from dimefm_edge.data.tokens import write_tokens
from dimefm_edge.data.views import Views, ViewSpec
from dimefm_edge.distill import DistillReport, distill
from dimefm_edge.distributed import join_ranks, leave_ranks
from dimefm_edge.preprocess import PreprocessSpec
from dimefm_edge.student_grid import elastic_cuts
from dimefm_edge.students import build_student, vit_spec
from dimefm_edge.students.elastic import ElasticStudent
from dimefm_edge.students.text import TextSpec, TextStudent
from dimefm_edge.teacher import SAMPLE_DIR
from dimefm_edge.text_batches import TextData
from dimefm_edge.tokenizer import load_tokenizer

NUM_IMAGES, NUM_TEXTS, EMBED_DIM, SIDE = 90, 50, 16, 16
SPEC = vit_spec(image_size=SIDE, embed_dim=EMBED_DIM, patch_size=8, width=32, depth=2, num_heads=2)
TEXT_SPEC = TextSpec(
    "text", vocab_size=426, context_length=32, width=32, depth=1, num_heads=2, token_dim=8,
    embed_dim=EMBED_DIM,
)  # fmt: skip
TEXT_LOSS = TextStudentConfig(text_images=10, text_feature_weight=0.1)
TRAIN = TrainConfig(
    steps=12, batch_size=16, text_batch_size=8, lr=1e-3, amp="off", save_every=4, eval_every=6
)


def write_store(folder: Path, kind: str, count: int, seed: int) -> EmbeddingStore:
    """A store of random unit vectors that depends on `seed` alone."""
    if not folder.exists():
        rows = np.random.default_rng(seed).normal(size=(count, EMBED_DIM)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        write_rows(folder, kind, rows)
    return EmbeddingStore.open(folder)


def write_rows(folder: Path, kind: str, rows: np.ndarray) -> None:
    manifest = StoreManifest(
        kind=kind,
        teacher="random",
        weights_hash="0" * 16,
        preprocess_hash="1" * 16,
        source=f"{kind}-fixed",
        embed_dim=EMBED_DIM,
        logit_scale=20.0,
        num_rows=len(rows),
        shard_rows=2048,
    )
    writer = StoreWriter.create_or_resume(folder, manifest)
    writer.write_shard(0, rows.astype(np.float16))
    writer.finish()


def fixed_pixels(batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for rows in batches:
        yield np.stack(
            [
                np.random.default_rng(int(row)).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                for row in rows
            ]
        )


def make_data(folder: Path) -> DistillData:
    return DistillData(
        images=write_store(folder / "images", "images", NUM_IMAGES, 1),
        texts=write_store(folder / "texts", "texts", NUM_TEXTS, 2),
        pixels=fixed_pixels,
        preprocess=PreprocessSpec(image_size=SIDE),
        logit_scale=20.0,
    )


def make_text_data(folder: Path) -> TextData:
    """The same stores, with the tokens of as many sentences."""
    tokenizer = load_tokenizer(SAMPLE_DIR / "tokenizer.json")
    sentences = open_sentences([f"scenes:{NUM_TEXTS}"])
    return TextData(
        texts=write_store(folder / "texts", "texts", NUM_TEXTS, 2),
        images=write_store(folder / "images", "images", NUM_IMAGES, 1),
        tokens=write_tokens(sentences, tokenizer, folder, vocab_size=TEXT_SPEC.vocab_size),
        spec=TEXT_SPEC,
        logit_scale=20.0,
    )


def make_pairs(seed: int = 3) -> Pairs:
    """Every image has one of 5 labels, every label 2 sentences."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(5, 2, EMBED_DIM)).astype(np.float32)
    return Pairs(np.arange(NUM_IMAGES) % 5, rows / np.linalg.norm(rows, axis=2, keepdims=True))


def make_neighbours() -> NeighbourTable:
    """Four sentences of every image."""
    rows = (np.arange(NUM_IMAGES)[:, None] * 3 + np.arange(4)) % NUM_TEXTS
    return NeighbourTable(rows.astype(np.int32), "fixed")


def make_views(folder: Path) -> Views:
    """Two views of every image."""
    specs = tuple(ViewSpec(view, 0.5, True) for view in range(2))
    stores = [write_store(folder / str(v), "images", NUM_IMAGES, 10 + v) for v in range(2)]
    return Views(specs, tuple(stores))


def save_module(path: Path, module: nn.Module) -> None:
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, path)


def run_case(
    run_dir: Path,
    *,
    train: TrainConfig = TRAIN,
    loss: LossConfig | None = None,
    resume: bool = False,
    pause_s: float = 0.0,
    data: DistillData | TextData | None = None,
    is_int8: bool = False,
    is_text: bool = False,
    is_elastic: bool = False,
) -> DistillReport:
    """Distil the fixed case into `run_dir`; `pause_s` slows every evaluation down."""
    run_dir.mkdir(parents=True, exist_ok=True)
    ranks = join_ranks()
    make = make_text_data if is_text else make_data
    if ranks.is_main and data is None:
        make(run_dir.parent / "store")
    ranks.barrier()
    torch.manual_seed(7)

    def evaluate(module: nn.Module) -> dict[str, float]:
        time.sleep(pause_s)
        return {"norm": float(sum(p.detach().abs().sum() for p in module.parameters()))}

    student: nn.Module = TextStudent(TEXT_SPEC) if is_text else build_student(SPEC)
    if is_int8:
        from dimefm_edge.quantize.qat import qat_prepare

        student = qat_prepare(student, image_size=SIDE, rules_name="onnxruntime-x86-avx2")
    if is_elastic:
        student, train = ElasticStudent(student, elastic_cuts(SPEC)), elastic_stage(train)
    return distill(
        student,
        data or make(run_dir.parent / "store"),
        loss=TEXT_LOSS if is_text else loss or LossConfig(udist_weight=0.1),
        train=train,
        run_dir=run_dir,
        save_weights=save_module,
        evaluate=evaluate,
        resume=resume,
        ranks=ranks,
        device=torch.device("cpu"),
    )


def main() -> None:
    import dataclasses

    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--steps", type=int, default=TRAIN.steps)
    parser.add_argument("--batch-size", type=int, default=TRAIN.batch_size)
    parser.add_argument("--eval-every", type=int, default=TRAIN.eval_every)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--text", action="store_true")
    parser.add_argument("--elastic", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    train = dataclasses.replace(
        TRAIN, steps=args.steps, batch_size=args.batch_size, eval_every=args.eval_every
    )
    run_case(
        args.run_dir, train=train, resume=args.resume, pause_s=args.pause, is_int8=args.int8,
        is_text=args.text, is_elastic=args.elastic,
    )  # fmt: skip
    leave_ranks()


if __name__ == "__main__":
    main()
