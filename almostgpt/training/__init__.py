"""Training: the loop (trainer), what it steps with (optimizer, schedule), what it reports (metrics,
progress), and the folder that a run lives in (run)."""
