"""Quantisation-aware training: a student that learns in the integers that its runtime has.

Needs torchao; what uses it imports these modules when a run asks for int8.
"""

from dimefm_edge.quantize.fake_quant import ActivationFakeQuant, WeightFakeQuant

__all__ = ["ActivationFakeQuant", "WeightFakeQuant"]
