"""Times on a machine that has two speeds: each subject until its fastest blocks agree.

On a virtual machine whose host moves its cores, two threads that share activations may take twice
as long: MobileNetV2 0.5 1.45 and 2.8 ms, in turns, on a quiet AMD EPYC of two cores (a word sent
from one to the other and back: 60 or 350 ns; one thread: 2.6 ms always). A session that is called
again and again stays at one speed for seconds; when sessions take turns, each block has its own. A
median of that is of neither. What the machine can do is the faster, which enough blocks tell.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.latency.measure import no_garbage_collection, time_block

logger = logging.getLogger(__name__)

AGREEING, MIN_ROUNDS, MAX_ROUNDS = 3, 5, 20
"""Blocks that must agree, and how many are tried: of blocks that are fast one time in four by
chance, 20 have three with a probability of 0.91."""
_BLOCK_S, _PAUSE_S = 0.05, 0.06
"""Of a block's timed calls, and before it: threads fall asleep, and where they wake is drawn anew.
Without pauses a student took 2.72, 1.61, 1.61, 1.69 ms, with them 1.63, 1.57, 1.56, 1.57."""
_WITHIN = 1.1
_MOVED = 1.25


def settled_ms(
    subjects: Mapping[str, Callable[[], object]],
    *,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, float]:
    """Time subjects in turn, a block at a time, until the fastest blocks of each agree.

    Args:
        subjects: Calls that return when their work is done, by name.
        min_rounds: Blocks of each, at least; more where one subject alone could be slow in all.
        max_rounds: At most.
        progress: Called `max_rounds` times: after each, and at once for those that were not needed.

    Returns:
        Milliseconds by name: the median of the medians of the blocks within 10% of the fastest.
    """
    blocks: dict[str, list[float]] = {name: [] for name in subjects}
    with no_garbage_collection():
        for turn in range(1, max_rounds + 1):
            for name, call in subjects.items():
                time.sleep(_PAUSE_S)
                blocks[name].append(float(np.median(time_block(call, _BLOCK_S))))
            progress(f"round {turn}")
            if turn >= min_rounds and all(len(fastest(b)) >= AGREEING for b in blocks.values()):
                for _ in range(turn, max_rounds):
                    progress("settled")
                break
    moved = {name: max(times) / min(times) for name, times in blocks.items()}
    if moved and (ratio := max(moved.values())) > _MOVED:
        name = max(moved, key=lambda name: moved[name])
        logger.info(
            "%d of %d models were slower at times, %s %.3g times: other work, or cores that a host "
            "moves; the faster is kept",
            sum(r > _MOVED for r in moved.values()), len(moved), name, ratio,
        )  # fmt: skip
    return {name: float(np.median(fastest(times))) for name, times in blocks.items()}


def fastest(times_ms: Sequence[float]) -> npt.NDArray[np.float64]:
    """Those within 10% of the fastest; none of none."""
    times = np.asarray(times_ms, np.float64)
    return np.asarray(times[times <= _WITHIN * times.min(initial=np.inf)])


def products(side: int, count: int, threads: int) -> Callable[[], object]:
    """`count` products in ONNX Runtime of float32 matrices of that side, each by the last's answer.

    Raises:
        ImportError: If the onnx package, which the graph is made with, is not installed.
    """
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    factors = product_factors(side, count)
    nodes = [
        helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"], f"n{i}") for i in range(count)
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [side, side])
        for name in ("x0", f"x{count}")
    ]
    weights = [numpy_helper.from_array(factors[i], f"w{i}") for i in range(count)]
    graph = helper.make_graph(nodes, "products", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session: Any = onnxruntime.InferenceSession(model.SerializeToString(), options)
    start = factors[count]
    return lambda: session.run(None, {"x0": start})


def product_factors(side: int, count: int) -> npt.NDArray[np.float32]:
    """(count + 1, side, side): what is multiplied, in turn, and the start, last."""
    rng = np.random.default_rng(0)
    return rng.normal(scale=side**-0.5, size=(count + 1, side, side)).astype(np.float32)
