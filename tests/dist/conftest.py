"""The fixtures of attempts.py, for every test of this folder."""

from attempts import launch, new_trial, server

__all__ = ["launch", "new_trial", "server"]
