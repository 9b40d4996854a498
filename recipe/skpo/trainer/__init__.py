"""verl's synchronous trainer with SKPO's advantages, trackers and checkpoints."""
