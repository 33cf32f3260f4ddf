"""Adapters on disk, as configurations of HF PEFT, and folded into the weights: what a method is outside of a model."""
