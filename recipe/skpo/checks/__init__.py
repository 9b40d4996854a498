"""Start-up checks: what is refused before a model is loaded, each as one line that names the fix."""
