"""The paper's figures as commands, described in docs/analysis.md.

    python -m recipe.skpo.analysis.sign_consistency     signs of Monte-Carlo advantages, by simulation
    python -m recipe.skpo.analysis.shortcut             what a model does with a segment: skip, continue, ignore
    python -m recipe.skpo.analysis.implicit_advantage   values along correct responses of several checkpoints
    python -m recipe.skpo.analysis.curves               training curves of any number of runs

Each writes into ``--out``: the picture (PNG and SVG), the numbers (JSON and CSV) and the config used.  Numbers are made
in the module of the analysis, pictures in ``drawing``, files in ``output``.
"""
