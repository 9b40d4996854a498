"""Training data: one module per source, one schema (`data_prep.schema`) that all of them end in.

Every source module is a command, ``python -m data_prep.<source> --out DIR``, that writes
``DIR/train.parquet`` and ``DIR/val.parquet``; the same arguments give the same bytes.
"""
