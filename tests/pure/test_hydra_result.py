"""The result of a job that Hydra has submitted, after the job was killed and runs again."""

from pathlib import Path

import submitit

from jepa_cluster.launch.ops import hydra_app


def test_a_torn_result_does_not_keep_a_job_that_runs_again_from_saving_its_own(
    tmp_path: Path,
) -> None:
    """Its first run was killed while submitit saved its result."""

    def run_again() -> str:
        result = submitit.JobEnvironment().paths.result_pickle
        result.with_name(f"{result.name}.save_tmp").touch()
        hydra_app.remove_torn_result()
        return "saved"

    executor = submitit.LocalExecutor(tmp_path)
    assert executor.submit(run_again).result() == "saved"


def test_without_submitit_there_is_no_result_to_remove() -> None:
    hydra_app.remove_torn_result()
