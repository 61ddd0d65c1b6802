"""Run configurations: each file defines `get_config(arg)`; default.py defines and explains every key."""
