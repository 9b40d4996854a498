"""What a prompt, a thought and a reward are, for rollout, evaluation and checks alike."""
