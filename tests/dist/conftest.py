"""The fixtures of attempts.py, nodes.py and save_faults.py, for every test of this folder."""

from attempts import launch, new_trial, server
from nodes import cluster, two_nodes
from save_faults import fault, undisturbed

__all__ = ["cluster", "fault", "launch", "new_trial", "server", "two_nodes", "undisturbed"]
