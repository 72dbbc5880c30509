"""Quantisation-aware training: a student that learns in the integers that its runtime has."""
