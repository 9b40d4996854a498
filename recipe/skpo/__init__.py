"""SKPO, Skip-Connected Policy Optimization (arXiv 2604.08690), as a recipe for verl 0.9.1.

Pure rooms (plain data in, plain data out; no Ray, no vLLM, no verl): ``segments``, ``tracker``, ``advantage``,
``loss``, ``settings``, ``state``.  Thin shells: ``rollout`` (one coroutine per prompt), ``trainer`` (what crosses
steps), ``main`` (compose, validate, launch, report).  ``cpu`` is the CPU platform; it knows nothing of SKPO.
"""

__version__ = "0.1.0"
