"""The process that the ranks of one node are forked from: jepa_cluster's fork server, with faulty_rank as program."""

from jepa_cluster.launch.scheduler import fork_server

if __name__ == "__main__":
    fork_server.JOB = "support.faulty_rank"
    fork_server.main()
