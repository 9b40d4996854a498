"""The paper's figures as commands; docs/analysis.md describes them.

Each writes the picture, the numbers and the config into ``--out``.  Numbers are made in the module of the analysis,
pictures in ``drawing``.
"""
