"""Two real processes that gather embeddings, against one process of the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dimefm_edge.config import LossConfig
from dimefm_edge.distributed import Ranks, join_ranks, leave_ranks
from dimefm_edge.losses import distillation_loss

ROOT = Path(__file__).parents[2]
BATCH, WIDTH, EMBED_DIM, TEXTS = 8, 6, 5, 7
CONFIG = LossConfig(udist_weight=0.2)

# One rank: the same model on its half of the same batch, wrapped in DDP.
RANK = """
import importlib.util, sys, time
import torch
from torch.nn.parallel import DistributedDataParallel
from dimefm_edge.distributed import join_ranks, leave_ranks

spec = importlib.util.spec_from_file_location("case", sys.argv[2])
case = importlib.util.module_from_spec(spec)
spec.loader.exec_module(case)

torch.set_num_threads(1)
ranks = join_ranks()
again = join_ranks()
assert (again.rank, again.world_size) == (ranks.rank, ranks.world_size)
begun = time.time()
if ranks.rank == 1:
    time.sleep(0.5)
ranks.barrier()
waited = time.time() - begun

model, images, teacher, texts = case.make_case()
net = DistributedDataParallel(model)
local = case.embed(net, images[ranks.slice(case.BATCH)])
local.retain_grad()
gathered = ranks.gather_with_grad(local)
loss = case.loss_of(gathered, teacher, texts)
(loss * ranks.world_size).backward()
torch.save(
    {
        "rank": ranks.rank, "is_main": ranks.is_main, "waited": waited,
        "gathered": gathered.detach(), "loss": loss.item(), "local_grad": local.grad,
        "weight_grad": model.weight.grad, "bias_grad": model.bias.grad,
    },
    f"{sys.argv[1]}/rank{ranks.rank}.pt",
)
del net, local, gathered, loss  # as a run: what holds the group at exit may abort in gloo
leave_ranks()
leave_ranks()
"""


def make_case():
    """A model in float64, its images, and the teacher's embeddings: alike in every process."""
    torch.manual_seed(1)
    model = torch.nn.Linear(WIDTH, EMBED_DIM).double()
    images = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    teacher = torch.randn(BATCH, EMBED_DIM, dtype=torch.float64)
    texts = torch.randn(TEXTS, EMBED_DIM, dtype=torch.float64)
    return model, images, F.normalize(teacher, dim=1), F.normalize(texts, dim=1)


def embed(model, images):
    return F.normalize(model(images), dim=1)


def loss_of(student, teacher, texts):
    return distillation_loss(student, teacher, texts, config=CONFIG, logit_scale=20.0)["loss"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "rank.py"
    script.write_text(RANK)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            str(script), str(folder), str(Path(__file__)),
        ],
        env={
            **os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def one_process() -> dict:
    model, images, teacher, texts = make_case()
    embeds = embed(model, images)
    embeds.retain_grad()
    loss = loss_of(embeds, teacher, texts)
    loss.backward()
    return {
        "embeds": embeds.detach(), "grad": embeds.grad, "loss": loss.item(),
        "weight_grad": model.weight.grad, "bias_grad": model.bias.grad,
    }  # fmt: skip


def test_every_rank_gathers_the_whole_batch_in_order(two_ranks, one_process):
    for rank, found in enumerate(two_ranks):
        assert (found["rank"], found["is_main"]) == (rank, rank == 0)
        torch.testing.assert_close(found["gathered"], one_process["embeds"])
        assert found["loss"] == pytest.approx(one_process["loss"], rel=1e-12)


def test_gradients_flow_to_the_ranks_own_part_only(two_ranks, one_process):
    halves = one_process["grad"].chunk(2)
    for half, found in zip(halves, two_ranks, strict=True):
        assert half.abs().max() > 1e-6
        # Times world_size: the mean over ranks that DDP takes divides it away.
        torch.testing.assert_close(found["local_grad"], 2 * half)


def test_after_ddps_mean_the_gradient_is_that_of_one_big_batch(two_ranks, one_process):
    for found in two_ranks:
        for name in ("weight_grad", "bias_grad"):
            torch.testing.assert_close(found[name], one_process[name])


def test_a_barrier_waits_for_the_last_rank(two_ranks):
    assert all(found["waited"] > 0.4 for found in two_ranks)


def test_one_process_needs_no_group(monkeypatch):
    for value in (None, "1"):  # torchrun --nproc-per-node=1 says 1
        if value is None:
            monkeypatch.delenv("WORLD_SIZE", raising=False)
        else:
            monkeypatch.setenv("WORLD_SIZE", value)
        ranks = join_ranks()
        assert ranks == Ranks(0, 1)
        assert ranks.is_main
        assert not torch.distributed.is_initialized()
    ranks.barrier()
    leave_ranks()
    local = torch.ones(3, 2, requires_grad=True)
    assert ranks.gather_with_grad(local) is local


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_slices_are_the_batch(world_size):
    parts = [list(range(12))[Ranks(rank, world_size).slice(12)] for rank in range(world_size)]
    assert [row for part in parts for row in part] == list(range(12))
    assert {len(part) for part in parts} == {12 // world_size}
    mains = [rank for rank in range(world_size) if Ranks(rank, world_size).is_main]
    assert mains == [0]


def test_a_batch_that_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="a batch of 10 cannot be split over 4 ranks"):
        Ranks(0, 4).slice(10)
