"""What people run: edit, stats, evaluate, generate, plan, doctor; the command line and reports."""
