"""Measurements, each a command that prints a table and writes its numbers as JSON; docs/performance.md quotes them.

    python -m benchmarks.rollout simulated    rollout of SKPO, GRPO and two-batch SKPO on a cluster in virtual time
    python -m benchmarks.rollout real         the same on this machine's vLLM
    python -m benchmarks.recipe               the recipe's own Python: limits per prompt, per step, per million prompts
    python -m benchmarks.update               one actor update with and without share_prefixes
"""
