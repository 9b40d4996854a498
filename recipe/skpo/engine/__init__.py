"""What the actor computes faster than verl's own engine, with the same results; see docs/performance.md."""
