"""From a prompt to its stored rows."""
