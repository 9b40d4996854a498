"""What a run writes and how."""
