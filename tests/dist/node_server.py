"""The process that the ranks of one node are forked from: jepa_cluster's fork server, with faulty_rank as program."""

from jepa_cluster.launch import warm

if __name__ == "__main__":
    warm.JOB = "faulty_rank"
    warm.main()
