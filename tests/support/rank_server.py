"""The process that ranks are forked from: the fork server, with rank_program as its program."""

from jepa_cluster.launch.scheduler import fork_server

if __name__ == "__main__":
    fork_server.RANK_MODULE = "support.rank_program"
    fork_server.main()
