"""The mathematics: numpy and torch only, no verl, no Ray, no vLLM."""
