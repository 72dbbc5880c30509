"""How good a model is: zero-shot classification of labelled test sets."""
