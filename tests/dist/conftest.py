"""The fixtures of attempts.py, nodes.py and save_faults.py, for every test of this folder."""

from support.attempts import launch, new_trial, server
from support.nodes import cluster, two_nodes
from support.save_faults import fault, undisturbed

__all__ = ["cluster", "fault", "launch", "new_trial", "server", "two_nodes", "undisturbed"]
