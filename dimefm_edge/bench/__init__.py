"""Models timed side by side on this machine: which is faster, by how much, how sure, at what cost.

`bench_models` measures, `compare` tells a regression, `report_html` writes what one can send on.
"""

from dimefm_edge.bench.side_by_side import bench_models

__all__ = ["bench_models"]
