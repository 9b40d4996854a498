"""Sampling from checkpoints and scoring."""
