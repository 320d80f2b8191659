"""What `headrace.launch.chaos` does to jobs, and what must be seen afterwards."""
