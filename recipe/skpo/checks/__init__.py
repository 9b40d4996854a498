"""What is refused before a model is loaded.

A function that refuses raises ``ConfigError``, or ``DataError`` for a data file: one sentence with the key, file or
row, what was found there, and what to do.  ``config`` is the resolved config, unless a docstring says otherwise.
"""

ACTOR, ROLLOUT, MODEL = (f"actor_rollout_ref.{node}" for node in ("actor", "rollout", "model"))
CORRECTION = "algorithm.rollout_correction"
